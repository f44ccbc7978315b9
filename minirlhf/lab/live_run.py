"""A PPO run to steer while it learns: start, pause, step, reset; dials act from the next step.

    live = live_run(shipped())      # the course's run with batches of 64, drawn from its start
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
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch

from minirlhf.audit import answer, grade, summarise_grades, texts
from minirlhf.critic import fit_critic
from minirlhf.desk import STRATA, Desk, Prompt
from minirlhf.lab.answers import answer_html, read_answer
from minirlhf.lab.live import LiveFigure, Panel, looks, slider
from minirlhf.lab.plots import GREY, INK, STRATUM, blank, tidy
from minirlhf.ppo import PPO, PPOConfig, Scorer, Step
from minirlhf.shipped import DIALS, Shipped

WIDTH = 960
EVERY = 0.1  # seconds between two pictures, at least
PLOTS = {  # key -> title, unit, direction, limits that widen where a run leaves them
    "rm_score_sd": ("RM score", "reward sd", "↑ better", (-1.0, 5.0)),
    "kl_nats": ("KL", "nats/answer", "↓ closer", (0.0, 20.0)),
    "gold": ("gold", "points", "↑ better", (-2.0, 1.5)),
    "length_tokens": ("length", "tokens", "", (0.0, 50.0)),
}


class LiveRun(Panel):
    """Controls of a PPO run over its curves and three of its answers.

    `run` is at its start, `prompts` the table that it draws from; `scorers` {length bias: what
    PPO may be paid with}, of which the run has the one of `length_bias`. Of beta and epsilon the
    sliders know hundredths. `history` holds a row a step: its number, the dials, means by stratum.
    """

    def __init__(
        self,
        run: PPO,
        desk: Desk,
        prompts: Sequence[Prompt],
        scorers: Mapping[float, Scorer],
        *,
        length_bias: float,
    ):
        self.run, self._desk, self._prompts = run, desk, prompts
        self._scorers, self._customers = dict(scorers), [*desk.probes(3)]
        self._start = run.state_dict(), run.config, run.reward_model
        self.history: list[dict[str, Any]] = []
        self._turns: list[int] = []
        self._stop, self._thread = threading.Event(), threading.Thread()
        self._says, self._drawn = "ready", 0.0
        options = [(f"{dial:g}", dial) for dial in self._scorers]
        self._first = {"beta": run.config.beta, "clip": run.config.clip, "length_bias": length_bias}
        self._dials = dict(self._first)
        controls = {
            "beta": slider("beta", run.config.beta, 0, 0.5, 0.01),
            "clip": slider("clip epsilon", run.config.clip, 0.01, 0.9, 0.01),
            "length_bias": widgets.SelectionSlider(
                options=options, value=length_bias, description="length bias", **looks()
            ),
        }
        acts = {"Start": self.start, "Pause": self.pause, "Step": self.step, "Reset": self.reset}
        self.buttons = {name: widgets.Button(description=name) for name in acts}
        for name, act in acts.items():
            self.buttons[name].on_click(lambda _, act=act: act())
        figure = blank(WIDTH / 100, 2.4, rect=(0, 0, 1, 0.9))
        figure.set_dpi(150)  # sharp on a projector
        self._lines, self._marks = _draw(figure)
        self._page = _Page(figure, [*self._lines.values(), *self._marks], width=WIDTH)
        self._ask()
        row = widgets.HBox([*self.buttons.values()])
        super().__init__("live run", controls, self._page, self.show, [row])

    # ------------------------------------------------------------------ what the buttons do
    def start(self) -> None:
        """Go on step by step, in a thread, until pause()."""
        if not self._thread.is_alive():
            self._go(None)

    def pause(self) -> None:
        """Stop after the step in flight; returns at once."""
        if self._thread.is_alive() and not self._stop.is_set():
            self._stop.set()
            self._says = "pausing"
            self.update()

    def step(self) -> None:
        """One step, in a thread; a run in flight is paused first."""
        self._halt()
        self._go(1)

    def reset(self) -> None:
        """Back to the start: weights, random numbers, dials; the history is emptied."""
        self._halt()
        state, self.run.config, self.run.reward_model = self._start
        self.run.load_state_dict(state)
        self._dials, self._says = dict(self._first), "ready"
        self.history.clear()
        self._turns.clear()
        self._ask()
        with self.live.lock:
            for name, value in self._first.items():
                self.controls[name].value = value
        self.update()

    def run_steps(self, count: int) -> None:
        """`count` steps in the calling thread. An interrupt keeps every whole step."""
        self._halt()
        self._work(threading.Event(), count)

    def close(self) -> None:
        """Stop the thread, then close the panel."""
        self._halt()
        for button in self.buttons.values():
            button.close()
        super().close()

    def _go(self, count: int | None) -> None:
        self._stop = threading.Event()
        # a daemon: the kernel can end while it runs
        self._thread = threading.Thread(target=self._work, args=(self._stop, count), daemon=True)
        self._thread.start()

    def _halt(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    # ------------------------------------------------------------------ the steps
    def _work(self, stop: threading.Event, count: int | None) -> None:
        self._says, since, done = "running", time.perf_counter(), 0
        try:
            while not stop.is_set() and done != count:
                self._one()
                done += 1
                now = time.perf_counter()
                if done != count and not stop.is_set() and now - self._drawn >= EVERY:
                    self._says = f"running, {done / (now - since):.1f} steps/s"
                    self._refresh()
            self._says = "paused"
        except Exception as error:  # in a thread nobody else would see it
            self._says = f"stopped, and back before that step: {error}"
        except BaseException:
            self._says = "interrupted"
            raise
        finally:
            self._refresh()

    def _one(self) -> None:
        """One step with what the dials say now, or none at all."""
        before = self.run.state_dict()
        try:
            self._turn(self.values())
            with torch.enable_grad():  # whatever the thread's mode is
                self.history.append(self._row(self.run.step()))
        except BaseException:
            self.run.load_state_dict(before)
            raise

    def _turn(self, dials: dict[str, float]) -> None:
        if dials == self._dials:
            return
        self.run.config = replace(self.run.config, beta=dials["beta"], clip=dials["clip"])
        if dials["length_bias"] != self._dials["length_bias"]:
            self.run.reward_model = self._scorers[dials["length_bias"]]
        self._dials = dials
        self._turns.append(self.run.steps + 1)

    def _row(self, step: Step) -> dict[str, Any]:
        rollout, metrics = step.rollout, step.metrics
        assert rollout.index is not None
        asked = [self._prompts[i] for i in rollout.index.tolist()]
        grades = grade(self._desk, asked, rollout.responses, rollout.mask)
        row = {"step": self.run.steps, **self._dials, "kl_nats": metrics["objective/kl_nats"]}
        row["rm_score_sd"] = metrics["objective/score_sd"]
        here = np.array([prompt.stratum for prompt in asked])
        return row | {name: summarise_grades(grades, here == name) for name in STRATA}

    # ------------------------------------------------------------------ what is shown
    def _refresh(self) -> None:
        self._ask()
        self.update()
        self._drawn = time.perf_counter()

    def _ask(self) -> None:
        """The customers' answers, between steps: the weights must not move meanwhile."""
        responses, mask = answer(self._desk, self.run.policy, self._desk.encode(self._customers), 0)
        done = ((responses == self._desk.vocabulary.eos) & mask).any(1).tolist()
        said = texts(self._desk, responses, mask)
        self.answers = list(zip(self._customers, said, done, strict=True))

    def show(self, beta: float, clip: float, length_bias: float) -> str:
        """Curves and answers as they are; returns the newest row in words."""
        rows = list(self.history)
        steps = [row["step"] for row in rows]
        for (key, stratum), line in self._lines.items():
            line.set_data(steps, [(row[stratum] if stratum else row)[key] for row in rows])
        turns = np.repeat(np.array(self._turns, dtype=float), 3)
        for mark in self._marks[:-1]:
            mark.set_data(turns, np.tile([0, 1, np.nan], len(turns) // 3))
        dials = f"beta {beta:.2f}, epsilon {clip:.2f}, length bias {length_bias:g}"
        self._marks[-1].set_text(f"next step: {dials}")
        said = f"Step {self.run.steps}: {self._says}."
        self._page.text = _text(said, self._desk, self.answers)
        if sum(_widen(line) for line in self._lines.values()):  # of all, not of the first
            self._page.lay_out()
        if not rows:
            return f"{said} No step taken yet; {dials}."
        last, brief = rows[-1], rows[-1]["brief"]
        return (
            f"{said} In its batch: RM score {last['rm_score_sd']:.1f} reward sd, KL "
            f"{last['kl_nats']:.1f} nats an answer; on brief prompts gold {brief['gold']:.1f} "
            f"points, {brief['length_tokens']:.0f} tokens. Next step: {dials}."
        )


class _Page(LiveFigure):
    """A live figure with HTML above it, both in one message, so in one frame."""

    text = ""

    def redraw(self, alt: str) -> None:
        with self.lock, self.view.hold_trait_notifications():
            super().redraw(alt)
            self.view.value = self.text + self.view.value

    def lay_out(self) -> None:
        """A new background, after limits have moved."""
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(self._canvas.figure.bbox)


def _draw(figure: Any) -> tuple[dict[tuple[str, str], Any], list[Any]]:
    """Empty plots; their lines by key and stratum, and marks: turned dials, then a line of text."""
    lines, marks = {}, []
    axes = figure.subplots(1, len(PLOTS))
    for ax, (key, (title, unit, better, limits)) in zip(axes, PLOTS.items(), strict=True):
        tidy(ax, title, "PPO step", unit, better)
        ax.set(xlim=(0, 40), ylim=limits)
        marks += ax.plot([], [], color=GREY, ls=":", lw=1.5, transform=ax.get_xaxis_transform())
        by = STRATUM if key in ("gold", "length_tokens") else {"": {"color": INK, "ls": "-"}}
        for name, style in by.items():
            look = {"color": style["color"], "ls": style["ls"], "lw": 2, "label": name}
            lines[key, name] = ax.plot([], [], **look)[0]
    axes[-1].legend(fontsize=9, frameon=False, loc="lower right")
    said = "means over each step's own batch; dotted: a dial was turned"
    figure.text(0.005, 0.99, said, fontsize=11, color=GREY, va="top")
    where = {"transform": figure.transFigure, "ha": "right", "va": "top", "fontsize": 11}
    marks.append(axes[0].text(0.995, 0.99, "", color=INK, **where))
    return lines, marks


def _widen(line: Any) -> bool:
    """Whether the plot had to grow for what its line shows."""
    ax, (x, y) = line.axes, (np.asarray(v, dtype=float) for v in line.get_data())
    y, old = y[np.isfinite(y)], (ax.get_xlim(), ax.get_ylim())
    if len(x) and x[-1] > old[0][1]:
        ax.set_xlim(0, 2 * old[0][1])
    if len(y) and not old[1][0] <= y.min() <= y.max() <= old[1][1]:
        ax.set_ylim(min(old[1][0], 1.2 * y.min()), max(old[1][1], 1.2 * y.max()))
    return (ax.get_xlim(), ax.get_ylim()) != old


def _text(says: str, desk: Desk, answers: Sequence[tuple[Prompt, str, bool]]) -> str:
    """Where the run is, and three answers side by side; of fixed height, nothing jumps."""
    columns = "".join(
        '<div style="flex:1;min-width:0"><div style="height:36px;overflow:hidden;line-height:18px">'
        f"<b>{html.escape(prompt.text.removesuffix(' <sep>'))}</b></div>"
        '<div style="height:134px;overflow-y:auto;font-size:12px">'
        f"{answer_html(read_answer(desk, prompt, said), finished=done)}</div></div>"
        for prompt, said, done in answers
    )
    return (
        f'<div style="max-width:{WIDTH}px;background:#fff;color:#111;padding:2px 8px">'
        f'<div role="status" style="height:20px;line-height:20px;overflow:hidden">'
        f'{html.escape(says)}</div><div style="display:flex;gap:12px">{columns}</div></div>'
    )


def live_run(case: Shipped, *, batch: int = 64, seed: int = 0) -> LiveRun:
    """The shipped case from its reference on, critic fitted, every shipped length bias on a dial.

    `batch` answers a step: half the course's, for twice its pace.
    """
    given = case.summary["config"]
    config = PPOConfig(**given["ppo"] | {"batch": batch})
    scorers = {dial: case.reward_model(dial).score for dial in DIALS}
    bias = given["preferences"]["length_bias"]
    prompts = case.desk.prompts(512, np.random.default_rng(seed))
    table = case.desk.encode(prompts)
    policy = copy.deepcopy(case.reference)
    run = PPO(policy, case.reference, scorers[bias], table, config, seed=seed)
    fit_critic(run, batches=given["critic_batches"])
    return LiveRun(run, case.desk, prompts, scorers, length_bias=bias)
