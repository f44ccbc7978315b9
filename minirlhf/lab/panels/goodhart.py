"""Figures of notebook 06 (the drift over training) and its dial: which prompts moved, and how far.

`DriftDial` bins prompts by how often the *reference* already did something ("answers in more than
N tokens"), and draws how much more often a later policy does it. Half of the reference's samples
make the bins and the other half is measured: one half for both would move every bin that chance
had made low. The line is the two-answer tilt with ONE number for all prompts, k, fitted to the
mean; whether its shape fits is the test. Left out: sampling; it gets lengths.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ipywidgets import SelectionSlider
from matplotlib.figure import Figure

from minirlhf.audit.measures import AUDIT, RATES
from minirlhf.lab.picture import LiveFigure, Panel, looks, slider
from minirlhf.lab.plots import BLUE, GREEN, GREY, INK, STRATUM, VERMILLION, blank, one_legend, tidy
from minirlhf.oracle.closed_form import largest_drift

EDGES = np.array([0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9])
FEWEST = 4  # prompts in a bin that is drawn
GRID = 1 / (1 + np.exp(-np.linspace(-7, 7, 141)))
AUDITED = ("length_tokens", "direct", "evasive", "courteous", "correct", "gold")


def audit_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Every rate of the audit (`audit.controls.rates`) over training, its interval as a band."""
    figure = blank(12, 6)
    said = []
    for ax, name in zip(np.ravel(figure.subplots(2, 3)), AUDITED, strict=True):
        tidy(ax, RATES[name].title, "PPO step", RATES[name].short)
        for stratum, style in STRATUM.items():
            here = [row for row in rows if row["measure"] == name and row["stratum"] == stratum]
            steps = [row["step"] for row in here]
            values = [row["value"] for row in here]
            ax.plot(steps, values, lw=2.5, ms=5, label=f"{stratum} prompts", **style)
            low = [row["low"] for row in here]
            high = [row["high"] for row in here]
            ax.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)
            said.append(f"{stratum} {name} {values[-1]:.2f}")
        if name != "gold":
            ax.set_ylim(bottom=0)
    one_legend(figure, figure.axes[:1], ncols=2)
    figure.set_label(f"At the end: {', '.join(said)}.")
    return figure


def arms_figure(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], stratum: str, said: str
) -> Figure:
    """Histories of every run by group: RM score and gold over steps, gold over distance gone.

    Up to four groups, two arms first and then the same two again (other seeds): thick lines.
    """
    figure = blank(12, 3.9)
    axes = figure.subplots(1, 3)
    tidy(axes[0], "what the team saw", "PPO step", f"RM score, {AUDIT['rm_score_sd'].unit}")
    good = AUDIT["gold"]
    tidy(axes[1], f"gold, {stratum} prompts", "PPO step", good.unit, good.direction)
    tidy(axes[2], "the same, over distance", "square root of KL, nats per answer", good.unit)
    thin = {"lw": 1.0, "ms": 3, "alpha": 0.55}
    thick = {"lw": 2.4, "ms": 0}
    styles: list[dict[str, Any]] = [
        {"color": VERMILLION, "marker": "o", **thin},
        {"color": BLUE, "marker": "s", "ls": "--", **thin},
        {"color": INK, **thick},
        {"color": GREEN, **thick},
    ]
    for (arm, histories), style in zip(runs.items(), styles, strict=False):
        for i, history in enumerate(histories):
            look = {"label": "" if i else arm, **style}  # one line of each group is in the legend
            steps = [entry["step"] for entry in history]
            gold = [entry[stratum]["gold"] for entry in history]
            kl = [entry["kl_nats"] for entry in history]
            axes[0].plot(steps, [entry["rm_score_sd"] for entry in history], **look)
            axes[1].plot(steps, gold, **look)
            # a sampled KL may be below 0
            axes[2].plot(np.sqrt(np.maximum(kl, 0)), gold, **look)
    one_legend(figure, axes[:1], ncols=2)
    figure.set_label(said)
    return figure


def tilt_moves(p0: Any, k: float) -> np.ndarray:
    """oracle.two_answer(p0, k, 1) - p0, of arrays and quick: odds times e^k, minus p0."""
    p0 = np.asarray(p0)
    return 1 / (1 + (1 - p0) / p0 * np.exp(-k)) - p0


def fitted_tilt(p0: np.ndarray, weights: np.ndarray, moved: float) -> float:
    """The k at which shares p0, so weighted, move by `moved` on average; in [-20, 20]."""
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        short = weights @ tilt_moves(p0, middle) < moved
        low, high = (middle, high) if short else (low, middle)
    return (low + high) / 2


