"""Rollout: the one carrier of a PPO batch, from the sampler to the autopsy and to disk.

Shapes: B answers, P prompt tokens (padded on the left), T response tokens (padded on the right).
`mask` [B, T] is True on the response tokens that the policy chose, up to and including EOS.
Entries outside the mask carry no meaning and are 0. Index t of every [B, T] field is response
token t; `values[:, t]` is the value of the state before that token.
Left out: where a batch comes from. A file of another framework, once converted, is a Rollout too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf.text import last_token


@dataclass(frozen=True)
class Rollout:
    """One batch: text, log-probs, values, scores, and what PPO made of them."""

    prompts: Int[Tensor, "B P"]
    """[B, P] token ids"""
    responses: Int[Tensor, "B T"]
    """[B, T] token ids"""
    mask: Bool[Tensor, "B T"]
    """[B, T] bool"""
    logprobs: Float[Tensor, "B T"]
    """[B, T] nats: log pi_old of the sampled tokens, at the sampling temperature"""
    ref_logprobs: Float[Tensor, "B T"]
    """[B, T] nats: the same tokens under the frozen reference, same temperature"""
    values: Float[Tensor, "B T"]
    """[B, T] reward sd: the critic before each token"""
    scores: Float[Tensor, " B"]
    """[B] reward sd: what PPO was given for the whole answer, after any missing-EOS treatment"""
    kl: Float[Tensor, "B T"] | None = None
    """[B, T] nats: the penalty's estimate per token (estimator and aggregation applied); charged
    in the reward only if the run's kl_place says so"""
    rewards: Float[Tensor, "B T"] | None = None
    """[B, T] reward sd: -beta * kl where KL is charged, plus the score on the last token, and
    then divided by its sd if the run whitens rewards"""
    advantages: Float[Tensor, "B T"] | None = None
    """[B, T] what multiplies the gradient: whitened, if the run whitens"""
    returns: Float[Tensor, "B T"] | None = None
    """[B, T] reward sd: the critic's target; of group baselines, which have none, the rewards"""
    finished: Bool[Tensor, " B"] | None = None
    """[B] bool: the answer ended by EOS (False: cut at the cap)"""
    ref_eos_logprobs: Float[Tensor, "B T"] | None = None
    """[B, T] nats: log-probability that the reference would have stopped before this token"""
    index: Int[Tensor, " B"] | None = None
    """[B] which prompt of the caller's prompt table each row answers"""

    def __post_init__(self) -> None:
        batch, steps = self.responses.shape
        # every field is [B, T] but for these
        shapes = {
            "prompts": (batch, self.prompts.shape[-1]),
            "scores": (batch,),
            "finished": (batch,),
            "index": (batch,),
        }
        for name, tensor in self.tensors().items():
            expected = shapes.get(name, (batch, steps))
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"rollout field {name!r} has shape {tuple(tensor.shape)}, expected {expected}"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"rollout field {name!r} holds NaN or infinity; find the step that made it"
                )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"rollout mask is {self.mask.dtype}; give a bool tensor")

    def __len__(self) -> int:
        return len(self.responses)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present, by name."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in present.items() if tensor is not None}

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """[B] tokens of each answer, EOS included."""
        return self.mask.sum(-1)

    @property
    def last(self) -> Int[Tensor, " B"]:
        """[B] index of each answer's last token; -1 for an answer without one."""
        return last_token(self.mask)

    def select(self, rows: Int[Tensor, " N"] | Bool[Tensor, " B"]) -> "Rollout":
        """The rollout of the given rows (indices [N] or a bool [B])."""
        chosen = {name: tensor[rows] for name, tensor in self.tensors().items()}
        return replace(self, **chosen)

    def to(self, *args: Any, **kwargs: Any) -> "Rollout":
        """Tensor.to for the floating-point fields; device moves apply to all fields."""
        moved = {}
        for name, tensor in self.tensors().items():
            out = tensor.to(*args, **kwargs)
            if not tensor.is_floating_point():
                # token ids and masks follow to another device, never to another type
                out = out.to(tensor.dtype)
            moved[name] = out
        return replace(self, **moved)


def concat(rollouts: Sequence[Rollout]) -> Rollout:
    """The answers of several batches one below the other, with the fields that all of them have.

    Raises ValueError for no batch, or for batches whose prompts or answers are of other widths.
    """
    if not rollouts:
        raise ValueError("no batch to put together: give at least one")
    widths = {(r.prompts.shape[1], r.responses.shape[1]) for r in rollouts}
    if len(widths) > 1:
        raise ValueError(
            f"batches of several (prompt, response) widths {sorted(widths)}: pad them alike first"
        )
    columns = [r.tensors() for r in rollouts]
    together = {}
    for name in columns[0]:
        if all(name in one for one in columns):
            together[name] = torch.cat([one[name] for one in columns])
    return Rollout(**together)
