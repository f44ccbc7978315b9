"""`minirlhf data`: data/ made anew."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minirlhf.cli.terminal import Bars


@dataclass(frozen=True)
class Options:
    """What `minirlhf data` can be given."""

    folder: Path = Path("data")
    """where desk.toml lies and the rest goes"""


def run(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Rebuild data/."""
    from minirlhf.drift.make_data import build

    with closing(Bars()) as bars:
        manifest = build(options.folder, report=bars)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"{len(manifest['files'])} files, {size / 1e6:.1f} MB in {options.folder}")
    return 0
