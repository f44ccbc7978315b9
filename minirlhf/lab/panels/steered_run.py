"""A PPO run to steer while it learns: start, pause, step, reset; dials act from the next step.

    live = LiveRun(shipped())       # from the reference on, with batches of 64
    live                            # the panel; live.run is the PPO object, live.history its steps
    live.run_steps(3)               # the same without a click, in this cell

The run has a thread of its own, so cells can be run meanwhile. A step is whole or not at all: what
interrupts it, an error too, leaves the state of before, and a paused run goes on bit for bit.
Scores, gold and lengths are means over the step's own batch, sampled before its update, so they
are noisy; the three customers are always the same, answered with the same random numbers.

Turning the length bias swaps the reward model: the critic then needs some steps to follow, and
scores of two models are each on their own scale. Left out: the audit (minirlhf.audit), whose 256
probes would cost more than a step.
"""

import copy
import html
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch

from minirlhf.audit.auditor import answer, grade, summarise_grades, texts
from minirlhf.audit.measures import AUDIT
from minirlhf.critic import fit_critic
from minirlhf.desk.world import STRATA
from minirlhf.drift.data import DIALS
from minirlhf.lab.answers import answer_html, read_answer
from minirlhf.lab.background import Job, Stop
from minirlhf.lab.picture import LiveFigure, Panel, looks, slider
from minirlhf.lab.plots import GREY, INK, STRATUM, blank, tidy
from minirlhf.ppo import PPO, Step

WIDTH = 960
ACTS = ("Start", "Pause", "Step", "Reset")  # a button each, and a method
STEPS = 40  # on the axis at first
EVERY = 0.1  # seconds between two pictures, at least
# where an answer is longer than its box; at its end the second lies over the first
MORE = (
    '<div aria-hidden="true" style="position:sticky;bottom:0;height:17px;line-height:17px;'
    'background:#fff;font-size:11px;font-weight:bold">▼ more below</div>'
    '<div style="position:relative;z-index:1;height:17px;margin-top:-17px;background:#fff"></div>'
)
PLOTS = {  # key -> title, unit, direction, limits that widen where a run leaves them
    "rm_score_sd": (*AUDIT["rm_score_sd"].labels, (-1.0, 5.0)),
    "kl_nats": ("KL", "nats/answer", "↓ closer", (0.0, 20.0)),  # the words for a batch's mean
    "gold": (*AUDIT["gold"].labels, (-2.0, 1.5)),
    "length_tokens": (*AUDIT["length_tokens"].labels, (0.0, 50.0)),
}


