"""`minirlhf remedies`: every remedy on one logged batch and trained from nothing."""

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from minirlhf.cli.terminal import Bars, as_given, say_if_new
from minirlhf.drift.config import DriftConfig
from minirlhf.engine.workers import Workers


@dataclass(frozen=True)
class Options:
    """What `minirlhf remedies` can be given."""

    arms: tuple[str, ...] = ()
    """arms of remedies/arms.py, or several joined by +; none given = all, and two stacks"""
    seeds: int = 5
    """seeds 0 .. seeds - 1"""
    steps: int = 60
    """PPO steps of every run"""
    workers: Annotated[Workers, tyro.conf.arg(name="")] = field(default_factory=Workers)
    out: Path = Path("runs/remedies")
    """folder for the tables (Parquet, Markdown) and for what a resumed call goes on from"""
    resume: bool = False
    """go on with the runs in --out, with more arms or seeds if you like"""
    quick: bool = False
    """tiny runs, to try the machinery: too small to show anything"""
    ship: bool = False
    """also put the table into data/evidence and docs/remedies.md (for developers)"""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Run the arms that are not done yet, write the table, print the two-sided test."""
    import pandas as pd

    from minirlhf.drift.make_data import ship
    from minirlhf.engine.files import write_table, write_text
    from minirlhf.sweeps.cells import claim
    from minirlhf.sweeps.remedy_runs import EVERY_ARM, run_remedies
    from minirlhf.sweeps.remedy_table import agreement, markdown, repaired

    base = DriftConfig(steps=options.steps)
    base = base.quick() if options.quick else base
    arms = options.arms or EVERY_ARM
    seeds = range(options.seeds)
    if options.resume:
        say_if_new(options.out / "sweep.json", "sweep")
    claim(options.out, base, arms, resume=options.resume)
    with closing(Bars()) as bars:
        found = run_remedies(arms, seeds, base, options.out, options.workers, bars.of_jobs)
    rows = pd.DataFrame(found)
    text = markdown(rows, as_given())
    write_table(options.out / "remedies.parquet", found)
    write_text(options.out / "remedies.md", text)
    signs = agreement(rows)
    signs = signs[signs["told"]]
    print(repaired(rows).round(2).to_string(index=False))
    print(f"push and outcome change alike: {int(signs['agrees'].sum())} of {len(signs)} remedies")
    print(f"\nWritten to {options.out}: remedies.md, remedies.parquet and the tables of the runs")
    if options.ship:
        table = {"remedies": options.out / "remedies.parquet"}
        ship(table, command=as_given(), seed=0)
        write_text(Path("docs/remedies.md"), text)
    return 0
