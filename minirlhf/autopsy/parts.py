"""The advantage split: every advantage of a batch as the sum of its parts, exactly.

GAE is linear in (rewards, values), so an advantage is a part from the reward model, a part from the
KL penalty and a part from the baseline; `decompose_advantages` is that sentence in code. A batch's
advantages are made from its log-probs, scores and values by a *convention*: where the score sits,
which KL estimator is charged, what is whitened. Under a stated convention they are exactly a part
from the reward model, one from the KL penalty, one from the baseline and one from the shift of
whitening, because every step is linear or affine (`split`).

All of it works in float64 on any Rollout, wherever it came from. Left out: which convention made a
batch (reconciliation.py), what another one would have made of it (what_ifs.py), and what the
advantages do to the policy (pushes.py).

Source: Schulman et al. (2015, arXiv 1506.02438, eq. 16).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minirlhf.advantages import (
    gae,
    grpo_advantages,
    rloo_advantages,
    shape_rewards,
    whitening_moments,
)
from minirlhf.autopsy.convention import Convention, laid_out
from minirlhf.rollout import Rollout


@dataclass(frozen=True)
class AdvantageParts:
    """Where each token's advantage comes from; every field is [B, T] in reward sd."""

    reward: Tensor
    """the reward model's score, carried back from the last token"""
    kl: Tensor
    """the KL penalty on this token and on those after it"""
    baseline: Tensor
    """the critic: what was expected, subtracted"""
    shift: Tensor | None = None
    """what whitening's mean shift added (None: not whitened)"""

    @property
    def total(self) -> Tensor:
        """The sum of the parts: the advantage."""
        total = self.reward + self.kl + self.baseline
        return total if self.shift is None else total + self.shift

    def whitened(self, mask: Tensor, *, shift: bool = True) -> "AdvantageParts":
        """The same split of whiten(total), or of rescale(total) with shift=False: every part
        over sd, and -mean / sd as the part that the shift adds."""
        mean, sd = whitening_moments(self.total, mask)
        parts = {name: getattr(self, name) / sd for name in ("reward", "kl", "baseline")}
        return replace(self, **parts, shift=torch.where(mask, -mean / sd if shift else 0.0, 0.0))


def decompose_advantages(
    rollout: Rollout, *, beta: float, gamma: float = 1.0, lam: float = 0.95
) -> AdvantageParts:
    """Split the advantages of a k1-in-reward rollout into reward, KL and baseline parts.

    Exact, not approximate: `.total` equals gae(shape_rewards(...), values) to rounding. `beta` is
    free, so a what-if beta costs three scans and no model. Uses rollout.kl where the rollout
    carries it, else the k1 log-ratio. Raises ValueError for a rollout whose rewards are not its
    score and a multiple of its KL (whitened ones), where no such split exists.
    """
    _demand_additive(rollout)
    mask, zeros = rollout.mask, torch.zeros_like(rollout.logprobs)
    kl = rollout.logprobs - rollout.ref_logprobs if rollout.kl is None else rollout.kl

    def part(scores: Tensor, kl: Tensor, values: Tensor) -> Tensor:
        rewards = shape_rewards(scores, kl, mask, beta=beta)
        return gae(rewards, values, mask, gamma=gamma, lam=lam)

    no_score = torch.zeros_like(rollout.scores)
    return AdvantageParts(
        reward=part(rollout.scores, zeros, zeros),
        kl=part(no_score, kl, zeros),
        baseline=part(no_score, zeros, rollout.values),
    )


def _demand_additive(rollout: Rollout) -> None:
    """rewards = score on the last token - b * kl for some b >= 0, which a regression finds."""
    if rollout.rewards is None or rollout.kl is None:
        return
    score_only = shape_rewards(rollout.scores, rollout.kl, rollout.mask, beta=0.0)
    charged = rollout.rewards - score_only
    b = -(charged * rollout.kl).sum() / rollout.kl.square().sum().clamp(min=1e-12)
    if (charged + b * rollout.kl).abs().max() > 1e-4 * (1 + rollout.scores.abs().max()):
        raise ValueError(
            "these rewards are not score minus beta times KL (a run with whiten_rewards, perhaps): "
            "no split into reward, KL and baseline exists; use a batch of unwhitened rewards"
        )


def group_parts(laid: Rollout, convention: Convention) -> AdvantageParts:
    """The split with a group as baseline: an answer's own score, its own KL, the group's both.

    Raises ValueError for groups that do not divide the batch or whose prompts differ.
    """
    c, group = convention, convention.group
    against = {"rloo": rloo_advantages, "grpo": grpo_advantages}[c.advantage]
    assert laid.kl is not None
    scores, cost = laid.scores * laid.mask.any(1), -c.price * laid.kl.sum(1)
    whole = against(scores + cost, group)
    if laid.prompts.unflatten(0, (-1, group)).diff(dim=1).any():
        raise ValueError(
            f"neighbouring rows answer different prompts, so no group of {group} can be their "
            "baseline: sort the batch by prompt, or keep the critic (advantage gae)"
        )
    if c.advantage == "grpo":
        sd = (scores + cost).view(-1, group).std(1).repeat_interleave(group) + 1e-4
        scores, cost = scores / sd, cost / sd
    parts = (scores, cost, whole - scores - cost)
    return AdvantageParts(*(x[:, None].expand_as(laid.mask) for x in parts))


def whitened(parts: AdvantageParts, mask: Tensor, convention: Convention) -> AdvantageParts:
    """The split after whitening: every part over the sd, and what the shift adds."""
    c, dims = convention, (0, 1) if convention.whiten_scope == "batch" else (1,)
    if c.whiten_advantages == "none":
        return parts
    n, total = mask.sum(dims, keepdim=True), parts.total
    mean = torch.where(mask, total, 0.0).sum(dims, keepdim=True) / n.clamp(min=1)
    squares = torch.where(mask, (total - mean).square(), 0.0).sum(dims, keepdim=True)
    sd = torch.where(n > 1, (squares / (n - c.ddof).clamp(min=1) + 1e-8).sqrt(), 1.0)
    shift = c.keep_mean * mean - mean / sd if c.whiten_advantages == "shift_scale" else 0 * mean
    scaled = (parts.reward / sd, parts.kl / sd, parts.baseline / sd)
    return AdvantageParts(*scaled, shift=torch.where(mask, shift, 0.0))


def split(rollout: Rollout, convention: Convention) -> AdvantageParts:
    """The advantages of a batch in parts, [B, T] float64, exact under the convention.

    Raises ValueError for a batch without values (put zeros there for groups), without a token, or
    whose groups do not answer one prompt.
    """
    c, laid, mask = convention, laid_out(rollout, convention), rollout.mask
    if c.advantage == "gae":
        raw = decompose_advantages(laid, beta=c.price, gamma=c.gamma, lam=c.lam)
    else:
        raw = group_parts(laid, c)
    inside = (torch.where(mask, x, 0.0) for x in (raw.reward, raw.kl, raw.baseline))
    return whitened(AdvantageParts(*inside), mask, c)
