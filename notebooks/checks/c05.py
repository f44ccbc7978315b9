"""Checks of notebook 05: each runs a student's function and returns one sentence.

"not written yet" for None, "right" or the name of the mistake; nothing is raised. The numbers are
random, seeded, away from zero, and differ between rows, so that no two mistakes look alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from checks.said import compare
from minirlhf.advantages import gae, rloo_advantages, whiten


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    rewards, values = (torch.randn(3, 6, generator=g) + 0.5 for _ in range(2))
    lengths = torch.tensor([[6], [4], [3]])
    mask = torch.arange(6) < lengths
    mask[0, 2] = False  # a hole: a token that somebody else wrote
    return rewards, values, mask


def check_backward_gae(student: Callable[..., Any]) -> str:
    """Exercise 1: GAE by one backward loop, with a mask."""
    rewards, values, mask = _batch()
    gamma, lam = 0.9, 0.8
    every = torch.ones_like(mask)

    def wrong(r: Tensor, v: Tensor, m: Tensor, g: float, k: float) -> Tensor:
        return torch.where(mask, gae(r, v, m, gamma=g, lam=k), 0.0)

    padded = torch.where(mask, values, 0.0)
    forward = gae(rewards.flip(1), values.flip(1), mask.flip(1), gamma=gamma, lam=lam).flip(1)
    plus = gae(rewards, -values, mask, gamma=gamma, lam=lam)
    mistakes = {
        "the mask is ignored": gae(rewards, values, every, gamma=gamma, lam=lam),
        "the mask is only used at the end, what lies beyond leaks in": wrong(
            rewards, values, every, gamma, lam
        ),
        "values beyond the mask are zeroed, but holes and padding still discount": wrong(
            torch.where(mask, rewards, 0.0), padded, every, gamma, lam
        ),
        "lambda is left out": wrong(rewards, values, mask, gamma, 1.0),
        "gamma is left out": wrong(rewards, values, mask, 1.0, lam),
        "gamma is missing in the TD error: it is r + gamma V_{t+1} - V": wrong(
            rewards, values, mask, 1.0, gamma * lam
        ),
        "gamma is missing in what is carried back: it is gamma lambda A_{t+1}": wrong(
            rewards, values, mask, gamma, lam / gamma
        ),
        "one step only, nothing is carried back": wrong(rewards, values, mask, gamma, 0.0),
        "the loop runs forward in time": forward,
        "the values have the wrong sign": plus,
        "the value after the token is left out: a TD error needs gamma V_{t+1} too": _unexpecting(
            rewards, values, mask, gamma * lam
        ),
        "these are the returns (advantage plus value)": torch.where(
            mask, gae(rewards, values, mask, gamma=gamma, lam=lam) + values, 0.0
        ),
        **_holes(rewards, values, mask, gamma, lam),
    }
    right = gae(rewards, values, mask, gamma=gamma, lam=lam)
    copies = rewards.clone(), values.clone(), mask.clone()
    return compare(lambda: student(*copies, gamma, lam), right, mistakes)


def _unexpecting(rewards: Tensor, values: Tensor, mask: Tensor, decay: float) -> Tensor:
    """The backward loop over r - V: GAE that expects nothing after a token."""
    nothing = torch.zeros_like(rewards)
    return gae(torch.where(mask, rewards - values, 0.0), nothing, mask, gamma=decay, lam=1.0)


# what becomes, at a token that is not there, of the advantage and of the value behind it
CARRIED = {
    "kept": "",
    "stopped": "the advantage behind a hole is lost: the hole is a stop (multiplied by 0?)",
    "decayed": "a hole discounts once more, as if a token stood there",
}
EXPECTED = {
    "kept": "",
    "lost": "the value behind a hole is lost (multiplied by 0?): the next value is that of the "
    "next token that is there",
    "leaked": "the value of a hole or of padding is expected: the next value is that of the next "
    "token that is there",
}


def _holes(rewards: Tensor, values: Tensor, mask: Tensor, g: float, k: float) -> dict[str, Tensor]:
    """What the backward loop gives if holes are not skipped, by the name of the mistake."""
    found = {}
    for carried, said in CARRIED.items():
        for expected, says in EXPECTED.items():
            running = after = torch.zeros(len(rewards))
            shown = torch.zeros_like(rewards)
            for t in reversed(range(rewards.shape[1])):
                here, behind = mask[:, t], running
                delta = rewards[:, t] + g * after - values[:, t]
                idle = {"kept": behind, "stopped": 0 * behind, "decayed": g * k * behind}
                running = torch.where(here, delta + g * k * behind, idle[carried])
                beyond = {"kept": after, "lost": 0 * after, "leaked": values[:, t]}
                after = torch.where(here, values[:, t], beyond[expected])
                shown[:, t] = running
            name = "; ".join(filter(None, (said, says)))
            if name:
                found[name] = torch.where(mask, shown, 0.0)
            if carried != "stopped":  # a hole may show what was carried over it
                own = "a hole has an advantage: where the mask is False it is 0"
                found["; ".join(filter(None, (name, own)))] = shown
    return found


def check_whiten_masked(student: Callable[..., Any]) -> str:
    """Exercise 2: mean 0 and variance 1 over the masked entries."""
    x, _, mask = _batch()
    x = 3 * x + 2
    inside = x[mask]
    mean, sd = inside.mean(), inside.std()
    n, padded = mask.sum(), torch.where(mask, x, 0.0)
    mistakes = {
        "padding counts in mean and sd": torch.where(mask, (x - x.mean()) / x.std(), 0.0),
        "padding counts as zeros in mean and sd": torch.where(
            mask, (padded - padded.mean()) / padded.std(), 0.0
        ),
        "each answer is whitened for itself, so batch differences are lost": _by_row(x, mask),
        "divided by the variance, not by its root": torch.where(mask, (x - mean) / sd**2, 0.0),
        "the mean is not subtracted": torch.where(mask, x / sd, 0.0),
        "not divided by the sd": torch.where(mask, x - mean, 0.0),
        "divided by n, not by n - 1": torch.where(
            mask, (x - mean) / (sd * ((n - 1) / n).sqrt()), 0.0
        ),
        "entries beyond the mask are not 0": (x - mean) / sd,
    }
    return compare(lambda: student(x.clone(), mask.clone()), whiten(x, mask), mistakes)


def _by_row(x: Tensor, mask: Tensor) -> Tensor:
    rows = [(row - row[m].mean()) / row[m].std() for row, m in zip(x, mask, strict=True)]
    return torch.where(mask, torch.stack(rows), 0.0)


def check_leave_one_out(student: Callable[..., Any]) -> str:
    """Exercise 3: each return against the mean of the others of its group."""
    returns = torch.randn(12, generator=torch.Generator().manual_seed(6)) * 2 + 1
    r = returns.view(3, 4)
    sd = r.std(1, keepdim=True)
    others = (returns.sum() - returns) / (len(returns) - 1)
    mixed = returns.view(4, 3).T
    mistakes = {
        "the answer itself is in its own baseline": (r - r.mean(1, keepdim=True)).flatten(),
        "the whole batch is the group, so prompts are compared": returns - others,
        "divided by the group's sd (that is GRPO)": (
            (r - r.mean(1, keepdim=True)) / (sd + 1e-4)
        ).flatten(),
        "the others are summed, not averaged": (r - (r.sum(1, keepdim=True) - r)).flatten(),
        "the answer itself is counted among the group - 1 others": (
            r - r.sum(1, keepdim=True) / 3
        ).flatten(),
        "divided by group instead of group - 1": (r - (r.sum(1, keepdim=True) - r) / 4).flatten(),
        "the groups are taken apart: neighbours share a prompt": (
            mixed - (mixed.sum(1, keepdim=True) - mixed) / 3
        ).T.flatten(),
    }
    return compare(lambda: student(returns.clone(), 4), rloo_advantages(returns, 4), mistakes)


def check_clipped_surrogate(student: Callable[..., Any]) -> str:
    """Exercise 4: Schulman's clipped surrogate, term by term."""
    ratio = torch.tensor([[0.5, 0.9, 1.1, 1.5], [0.4, 0.95, 1.15, 1.6]])
    a = torch.tensor([[1.5, 0.5, 2.0, 1.0], [-1.5, -0.5, -2.0, -1.0]])
    old = torch.full_like(ratio, -1.3)
    new, clip = old + ratio.log(), 0.2
    bounded = ratio.clamp(1 - clip, 1 + clip)
    right = torch.minimum(ratio * a, bounded * a)
    turned, apart, logs = 1 / ratio, new.exp() - old.exp(), new / old
    mistakes = {
        "the ratio is upside down (old over new)": torch.minimum(
            turned * a, turned.clamp(1 - clip, 1 + clip) * a
        ),
        "the log-ratio is used, exp is missing": torch.minimum(
            ratio.log() * a, ratio.log().clamp(1 - clip, 1 + clip) * a
        ),
        "the book's form: only the upper side is clipped": ratio.clamp(max=1 + clip) * a,
        "only the lower side is clipped": ratio.clamp(min=1 - clip) * a,
        "the log-ratio is clipped at +-clip, not the ratio at 1 +- clip": torch.minimum(
            ratio * a, ratio.log().clamp(-clip, clip).exp() * a
        ),
        "a ratio of log-probs: rho is a ratio of probabilities, exp of the logs' difference": (
            torch.minimum(logs * a, logs.clamp(1 - clip, 1 + clip) * a)
        ),
        "a difference of probabilities, not their ratio": torch.minimum(
            apart * a, apart.clamp(1 - clip, 1 + clip) * a
        ),
        "the clipped term alone, without the minimum": bounded * a,
        "the maximum instead of the minimum": torch.maximum(ratio * a, bounded * a),
        "not clipped at all": ratio * a,
        "this is the loss: the surrogate is to be maximised, the sign is turned round": -right,
    }
    return compare(lambda: student(new.clone(), old.clone(), a.clone(), clip), right, mistakes)
