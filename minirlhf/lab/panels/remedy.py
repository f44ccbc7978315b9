"""One remedy beside the run that it changes: its push on a logged batch, and the trained outcome.

`RemedyPanel` reads rows of `minirlhf remedies` (one per arm and seed). Before and after share
answers and weights; only what the remedy changes differs. A bar's parts add up to its diamond. The
sentence under the picture is put together from the rows. Left out: all arms at once
(remedy_plots.py, whose figures can be had from here too), dials (explorer.py).
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from ipywidgets import Dropdown, Layout
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from minirlhf.audit.measures import AUDIT, REMEDY
from minirlhf.desk.world import STRATA
from minirlhf.lab.panels.batch_plots import SIDE
from minirlhf.lab.panels.remedy_plots import (
    about,
    by_place,
    distance_figure,
    forest_figure,
    remedy_table_html,
    verdict,
)
from minirlhf.lab.picture import LiveFigure, Panel
from minirlhf.lab.plots import BLUE, GREEN, GREY, INK, ORANGE, VERMILLION, blank, one_legend, tidy
from minirlhf.sweeps.remedy_table import agreement, repaired, summarise

__all__ = ["RemedyPanel", "distance_figure", "forest_figure", "push_figure", "remedy_table_html"]
LOOK = {"reward": (VERMILLION, ""), "KL": (BLUE, "//")}
LOOK |= {"baseline": ("#BBBBBB", ""), "rest": (ORANGE, "..")}
LOOK |= {side: (look["color"], look.get("hatch", "")) for side, look in SIDE.items()}
Parts = Mapping[str, tuple[str, ...]]  # part -> its columns
SIGN = {"gap_cost": -1}  # what is taken away
OUTCOMES = ("length_tokens", "gold", "evasion_rate", "hedged_rate")  # columns of an audit
_PUSH = f"{REMEDY['push_verbose'].unit}, ↑ up"
LEFT = (  # title, unit, what it shows
    ("reward minus KL", f"gap, {REMEDY['gap_effective'].unit}", ("gap_effective",)),
    ("A at the fork", REMEDY["fork_verbose"].unit, ("fork_verbose", "fork_concise")),
    (REMEDY["push_verbose"].title, _PUSH, ("push_verbose", "push_concise")),
    (REMEDY["push_concise"].title, _PUSH, ("push_verbose", "push_concise")),
)
ARMS = {"before": (GREY, "s"), "after": (BLUE, "o"), "other": (GREEN, "D")}
COLUMN = (
    '<div style="flex:1;min-width:0"><b>{}</b>: {}. Acts on: {}.{}<br>'
    '<span style="font-weight:bold">{}</span></div>'
)
BELOW = (
    '<div style="display:flex;gap:18px;max-width:1010px;height:126px;overflow:auto;'
    'font-size:13px;line-height:1.3;background:#fff;color:#222">{}</div>'
)


def push_parts(side: str) -> Parts:
    """Where the parts of a push on one side come from."""
    push = f"push_{side}"
    return {
        "reward": (f"{push}_reward",),
        "KL": (f"{push}_kl", f"{push}_kl_loss"),
        "baseline": (f"{push}_baseline",),
        "rest": (f"{push}_shift", f"{push}_value_loss"),
    }


class Stack:
    """Bars in parts at places 0, 1, ..., each with a diamond for the sum and its interval."""

    def __init__(
        self, ax: Axes, table: pd.DataFrame, total: str, parts: Parts, *, at: Any, width: float
    ):
        self._index = list(table.index)
        self._at = np.asarray(at, dtype=float)
        self._ends = np.array([table[k][total] for k in ("mean", "low", "high")])  # [3, arms]
        mean = table["mean"]
        # [parts, arms]; a part is the sum of its columns
        self.sizes = np.array(
            [sum(SIGN.get(c, 1) * mean[c] for c in columns) for columns in parts.values()]
        )
        ax.axhline(0, color=INK, lw=1)
        self._bars = []
        for part in parts:
            color, hatch = LOOK[part]
            look: Any = {"color": color, "hatch": hatch, "edgecolor": "white", "lw": 0}
            self._bars.append(ax.bar(self._at, 0.0, width, label=part, **look))
        self._lines = ax.vlines(self._at, 0, 0, color=INK, lw=2)
        (self._sums,) = ax.plot(self._at, 0 * self._at, "D", color=INK, mec="white", ms=7)
        self._sums.set_label("sum, 95 % interval over seeds")
        patches = [bar for bars in self._bars for bar in bars]
        self.artists = [*patches, self._lines, self._sums]

    def reach(self) -> tuple[float, float]:
        """The lowest and highest point of any arm's bar."""
        known = np.nan_to_num(self.sizes)
        low = np.minimum(known, 0).sum(0).min()
        high = np.maximum(known, 0).sum(0).max()
        return float(low), float(high)

    def move(self, names: Sequence[str]) -> dict[str, float]:
        """Show these arms, "" for an empty place; {arm: sum}."""
        rows = [self._index.index(name) if name else -1 for name in names]
        empty = np.array([not name for name in names])
        sizes = np.where(empty, 0.0, np.nan_to_num(self.sizes[:, rows]))  # [parts, places]
        mean, low, high = np.where(empty, np.nan, self._ends[:, rows])
        # parts above 0 are piled up from 0, parts below it down from 0
        ups, downs = np.maximum(sizes, 0), np.minimum(sizes, 0)
        starts = np.where(sizes > 0, ups.cumsum(0) - ups, downs.cumsum(0) - downs)
        for bars, heights, feet in zip(self._bars, sizes, starts, strict=True):
            for bar, height, foot in zip(bars, heights, feet, strict=True):
                bar.set(y=foot, height=height)
        self._sums.set_data(self._at, mean)
        bounds = zip(self._at, low, high, strict=True)
        self._lines.set_segments([[(x, a), (x, b)] for x, a, b in bounds])
        return dict(zip(names, mean.tolist(), strict=True))


