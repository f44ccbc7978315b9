"""Marking an answer in plain words: calibrate on other answers, mark your own, then compare.

    sheet = Marking(rubric, calibration, model_answer)   # the widget; sheet.own.marks, .total

First an answer is written and handed in. Then a few answers of others are marked, and the marks
held against those of the rubric's author, because one's own answer is the hardest to mark. Only
when it is marked, too, is the model answer shown. Everything stays in the kernel: nothing is
written to disk or sent anywhere. Left out: reading the answer, which no program does here.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ipywidgets as widgets

from minirlhf.lab.picture import looks

READS = '<div style="max-width:880px;line-height:1.4">{}</div>'  # widgets space lines at double
FEWEST = 30  # words; a shorter answer cannot say what, why, at what price and how to see it


@dataclass(frozen=True)
class Criterion:
    """A row of the rubric: what an answer has to say, and for how many points."""

    name: str
    points: int
    text: str


@dataclass(frozen=True)
class Marks:
    """Points by criterion, the caps that apply and the mistakes that were found, by their text."""

    points: Mapping[str, int]
    caps: frozenset[str] = frozenset()
    mistakes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rubric:
    """Criteria whose points add up; caps hold the sum down, each mistake takes a point off."""

    question: str
    criteria: tuple[Criterion, ...]
    caps: Mapping[str, int] = field(default_factory=dict)
    """what an answer says and no more -> the most it can get"""
    mistakes: tuple[str, ...] = ()
    """wrong claims, a point each"""

    @property
    def full(self) -> int:
        """The most that can be had."""
        return sum(criterion.points for criterion in self.criteria)

    def total(self, marks: Marks) -> int:
        """Points of an answer. Raises ValueError for marks that this rubric does not know."""
        known = {criterion.name: criterion.points for criterion in self.criteria}
        _expect("criterion", marks.points, known)
        _expect("cap", marks.caps, self.caps)
        _expect("mistake", marks.mistakes, self.mistakes)
        for name, points in marks.points.items():
            if not 0 <= points <= known[name]:
                raise ValueError(f"{name}: {points} points, of 0 to {known[name]}")
        most = min((self.caps[cap] for cap in marks.caps), default=self.full)
        return max(min(sum(marks.points.values()), most) - len(marks.mistakes), 0)


def _expect(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"no such {what}: {unknown[0]!r}; there are {', '.join(known) or 'none'}")


@dataclass(frozen=True)
class Anchor:
    """An answer to calibrate on, how its author marked it, and why."""

    name: str
    answer: str
    marks: Marks
    why: str


def rubric_html(rubric: Rubric) -> str:
    """The rubric as an HTML table, everything escaped."""
    rows = [(f"{c.points}", f"<b>{html.escape(c.name)}</b>: {html.escape(c.text)}")
            for c in rubric.criteria]  # fmt: skip
    rows += [(f"at most {most}", html.escape(cap)) for cap, most in rubric.caps.items()]
    rows += [("&minus;1", html.escape(mistake)) for mistake in rubric.mistakes]
    cells = "".join(
        f'<tr><td style="text-align:right;white-space:nowrap;vertical-align:top">{points}</td>'
        f'<td style="text-align:left">{text}</td></tr>'
        for points, text in rows
    )
    head = '<tr><th scope="col">points</th><th scope="col">for</th></tr>'
    return f"<table>{head}{cells}</table>"


def difference_html(rubric: Rubric, mine: Marks, anchor: Anchor) -> str:
    """My marks beside the anchor's, row by row, the difference in words; everything escaped."""
    rows = [(c.name, mine.points[c.name], anchor.marks.points[c.name]) for c in rubric.criteria]
    rows.append(("total", rubric.total(mine), rubric.total(anchor.marks)))
    cells = "".join(
        f'<tr><th scope="row" style="text-align:left">{html.escape(name)}</th><td>{a}</td>'
        f"<td>{b}</td><td>{_off(a - b)}</td></tr>"
        for name, a, b in rows
    )
    named = (
        ("no such cap here", mine.caps - anchor.marks.caps),
        ("a cap you left out", anchor.marks.caps - mine.caps),
        ("not said in this answer", mine.mistakes - anchor.marks.mistakes),
        ("a mistake you left out", anchor.marks.mistakes - mine.mistakes),
    )
    notes = "".join(
        f"<li>{what}: {html.escape(text)}</li>" for what, texts in named for text in sorted(texts)
    )
    head = "".join(f'<th scope="col">{x}</th>' for x in ("", "you", "anchor", "difference"))
    why = html.escape(anchor.why)
    listed = f"<ul>{notes}</ul>" if notes else ""
    return f"<table><tr>{head}</tr>{cells}</table>{listed}<p>{why}</p>"


def _off(points: int) -> str:
    if not points:
        return "the same"
    return f"{abs(points)} {'more' if points > 0 else 'less'} than the anchor"


class Sheet(widgets.VBox):
    """Controls of one set of marks: buttons a criterion, a tick a cap and a mistake."""

    def __init__(self, rubric: Rubric):
        self._rubric = rubric
        self.points = {c.name: _choice(c) for c in rubric.criteria}
        self.caps = {cap: _tick(f"only this: {cap}") for cap in rubric.caps}
        self.mistakes = {text: _tick(f"it says: {text}") for text in rubric.mistakes}
        self.says = widgets.HTML()
        controls = [*self.points.values(), *self.caps.values(), *self.mistakes.values()]
        for control in controls:
            control.observe(self._add_up, "value")
        super().__init__([*controls, self.says])
        self._add_up()

    @property
    def marks(self) -> Marks:
        """What the controls say now."""
        points = {name: control.value for name, control in self.points.items()}
        ticked = (
            frozenset(text for text, control in ticks.items() if control.value)
            for ticks in (self.caps, self.mistakes)
        )
        return Marks(points, *ticked)

    @property
    def total(self) -> int:
        """Points by the rubric."""
        return self._rubric.total(self.marks)

    def clear(self) -> None:
        """Everything back to 0."""
        for control in self.points.values():
            control.value = 0
        for control in (*self.caps.values(), *self.mistakes.values()):
            control.value = False

    def _add_up(self, _change: Any = None) -> None:
        self.says.value = f"<b>{self.total} of {self._rubric.full} points</b>"


