"""The checks of notebook 08 accept its solutions and name the planted mistakes; the rubric fits."""

from functools import partial

import build_notebooks as bn
import pytest
import torch
from checks import c08
from checks.rubric2 import CALIBRATION, RUBRIC
from exercises import written

from minirlhf.drift.config import DriftConfig
from minirlhf.drift.recipe import Recipe
from minirlhf.remedies import pairs as pair_rules

MASTER = "08_the_remedies"
SCOPE = {"torch": torch, "partial": partial, "pair_rules": pair_rules}
CHECKS = {
    "turning_price": c08.check_turning_price,
    "add_twins": c08.check_add_twins,
    "my_remedy": c08.check_remedy,
    "marks_of_d": c08.check_marks,
}


@pytest.mark.parametrize("name", CHECKS)
def test_solution_is_right_and_stub_is_not_written(name):
    assert CHECKS[name](written(MASTER, bn.solved, **SCOPE)[name]).startswith("right: ")
    assert CHECKS[name](written(MASTER, bn.student, **SCOPE)[name]).startswith("not written yet: ")


def priced(s, p, r, m, v, c, b, *, sign=1, mean=False, masked=True, gap_beta=None, flip=False):
    """Exercise 1 row by row, as a student would write it, or nearly."""
    rows = [
        [float(p[i, t] - r[i, t]) for t in range(p.shape[1]) if m[i, t] or not masked]
        for i in range(len(p))
    ]
    nats = [sum(row) / (len(row) if mean else 1) for row in rows]

    def gap(x):
        sides = [[x[i] for i in range(len(x)) if side[i]] for side in (v, c)]
        return sum(sides[0]) / len(sides[0]) - sum(sides[1]) / len(sides[1])

    score, paid = gap(s.tolist()), gap(nats)
    found = score - sign * (b if gap_beta is None else gap_beta) * paid
    return found, paid / score if flip else score / paid


def everybody(s, p, r, m, v, c, b):
    return priced(s, p, r, m, v, ~v, b)


def twins(pairs, concise, pad, tie, *, swap=False, both=False, one=False, fresh=False):
    made = [] if fresh else list(pairs)
    for prompt, answer in concise:
        winner, loser = (pad(answer), answer) if swap else (answer, pad(answer))
        made.append((prompt, winner, loser))
        if (tie or both) and not one:
            made.append((prompt, loser, winner))
    return made


def two_things(recipe):
    return recipe.ppo(beta=0.3).rule(stop=lambda metrics: False)


def from_nothing(recipe):
    return Recipe(DriftConfig()).ppo(beta=0.3)


RIGHT = {"change": 3, "sign": 1, "price": 0, "measure": 0}
BLIND = next(iter(c08.MARKED.marks.mistakes))
WRONG = [
    ("turning_price", priced, "right"),
    ("turning_price", lambda *x: torch.tensor(priced(*x)), "right"),
    ("turning_price", lambda *x: priced(*x, sign=-1), "penalty is added"),
    ("turning_price", lambda *x: priced(*x, mean=True), "averaged over tokens"),
    ("turning_price", lambda *x: priced(*x, masked=False), "mask is ignored"),
    ("turning_price", lambda *x: priced(*x, gap_beta=1.0), "beta is left out"),
    ("turning_price", lambda *x: priced(*x, flip=True), "upside down"),
    ("turning_price", lambda s, p, r, m, v, c, b: priced(s, p, r, m, c, v, b), "turned round"),
    ("turning_price", lambda s, p, r, *x: priced(s, p, 0 * r, *x), "log-prob alone"),
    ("turning_price", lambda s, p, r, *x: priced(s, r, 0 * r, *x), "reference's log-prob"),
    ("turning_price", everybody, "not yet: entry"),
    ("turning_price", lambda *x: priced(*x)[0], "return two numbers"),
    ("turning_price", lambda *x: 1 / 0, "ZeroDivisionError"),
    ("add_twins", twins, "right"),
    ("add_twins", lambda *x: twins(*x)[::-1], "right"),
    ("add_twins", lambda *x: twins(*x, swap=True), "winner and loser are swapped"),
    ("add_twins", lambda *x: twins(*x, both=True), "both orders of a twin without a tie"),
    ("add_twins", lambda *x: twins(*x, one=True), "a tie has no winner"),
    ("add_twins", lambda *x: twins(*x, fresh=True), "are lost"),
    ("add_twins", lambda p, c, pad, t: p, "not yet: 0 twins"),
    ("add_twins", lambda p, c, pad, t: twins(p, c, str, t), "pad one of the two"),
    ("add_twins", lambda p, c, pad, t: p + [(a, pad(a)) for _, a in c], "three parts"),
    ("add_twins", lambda p, c, pad, t: twins(p, [("q", a) for _, a in c], pad, t), "own answer"),
    ("add_twins", lambda *x: tuple(twins(*x)), "return a list"),
    ("my_remedy", lambda r: r.ppo(beta=0.3), "right: it changes ppo.beta and nothing else"),
    ("my_remedy", lambda r: r.ppo(beta=0.28), "that is larger_beta"),
    ("my_remedy", lambda r: r.rule(stop=lambda m: False), "right: it changes stop"),
    ("my_remedy", lambda r: r, "nothing is changed"),
    ("my_remedy", two_things, "2 things are changed, ppo and stop"),
    ("my_remedy", lambda r: r.ppo(beta=0.3, clip=0.1), "2 settings of ppo are changed"),
    ("my_remedy", from_nothing, "throws away"),
    ("my_remedy", lambda r: r.config, "return a recipe"),
    ("my_remedy", lambda r: r.ppo(price=2), "TypeError"),
    ("marks_of_d", lambda: (RIGHT, [BLIND]), "right"),
    ("marks_of_d", lambda: ({**RIGHT, "change": 2, "sign": 0}, [BLIND]), "right"),
    ("marks_of_d", lambda: RIGHT, "return two things"),
    ("marks_of_d", lambda: ({"change": 3}, []), "points are asked for"),
    ("marks_of_d", lambda: ({**RIGHT, "change": 4}, []), "change: 4 points, of 0 to 3"),
    ("marks_of_d", lambda: ({**RIGHT, "sign": 3}, [BLIND]), "sign: 3 points, far more"),
    ("marks_of_d", lambda: ({**RIGHT, "change": 1}, [BLIND]), "change: 1 points, far fewer"),
    ("marks_of_d", lambda: (RIGHT, []), "one of its claims is wrong"),
    ("marks_of_d", lambda: (RIGHT, [BLIND, RUBRIC.mistakes[0]]), "does not say this"),
    ("marks_of_d", lambda: (RIGHT, ["it is rude"]), "no such mistake"),
]


@pytest.mark.parametrize(("name", "function", "said"), WRONG)
def test_mistakes_are_named(name, function, said):
    found = CHECKS[name](function)
    right = said.startswith(("right", "that is"))
    assert said in found and found.startswith("right: ") == right


def test_the_rubric_adds_up_to_ten_and_anchors_spread_over_it():
    assert RUBRIC.full == 10
    totals = [RUBRIC.total(anchor.marks) for anchor in CALIBRATION]
    assert sorted(totals) == [1, 2, 3, 6, 10]
    assert all(cap < 10 for cap in RUBRIC.caps.values())
    assert RUBRIC.caps[next(c for c in RUBRIC.caps if "larger beta" in c)] == 3
