"""The marking sheet, without a browser: points, caps, what is hidden until when, escaping."""

import html

import pytest

from minirlhf.lab.marking import Anchor, Criterion, Marking, Marks, Rubric, rubric_html

EVIL = "<script>alert('x')</script> & more"
RUBRIC = Rubric(
    "What would you change?",
    (Criterion("change", 3, "one change"), Criterion("why", 3, "the sign"),
     Criterion("cost", 2, EVIL)),
    {"only a coefficient": 3, "only better data": 2},
    ("a wrong claim", "another wrong claim"),
)  # fmt: skip
ANCHORS = (
    Anchor("A", EVIL, Marks({"change": 2, "why": 1, "cost": 0}), "short"),
    Anchor("B", "Raise it.",
           Marks({"change": 3, "why": 3, "cost": 0}, frozenset({"only a coefficient"}),
                 frozenset({"a wrong claim"})), EVIL),
)  # fmt: skip
MODEL = "The model answer, first part.\n\nSecond <part>."
ENOUGH = "word " * 40


def everything(widget):
    """All text that the widget and its children hold for the browser."""
    texts = [str(getattr(widget, name, "")) for name in ("value", "description", "placeholder")]
    return "\n".join([*texts, *(everything(child) for child in getattr(widget, "children", ()))])


def marks(change=0, why=0, cost=0, caps=(), mistakes=()):
    points = {"change": change, "why": why, "cost": cost}
    return Marks(points, frozenset(caps), frozenset(mistakes))


@pytest.mark.parametrize(
    ("given", "total"),
    [
        (marks(), 0),
        (marks(3, 3, 2), 8),
        (marks(1, 2, 0), 3),
        (marks(3, 3, 2, caps=["only a coefficient"]), 3),
        (marks(3, 3, 2, caps=["only a coefficient", "only better data"]), 2),
        (marks(1, 0, 0, caps=["only a coefficient"]), 1),
        (marks(3, 3, 2, mistakes=["a wrong claim"]), 7),
        (marks(3, 3, 2, caps=["only a coefficient"], mistakes=["a wrong claim"]), 2),
        (marks(1, 0, 0, mistakes=["a wrong claim", "another wrong claim"]), 0),
    ],
)
def test_points_add_up_caps_hold_mistakes_take_off(given, total):
    assert RUBRIC.total(given) == total


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (marks(change=4), "change: 4 points, of 0 to 3"),
        (marks(why=-1), "why: -1 points"),
        (Marks({"style": 1}), "no such criterion: 'style'"),
        (marks(caps=["no such thing"]), "no such cap"),
        (marks(mistakes=["no such thing"]), "no such mistake"),
    ],
)
def test_marks_that_the_rubric_does_not_know(given, said):
    with pytest.raises(ValueError, match=said):
        RUBRIC.total(given)


def test_anchors_must_fit():
    with pytest.raises(ValueError, match="of 0 to 2"):
        Marking(RUBRIC, [Anchor("A", "x", marks(cost=3), "")], MODEL)


@pytest.fixture
def sheet():
    return Marking(RUBRIC, ANCHORS, MODEL)


def calibrate(sheet):
    for anchor in ANCHORS:
        sheet.choice.value = anchor.name
        sheet.compare()


def test_controls_at_both_ends(sheet):
    assert sheet.own.total == 0
    for control in sheet.own.points.values():
        control.value = control.options[-1][1]
    assert sheet.own.total == 8 and "8 of 8" in sheet.own.says.value
    sheet.own.caps["only a coefficient"].value = True
    assert sheet.own.total == 3
    sheet.own.mistakes["a wrong claim"].value = True
    assert sheet.own.total == 2 and "2 of 8" in sheet.own.says.value
    sheet.own.clear()
    assert sheet.own.marks == marks()


def test_the_model_answer_is_nowhere_before_the_end(sheet):
    assert "model answer, first" not in everything(sheet)
    sheet.finish()
    assert "hand it in" in sheet.says.value and "model answer, first" not in everything(sheet)
    sheet.answer.value = ENOUGH
    sheet.submit()
    sheet.finish()
    assert "left: A, B" in sheet.says.value and "model answer, first" not in everything(sheet)
    calibrate(sheet)
    assert "model answer, first" not in everything(sheet)
    sheet.own.points["why"].value = 2
    sheet.finish()
    assert "<p>The model answer, first part.</p><p>Second &lt;part&gt;.</p>" in sheet.result.value
    assert "Your marks: 2 of 8" in sheet.result.value


def test_calibration_without_an_answer_does_not_open_it(sheet):
    calibrate(sheet)
    sheet.finish()
    assert sheet.result.value == "" and "hand it in" in sheet.says.value


def test_the_buttons_do_it(sheet):
    sheet.answer.value = ENOUGH
    sheet.buttons["Hand in"].click()
    assert sheet.submitted == ENOUGH
    for anchor in ANCHORS:
        sheet.choice.value = anchor.name
        sheet.buttons["Compare"].click()
    sheet.buttons["Show the model answer"].click()
    assert sheet.result.value


def test_a_few_words_are_not_handed_in(sheet):
    sheet.answer.value = "Raise beta."
    sheet.submit()
    assert sheet.submitted is None and "2 words so far" in sheet.says.value


def test_my_marks_against_the_anchors(sheet):
    sheet.choice.value = "B"
    assert "more than" not in sheet.difference.value
    for name, points in {"change": 3, "why": 1, "cost": 2}.items():
        sheet.practice.points[name].value = points
    sheet.practice.mistakes["another wrong claim"].value = True
    sheet.compare()
    said = sheet.difference.value
    assert "<td>3</td><td>3</td><td>the same</td>" in said
    assert "<td>1</td><td>3</td><td>2 less than the anchor</td>" in said
    assert "<td>2</td><td>0</td><td>2 more than the anchor</td>" in said
    assert "<td>5</td><td>2</td><td>3 more than the anchor</td>" in said  # mine - 1; its cap - 1
    assert "a cap you left out: only a coefficient" in said
    assert "a mistake you left out: a wrong claim" in said
    assert "not said in this answer: another wrong claim" in said
    sheet.choice.value = "A"
    assert sheet.difference.value == "" and sheet.practice.marks == marks()


def test_text_is_escaped(sheet):
    sheet.answer.value = EVIL * 30
    sheet.submit()
    calibrate(sheet)
    sheet.finish()
    parts = [w.value for w in (sheet.text, sheet.difference, sheet.result, sheet.says)]
    sheet.choice.value = "A"
    shown = [*parts, sheet.text.value, rubric_html(RUBRIC)]
    assert not any("<script" in part for part in shown)
    assert sum(html.escape(EVIL) in part for part in shown) >= 4


def test_without_a_kernel_the_rubric_is_shown_and_no_answer(sheet):
    shown = sheet._repr_mimebundle_()["text/html"]
    assert "at most 3" in shown and "only better data" in shown
    assert "model answer" not in shown and "Raise it." not in shown
