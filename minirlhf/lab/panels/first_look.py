"""The first panel of the course: drag through a training run and read what the policy says.

Left the reference's answer, right the policy's at the chosen step, sentence by sentence with what
each one does; below, the reward model's mean score and the auditor's gold with a marker at that
step. Prompts are the first probes of the audit, not chosen by what they show. Everything comes
from tables of a finished run: a move of the slider computes nothing but the picture.

Left out: sampling anew (the answers are those that were audited).
"""

import html
from bisect import bisect
from collections.abc import Mapping
from itertools import pairwise
from math import gcd
from typing import Any

import ipywidgets as widgets

from minirlhf.audit.measures import AUDIT, RATES
from minirlhf.desk.world import Prompt
from minirlhf.lab.answers import Sentence, answer_html, draw_answer, read_answer
from minirlhf.lab.picture import LiveFigure, Panel, looks, png, slider
from minirlhf.lab.plots import GREY, INK, STRATUM, audits, blank, curve, tidy

WIDTH = 960  # CSS pixels; fits a lab of 1366 with its file browser open
PROBES = 16  # the probes go round the intents, so these ask every kind of question


class FirstLook(Panel):
    """The panel of a run: anything with its `desk`, `summary` and table of `answers`.

    `shown["before"]` and `shown["now"]` are the rows of the table on screen: step, prompt, answer,
    length_tokens, rm_score_sd (reward sd), gold (points) and the grades. Raises ValueError if the
    run's probes are not those of its desk.
    """

    def __init__(self, run: Any):
        table = run.answers
        self._entries = audits(run.summary)
        self._steps = [entry["step"] for entry in self._entries]
        first, last = self._steps[0], self._steps[-1]
        self._desk = run.desk
        self._probes = run.desk.probes(int(table.probe.max()) + 1)
        asked = table[table.step == first].sort_values("probe").prompt
        if [p.text for p in self._probes] != list(asked):
            raise ValueError("the run's answers are to other probes than this desk's; use its desk")
        kept = table[table.probe < PROBES].assign(at=table.step)
        self._rows = kept.set_index(["at", "probe"]).to_dict("index")
        names = [(_name(i, p), i) for i, p in enumerate(self._probes[:PROBES])]
        # a slider over the steps, not over their list: a screen reader says 80, not 8
        every = gcd(*(b - a for a, b in pairwise(self._steps))) or 1
        controls = {
            "step": slider("training step", last, first, last, every),
            "probe": widgets.Dropdown(options=names, description="prompt", **looks()),
        }
        figure = blank(9.6, 2.3)
        figure.set_dpi(150)  # sharp on a projector; shown at 100 pixels an inch
        self._text = widgets.HTML()
        self._marks = _draw_curves(figure, self._entries)
        live = LiveFigure(figure, self._marks, width=WIDTH)
        super().__init__("first look", controls, live, self.show, [self._text])

    def show(self, step: int, probe: int) -> str:
        """Move to the last audit up to a step, and a prompt; returns what is shown, in words."""
        at = bisect(self._steps, step) - 1
        first, step = self._steps[0], self._steps[at]
        self.shown = {"before": self._rows[first, probe], "now": self._rows[step, probe]}
        self._text.value = _text_html(self.shown, self._said(probe))
        _move(self._marks, self._entries[at])
        return _sentence(self.shown["now"], self._entries[at])

    def _said(self, probe: int) -> list[list[Sentence]]:
        prompt = self._probes[probe]
        return [read_answer(self._desk, prompt, row["answer"]) for row in self.shown.values()]

    def still(self) -> tuple[bytes, str]:
        """The panel as one picture, answers included, for a page without a kernel."""
        figure = blank(9.6, 6.2)
        said = self._said(self.controls["probe"].value)
        parts: Any = figure.subfigures(2, 1, height_ratios=(3.7, 2.5))
        asked = f"customer: {_plain(self.shown['now'])}"
        parts[0].suptitle(asked, fontsize=11, x=0.01, ha="left")
        rows = zip(parts[0].subplots(1, 2), self.shown.items(), said, strict=True)
        for ax, (name, row), sentences in rows:
            draw_answer(ax, sentences, columns=46, lines=11)
            ax.set_title(_head(name, row), fontsize=11, weight="bold", loc="left")
            ax.text(0, 11.9, _numbers(row), fontsize=10)
        at = self._steps.index(self.shown["now"]["step"])
        _move(_draw_curves(parts[1], self._entries), self._entries[at])
        return png(figure), self.live.alt


