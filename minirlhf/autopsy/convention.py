"""The convention of a batch: how its advantages come from its log-probs, scores and values.

Where the score sits, which KL estimator is charged, what is whitened and over which tokens:
frameworks differ in each, and a batch seldom says. `Convention` is a run's settings with those
differences, `laid_out` the batch in float64 as the convention's rewards see it.
Left out: what the rewards become (parts.py) and how to find the convention of a log that came
without one (reconciliation.py).

Sources: Ziegler et al. (2019, arXiv 1909.08593, eq. 2) for KL charged in the reward; the other
settings are those in which published PPO code differs, and have no formula of their own.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from minirlhf.advantages import rescale, shape_rewards, whitening_moments
from minirlhf.config import PPOConfig
from minirlhf.kl import kl_tokens
from minirlhf.rollout import Rollout


@dataclass(frozen=True)
class Convention(PPOConfig):
    """How a batch's advantages come from its log-probs, scores and values: the settings of a run
    (of which those of the update play no part here) and what other frameworks do otherwise."""

    clamp: float | None = None
    """bound on the size of a token's log-ratio, nats"""
    score_at: Literal["eos", "after_eos"] = "eos"
    """the score's slot: the last token, or one later with a value of its own, where a row has
    room for it"""
    keep_mean: bool = False
    """add the old mean again after advantages were centred (whiten_advantages shift_scale)"""
    whiten_scope: Literal["batch", "answer"] = "batch"
    """the tokens over which mean and sd of advantages are taken"""
    ddof: int = 1
    """1: sample variance, 0: population variance"""

    @classmethod
    def of(cls, config: PPOConfig, *, beta: float | None = None) -> "Convention":
        """That of a run of ours; `beta` where a controller has moved it (run.beta)."""
        settings: dict[str, Any] = asdict(config)
        if beta is not None:
            settings["beta"] = beta
        return cls(**settings)

    @property
    def price(self) -> float:
        """What the reward charges for a nat: beta, or 0 where KL is not in the reward."""
        return self.beta if self.kl_place == "reward" else 0.0


def demand_fields(rollout: Rollout, *names: str) -> None:
    """Raises ValueError, in one sentence, for a batch without these fields or without a token."""
    missing = [name for name in names if getattr(rollout, name) is None]
    if missing:
        raise ValueError(
            f"this batch has no {' and no '.join(missing)}: log it with the batch, "
            "or fill it in with dataclasses.replace"
        )
    if not rollout.mask.any():
        raise ValueError("no token of this batch was chosen by the policy: its mask is all False")


def charged_kl(rollout: Rollout, convention: Convention) -> Tensor:
    """What each token pays, [B, T] nats, before beta."""
    bound = torch.inf if convention.clamp is None else convention.clamp
    log_ratio = (rollout.logprobs.double() - rollout.ref_logprobs).clamp(-bound, bound)
    nothing = torch.zeros_like(log_ratio)  # the estimators take a difference: it is taken already
    return kl_tokens(
        log_ratio,
        nothing,
        rollout.mask,
        estimator=convention.kl_estimator,
        aggregation=convention.kl_aggregation,
    )


def laid_out(rollout: Rollout, convention: Convention) -> Rollout:
    """The batch in float64 as the convention's rewards see it.

    Its kl and scores are what beta and GAE act on, scaled where rewards are whitened; its mask has
    one more slot in a row whose score sits after EOS.
    """
    demand_fields(rollout, "logprobs", "ref_logprobs", "values", "scores")
    laid = rollout.to(torch.float64)
    kl = charged_kl(rollout, convention)
    mask = laid.mask
    scores = laid.scores
    if convention.whiten_rewards == "scores":
        scores = rescale(scores, torch.ones_like(scores, dtype=torch.bool))
    if convention.score_at == "after_eos":
        # a new slot where a token stood before it: an empty row gets none
        before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
        after = torch.arange(mask.shape[1], device=mask.device) == laid.last[:, None] + 1
        mask = mask | (after & before)
    if convention.whiten_rewards == "rewards":
        # rewards are linear in scores and kl, so these two take the sd on themselves
        rewards = shape_rewards(scores, kl, mask, beta=convention.price)
        _, sd = whitening_moments(rewards, mask)
        scores, kl = scores / sd, kl / sd
    return replace(laid, mask=mask, kl=kl, scores=scores, rewards=None)
