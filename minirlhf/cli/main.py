"""The command line: `minirlhf drift | seeds | sweep | remedies | data | check | battery`.

The first word chooses the command. Only then is its module imported, cli/<command>.py: `Options`, a
dataclass whose fields are the options (`minirlhf drift --help` lists them with their units), and
`run`, which carries them out. It is `run` that imports torch and the rest, so no --help waits for
them.

What goes wrong is said on stderr, and by the exit status: 2 where something that was given is
wrong, 1 where the run failed. It is one sentence of ours, or the parser's own words where only the
parser knows what was meant. What was computed before stays on disk, and --resume goes on from
there. Left out: how options are read (cli/reading.py).
"""

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module

from minirlhf import __version__

COMMANDS = {
    "drift": "Train reference, reward model and policy from nothing, and audit the drift.",
    "seeds": "Both arms over many seeds: the table of claims with intervals.",
    "sweep": "A grid of runs over beta, epsilon, length bias, remedy and seed.",
    "remedies": "Every remedy on the same logged batch and trained from nothing: the whole table.",
    "data": "Make data/ anew from a default run (all but desk.toml and seeds.json).",
    "check": "Is this machine ready for the course?",
    "battery": "Nine short runs on a desk of two answers: why does PPO with these settings drift?",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.

    Raises SystemExit after --help and --version (0), and for options that tyro refuses (2).
    """
    for stream in (sys.stdout, sys.stderr):  # a Windows pipe has no "│" and no "≥"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    given = sys.argv[1:] if argv is None else list(argv)
    name = _chosen(given[:1])

    # only now: --help and --version above do without tyro
    from minirlhf.cli.reading import Refused, read_and_run

    module = import_module(f"minirlhf.cli.{name}")
    try:
        return read_and_run(module.run, f"minirlhf {name}", COMMANDS[name], given[1:])
    except KeyboardInterrupt:
        again = "; the same command with --resume goes on"
        resumes = again if hasattr(module.Options, "resume") else ""
        print(f"minirlhf: stopped{resumes}", file=sys.stderr)
        return 130
    # what is given is refused with a ValueError throughout the package
    except (Refused, ValueError) as error:
        print(f"minirlhf: {error}", file=sys.stderr)
        return 2
    # a full disk, a loss that is NaN, workers that are gone; all else is a bug and shows where
    except (RuntimeError, FloatingPointError) as error:
        print(f"minirlhf: {error}", file=sys.stderr)
        return 1


def _chosen(word: list[str]) -> str:
    """The command that the first word names; --help, --version and any other word end here."""
    parser = argparse.ArgumentParser(
        prog="minirlhf",
        description="RLHF that drifts, on a laptop.",
        epilog="`minirlhf drift --help` lists what drift can be given, and so for every command.",
    )
    parser.add_argument("--version", action="version", version=f"minirlhf {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, sentence in COMMANDS.items():
        commands.add_parser(name, help=sentence, add_help=False)
    if not word:
        parser.error(f"no command is given (choose from {', '.join(COMMANDS)})")
    return parser.parse_args(word).command


if __name__ == "__main__":
    sys.exit(main())
