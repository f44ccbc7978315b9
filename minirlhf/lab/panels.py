"""Panels of the notebooks that follow a dial: the labelers' bias, and the next word.

Each is a view on numbers that are exact, given what it was handed: shares of pairs are expected
over the labelers' noise, next-word probabilities are read off one forward pass.
"""

from dataclasses import replace

import numpy as np
import torch

from minirlhf.desk import Desk, Prompt
from minirlhf.lab.live import LiveFigure, Panel, slider
from minirlhf.lab.plots import BIASES, BLUE, bias_figure, blank, tidy
from minirlhf.model import Transformer
from minirlhf.preferences import Pairs, PreferenceConfig, label_probability

WIDTH = 900


def expected_bias(pairs: Pairs, config: PreferenceConfig) -> dict[str, float]:
    """The shares of `preferences.raw_bias`, in expectation over labelers with these dials.

    nan where the pairs hold none of the kind; who won the labels of `pairs` does not matter.
    """
    hedged = pairs.hedged_chosen.astype(float) - pairs.hedged_rejected
    length = pairs.length_chosen - pairs.length_rejected
    fact = pairs.fact_chosen - pairs.fact_rejected
    gold = pairs.gold_chosen - pairs.gold_rejected
    p = label_probability(gold, fact, length, hedged, config)
    matched, out = np.isclose(fact, 0), {}
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
        self._pairs, self._config = pairs, config
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
        super().__init__(
            "labelers", controls, LiveFigure(figure, [self._dots], width=WIDTH), self.show
        )

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


class NextWord(Panel):
    """The most likely next words of an answer, word by word, at any sampling temperature.

    `shown` holds the distribution on screen, {word: probability}, likeliest first.
    """

    def __init__(self, model: Transformer, desk: Desk, prompt: Prompt, answer: str, top: int = 8):
        vocabulary, words = desk.vocabulary, answer.split()
        ids = vocabulary.encode(f"{prompt.text} {answer}")
        with torch.no_grad():
            self._logits = model(torch.tensor([ids]))[0][0, -len(words) - 1 :]  # (n + 1, V)
        self._words, self._names, self._top = words, vocabulary.words, top
        figure = blank(9, 3.2)
        ax = tidy(figure.subplots(), "next word", "probability")
        self._bars = ax.barh(range(top), [0.0] * top, color=BLUE)
        self._texts = [ax.text(0, i, "", fontsize=12, va="center") for i in range(top)]
        self._said = ax.text(0.98, 0.05, "", fontsize=12, ha="right", transform=ax.transAxes)
        ax.set(xlim=(0, 1.15), ylim=(top - 0.4, -0.6), yticks=[])
        ax.set_xticks(np.linspace(0, 1, 6))
        live = LiveFigure(figure, [*self._bars, *self._texts, self._said], width=WIDTH)
        controls = {
            "at": slider("words so far", 0, 0, len(words), 1),
            "temperature": slider("temperature", 1.0, 0.2, 3.0, 0.1),
        }
        super().__init__("next word", controls, live, self.show)

    def show(self, at: int, temperature: float) -> str:
        """Move to the state after `at` words of the answer; returns the numbers as a sentence."""
        shares, ids = (self._logits[at] / temperature).softmax(-1).topk(self._top)
        self.shown = {self._names[int(i)]: float(p) for p, i in zip(shares, ids, strict=True)}
        rows = zip(self._bars, self._texts, self.shown.items(), strict=True)
        for bar, text, (word, share) in rows:
            bar.set_width(share)
            text.set(x=share + 0.01, text=f"{word}  {share:.2f}")
        said = " ".join(self._words[:at]) or "(nothing yet)"
        self._said.set_text(f"the answer so far: {said}")
        likely = ", ".join(f"{word} {share:.2f}" for word, share in [*self.shown.items()][:3])
        return f"After {said!r} at temperature {temperature:.1f}: {likely}."
