"""The checks of notebook 06 accept its solutions and name the planted mistakes."""

import build_notebooks as bn
import numpy as np
import pytest
from checks import c06
from exercises import written

MASTER = "06_the_drift"
SCOPE = {"np": np}
CHECKS = {
    "within_gain": c06.check_within_gain,
    "moved_share": c06.check_moved_share,
    "cusum": c06.check_cusum,
}


@pytest.mark.parametrize("name", CHECKS)
def test_solution_is_right_and_stub_is_not_written(name):
    assert CHECKS[name](written(MASTER, bn.solved, **SCOPE)[name]).startswith("right: ")
    assert CHECKS[name](written(MASTER, bn.student, **SCOPE)[name]).startswith("not written yet: ")


def binned(weigh, *, union=False):
    """Exercise 1 as a student might write it; `weigh` (gains, old, new counts) -> number."""

    def gain(n, r, m, s, width):
        a, b = n // width, m // width
        shared = sorted(set(a) | set(b)) if union else sorted(set(a) & set(b))

        def mean(x, here):
            return x[here].mean() if here.any() else 0.0

        gains = np.array([mean(s, b == i) - mean(r, a == i) for i in shared])
        old, new = (np.array([(x == i).sum() for i in shared]) for x in (a, b))
        return weigh(gains, old, new)

    return gain


def pooled(g, old, new):
    return np.average(g, weights=old + new)


WITHIN = {
    "whole gain": lambda n, r, m, s, width: s.mean() - r.mean(),
    "counts the same": binned(lambda g, old, new: g.mean()),
    "only the answers before": binned(lambda g, old, new: np.average(g, weights=old)),
    "only the answers after": binned(lambda g, old, new: np.average(g, weights=new)),
    "leaves empty": binned(pooled, union=True),
    "dropped out": binned(lambda g, old, new: (g * (old + new)).sum() / 15),
    "summed": binned(lambda g, old, new: g.sum()),
    "turned round": binned(lambda g, old, new: -pooled(g, old, new)),
    "the share": lambda n, r, m, s, w: binned(pooled)(n, r, m, s, w) / (s.mean() - r.mean()),
    "due to length": lambda n, r, m, s, w: s.mean() - r.mean() - binned(pooled)(n, r, m, s, w),
}


def odds(p):
    return p / (1 - p)


def share(o):
    return o / (1 + o)


MOVED = {
    "subtract where it started": lambda p, k: share(odds(p) * np.exp(k)),
    "the odds that e^k multiplies": lambda p, k: p * np.exp(k) - p,
    "not the share": lambda p, k: odds(p) * np.exp(k) - odds(p),
    "its logarithm|their logarithm": lambda p, k: share(odds(p) + k) - p,
    "not by e^k": lambda p, k: share(odds(p) * k) - p,
    "odds are divided": lambda p, k: share(odds(p) * np.exp(-k)) - p,
    "log-odds first": lambda p, k: 1 / (1 + np.exp(-(p + k))) - p,
    "minus the odds": lambda p, k: share(odds(p) * np.exp(k)) - odds(p),
    "turned round": lambda p, k: p - share(odds(p) * np.exp(k)),
}


def summed(step):
    """Exercise 3 with another recursion; `step` (sum so far, today, slack) -> sum."""

    def chart(z, slack):
        total, out = 0.0, []
        for today in z:
            total = step(total, today, slack)
            out.append(total)
        return np.array(out)

    return chart


right_chart = summed(lambda s, z, k: max(0.0, s + z - k))
CUSUM = {
    "never starts again": lambda z, k: np.cumsum(z - k),
    "slack is forgotten": summed(lambda s, z, k: max(0.0, s + z)),
    "slack is added": summed(lambda s, z, k: max(0.0, s + z + k)),
    "no sum is kept": lambda z, k: np.maximum(0, z - k),
    "before the day is added": summed(lambda s, z, k: max(0.0, s) + z - k),
    "both directions": summed(lambda s, z, k: max(0.0, s + abs(z) - k)),
    "shorter answers": summed(lambda s, z, k: max(0.0, s - z - k)),
    "a day late": lambda z, k: np.r_[0, right_chart(z, k)][:-1],
    "pull the sum down": summed(lambda s, z, k: max(0.0, s + max(z, 0) - k)),
}
PLANTED = [
    *((c06.check_within_gain, word, wrong) for word, wrong in WITHIN.items()),
    *((c06.check_moved_share, word, wrong) for word, wrong in MOVED.items()),
    *((c06.check_cusum, word, wrong) for word, wrong in CUSUM.items()),
]


@pytest.mark.parametrize(
    ("check", "word", "wrong"), PLANTED, ids=[f"{c.__name__[6:]}: {w}" for c, w, _ in PLANTED]
)
def test_planted_mistakes_are_named(check, word, wrong):
    said = check(wrong)
    assert any(w in said for w in word.split("|")) and "right: " not in said, said


@pytest.mark.parametrize("check", CHECKS.values())
def test_what_is_no_answer_at_all_is_a_sentence(check):
    def stops(*args):
        raise KeyError("bins")

    assert "stopped with KeyError" in check(stops)
    assert "the shape is" in check(lambda *args: np.zeros((2, 3)))
    assert "NaN" in check(lambda first, *args: np.nan if len(args) > 2 else first * np.nan)
    assert check(lambda first, *args: 7.7 if len(args) > 2 else first * 0 + 7.7).startswith(
        "not yet: "
    )
    assert "stopped with" in check(lambda *args: "a word")
