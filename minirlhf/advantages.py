"""From rewards to advantages: shaping, GAE, whitening and group baselines.

Index t is response token t; `values[:, t]` is the value of the state *before* token t is chosen
and the state after the last token is worth 0. Masks are True on the tokens that were chosen by
the policy; a False inside an answer (a tool's output, say) is skipped, as if it were not there.

GAE is linear in (rewards, values) and whitening is affine, so an advantage is *exactly* a sum of
parts: the autopsy (autopsy/parts.py) takes it apart.

Sources: Schulman et al. (2015, arXiv 1506.02438, eq. 16); Ahmadian et al. (2024, arXiv
2402.14740) for RLOO; Shao et al. (2024, arXiv 2402.03300, section 4.1.2) for GRPO.
"""

import torch
from torch import Tensor

from minirlhf.text import last_token


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
