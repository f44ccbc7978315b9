"""The first panel of the course: drag through a training run and read what the policy says.

Left the reference's answer, right the policy's at the chosen step, sentence by sentence with what
each one does; below, the reward model's mean score and the auditor's gold with a marker at that
step. Prompts are the first probes of the audit, not chosen by what they show. Everything comes
from tables of a finished run: a move of the slider computes nothing but the picture.

Left out: sampling anew (the answers are those that were audited).
"""

import html
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import ipywidgets as widgets
import pandas as pd

from minirlhf.desk import Desk
from minirlhf.lab.answers import Sentence, answer_html, draw_answer, read_answer
from minirlhf.lab.live import LiveFigure, Panel, png
from minirlhf.lab.plots import GREY, INK, STRATUM, audits, blank, curve, tidy

WIDTH = 960  # CSS pixels; fits a lab of 1366 with its file browser open
PROBES = 16  # the probes go round the intents, so these ask every kind of question


class Run(Protocol):
    """What the panel reads of a finished run, shipped or one's own."""

    @property
    def desk(self) -> Desk: ...  # noqa: D102
    @property
    def summary(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def answers(self) -> pd.DataFrame: ...  # noqa: D102


class FirstLook(Panel):
    """The panel; `step` and `probe` are its controls, `shown` the rows that it shows now.

    `shown["before"]` and `shown["now"]` hold step, answer, length_tokens, rm_score_sd (reward sd),
    gold (points) and the grades of the two answers on screen. Raises ValueError if the run's
    probes are not those of its desk.
    """

    def __init__(self, run: Run):
        self._desk, self._entries = run.desk, audits(run.summary)
        table = run.answers
        self._probes = run.desk.probes(int(table.probe.max()) + 1)
        firsts = table.loc[table.step == table.step.min()].sort_values("probe")
        if [p.text for p in self._probes] != list(firsts.prompt):
            raise ValueError("the run's answers are to other probes than this desk's; use its desk")
        self._rows = table[table.probe < PROBES].set_index(["step", "probe"]).to_dict("index")
        steps = [entry["step"] for entry in self._entries]
        names = [(_name(self._rows[steps[0], i]), i) for i in range(min(PROBES, len(firsts)))]
        wide = {"description_width": "110px"}
        room = widgets.Layout(width="640px", max_width="100%")
        self.step = widgets.SelectionSlider(
            options=steps, value=steps[-1], description="training step", style=wide, layout=room
        )
        self.probe = widgets.Dropdown(
            options=names, value=0, description="prompt", style=wide, layout=room
        )
        self._text, self._lock = widgets.HTML(), threading.RLock()
        self._curves = _Curves(self._entries)
        for control in (self.step, self.probe):
            control.observe(self._on_move, "value")
        super().__init__(
            "first look", [self.step, self.probe, self._text, self._curves.view], self._still
        )
        self.update(steps[-1], 0)

    def _on_move(self, _change: Any) -> None:
        self.update(*self._chosen())

    def _chosen(self) -> tuple[int, int]:
        step, probe = self.step.value, self.probe.value
        assert step is not None and probe is not None  # both always have a choice
        return step, probe

    def update(self, step: int, probe: int) -> None:
        """Show another step or prompt; from any thread."""
        with self._lock:
            pair = (self._entries[0]["step"], step)
            before, now = ({"step": s, **self._rows[s, probe]} for s in pair)
            self.shown = {"before": before, "now": now}
            said = [self._said(probe, row) for row in (before, now)]
            self._text.value = _text_html(before, now, *said)
            self._curves.show(step, f"{_sentence(now)} {self._curves.caption(step)}")

    def _said(self, probe: int, row: Mapping[str, Any]) -> list[Sentence]:
        return read_answer(self._desk, self._probes[probe], row["answer"])

    def _still(self) -> tuple[bytes, str]:
        """The panel as one picture, answers included, for a page without a kernel."""
        with self._lock:
            rows = self.shown["before"], self.shown["now"]
            said = [self._said(self._chosen()[1], row) for row in rows]
            figure = blank(9.6, 6.2)
            parts: Any = figure.subfigures(2, 1, height_ratios=(3.7, 2.5))
            top, bottom = parts
            top.suptitle(f"customer: {_plain(rows[0]['prompt'])}", fontsize=11, x=0.01, ha="left")
            for ax, row, part in zip(top.subplots(1, 2), rows, said, strict=True):
                draw_answer(ax, part, columns=46, lines=11)
                ax.set_title(_head(row), fontsize=11, weight="bold", loc="left")
                ax.text(0, 11.9, _numbers(row), fontsize=10)
            marks = _draw_curves(bottom, self._entries)
            _move(marks, self._entries, rows[1]["step"])
            return png(figure), f"{_sentence(rows[1])} {self._curves.caption(rows[1]['step'])}"


class _Curves:
    """RM score and gold over the run, with markers at one step."""

    def __init__(self, entries: list[dict[str, Any]]):
        figure = blank(9.6, 2.3)
        figure.set_dpi(150)  # sharp on a projector; shown at 100 pixels an inch
        self._entries, self._marks = entries, _draw_curves(figure, entries)
        self._live = LiveFigure(figure, self._marks, width=WIDTH)
        self.view = self._live.view

    def show(self, step: int, alt: str) -> None:
        with self._live.lock:
            _move(self._marks, self._entries, step)
            self._live.redraw(alt)

    def caption(self, step: int) -> str:
        entry = next(e for e in self._entries if e["step"] == step)
        return (
            f"Over all probes at step {step}: RM score {entry['rm_score_sd']:.1f} reward sd, gold "
            f"{entry['brief']['gold']:.1f} points on brief and {entry['detailed']['gold']:.1f} on "
            "detailed prompts."
        )


def _draw_curves(figure: Any, entries: list[dict[str, Any]]) -> list[Any]:
    """Two panels over all steps; returns the artists that move: two lines, three dots."""
    steps = curve(entries, "step")
    left, right = figure.subplots(1, 2)
    tidy(left, "RM score", "training step", "reward sd", "what the team saw: higher is better")
    left.plot(steps, curve(entries, "rm_score_sd"), color=INK, lw=2)
    tidy(right, "gold quality", "training step", "points", "the auditor: higher is better")
    for name, style in STRATUM.items():
        values = curve(entries, "gold", name)
        right.plot(steps, values, color=style["color"], ls=style["ls"], lw=2, label=name)
    right.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=10, frameon=False)
    marks = [ax.axvline(steps[0], color=GREY, lw=1.5) for ax in (left, right)]
    looks = (left, INK, "D"), *((right, s["color"], s["marker"]) for s in STRATUM.values())
    return marks + [ax.plot([steps[0]], [0], marker, color=c, ms=9)[0] for ax, c, marker in looks]


