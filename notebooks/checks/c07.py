"""Checks of notebook 07: each runs a student's function and returns one sentence.

"not written yet" for None, "right" or the name of the mistake; nothing is raised. The numbers are
random, seeded, away from zero, and differ between rows, so that no two mistakes look alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from checks.said import compare
from minirlhf.advantages import gae

FULL = {"reward model": 3, "advantage": 2, "compared": 2, "brief": 1, "clip": 1, "proxy": 1}


def check_kl_part(student: Callable[..., Any]) -> str:
    """Exercise 1: the penalty's part of the advantage under GAE."""
    g = torch.Generator().manual_seed(7)
    logprobs, ref = (-torch.rand(3, 6, generator=g) - 0.3 for _ in range(2))
    mask = torch.arange(6) < torch.tensor([[6], [4], [2]])
    beta, gamma, lam = 0.4, 0.9, 0.7

    def part(ratio: Tensor, beta: float, decay: float, kept: Tensor = mask) -> Tensor:
        paid = torch.where(kept, -beta * ratio, 0.0)
        return torch.where(mask, gae(paid, 0 * paid, kept, gamma=1.0, lam=decay), 0.0)

    ratio, every = logprobs - ref, torch.ones_like(mask)
    own = torch.where(mask, -beta * ratio, 0.0)
    before = torch.where(mask, own.flip(1) * 0, 0.0)
    for t in range(6):
        before[:, t] = own[:, t] + (gamma * lam * before[:, t - 1] if t else 0.0)
    mistakes = {
        "only the token's own log-ratio is charged, nothing that follows": own,
        "the charge runs forward in time": torch.where(mask, before, 0.0),
        "beta is left out": part(ratio, 1.0, gamma * lam),
        "nothing is discounted": part(ratio, beta, 1.0),
        "gamma is left out": part(ratio, beta, lam),
        "lambda is left out": part(ratio, beta, gamma),
        "the mask is ignored": gae(-beta * ratio, 0 * ratio, every, gamma=gamma, lam=lam),
        "tokens that do not exist leak in from behind": part(ratio, beta, gamma * lam, every),
        "the log-prob alone is charged, not its ratio to the reference": part(
            logprobs, beta, gamma * lam
        ),
    }
    given = logprobs.clone(), ref.clone(), mask.clone()
    right = part(ratio, beta, gamma * lam)
    return compare(lambda: student(*given, beta, gamma, lam), right, mistakes)


def check_break_even(student: Callable[..., Any]) -> str:
    """Exercise 2: the price at which two answers net the same."""
    sv, sc, kv, kc = 1.7, 0.4, 5.0, 1.5
    right = torch.tensor((sv - sc) / (kv - kc))
    mistakes = {
        "the concise answer's nats are forgotten": torch.tensor((sv - sc) / kv),
        "the concise answer's score is forgotten": torch.tensor(sv / (kv - kc)),
        "the fraction is upside down: that is nats per sd": 1 / right,
        "a product, where a price is asked for": torch.tensor((sv - sc) * (kv - kc)),
        "the nats are added, not compared": torch.tensor((sv - sc) / (kv + kc)),
    }
    return compare(lambda: student(sv, sc, kv, kc), right, mistakes)


def check_token_pushes(student: Callable[..., Any]) -> str:
    """Exercise 3: what each token of the batch adds to the change of an answer's log-prob."""
    g = torch.Generator().manual_seed(8)
    gradients, target = torch.randn(5, 7, generator=g), torch.randn(7, generator=g)
    weights, lr = torch.tensor([0.5, -1.5, 2.0, 1.0, -0.7]), 0.3
    inner = gradients @ target
    cosine = inner / (gradients.norm(dim=1) * target.norm())
    mistakes = {
        "the learning rate is left out": weights * inner,
        "the weights are left out": lr * inner,
        "descent goes against the loss's gradient, and the loss has a minus already": (
            -lr * weights * inner
        ),
        "a cosine: lengths of gradients count": lr * weights * cosine,
        "only the sign of the weights is used": lr * weights.sign() * inner,
    }
    copies = gradients.clone(), weights.clone(), target.clone()
    return compare(lambda: student(*copies, lr), lr * weights * inner, mistakes)


def check_marks(student: Callable[[], Any]) -> str:
    """Section 9: points against the table."""
    try:
        found = student()
    except Exception as error:
        return f"your function stopped with {type(error).__name__}: {error}"
    if found is None:
        return "not written yet: the function returns None"
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], dict)):
        return "return two things: your points by row, and how many mistakes to take off"
    points, mistakes = found
    if points.keys() != FULL.keys():
        return f"points are asked for: {', '.join(FULL)}"
    if not all(isinstance(x, int | float) for x in (*points.values(), mistakes)):
        return "points and mistakes are numbers"
    for name, given in points.items():
        if not 0 <= given <= FULL[name]:
            return f"{name}: {given} points, of 0 to {FULL[name]}"
    if mistakes < 0:
        return "mistakes are counted from 0"
    total = max(sum(points.values()) - mistakes, 0)
    least = min(FULL, key=lambda name: points[name] / FULL[name])
    advice = "" if total == 10 else f"; weakest row: {least}"
    return f"right: {total} of 10{advice}"
