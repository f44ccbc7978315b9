"""The checks of notebook 03 accept its solutions and name the planted mistakes."""

import build_notebooks as bn
import numpy as np
import pytest
import torch
from checks import c03
from exercises import written

MASTER = "03_the_reward_model"
SCOPE = {"np": np, "torch": torch}
CHECKS = {
    "longer_wins": c03.check_longer_wins,
    "loss_gradient": c03.check_loss_gradient,
    "ceiling": c03.check_ceiling,
    "final_share": c03.check_final_share,
}


@pytest.mark.parametrize("name", CHECKS)
def test_solution_is_right_and_stub_is_not_written(name):
    assert CHECKS[name](written(MASTER, bn.solved, **SCOPE)[name]).startswith("right: ")
    assert CHECKS[name](written(MASTER, bn.student, **SCOPE)[name]).startswith("not written yet: ")


def sigma(x):
    return 1 / (1 + np.exp(-x))


def odds(p):
    return p / (1 - p)


MISTAKES = [
    ("longer_wins", lambda a, b: (a < b)[a != b].mean(), "turned round"),
    ("longer_wins", lambda a, b: (a > b).mean(), "ties are counted as losses"),
    ("longer_wins", lambda a, b: (a >= b).mean(), "ties are counted as wins"),
    ("longer_wins", lambda a, b: (a > b).sum(), "a count, not a share"),
    ("longer_wins", lambda a, b: 100 * (a > b)[a != b].mean(), "in percent"),
    ("longer_wins", lambda a, b: np.mean(a - b), "mean difference in length"),
    ("longer_wins", lambda a, b: ((a > b) + 0.5 * (a == b)).mean(), "ties are counted as half"),
    ("longer_wins", lambda a, b: (a > b).sum() / (a < b).sum(), "wins over losses"),
    ("loss_gradient", lambda c, r: -torch.sigmoid(c - r) * torch.sigmoid(r - c) / 4, "slope of p"),
    ("ceiling", lambda p: 100 * np.maximum(p, 1 - p).mean(), "in percent"),
    ("loss_gradient", lambda c, r: torch.sigmoid(r - c) / len(c), "the sign is turned round: "),
    ("loss_gradient", lambda c, r: -torch.sigmoid(r - c), "the mean is forgotten: "),
    ("loss_gradient", lambda c, r: torch.sigmoid(r - c), "turned round and the mean"),
    ("loss_gradient", lambda c, r: -torch.sigmoid(c - r) / len(c), "p where 1 - p belongs"),
    ("loss_gradient", lambda c, r: -torch.sigmoid(c - r).log(), "not its slope"),
    ("loss_gradient", lambda c, r: -torch.sigmoid(r - c).mean(), "the shape is wrong"),
    ("ceiling", lambda p: p.mean(), "how likely the labels are"),
    ("ceiling", lambda p: np.minimum(p, 1 - p).mean(), "the worst ranking"),
    ("ceiling", lambda p: np.maximum(p, 1 - p).max(), "the best pair"),
    ("ceiling", lambda p: (p > 0.5).mean(), "counts the pairs"),
    ("ceiling", lambda p: np.maximum(p, 1 - p).sum(), "a sum, not a mean"),
    ("ceiling", lambda p: np.maximum(p, 1 - p), "the shape is wrong: it returns [6]"),
    ("final_share", lambda p, g, b: sigma(np.log(odds(p)) - g / b), "the sign is turned round"),
    ("final_share", lambda p, g, b: odds(p) * np.exp(g / b), "those are odds"),
    ("final_share", lambda p, g, b: p * np.exp(g / b), "the probability is multiplied"),
    ("final_share", lambda p, g, b: sigma(np.log(odds(p)) + g * b), "beta multiplies the gap"),
    ("final_share", lambda p, g, b: sigma(np.log(odds(p)) + g), "beta is left out"),
    ("final_share", lambda p, g, b: sigma(g / b), "the odds of the reference are left out"),
    ("final_share", lambda p, g, b: sigma(np.log(p) + g / b), "p0 is not turned into odds"),
]


@pytest.mark.parametrize(("name", "wrong", "word"), MISTAKES)
def test_mistakes_are_named(name, wrong, word):
    said = CHECKS[name](wrong)
    assert word in said and not said.startswith("right")


@pytest.mark.parametrize("name", CHECKS)
def test_whatever_a_student_writes_becomes_one_sentence(name):
    def stops(*_):
        raise KeyError("length")

    for function, word in (
        (stops, "stops with an error: KeyError"),
        (lambda: 1, "stops with an error: TypeError"),
        (lambda *_: "much", "stops with an error: ValueError"),
        (lambda *_: [1.0, 2.0], "the shape is wrong"),
        (
            lambda *given: np.full(np.shape(given[0]) if name == "loss_gradient" else (), np.nan),
            "not a number",
        ),
        (
            lambda *given: np.full(np.shape(given[0]) if name == "loss_gradient" else (), 0.123),
            "not yet",
        ),
    ):
        said = CHECKS[name](function)
        assert word in said and "\n" not in said