def _pivot(rows: pd.DataFrame) -> pd.DataFrame:
    return summarise(rows).pivot(index="remedy", columns="measure")


def push_figure(rows: pd.DataFrame, names: Sequence[str]) -> Figure:
    """The push of some arms on verbose and on concise answers, by part.

    Raises ValueError for an arm that has no push.
    """
    known = set(rows.loc[rows["push_verbose"].notna(), "remedy"])
    bare = [name for name in names if name not in known]
    if bare:
        raise ValueError(f"no push for {', '.join(bare)}: choose arms that learn from a batch")
    table = _pivot(rows).reindex(list(names))
    figure = blank(12, 4.4, wspace=0.03)
    at = np.arange(len(names))
    said = []
    for ax, side in zip(figure.subplots(1, 2, sharey=True), SIDE, strict=True):
        tidy(ax, f"push on {side} answers", y="" if said else "nats a step (↑ pushed up)")
        stack = Stack(ax, table, f"push_{side}", push_parts(side), at=at, width=0.6)
        found = stack.move(names)
        said.append(f"{side}: {', '.join(f'{n} {x:+.3f}' for n, x in found.items())}")
        ax.set_xticks(at, list(names), fontsize=11, rotation=25, ha="right", rotation_mode="anchor")
        ax.relim()
        ax.autoscale_view()
    one_legend(figure, figure.axes[:1], ncols=5, fontsize=11)
    figure.set_label(f"Push in nats a step on {'; on '.join(said)}.")
    return figure


