"""Distance to the reference: three sampled estimators of KL(pi || pi_ref), the exact value, beta.

Every estimator here is named for the direction KL(policy || reference) with samples drawn from
the policy, works token by token in nats, and is positive when the policy likes a token more than
the reference does (k1) or always (k2, k3). Let l = logprobs - ref_logprobs on a sampled token:

    k1 = l                 E[k1] = KL exactly; a single token may be negative
    k2 = l**2 / 2          biased as a value; as a loss its gradient is that of KL
    k3 = exp(-l) - 1 + l   E[k3] = KL exactly, never negative; as a loss its gradient is that of
                           the *forward* KL(pi_ref || pi)

The gradients are those on-policy: after the first optimiser step on a batch its samples are those
of an older policy, and no importance ratio corrects for that here.
As a loss an estimate acts state by state: it does not see that a token leads to states of larger
KL. As a cost in the reward it does, and k1 there has the gradient of the KL of whole answers.
Swapping the ratio in k3 (exp(l) - 1 - l) is a frequent bug: its mean is chi-squared minus KL.
Left out: clamped estimators; they are biased and hide the tokens that matter.

Sources: Schulman (2020), "Approximating KL divergence"; Ziegler et al. (2019, arXiv 1909.08593,
section 2.2) for the adaptive controller; Tang and Munos (2025, arXiv 2506.09477) for gradients.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minirlhf.config import Estimator


def kl_k1(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The log-ratio itself, nats per token, same shape as its inputs."""
    return logprobs - ref_logprobs


def kl_k2(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Half the squared log-ratio, nats per token."""
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """exp(-l) - 1 + l, nats per token, never negative."""
    log_ratio = logprobs - ref_logprobs
    # expm1 keeps what exp(-l) - 1 would round away where l is near zero
    return torch.expm1(-log_ratio) + log_ratio


# Schulman (2020), "Approximating KL divergence"
ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def exact_kl(
    logits: Float[Tensor, "*shape V"], ref_logits: Float[Tensor, "*shape V"]
) -> Float[Tensor, "*shape"]:
    """KL(pi || pi_ref) of whole next-token distributions: [..., V] and [..., V] -> [...] nats.

    Tokens that the policy gives probability zero (logit -inf) contribute nothing.
    """
    logp = logits.log_softmax(-1)
    ref_logp = ref_logits.log_softmax(-1)
    p = logp.exp()
    # masked before the product: 0 * -inf would be NaN in the gradient
    log_ratio = torch.where(p > 0, logp - ref_logp, 0.0)
    return (p * log_ratio).sum(-1)


def kl_tokens(
    logprobs: Float[Tensor, "*B T"],
    ref_logprobs: Float[Tensor, "*B T"],
    mask: Bool[Tensor, "*#B T"],
    *,
    estimator: Estimator = "k1",
    aggregation: Literal["sequence_sum", "token_mean"] = "sequence_sum",
) -> Float[Tensor, "*B T"]:
    """What each token pays, [B, T] nats, zero outside the mask; B may be several axes.

    `sequence_sum`: a token pays its own estimate, so an answer pays the sum over its tokens.
    `token_mean`: each estimate is divided by the answer's length, so an answer pays the mean and
    a fork of 3 nats costs less the longer the answer that hides it.
    Raises ValueError for another estimator or aggregation.
    """
    if estimator not in ESTIMATORS or aggregation not in ("sequence_sum", "token_mean"):
        raise ValueError(
            f"no KL estimator {estimator!r} with aggregation {aggregation!r}: use k1, k2 or k3, "
            "and sequence_sum or token_mean"
        )
    estimate = ESTIMATORS[estimator]
    per_token = torch.where(mask, estimate(logprobs, ref_logprobs), 0.0)
    if aggregation == "token_mean":
        # an answer without a token pays nothing, and is not divided by 0
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        per_token = per_token / lengths
    return per_token


@dataclass
class FixedKL:
    """A beta that stays where it is put (reward units per nat)."""

    beta: float

    def update(self, kl: float, n: int) -> float:
        """Ignores the measured `kl` and returns beta."""
        return self.beta


@dataclass
class AdaptiveKL:
    """Beta that chases a KL target (Ziegler et al. 2019, eq. in section 2.2).

    `target` and the `kl` given to update() must be in the same unit, nats per *answer*; `horizon`
    is in answers. The error is clipped to +-0.2, so doubling beta takes at least
    log(2) / log(1 + 0.2 * n / horizon) updates: slower than most drifts. More than `horizon`
    answers at once count as `horizon`, so that beta cannot jump below zero.
    """

    beta: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.target > 0 and self.horizon > 0):
            raise ValueError(
                f"AdaptiveKL beta {self.beta}, target {self.target} and horizon {self.horizon} "
                "must be positive: target in nats per answer, horizon in answers (a beta of 0 "
                "would stay 0)"
            )

    def update(self, kl: float, n: int) -> float:
        """Move beta by the clipped relative error of `kl`, measured over `n` answers."""
        # e_t and beta_{t+1} of Ziegler et al. (2019, section 2.2), whose K_beta is n / horizon
        error = kl / self.target - 1.0
        error = min(max(error, -0.2), 0.2)
        gain = min(n / self.horizon, 1.0)
        self.beta *= 1.0 + error * gain
        return self.beta
