"""What the battery trains, again and again: a subject, and one that takes any PPO settings.

A *subject* is anything that can be trained once more under named `Changes` and gives a `Trace`. The
two-answer desk is one: eight prompts, each with two answers of one word, V (word 0) and C (word 1);
a reference that says V with chosen probabilities; a reward model that pays V `gap` more, and each
prompt a sum of its own. Policy, sampling, critic and updates are those of ppo.py on a small
Transformer. What a real run has and this has not: answers of several tokens, hence EOS, discounts
and length.

Left out: what a trace says (battery.py).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from minirlhf.config import PPOConfig
from minirlhf.engine.adamw import FlatAdamW
from minirlhf.model import Transformer, TransformerConfig, response_logprobs
from minirlhf.ppo import PPO, price_and_credit
from minirlhf.rollout import Rollout


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


QUESTIONS = torch.tensor([[1, i // 4 % 2, i // 2 % 2, i % 2, 1] for i in range(8)])
BITS = torch.tensor([0, 4, 2, 1, 0])


class Desk(Transformer):
    """A Transformer for QUESTIONS, each of which it reads once however many answers share it."""

    def by_rows(self, read: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """All rows at once: chunks would each read the questions anew."""
        return read(*given)

    def states(self, tokens: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
        """Final hidden states of the kept tokens, row by row, as Transformer.states."""
        x = super().states(QUESTIONS, valid[:1].expand(8, -1), keep[:1].expand(8, -1))
        return x[tokens @ BITS]


P0 = (0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.35, 0.5)


def log_odds(model: Transformer) -> Tensor:
    """[8] log-odds of V (word 0) against C (word 1)."""
    keep = torch.arange(5).expand_as(QUESTIONS) == 4
    logits, _ = model.heads(model.states(QUESTIONS, torch.ones_like(keep), keep))
    return logits[:, 0] - logits[:, 1]


def desk_reference(p0: Tensor, seed: int = 0) -> Transformer:
    """A model whose answer to prompt i is V with probability p0[i], fitted in 150 Adam steps."""
    config = TransformerConfig(2, 6, d_model=16, n_layer=1, n_head=2)
    model = Desk(config, generator=torch.Generator().manual_seed(seed))
    adam = FlatAdamW(model, lr=0.01)
    for step in range(150):
        adam.lr = 0.01 * min(1, 2 - step / 75)
        loss = (log_odds(model) - p0.logit()).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


def by_answer(x: Tensor, rollout: Rollout) -> Tensor:
    """[8, 2]: the mean of x [B] over the V and the C answers to each prompt; NaN without any."""
    assert rollout.index is not None
    cell = 2 * rollout.index + rollout.responses[:, 0]
    total, count = (x.new_zeros(16).index_add(0, cell, y) for y in (x, torch.ones_like(x)))
    return (total / count).view(8, 2).double()


class ExactCritic(PPO):
    """PPO whose baseline is the exact mean reward of a prompt's two answers."""

    def rollout(self) -> tuple[Rollout, dict[str, float]]:
        """As PPO.rollout, with other values and the advantages that follow."""
        r, seconds = super().rollout()
        assert r.rewards is not None and r.index is not None
        paid = by_answer(r.rewards[:, 0], r)
        paid = torch.where(paid.isnan(), paid.flip(1), paid)  # an answer that nobody gave: no gap
        p = log_odds(self.policy).detach().double().div(self.config.temperature).sigmoid()
        value = p * paid[:, 0] + (1 - p) * paid[:, 1]
        r = replace(r, values=value[r.index][:, None].to(r.values.dtype))
        return replace(r, **price_and_credit(r, self.config, self.beta)), seconds


def lift_by_loss(run: PPO, rollout: Rollout, beta: float) -> Tensor:
    """[B] what raises each answer's log-prob: minus the loss's gradient, as if beta were `beta`.

    Times B, so that it is in the unit of advantages. The loss itself is asked, whatever is in it.
    """
    priced = replace(rollout, **price_and_credit(rollout, run.config, beta))
    with torch.no_grad():
        logprobs, values = response_logprobs(
            run.policy,
            rollout.prompts,
            rollout.responses,
            rollout.mask,
            temperature=run.config.temperature,
        )
    logprobs.requires_grad_()
    loss, _ = run.loss_of(logprobs, values, priced, beta=beta)
    (slope,) = torch.autograd.grad(loss, logprobs)
    return -len(rollout) * slope[:, 0]


