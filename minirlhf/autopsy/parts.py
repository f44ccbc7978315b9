"""The advantage split: every advantage of a batch as the sum of its parts, exactly.

GAE is linear in (rewards, values), so an advantage is a part from the reward model, a part from the
KL penalty and a part from the baseline; `decompose_advantages` is that sentence in code. Whitening
is affine, so it scales the three and adds a fourth, its shift; `split` does both, for any
convention, in float64.
Left out: which convention made a batch (reconciliation.py), what another one would have made of it
(what_ifs.py), and what the advantages do to the policy (pushes.py).

Sources: Schulman et al. (2015, arXiv 1506.02438, eq. 16) for GAE; Ahmadian et al. (2024, arXiv
2402.14740) and Shao et al. (2024, arXiv 2402.03300) for a group as the baseline.
"""

from dataclasses import dataclass

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
    """Where each token's advantage comes from; every field is [B, T].

    In reward sd before whitening, in units of their sd after it.
    """

    reward: Tensor
    """the reward model's score, carried back from the last token"""
    kl: Tensor
    """the KL penalty on this token and on those after it"""
    baseline: Tensor
    """what was expected, subtracted: by the critic, or by the other answers of the group"""
    shift: Tensor | None = None
    """what whitening's mean shift added (None: not whitened)"""

    @property
    def total(self) -> Tensor:
        """The sum of the parts: the advantage."""
        total = self.reward + self.kl + self.baseline
        return total if self.shift is None else total + self.shift

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are present, by name."""
        return {name: part for name, part in vars(self).items() if part is not None}

    def whitened(self, mask: Tensor, *, shift: bool = True) -> "AdvantageParts":
        """The same split of whiten(total), or of rescale(total) with shift=False: every part
        over sd, and -mean / sd as the part that the shift adds."""
        mean, sd = whitening_moments(self.total, mask)
        moved = -mean / sd if shift else torch.zeros_like(mean)
        return self._affine(sd, torch.where(mask, moved, 0.0))

    def _affine(self, sd: Tensor, shift: Tensor) -> "AdvantageParts":
        """total / sd + shift, in parts."""
        return AdvantageParts(self.reward / sd, self.kl / sd, self.baseline / sd, shift)


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
    kl = rollout.logprobs - rollout.ref_logprobs if rollout.kl is None else rollout.kl
    zeros = torch.zeros_like(rollout.logprobs)
    no_score = torch.zeros_like(rollout.scores)

    def part(scores: Tensor, kl: Tensor, values: Tensor) -> Tensor:
        rewards = shape_rewards(scores, kl, rollout.mask, beta=beta)
        return gae(rewards, values, rollout.mask, gamma=gamma, lam=lam)

    # GAE of a sum is the sum of GAEs: each time one of the three is there and the others are 0
    return AdvantageParts(
        reward=part(rollout.scores, zeros, zeros),
        kl=part(no_score, kl, zeros),
        baseline=part(no_score, zeros, rollout.values),
    )


def split(rollout: Rollout, convention: Convention) -> AdvantageParts:
    """The advantages of a batch in parts, [B, T] float64, exact under the convention.

    Raises ValueError for a batch without values (put zeros there for groups), without a token, or
    whose groups do not answer one prompt.
    """
    laid = laid_out(rollout, convention)
    if convention.advantage == "gae":
        raw = decompose_advantages(
            laid, beta=convention.price, gamma=convention.gamma, lam=convention.lam
        )
    else:
        raw = group_parts(laid, convention)
    # the slot after EOS, where a convention has one, takes part in the credit but is no token
    mask = rollout.mask
    inside = AdvantageParts(
        reward=torch.where(mask, raw.reward, 0.0),
        kl=torch.where(mask, raw.kl, 0.0),
        baseline=torch.where(mask, raw.baseline, 0.0),
    )
    return whitened_parts(inside, mask, convention)


def _demand_additive(rollout: Rollout) -> None:
    """Raises ValueError unless rewards = score on the last token - b * kl for a b (regressed)."""
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

    `laid` is what laid_out made of the batch. Exact, and not whitened. Raises ValueError for
    groups that do not divide the batch or whose prompts differ.
    """
    group = convention.group
    assert laid.kl is not None
    scores = laid.scores * laid.mask.any(1)  # an empty row has no token for its score to sit on
    cost = -convention.price * laid.kl.sum(1)
    net = scores + cost
    against_group = rloo_advantages if convention.advantage == "rloo" else grpo_advantages
    whole = against_group(net, group)
    if laid.prompts.unflatten(0, (-1, group)).diff(dim=1).any():
        raise ValueError(
            f"neighbouring rows answer different prompts, so no group of {group} can be their "
            "baseline: sort the batch by prompt, or keep the critic (advantage gae)"
        )
    if convention.advantage == "grpo":
        # grpo_advantages has divided the whole by the group's sd, so the parts are divided too
        sd = net.view(-1, group).std(1).repeat_interleave(group) + 1e-4
        scores, cost = scores / sd, cost / sd
    baseline = whole - scores - cost
    return AdvantageParts(
        reward=_on_every_token(scores, laid.mask),
        kl=_on_every_token(cost, laid.mask),
        baseline=_on_every_token(baseline, laid.mask),
    )


def _on_every_token(x: Tensor, mask: Tensor) -> Tensor:
    """One number an answer, [B], as the same number on each of its tokens, [B, T]."""
    return x[:, None].expand_as(mask)


def whitened_parts(parts: AdvantageParts, mask: Tensor, convention: Convention) -> AdvantageParts:
    """The split after the convention's whitening, exact: each part over the sd, and a shift.

    Mean and sd are those of the whole batch, or of each answer by itself (whiten_scope).
    """
    if convention.whiten_advantages == "none":
        return parts
    dims = (0, 1) if convention.whiten_scope == "batch" else (1,)
    total = parts.total
    n = mask.sum(dims, keepdim=True)  # tokens: [1, 1], or [B, 1] one for each answer
    mean = torch.where(mask, total, 0.0).sum(dims, keepdim=True) / n.clamp(min=1)
    squares = torch.where(mask, (total - mean).square(), 0.0).sum(dims, keepdim=True)
    variance = squares / (n - convention.ddof).clamp(min=1)
    sd = torch.where(n > 1, (variance + 1e-8).sqrt(), 1.0)  # one token alone has none
    shift = torch.zeros_like(mean)
    if convention.whiten_advantages == "shift_scale":
        kept = mean if convention.keep_mean else 0.0
        shift = kept - mean / sd
    return parts._affine(sd, torch.where(mask, shift, 0.0))
