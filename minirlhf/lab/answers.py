"""Reading an answer sentence by sentence: what does each sentence do for the customer?

The auditor's grade decides (`Desk.grade`), sentence by sentence and with what was said before: a
sentence answers if the graded share of the fact or steps rises with it, and it neither hedges nor
names a wrong value. Each role has a word, a tint and an edge: nobody has to tell colours apart.
Left out: blame within a sentence; a rambling one that states the fact "answers", although its
surplus words count as padding.
"""

import html
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from minirlhf.desk.world import Desk, Prompt


class Sentence(NamedTuple):
    """A sentence of an answer, what it does, and the value of the asked slot that it names."""

    text: str
    role: str
    value: str = ""


# role -> tint (carries black text), edge (Okabe-Ito), the edge's CSS style, meaning
ROLES = {
    "answers": ("#D3E7F4", "#0072B2", "solid", "states the fact or a step, for the first time"),
    "repeats": ("#E9E9E9", "#555555", "dotted", "says again what was said"),
    "courtesy": ("#FCEBC8", "#E69F00", "dashed", "polite, and no answer"),
    "hedges": ("#F4DCE9", "#AA4488", "double", "takes back or leaves open"),
    "wrong": ("#F9D9C4", "#D55E00", "solid", "names another value than the record's"),
    "other": ("#FFFFFF", "#999999", "dotted", "anything else"),
}


def read_answer(desk: Desk, prompt: Prompt, answer: str) -> list[Sentence]:
    """The sentences of any text in order, each with its role. Never raises on a text."""
    said: list[Sentence] = []
    before = ""
    for text in _sentences(answer):
        so_far = f"{before} {text}".strip()
        value = next((w for w in text.split() if w in desk.spec.slots[prompt.slot]), "")
        alone = desk.grade(prompt, text)
        was, now = desk.grade(prompt, before), desk.grade(prompt, so_far)
        if alone.hedged:
            role = "hedges"
        elif alone.wrong:
            role = "wrong"
        elif now.steps_share > was.steps_share:
            role = "answers"
        elif alone.courtesy_tokens and alone.evasive:
            role = "courtesy"
        elif not alone.evasive and now.padding_tokens - was.padding_tokens == len(text.split()):
            role = "repeats"
        else:  # also a step whose words are there and whose fact is not
            role = "other"
        said.append(Sentence(text, role, value))
        before = so_far
    return said


def _sentences(answer: str) -> list[str]:
    """Sentences up to and including the full stop, as the auditor cuts them."""
    parts: list[list[str]] = [[]]
    for word in answer.split():
        parts[-1].append(word)
        if word == ".":
            parts.append([])
    return [" ".join(words) for words in parts if words]


def answer_html(said: Sequence[Sentence], *, finished: bool = True) -> str:
    """Sentences as HTML rows, everything escaped; colours are opaque, for dark themes too."""
    rows = []
    for text, role, value in said:
        tint, edge, css, _ = ROLES[role]
        words = []
        for word in text.split():
            shown = html.escape(word)
            words.append(f"<b><u>{shown}</u></b>" if word == value else shown)
        rows.append(
            f'<div style="background:{tint};color:#111;border-left:6px {css} '
            f'{edge};padding:0 6px;margin:1px 0;line-height:20px">'
            f'<span style="display:inline-block;width:66px;font-size:11px;font-weight:bold">'
            f"{role}</span>{' '.join(words)}</div>"
        )
    ends = "" if finished else "<div><i>cut off at the longest length allowed</i></div>"
    return ("".join(rows) or "<div><i>no words: the answer ended at once</i></div>") + ends


def draw_answer(ax: Axes, said: Sequence[Sentence], *, columns: int, lines: int) -> None:
    """Sentences from the top of an empty axes, wrapped at `columns` characters, `lines` lines."""
    ax.set(xlim=(0, 1), ylim=(lines, 0))
    ax.axis("off")
    at = 0
    for text, role, _ in said:
        tint, edge, _, _ = ROLES[role]
        wrapped = textwrap.wrap(text, columns) or [""]
        if at + len(wrapped) > lines:
            ax.text(0, lines, "...", va="bottom", fontsize=10)
            return
        ax.axhspan(at + 0.06, at + len(wrapped) - 0.06, facecolor=tint, edgecolor="none")
        ax.plot([0, 0], [at + 0.06, at + len(wrapped) - 0.06], color=edge, lw=6)
        ax.text(0.02, at + 0.5, role, va="center", fontsize=9, weight="bold")
        for i, line in enumerate(wrapped):
            ax.text(0.2, at + i + 0.5, line, va="center", fontsize=9.5)
        at += len(wrapped)
