"""Our PPO on a real Transformer with two answers, trained until p rests: what L0 is held against.

The name starts with `fakes` so that tests/mutations.py imports it afresh for each planted bug.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import minirlhf.model
from minirlhf.kl import kl_tokens
from minirlhf.model import Transformer, TransformerConfig
from minirlhf.oracle.pocket import two_word_policy, verbose_share
from minirlhf.ppo import PPO, PPOConfig, Scorer
from minirlhf.sft import SFTConfig, train_sft

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


def settle(run: PPO, phases=SHORT, share=verbose_share) -> float:
    """Drive the run through its phases; the mean of the exact p over the last one."""
    for steps, lr in phases:
        run.config = replace(run.config, lr=lr)
        shares = []
        for _ in range(steps):
            run.step()
            shares.append(share(run.policy))
    return sum(shares) / len(shares)


def refreshed(p0: float, gap: float, beta: float, rounds: int, phases=SHORT) -> list[float]:
    """p after each round, where every round's reference is the policy that the last one left."""
    run, ends = bandit(p0, gap, beta), []
    for number in range(rounds):
        if number:
            left = run.policy
            run = PPO(copy.deepcopy(left), left, scorer(gap), PROMPT, run.config, seed=number)
        ends.append(settle(run, phases))
    return ends


STEPS = 30
OPEN, FILLER = 2, 3  # words of the chain; EOS (1) is the other side of the fork


def fork_reference() -> Transformer:
    """Says EOS at once, or (about once in ten) OPEN and then FILLER up to the cap."""
    config = TransformerConfig(4, STEPS, d_model=16, n_layer=1, n_head=2)
    model = Transformer(config, generator=torch.Generator().manual_seed(0))
    responses = torch.zeros(200, STEPS, dtype=torch.long)
    responses[:, 0], responses[:20, 0], responses[:20, 1:] = 1, OPEN, FILLER
    mask = torch.ones_like(responses, dtype=torch.bool)
    mask[20:, 1:] = False
    sft = SFTConfig(steps=150, batch=200, lr=1e-2)
    train_sft(model, PROMPT.expand(200, 1), responses, mask, sft, generator=torch.Generator())
    return model


@torch.no_grad()
def fork_share(model: Transformer) -> float:
    """The exact probability of OPEN, of OPEN or EOS."""
    logits = model(PROMPT)[0][0, 0].double()
    return torch.sigmoid(logits[OPEN] - logits[1]).item()


def fork_run(reference: Transformer, gap: float, beta: float, seed: int = 0, **options) -> PPO:
    """PPO on 30-token answers whose score only the first token decides."""

    def score(prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        return gap * (responses[:, 0] == OPEN).float()

    settings = {"max_new_tokens": STEPS, "batch": 256, "beta": beta} | options
    config = replace(PLAIN, **settings)
    return PPO(copy.deepcopy(reference), reference, score, PROMPT, config, seed=seed)


def kl_gradients(place, estimator, *, p=0.3, p0=0.01, n=20_000, seed=0):
    """What each of n sampled answers adds to the KL term's gradient in logit p, through PPO's
    own functions; [n]."""
    policy, reference = two_word_policy(p), two_word_policy(p0)
    given, mask = torch.full((n, 1), 1), torch.ones(n, 1, dtype=torch.bool)
    ref = reference(given[:1])[0][0].detach().log_softmax(-1)
    logits = policy(given[:1])[0][0].detach().expand(n, 2).clone().requires_grad_()
    draws = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    tokens = (draws >= logits[0].detach().softmax(-1)[0]).long()[:, None]
    logprobs = logits.log_softmax(-1).gather(1, tokens)
    costs = kl_tokens(logprobs, ref.expand(n, 2).gather(1, tokens), mask, estimator=estimator)
    term = costs if place == "loss" else costs.detach() * logprobs
    return torch.autograd.grad(term.sum(), logits)[0][:, 0].double()
