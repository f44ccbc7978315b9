"""From scores to advantages: shaping, GAE, whitening and group baselines.

The pieces come first; `price_and_credit` puts them together as a run's settings say.

Index t is response token t; `values[:, t]` is the value of the state *before* token t is chosen
and the state after the last token is worth 0. Masks are True on the tokens that were chosen by
the policy; a False inside an answer (a tool's output, say) is skipped, as if it were not there.

GAE is linear in (rewards, values) and whitening is affine, so an advantage is *exactly* a sum of
parts: the autopsy (autopsy/parts.py) takes it apart.

Sources: Schulman et al. (2015, arXiv 1506.02438, eq. 16); Ahmadian et al. (2024, arXiv
2402.14740) for RLOO; Shao et al. (2024, arXiv 2402.03300, section 4.1.2) for GRPO.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minirlhf.config import PPOConfig
from minirlhf.kl import kl_tokens
from minirlhf.rollout import Rollout
from minirlhf.text import last_token


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over the True entries of `mask`, a scalar; 0 where there are none."""
    total = torch.where(mask, x, 0.0).sum()
    return total / mask.sum().clamp(min=1)


def shape_rewards(
    scores: Float[Tensor, " B"],
    kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float | Float[Tensor, "B 1"],
) -> Float[Tensor, "B T"]:
    """Per-token rewards [B, T]: -beta * kl on every token, plus the score on the last one.

    scores [B] in reward sd, kl [B, T] in nats, beta in reward sd per nat: one price, or
    one for each answer [B, 1]. Rows without a single token get no reward at all (their score has
    no token to sit on).
    """
    # Ziegler et al. (2019, arXiv 1909.08593, eq. 2), token by token
    rewards = torch.where(mask, -beta * kl, 0.0)
    last = last_token(mask)
    rows = torch.nonzero(last >= 0).squeeze(-1)
    rewards[rows, last[rows]] += scores[rows].to(rewards.dtype)
    return rewards


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Float[Tensor, "B T"]:
    """Generalised advantage estimates [B, T], zero outside the mask (not whitened).

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}, where t+1 is
    the next token in the mask. lam = 0 is the one-step TD error, lam = 1 return minus value.
    """
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])  # after the last token nothing is to come
    running = torch.zeros_like(next_value)
    # Schulman et al. (2015, eq. 16), summed from the end: what is behind t is known at t
    for t in reversed(range(rewards.shape[1])):
        valid = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # a token that the policy did not choose hands on what it got, as if it were not there
        running = torch.where(valid, delta + gamma * lam * running, running)
        next_value = torch.where(valid, values[:, t], next_value)
        advantages[:, t] = running
    return torch.where(mask, advantages, 0.0)


