"""The beta dial of notebook 04: what holds a policy back, and how far does it get?

`BetaDial` lays policies that were trained over the exact theory of two answers (`oracle`): a dot is
a run, a line is a formula, and between dots nothing is filled in. Left out: training; the dial
shows the runs that it was given.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ipywidgets import Dropdown, SelectionSlider
from matplotlib.axes import Axes
from torch import Tensor

from minirlhf.lab.picture import LiveFigure, Panel, looks
from minirlhf.lab.plots import BLUE, GREY, INK, VERMILLION, blank, tidy
from minirlhf.oracle.closed_form import kl_pull, two_answer_end

WAYS = {  # name -> place, estimator
    "k1 in the reward": ("reward", "k1"),
    "k2 in the loss": ("loss", "k2"),
    "k3 in the loss": ("loss", "k3"),
    "k3 in the reward": ("reward", "k3"),
    "k1 in the loss: the book's formula": ("book_literal", "k1"),
}
BETAS = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)  # reward sd per nat
SHARES = torch.linspace(-7, 7, 141, dtype=torch.float64).sigmoid()
TICKS = (0.01, 0.1, 0.5, 0.9, 0.99)


def _shares(ax: Axes, title: str, x: str, y: str, top: float) -> None:
    """Axes over a share of verbose answers, evenly in log-odds: what a penalty counts in."""
    tidy(ax, title, f"verbose share {x}", y)
    ax.set(xscale="logit", xlim=(0.0009, 0.9991), ylim=(-0.03 * top, 1.2 * top))
    ax.set_xticks(TICKS, [f"{t:g}" for t in TICKS], fontsize=10)
    ax.minorticks_off()


class BetaDial(Panel):
    """Turn beta, choose a penalty: push against pull, where policies end, how far they moved.

    p0 [N] are the reference's shares, `runs` {(name in WAYS, beta in BETAS): shares [N] after
    training}, `delta_r` what verbose answers earn more, reward sd. `shown` is what is on screen.
    """

    def __init__(self, p0: Tensor, runs: Mapping[tuple[str, float], Tensor], delta_r: float):
        self._p0 = p0
        self._runs = runs
        self._gap = delta_r
        self._known = {(beta, way): self._ends(beta, way) for way in WAYS for beta in BETAS}
        figure = blank(10.4, 3.7, wspace=0.05)
        push, end, move = figure.subplots(1, 3)
        _shares(push, "push and pull", "now, p", "reward sd (dashed: push)", 2.5 * delta_r)
        _shares(end, "where it ends", "before, p0", "share after training", 1.0)
        _shares(move, "how far it moved", "before, p0", "share after minus before", 1.0)
        push.axhline(delta_r, color=INK, lw=2, ls="--")
        end.plot(SHARES, SHARES, color=GREY, lw=1.5, ls=":")
        note: Any = {"ha": "right", "transform": end.transAxes, "color": GREY}
        end.text(0.98, 0.04, "dotted: no move", **note)
        axes = (push, end, move)
        self._lines = [ax.plot([], [], color=BLUE, lw=2.5)[0] for ax in axes]
        (self._rest,) = push.plot([], [], "D", color=BLUE, ms=8)
        (self._run_ends,) = end.plot([], [], "o", color=VERMILLION, ms=8)
        (self._run_moves,) = move.plot([], [], "o", color=VERMILLION, ms=8)
        self._texts = [ax.text(0.03, 0.98, "", va="top", transform=ax.transAxes) for ax in axes]
        dots = [self._rest, self._run_ends, self._run_moves]
        prompts = [(f"{p:.2g}", i) for i, p in enumerate(p0.tolist())]
        controls = {
            "beta": SelectionSlider(options=BETAS, value=0.1, description="beta", **looks()),
            "way": Dropdown(options=[*WAYS], description="penalty", **looks()),
            "prompt": SelectionSlider(options=prompts, value=1, description="p0, left", **looks()),
        }
        live = LiveFigure(figure, [*self._lines, *dots, *self._texts], width=1000)
        super().__init__("beta", controls, live, self.show)

    def _ends(self, beta: float, way: str) -> Tensor:
        """Where theory ends from SHARES, and behind them from p0."""
        start = torch.cat([SHARES, self._p0])
        place, estimator = WAYS[way]
        return two_answer_end(start, self._gap, beta, place=place, estimator=estimator)

    def show(self, beta: float, way: str, prompt: int) -> str:
        """Lines to the theory of this beta, dots to the run at it if there is one; in words."""
        place, estimator = WAYS[way]
        p0 = self._p0[prompt]
        pull = beta * kl_pull(SHARES, p0, place=place, estimator=estimator)
        pull = pull.where((p0 <= SHARES) & (pull <= 2.5 * self._gap), np.nan)  # below the text
        ends, own = self._known[beta, way].split([len(SHARES), len(self._p0)])
        moved = ends - SHARES
        for line, y in zip(self._lines, (pull, ends, moved), strict=True):
            line.set_data(SHARES, y)
        # push meets pull where it comes to rest, unless it runs away
        rest = own[prompt]
        self._rest.set_data([rest], [self._gap if rest < 1 else np.nan])
        run = self._runs.get((way, beta))
        if run is None:
            self._run_ends.set_data([], [])
            self._run_moves.set_data([], [])
        else:
            self._run_ends.set_data(self._p0, run)
            self._run_moves.set_data(self._p0, run - self._p0)
        at = moved.argmax()
        peak = SHARES[at]
        self.shown = {"ends": ends, "end": rest.item(), "peak": peak.item(), "run": run}
        stops = f"ends at {rest:.3f}" if rest < 1 else "runs away to 1"
        texts = (
            f"from p0 = {p0:.2g}: {stops}",
            "no run here: theory only" if run is None else "dots: trained by PPO",
            f"most at p0 = {peak:.2g}" if at > 0 else "most where verbose is rarest",
        )
        for artist, text in zip(self._texts, texts, strict=True):
            artist.set_text(text)
        return f"Beta {beta:g}, {way}: {texts[0]}; {texts[1]}; moved {texts[2]}."