class RemedyPanel(Panel):
    """Choose an arm, and one to compare with: what it does to a batch, and what came of it.

    Left: the batch of the run that the arm changes. Right: audits at the end, a dot per seed, the
    reference dashed. `shown` holds the sums on screen, {measure: {arm: mean}}.
    Raises ValueError if the rows lack an arm that another one changes.
    """

    def __init__(self, rows: pd.DataFrame):
        self._table = _pivot(rows)
        self._test = repaired(rows).set_index("remedy")
        self._fault = dict(zip(rows["remedy"], rows["fault"], strict=True))
        lacking = {*self._fault.values()} - {*self._fault}
        if lacking:
            raise ValueError(f"rows lack {', '.join(sorted(lacking))}, which other arms change")
        self._moved = {row["remedy"]: row for row in agreement(rows).to_dict("records")}
        self._rows = {str(name): of for name, of in rows.groupby("remedy")}
        self.said = {name: self._sentence(name) for name in self._fault}
        arms = [name for names in by_place(rows).values() for name in names]
        options = [(f"{name}  ({about(name).acts})", name) for name in arms]
        look: Any = {"layout": Layout(width="49%"), "style": {"description_width": "90px"}}
        first = [(title, name) for title, name in options if name != "none"]
        then = [("nothing", ""), *options]
        controls = {
            "remedy": Dropdown(options=first, description="remedy", **look),
            "compare": Dropdown(options=then, description="compare with", **look),
        }
        figure, artists = self._draw(rows)
        live = LiveFigure(figure, artists, width=1010)
        super().__init__("remedy", controls, live, self.show)
        self.layout = Layout(display="flex", flex_flow="row wrap", width="1020px", max_width="100%")

    # ------------------------------------------------------------------ the picture
    def _draw(self, rows: pd.DataFrame) -> tuple[Figure, list[Any]]:
        figure = blank(10.1, 4.4, wspace=0.01)
        axes = figure.subplots(2, 4)
        self._stacks = self._draw_stacks(axes[:, :2])
        for ax, (title, unit, group) in zip(axes[:, :2].flat, LEFT, strict=True):
            tidy(ax, title, y=unit).set_xticks(range(3), [*ARMS], fontsize=10)
            lows, highs = np.transpose([self._stacks[name].reach() for name in group])
            low, high = lows.min(), highs.max()
            air = 0.12 * (high - low) + 1e-9
            ax.set(xlim=(-0.5, 2.5), ylim=(low - air, high + air))
        places = zip(axes[:, 2:].flat, OUTCOMES, strict=True)
        self._ends = {column: _outcome(ax, column, rows) for ax, column in places}
        look: Any = {"va": "top", "fontsize": 10, "color": INK, "transform": axes[1, 0].transAxes}
        self._no_push = axes[1, 0].text(0.04, 0.97, "", **look)
        named = (axes[1, 0], axes[0, 1], axes[0, 2])
        one_legend(figure, named, ncols=6, fontsize=10, columnspacing=1.2)
        artists = [artist for stack in self._stacks.values() for artist in stack.artists]
        for level, dots, means in self._ends.values():
            artists += [level, *dots, *means]
        return figure, [*artists, self._no_push]

    def _draw_stacks(self, axes: np.ndarray) -> dict[str, Stack]:
        """Bars by the column of their sum: the gap and the fork above, the pushes below."""
        table = self._table
        places = np.arange(3)
        gap: Parts = {"reward": ("gap_score",), "KL": ("gap_cost",)}
        priced = Stack(axes[0, 0], table, "gap_effective", gap, at=places, width=0.6)
        stacks = {"gap_effective": priced}
        for ax, side, shift in zip(axes[1], SIDE, (-0.2, 0.2), strict=True):
            push = f"push_{side}"
            stacks[push] = Stack(ax, table, push, push_parts(side), at=places, width=0.6)
            fork = f"fork_{side}"
            at = places + shift
            stacks[fork] = Stack(axes[0, 1], table, fork, {side: (fork,)}, at=at, width=0.36)
        return stacks

    def show(self, remedy: str, compare: str) -> str:
        """Put the arm, the one that it changes, and the other one on screen; in words."""
        names = (self._fault[remedy], remedy, compare)
        self.shown = {total: stack.move(names) for total, stack in self._stacks.items()}
        strata = np.arange(len(STRATA))
        for column, (level, dots, means) in self._ends.items():
            before = _of(self._rows[remedy], "reference", column).mean(1)
            level.set_segments([[(x - 0.4, y), (x + 0.4, y)] for x, y in enumerate(before)])
            for arm, (name, shift) in enumerate(zip(names, (-0.25, 0, 0.25), strict=True)):
                ends = np.full((len(STRATA), 1), np.nan)
                if name:
                    ends = _of(self._rows[name], "final", column)
                at = strata + shift
                dots[arm].set_data(np.repeat(at, ends.shape[1]), ends.ravel())
                means[arm].set_data(at, ends.mean(1))
        chosen = [name for name in (remedy, compare) if name]
        pushes = self.shown["push_verbose"]
        bare = [name for name in names if name and np.isnan(pushes[name])]
        self._no_push.set_text("\n".join(f"{name}: no push" for name in bare))
        columns = [_column(name, self.said[name]) for name in chosen]
        self.live.below = BELOW.format("".join(columns))
        return " ".join(f"{name}: {self.said[name]}" for name in chosen)

    # ------------------------------------------------------------------ the numbers in words
    def _sentence(self, name: str) -> str:
        """What an arm's rows say: its push, its end, the two-sided test."""
        fault = self._fault[name]
        verbose = self._table["mean"]["brief_verbose_rate"]
        ended = f"{verbose[name]:.0%}"
        end = f"In the end {ended} of its answers to brief prompts are verbose"
        then = self._rows[name]["verbose_then"].astype(float).mean()
        if not np.isnan(then):
            end += f", {_way(ended, f'{then:.0%}')} {then:.0%} in the policy of that batch"
        if fault != name:
            end += f" (before the change: {verbose[fault]:.0%})"
        if name in self._moved:
            end += f"; {_moved(self._moved[name])}"
        return f"{self._pushed(name)}. {end}. Two-sided test: {verdict(self._test.loc[name])}."

    def _pushed(self, name: str) -> str:
        fault = self._fault[name]
        push = self._table.xs("push_verbose", axis=1, level="measure")
        before, after = push.at[fault, "mean"], push.at[name, "mean"]
        if np.isnan(after):
            return "It learns from no batch, so it has no push"
        if fault == name or np.isnan(before):
            return f"The push on verbose is {after:+.3f} nats a step"
        old, new = _sign(before), _sign(after)
        turn = f"stays {new}" if old == new else f"turns from {old} to {new}"
        more = ""
        if push.at[name, "low"] * push.at[name, "high"] < 0:
            more += ", an interval that holds 0"
        if self._rows[name]["anew"].any():
            more += ", the same policy answering anew"
        return f"The push on verbose {turn} ({before:+.3f} to {after:+.3f} nats a step{more})"


