"""A dial over the words of an answer: what the policy would say next.

The probabilities are exact: they are read off one forward pass.
"""

import numpy as np
import torch

from minirlhf.desk.world import Desk, Prompt
from minirlhf.lab.picture import LiveFigure, Panel, slider
from minirlhf.lab.plots import BLUE, blank, tidy
from minirlhf.model import Transformer

WIDTH = 900


class NextWord(Panel):
    """The most likely next words of an answer, word by word, at any sampling temperature.

    `shown` holds the distribution on screen, {word: probability}, likeliest first.
    """

    def __init__(self, model: Transformer, desk: Desk, prompt: Prompt, answer: str, top: int = 8):
        self._words = answer.split()
        self._names = desk.vocabulary.words
        self._top = top
        ids = desk.vocabulary.encode(f"{prompt.text} {answer}")
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids]))
        # one state before each of the answer's words, and one after them: [n + 1, V]
        self._logits = logits[0, -len(self._words) - 1 :]
        figure = blank(9, 3.2)
        ax = tidy(figure.subplots(), "next word", "probability")
        self._bars = ax.barh(range(top), [0.0] * top, color=BLUE)
        self._texts = [ax.text(0, i, "", fontsize=12, va="center") for i in range(top)]
        self._said = ax.text(0.98, 0.05, "", fontsize=12, ha="right", transform=ax.transAxes)
        ax.set(xlim=(0, 1.15), ylim=(top - 0.4, -0.6), yticks=[])
        ax.set_xticks(np.linspace(0, 1, 6))
        live = LiveFigure(figure, [*self._bars, *self._texts, self._said], width=WIDTH)
        controls = {
            "at": slider("words so far", 0, 0, len(self._words), 1),
            "temperature": slider("temperature", 1.0, 0.2, 3.0, 0.1),
        }
        super().__init__("next word", controls, live, self.show)

    def show(self, at: int, temperature: float) -> str:
        """Move to the state after `at` words of the answer; returns the numbers as a sentence."""
        shares, ids = (self._logits[at] / temperature).softmax(-1).topk(self._top)
        likely = [self._names[i] for i in ids.tolist()]
        self.shown = dict(zip(likely, shares.tolist(), strict=True))
        rows = zip(self._bars, self._texts, self.shown.items(), strict=True)
        for bar, text, (word, share) in rows:
            bar.set_width(share)
            text.set(x=share + 0.01, text=f"{word}  {share:.2f}")
        said = " ".join(self._words[:at]) or "(nothing yet)"
        self._said.set_text(f"the answer so far: {said}")
        first = ", ".join(f"{word} {self.shown[word]:.2f}" for word in likely[:3])
        return f"After {said!r} at temperature {temperature:.1f}: {first}."