class TwoAnswerDesk:
    """PPO with any settings on eight prompts with two one-word answers, V and C."""

    def __init__(
        self,
        config: PPOConfig,
        gap: float,
        *,
        p0: Any = P0,
        refresh: int | None = None,
        steps: int = 30,
        seed: int = 0,
    ):
        """gap: what V earns more than C, reward sd; p0 [8]: how often the reference says V;
        refresh: steps after which the policy becomes its own reference (none: never). The size
        of a batch, of an answer and of a step are the desk's own."""
        if config.beta <= 0:
            raise ValueError(
                "ppo.beta is 0; the battery scales the price of KL: give a positive one"
            )
        if not math.isfinite(gap):
            raise ValueError(f"gap is {gap}; it must be finite, reward sd")
        if refresh is not None and refresh < 1:
            raise ValueError(f"refresh is {refresh}; it must be at least 1 step, or none")
        size = 256 - 256 % math.lcm(config.minibatches, config.group)
        small: dict[str, Any] = {"batch": size, "max_new_tokens": 1, "missing_eos": "none"}
        self.config, self.gap, self.refresh = replace(config, lr=0.01, **small), gap, refresh
        self.steps, self.seed = steps, seed
        self.reference = desk_reference(torch.as_tensor(p0, dtype=torch.float64), seed)

    def score(self, gap: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`gap` reward sd for V, and something for the prompt."""
        return lambda prompts, y, mask: gap * (y[:, 0] == 0) + 0.1 * prompts.sum(-1)

    def train(self, changes: Changes) -> Trace:
        """One run; the learning rate falls to 0, so that the policy comes to rest."""
        c, kind = self.config, ExactCritic if changes.exact_critic else PPO
        c = replace(c, beta=c.beta * changes.beta)
        if changes.many_epochs:
            c = replace(c, epochs=c.epochs + 3)
        if changes.other_clip:
            c = replace(c, clip_style="book" if c.clip_style == "schulman" else "schulman")
        score, first = self.score(self.gap * changes.gap), self.reference
        seed = 2 * self.seed + changes.seed
        run = kind(copy.deepcopy(first), first, score, QUESTIONS, c, seed=seed)
        rows, ends = [], [log_odds(first).detach()]
        for done in range(self.steps):
            run.config = replace(c, lr=c.lr * (1 - done / self.steps))
            if self.refresh and done and done % self.refresh == 0:
                run.reference = copy.deepcopy(run.policy).requires_grad_(False)
            before = log_odds(run.policy).detach()
            rollout, _ = run.rollout()
            if done % 4 == 0:
                rows.append(self.probe(run, rollout, before))
            run.update(rollout)
            nats = (rollout.logprobs - rollout.ref_logprobs).mean()
            run.controller.update(float(nats), len(rollout))
        ends.append(log_odds(run.policy).detach())
        start, end = (x.double().div(c.temperature).sigmoid() for x in ends)
        return Trace(start, end, **{k: torch.stack([r[k] for r in rows]) for k in rows[0]})

    def probe(self, run: PPO, rollout: Rollout, odds: Tensor) -> dict[str, Tensor]:
        """One row of a Trace, on a batch before it is learnt from."""
        r, t = rollout, run.config.temperature
        assert r.advantages is not None and r.index is not None
        sign = torch.where(r.responses[:, 0] == 0, 1.0, -1.0)
        first = log_odds(self.reference).detach()[r.index]
        moved = r.logprobs[:, 0] - torch.nn.functional.logsigmoid(sign * first / t)
        ratio = (r.logprobs - r.ref_logprobs)[:, 0]
        beta = torch.tensor(run.beta, dtype=torch.float64)
        return {
            "share": (odds.double() / t).sigmoid(),
            "beta": beta,
            "scores": by_answer(r.scores, r),
            "score_sd": r.scores.double().std(),
            "advantage_sd": r.advantages.double().std(),
            "log_ratio": by_answer(ratio, r),
            "kl": torch.stack([ratio.mean(), moved.mean()]).double(),
            "net": by_answer(lift_by_loss(run, r, run.beta), r),
            "free": by_answer(lift_by_loss(run, r, 0.0), r),
        }
