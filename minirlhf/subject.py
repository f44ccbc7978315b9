"""What the battery trains, again and again: a subject, what may be changed in it, and its trace.

Left out: a subject (two_answers.py is one), and what its traces say (battery.py).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Changes:
    """What the battery may change in a subject, and nothing else."""

    beta: float = 1.0
    gap: float = 1.0
    """factors on the price of KL and on what the reward model pays more for V"""
    exact_critic: bool = False
    many_epochs: bool = False
    other_clip: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Trace:
    """One training run: at probes [K] on prompts [N]. [K, N, 2] is V, C; NaN: was not sampled."""

    start: Tensor
    end: Tensor
    share: Tensor
    """exact probability of V: [N] before training, [N] after it, [K, N] at each probe"""
    beta: Tensor
    """[K] the price that the run states, reward sd per nat"""
    scores: Tensor
    """[K, N, 2] mean score, reward sd"""
    score_sd: Tensor
    advantage_sd: Tensor
    """[K] sd of the batch's scores, and of its advantages"""
    log_ratio: Tensor
    """[K, N, 2] logged log-ratio to the run's reference, nats"""
    kl: Tensor
    """[K, 2] mean log-ratio of the batch, nats: as logged, and to the policy before training"""
    net: Tensor
    free: Tensor
    """[K, N, 2] push, in the unit of advantages: as it is, and at a price of 0 on the same batch"""

    @property
    def gap(self) -> float:
        """What the reward model pays more for V than for C, reward sd."""
        return float((self.scores[..., 0] - self.scores[..., 1]).nanmean())


class Subject(Protocol):
    """Anything that can be trained again."""

    def train(self, changes: Changes) -> Trace: ...  # noqa: D102
