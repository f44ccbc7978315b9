"""Checks of notebook 08: each runs a student's function and returns one sentence.

"not written yet" for None, "right" or the name of the mistake; nothing is raised.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from checks.rubric2 import CALIBRATION, RUBRIC
from checks.said import compare
from minirlhf.drift import Recipe, changed
from minirlhf.lab.marking import Marks
from minirlhf.remedies import ARMS

PRICES = partial(torch.ones, 3)
MARKED = CALIBRATION[3]  # the answer of exercise 4


def check_turning_price(student: Callable[..., Any]) -> str:
    """Exercise 1: the effective gap of a batch, and the beta at which it is zero."""
    g = torch.Generator().manual_seed(9)
    scores = torch.tensor([1.7, 0.9, -0.4, 0.3, 2.5])
    ratio, ref = 2 * torch.rand(5, 4, generator=g) + 0.2, -torch.rand(5, 4, generator=g)
    mask = torch.arange(4) < torch.tensor([[4], [3], [1], [2], [4]])
    verbose, concise = torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 1, 1, 0]).bool()
    beta = 0.3

    def gap(x: torch.Tensor) -> torch.Tensor:
        return x[verbose].mean() - x[concise].mean()

    nats, tokens = (ratio * mask).sum(1), mask.sum(1)

    def pair(nats: torch.Tensor, beta: float = beta) -> torch.Tensor:
        return torch.stack([gap(scores) - beta * gap(nats), gap(scores) / gap(nats)])

    right = pair(nats)
    mistakes = {
        "the penalty is added: a nat costs, it does not pay": torch.stack(
            [gap(scores) + beta * gap(nats), gap(scores) / gap(nats)]
        ),
        "log-ratios are averaged over tokens; the whole answer is charged": pair(nats / tokens),
        "the mask is ignored: tokens that do not exist are charged": pair(ratio.sum(1)),
        "beta is left out of the gap": pair(nats, 1.0),
        "the price is upside down: that is nats per sd": right ** torch.tensor([1.0, -1.0]),
        "turned round: it is verbose less concise": right * torch.tensor([-1.0, 1.0]),
        "the log-prob alone is charged, not its ratio to the reference": pair(
            ((ratio + ref) * mask).sum(1)
        ),
        "the reference's log-prob is charged, not the ratio": pair((ref * mask).sum(1)),
    }
    given = scores.clone(), (ref + ratio).clone(), ref.clone(), mask.clone()

    def mine() -> Any:
        found = student(*given, verbose.clone(), concise.clone(), beta)
        pair = isinstance(found, tuple | list) and len(found) == 2
        return torch.tensor([float(x) for x in found]) if pair else found

    said = compare(mine, right, mistakes)
    return (
        "return two numbers: the gap, and the price at which it is 0" * ("return a" in said) or said
    )


def check_add_twins(student: Callable[..., Any]) -> str:
    """Exercise 2: counterfactual pairs, (prompt, winner, loser)."""

    def pad(answer: str) -> str:
        return f"thank you . {answer}"

    pairs = [("q1", "long a1", "a1"), ("q2", "a2", "no")]
    concise = [("q1", "a1"), ("q3", "a3")]
    try:
        lists = {tie: student(list(pairs), list(concise), pad, tie) for tie in (False, True)}
    except Exception as error:
        return f"your function stopped with {type(error).__name__}: {error}"
    if lists[False] is None:
        return "not written yet: the function returns None"
    if not all(isinstance(found, list) for found in lists.values()):
        return f"a {type(lists[False]).__name__} came back; return a list of pairs"
    wins = [(q, a, pad(a)) for q, a in concise]
    losses = [(q, pad(a), a) for q, a in concise]
    return _twins(lists, pairs, wins, losses)


def _twins(lists: dict[bool, list], pairs: list, wins: list, losses: list) -> str:
    found, tied = ([p for p in lists[t] if p not in pairs] for t in (False, True))
    if any(p not in lists[t] for t in lists for p in pairs):
        return "the pairs that were there are lost: twins are added to them"
    if found and sorted(found) == sorted(losses):
        return "winner and loser are swapped: a pair is (prompt, winner, loser), and padding loses"
    if sorted(found) == sorted(wins + losses):
        return "both orders of a twin without a tie: the padded answer must lose"
    if any(len(p) != 3 for p in found + tied):
        return "a pair has three parts: (prompt, winner, loser)"
    if any(p[1] == p[2] for p in found + tied):
        return "a twin differs from its answer: pad one of the two, and only one"
    if {p[0] for p in found} - {p[0] for p in wins}:
        return "a twin answers the prompt of its own answer"
    if sorted(found) != sorted(wins):
        return f"not yet: {len(found)} twins were added, expected {wins}"
    if sorted(tied) == sorted(wins):
        return "a tie has no winner: add both orders, so that each wins half of the time"
    if sorted(tied) != sorted(wins + losses):
        return f"not yet: for a tie {len(tied)} were added, expected both orders of each twin"
    return "right: the pairs that were there, and a twin of each concise answer that loses, or ties"


def check_remedy(student: Callable[[Recipe], Any]) -> str:
    """Exercise 3: a function Recipe -> Recipe that changes exactly one thing."""
    before = Recipe()
    other = before.rule(prices=PRICES)  # what somebody has changed before
    try:
        after, stacked = student(before), student(other)
    except Exception as error:
        return f"your function stopped with {type(error).__name__}: {error}"
    if after is None:
        return "not written yet: the function returns None"
    if not isinstance(after, Recipe) or not isinstance(stacked, Recipe):
        return f"a {type(after).__name__} came back; return a recipe"
    what = sorted(changed(before, after))
    if not what:
        return "nothing is changed: the recipe that came back is the one that went in"
    if len(what) > 1:
        return f"{len(what)} things are changed, {' and '.join(what)}: which of them was it?"
    if changed(other, stacked) - {*what}:
        return "it throws away what was changed before: begin from the recipe that is handed in"
    (name,) = what
    old, new = (getattr(recipe.config, name, None) for recipe in (before, after))
    if name not in {f.name for f in fields(before.rules)} and hasattr(old, "__dataclass_fields__"):
        settings = [f.name for f in fields(old) if getattr(old, f.name) != getattr(new, f.name)]
        if len(settings) > 1:
            return f"{len(settings)} settings of {name} are changed, {' and '.join(settings)}: one"
        name = f"{name}.{settings[0]}"
    if name in ("seed", "audit"):
        return f"{name} is no remedy: it changes what is seen, not what is done"
    same = [arm for arm, change in ARMS.items() if _equal(change(before), after)]
    return f"right: it changes {name} and nothing else" + (f"; that is {same[0]}" if same else "")


def _equal(a: Recipe, b: Recipe) -> bool:
    return (a.config, a.rules) == (b.config, b.rules)


def check_marks(student: Callable[[], Any]) -> str:
    """Exercise 4: marks of a calibration answer against the anchor's."""
    try:
        found = student()
    except Exception as error:
        return f"your function stopped with {type(error).__name__}: {error}"
    if found is None:
        return "not written yet: the function returns None"
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], dict)):
        return "return two things: points by criterion, and a list of the mistakes it asserts"
    points, anchor = found[0], MARKED.marks
    if points.keys() != anchor.points.keys():
        return f"points are asked for: {', '.join(anchor.points)}"
    try:
        total = RUBRIC.total(Marks(points, frozenset(), frozenset(found[1])))
    except (ValueError, TypeError) as error:
        return str(error)
    for name, given in points.items():
        if abs(given - anchor.points[name]) > 1:
            more = "more" if given > anchor.points[name] else "fewer"
            return f"{name}: {given} points, far {more} than its author's; read that row again"
    if missed := anchor.mistakes - {*found[1]}:
        return f"one of its claims is wrong and takes a point off; it is about {_about(missed)}"
    if extra := {*found[1]} - anchor.mistakes:
        return f"it does not say this: {sorted(extra)[0]}"
    aim = RUBRIC.total(anchor)
    return f"right: {total} of {RUBRIC.full}, its author gave {aim}"


def _about(mistakes: frozenset[str]) -> str:
    return sorted(mistakes)[0].split(":")[0]