class LiveRun(Panel):
    """Controls of a PPO run over its curves and three of its answers.

    `case` gives desk, config, prompts(), reference and a reward_model(dial) for each of DIALS;
    `batch` answers a step (half the course's: twice its pace). Beta and epsilon move by hundredths.
    `history` has a row a step: its number, the dials it was taken with, means of its batch by
    stratum.
    """

    def __init__(self, case: Any, *, batch: int = 64, seed: int = 0):
        self._desk = case.desk
        self._prompts = case.prompts()
        self._scorers = {dial: case.reward_model(dial).score for dial in DIALS}
        config = replace(case.config.ppo, batch=batch)
        bias = case.config.preferences.length_bias
        policy = copy.deepcopy(case.reference)
        table = case.desk.encode(self._prompts)
        self.run = PPO(policy, case.reference, self._scorers[bias], table, config, seed=seed)
        fit_critic(self.run, batches=case.config.critic_batches)
        self._start = self.run.state_dict()
        self.job = Job()
        self._says = "ready"
        self._drawn = 0.0  # when the last picture was
        self.history: list[dict[str, Any]] = []
        biases = {"options": DIALS, "value": bias, "description": "length bias"}
        controls = {
            "beta": slider("beta", config.beta, 0, 0.5, 0.01),
            "clip": slider("clip epsilon", config.clip, 0.01, 0.9, 0.01),
            "length_bias": widgets.SelectionSlider(**biases, **looks()),
        }
        self.buttons = [widgets.Button(description=name) for name in ACTS]
        for button in self.buttons:
            button.on_click(lambda clicked: getattr(self, clicked.description.lower())())
        figure = blank(WIDTH / 100, 2.3, rect=(0, 0, 1, 0.9))
        figure.set_dpi(150)  # sharp on a projector
        self._lines, self._said = _draw(figure)
        live = LiveFigure(figure, [*self._lines.values(), self._said], width=WIDTH)
        self._ask()
        super().__init__("live run", controls, live, self.show, [widgets.HBox(self.buttons)])
        self._dials = self._first = self.values()

    # ------------------------------------------------------------------ what the buttons do
    def start(self) -> None:
        """Go on step by step, in a thread, until pause()."""
        if not self.job.thread.is_alive():
            self.job.start(lambda stop: self._work(stop, None))

    def pause(self) -> None:
        """Stop after the step in flight; returns at once."""
        if self.job.busy:
            self.job.cancel()
            self._says = "pausing"
            self.update()

    def step(self) -> None:
        """One step, in a thread; a run in flight is paused first."""
        self.job.halt()
        self.job.start(lambda stop: self._work(stop, 1))

    def reset(self) -> None:
        """Back to the start: weights, random numbers, dials; the history is emptied."""
        self.job.halt()
        self.run.load_state_dict(self._start)
        self.history.clear()
        self._says = "ready"
        for line in self._lines.values():
            line.axes.set_xlim(0, STEPS)
        self.live.lay_out()
        for name, value in self._first.items():
            self.controls[name].value = value
        self._refresh()

    def run_steps(self, count: int) -> None:
        """`count` steps in the calling thread. An interrupt keeps every whole step."""
        self.job.halt()
        self._work(Stop(), count)

    def close(self) -> None:
        """Stop the thread, then close the panel."""
        self.job.halt()
        for button in self.buttons:
            button.close()
        super().close()

    # ------------------------------------------------------------------ the steps
    def _work(self, stop: Stop, count: int | None) -> None:
        """`count` steps (None: any number), until it is told to stop."""
        self._says = "running"
        end = "interrupted"
        since = time.perf_counter()
        done = 0
        try:
            while not stop.is_set() and done != count:
                self._one()
                done += 1
                now = time.perf_counter()
                if done != count and not stop.is_set() and now - self._drawn >= EVERY:
                    self._says = f"running, {done / (now - since):.1f} steps/s"
                    self._refresh()
            end = "paused"
        except Exception as error:  # in a thread nobody else would see it
            end = f"stopped, and back before that step: {error}"
        finally:
            self._says = end
            self._refresh()

    def _one(self) -> None:
        """One step with what the dials say now, or none at all."""
        dials = self.values()
        if dials != self._dials:
            self.run.config = replace(self.run.config, beta=dials["beta"], clip=dials["clip"])
            self.run.reward_model = self._scorers[dials["length_bias"]]
            self._dials = dials
        before = self.run.state_dict()
        try:
            with torch.enable_grad():  # whatever the thread's mode is
                self.history.append(self._row(self.run.step()))
        except BaseException:
            self.run.load_state_dict(before)
            raise

    def _row(self, step: Step) -> dict[str, Any]:
        rollout = step.rollout
        asked = [self._prompts[int(i)] for i in rollout.index]  # type: ignore[union-attr]
        grades = grade(self._desk, asked, rollout.responses, rollout.mask)
        here = np.array([prompt.stratum for prompt in asked])
        return {
            "step": self.run.steps,
            **self._dials,
            "rm_score_sd": step.metrics["objective/score_sd"],
            "kl_nats": step.metrics["objective/kl_nats"],
            **{name: summarise_grades(grades, here == name) for name in STRATA},
        }

    # ------------------------------------------------------------------ what is shown
    def _refresh(self) -> None:
        self._ask()
        self.update()
        self._drawn = time.perf_counter()

    def _ask(self) -> None:
        """Three answers, between steps: the weights must not move meanwhile."""
        desk = self._desk
        asked = desk.probes(3)
        responses, mask = answer(desk, self.run.policy, desk.encode(asked), 0)
        done = (responses == desk.vocabulary.eos).any(1).tolist()  # pads are no EOS
        self.answers = list(zip(asked, texts(desk, responses, mask), done, strict=True))

    def show(self, **dials: float) -> str:
        """Curves and answers as they are; returns the newest row in words."""
        rows = list(self.history)
        said = f"Step {self.run.steps}: {self._says}."
        turned = [any(b[dial] != a[dial] for dial in dials) for a, b in pairwise(rows)]
        for (key, stratum), line in self._lines.items():
            values = [(row[stratum] if stratum else row)[key] for row in rows]
            line.set_data([row["step"] for row in rows], values)
            line.set_markevery(1 + np.flatnonzero(turned))
        chosen = (
            f"next step: beta {dials['beta']:.2f}, epsilon {dials['clip']:.2f}, "
            f"length bias {dials['length_bias']:g}"
        )
        self._said.set_text(chosen)
        self.live.above = _text(said, self._desk, self.answers)
        widened = [_widen(line) for line in self._lines.values()]  # all of them, not the first
        if any(widened):
            self.live.lay_out()
        if not rows:
            return f"{said} Nothing learnt yet; {chosen}."
        last = rows[-1]
        brief = last["brief"]
        return (
            f"{said} In its batch: RM score {last['rm_score_sd']:.1f} reward sd, KL "
            f"{last['kl_nats']:.1f} nats an answer; on brief prompts gold {brief['gold']:.1f} "
            f"points, {brief['length_tokens']:.0f} tokens; {chosen}."
        )