def _draw_curves(figure: Any, entries: list[dict[str, Any]]) -> list[Any]:
    """Two panels over all steps; returns the artists that move: two lines, three dots."""
    steps = curve(entries, "step")
    left, right = figure.subplots(1, 2)
    score, gold = AUDIT["rm_score_sd"], RATES["gold"]
    tidy(left, score.title, "training step", score.unit, f"what the team saw: {score.direction}")
    left.plot(steps, curve(entries, "rm_score_sd"), color=INK, lw=2)
    tidy(right, gold.title, "training step", gold.unit, f"the auditor: {gold.direction}")
    for name, style in STRATUM.items():
        values = curve(entries, "gold", name)
        right.plot(steps, values, color=style["color"], ls=style["ls"], lw=2, label=name)
    for ax in (left, right):
        ax.margins(y=0.12)  # room for the dots at the ends
    right.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=10, frameon=False)
    marks: list[Any] = [ax.axvline(steps[0], color=GREY, lw=1.5) for ax in (left, right)]
    marks += left.plot([steps[0]], [0], "D", color=INK, ms=9)
    for style in STRATUM.values():
        marks += right.plot([steps[0]], [0], style["marker"], color=style["color"], ms=9)
    return marks


def _move(marks: list[Any], entry: Mapping[str, Any]) -> None:
    """Lines and dots to the step of an audit, the dots to its values."""
    step = entry["step"]
    for line in marks[:2]:
        line.set_xdata([step, step])
    values = (entry["rm_score_sd"], entry["brief"]["gold"], entry["detailed"]["gold"])
    for dot, value in zip(marks[2:], values, strict=True):
        dot.set_data([step], [value])


def _plain(row: Mapping[str, Any]) -> str:
    return row["prompt"].removesuffix(" <sep>")


def _name(number: int, prompt: Prompt) -> str:
    """A prompt in the list: its question, how the reference answers such, and the true value.

    Two customers may ask the same; the number tells them apart.
    """
    question = prompt.text.removesuffix(" <sep>").split(" . ", 1)[-1]
    return f"{number + 1}. {question} ({prompt.stratum}: {prompt.value})"


def _head(name: str, row: Mapping[str, Any]) -> str:
    who = "the reference" if name == "before" else f"the policy at step {row['step']}"
    return f"{name}: {who}"


def _numbers(row: Mapping[str, Any]) -> str:
    flags = [name for name in ("correct", "direct", "evasive", "hedged") if row[name]]
    return (
        f"{row['length_tokens']} tokens | RM score {row['rm_score_sd']:+.2f} sd | "
        f"gold {row['gold']:+.2f} points | {', '.join(flags) or 'neither right nor direct'}"
    )


def _sentence(row: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """One answer and the means of its step, in words."""
    brief, detailed = (f"{entry[name]['gold'] or 0:.1f}" for name in STRATUM)
    return (
        f"Asked {_plain(row)!r}, the policy of step {row['step']} says {row['answer']!r} "
        f"({_numbers(row)}). Over all probes: RM score {entry['rm_score_sd']:.1f} reward sd, gold "
        f"{brief} points on brief and {detailed} on detailed prompts."
    )


def _text_html(shown: Mapping[str, Mapping[str, Any]], said: list[list[Sentence]]) -> str:
    """Prompt and both answers side by side; of fixed height, so that nothing below jumps."""
    columns = "".join(
        f'<div style="flex:1;min-width:0"><b>{_head(name, row)}</b>'
        f'<div style="height:180px;overflow-y:auto">{answer_html(part, finished=row["finished"])}'
        f'</div><div style="height:40px">{html.escape(_numbers(row))}</div></div>'
        for (name, row), part in zip(shown.items(), said, strict=True)
    )
    return (
        f'<div style="max-width:{WIDTH}px;background:#fff;color:#111;padding:4px 8px;'
        f'line-height:20px"><b>customer:</b> {html.escape(_plain(shown["now"]))}'
        f'<div style="display:flex;gap:16px">{columns}</div></div>'
    )
