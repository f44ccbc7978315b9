"""Checks of notebook 03: each takes a student's function and returns one sentence.

The cases stay away from zero and from symmetry, so that every mistake below gives another number
than the right answer; the tests plant them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def _verdict(
    function: Callable[..., Any], given: tuple[Any, ...], right: Any, mistakes: Mapping[str, Any]
) -> str:
    """Compare what a function makes of `given` with the right answer and with known mistakes."""
    right = np.asarray(right, dtype=float)
    try:
        found = function(*given)
        if found is None:
            return "not written yet: the function returns None"
        got = np.asarray(found.detach() if isinstance(found, torch.Tensor) else found, dtype=float)
    except Exception as error:
        return f"it stops with an error: {type(error).__name__}: {error}"
    if got.shape != right.shape:
        want = f"shape {list(right.shape)}" if right.ndim else "one number"
        return f"the shape is wrong: it returns {list(got.shape)}, asked is {want}"
    if np.allclose(got, right, atol=1e-5):
        return "right: the same as the library, to five digits"
    for sentence, wrong in mistakes.items():
        if np.allclose(got, np.asarray(wrong, dtype=float), atol=1e-5):
            return sentence
    if not np.isfinite(got).all():
        return "not a number: somewhere it divides by zero or takes the log of zero"
    return f"not yet: on the test case it gives {np.round(got, 4)}, right is {np.round(right, 4)}"


def check_longer_wins(function: Callable[..., Any]) -> str:
    """longer_wins(length_chosen [N], length_rejected [N]) -> share in [0, 1]."""
    chosen = np.array([12, 9, 20, 7, 15, 8, 30, 11, 6, 14])
    rejected = np.array([9, 9, 12, 10, 11, 8, 12, 7, 9, 5])  # 6 longer, 2 shorter, 2 ties
    longer = chosen > rejected
    return _verdict(
        function,
        (chosen, rejected),
        6 / 8,
        {
            "turned round: that is how often the shorter answer won": 2 / 8,
            "ties are counted as losses: leave pairs of equal length out": longer.mean(),
            "ties are counted as wins: leave pairs of equal length out": 8 / 10,
            "ties are counted as half: leave pairs of equal length out": 7 / 10,
            "a count, not a share: divide by the pairs of different lengths": longer.sum(),
            "in percent: return a share between 0 and 1": 75.0,
            "wins over losses: divide by all pairs of different lengths": 3.0,
            "that is the mean difference in length, not how often the longer answer won": (
                (chosen - rejected).mean()
            ),
        },
    )


def check_loss_gradient(function: Callable[..., Any]) -> str:
    """loss_gradient(chosen [B], rejected [B]) -> d(mean loss)/d(chosen) [B], nats per point."""
    chosen, rejected = torch.tensor([1.5, -0.4, 0.3, 2.0]), torch.tensor([0.2, 0.8, 0.9, -1.0])
    p, count = torch.sigmoid(chosen - rejected), len(chosen)
    right = -(1 - p) / count
    return _verdict(
        function,
        (chosen, rejected),
        right,
        {
            "the sign is turned round: the loss falls when the winner's score rises": -right,
            "the mean is forgotten: divide by the number of pairs": right * count,
            "the sign is turned round and the mean is forgotten": -right * count,
            "p where 1 - p belongs: a pair that is ranked well must teach little": -p / count,
            "that is the loss of each pair, not its slope": -p.log(),
            "the slope of p, not of log p: divide by p": -p * (1 - p) / count,
        },
    )


def check_ceiling(function: Callable[..., Any]) -> str:
    """ceiling(p_label [N]) -> expected accuracy of the best ranking."""
    p = np.array([0.9, 0.35, 0.6, 0.2, 0.75, 0.55])
    best = np.maximum(p, 1 - p)
    return _verdict(
        function,
        (p,),
        best.mean(),
        {
            "that is how likely the labels are, not the best ranking of them: a pair whose label "
            "is unlikely is one that the best ranking gets wrong": p.mean(),
            "the worst ranking: take the larger of p and 1 - p": np.minimum(p, 1 - p).mean(),
            "that is the best pair, not the mean over pairs": best.max(),
            "that counts the pairs where the label is the likelier one; noise on the others, and "
            "luck on these, are left out": (p > 0.5).mean(),
            "a sum, not a mean: divide by the number of pairs": best.sum(),
            "in percent: return a share between 0 and 1": 100 * best.mean(),
        },
    )


def check_final_share(function: Callable[..., Any]) -> str:
    """final_share(p0, gap, beta) -> share of the preferred answer at the optimum."""
    p0, gap, beta = 0.1, 0.3, 0.2
    odds = p0 / (1 - p0)

    def share(x: float) -> float:
        return x / (1 + x)

    return _verdict(
        function,
        (p0, gap, beta),
        share(odds * np.exp(gap / beta)),
        {
            "the sign is turned round: a preferred answer must gain": share(
                odds * np.exp(-gap / beta)
            ),
            "those are odds, not a probability: divide by 1 + odds": odds * np.exp(gap / beta),
            "the probability is multiplied, not the odds": p0 * np.exp(gap / beta),
            "beta multiplies the gap: it must divide it, a weak penalty lets more happen": share(
                odds * np.exp(gap * beta)
            ),
            "beta is left out: the gap counts in units of beta": share(odds * np.exp(gap)),
            "the odds of the reference are left out: it starts from p0": share(np.exp(gap / beta)),
            "p0 is not turned into odds: p0 / (1 - p0)": share(p0 * np.exp(gap / beta)),
        },
    )
