"""Which convention made a batch: the stated one, or another that explains the logged numbers.

`reconcile` comes before everything else. It computes kl, rewards, advantages and returns anew under
the convention that the log states, says how far these are from the logged ones, and tries every
other value of each setting, then of two at a time. beta is not searched but fitted.
Left out: a convention with an operation that is none of ours, which leaves a residual and no name.

Source: none; the settings that are tried are those in which published PPO code differs from ours.
"""

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from minirlhf.advantages import shape_rewards
from minirlhf.autopsy.convention import Convention, charged_kl, demand_fields, laid_out
from minirlhf.autopsy.parts import split, whitened_parts
from minirlhf.rollout import Rollout

LOGGED = ("kl", "rewards", "advantages", "returns")
FIT = "fit"  # a beta found by regression
OPTIONS = {f.name: get_args(f.type) for f in fields(Convention)}  # of settings that are a Literal

# What frameworks do differently, one setting at a time
CHANGES: dict[str, tuple[Any, ...]] = {
    "beta": (0.0, FIT),
    "gamma": (1.0, 0.99),
    "lam": (1.0, 0.95, 0.0),
    "clamp": (None, 10.0),
    "keep_mean": (False, True),
    "ddof": (0, 1),
    "kl_estimator": OPTIONS["kl_estimator"],
    "kl_aggregation": OPTIONS["kl_aggregation"],
    "whiten_advantages": OPTIONS["whiten_advantages"],
    "whiten_rewards": OPTIONS["whiten_rewards"],
    "score_at": OPTIONS["score_at"],
    "whiten_scope": OPTIONS["whiten_scope"],
}


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
    """kl, rewards, advantages and returns [B, T] that the convention gives, in float64, exactly."""
    laid = laid_out(rollout, convention)
    assert laid.kl is not None
    rewards = shape_rewards(laid.scores, laid.kl, laid.mask, beta=convention.price)
    # a return is the value plus the advantage as it was before whitening
    raw = split(rollout, replace(convention, whiten_advantages="none"))
    returns = raw.total + laid.values if convention.advantage == "gae" else rewards
    return {
        "rewards": rewards,
        "advantages": whitened_parts(raw, rollout.mask, convention).total,
        "returns": returns,
        "kl": charged_kl(rollout, convention),
    }


def fitted_beta(rollout: Rollout, convention: Convention) -> float:
    """The price of KL that the logged advantages agree with best, whatever their scale and shift.

    They are a * (A without KL) + b * (A of KL at price 1) + c under whitening of the batch: least
    squares finds a, b and c, and b / a is the price. Exact where the rest of the convention holds.
    """
    demand_fields(rollout, "advantages")
    assert rollout.advantages is not None
    mask = rollout.mask
    plain = replace(convention, whiten_advantages="none", kl_place="reward", beta=1.0)
    parts = split(rollout, plain)
    without_kl = (parts.reward + parts.baseline)[mask]
    of_kl = parts.kl[mask]
    x = torch.stack([without_kl, of_kl, torch.ones_like(of_kl)], 1)
    y = rollout.advantages.double()[mask]
    a, b, _ = torch.linalg.lstsq(x, y).solution.tolist()
    # where b / a is not positive, or is lost in rounding, KL is not charged at all
    if b * a > 1e-6 * a * a:
        return float(f"{b / a:.6g}")
    return 0.0


def reconcile(
    rollout: Rollout, stated: Convention, *, tolerance: float = 1e-5, depth: int = 2
) -> list[Candidate]:
    """The stated convention and others, best first; several that explain the log are a tie.

    Every single setting of CHANGES is tried, and combinations of up to `depth` as long as nothing
    explains the log. Order: those that explain it, with the fewest changes first; then by the
    largest residual. `tolerance` is relative to the largest number of a field (or to 1; a log in
    bfloat16 needs some 2e-2). Raises ValueError where nothing was logged, and as `split` does.
    """
    present = rollout.tensors()
    logged = {name: present[name].double() for name in LOGGED if name in present}
    if not logged:
        demand_fields(rollout, *LOGGED)  # raises: all of them are missing
    largest = {name: float(x.abs().max()) for name, x in logged.items()}
    settings = [(name, value) for name, values in CHANGES.items() for value in values]
    found: list[Candidate] = []
    for size in range(depth + 1):
        for changes in map(dict, itertools.combinations(settings, size)):
            convention = _changed(rollout, stated, changes)
            # two values of one setting (gamma 1 and 0.99) leave the second, which is known already
            if convention is None or any(convention == other.convention for other in found):
                continue
            residuals = _residuals(rollout, logged, convention)
            explains = all(gap <= tolerance * (1 + largest[k]) for k, gap in residuals.items())
            changed = {name: getattr(convention, name) for name in changes}
            found.append(Candidate(convention, changed, residuals, explains))
        # single settings are tried even where the stated convention explains the log: for a tie
        if size > 0 and any(candidate.explains for candidate in found):
            break

    def rank(candidate: Candidate) -> tuple[int, float]:
        many = len(candidate.changes) if candidate.explains else depth + 1
        return many, max(candidate.residuals.values())

    return sorted(found, key=rank)


def _residuals(
    rollout: Rollout, logged: dict[str, Tensor], convention: Convention
) -> dict[str, float]:
    """Logged field -> the largest difference on a token to what the convention gives."""
    made = recomputed(rollout, convention)
    return {k: float(((made[k] - x) * rollout.mask).abs().max()) for k, x in logged.items()}


def _changed(rollout: Rollout, stated: Convention, changes: dict[str, Any]) -> Convention | None:
    """The stated convention with other settings; None where one of them makes no difference."""
    given = {name: value for name, value in changes.items() if value != FIT}
    convention = replace(stated, **given)
    if "beta" in changes:
        beta = convention.beta
        if changes["beta"] == FIT:
            beta = 0.0 if rollout.advantages is None else fitted_beta(rollout, convention)
        convention = replace(convention, beta=beta, kl_place="reward")

    idle = set()
    if convention.advantage != "gae":
        idle |= {"gamma", "lam"}
    if convention.whiten_advantages == "none":
        idle |= {"whiten_scope", "ddof"}
    if convention.whiten_advantages != "shift_scale":
        idle.add("keep_mean")
    if abs(convention.price - stated.price) < 1e-6:
        idle.add("beta")
    for name in changes:
        if name != "beta" and getattr(convention, name) == getattr(stated, name):
            idle.add(name)
    return None if idle & changes.keys() else convention
