"""Figures of one batch: advantages in parts, the fork, who carries the KL.

Each takes numbers of a Rollout and returns a Figure whose label is its sentence. The waterfall's
bars move under the dials of `batch.BatchPanel`. Left out: how a batch is split
(autopsy/parts.py), the words' heat map (lab/heatmap.py), the sweep over epsilon (updates.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from minirlhf.autopsy.parts import AdvantageParts
from minirlhf.lab.heatmap import ENDS
from minirlhf.lab.plots import GREEN, GREY, INK, PURPLE, VERMILLION, blank, tidy
from minirlhf.model import Transformer, response_outputs
from minirlhf.rollout import Rollout

SIDE: dict[str, dict[str, Any]] = {  # no blue and no orange: they say up and down (SIGNS)
    "verbose": {"color": PURPLE},
    "concise": {"color": GREEN, "hatch": "//", "edgecolor": "white"},
}
HUES = np.array([ENDS["n"], (255, 255, 255), ENDS["p"]]) / 255  # the heat map's
SIGNS = LinearSegmentedColormap.from_list("signs", HUES).with_extremes(bad="#E4E4E4")
PARTS = ("reward", "kl", "baseline", "shift", "total")
Sides = Mapping[str, Mapping[str, float]]


def part_means(parts: AdvantageParts, mask: Tensor, sides: Mapping[str, Tensor]) -> Sides:
    """{side: {part: mean}} over the answers of each bool [B], every answer by its tokens' mean.

    nan for a side without answers; "total" is the sum of the parts.
    """
    n = mask.sum(1).clamp(min=1)
    tokens = {name: x for name, x in vars(parts).items() if x is not None}
    answers = {name: torch.where(mask, x, 0.0).sum(1) / n for name, x in tokens.items()}  # [B]
    found = {}
    for side, rows in sides.items():
        chosen = rows & mask.any(1)
        means = {name: float(x[chosen].mean()) for name, x in answers.items()}
        found[side] = {**means, "total": sum(means.values())}
    return found


def draw_waterfall(ax: Axes, sides: Sides) -> dict[str, Any]:
    """Bars of both sides in `ax`; `move_waterfall` moves them."""
    ax.axhline(0, color=INK, lw=1)
    ax.set_xticks(range(len(PARTS)), PARTS)
    bars = {}
    for side, shift in zip(SIDE, (-0.2, 0.2), strict=True):
        places = np.arange(len(PARTS)) + shift
        bars[side] = ax.bar(places, 0.0, 0.38, label=side, lw=0, **SIDE[side])
    move_waterfall(bars, sides)
    return bars


def move_waterfall(bars: Mapping[str, Any], sides: Sides) -> None:
    """Each part starts where the one before it ended, the total at 0."""
    for side, patches in bars.items():
        for patch, (start, size) in zip(patches, _falls(sides[side]), strict=True):
            patch.set(y=start, height=size)


def _falls(means: Mapping[str, float]) -> list[tuple[float, float]]:
    """Where each bar starts and how far it goes; nothing where a side has no answers."""
    sizes = [float(np.nan_to_num(means.get(part, 0.0))) for part in PARTS]
    starts = [0.0, *np.cumsum(sizes[:-2]), 0.0]
    return list(zip(starts, sizes, strict=True))


def waterfall_span(*views: Sides) -> tuple[float, float]:
    """Limits that hold the bars of every view, with air."""
    ends = []
    for sides in views:
        for means in sides.values():
            for start, size in _falls(means):
                ends += [start, start + size]
    air = 0.06 * (max(ends) - min(ends)) + 1e-9
    return min(ends) - air, max(ends) + air


class BatchPicture:
    """What BatchPanel draws: the batch token by token, the waterfall, shares, moves of length.

    Every view that the dials can lead to fits its limits: `sides` and `moves` at their ends.
    """

    def __init__(
        self,
        wide: int,
        limit: float,
        sides: Sequence[Sides],
        strata: Sequence[str],
        length: str,
        moves: Sequence[float],
    ):
        self.figure = blank(10, 2.3)
        axes = self.figure.subplot_mosaic(
            [["verbose", "parts", "share"], ["concise", "parts", "length"]],
            width_ratios=(4, 4, 2.4),
        )
        place: Any = {"extent": (0, wide, 0, 1), "aspect": "auto", "interpolation": "nearest"}
        colours: Any = {"cmap": SIGNS, "vmin": -limit, "vmax": limit}
        empty = np.full((1, wide), np.nan)
        self._images = {side: axes[side].imshow(empty, **place, **colours) for side in SIDE}
        for side in SIDE:
            axes[side].set(yticks=[], xticks=range(0, wide + 1, 12) if side == "concise" else [])
            axes[side].set_ylabel(side, fontsize=12)
        axes["verbose"].set_title("every answer, by token", loc="left", fontsize=12)
        tidy(axes["parts"]).set_title("advantage by part", loc="left", fontsize=12)
        low, high = waterfall_span(*sides)
        axes["parts"].set_ylim(low, high + 0.2 * (high - low))
        self._bars = draw_waterfall(axes["parts"], sides[-1])
        axes["parts"].legend(fontsize=10, frameon=False, ncols=2, loc="upper center")
        self._shares = _rows(axes["share"], "tokens pushed up", [*SIDE], (0, 1))
        reach = max(map(abs, moves)) * 1.05 + 1e-9
        self._moves = _rows(axes["length"], length, strata, (-reach, reach))
        self.artists = list(self._images.values())
        for bars in self._bars.values():
            self.artists += bars
        for bars, texts in (self._shares, self._moves):
            self.artists += bars + texts

    def draw(
        self,
        sides: Sides,
        share: Mapping[str, float],
        moves: Mapping[str, float],
        tokens: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        """Move everything; `tokens` {side: (advantages, mask) of its answers}, long ones on top."""
        move_waterfall(self._bars, sides)
        for side, (x, mask) in tokens.items():
            order = mask.sum(1).argsort(descending=True)
            picture = torch.where(mask, x, torch.nan)[order].numpy(force=True)
            empty = np.full((1, mask.shape[1]), np.nan)
            self._images[side].set_data(picture if len(picture) else empty)
        _move_rows(self._shares, share, ".0%")
        _move_rows(self._moves, moves, "+.2f")


def _rows(ax: Axes, title: str, names: Sequence[str], limits: tuple[float, float]) -> Any:
    """Horizontal bars and their numbers, one a name."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, loc="left", fontsize=12)
    ax.axvline(0, color=INK, lw=1)
    ax.set(xlim=limits, ylim=(len(names) - 0.4, -0.6), xticks=[])
    ax.set_yticks(range(len(names)), names, fontsize=11)
    bars = ax.barh(range(len(names)), 0.0, color="#BBBBBB", height=0.6)
    look: Any = {"ha": "right", "va": "center", "fontsize": 12, "parse_math": False}
    at_edge = ax.get_yaxis_transform()
    texts = [ax.text(0.98, i, "", transform=at_edge, **look) for i in range(len(names))]
    return list(bars), texts