class Bin(NamedTuple):
    """Prompts of one stratum whose reference gives long answers about equally often: the share of
    long answers before, the share after minus before, its standard error, and how many they are."""

    brief: bool
    p0: float
    moved: float
    error: float
    prompts: int


class DriftDial(Panel):
    """Turn the training step and what counts as long: which prompts moved, and the tilt's line.

    `reference` [K, N] and `later` {step: [K', N]} are lengths of sampled answers to N prompts,
    `brief` [N] their stratum. `shown` holds k, the tilt's peak, and the bins (`Bin`).
    """

    def __init__(self, reference: np.ndarray, later: Mapping[int, np.ndarray], brief: np.ndarray):
        # one half of the samples makes the bins, the other is measured
        self._first, self._second = reference[::2], reference[1::2]
        self._later = later
        self._brief = brief
        figure = blank(10, 4)
        ax = tidy(figure.subplots(), "who moved", "share of long answers before, p0 (measured)")
        ax.set(xscale="logit", xlim=(0.006, 0.994), ylim=(-0.1, 1.15))
        ax.set_ylabel("share after minus before", fontsize=12)
        ax.set_xticks((0.01, 0.1, 0.5, 0.9, 0.99), ("0.01", "0.1", "0.5", "0.9", "0.99"))
        ax.minorticks_off()
        (self._line,) = ax.plot([], [], color=INK, lw=2)
        (self._peak,) = ax.plot([], [], "|", color=INK, ms=22, mew=2)
        self._errors = ax.vlines([0.5], 0, 0, color=GREY, lw=2)
        self._dots = []
        for name, style in STRATUM.items():
            look = {"color": style["color"], "ms": 10, "label": f"{name} prompts"}
            self._dots += ax.plot([], [], style["marker"], **look)
        self._text = ax.text(0.02, 0.97, "", va="top", fontsize=13, transform=ax.transAxes)
        figure.legend(handles=self._dots, loc="outside lower center", ncols=2, frameon=False)
        artists = [self._line, self._peak, self._errors, *self._dots, self._text]
        controls = {
            "step": SelectionSlider(options=list(later), description="PPO step", **looks()),
            "tokens": slider("more tokens than", 20, 8, 28, 1),
        }
        super().__init__("who moved", controls, LiveFigure(figure, artists, width=900), self.show)

    def show(self, step: int, tokens: int) -> str:
        """Bins and line for "more than `tokens` tokens" after `step`; returns them in words."""
        bins = self._bins(step, tokens)
        p0 = np.array([found.p0 for found in bins])
        moved = np.array([found.moved for found in bins])
        prompts = np.array([found.prompts for found in bins])
        weights = prompts / prompts.sum()
        k = fitted_tilt(p0, weights, weights @ moved)
        peak = float(largest_drift(k, 1.0))
        self.shown = {"k": k, "peak": peak, "bins": bins}
        self._line.set_data(GRID, tilt_moves(GRID, k))
        self._peak.set_data([peak], [tilt_moves(peak, k)])
        bars = [[(b.p0, b.moved - 2 * b.error), (b.p0, b.moved + 2 * b.error)] for b in bins]
        self._errors.set_segments(bars)
        for dots, brief in zip(self._dots, (True, False), strict=True):
            own = [found for found in bins if found.brief == brief]
            dots.set_data([found.p0 for found in own], [found.moved for found in own])
        said = "all answers are long now: any large k fits"
        if k < 15:
            said = f"one k for all prompts: {k:.1f}; the tilt moves p0 = {peak:.2f} most"
        self._text.set_text(said)
        most = max(bins, key=lambda found: found.moved)
        return f"Step {step}, more than {tokens} tokens: {said}; of the bins, p0 = {most.p0:.2f}."

    def _bins(self, step: int, tokens: int) -> list[Bin]:
        """The bins of FEWEST prompts or more."""
        chosen, before = ((x > tokens).mean(0) for x in (self._first, self._second))
        change = (self._later[step] > tokens).mean(0) - before
        label = np.digitize(chosen, EDGES) + 100 * ~self._brief  # never one bin for both strata
        bins = []
        for one in np.unique(label):
            here = label == one
            n = int(here.sum())
            if n >= FEWEST:
                share = (before[here].sum() + 0.05) / (n + 0.1)  # never quite 0 or 1
                error = change[here].std(ddof=1) / n**0.5
                bins.append(Bin(bool(self._brief[here][0]), share, change[here].mean(), error, n))
        return bins
