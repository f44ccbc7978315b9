"""The checks of notebook 07 accept its solutions and name the planted mistakes."""

import build_notebooks as bn
import pytest
import torch
from checks import c07
from exercises import written

MASTER = "07_the_autopsy"
SCOPE = {"torch": torch}
CHECKS = {
    "kl_part": c07.check_kl_part,
    "break_even": c07.check_break_even,
    "token_pushes": c07.check_token_pushes,
    "my_marks": c07.check_marks,
}


@pytest.mark.parametrize("name", CHECKS)
def test_solution_is_right_and_stub_is_not_written(name):
    assert CHECKS[name](written(MASTER, bn.solved, **SCOPE)[name]).startswith("right: ")
    assert CHECKS[name](written(MASTER, bn.student, **SCOPE)[name]).startswith("not written yet: ")


def charge(p, r, m, beta, gamma, lam, *, masked=True, steps=reversed):
    """The penalty's part row by row and token by token, as a student would write it, or nearly."""
    out = torch.zeros_like(p)
    for i in range(len(p)):
        running = 0.0
        for t in steps(range(p.shape[1])):
            if masked and not m[i, t]:
                continue
            running = -beta * float(p[i, t] - r[i, t]) + gamma * lam * running
            out[i, t] = running
    return out


def rewarded(p, r, m, b, g, k):
    return -charge(p, r, m, b, g, k)


def leaks(p, r, m, b, g, k):
    return torch.where(m, charge(p, r, m, b, g, k, masked=False), 0.0)


WRONG = [
    ("kl_part", charge, "right"),
    ("kl_part", lambda p, r, m, b, g, k: torch.where(m, -b * (p - r), 0.0), "only the token's own"),
    ("kl_part", lambda *x: charge(*x, steps=iter), "forward in time"),
    ("kl_part", lambda p, r, m, b, g, k: charge(p, r, m, 1.0, g, k), "beta is left out"),
    ("kl_part", lambda p, r, m, b, g, k: charge(p, r, m, b, 1.0, 1.0), "nothing is discounted"),
    ("kl_part", lambda p, r, m, b, g, k: charge(p, r, m, b, 1.0, k), "gamma is left out"),
    ("kl_part", lambda p, r, m, b, g, k: charge(p, r, m, b, g, 1.0), "lambda is left out"),
    ("kl_part", lambda *x: charge(*x, masked=False), "mask is ignored"),
    ("kl_part", leaks, "leak in from behind"),
    ("kl_part", lambda p, r, *x: charge(p, 0 * r, *x), "log-prob alone"),
    ("kl_part", rewarded, "sign is turned round"),
    ("kl_part", lambda p, r, m, b, g, k: -b * (p - r).sum(), "shape"),
    ("kl_part", lambda p, r, m, b, g, k: charge(p, r, m, b, g, k) + 0.1, "not yet: entry"),
    ("kl_part", lambda *x: 1 / 0, "ZeroDivisionError"),
    ("break_even", lambda a, b, c, d: (a - b) / (c - d), "right"),
    ("break_even", lambda a, b, c, d: (a - b) / c, "nats are forgotten"),
    ("break_even", lambda a, b, c, d: a / (c - d), "score is forgotten"),
    ("break_even", lambda a, b, c, d: (c - d) / (a - b), "upside down"),
    ("break_even", lambda a, b, c, d: (a - b) * (c - d), "product"),
    ("break_even", lambda a, b, c, d: (a - b) / (c + d), "added"),
    ("break_even", lambda a, b, c, d: (b - a) / (c - d), "sign is turned round"),
    ("break_even", lambda a, b, c, d: str(a), "return a number"),
    ("token_pushes", lambda g, w, t, lr: (g * (lr * w)[:, None]).mv(t), "right"),
    ("token_pushes", lambda g, w, t, lr: w * (g @ t), "learning rate"),
    ("token_pushes", lambda g, w, t, lr: lr * (g @ t), "weights are left out"),
    ("token_pushes", lambda g, w, t, lr: -lr * w * (g @ t), "descent"),
    (
        "token_pushes",
        lambda g, w, t, lr: lr * w * torch.cosine_similarity(g, t[None]),
        "cosine",
    ),
    ("token_pushes", lambda g, w, t, lr: lr * w.sign() * (g @ t), "sign of the weights"),
    ("token_pushes", lambda g, w, t, lr: (lr * w * (g @ t)).sum(), "shape"),
    ("my_marks", lambda: {"reward model": 3}, "return two things"),
    ("my_marks", lambda: ({"reward model": 3}, 0), "points are asked for"),
    ("my_marks", lambda: ({**c07.FULL, "clip": 2}, 0), "clip: 2 points, of 0 to 1"),
    ("my_marks", lambda: (c07.FULL, -1), "counted from 0"),
    ("my_marks", lambda: ({**c07.FULL, "clip": "2"}, 0), "are numbers"),
    ("break_even", lambda a, b, c, d: (a - b) / (abs(c) + abs(d)), "added"),
]


@pytest.mark.parametrize(("name", "function", "said"), WRONG)
def test_mistakes_are_named(name, function, said):
    found = CHECKS[name](function)
    assert said in found and found.startswith("right: ") == (said == "right")


def test_marks_add_up_and_mistakes_take_off():
    assert c07.check_marks(lambda: (c07.FULL, 0)) == "right: 10 of 10"
    some = {**c07.FULL, "compared": 0, "reward model": 2}
    assert c07.check_marks(lambda: (some, 2)) == "right: 5 of 10; weakest row: compared"
    assert c07.check_marks(lambda: (dict.fromkeys(c07.FULL, 0), 4)).startswith("right: 0 of 10")