def _move_rows(rows: Any, values: Mapping[str, float], form: str) -> None:
    bars, texts = rows
    for bar, text, value in zip(bars, texts, values.values(), strict=True):
        bar.set_width(np.nan_to_num(value))
        text.set_text("none" if np.isnan(value) else format(value, form))


def waterfall_figure(sides: Sides) -> Figure:
    """The mean advantage of verbose and of concise answers, part by part (`part_means`)."""
    figure = blank(8.5, 3.6)
    ax = tidy(figure.subplots(), "advantage by part", y="mean over tokens, unit of advantages")
    draw_waterfall(ax, sides)
    low, high = waterfall_span(sides)
    ax.set_ylim(low, high)
    figure.legend(loc="outside upper right", ncols=2, fontsize=12, frameon=False)
    figure.set_label(f"Mean advantage in parts. {waterfall_said(sides)}.")
    return figure


def waterfall_said(sides: Sides) -> str:
    """Both sides in words."""
    said = []
    for side, means in sides.items():
        named = ", ".join(f"{k} {means[k]:+.2f}" for k in PARTS[:-1] if means.get(k))
        said.append(f"{side}: {named or 'nothing'}, total {means['total']:+.2f}")
    return "; ".join(said)


def fork(
    policy: Transformer,
    reference: Transformer,
    rollout: Rollout,
    row: int,
    at: int,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, dict[int, float]]:
    """What could have followed token `at - 1` of a row: probabilities [V] under both models, and
    {token: its mean advantage} of the batch's answers that reached the same words."""
    assert rollout.advantages is not None
    one = rollout.select(torch.tensor([row]))

    def shares(model: Transformer) -> Tensor:
        with torch.no_grad():
            logits, _ = response_outputs(model, one.prompts, one.responses, one.mask)
        return (logits[0, at] / temperature).softmax(-1)

    # the answers of the batch that came to the same fork
    there = (rollout.prompts == one.prompts).all(1) & rollout.mask[:, at]
    there &= (rollout.responses[:, :at] == one.responses[:, :at]).all(1)
    taken = rollout.responses[there, at]
    earned = rollout.advantages[there, at].double()
    means = {word: float(earned[taken == word].mean()) for word in set(taken.tolist())}
    return shares(policy), shares(reference), means


