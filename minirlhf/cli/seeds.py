"""`minirlhf seeds`: both arms over many seeds, and the table of claims."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from minirlhf.cli.terminal import Bars, say_if_new
from minirlhf.engine.workers import Workers


@dataclass(frozen=True)
class Options:
    """What `minirlhf seeds` can be given."""

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


def run(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Run both arms of every seed and write the table of claims."""
    from minirlhf.drift.config import DriftConfig
    from minirlhf.engine.files import write_json, write_text
    from minirlhf.sweeps.cells import claim
    from minirlhf.sweeps.seeds import FRESH, NOTE, markdown, run_seeds

    wanted = [*range(options.seeds), *range(FRESH, FRESH + options.fresh)]
    base = DriftConfig()
    workers = Workers(jobs=options.jobs)
    if options.resume:
        say_if_new(options.parts / "sweep.json", "sweep")
    claim(options.parts, base, resume=options.resume, dials={})
    with closing(Bars()) as bars:
        report = bars.of_jobs("runs")
        summaries = run_seeds(base, wanted, options.parts / "done", workers, report)
    rows = _rows(summaries, options)
    # the facts of every batch are as large as all else, and stay in --parts
    slim = [{k: v for k, v in summary.items() if k != "batches"} for summary in summaries]
    write_json(options.out, {"table": rows, "runs": slim})
    command = f"minirlhf seeds --seeds {options.seeds} --fresh {options.fresh}"
    text = markdown(rows, command, note=NOTE)
    write_text(options.table, text)
    print(text)
    return 0


def _rows(summaries: list[dict[str, Any]], options: Options) -> list[dict[str, Any]]:
    """The table of claims: seeds at which settings were chosen, and fresh ones, apart."""
    from minirlhf.sweeps.seeds import FRESH, table

    tuned = [summary for summary in summaries if summary["seed"] < FRESH]
    fresh = [summary for summary in summaries if summary["seed"] >= FRESH]
    return [
        *({"seeds": f"seeds 0 to {options.seeds - 1}", **row} for row in table(tuned)),
        *({"seeds": "fresh seeds", **row} for row in table(fresh)),
    ]
