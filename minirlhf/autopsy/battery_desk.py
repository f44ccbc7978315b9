"""What the battery trains, again and again: a subject, and one that takes any PPO settings.

A *subject* is anything that can be trained once more under named `Changes` and gives a `Trace`. The
two-answer desk is one: eight prompts, each with two answers of one word, V (word 0) and C (word 1);
a reference that says V with chosen probabilities; a reward model that pays V `gap` more, and each
prompt a sum of its own. Policy, sampling, critic and updates are those of ppo.py on a small
Transformer, and the push on an answer is asked of its loss.
Left out: what a trace says (battery.py), and what a real run has besides: answers of several
tokens, hence EOS, discounts and length.

Source: none; the push is plain autograd, and two answers are the smallest case in which KL acts.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from minirlhf.autopsy.pushes import outputs_of
from minirlhf.config import PPOConfig
from minirlhf.engine.adamw import FlatAdamW
from minirlhf.model import Transformer, TransformerConfig
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


# the number of a question is written in bits between two words 1
QUESTIONS = torch.tensor([[1, i // 4 % 2, i // 2 % 2, i % 2, 1] for i in range(8)])
BITS = torch.tensor([0, 4, 2, 1, 0])
P0 = (0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.35, 0.5)


class TwoAnswerModel(Transformer):
    """A Transformer for QUESTIONS, each of which it reads once however many answers share it."""

    def by_rows(self, read: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """All rows at once: chunks would each read the questions anew."""
        return read(*given)

    def states(self, tokens: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
        """Final hidden states of the kept tokens, row by row, as Transformer.states."""
        x = super().states(QUESTIONS, valid[:1].expand(8, -1), keep[:1].expand(8, -1))
        return x[tokens @ BITS]


def log_odds(model: Transformer) -> Tensor:
    """[8] log-odds of V (word 0) against C (word 1)."""
    valid = torch.ones_like(QUESTIONS, dtype=torch.bool)
    keep = torch.arange(5).expand_as(QUESTIONS) == 4  # the answer follows the last word
    logits, _ = model.heads(model.states(QUESTIONS, valid, keep))
    return logits[:, 0] - logits[:, 1]


def desk_reference(p0: Tensor, seed: int = 0) -> Transformer:
    """A model whose answer to prompt i is V with probability p0[i], fitted in 150 Adam steps."""
    config = TransformerConfig(2, 6, d_model=16, n_layer=1, n_head=2)
    model = TwoAnswerModel(config, generator=torch.Generator().manual_seed(seed))
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
    total = x.new_zeros(16).index_add(0, cell, x)
    count = x.new_zeros(16).index_add(0, cell, torch.ones_like(x))
    return (total / count).view(8, 2).double()


class ExactCritic(PPO):
    """PPO whose baseline is the exact mean reward of a prompt's two answers."""

    def rollout(self) -> tuple[Rollout, dict[str, float]]:
        """As PPO.rollout, with other values and the advantages that follow."""
        rollout, seconds = super().rollout()
        assert rollout.rewards is not None and rollout.index is not None
        paid = by_answer(rollout.rewards[:, 0], rollout)
        paid = torch.where(paid.isnan(), paid.flip(1), paid)  # an answer that nobody gave: no gap
        odds = log_odds(self.policy).detach().double()
        p = odds.div(self.config.temperature).sigmoid()
        expected = p * paid[:, 0] + (1 - p) * paid[:, 1]
        values = expected[rollout.index][:, None].to(rollout.values.dtype)
        rollout = replace(rollout, values=values)
        return replace(rollout, **price_and_credit(rollout, self.config, self.beta)), seconds


def lift_by_loss(run: PPO, rollout: Rollout, beta: float) -> Tensor:
    """[B] what raises each answer's log-prob: minus the loss's gradient, as if beta were `beta`.

    Exact. Times B, so that it is in the unit of advantages. The loss itself is asked, whatever is
    in it.
    """
    priced = replace(rollout, **price_and_credit(rollout, run.config, beta))
    with torch.no_grad():
        logprobs, values = outputs_of(run, rollout)
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
        self.config = replace(
            config,
            lr=0.01,
            batch=256 - 256 % math.lcm(config.minibatches, config.group),
            max_new_tokens=1,
            missing_eos="none",
        )
        self.gap = gap
        self.refresh = refresh
        self.steps = steps
        self.seed = seed
        self.reference = desk_reference(torch.as_tensor(p0, dtype=torch.float64), seed)

    def score(self, gap: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`gap` reward sd for V, and something for the prompt."""
        return lambda prompts, y, mask: gap * (y[:, 0] == 0) + 0.1 * prompts.sum(-1)

    def train(self, changes: Changes) -> Trace:
        """One run; the learning rate falls to 0, so that the policy comes to rest."""
        config = self._changed(changes)
        kind = ExactCritic if changes.exact_critic else PPO
        first = self.reference
        score = self.score(self.gap * changes.gap)
        seed = 2 * self.seed + changes.seed
        run = kind(copy.deepcopy(first), first, score, QUESTIONS, config, seed=seed)
        rows = []
        for done in range(self.steps):
            run.config = replace(config, lr=config.lr * (1 - done / self.steps))
            if self.refresh and done > 0 and done % self.refresh == 0:
                run.reference = copy.deepcopy(run.policy).requires_grad_(False)
            before = log_odds(run.policy).detach()
            rollout, _ = run.rollout()
            if done % 4 == 0:
                rows.append(self.probe(run, rollout, before))
            run.update(rollout)
            nats = (rollout.logprobs - rollout.ref_logprobs).mean()
            run.controller.update(float(nats), len(rollout))
        ends = (log_odds(model).detach().double() for model in (first, run.policy))
        start, end = (odds.div(config.temperature).sigmoid() for odds in ends)
        return Trace(start, end, **{k: torch.stack([row[k] for row in rows]) for k in rows[0]})

    def _changed(self, changes: Changes) -> PPOConfig:
        """The desk's settings under these changes."""
        config = replace(self.config, beta=self.config.beta * changes.beta)
        if changes.many_epochs:
            config = replace(config, epochs=config.epochs + 3)
        if changes.other_clip:
            other = "book" if config.clip_style == "schulman" else "schulman"
            config = replace(config, clip_style=other)
        return config

    def probe(self, run: PPO, rollout: Rollout, odds: Tensor) -> dict[str, Tensor]:
        """One row of a Trace, on a batch before it is learnt from."""
        temperature = run.config.temperature
        assert rollout.advantages is not None and rollout.index is not None
        ratio = (rollout.logprobs - rollout.ref_logprobs)[:, 0]
        # to the policy before training, whatever run.reference has become since
        sign = torch.where(rollout.responses[:, 0] == 0, 1.0, -1.0)
        first_odds = sign * log_odds(self.reference).detach()[rollout.index]
        first_logprobs = torch.nn.functional.logsigmoid(first_odds / temperature)
        moved = rollout.logprobs[:, 0] - first_logprobs
        return {
            "share": (odds.double() / temperature).sigmoid(),
            "beta": torch.tensor(run.beta, dtype=torch.float64),
            "scores": by_answer(rollout.scores, rollout),
            "score_sd": rollout.scores.double().std(),
            "advantage_sd": rollout.advantages.double().std(),
            "log_ratio": by_answer(ratio, rollout),
            "kl": torch.stack([ratio.mean(), moved.mean()]).double(),
            "net": by_answer(lift_by_loss(run, rollout, run.beta), rollout),
            "free": by_answer(lift_by_loss(run, rollout, 0.0), rollout),
        }