def fork_figure(
    names: Sequence[str],
    policy: Tensor,
    reference: Tensor,
    advantages: Mapping[int, float],
    top: int = 6,
) -> Figure:
    """The `top` words that policy and reference thought likeliest at a fork, and the advantage of
    those that were taken; takes what `fork` gives, `names` by token id."""
    order = (policy + reference).argsort(descending=True).tolist()
    shown = sorted(order[:top], key=lambda w: -float(policy[w]))
    figure = blank(9, 0.9 + 0.5 * len(shown))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    tidy(left, "at the fork", "probability")
    tidy(right, "advantage, where taken", "unit of advantages")
    y = np.arange(len(shown))
    hatched: Any = {"color": GREY, "hatch": "//", "edgecolor": "white"}
    left.barh(y - 0.2, policy[shown].tolist(), 0.38, label="policy", lw=0, color=GREEN)
    left.barh(y + 0.2, reference[shown].tolist(), 0.38, label="reference", lw=0, **hatched)
    earned = [advantages.get(w, np.nan) for w in shown]
    right.barh(y, earned, 0.5, color=INK)
    right.axvline(0, color=INK, lw=1)
    for i, word in enumerate(shown):
        if word not in advantages:
            right.text(0, i, " not taken", fontsize=11, color=GREY, va="center")
    left.set_yticks(y, [names[w] for w in shown], fontsize=12)
    left.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2, fontsize=12, frameon=False)
    said = (
        f"{names[w]!r} {policy[w]:.2f} (reference {reference[w]:.2f}"
        + (f", advantage {advantages[w]:+.2f})" if w in advantages else ")")
        for w in shown[:3]
    )
    figure.set_label(f"The next word at the fork: {', '.join(said)}.")
    return figure


def concentration(x: Tensor, share: float = 0.2) -> float:
    """How much of the sum of x [N] >= 0 its largest `share` of entries carry (nan of zeros)."""
    ordered = x.double().sort(descending=True).values
    return float(ordered[: max(1, round(share * len(x)))].sum() / ordered.sum())


def lorenz_figure(log_ratio: Tensor) -> Figure:
    """Lorenz curve of |log-ratio| [N] over tokens: how few of them carry the KL."""
    x = log_ratio.double().abs().sort().values.numpy(force=True)
    curve = np.concatenate([[0.0], np.cumsum(x) / x.sum()])
    figure = blank(5.2, 4)
    ax = tidy(figure.subplots(), "", "share of tokens, smallest first", "share of |log-ratio|")
    ax.plot(np.linspace(0, 1, len(curve)), curve, color=VERMILLION, lw=3)
    ax.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1.5)
    ax.text(0.35, 0.42, "all alike", color=GREY, fontsize=12, rotation=38)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    top = concentration(log_ratio.abs())
    figure.set_label(f"A fifth of the tokens carries {top:.0%} of all |log-ratio|.")
    return figure