def _choice(criterion: Criterion) -> Any:
    """A button for each number of points: few steps, and no track to aim at."""
    narrow = {"description_width": "80px", "button_width": "40px"}
    options = [(str(n), n) for n in range(criterion.points + 1)]
    return widgets.ToggleButtons(options=options, description=criterion.name, style=narrow)


def _tick(text: str) -> Any:
    wide = widgets.Layout(width="900px", max_width="100%")
    return widgets.Checkbox(False, description=text, indent=False, layout=wide)


class Marking(widgets.VBox):
    """An answer, calibration answers to mark, one's own marks, and at the end the model answer.

    `submit`, `compare` and `finish` are what the buttons do. `submitted` is the answer that was
    handed in (None before), `compared` the names of the calibration answers marked so far; `own`
    and `practice` are Sheets. Raises ValueError for anchors whose marks do not fit the rubric.
    """

    def __init__(self, rubric: Rubric, calibration: Sequence[Anchor], model_answer: str):
        for anchor in calibration:
            rubric.total(anchor.marks)
        self._rubric = rubric
        self._model = model_answer
        self._anchors = {anchor.name: anchor for anchor in calibration}
        self.submitted: str | None = None
        self.compared: set[str] = set()
        wide = widgets.Layout(width="900px", max_width="100%", height="180px")
        self.answer = widgets.Textarea(placeholder="your answer", layout=wide)
        self.choice = widgets.Dropdown(options=[*self._anchors], description="answer", **looks())
        self.practice, self.own = Sheet(rubric), Sheet(rubric)
        self.says, self.text, self.difference, self.result = (widgets.HTML() for _ in range(4))
        self.choice.observe(self._turn, "value")
        self.buttons = {
            name: widgets.Button(description=name, layout=widgets.Layout(width="220px"))
            for name in ("Hand in", "Compare", "Show the model answer")
        }
        acts = (self.submit, self.compare, self.finish)
        for button, act in zip(self.buttons.values(), acts, strict=True):
            button.on_click(lambda _, act=act: act())
        super().__init__(self._laid_out())
        self._turn()
        self._say("Write your answer, then hand it in. It stays in this notebook's kernel.")

    def _laid_out(self) -> list[widgets.Widget]:
        hand_in, compare, show = self.buttons.values()
        titles = ("1 Your answer", "2 Mark these first", "3 Mark your own")
        first, second, third = (widgets.HTML(f"<b>{title}</b>") for title in titles)
        asked = widgets.HTML(READS.format(html.escape(self._rubric.question)))
        before = [first, asked, self.answer, hand_in, self.says]
        others = [second, self.choice, self.text, self.practice, compare, self.difference]
        # one widget in three places: what is to be done now stands under every button
        return [*before, *others, self.says, third, self.own, show, self.says, self.result]

    def submit(self) -> None:
        """Hand the answer in; it must have FEWEST words. Handing in again replaces it."""
        words = len(self.answer.value.split())
        if words < FEWEST:
            self._say(f"{words} words so far; it takes {FEWEST} or more to say what and why")
            return
        self.submitted = self.answer.value
        self._say(f"Handed in, {words} words. {self._next()}")

    def compare(self) -> None:
        """Hold the marks given to the chosen calibration answer against its author's."""
        anchor = self._chosen
        self.compared.add(anchor.name)
        said = difference_html(self._rubric, self.practice.marks, anchor)
        self.difference.value = READS.format(said)
        self._say(self._next())

    def finish(self) -> None:
        """One's own total, and the model answer, once all that comes before is done."""
        if self.submitted is None or self.compared != {*self._anchors}:
            self._say(self._next())
            return
        mine, model = (_paragraphs(text) for text in (self.submitted, self._model))
        of = f"{self.own.total} of {self._rubric.full}"
        self.result.value = READS.format(
            f"<p><b>Your marks: {of}.</b></p><p><b>Your answer</b></p>{mine}"
            f"<p><b>One answer that gets all {self._rubric.full}</b></p>{model}"
        )
        self._say("Done. Marks can still be changed; press the button again.")

    @property
    def _chosen(self) -> Anchor:
        return self._anchors[str(self.choice.value)]

    def _next(self) -> str:
        """What is to be done now."""
        left = [name for name in self._anchors if name not in self.compared]
        if self.submitted is None:
            return "Write your answer above and hand it in."
        if left:
            return f"Now mark the other answers; left: {', '.join(left)}."
        return "Now mark your own, and then show the model answer."

    def _turn(self, _change: Any = None) -> None:
        """Another calibration answer: an empty sheet, and no anchor to be seen."""
        text = html.escape(self._chosen.answer)
        self.text.value = READS.format(f"<blockquote>{text}</blockquote>")
        self.difference.value = ""
        self.practice.clear()

    def _say(self, text: str) -> None:
        self.says.value = f'<span role="status">{html.escape(text)}</span>'

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **options: Any) -> Any:
        """The widget; where no kernel runs, the rubric."""
        shown = super()._repr_mimebundle_(include=include, exclude=exclude, **options)
        return {**(shown or {}), "text/html": rubric_html(self._rubric)}


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{html.escape(part)}</p>" for part in text.split("\n\n"))
