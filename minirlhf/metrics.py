"""What a PPO step reports about its batch and its updates.

Every name is defined once, with its unit, in docs/metrics.md. All means are over masked tokens:
padding, however wide, changes none of them.
"""

import torch
from torch import Tensor

from minirlhf.advantages import masked_mean
from minirlhf.kl import kl_k3
from minirlhf.rollout import Rollout


def summarise(rollout: Rollout, beta: float) -> dict[str, float]:
    """Metrics of a batch before it is learnt from; none depends on the padding width."""
    mask = rollout.mask
    log_ratio = torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
    found = {"objective/score_sd": rollout.scores.mean(), "objective/beta": beta}
    found |= {"objective/kl_nats": log_ratio.sum(-1).mean()}
    found |= {"response/length_tokens": mask.sum(-1).double().mean()}
    if rollout.finished is not None:
        found["response/finished_share"] = rollout.finished.double().mean()
    if rollout.advantages is not None:
        positive = (rollout.advantages > 0).double()
        found["advantage/positive_share"] = masked_mean(positive, mask)
    if rollout.returns is not None and rollout.rewards is not rollout.returns:
        left = (rollout.returns - rollout.values)[mask].var()
        found["value/explained_variance"] = 1 - left / rollout.returns[mask].var().clamp(min=1e-8)
    return {name: float(value) for name, value in found.items()}


def update_metrics(logprobs: Tensor, batch: Rollout, clip: float) -> dict[str, Tensor]:
    """How far one minibatch has moved from the policy that sampled it."""
    mask, ratio = batch.mask, (logprobs - batch.logprobs).exp()
    return {
        "policy/clip_share": masked_mean(((ratio - 1).abs() > clip).float(), mask),
        "policy/old_kl_nats_per_token": masked_mean(kl_k3(batch.logprobs, logprobs), mask),
        "policy/ratio_max": torch.where(mask, ratio, 0.0).max(),
    }
