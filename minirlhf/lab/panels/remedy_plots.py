"""All arms at once: the table, the forest plot and gold against KL, of rows of `minirlhf remedies`.

Means and intervals are those of sweeps/remedy_table.py. Arms stand in the order of
remedies/arms.py, by where they act. Left out: one arm beside the run that it changes (remedy.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from minirlhf.desk.world import STRATA
from minirlhf.engine.intervals import Interval, student_t
from minirlhf.lab.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILLION, blank, tidy
from minirlhf.remedies.arms import ARMS, REMEDIES, Remedy, keep
from minirlhf.sweeps.remedy_table import (
    AT_BATCH,
    GOLD,
    LENGTH,
    MEASURES,
    SHOWN,
    STEPS,
    measured,
    repaired,
    wide,
)

ZONE = {"color": GREEN, "alpha": 0.13, "lw": 0}
# in words of this picture's own: its axes lie, and a head has little room
FOREST = {  # measure -> title, unit and direction, level of no change, target zone
    "brief_length_ratio": ("brief: length", "times reference", 1, (1 - LENGTH, 1 + LENGTH)),
    "brief_gold_change": ("brief: gold", "points, change (better →)", 0, (GOLD, 9)),
    "detailed_steps_kept": ("detailed: steps", "times reference (better →)", 1, (STEPS, 9)),
    "brief_hedged_change": ("brief: hedging", "share, change (← better)", 0, None),
}
PLACES = {  # where a remedy acts -> colour and marker
    "no change": (INK, "X"), "labelers": (INK, "P"), "a fault": (GREY, "X"),
    "pairs": (BLUE, "o"), "RM loss": (VERMILLION, "s"), "reward": (GREEN, "D"),
    "KL": (ORANGE, "^"), "advantage": (PURPLE, "v"), "update": (GREY, "h"),
    "two at once": (BLUE, ">"), "instead of PPO": (VERMILLION, "p"),
}  # fmt: skip
BESIDES = {  # arms that are no remedies: title and place
    "none": ("the default run", "no change"),
    "fair": ("labelers without bias who check every fact", "labelers"),
    "book_literal": ("KL in the loss, by its sampled value", "a fault"),
    "token_mean": ("KL averaged over the answer's tokens", "a fault"),
    "grpo": ("group advantages over their sd, answers averaged by length", "a fault"),
}
HEADS = {"rm_score_sd": "all prompts: RM score", "kl_nats": "all prompts: KL"}


def about(name: str) -> Remedy:
    """What an arm is, be it a remedy, several joined by "+", or one to compare with.

    Raises ValueError for a name that is no arm.
    """
    if name in REMEDIES:
        return REMEDIES[name]
    if name in BESIDES:
        title, acts = BESIDES[name]
        return Remedy(title, keep, acts, "", "", "")  # type: ignore[arg-type]
    if "+" not in name:
        raise ValueError(f"no arm {name!r}: the rows are of another version of remedies/arms.py")
    parts = [about(part) for part in name.split("+")]
    return Remedy(
        ", then ".join(part.title for part in parts),
        keep,
        "two at once",  # type: ignore[arg-type]
        ";  ".join(part.equation for part in parts),
        ";  ".join(part.cost for part in parts),
        ";  ".join(part.source for part in parts),
    )


def by_place(rows: pd.DataFrame) -> dict[str, list[str]]:
    """The arms of the rows by where they act, each place's in the order of remedies/arms.py."""
    known = set(rows["remedy"])
    names = [name for name in ARMS if name in known] + sorted(known - set(ARMS))
    found = {}
    for place in PLACES:
        here = [name for name in names if about(name).acts == place]
        if here:
            found[place] = here
    return found


def remedy_table_html(
    rows: pd.DataFrame, names: Sequence[str] = (*SHOWN, *AT_BATCH), *, height: int = 560
) -> str:
    """The whole table: a line per arm, "mean [low, high]" per measure, the two-sided test first.

    Every text is escaped; no script. Heads and the arms' names stay in sight under scrolling.
    """
    test = repaired(rows).set_index("remedy")
    cells = wide(rows, names).rename(columns=_head)
    order = [(place, name) for place, arms in by_place(rows).items() for name in arms]
    cells = cells.loc[[name for _, name in order]]
    cells.insert(0, "two-sided test", [verdict(test.loc[name]) for _, name in order])
    cells.index = pd.MultiIndex.from_tuples(order)
    cells.columns.name = None
    table = cells.to_html(escape=True, border=0, classes="minirlhf-remedies", justify="left")
    style = (
        "<style>.minirlhf-remedies td,.minirlhf-remedies th{white-space:nowrap;padding:3px 10px;"
        "text-align:left;vertical-align:top;background:#fff;color:#222;border-bottom:1px solid "
        "#ccc;font-variant-numeric:tabular-nums}.minirlhf-remedies thead th{position:sticky;top:0;"
        "white-space:normal;min-width:90px;z-index:2}.minirlhf-remedies tbody th:last-of-type{"
        "position:sticky;left:0}</style>"
    )
    return f'{style}<div style="overflow:auto;max-height:{height}px">{table}</div>'


