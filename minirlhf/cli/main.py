"""The command line: `minirlhf drift | seeds | sweep | remedies | data | check | battery`.

Options are the fields of the config dataclasses (`minirlhf drift --help` lists them with their
units). What goes wrong is one sentence on stderr and a non-zero exit status; what was computed
before stays on disk, and --resume goes on from there.
"""

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from minirlhf import __version__
from minirlhf.cli import many_runs
from minirlhf.cli.terminal import Bars, print_answers, print_evaluations, print_seconds

EXPECTED = (ValueError, RuntimeError, FloatingPointError)  # one sentence; the rest are bugs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    commands = {
        "drift": (_drift_run(), drift),
        "seeds": (many_runs.SeedsRun, many_runs.seeds),
        "sweep": (many_runs.sweep_run(), many_runs.sweep),
        "remedies": (many_runs.RemediesRun, many_runs.remedies),
        "data": (DataRun, data),
        "check": (CheckRun, check),
        "battery": (_battery_run(), battery),
    }
    for stream in (sys.stdout, sys.stderr):  # a Windows pipe has no "│" and no "≥"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    given = sys.argv[1:] if argv is None else list(argv)
    if given == ["--version"]:
        print(f"minirlhf {__version__}")
        return 0
    try:
        options = _parse({name: kind for name, (kind, _) in commands.items()}, given)
        return next(run for kind, run in commands.values() if isinstance(options, kind))(options)
    except KeyboardInterrupt:
        again = given[:1] in (["drift"], ["seeds"], ["sweep"], ["remedies"])
        resumes = "; the same command with --resume goes on" if again else ""
        print(f"minirlhf: stopped{resumes}", file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"minirlhf: {error}", file=sys.stderr)
        return 2
    except EXPECTED as error:
        print(f"minirlhf: {error}", file=sys.stderr)
        return 1


def _drift_run() -> type:
    """The options of `minirlhf drift`; its settings come with torch, which takes a second."""
    from minirlhf.drift.run import DriftConfig
    from minirlhf.engine.compute import available

    @dataclass(frozen=True)
    class DriftRun:
        """Train reference, reward model and policy from nothing, and audit the drift."""

        config: Annotated[DriftConfig, tyro.conf.arg(name="")] = field(default_factory=DriftConfig)
        out: Path = Path("runs/drift")
        """folder for everything that the run writes"""
        desk: Path | None = None
        """a desk.toml of your own; none = the one that ships with minirlhf"""
        device: str = "auto"
        """auto, cpu, cuda or mps"""
        quick: bool = False
        """a few seconds instead of a minute: too small to show the drift"""
        resume: bool = False
        """go on with the run in --out; starts one if there is none"""
        threads: int = field(default_factory=lambda: min(available(), 4))
        """CPU cores to compute on; the results are equal to the last bit on any number of them"""

    return DriftRun


def _battery_run() -> type:
    """The options of `minirlhf battery`."""
    from minirlhf.config import PPOConfig

    @dataclass(frozen=True)
    class BatteryRun:
        """Nine short runs that tell why PPO with these settings drifts, on a two-answer desk."""

        ppo: PPOConfig = field(default_factory=PPOConfig)
        gap: float = 0.3
        """what the reward model pays more for the verbose answer, reward sd"""
        refresh: int | None = None
        """steps after which the reference becomes the policy; none = it stays"""
        seed: int = 0
        """seed of the runs"""

    return BatteryRun


class UsageError(Exception):
    """A command line that asks for something that is not there, in one sentence."""


