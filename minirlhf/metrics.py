"""What a PPO step reports about its batch and its updates.

Every name is defined once, with its unit, in docs/metrics.md. All means are over
tokens in the mask: padding, however wide, changes none of them.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minirlhf.advantages import masked_mean
from minirlhf.kl import kl_k3
from minirlhf.rollout import Rollout


def summarise(rollout: Rollout, beta: float) -> dict[str, float]:
    """Metrics of a batch before it is learnt from; none depends on the padding width."""
    mask = rollout.mask
    log_ratio = torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
    found = {
        "objective/score_sd": rollout.scores.mean(),
        "objective/beta": beta,
        # per answer, as AdaptiveKL wants it: a sum over tokens, then a mean over answers
        "objective/kl_nats": log_ratio.sum(-1).mean(),
        "response/length_tokens": mask.sum(-1).double().mean(),
    }
    if rollout.finished is not None:
        found["response/finished_share"] = rollout.finished.double().mean()
    if rollout.advantages is not None:
        positive = (rollout.advantages > 0).double()
        found["advantage/positive_share"] = masked_mean(positive, mask)
    # without a critic (rloo, grpo) the returns are the rewards themselves: nothing to explain
    if rollout.returns is not None and rollout.returns is not rollout.rewards:
        unexplained = (rollout.returns - rollout.values)[mask].var()
        total = rollout.returns[mask].var()
        found["value/explained_variance"] = 1 - unexplained / total.clamp(min=1e-8)
    return {name: float(value) for name, value in found.items()}


def update_metrics(
    logprobs: Float[Tensor, "B T"], batch: Rollout, clip: float
) -> dict[str, Float[Tensor, ""]]:
    """How far one minibatch has moved from the policy that sampled it."""
    mask = batch.mask
    ratio = (logprobs - batch.logprobs).exp()
    outside = (ratio - 1).abs() > clip
    # the samples are the old policy's, so it comes first; k3 is never negative
    old_kl = kl_k3(batch.logprobs, logprobs)
    return {
        "policy/clip_share": masked_mean(outside.float(), mask),
        "policy/old_kl_nats_per_token": masked_mean(old_kl, mask),
        "policy/ratio_max": torch.where(mask, ratio, 0.0).max(),
    }