def _head(name: str) -> str:
    change = ", change" if name.endswith("_change") else ""
    return f"{HEADS.get(name, MEASURES[name].title)}{change}, {MEASURES[name].unit}"


def verdict(test: Any) -> str:
    """A mark and words, so that no colour is needed."""
    failed = [part for part in ("length", "gold", "steps") if not test[part]]
    return f"✗ {', '.join(failed)}" if failed else "✓ repaired"


def forest_figure(rows: pd.DataFrame) -> Figure:
    """A line per arm: every run, their mean and its 95 % interval, in four columns.

    Green is where the two-sided test wants the mean to be; a tick at the name says that it passed.
    """
    each = measured(rows)
    passes = repaired(rows)
    test = dict(zip(passes["remedy"], passes["repaired"], strict=True))
    lines = _under_places(by_place(rows))
    figure = blank(13, 1.2 + 0.25 * len(lines), wspace=0.02)
    axes = np.ravel(figure.subplots(1, len(FOREST), sharey=True))
    for ax, (measure, (title, unit, level, zone)) in zip(axes, FOREST.items(), strict=True):
        tidy(ax, title, unit).grid(axis="x", color="#DDDDDD", lw=0.8)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labeltop=True)  # both ends of a tall picture
        ax.axvline(level, color=INK, lw=1.2)
        for y, (place, name) in enumerate(lines):
            if name:
                values = each.loc[each["remedy"] == name, measure].to_numpy()
                _interval_line(ax, values, y, PLACES[place])
        if measure == "brief_length_ratio":
            _ratio_axis(ax)
        if zone:
            limits = ax.get_xlim()
            ax.axvspan(zone[0], min(zone[1], limits[1]), **ZONE)
            ax.set_xlim(limits)
    ticked = {name: f"✓ {name}" if passed else name for name, passed in test.items()}
    ticks = [ticked[name] if name else place.upper() for place, name in lines]
    axes[0].set_yticks(range(len(lines)), ticks, fontsize=11)
    for label, (place, name) in zip(axes[0].get_yticklabels(), lines, strict=True):
        if not name:  # a place is a head in its own colour
            label.set(weight="bold", color=PLACES[place][0])
        else:
            label.set(weight="normal", color=INK)
    axes[0].set_ylim(len(lines) - 0.4, -0.6)
    passed = [name for _, name in lines if name and test[name]]
    figure.set_label(
        f"Of {len(test)} arms, {len(passed)} pass the two-sided test (brief length within "
        f"{LENGTH:.0%} of the reference, gold at most {-GOLD:g} points below it, detailed answers "
        f"with {STEPS:.0%} of their steps): {', '.join(passed) or 'none'}."
    )
    return figure


