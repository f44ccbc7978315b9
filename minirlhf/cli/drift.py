"""`minirlhf drift`: the case as one run, from nothing to figures and report."""

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from minirlhf.cli.terminal import (
    Bars,
    print_answers,
    print_evaluations,
    print_seconds,
    say_if_new,
)
from minirlhf.drift.config import DriftConfig
from minirlhf.engine.workers import available

if TYPE_CHECKING:
    from minirlhf.drift.run import Drift


@dataclass(frozen=True)
class Options:
    """What `minirlhf drift` can be given: all settings of a run, and where it goes."""

    config: Annotated[DriftConfig, tyro.conf.arg(name="")] = field(default_factory=DriftConfig)
    out: Path = Path("runs/drift")
    """folder for everything that the run writes"""
    desk: Path | None = None
    """a desk.toml of your own; None = the one that ships with minirlhf"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""
    quick: bool = False
    """a few seconds instead of a minute: too small to show the drift"""
    resume: bool = False
    """go on with the run in --out; starts one if there is none"""
    threads: int = field(default_factory=lambda: min(available(), 4))
    """CPU cores to compute on; the results are equal to the last bit on any number of them"""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; give at least 1")


def run(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Run the case, print the two evaluations side by side, write figures and report."""
    from minirlhf.desk.world import Desk
    from minirlhf.drift.run import Drift
    from minirlhf.engine import compute

    compute.use(options.threads)
    config = options.config.quick() if options.quick else options.config
    device = compute.pick_device(options.device)
    desk = Desk.load(options.desk)
    if options.resume:
        say_if_new(options.out / "config.json", "run")
    with closing(Bars()) as bars:
        case = Drift(
            config, options.out, progress=bars, device=device, desk=desk, resume=options.resume
        )
        summary = case.run()
    _write_report(case, summary, options)
    print_evaluations(summary, print)
    print_answers(case.answers, print)
    print_seconds(summary, case.metrics, print)
    if options.quick:
        from minirlhf.lab.report import QUICK

        print(f"\n{QUICK}")
    print(f"\nWritten to {options.out}: report.html, drift.png, summary.json and the rest")
    return 0


def _write_report(case: "Drift", summary: dict[str, Any], options: Options) -> None:
    """The figure by itself, and with tables and answers as one HTML file."""
    import pandas as pd

    from minirlhf.engine.files import write_atomic, write_text
    from minirlhf.lab.plots import drift_figure
    from minirlhf.lab.report import report_html

    figure = drift_figure(summary)
    write_atomic(
        options.out / "drift.png", lambda path: figure.savefig(path, format="png", dpi=150)
    )
    answers = pd.DataFrame(case.answers)
    page = report_html(summary, answers, [figure], quick=options.quick)
    write_text(options.out / "report.html", page)
