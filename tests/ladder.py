"""The table that a complete run of the slow tests leaves in docs/ladder.md.

A slow test hands in rows through the session fixture `ladder`; conftest.py writes the table at
the end. It does so only where all slow tests ran: half a table would drop the others' rows.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from minirlhf.sweeps.markdown import markdown_table

COMMAND = "make slow"
HEADS = ("setting", "predicted", "how", "found", "tolerance", "seed", "held")
How = Literal["trained", "sampled", "exact"]


@dataclass(frozen=True)
class Row:
    """One claim: what theory predicts, what was found and how, and whether it held."""

    section: str
    setting: str
    predicted: str
    how: str
    found: str
    tolerance: str
    seed: str
    held: bool


def _text(x: object) -> str:
    return f"{x:.3f}" if isinstance(x, float) else str(x)


def _line(row: Row) -> list[str]:
    """A row of a section's table, in the order of HEADS."""
    held = "yes" if row.held else "**no**"
    return [row.setting, row.predicted, row.how, row.found, row.tolerance, row.seed, held]


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
        found: float | str,
        tolerance: float | str = "",
        *,
        held: bool | None = None,
        seed: int | str = 0,
        how: How = "trained",
    ) -> bool:
        """Record a row. `held` may be left out where all three are numbers: then it is
        |found - predicted| <= tolerance. `section` starts with the rung: "L0 ...", "L2 ...".
        `how`: "trained" is a policy that was trained, "sampled" a mean over draws from a fixed
        one, "exact" a closed form or a sum over every answer: a check of formulas, no experiment.
        """
        if how not in get_args(How):
            raise ValueError(f"how is {how!r}; it must be one of {', '.join(get_args(How))}")
        if held is None:
            held = abs(float(found) - float(predicted)) <= float(tolerance)
        told, out, within = (_text(x) for x in (predicted, found, tolerance))
        drawn = "" if how == "exact" else str(seed)
        self.rows.append(Row(section, setting, told, how, out, within, drawn, bool(held)))
        return bool(held)

    def markdown(self, failed: Sequence[str] = ()) -> str:
        """The page: how it was made, then a table per section, sections in order of name."""
        minutes = (time.perf_counter() - self.started) / 60
        held = sum(row.held for row in self.rows)
        made = (
            f"Written by `{COMMAND}`, which runs the tests marked slow: {held} of "
            f"{len(self.rows)} claims held, in {minutes:.1f} minutes, one thread a process "
            f"(torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}, "
            f"{platform.machine()}). Seeds are in the tables; sd = reward sd."
        )
        kinds = ", ".join(f"{sum(r.how == h for r in self.rows)} {h}" for h in get_args(How))
        read = (
            f"How a value was found ({kinds}): *trained* is read off a policy that was trained, "
            "*sampled* is a mean over draws from a fixed policy, *exact* is a closed form or a sum "
            "over every answer and checks formulas against each other, nothing that was measured."
        )
        blocks = ["# The theory ladder", made, read]
        if failed:
            blocks.append(f"Tests that failed: {', '.join(failed)}.")
        for section in sorted({row.section for row in self.rows}):
            lines = [_line(row) for row in self.rows if row.section == section]
            blocks.append(f"## {section}")
            blocks.append(markdown_table(HEADS, lines))
        return "\n\n".join(blocks) + "\n"