def _move(marks: list[Any], entries: list[dict[str, Any]], step: int) -> None:
    entry = next(e for e in entries if e["step"] == step)
    values = entry["rm_score_sd"], entry["brief"]["gold"], entry["detailed"]["gold"]
    for line in marks[:2]:
        line.set_xdata([step, step])
    for dot, value in zip(marks[2:], values, strict=True):
        dot.set_data([step], [value])


def _plain(prompt: str) -> str:
    return prompt.removesuffix(" <sep>")


def _name(row: Mapping[str, Any]) -> str:
    """A prompt in the list: its question, and how the reference answers such prompts."""
    return f"{_plain(row['prompt']).split(' . ', 1)[-1]} ({row['stratum']})"


def _head(row: Mapping[str, Any]) -> str:
    return "before: the reference" if row["step"] == 0 else f"now: the policy at step {row['step']}"


def _numbers(row: Mapping[str, Any]) -> str:
    flags = [name for name in ("correct", "direct", "evasive", "hedged") if row[name]]
    return (
        f"{row['length_tokens']} tokens | RM score {row['rm_score_sd']:+.2f} sd | "
        f"gold {row['gold']:+.2f} points | {', '.join(flags) or 'neither right nor direct'}"
    )


def _sentence(row: Mapping[str, Any]) -> str:
    return (
        f"Asked {_plain(row['prompt'])!r}, the policy of step {row['step']} says "
        f"{row['answer']!r} ({_numbers(row)})."
    )


def _text_html(before: Mapping[str, Any], now: Mapping[str, Any], *said: list[Sentence]) -> str:
    """Prompt and both answers side by side; of fixed height, so that nothing below jumps."""
    columns = "".join(
        f'<div style="flex:1;min-width:0"><b>{_head(row)}</b>'
        f'<div style="height:190px;overflow-y:auto">{answer_html(part, finished=row["finished"])}'
        f"</div>{html.escape(_numbers(row))}</div>"
        for row, part in zip((before, now), said, strict=True)
    )
    return (
        f'<div style="max-width:{WIDTH}px;background:#fff;color:#111;padding:4px 8px;'
        f'line-height:20px"><div><b>customer:</b> {html.escape(_plain(now["prompt"]))}</div>'
        f'<div style="display:flex;gap:16px">{columns}</div></div>'
    )
