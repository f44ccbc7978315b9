"""From rewards to advantages: shaping, GAE, whitening, group baselines, and the exact split.

Index t is response token t; `values[:, t]` is the value of the state *before* token t is chosen
and the state after the last token is worth 0. Masks are True on the tokens that were chosen by
the policy; a False inside an answer (a tool's output, say) is skipped, as if it were not there.

GAE is linear in (rewards, values), so an advantage is *exactly* a part from the reward model, a
part from the KL penalty and a part from the baseline. Whitening is affine, so the split goes
through it with one more part, the shift. `decompose_advantages` is that sentence in code.

Sources: Schulman et al. (2015, arXiv 1506.02438, eq. 16); Ahmadian et al. (2024, arXiv
2402.14740) for RLOO; Shao et al. (2024, arXiv 2402.03300, section 4.1.2) for GRPO.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minirlhf.text import last_token

if TYPE_CHECKING:
    from minirlhf.rollout import Rollout


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True entries of `mask`, a scalar; 0 where there are none."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, beta: float | Tensor) -> Tensor:
    """Per-token rewards [B, T]: -beta * kl on every token, plus the score on the last one.

    scores [B] in reward sd, kl [B, T] in nats, beta in reward sd per nat: one price, or
    one for each answer [B, 1]. Rows without a single token get no reward at all (their score has
    no token to sit on).
    """
    rewards = torch.where(mask, -beta * kl, 0.0)
    last = last_token(mask)
    rows = torch.nonzero(last >= 0).squeeze(-1)
    rewards[rows, last[rows]] += scores[rows].to(rewards.dtype)
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    """Generalised advantage estimates [B, T], zero outside the mask (not whitened).

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}, where t+1 is
    the next *unmasked* token. lam = 0 is the one-step TD error, lam = 1 return minus value.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    running = torch.zeros_like(next_value)
    for t in reversed(range(rewards.shape[1])):
        valid = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(valid, delta + gamma * lam * running, running)
        next_value = torch.where(valid, values[:, t], next_value)
        advantages[:, t] = running
    return torch.where(mask, advantages, 0.0)


def whitening_moments(x: Tensor, mask: Tensor, *, ddof: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the masked entries (sd 1 when fewer than two)."""
    n = mask.sum()
    mean = masked_mean(x, mask)
    variance = torch.where(mask, (x - mean).square(), 0.0).sum() / (n - ddof).clamp(min=1)
    return mean, torch.where(n > 1, (variance + 1e-8).sqrt(), torch.ones_like(variance))


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, ddof: int = 1) -> Tensor:
    """Bring the masked entries to mean 0 and variance 1; with shift_mean=False keep their mean.

    The shift makes about half of the tokens positive *by construction*: "positive" then means
    "better than this batch", not "better than the critic expected". Keeping the mean, as reward
    whitening does elsewhere, adds a constant to every token, which is a bonus for length.
    """
    mean, sd = whitening_moments(x, mask, ddof=ddof)
    return torch.where(mask, (x - mean) / sd + (0.0 if shift_mean else mean), 0.0)


def rescale(x: Tensor, mask: Tensor) -> Tensor:
    """Divide the masked entries by their standard deviation: unit size, every sign kept."""
    return torch.where(mask, x / whitening_moments(x, mask)[1], 0.0)


def rloo_advantages(returns: Tensor, group: int) -> Tensor:
    """Each answer against the mean of the other group - 1 answers to its prompt: [B] -> [B].

    Answers to one prompt must be neighbours: rows 0..group-1 share a prompt, and so on.
    """
    r = _grouped(returns, group)
    return ((r - r.mean(1, keepdim=True)) * group / (group - 1)).flatten()


def grpo_advantages(returns: Tensor, group: int, *, scale_by_sd: bool = True) -> Tensor:
    """Each answer against its group's mean, divided by the group's sd: [B] -> [B].

    The division erases the size of a reward gap: a hundredth of the gap gives the same push.
    `scale_by_sd=False` is the advantage of Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), whose
    loss also sums over an answer's tokens (`sequence_sum`) instead of taking their mean.
    """
    r = _grouped(returns, group)
    centred = r - r.mean(1, keepdim=True)
    return (centred / (r.std(1, keepdim=True) + 1e-4) if scale_by_sd else centred).flatten()


def _grouped(returns: Tensor, group: int) -> Tensor:
    if group < 2 or len(returns) % group:
        raise ValueError(
            f"{len(returns)} answers cannot be split into groups of {group}: use a group of at "
            "least 2 that divides the batch"
        )
    return returns.view(-1, group)


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
    rollout: "Rollout", *, beta: float, gamma: float = 1.0, lam: float = 0.95
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


def _demand_additive(rollout: "Rollout") -> None:
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