def _under_places(places: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """A line (place, "") for each place, and one (place, name) for each arm below it."""
    return [(place, name) for place, names in places.items() for name in ("", *names)]


def _interval_line(ax: Axes, values: np.ndarray, y: float, look: tuple[str, str]) -> None:
    found = student_t(values)
    color, marker = look
    ax.plot(values, np.full(len(values), y), ".", color=GREY, ms=5, alpha=0.5)
    ax.plot([found.low, found.high], [y, y], color=color, lw=2.5, solid_capstyle="butt")
    ax.plot(found.mean, y, marker, color=color, ms=8, mec="white", mew=0.6)


def _ratio_axis(ax: Axes) -> None:
    """Evenly in doublings, whatever an interval that crosses 0 says."""
    known = np.concatenate([line.get_xdata() for line in ax.lines])
    known = known[known > 0]
    ax.set(xscale="log", xlim=(max(0.4, known.min() / 1.1), known.max() * 1.1))
    ax.set_xticks([t for t in (0.5, 1, 2, 4, 8) if known.min() / 1.1 < t < known.max() * 1.1])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def distance_figure(rows: pd.DataFrame) -> Figure:
    """Gold against the distance that was gone, sqrt(KL): every arm's mean with both intervals.

    Brief and detailed prompts apart. Numbers name the arms, the default run has a ring, and the
    KL of best of n is a bound. Left out: the faults, which go much farther.
    """
    each = measured(rows)
    places = by_place(rows)
    places.pop("a fault", None)
    order = [name for arms in places.values() for name in arms]
    figure = blank(14.6, 7.2, wspace=0.03)
    axes: Any = figure.subplots(1, 3, width_ratios=(1, 1, 1))
    _key(axes[2], places, order)
    runs = [each[each["remedy"] == name] for name in order]
    found = {stratum: [_point(of, stratum) for of in runs] for stratum in STRATA}
    change = f"gold, change in {MEASURES['brief_gold_change'].unit} (better ↑)"
    for ax, (stratum, points) in zip(axes, found.items(), strict=False):
        tidy(ax, f"{stratum} prompts", "distance: square root of KL, nats per answer", change)
        ax.axhline(0, color=INK, lw=1)
        for name, (x, y) in zip(order, points, strict=True):
            color, marker = PLACES[about(name).acts]
            look = {"mfc": "white", "mec": color} if name == "best_of_n" else {"mec": "white"}
            ax.plot([x.low, x.high], [y.mean] * 2, color=color, lw=1, alpha=0.6)
            ax.plot([x.mean] * 2, [y.low, y.high], color=color, lw=1, alpha=0.6)
            ax.plot(x.mean, y.mean, marker, color=color, ms=9, **look)
            if name == "none":
                ax.plot(x.mean, y.mean, "o", mfc="none", mec=INK, mew=1.5, ms=24, zorder=9)
        ax.set_xlim(left=0)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed on what stands still
    for ax, points in zip(axes, found.values(), strict=False):
        _number(ax, [(x.mean, y.mean) for x, y in points])
    said = dict(zip(order, found["brief"], strict=True))
    best = max(said, key=lambda name: said[name][1].mean)
    ends = [
        f"{name} {said[name][1].mean:+.2f} points at {said[name][0].mean:.1f}"
        for name in dict.fromkeys((best, "none"))
        if name in said
    ]
    figure.set_label(f"Gold on brief prompts over the square root of KL: {'; '.join(ends)}.")
    return figure


def _point(of: Any, stratum: str) -> tuple[Interval, Interval]:
    """Intervals of an arm's distance and of its change of gold."""
    far = np.sqrt(np.maximum(of[f"{stratum}_kl_nats"].to_numpy(), 0))  # a sampled KL may be < 0
    return student_t(far), student_t(of[f"{stratum}_gold_change"].to_numpy())


def _key(ax: Axes, places: Mapping[str, Sequence[str]], order: Sequence[str]) -> None:
    """The numbers' names, by place, in two columns."""
    ax.axis("off")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    lines = _under_places(places)
    half = -(-len(lines) // 2)
    for i, (place, name) in enumerate(lines):
        x = 0.53 * (i // half)
        y = 1 - (i % half + 0.5) / half
        look: Any = {"fontsize": 10, "va": "center"}
        if name:
            bound = " (KL: a bound)" if name == "best_of_n" else ""
            ax.text(x + 0.04, y, f"{order.index(name) + 1:>2}  {name}{bound}", **look)
        else:
            color, marker = PLACES[place]
            ax.text(x + 0.04, y, place.upper(), weight="bold", **look)
            ax.plot(x + 0.01, y, marker, color=color, ms=8, clip_on=False)


def _number(ax: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Number the points where there is room, the nearest first; a leader where it is far. Points
    that are one, as of arms that end in the same runs, have one label."""
    names: dict[tuple[float, float], list[str]] = {}
    for i, point in enumerate(points):
        names.setdefault(point, []).append(str(i + 1))
    at = ax.transData.transform([*names])
    taken = [(x, y, 6.0, 6.0) for x, y in at]  # middle and half widths, pixels
    turns = np.linspace(0.5, 2.5, 16, endpoint=False) * np.pi
    places = [(r * np.cos(a), r * np.sin(a)) for r in range(15, 130, 9) for a in turns]
    for (x, y), (point, numbers) in zip(at, names.items(), strict=True):
        text = ", ".join(numbers)
        half = (2.0 + 3.6 * len(text), 8.0)
        boxes = [(x + dx, y + dy, *half) for dx, dy in places]
        inside = [b for b in boxes if all(ax.bbox.contains(b[0] + w, b[1]) for w in (-9, 9))]
        box = next((b for b in inside if not any(_overlap(b, t) for t in taken)), boxes[0])
        taken.append(box)
        dx, dy = (72 / ax.figure.dpi * d for d in (box[0] - x, box[1] - y))
        leader = {"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
        look: Any = {
            "ha": "center",
            "va": "center",
            "fontsize": 10,
            "bbox": {"fc": "white", "lw": 0, "alpha": 0.7, "pad": 0.5},
        }
        if np.hypot(dx, dy) > 13:
            look["arrowprops"] = leader
        ax.annotate(text, point, (dx, dy), textcoords="offset points", **look)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return abs(a[0] - b[0]) < a[2] + b[2] and abs(a[1] - b[1]) < a[3] + b[3]
