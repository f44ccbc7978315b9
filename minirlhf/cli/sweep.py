"""`minirlhf sweep`: a grid of runs, and its tables.

Left out: a --help without torch. The grid's remedies are functions that need it.
"""

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from minirlhf.cli.terminal import Bars, as_given, say_if_new
from minirlhf.drift.config import DriftConfig
from minirlhf.engine.workers import Workers
from minirlhf.sweeps.grid import Grid

DIALS = ["remedy", "length_bias", "beta", "clip"]
MEASURES = [
    "rm_score_sd",
    "kl_nats",
    "final_brief_length_tokens",
    "final_brief_gold",
    "final_detailed_length_tokens",
    "final_detailed_gold",
]


@dataclass(frozen=True)
class Options:
    """What `minirlhf sweep` can be given: the grid, and the settings that it leaves alone."""

    grid: Grid = field(default_factory=Grid)
    config: Annotated[DriftConfig, tyro.conf.arg(name="")] = field(default_factory=DriftConfig)
    workers: Annotated[Workers, tyro.conf.arg(name="")] = field(default_factory=Workers)
    out: Path = Path("runs/sweep")
    """folder for the tables (Parquet) and for what a resumed sweep goes on from"""
    resume: bool = False
    """go on with the sweep in --out, with more cells if you like"""
    quick: bool = False
    """tiny runs, to try the machinery: too small to show anything"""
    ship: bool = False
    """also put the tables into data/evidence (for developers)"""


def run(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Run the cells that are not done yet, write the tables, print the means."""
    import pandas as pd

    from minirlhf.drift.make_data import ship
    from minirlhf.sweeps.cells import claim, run_cells

    base = options.config.quick() if options.quick else options.config
    cells = options.grid.cells(base)
    if options.resume:
        say_if_new(options.out / "sweep.json", "sweep")
    claim(options.out, base, options.grid.remedy, resume=options.resume)
    with closing(Bars()) as bars:
        rows, _ = run_cells(cells, base, options.out, options.workers, bars.of_jobs)
    means = pd.DataFrame(rows).pivot_table(index=DIALS, values=MEASURES, aggfunc="mean")
    print(means[MEASURES].round(2).to_string())
    print(f"\nWritten to {options.out}: sweep.parquet, trajectories.parquet, seconds.parquet")
    if options.ship:
        made = {name: options.out / f"{name}.parquet" for name in ("sweep", "trajectories")}
        ship(made, command=as_given(), seed=min(options.grid.seed or (base.seed,)))
    return 0