def _draw(figure: Any) -> tuple[dict[tuple[str, str], Any], Any]:
    """Empty plots; their lines by key and stratum, and a text for the dials."""
    lines = {}
    axes = figure.subplots(1, len(PLOTS))
    for ax, (key, (title, unit, better, limits)) in zip(axes, PLOTS.items(), strict=True):
        tidy(ax, title, "PPO step", unit, better).set(xlim=(0, STEPS), ylim=limits)
        split = STRATUM if key in ("gold", "length_tokens") else {"": {"color": INK, "ls": "-"}}
        for name, style in split.items():
            look = {"color": style["color"], "ls": style["ls"], "label": name, "markevery": []}
            lines[key, name] = ax.plot([], [], lw=2, marker="D", ms=6, **look)[0]
    where = {"loc": "upper left", "bbox_to_anchor": (0.29, 1.02), "borderaxespad": 0}
    figure.legend(handles=axes[-1].lines, ncols=2, fontsize=11, frameon=False, **where)
    look = {"transform": figure.transFigure, "va": "top", "fontsize": 11, "in_layout": False}
    axes[0].text(0.005, 0.99, "batch means; ◆ a dial was turned", color=GREY, **look)
    return lines, axes[0].text(0.995, 0.99, "", color=INK, ha="right", **look)


def _widen(line: Any) -> bool:
    """Whether the plot had to grow for what its line shows."""
    ax = line.axes
    points = np.array(line.get_data(), dtype=float)
    x, y = points[:, np.isfinite(points[1])]
    _, right = ax.get_xlim()
    low, high = ax.get_ylim()
    if not len(y) or (x[-1] <= right and low <= y.min() <= y.max() <= high):
        return False
    right = right if x[-1] <= right else 2 * right
    ax.set(xlim=(0, right), ylim=(min(low, 1.2 * y.min()), max(high, 1.2 * y.max())))
    return True


def _text(says: str, desk: Any, answers: list[Any]) -> str:
    """Where the run is, and the answers side by side; of fixed height, nothing jumps."""
    columns = "".join(
        '<div style="flex:1;min-width:0"><b style="display:block;height:36px;overflow:hidden;'
        f'line-height:18px">{html.escape(prompt.text.removesuffix(" <sep>"))}</b>'
        '<div style="height:174px;overflow-y:auto;font-size:12px">'
        f"{answer_html(read_answer(desk, prompt, said), finished=done)}{MORE}</div></div>"
        for prompt, said, done in answers
    )
    return (
        f'<div style="max-width:{WIDTH}px;background:#fff;color:#111;padding:2px 8px">'
        '<div role="status" style="height:20px;line-height:20px;overflow:hidden">'
        f'{html.escape(says)}</div><div style="display:flex;gap:12px">{columns}</div></div>'
    )
