"""The panel of notebook 03: what does a reward model learn from a ranking?

`LengthDial` turns the labelers' length bias: their own preference on matched pairs moves with the
dial, the reward models that were trained beforehand answer at the nearest one, and a button trains
another on a thread of its own. What is learned is handed in as a function: nothing is trained in
here. Left out: more than one dial at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure

from minirlhf.lab.background import Cancelled, Job, JobPanel, Stop
from minirlhf.lab.picture import LiveFigure, slider
from minirlhf.lab.plots import GREEN, GREY, INK, STRATUM, blank, tidy

Learned = Mapping[str, tuple[float, float]]  # stratum -> P(polite preferred), gap in reward sd


class LengthDial(JobPanel):
    """The labelers' length bias, and what a reward model learns from it on matched pairs.

    labelers(bias) gives P(the polite answer is preferred) by stratum, exactly; `computed` holds
    what the reward models of some dials learned; learn(bias, progress) trains another and lets
    through what `progress` raises. `shown` holds what is on screen: the dial `bias`, `labelers`,
    the `nearest` computed dial and what was `trained` here, by dial. `job` is the training.
    """

    def __init__(self, labelers: Callable, computed: Mapping, learn: Callable, start: float):
        self._labelers = labelers
        self._computed = computed
        self._learn = learn
        self._trained: dict[float, Learned] = {}
        self._start = start
        self.job = Job()
        train = widgets.Button(description="train at this value")
        train.on_click(self.start)
        cancel = widgets.Button(description="cancel")
        cancel.on_click(self.stop)
        self._note = widgets.HTML()
        self.row = widgets.HBox([train, cancel, self._note])
        self.caption = widgets.HTML()
        self.caption.layout.max_width = "960px"
        low, high = min(computed), max(computed)
        controls = {"bias": slider("points per token", start, low, high, 0.0005)}
        live = LiveFigure(self._draw(np.linspace(low, high, 33)), self._marks, width=960)
        super().__init__("length dial", controls, live, self.show, [self.row, self.caption])

    def _draw(self, dials: np.ndarray) -> Figure:
        figure = blank(9.6, 3.8)
        ax = tidy(figure.subplots(), "", "length bias of the labelers, points per token")
        ax.set_ylabel("P(the polite answer is preferred)", fontsize=12)
        ax.axhline(0.5, color=INK, lw=1)
        self._marks = [ax.axvline(dials[0], color=GREY, lw=1.5)]
        for name, style in STRATUM.items():
            color = style["color"]
            exact = [self._labelers(x)[name] for x in dials]
            ax.plot(dials, exact, color=color, ls=style["ls"], label=f"labelers, {name}")
            known = [found[name][0] for found in self._computed.values()]
            label = f"RM beforehand, {name}"
            ax.plot(list(self._computed), known, style["marker"], color=color, label=label)
        look: Any = {"color": INK, "ms": 18, "mew": 2}
        self._marks += ax.plot([], [], "o", mfc="none", label="RM, nearest beforehand", **look)
        self._marks += ax.plot([], [], "*", mfc=GREEN, label="RM, trained here", **look)
        ax.set_ylim(0, 1)
        ax.legend(fontsize=10, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    def show(self, bias: float) -> str:
        """Move to a dial; returns the numbers as a sentence."""
        near = min(self._computed, key=lambda dial: abs(dial - bias))
        found = self._computed[near]
        exact = self._labelers(bias)
        trained = dict(self._trained)
        self.shown = {"bias": bias, "labelers": exact, "nearest": near, "trained": trained}
        level, ring, stars = self._marks
        level.set_xdata([bias, bias])
        ring.set_data([near] * len(found), [p for p, _ in found.values()])
        points = [(dial, p) for dial, got in trained.items() for p, _ in got.values()]
        stars.set_data([dial for dial, _ in points], [p for _, p in points])
        shares = " and ".join(f"{share:.0%} on {name}" for name, share in exact.items())
        told = (
            f"At {bias:.4f} points per token labelers prefer the polite answer in {shares} prompts."
            f" The nearest reward model trained beforehand, {near:.4f}: {_told(found)}."
        )
        if trained:  # the last alone: the caption keeps its height, so that nothing below jumps
            dial = list(trained)[-1]
            told += f" Trained here at {dial:.4f}: {_told(trained[dial])}."
        self.caption.value = f'<div style="min-height:60px;line-height:20px">{told}</div>'
        return told

    def start(self, _button: Any = None) -> None:
        """Train at the dial's value on a thread of its own; one under way is stopped."""
        self.stop()
        bias = float(self.controls["bias"].value)
        self.job.start(lambda stop: self._work(bias, stop))

    def stop(self, _button: Any = None) -> None:
        """Cancel a training, if there is one; the picture stays as it was."""
        self.job.halt()

    def reset(self) -> None:
        """Back to how the panel began: nothing under way, nothing trained here, the first dial."""
        self.stop()
        self._trained = {}
        self._note.value = ""
        self.controls["bias"].value = self._start
        self.update()

    def _work(self, bias: float, stop: Stop) -> None:
        def progress(step: int, total: int, metrics: dict[str, float]) -> None:
            stop.check()
            self._note.value = f"{bias:.4f}: step {step} of {total}"

        try:
            self._trained = {**self._trained, bias: self._learn(bias, progress)}
            self._note.value = f"{bias:.4f}: trained"
            self.update()
        except Cancelled:
            self._note.value = f"{bias:.4f}: cancelled, nothing changed"
        except Exception as error:  # a thread has nobody else to tell
            self._note.value = f"{bias:.4f}: failed, {type(error).__name__}: {error}"


def _told(learned: Learned) -> str:
    gaps = " and ".join(f"{gap:+.2f} on {name}" for name, (_, gap) in learned.items())
    return f"one courtesy phrase is worth {gaps} prompts (reward sd)"
