"""The table that a complete run of the slow tests leaves in docs/ladder.md.

A slow test hands in rows through the session fixture `ladder`; conftest.py writes the table at
the end. It does so only where all slow tests ran: half a table would drop the others' rows.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

COMMAND = "make slow"


@dataclass(frozen=True)
class Row:
    """One claim: what theory predicts, what was measured, and whether it held."""

    section: str
    setting: str
    predicted: str
    measured: str
    tolerance: str
    seed: str
    held: bool


def _text(x: object) -> str:
    return f"{x:.3f}" if isinstance(x, float) else str(x)


@dataclass
class Ladder:
    """Collects rows; `add` says whether the claim held, so that a test can assert it."""

    rows: list[Row] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(
        self,
        section: str,
        setting: str,
        predicted: float | str,
        measured: float | str,
        tolerance: float | str = "",
        *,
        held: bool | None = None,
        seed: int | str = 0,
    ) -> bool:
        """Record a row. `held` may be left out where all three are numbers: then it is
        |measured - predicted| <= tolerance. `section` starts with the rung: "L0 ...", "L2 ...".
        """
        if held is None:
            held = abs(float(measured) - float(predicted)) <= float(tolerance)
        texts = [_text(x) for x in (predicted, measured, tolerance)]
        self.rows.append(Row(section, setting, *texts, str(seed), bool(held)))
        return bool(held)

    def markdown(self, failed: Sequence[str] = ()) -> str:
        """The page: how it was made, then a table per section, sections in order of name."""
        minutes = (time.perf_counter() - self.started) / 60
        held = sum(row.held for row in self.rows)
        made = (
            f"Written by `{COMMAND}`, which runs the tests marked slow: {held} of "
            f"{len(self.rows)} claims held, in {minutes:.1f} minutes on one thread "
            f"(torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, "
            f"{platform.machine()}). Seeds are in the tables; sd = reward sd."
        )
        lines = ["# The theory ladder, measured", "", made]
        lines += ["", f"Tests that failed: {', '.join(failed)}."] if failed else []
        for section in sorted({row.section for row in self.rows}):
            lines += ["", f"## {section}", ""]
            lines += ["| setting | predicted | measured | tolerance | seed | held |"]
            lines += ["|---|---|---|---|---|---|"]
            for r in self.rows:
                if r.section == section:
                    cells = [r.setting, r.predicted, r.measured, r.tolerance, r.seed]
                    lines.append(f"| {' | '.join(cells)} | {'yes' if r.held else '**no**'} |")
        return "\n".join(lines) + "\n"
