"""The commands that make many runs: `minirlhf seeds | sweep | remedies`.

Each has its options (a dataclass that tyro reads) and a function that runs it. Left out: how a
command line is read, and the commands of a single run (cli/main.py).
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from minirlhf.engine.jobs import Workers


@dataclass(frozen=True)
class SeedsRun:
    """Both arms over many seeds: the table of claims with intervals."""

    seeds: int = 10
    """seeds 0 .. seeds - 1"""
    fresh: int = 5
    """further seeds, from 100 on, at which no setting was chosen"""
    jobs: int = 2
    """single-thread processes at once; one a core is fastest"""
    out: Path = Path("data/seeds.json")
    """all summaries and the table"""
    table: Path = Path("docs/seeds.md")
    """the table as Markdown"""
    parts: Path = Path("runs/seeds")
    """folder of the summaries that are done, from which a resumed call goes on"""
    resume: bool = False
    """go on with the runs in --parts"""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("fresh", 0), ("jobs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.seeds > 100:
            raise ValueError(
                f"seeds is {self.seeds}; it must be at most 100, where the fresh ones begin"
            )


def sweep_run() -> type:
    """The options of `minirlhf sweep`; its settings come with torch, which takes a second."""
    from minirlhf.drift.config import DriftConfig
    from minirlhf.sweeps.grid import Grid

    @dataclass(frozen=True)
    class SweepRun:
        """A grid of runs over beta, epsilon, length bias, remedy and seed."""

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

    return SweepRun


@dataclass(frozen=True)
class RemediesRun:
    """Every remedy on the same logged batch and trained from nothing: the whole table."""

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


@contextmanager
def _bars():
    """report(stage) for the stages of a sweep: a bar each, and a line for what went wrong."""
    bars: dict[str, tqdm] = {}

    def close() -> None:
        for bar in bars.values():
            bar.close()

    def stage(name: str) -> Callable[[str, int, int], None]:
        def report(text: str, done: int, total: int) -> None:
            if name not in bars:
                close()
                bars[name] = tqdm(total=total, desc=f"{name:<13}", ncols=88)
            bar = bars[name]
            if done == bar.n:
                tqdm.write(f"minirlhf: {text}", file=sys.stderr)
            bar.update(done - bar.n)

        return report

    try:
        yield stage
    finally:
        close()


def seeds(options: SeedsRun) -> int:
    """Run both arms of every seed and write the table of claims."""
    from minirlhf.drift.run import DriftConfig
    from minirlhf.engine.files import write_json, write_text
    from minirlhf.sweeps.grid import claim
    from minirlhf.sweeps.seeds import FRESH, NOTE, markdown, run_seeds, table

    wanted = [*range(options.seeds), *range(FRESH, FRESH + options.fresh)]
    base, workers = DriftConfig(), Workers(jobs=options.jobs)
    _say_if_new(options.parts, options.resume)
    claim(options.parts, base, resume=options.resume, dials={})
    with _bars() as report:
        done = run_seeds(base, wanted, options.parts / "done", workers, report("runs"))
    tuned, fresh = ([s for s in done if (s["seed"] >= FRESH) == new] for new in (False, True))
    rows = [{"seeds": f"seeds 0 to {options.seeds - 1}", **row} for row in table(tuned)]
    rows += [{"seeds": "fresh seeds", **row} for row in table(fresh)]
    slim = [{k: v for k, v in s.items() if k != "batches"} for s in done]
    write_json(options.out, {"table": rows, "runs": slim})
    text = markdown(
        rows, f"minirlhf seeds --seeds {options.seeds} --fresh {options.fresh}", note=NOTE
    )
    write_text(options.table, text)
    print(text)
    return 0


def sweep(options: Any) -> int:
    """Run the cells that are not done yet, write the tables, print the means."""
    import pandas as pd

    from minirlhf.drift.make_data import ship
    from minirlhf.sweeps.grid import claim, run_cells

    base = options.config.quick() if options.quick else options.config
    cells = options.grid.cells(base)
    _say_if_new(options.out, options.resume)
    claim(options.out, base, options.grid.remedy, resume=options.resume)
    with _bars() as report:
        rows, _ = run_cells(cells, base, options.out, options.workers, report)
    table = pd.DataFrame(rows)
    shown = ["rm_score_sd", "kl_nats", "final_brief_length_tokens", "final_brief_gold"]
    shown += ["final_detailed_length_tokens", "final_detailed_gold"]
    dials = ["remedy", "length_bias", "beta", "clip"]
    means = table.pivot_table(index=dials, values=shown, aggfunc="mean")
    print(means[shown].round(2).to_string())
    print(f"\nWritten to {options.out}: sweep.parquet, trajectories.parquet, seconds.parquet")
    if options.ship:
        made = {n: options.out / f"{n}.parquet" for n in ("sweep", "trajectories")}
        ship(made, command=_said(options.out), seed=min(options.grid.seed or (base.seed,)))
    return 0


def remedies(options: RemediesRun) -> int:
    """Run the arms that are not done yet, write the table, print the two-sided test."""
    import pandas as pd

    from minirlhf.drift.config import DriftConfig
    from minirlhf.drift.make_data import ship
    from minirlhf.engine.files import write_table, write_text
    from minirlhf.sweeps.grid import claim
    from minirlhf.sweeps.remedy_runs import EVERY_ARM, run_remedies
    from minirlhf.sweeps.remedy_table import agreement, markdown, repaired

    base = DriftConfig(steps=options.steps)
    base = base.quick() if options.quick else base
    _say_if_new(options.out, options.resume)
    claim(options.out, base, options.arms or EVERY_ARM, resume=options.resume)
    given = (options.arms or EVERY_ARM, range(options.seeds), base, options.out, options.workers)
    with _bars() as report:
        rows = pd.DataFrame(run_remedies(*given, report))
    text = markdown(rows, _said(options.out))
    write_table(options.out / "remedies.parquet", rows.to_dict("records"))
    write_text(options.out / "remedies.md", text)
    signs = agreement(rows)
    signs = signs[signs["told"]]
    print(repaired(rows).round(2).to_string(index=False))
    print(f"push and outcome change alike: {int(signs['agrees'].sum())} of {len(signs)} remedies")
    print(f"\nWritten to {options.out}: remedies.md, remedies.parquet and the tables of the runs")
    if options.ship:
        made = {"remedies": options.out / "remedies.parquet"}
        ship(made, command=_said(options.out), seed=0)
        write_text(Path("docs/remedies.md"), text)
    return 0


def _say_if_new(out: Path, resume: bool) -> None:
    if resume and not (out / "sweep.json").exists():
        print(f"nothing to resume in {out}: a new sweep starts there", file=sys.stderr)


def _said(out: Path) -> str:
    """The command as it was given, without where it was to write and how it was spread."""
    words, kept = sys.argv[1:], ["minirlhf"]
    silent = {"--out": 2, "--resume": 1, "--ship": 1, "--jobs": 2, "--backend": 2, "--address": 2}
    while words:
        count = silent.get(words[0], 0)
        kept += [] if count else words[:1]
        words = words[max(count, 1) :]
    return " ".join(kept)
