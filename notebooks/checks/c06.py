"""Checks of notebook 06: each runs a student's function and returns one sentence.

"not written yet: ..." for None, "right: ..." or the name of the mistake; nothing is raised. The
numbers are away from zero and differ, so that no two mistakes look alike.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minirlhf.audit import nrg


def _compare(mine: Callable[[], Any], right: Any, praise: str, mistakes: Mapping[str, Any]) -> str:
    """The sentence for what `mine` returns, given the right answer and those of mistakes."""
    try:
        found = mine()
        if found is None or (isinstance(found, list) and not found):
            return "not written yet: the function returns None"
        found = np.asarray(found, dtype=float)
    except Exception as error:
        return f"your function stopped with {type(error).__name__}: {error}"
    right = np.asarray(right, dtype=float)
    if found.shape != right.shape:
        return f"the shape is {list(found.shape)}, expected {list(right.shape)}"
    if not np.isfinite(found).all():
        return "there are NaN or infinite entries: is a mean taken of nothing, or divided by 0?"
    if np.allclose(found, right, atol=1e-6):
        return f"right: {praise}"
    for name, wrong in {**mistakes, "the sign is turned round: look again": -right}.items():
        if np.allclose(found, wrong, atol=1e-6):
            return name
    where = int(np.abs(found - right).argmax())
    got, want = found.flat[where], right.flat[where]
    return f"not yet: entry {where} is {got:.3f}, expected {want:.3f}"


def check_within_gain(student: Callable[..., Any]) -> str:
    """Exercise 1: the reward gain among answers of equal length."""
    before = np.array([3, 4, 6, 7, 7, 12, 14, 26]), np.array([0.1, 0.3, 0.2, 0.4, 0.6, 0.9, 0.7, 5])
    after = np.array([4, 8, 9, 13, 13, 14, 31]), np.array([0.7, 0.5, 0.8, 1.3, 1.9, 1.5, 3.0])
    width = 5

    def gains(both: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        bins = before[0] // width, after[0] // width
        shared = np.intersect1d(*bins) if both else np.union1d(*bins)
        counts = np.array([[(b == i).sum() for i in shared] for b in bins])
        sums = np.array(
            [
                [s[b == i].sum() for i in shared]
                for b, s in zip(bins, (before[1], after[1]), strict=True)
            ]
        )
        means = sums / np.maximum(counts, 1)
        return means[1] - means[0], counts[0], counts[1]

    gain, old, new = gains()
    everything, *counts = gains(both=False)
    total = after[1].mean() - before[1].mean()
    right = nrg(*({"length_tokens": n, "r": r} for n, r in (before, after)), score="r", width=width)
    mistakes = {
        "that is the whole gain: answers of different length are compared": total,
        "every bin counts the same: weight it by its answers": gain.mean(),
        "only the answers before weigh: a bin counts by its answers on both sides": (
            np.average(gain, weights=old)
        ),
        "only the answers after weigh: a bin counts by its answers on both sides": (
            np.average(gain, weights=new)
        ),
        "bins that one side leaves empty are in it: they cannot be compared": (
            np.average(everything, weights=counts[0] + counts[1])
        ),
        "the weights still count the answers of bins that dropped out": (
            (gain * (old + new)).sum() / (len(before[0]) + len(after[0]))
        ),
        "that is the share: return the gain itself": right.within / total,
        "that is the part due to length: return what is left at equal length": total - right.within,
        "the bins' gains are summed: they are to be averaged": gain.sum(),
    }
    arrays = (x.copy() for x in (*before, *after))
    praise = "what the policy gains at equal length"
    return _compare(lambda: student(*arrays, width), right.within, praise, mistakes)


def check_moved_share(student: Callable[..., Any]) -> str:
    """Exercise 2: how far the tilt moves a prompt."""
    p0, k = np.array([0.02, 0.3, 0.6, 0.9]), 1.7
    odds = p0 / (1 - p0)
    after = odds * np.exp(k) / (1 + odds * np.exp(k))
    less = odds * np.exp(-k) / (1 + odds * np.exp(-k))
    mistakes = {
        "that is the share after it: subtract where it started": after,
        "probabilities are multiplied: it is the odds that e^k multiplies": p0 * np.exp(k) - p0,
        "those are the odds, not the share: p = odds / (1 + odds)": odds * np.exp(k) - odds,
        "the share minus the odds before it: subtract p0": after - odds,
        "k is added to the odds: it is added to their logarithm": (odds + k) / (1 + odds + k) - p0,
        "the odds are multiplied by k, not by e^k": odds * k / (1 + odds * k) - p0,
        "the odds are divided: a reward for the long answer multiplies them": less - p0,
        "the sigmoid is taken of p0 + k: p0 is a share, take its log-odds first": (
            1 / (1 + np.exp(-p0 - k)) - p0
        ),
    }
    praise = "little at both ends, most in between"
    return _compare(lambda: student(p0.copy(), k), after - p0, praise, mistakes)


def check_cusum(student: Callable[..., Any]) -> str:
    """Exercise 3: the one-sided CUSUM."""
    z = np.array([0.9, -2.0, 1.4, 0.8, -0.3, 2.2, 0.1])
    slack = 0.5

    def chart(z: np.ndarray, slack: float, *, floor: float = 0.0, late: bool = False) -> np.ndarray:
        total, out = 0.0, []
        for x in z:
            total = max(floor, total) + x - slack if late else max(floor, total + x - slack)
            out.append(total)
        return np.array(out)

    right = chart(z, slack)
    mistakes = {
        "it never starts again: good days must not be saved up, take max(0, ...)": (
            chart(z, slack, floor=-np.inf)
        ),
        "the slack is forgotten: chance alone would climb": chart(z, 0.0),
        "the slack is added: it is forgiven, so it is subtracted": chart(z, -slack),
        "no sum is kept: each day stands alone": np.maximum(0, z - slack),
        "the maximum comes before the day is added: today's sum may still be negative": (
            chart(z, slack, late=True)
        ),
        "both directions are added up: only an excess counts": chart(np.abs(z), slack),
        "the sign is turned round: this one watches for shorter answers": chart(-z, slack),
        "the chart starts a day late: day 1 counts": np.append(0.0, right[:-1]),
        "days below the mean are dropped: they pull the sum down": chart(np.maximum(z, 0), slack),
        "only the last day came back: return the sum of every day": right[-1:].repeat(len(z)),
    }
    praise = "good days are forgotten, bad days add up"
    return _compare(lambda: student(z.copy(), slack), right, praise, mistakes)
