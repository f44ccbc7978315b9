"""Our PPO on a real Transformer with two answers, trained until p rests: what L0 is held against.

The name starts with `fakes` so that tests/mutations.py imports it afresh for each planted bug.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import minirlhf.model
from minirlhf.oracle import two_word_policy, verbose_share
from minirlhf.ppo import PPO, PPOConfig, Scorer

PROMPT = torch.tensor([[1]])
# (steps, learning rate): there, settle, rest; p is averaged over the last phase
SHORT = ((40, 1e-2), (40, 2e-3), (40, 4e-4))
LONG = ((80, 1e-2), (80, 2e-3), (80, 4e-4))
PLAIN = PPOConfig(
    batch=1024, max_new_tokens=1, epochs=1, minibatches=1, missing_eos="none",
    whiten_advantages="none",
)  # fmt: skip


@pytest.fixture(autouse=True)
def whole_batches(monkeypatch):
    """One-token answers in one chunk, not in 64: same results up to rounding, ten times faster."""
    monkeypatch.setattr(minirlhf.model, "CHUNK", 1 << 20)


def scorer(gap: float) -> Scorer:
    """`gap` reward sd for the verbose answer (word 0), 0 for the concise one."""

    def score(prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        return gap * (responses[:, 0] == 0).float()

    return score


def bandit(p0: float, gap: float, beta: float, seed: int = 0, **options) -> PPO:
    """A PPO run on a two_word_policy; options are fields of PPOConfig."""
    reference = two_word_policy(p0)
    config = replace(PLAIN, beta=beta, **options)
    return PPO(copy.deepcopy(reference), reference, scorer(gap), PROMPT, config, seed=seed)


def settle(run: PPO, phases: tuple[tuple[int, float], ...] = SHORT) -> float:
    """Drive the run through its phases; the mean of the exact p over the last one."""
    for steps, lr in phases:
        run.config = replace(run.config, lr=lr)
        shares = []
        for _ in range(steps):
            run.step()
            shares.append(verbose_share(run.policy))
    return sum(shares) / len(shares)
