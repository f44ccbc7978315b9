"""One remedy beside the run that it changes: its push on a logged batch, and the trained outcome.

`RemedyPanel` reads rows of `minirlhf remedies` (one per arm and seed). Before and after share
answers and weights; only what the remedy changes differs. A bar's parts add up to its diamond. The
sentence under the picture is put together from the rows. Left out: all arms at once
(remedy_plots.py, whose figures can be had from here too), dials (explorer.py).
"""

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from ipywidgets import Dropdown, Layout
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from minirlhf.desk.world import STRATA
from minirlhf.lab.panels.batch_plots import SIDE
from minirlhf.lab.panels.remedy_plots import (
    about,
    by_place,
    forest_figure,
    frontier_figure,
    remedy_table_html,
    verdict,
)
from minirlhf.lab.picture import LiveFigure, Panel
from minirlhf.lab.plots import BLUE, GREEN, GREY, INK, ORANGE, VERMILLION, blank, tidy
from minirlhf.sweeps.remedy_table import agreement, repaired, summarise

__all__ = ["RemedyPanel", "forest_figure", "frontier_figure", "push_figure", "remedy_table_html"]
LOOK = {"reward": (VERMILLION, ""), "KL": (BLUE, "//")}
LOOK |= {"baseline": ("#BBBBBB", ""), "rest": (ORANGE, "..")}
LOOK |= {side: (look["color"], look.get("hatch", "")) for side, look in SIDE.items()}
Parts = Mapping[str, tuple[str, ...]]  # part -> its columns
SIGN = {"gap_cost": -1}  # what is taken away
OUTCOMES = {  # column -> title, unit and direction
    "length_tokens": ("length", "tokens"),
    "gold": ("gold", "points, ↑ better"),
    "evasion_rate": ("evasive answers", "share, ↓ better"),
    "hedged_rate": ("hedging answers", "share, ↓ better"),
}
LEFT = (  # title, unit, what it shows
    ("reward minus KL", "gap, reward sd", ("gap_effective",)),
    ("A at the fork", "sd of advantages", ("fork_verbose", "fork_concise")),
    ("push on verbose", "nats a step, ↑ up", ("push_verbose", "push_concise")),
    ("push on concise", "nats a step, ↑ up", ("push_verbose", "push_concise")),
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
    columns = {"reward": ("reward",), "KL": ("kl", "kl_loss"), "baseline": ("baseline",)}
    columns["rest"] = ("shift", "value_loss")
    return {part: tuple(f"push_{side}_{c}" for c in names) for part, names in columns.items()}


class Stack:
    """Bars in parts at places 0, 1, ..., each with a diamond for the sum and its interval."""

    def __init__(
        self, ax: Axes, table: pd.DataFrame, total: str, parts: Parts, *, at: Any, width: float
    ):
        self._index, self._at = list(table.index), np.asarray(at, dtype=float)
        self._ends = np.array([table[k][total] for k in ("mean", "low", "high")])  # [3, arms]
        mean = table["mean"]
        columns = [[SIGN.get(c, 1) * mean[c] for c in names] for names in parts.values()]
        self.sizes = np.array([sum(found) for found in columns])  # [parts, arms]
        ax.axhline(0, color=INK, lw=1)
        looks = [(part, *LOOK[part]) for part in parts]
        edge: Any = {"edgecolor": "white", "lw": 0}
        self._bars = [
            ax.bar(self._at, 0.0, width, label=part, color=color, hatch=hatch, **edge)
            for part, color, hatch in looks
        ]
        self._lines = ax.vlines(self._at, 0, 0, color=INK, lw=2)
        (self._sums,) = ax.plot(self._at, 0 * self._at, "D", color=INK, mec="white", ms=7)
        self._sums.set_label("sum, 95 % interval over seeds")
        self.artists = [*itertools.chain(*self._bars), self._lines, self._sums]

    def reach(self) -> tuple[float, float]:
        """The lowest and highest point of any arm's bar."""
        known = np.nan_to_num(self.sizes)
        ends = (np.minimum(known, 0).sum(0).min(), np.maximum(known, 0).sum(0).max())
        return float(ends[0]), float(ends[1])

    def move(self, names: Sequence[str]) -> dict[str, float]:
        """Show these arms, "" for an empty place; {arm: sum}."""
        rows = [self._index.index(name) if name else -1 for name in names]
        none = np.array([not name for name in names])
        sizes = np.where(none, 0.0, np.nan_to_num(self.sizes[:, rows]))
        ends = np.where(none, np.nan, self._ends[:, rows])
        ups, downs = np.maximum(sizes, 0), np.minimum(sizes, 0)
        starts = np.where(sizes > 0, ups.cumsum(0) - ups, downs.cumsum(0) - downs)
        for bars, heights, lows in zip(self._bars, sizes, starts, strict=True):
            for bar, height, low in zip(bars, heights, lows, strict=True):
                bar.set(y=low, height=height)
        self._sums.set_data(self._at, ends[0])
        self._lines.set_segments([[(x, a), (x, b)] for x, a, b in zip(self._at, *ends[1:])])  # noqa: B905
        return dict(zip(names, ends[0].tolist(), strict=True))


def _pivot(rows: pd.DataFrame) -> pd.DataFrame:
    return summarise(rows).pivot(index="remedy", columns="measure")


def push_figure(rows: pd.DataFrame, names: Sequence[str]) -> Figure:
    """The push of some arms on verbose and on concise answers, by part.

    Raises ValueError for an arm that has no push.
    """
    table, figure = _pivot(rows), blank(12, 4.4, wspace=0.03)
    known = set(rows.loc[rows["push_verbose"].notna(), "remedy"])
    table = table.reindex(list(names))
    if bare := [name for name in names if name not in known]:
        raise ValueError(f"no push for {', '.join(bare)}: choose arms that learn from a batch")
    said, at = [], np.arange(len(names))
    for ax, side in zip(figure.subplots(1, 2, sharey=True), SIDE, strict=True):
        tidy(ax, f"push on {side} answers", y="" if said else "nats a step (↑ pushed up)")
        stack = Stack(ax, table, f"push_{side}", push_parts(side), at=at, width=0.6)
        found = stack.move(names)
        said.append(f"{side}: {', '.join(f'{n} {x:+.3f}' for n, x in found.items())}")
        ax.set_xticks(at, list(names), fontsize=11, rotation=25, ha="right", rotation_mode="anchor")
        ax.relim()
        ax.autoscale_view()
    keys = figure.axes[0].get_legend_handles_labels()
    figure.legend(*keys, loc="outside lower center", ncols=5, fontsize=11, frameon=False)
    figure.set_label(f"Push in nats a step on {'; on '.join(said)}.")
    return figure


class _Page(LiveFigure):
    """A live figure with HTML below it, both in one message."""

    text = ""

    def redraw(self, alt: str) -> None:
        with self.lock, self.view.hold_trait_notifications():
            super().redraw(alt)
            self.view.value += self.text


class RemedyPanel(Panel):
    """Choose an arm, and one to compare with: what it does to a batch, and what came of it.

    Left: the batch of the run that the arm changes. Right: audits at the end, a dot per seed, the
    reference dashed. `shown` holds the sums on screen, {measure: {arm: mean}}.
    Raises ValueError if the rows lack an arm that another one changes.
    """

    def __init__(self, rows: pd.DataFrame):
        self._table, self._test = _pivot(rows), repaired(rows).set_index("remedy")
        self._fault = dict(zip(rows["remedy"], rows["fault"], strict=True))
        if lacking := {*self._fault.values()} - {*self._fault}:
            raise ValueError(f"rows lack {', '.join(sorted(lacking))}, which other arms change")
        self._moved = {row["remedy"]: row for row in agreement(rows).to_dict("records")}
        self._rows = {str(name): of for name, of in rows.groupby("remedy")}
        self.said = {name: self._sentence(name) for name in self._fault}
        arms = [name for names in by_place(rows).values() for name in names]
        options = [(f"{name}  ({about(name).acts})", name) for name in arms]
        look: Any = {"layout": Layout(width="49%"), "style": {"description_width": "90px"}}
        first, then = [x for x in options if x[1] != "none"], [("nothing", ""), *options]
        controls = {
            "remedy": Dropdown(options=first, description="remedy", **look),
            "compare": Dropdown(options=then, description="compare with", **look),
        }
        figure, artists = self._draw(rows)
        self._page = _Page(figure, artists, width=1010)
        super().__init__("remedy", controls, self._page, self.show)
        self.layout = Layout(display="flex", flex_flow="row wrap", width="1020px", max_width="100%")

    # ------------------------------------------------------------------ the picture
    def _draw(self, rows: pd.DataFrame) -> tuple[Figure, list[Any]]:
        figure = blank(10.1, 4.4, wspace=0.01)
        axes = figure.subplots(2, 4)
        three, table = np.arange(3), self._table
        gap: Parts = {"reward": ("gap_score",), "KL": ("gap_cost",)}
        whole: Any = {"at": three, "width": 0.6}
        self._stacks = {"gap_effective": Stack(axes[0, 0], table, "gap_effective", gap, **whole)}
        for ax, side, shift in zip(axes[1], SIDE, (-0.2, 0.2), strict=False):
            push, fork = f"push_{side}", f"fork_{side}"
            self._stacks[push] = Stack(ax, table, push, push_parts(side), **whole)
            half: Any = {"at": three + shift, "width": 0.36}
            self._stacks[fork] = Stack(axes[0, 1], table, fork, {side: (fork,)}, **half)
        for ax, (title, unit, group) in zip(axes[:, :2].flat, LEFT, strict=True):
            tidy(ax, title, y=unit).set_xticks(three, [*ARMS], fontsize=10)
            low, high = np.transpose([self._stacks[name].reach() for name in group])
            air = 0.12 * (high.max() - low.min()) + 1e-9
            ax.set(xlim=(-0.5, 2.5), ylim=(low.min() - air, high.max() + air))
        self._ends = {k: _outcome(ax, k, rows) for ax, k in zip(axes[:, 2:].flat, OUTCOMES)}  # noqa: B905
        look: Any = {"va": "top", "fontsize": 10, "color": INK, "transform": axes[1, 0].transAxes}
        self._none = axes[1, 0].text(0.04, 0.97, "", **look)
        found = (ax.get_legend_handles_labels() for ax in (axes[1, 0], axes[0, 1], axes[0, 2]))
        keys = {name: handle for pair in found for handle, name in zip(*pair, strict=True)}
        place: Any = {"loc": "outside lower center", "ncols": 6, "columnspacing": 1.2}
        figure.legend(keys.values(), keys, fontsize=10, frameon=False, **place)
        artists = [x for stack in self._stacks.values() for x in stack.artists]
        moved = [x for level, a, b in self._ends.values() for x in (level, *a, *b)]
        return figure, [*artists, *moved, self._none]

    def show(self, remedy: str, compare: str) -> str:
        """Put the arm, the one that it changes, and the other one on screen; in words."""
        names = (self._fault[remedy], remedy, compare)
        self.shown = {total: stack.move(names) for total, stack in self._stacks.items()}
        for column, (first, *pairs) in self._ends.items():
            levels = _of(self._rows[remedy], "reference", column).mean(1)
            first.set_segments([[(x - 0.4, y), (x + 0.4, y)] for x, y in enumerate(levels)])
            for shift, name, dots, mean in zip((-0.25, 0, 0.25), names, *pairs, strict=True):
                y = _of(self._rows[name], "final", column) if name else np.full((2, 1), np.nan)
                at = np.arange(2) + shift
                dots.set_data(np.repeat(at, y.shape[1]), y.ravel())
                mean.set_data(at, y.mean(1))
        bare = [n for n in names if n and np.isnan(self.shown["push_verbose"][n])]
        self._none.set_text("\n".join(f"{name}: no push" for name in bare))
        columns = [_column(name, self.said[name]) for name in names[1:] if name]
        self._page.text = BELOW.format("".join(columns))
        return " ".join(f"{name}: {self.said[name]}" for name in names[1:] if name)

    # ------------------------------------------------------------------ the numbers in words
    def _sentence(self, name: str) -> str:
        """What an arm's rows say: its push, its end, the two-sided test."""
        fault, mean = self._fault[name], self._table["mean"]
        ended, before = (f"{mean.at[n, 'brief_verbose_rate']:.0%}" for n in (name, fault))
        end = f"In the end {ended} of its answers to brief prompts are verbose"
        then = self._rows[name]["verbose_then"].astype(float).mean()
        if not np.isnan(then):
            end += f", {_way(ended, f'{then:.0%}')} {then:.0%} in the policy of that batch"
        if fault != name:
            end += f" (before the change: {before})"
        if name in self._moved:
            end += f"; {_moved(self._moved[name])}"
        return f"{self._pushed(name)}. {end}. Two-sided test: {verdict(self._test.loc[name])}."

    def _pushed(self, name: str) -> str:
        fault, push = self._fault[name], self._table.xs("push_verbose", axis=1, level="measure")
        a, b = push.at[name, "mean"], push.at[fault, "mean"]
        if np.isnan(a):
            return "It learns from no batch, so it has no push"
        if fault == name or np.isnan(b):
            return f"The push on verbose is {a:+.3f} nats a step"
        old, new = _sign(b), _sign(a)
        turn = f"stays {new}" if old == new else f"turns from {old} to {new}"
        more = (
            ", an interval that holds 0" if push.at[name, "low"] * push.at[name, "high"] < 0 else ""
        )
        more += ", the same policy answering anew" if self._rows[name]["anew"].any() else ""
        return f"The push on verbose {turn} ({b:+.3f} to {a:+.3f} nats a step{more})"


def _moved(row: Mapping[str, Any]) -> str:
    """What the change of the push foretold of the length, and what came."""
    if not row["told"]:
        return "that they are shorter or longer than before the change, these seeds do not tell"
    way = "longer" if row["moved"] > 0 else "shorter"
    says = "as the change of the push says" if row["agrees"] else "against the change of the push"
    return f"they are {abs(row['moved']):.1f} tokens {way} than before the change, {says}"


def _sign(x: float) -> str:
    return "+" if x > 0 else "−" if x < 0 else "0"


def _way(now: str, then: str) -> str:
    """From which side it came, by the figures that are printed."""
    a, b = (int(x.rstrip("%")) for x in (now, then))
    return "up from" if a > b else "down from" if a < b else "no other than the"


def _column(name: str, said: str) -> str:
    """An arm's card: what it changes, where, at what cost, who says so, and what the rows say."""
    arm = about(name)
    facts = {"Equation": arm.equation, "Cost": arm.cost, "Source": arm.source}
    more = "".join(f" {title}: {text}." for title, text in facts.items() if text)
    return COLUMN.format(*(html.escape(x) for x in (name, arm.title, arm.acts, more, said)))


def _outcome(ax: Axes, column: str, rows: pd.DataFrame) -> list[Any]:
    """[levels of the reference, a line of dots per arm, a line of means per arm], empty."""
    title, unit = OUTCOMES[column]
    tidy(ax, title, y=unit).set_xticks((0, 1), STRATA, fontsize=11)
    known = rows[[f"{m}_{s}_{column}" for m in ("reference", "final") for s in STRATA]].to_numpy()
    low, high = np.nanmin(known), np.nanmax(known)
    low = low if column == "gold" else 0.0
    if column.endswith("_rate"):
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    air = 0.06 * (high - low) + 1e-9
    ax.set(xlim=(-0.5, 1.5), ylim=(low - air, high + air))
    level = ax.hlines([0], 0, 0, color=INK, lw=1.5, ls="--", label="reference")
    dots = [ax.plot([], [], ".", color=c, ms=5, alpha=0.6)[0] for c, _ in ARMS.values()]
    means = [
        ax.plot([], [], m, color=c, ms=9, mec="white", label=k)[0] for k, (c, m) in ARMS.items()
    ]
    return [level, dots, means]


def _of(rows: pd.DataFrame, moment: str, column: str) -> np.ndarray:
    """One measure of an arm's runs, [2 strata, seeds]."""
    return rows[[f"{moment}_{s}_{column}" for s in STRATA]].to_numpy(dtype=float).T
