"""Panels and figures of PPO's update: the clip's epsilon, credit over length, four curves.

Every epsilon costs a real update, so its panel gets a sweep ready-made and the dial stops only at
what was computed. Left out: how a sweep is made (notebook 05).
"""

from collections.abc import Callable, Mapping, Sequence

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure

from minirlhf.lab.picture import LiveFigure, Panel, looks, slider
from minirlhf.lab.plots import BLUE, GREY, INK, ORANGE, VERMILLION, blank, tidy

BINS = np.geomspace(1 / 4, 4, 49)
Sweep = Mapping[float, tuple[np.ndarray, float]]
Paths = Mapping[float, Sequence[float]]


def clip_share(eps: float, ratios: np.ndarray) -> float:
    """Share of the tokens whose ratio lies outside 1 - eps .. 1 + eps."""
    return float((np.abs(ratios - 1) > eps).mean())


def clip_figure(sweep: Sweep, paths: Paths, goal: float) -> Figure:
    """Every epsilon of a sweep: ratios, tokens outside, size of the move, the road to the goal.

    `sweep` {epsilon: (ratios [tokens] after the update, its KL in nats per answer)}; `paths`
    P(verbose) after each rollout on two answers, for the same epsilons; `goal` what theory says.
    """
    grid = list(sweep)
    figure = blank(10, 4)
    # h: histogram of ratios, c: share that the clip cuts, k: KL, p: paths of two answers
    axes = figure.subplot_mosaic([["h", "c", "p"], ["h", "k", "p"]], width_ratios=(5, 3.4, 4))
    hist, share, move, path = (axes[key] for key in "hckp")
    tidy(hist, "ratios after the update", "new / old probability", "tokens (log)")
    hist.set(xscale="log", yscale="log", xlim=(BINS[0], BINS[-1]), ylim=(0.5, 9000))
    hist.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    tidy(share, "tokens outside")
    tidy(move, "move, nats/answer", "epsilon (log)")
    shares = [clip_share(eps, ratios) for eps, (ratios, _) in sweep.items()]
    moves = [nats for _, nats in sweep.values()]
    for ax, values in ((share, shares), (move, moves)):
        ax.plot(grid, values, color=GREY, marker=".")
        ax.set(xscale="log", ylim=(-0.08 * max(values), 1.25 * max(values)))
    share.set_xticks(grid, [""] * len(grid))
    move.set_xticks(grid, [f"{eps:g}" for eps in grid])
    share.yaxis.set_major_formatter(lambda part, _: f"{part:.0%}")
    for ax in (hist, share, move):
        ax.minorticks_off()
    tidy(path, "two answers", "rollouts", "P(verbose)", "dashed: theory")
    path.set(xlim=(0, len(paths[grid[0]]) - 1), ylim=(0, 1))
    path.axhline(goal, color=INK, ls="--", lw=1.2)
    for eps in grid:
        ratios, _ = sweep[eps]
        hist.stairs(_counts(ratios), BINS, color="#CCCCCC", baseline=0.5)
        path.plot(paths[eps], color="#CCCCCC", lw=1.2)
    figure.set_label(
        f"From epsilon {grid[0]:g} to {grid[-1]:g}: tokens outside {shares[0]:.0%} to "
        f"{shares[-1]:.0%}, move {moves[0]:.2f} to {moves[-1]:.2f} nats an answer; "
        f"every road ends near {goal:.2f}."
    )
    return figure


def _counts(ratios: np.ndarray) -> np.ndarray:
    """Tokens in each of BINS, those beyond in the outermost; never 0, which has no logarithm."""
    inside = np.clip(ratios, BINS[0], BINS[-1] * 0.999)
    counts, _ = np.histogram(inside, BINS)
    return np.maximum(counts, 0.5)


