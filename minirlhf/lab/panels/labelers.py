"""The dials of the labelers: how their bias shows in the pairs, before any model is trained.

Shares of pairs are exact, given the pairs: expected over the labelers' noise.
"""

from dataclasses import replace

import numpy as np

from minirlhf.desk.config import PreferenceConfig
from minirlhf.desk.preferences import Pairs, label_probability
from minirlhf.lab.picture import LiveFigure, Panel, slider
from minirlhf.lab.plots import BIASES, BLUE, bias_figure

WIDTH = 900


def expected_bias(pairs: Pairs, config: PreferenceConfig) -> dict[str, float]:
    """The shares of `desk.preferences.raw_bias`, in expectation over labelers with these dials.

    nan where the pairs hold none of the kind; who won the labels of `pairs` does not matter.
    """
    hedged = pairs.hedged_chosen.astype(float) - pairs.hedged_rejected
    length = pairs.length_chosen - pairs.length_rejected
    fact = pairs.fact_chosen - pairs.fact_rejected
    gold = pairs.gold_chosen - pairs.gold_rejected
    p = label_probability(gold, fact, length, hedged, config)
    matched = np.isclose(fact, 0)
    out = {}
    for name, lead in (("longer_wins", length), ("hedged_wins", hedged)):
        wins = np.where(lead > 0, p, 1 - p)
        for suffix, rows in (("", lead != 0), ("_matched", (lead != 0) & matched)):
            out[name + suffix] = float(wins[rows].mean()) if rows.any() else float("nan")
    return out


class LabelerDials(Panel):
    """Three dials of the labelers over the bias that they would put into `pairs`.

    `shown` holds the four shares on screen; the hollow marks are those of `config`. All are
    expected over the labelers' noise: labels drawn once lie around them.
    """

    def __init__(self, pairs: Pairs, config: PreferenceConfig):
        self._pairs = pairs
        self._config = config
        figure = bias_figure({"settings of the course": expected_bias(pairs, config)})
        ax = figure.axes[0]
        ax.set_xlabel("expected share of labels (50 % = no preference)")
        ax.lines[-1].set(markerfacecolor="none", markersize=15, markeredgewidth=2)
        (self._dots,) = ax.plot([], [], "s", color=BLUE, ms=10, label="your labelers")
        figure.legends[0].remove()
        figure.legend(loc="outside upper center", ncols=2, fontsize=12, frameon=False)
        controls = {
            "length_bias": slider("points per token", config.length_bias, 0, 0.16, 0.0005),
            "hedge_bias": slider("points per hedge", config.hedge_bias, 0, 0.6, 0.01),
            "skim": slider("share who skim", config.skim, 0, 1, 0.01),
        }
        live = LiveFigure(figure, [self._dots], width=WIDTH)
        super().__init__("labelers", controls, live, self.show)

    def show(self, **dials: float) -> str:
        """Move the dots to these dials; returns the numbers as a sentence."""
        self.shown = expected_bias(self._pairs, replace(self._config, **dials))
        self._dots.set_data([self.shown[key] for key in BIASES.values()], range(len(BIASES)))
        said = ", ".join(f"{name} {value:.2f}" for name, value in dials.items())
        return (
            f"With {said}: expected over the labelers' noise, the longer answer wins "
            f"{self.shown['longer_wins']:.0%} of the labels, the hedging one "
            f"{self.shown['hedged_wins']:.0%}; where both are equally right and direct, "
            f"{self.shown['longer_wins_matched']:.0%} and {self.shown['hedged_wins_matched']:.0%}."
        )