def whitening_moments(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, ddof: int = 1
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean and standard deviation of the entries in the mask (sd 1 when fewer than two)."""
    count = mask.sum()
    mean = masked_mean(x, mask)
    squares = torch.where(mask, (x - mean).square(), 0.0)
    variance = squares.sum() / (count - ddof).clamp(min=1)
    # entries that are all alike have variance 0: whitened they are 0, not NaN
    sd = (variance + 1e-8).sqrt()
    return mean, torch.where(count > 1, sd, torch.ones_like(sd))


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    shift_mean: bool = True,
    ddof: int = 1,
) -> Float[Tensor, "*shape"]:
    """Bring the entries in the mask to mean 0 and variance 1; shift_mean=False keeps their mean.

    The shift makes about half of the tokens positive *by construction*: "positive" then means
    "better than this batch", not "better than the critic expected". Keeping the mean, as reward
    whitening does elsewhere, adds a constant to every token, which is a bonus for length.
    """
    mean, sd = whitening_moments(x, mask, ddof=ddof)
    whitened = (x - mean) / sd
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def rescale(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Divide the entries in the mask by their standard deviation: unit size, every sign kept."""
    _, sd = whitening_moments(x, mask)
    return torch.where(mask, x / sd, 0.0)


def rloo_advantages(returns: Float[Tensor, " B"], group: int) -> Float[Tensor, " B"]:
    """Each answer against the mean of the other group - 1 answers to its prompt: [B] -> [B].

    Answers to one prompt must be neighbours: rows 0..group-1 share a prompt, and so on.
    """
    grouped = _grouped(returns, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    # Ahmadian et al. (2024): the mean of all k holds the answer itself, that of the others does
    # not, and r_i - mean_{j != i} r_j = k / (k - 1) (r_i - mean_j r_j)
    return (centred * group / (group - 1)).flatten()


def grpo_advantages(
    returns: Float[Tensor, " B"], group: int, *, scale_by_sd: bool = True
) -> Float[Tensor, " B"]:
    """Each answer against its group's mean, divided by the group's sd: [B] -> [B].

    The division erases the size of a reward gap: a hundredth of the gap gives the same push.
    `scale_by_sd=False` is the advantage of Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), whose
    loss also sums over an answer's tokens (`sequence_sum`) instead of taking their mean.
    """
    # Shao et al. (2024, section 4.1.2)
    grouped = _grouped(returns, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale_by_sd:
        # answers that all score alike have sd 0: they teach nothing, and are not NaN
        centred = centred / (grouped.std(1, keepdim=True) + 1e-4)
    return centred.flatten()


def _grouped(returns: Float[Tensor, " B"], group: int) -> Float[Tensor, "N group"]:
    """A row a prompt. Raises ValueError where groups do not fill the batch."""
    if group < 2 or len(returns) % group:
        raise ValueError(
            f"{len(returns)} answers cannot be split into groups of {group}: use a group of at "
            "least 2 that divides the batch"
        )
    return returns.view(-1, group)


def treat_missing_eos(
    scores: Float[Tensor, " B"], finished: Bool[Tensor, " B"], config: PPOConfig
) -> Float[Tensor, " B"]:
    """Scores [B] after the treatment of answers cut at the cap (finished [B] is False)."""
    if config.missing_eos == "subtract":
        return torch.where(finished, scores, scores - config.missing_eos_penalty)
    if config.missing_eos == "replace":
        return torch.where(finished, scores, -config.missing_eos_penalty)
    return scores


def price_and_credit(
    rollout: Rollout, config: PPOConfig, beta: float | Float[Tensor, "B 1"]
) -> dict[str, Float[Tensor, "B T"]]:
    """kl, rewards, advantages and returns [B, T] of a rollout that has its scores.

    beta is one price, or one for each answer [B, 1]. The advantages are whitened as the config
    says; the returns never are.
    """
    mask = rollout.mask
    kl = kl_tokens(
        rollout.logprobs,
        rollout.ref_logprobs,
        mask,
        estimator=config.kl_estimator,
        aggregation=config.kl_aggregation,
    )
    scores = rollout.scores
    if config.whiten_rewards == "scores":
        everyone = torch.ones_like(scores, dtype=torch.bool)
        scores = rescale(scores, everyone)
    charged = beta if config.kl_place == "reward" else 0.0
    rewards = shape_rewards(scores, kl, mask, beta=charged)
    if config.whiten_rewards == "rewards":
        rewards = rescale(rewards, mask)

    advantages, returns = _credit(rewards, rollout.values, mask, config)
    # after the returns were made: the critic learns the size of the rewards, not of a batch
    if config.whiten_advantages == "shift_scale":
        advantages = whiten(advantages, mask)
    elif config.whiten_advantages == "scale":
        advantages = rescale(advantages, mask)
    return {"kl": kl, "rewards": rewards, "advantages": advantages, "returns": returns}


def _credit(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    config: PPOConfig,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages and returns, by the critic or by the other answers to the same prompt."""
    if config.advantage == "gae":
        advantages = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
        return advantages, advantages + values
    totals = rewards.sum(-1)
    if config.advantage == "rloo":
        lead = rloo_advantages(totals, config.group)
    else:
        lead = grpo_advantages(totals, config.group)
    # every token of an answer is credited with the whole of its lead
    return torch.where(mask, lead[:, None], 0.0), rewards