class ClipDial(Panel):
    """The clip's epsilon over clip_figure, whose arguments it takes; `shown` holds the numbers."""

    def __init__(self, sweep: Sweep, paths: Paths, goal: float):
        self._sweep = sweep
        self._paths = paths
        self._goal = goal
        grid = list(sweep)
        figure = clip_figure(sweep, paths, goal)
        axes = {ax.get_label(): ax for ax in figure.axes}  # figure.axes has an order of its own
        hist, share, move, path = (axes[key] for key in "hckp")
        band = hist.axvspan(0.9, 1.1, color=ORANGE, alpha=0.4, lw=0)
        bars = hist.stairs(_counts(sweep[grid[0]][0]), BINS, color=BLUE, lw=2.5, baseline=0.5)
        said = hist.text(0.03, 0.95, "", fontsize=12, transform=hist.transAxes)
        (share_dot,) = share.plot([], [], "o", color=VERMILLION, ms=12)
        (move_dot,) = move.plot([], [], "o", color=VERMILLION, ms=12)
        (line,) = path.plot([], [], color=VERMILLION, lw=3)
        self._artists = (band, bars, said, share_dot, move_dot, line)
        stops = {"options": [(f"{eps:g}", eps) for eps in grid], "value": grid[len(grid) // 2]}
        dial = widgets.SelectionSlider(description="epsilon", **stops, **looks())
        live = LiveFigure(figure, self._artists, width=1000)
        super().__init__("clip", {"eps": dial}, live, self.show)

    def show(self, eps: float) -> str:
        """Show the update and the path of a computed epsilon; its numbers as a sentence."""
        ratios, nats = self._sweep[eps]
        path = self._paths[eps]
        share = clip_share(eps, ratios)
        half = next(i for i, p in enumerate(path) if p > self._goal / 2)
        self.shown = {"clip_share": share, "kl_nats": nats, "half_way": half, "end": path[-1]}
        band, bars, said, share_dot, move_dot, line = self._artists
        band.set(x=1 - eps, width=2 * eps)
        bars.set_data(_counts(ratios))
        said.set_text(f"band {1 - eps:g} to {1 + eps:g}")
        share_dot.set_data([eps], [share])
        move_dot.set_data([eps], [nats])
        line.set_data(range(len(path)), path)
        return (
            f"With epsilon {eps:g} the update leaves {share:.0%} of the tokens outside the band "
            f"and moves {nats:.2f} nats an answer; two answers are half way after {half} rollouts "
            f"and end at {path[-1]:.2f}. The dial stops at the {len(self._sweep)} computed values."
        )


class CreditDial(Panel):
    """lambda, gamma and length over the advantages of each token of one answer.

    `credit(tokens=, gamma=, lam=)` gives {"flat": [tokens], "exact": [tokens]} for the two
    critics, in reward sd within +-`limit`; `shown` holds what is on screen.
    """

    def __init__(self, credit: Callable[..., Mapping[str, np.ndarray]], limit: float):
        self._credit = credit
        longest = 60
        figure = blank(10, 3.6)
        ax = tidy(figure.subplots(), "", "token (0 is the fork)", "advantage, reward sd")
        ax.set(xlim=(-1, longest), ylim=(-limit, limit))
        ax.axhline(0, color=INK, lw=1)
        (flat,) = ax.plot([], [], "o", color=VERMILLION, ms=7, label="flat critic")
        (exact,) = ax.plot([], [], "D", color=BLUE, ms=5, label="exact critic")
        self._lines = {"flat": flat, "exact": exact}
        figure.legend(loc="outside upper center", ncols=2, fontsize=12, frameon=False)
        controls = {
            "lam": slider("lambda", 1.0, 0.0, 1.0, 0.01),
            "gamma": slider("gamma", 1.0, 0.9, 1.0, 0.01),
            "tokens": slider("tokens", 30, 2, longest, 1),
        }
        live = LiveFigure(figure, [flat, exact], width=900)
        super().__init__("credit", controls, live, self.show)

    def show(self, lam: float, gamma: float, tokens: int) -> str:
        """Show the advantages with these dials; returns the numbers as a sentence."""
        self.shown = self._credit(tokens=tokens, gamma=gamma, lam=lam)
        said = []
        for name, line in self._lines.items():
            advantages = np.asarray(self.shown[name])
            line.set_data(range(tokens), advantages)
            above = (advantages > 1e-6).sum()
            said.append(f"{name} critic: fork {advantages[0]:+.2f}, {above} tokens above 0")
        return f"{tokens} tokens, lambda {lam:.2f}, gamma {gamma:.2f}. {'; '.join(said)}."


def curves_figure(
    steps: Sequence[float], curves: Mapping[str, tuple[str, Sequence[float], float | None]]
) -> Figure:
    """Curves to be read together, side by side: {title: (unit, values, exact end or None)}."""
    figure = blank(3.2 * len(curves), 3.3)
    axes = np.ravel(figure.subplots(1, len(curves)))
    said = []
    for ax, (title, (unit, values, exact)) in zip(axes, curves.items(), strict=True):
        tidy(ax, title, "PPO step", unit, "" if exact is None else "dashed: exact")
        ax.plot(steps, values, color=BLUE, lw=2.5)
        if exact is not None:
            ax.axhline(exact, color=VERMILLION, ls="--", lw=2)
        said.append(f"{title} {values[0]:.1f} to {values[-1]:.1f} {unit}")
    figure.set_label(f"From the first step to the last: {'; '.join(said)}.")
    return figure


def frontier_figure(
    kl: Sequence[float], reward: Sequence[float], run_kl: Sequence[float], run: Sequence[float]
) -> Figure:
    """The most reward that a mean KL can buy (kl, reward), and a run's way (run_kl, run) to it."""
    figure = blank(7.5, 4)
    ax = tidy(figure.subplots(), "", "KL to the reference, nats per answer", "proxy, points")
    ax.plot(kl, reward, color=INK, lw=2.5, label="frontier: exact optima")
    ax.plot(run_kl, run, color=VERMILLION, marker="o", ms=5, label="PPO on its way")
    ax.set(xlim=(0, 1.5 * max(run_kl)), ylim=(min(reward), max(run) * 1.15))
    ax.legend(fontsize=12, frameon=False, loc="lower right")
    figure.set_label(
        f"PPO ends at KL {run_kl[-1]:.1f} nats and proxy {run[-1]:.1f} points; at that KL the "
        f"frontier stands at {np.interp(run_kl[-1], kl[::-1], reward[::-1]):.1f}."
    )
    return figure
