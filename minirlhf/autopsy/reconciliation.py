"""Which convention made a batch: the stated one, or another that explains the logged numbers.

`reconcile` comes before everything else: it says how far the logged numbers are from those that
the stated convention gives, and searches for the convention that gives them.
"""

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from minirlhf.advantages import shape_rewards
from minirlhf.autopsy.convention import Convention, charged_kl, demand, laid_out
from minirlhf.autopsy.parts import split, whitened
from minirlhf.rollout import Rollout

LOGGED = ("kl", "rewards", "advantages", "returns")

FIT = "fit"  # a beta found by regression

# What frameworks do differently, one setting at a time
CHANGES = {"beta": (0.0, FIT), "gamma": (1.0, 0.99), "lam": (1.0, 0.95, 0.0), "clamp": (None, 10.0)}

CHANGES |= {"keep_mean": (False, True), "ddof": (0, 1)}

SWITCHES = ("kl_estimator", "kl_aggregation", "score_at", "whiten_scope")

SWITCHES += ("whiten_rewards", "whiten_advantages")

CHANGES |= {f.name: get_args(f.type) for f in fields(Convention) if f.name in SWITCHES}


@dataclass(frozen=True)
class Candidate:
    """A convention, and how far what it gives is from what was logged."""

    convention: Convention
    changes: dict[str, Any]
    """settings that differ from the stated convention (none: the stated one)"""
    residuals: dict[str, float]
    """logged field -> largest absolute difference on a token"""
    explains: bool
    """every residual is within the tolerance"""


def recomputed(rollout: Rollout, convention: Convention) -> dict[str, Tensor]:
    """kl, rewards, advantages and returns [B, T] that the convention gives, in float64."""
    c, laid = convention, laid_out(rollout, convention)
    assert laid.kl is not None
    raw = split(rollout, replace(c, whiten_advantages="none"))
    rewards = shape_rewards(laid.scores, laid.kl, laid.mask, beta=c.price)
    returns = raw.total + laid.values if c.advantage == "gae" else rewards
    advantages = whitened(raw, rollout.mask, c).total
    made = {"rewards": rewards, "advantages": advantages, "returns": returns}
    return made | {"kl": charged_kl(rollout, c)}


def fitted_beta(rollout: Rollout, convention: Convention) -> float:
    """The price of KL that the logged advantages agree with best, whatever their scale and shift.

    They are a * (A without KL) + b * (A of KL at price 1) + c under whitening of the batch.
    """
    demand(rollout, "advantages")
    assert rollout.advantages is not None
    plain = replace(convention, whiten_advantages="none", kl_place="reward", beta=1.0)
    parts, mask = split(rollout, plain), rollout.mask
    columns = (parts.reward + parts.baseline, parts.kl, torch.ones_like(parts.kl))
    x = torch.stack([c[mask] for c in columns], 1)
    a, b, _ = torch.linalg.lstsq(x, rollout.advantages.double()[mask]).solution.tolist()
    return float(f"{b / a:.6g}") if b * a > 1e-6 * a * a else 0.0


def reconcile(
    rollout: Rollout, stated: Convention, *, tolerance: float = 1e-5, depth: int = 2
) -> list[Candidate]:
    """The stated convention and others, best first; several that explain the log are a tie.

    Every single setting of CHANGES is tried, and combinations of up to `depth` as long as nothing
    explains the log. Order: those that explain it, with the fewest changes first; then by the
    largest residual. `tolerance` is relative to the largest number of a field (or to 1; a log in
    bfloat16 needs some 2e-2). Raises ValueError where nothing was logged, and as `split` does.
    """
    logged = {k: x.double() for k in LOGGED if (x := getattr(rollout, k)) is not None}
    demand(rollout, *(() if logged else LOGGED))
    settings = [(name, value) for name, values in CHANGES.items() for value in values]
    found: list[Candidate] = []
    for size in range(depth + 1):
        for changes in map(dict, itertools.combinations(settings, size)):
            c = _changed(rollout, stated, changes)
            if c is None or any(c == other.convention for other in found):
                continue
            made = recomputed(rollout, c)
            gaps = {k: float(((made[k] - x) * rollout.mask).abs().max()) for k, x in logged.items()}
            fits = all(g <= tolerance * (1 + logged[k].abs().max()) for k, g in gaps.items())
            found.append(Candidate(c, {k: getattr(c, k) for k in changes}, gaps, fits))
        if size and any(candidate.explains for candidate in found):
            break
    found.sort(
        key=lambda c: (len(c.changes) if c.explains else depth + 1, max(c.residuals.values()))
    )
    return found


def _changed(rollout: Rollout, stated: Convention, changes: dict[str, Any]) -> Convention | None:
    """The stated convention with other settings; None where one of them makes no difference."""
    c = replace(stated, **{k: v for k, v in changes.items() if v != FIT})
    if "beta" in changes:
        beta = c.beta
        if changes["beta"] == FIT:
            beta = 0.0 if rollout.advantages is None else fitted_beta(rollout, c)
        c = replace(c, beta=beta, kl_place="reward")
    idle = {"gamma", "lam"} if c.advantage != "gae" else set()
    idle |= {"whiten_scope", "ddof"} if c.whiten_advantages == "none" else set()
    idle |= {"keep_mean"} if c.whiten_advantages != "shift_scale" else set()
    idle |= {k for k in changes.keys() - {"beta"} if getattr(c, k) == getattr(stated, k)}
    idle |= {"beta"} if abs(c.price - stated.price) < 1e-6 else set()
    return None if idle & changes.keys() else c