def _moved(row: Mapping[str, Any]) -> str:
    """What the change of the push foretold of the length, and what came."""
    if not row["told"]:
        return "that they are shorter or longer than before the change, these seeds do not tell"
    way = "longer" if row["moved"] > 0 else "shorter"
    says = "as the change of the push says" if row["agrees"] else "against the change of the push"
    return f"they are {abs(row['moved']):.1f} tokens {way} than before the change, {says}"


def _sign(x: float) -> str:
    if x == 0:
        return "0"
    return "+" if x > 0 else "−"


def _way(now: str, then: str) -> str:
    """From which side it came, by the figures that are printed."""
    after, before = int(now.rstrip("%")), int(then.rstrip("%"))
    if after == before:
        return "no other than the"
    return "up from" if after > before else "down from"


def _column(name: str, said: str) -> str:
    """An arm's card: what it changes, where, at what cost, who says so, and what the rows say."""
    arm = about(name)
    facts = {"Equation": arm.equation, "Cost": arm.cost, "Source": arm.source}
    more = "".join(f" {title}: {text}." for title, text in facts.items() if text)
    return COLUMN.format(*(html.escape(x) for x in (name, arm.title, arm.acts, more, said)))


def _outcome(ax: Axes, column: str, rows: pd.DataFrame) -> tuple[Any, list[Any], list[Any]]:
    """Levels of the reference, a line of dots per arm, a line of means per arm: all empty."""
    measure = AUDIT[column]
    tidy(ax, measure.title, y=measure.axis).set_xticks((0, 1), STRATA, fontsize=11)
    known = np.stack([_of(rows, moment, column) for moment in ("reference", "final")])
    low, high = np.nanmin(known), np.nanmax(known)
    if column != "gold":
        low = 0.0  # half the height is half the amount
    if column.endswith("_rate"):
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    air = 0.06 * (high - low) + 1e-9
    ax.set(xlim=(-0.5, 1.5), ylim=(low - air, high + air))
    level = ax.hlines([0], 0, 0, color=INK, lw=1.5, ls="--", label="reference")
    dots, means = [], []
    for name, (color, marker) in ARMS.items():
        dots += ax.plot([], [], ".", color=color, ms=5, alpha=0.6)
        means += ax.plot([], [], marker, color=color, ms=9, mec="white", label=name)
    return level, dots, means


def _of(rows: pd.DataFrame, moment: str, column: str) -> np.ndarray:
    """One measure of an arm's runs, [2 strata, seeds]."""
    return rows[[f"{moment}_{s}_{column}" for s in STRATA]].to_numpy(dtype=float).T