def _parse(commands: dict[str, Any], argv: list[str]) -> Any:
    """The options of one command; what tyro would print in a box is raised as one sentence."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="minirlhf",
                description="RLHF that drifts, on a laptop; `minirlhf --version` tells which one.",
                args=argv,
            )
    except ValueError as error:  # the settings that belong to no stage
        text = str(error)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        text = _unboxed(said.getvalue())
    text = re.sub(r"^Error parsing \w\S*: ", "", text)
    option = r"^(?:(?:sft|preferences|reward|ppo|audit)\.[a-z_]+|[a-z_]+(?= is ))"
    text = re.sub(option, lambda m: f"--{m[0].replace('_', '-')}", text)
    command = " ".join(["minirlhf", *(name for name in argv[:1] if name in commands)])
    raise UsageError(f"{text} ({command} --help lists what there is)")


def _unboxed(box: str) -> str:
    """What tyro says in a box, on one line: its first paragraph, and what may have been meant."""
    lines = [line.strip(" │") for line in box.splitlines()[1:]]  # the first one is a title
    text = " ".join("\n" if line and set(line) <= set("─-╰╯") else line for line in lines)
    first, *others = text.strip().split("\n")
    meant = next((part for part in others if "Perhaps you meant" in part), "")
    near = [o for o in dict.fromkeys(re.findall(r"--[\w.-]+", meant)) if o != "--help"][:2]
    return first.strip().rstrip(".") + (f"; perhaps you meant {' or '.join(near)}" if near else "")


@dataclass(frozen=True)
class DataRun:
    """Make data/ anew from a default run (all but desk.toml and seeds.json)."""

    folder: Path = Path("data")
    """where desk.toml lies and the rest goes"""


@dataclass(frozen=True)
class CheckRun:
    """Is this machine ready for the course?"""

    out: Path = Path()
    """a folder that runs would write to"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""


def drift(options: Any) -> int:
    """Run the case, print the two evaluations side by side, write figures and report."""
    from minirlhf.desk.world import Desk
    from minirlhf.drift.run import Drift
    from minirlhf.engine import compute
    from minirlhf.engine.compute import pick_device

    if options.threads < 1:
        raise ValueError(f"--threads is {options.threads}; give at least 1")
    compute.use(options.threads)
    config = options.config.quick() if options.quick else options.config
    bars, device, desk = Bars(), pick_device(options.device), Desk.load(options.desk)
    chosen = {"device": device, "desk": desk, "resume": options.resume}
    if options.resume and not (options.out / "config.json").exists():
        print(f"nothing to resume in {options.out}: a new run starts there", file=sys.stderr)
    try:
        run = Drift(config, options.out, progress=bars, **chosen)
        summary = run.run()
    finally:
        bars.close()
    import pandas as pd

    from minirlhf.engine.files import write_atomic, write_text
    from minirlhf.lab.plots import drift_figure
    from minirlhf.lab.report import QUICK, report_html

    figure = drift_figure(summary)
    write_atomic(options.out / "drift.png", lambda p: figure.savefig(p, format="png", dpi=150))
    write_text(
        options.out / "report.html",
        report_html(summary, pd.DataFrame(run.answers), [figure], quick=options.quick),
    )
    print_evaluations(summary, print)
    print_answers(run.answers, print)
    print_seconds(summary, run.metrics, print)
    print(f"\n{QUICK}" * options.quick)
    print(f"\nWritten to {options.out}: report.html, drift.png, summary.json and the rest")
    return 0


def data(options: DataRun) -> int:
    """Rebuild data/."""
    from minirlhf.drift.make_data import build

    bars = Bars()
    try:
        manifest = build(options.folder, report=bars)
    finally:
        bars.close()
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"{len(manifest['files'])} files, {size / 1e6:.1f} MB in {options.folder}")
    return 0


def check(options: CheckRun) -> int:
    """Print the table of what is ready and what is not."""
    from minirlhf.cli import check

    rows = check.check(out=options.out, device=options.device)
    print(check.render(rows))
    return check.exit_code(rows)


def battery(options: Any) -> int:
    """Diagnose the settings, and print the evidence line by line."""
    from minirlhf.autopsy.battery import diagnose
    from minirlhf.autopsy.battery_desk import TwoAnswerDesk
    from minirlhf.engine import compute

    compute.use(1)  # eight prompts: more cores only wait for one another
    given = {"refresh": options.refresh, "seed": options.seed}
    desk = TwoAnswerDesk(options.ppo, options.gap, **given)
    print(
        "Nine short runs of PPO with these settings on a desk of eight prompts with two one-word\n"
        "answers, V and C. The settings are diagnosed there; no run on the support desk is read.\n"
        "Discount, aggregation, EOS and --ppo.batch play no part with answers of one word."
    )
    bar = tqdm(total=9, ncols=88)

    def report(run: str, done: int, total: int) -> None:
        bar.set_description(f"{run:<12}")
        bar.update(done - bar.n)

    try:
        found, _ = diagnose(desk, report)
    finally:
        bar.close()
    print(found.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
