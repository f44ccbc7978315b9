"""PPO for language models: the losses, and a loop that the caller drives one step at a time.

    run = PPO(policy, reference, reward_model, prompts, config, seed=0)
    step = run.step()                               # Step(metrics, rollout)
    run.config = replace(run.config, beta=0.2)      # a dial turned mid-run acts from the next step

One step: sample answers; score them under the reference and the reward model; shape rewards and
estimate advantages; then `epochs` passes over the batch in `minibatches` optimiser steps each.
Departures from Schulman et al.: the KL penalty to a frozen reference (in the reward, in the loss,
as a textbook's formula reads, or absent), one trunk for policy and critic, group baselines as
alternatives to the critic. Left out: several devices, and any text.

Sources: Schulman et al. (2017, arXiv 1707.06347, eq. 7 and 9); Ziegler et al. (2019, arXiv
1909.08593, eq. 2); Xiao and Zhu (2025, arXiv 2501.09223, chapter 4) for the `book` forms.
"""

import copy
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minirlhf.advantages import (
    gae,
    grpo_advantages,
    masked_mean,
    rescale,
    rloo_advantages,
    shape_rewards,
    whiten,
)
from minirlhf.config import PPOConfig
from minirlhf.engine.adamw import FlatAdamW
from minirlhf.generate import sample
from minirlhf.kl import AdaptiveKL, FixedKL, kl_tokens
from minirlhf.metrics import summarise, update_metrics
from minirlhf.model import Transformer, response_logprobs
from minirlhf.rollout import Rollout
from minirlhf.text import EOS

Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]


class TrainingDiverged(RuntimeError):
    """A loss stopped being finite; the weights are those of before the failed minibatch."""


def aggregate(x: Tensor, mask: Tensor, how: str = "token_mean") -> Tensor:
    """Per-token terms [B, T] to one scalar: token_mean, sequence_mean or sequence_sum."""
    if how == "token_mean":
        return masked_mean(x, mask)
    sums = torch.where(mask, x, 0.0).sum(-1)
    if how == "sequence_mean":
        sums = sums / mask.sum(-1).clamp(min=1)
    elif how != "sequence_sum":
        raise ValueError(f"no aggregation {how!r}: token_mean, sequence_mean or sequence_sum")
    return sums.mean()


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    style: Literal["schulman", "book", "none"] = "schulman",
    aggregation: str = "token_mean",
) -> Tensor:
    """The clipped surrogate, negated for descent; [B, T] inputs, a scalar out.

    schulman: -min(rho A, clip(rho, 1-eps, 1+eps) A). book: -min(rho, 1+eps) A, which for A < 0
    neither stops below 1-eps nor pulls back above 1+eps. none: -rho A. rho = pi_theta / pi_old.
    """
    ratio = (logprobs - old_logprobs).exp()
    if style == "schulman":
        bounded = ratio.clamp(1 - clip, 1 + clip)
        surrogate = torch.minimum(ratio * advantages, bounded * advantages)
    elif style == "book":
        surrogate = ratio.clamp(max=1 + clip) * advantages
    elif style == "none":
        surrogate = ratio * advantages
    else:
        raise ValueError(f"no clip style {style!r}: use schulman, book or none")
    return -aggregate(surrogate, mask, aggregation)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = None,
) -> Tensor:
    """Half the mean squared error of values [B, T] to returns; with `clip`, the worse of the
    free and the clipped error, so that moving past old_values +- clip earns nothing."""
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * masked_mean(error, mask)


def treat_missing_eos(scores: Tensor, finished: Tensor, config: PPOConfig) -> Tensor:
    """Scores [B] after the treatment of answers cut at the cap (finished [B] is False)."""
    if config.missing_eos == "subtract":
        return torch.where(finished, scores, scores - config.missing_eos_penalty)
    if config.missing_eos == "replace":
        return torch.where(finished, scores, -config.missing_eos_penalty)
    return scores


def price_and_credit(
    rollout: Rollout, config: PPOConfig, beta: float | Tensor
) -> dict[str, Tensor]:
    """kl, rewards, advantages and returns [B, T] of a rollout that has its scores.

    beta is one price, or one for each answer [B, 1]. The advantages are whitened as the config
    says; the returns never are.
    """
    mask = rollout.mask
    kl = kl_tokens(
        rollout.logprobs,
        rollout.ref_logprobs,
        mask,
        estimator=config.kl_estimator,
        aggregation=config.kl_aggregation,
    )
    scores = rollout.scores
    if config.whiten_rewards == "scores":
        scores = rescale(scores, torch.ones_like(scores, dtype=torch.bool))
    charged = beta if config.kl_place == "reward" else 0.0
    rewards = shape_rewards(scores, kl, mask, beta=charged)
    if config.whiten_rewards == "rewards":
        rewards = rescale(rewards, mask)
    if config.advantage == "gae":
        advantages = gae(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
    else:
        against = rloo_advantages if config.advantage == "rloo" else grpo_advantages
        advantages = torch.where(mask, against(rewards.sum(-1), config.group)[:, None], 0.0)
    returns = advantages + rollout.values if config.advantage == "gae" else rewards
    if config.whiten_advantages != "none":
        whitened = whiten if config.whiten_advantages == "shift_scale" else rescale
        advantages = whitened(advantages, mask)
    return {"kl": kl, "rewards": rewards, "advantages": advantages, "returns": returns}


class Step(NamedTuple):
    """What one PPO step gives back."""

    metrics: dict[str, float]
    """slash names, units in docs/metrics.md"""
    rollout: Rollout
    """the batch that was learnt from"""


class PPO:
    """A PPO run: step() when you like, change `config` between steps, save and restore exactly."""

    def __init__(
        self,
        policy: Transformer,
        reference: Transformer,
        reward_model: Scorer,
        prompts: Tensor,
        config: PPOConfig,
        *,
        seed: int = 0,
        eos: int = EOS,
        prices: Tensor | None = None,
    ):
        """prompts [N, P] is the table rollouts draw from; reward_model maps (prompts, responses,
        mask) to scores [B] in reward sd; prices [N] multiply beta for the answers to each prompt.
        Raises ValueError if policy and reference share weights, or for prices that are not charged.
        """
        if prices is not None and (config.kl_place != "reward" or len(prices) != len(prompts)):
            raise ValueError(
                f"prices [{len(prices)}] multiply the KL charged in the reward, one for each of "
                f"{len(prompts)} prompts; with kl_place {config.kl_place} leave them out"
            )
        ours = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        if any(p.untyped_storage().data_ptr() in ours for p in reference.parameters()):
            raise ValueError(
                "policy and reference share weights, so their KL would be 0 for ever; give PPO "
                "a copy: copy.deepcopy(reference)"
            )
        # a copy of a reference that an earlier run froze is frozen too: thaw it
        self.policy, self.reference = policy.requires_grad_(True), reference.requires_grad_(False)
        self.reward_model, self.prompts, self.eos = reward_model, prompts, eos
        self.prices = prices
        self.optimiser = FlatAdamW(policy, lr=config.lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self._config, self.controller = config, _controller(config)

    @property
    def config(self) -> PPOConfig:
        """The settings of the next step; assign a new one (dataclasses.replace) to change them."""
        return self._config

    @config.setter
    def config(self, config: PPOConfig) -> None:
        old, self._config = self._config, config
        kl_dials = ("beta", "kl_target", "kl_horizon")
        if any(getattr(old, name) != getattr(config, name) for name in kl_dials):
            self.controller = _controller(config)

    @property
    def beta(self) -> float:
        """The price of KL now, reward sd per nat."""
        return self.controller.beta

    def step(self) -> Step:
        """Roll out, score, update. Raises TrainingDiverged on a loss that is not finite."""
        start = time.perf_counter()
        rollout, seconds = self.rollout()
        priced = time.perf_counter()
        metrics = summarise(rollout, self.beta) | self.update(rollout)
        metrics |= {"seconds/update": time.perf_counter() - priced}
        metrics |= seconds | {"seconds/step": time.perf_counter() - start}
        self.controller.update(metrics["objective/kl_nats"], len(rollout))
        self.steps += 1
        return Step(metrics, rollout)

    def rollout(self) -> tuple[Rollout, dict[str, float]]:
        """One batch, scored and credited, and the seconds that sampling and scoring took."""
        c, clock = self._config, time.perf_counter
        start = clock()
        each = c.group if c.advantage != "gae" else 1
        drawn = torch.randint(len(self.prompts), (c.batch // each,), generator=self.generator)
        index = drawn.repeat_interleave(each).to(self.prompts.device)
        prompts = self.prompts[index]
        answers = sample(
            self.policy,
            prompts,
            max_new_tokens=c.max_new_tokens,
            eos=self.eos,
            temperature=c.temperature,
            generator=self.generator,
        )
        sampled = clock()
        rollout = self._score(prompts, answers, index)
        seconds = {"seconds/rollout": sampled - start, "seconds/scoring": clock() - sampled}
        return rollout, seconds

    @torch.no_grad()
    def _score(self, prompts: Tensor, answers: tuple[Tensor, ...], index: Tensor) -> Rollout:
        responses, mask, logprobs, values = answers
        given = (prompts, responses, mask)
        ref_logprobs, _, ref_eos = response_logprobs(
            self.reference, *given, temperature=self._config.temperature, eos=self.eos
        )
        finished = ((responses == self.eos) & mask).any(-1)
        scores = treat_missing_eos(self.reward_model(*given), finished, self._config)
        known = {"finished": finished, "ref_eos_logprobs": ref_eos, "index": index}
        fields = (*given, logprobs, ref_logprobs, values, scores)
        bare = Rollout(*fields, **known)
        beta = self.beta if self.prices is None else self.beta * self.prices[index][:, None]
        return Rollout(*fields, **known, **price_and_credit(bare, self._config, beta))

    def update(
        self, rollout: Rollout, *, progress: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """The optimiser steps that one rollout pays for; metrics averaged over them.

        `progress` is called before each of them; what it raises ends the update there.
        """
        c, rows = self._config, []
        self.optimiser.lr = c.lr
        for _ in range(c.epochs):
            order = torch.randperm(len(rollout), generator=self.generator)
            for part in order.to(rollout.mask.device).split(len(rollout) // c.minibatches):
                progress()
                loss, metrics = self.loss(rollout.select(part))
                self.optimiser.zero_grad()
                loss.backward()
                norm = self.optimiser.clip_grad(c.max_grad_norm)
                if not torch.isfinite(loss + norm):  # a finite loss may have a NaN gradient
                    raise TrainingDiverged(
                        f"PPO loss is {loss.item()}, its gradient norm {norm.item()} in step "
                        f"{self.steps + 1}: the weights of before are kept; lower ppo.lr ({c.lr}) "
                        "or look for a score that is huge"
                    )
                metrics["update/grad_norm"] = norm
                self.optimiser.step()
                rows.append(metrics)
        return {name: float(sum(float(r[name]) for r in rows) / len(rows)) for name in rows[0]}

    def loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to descend for a (mini)batch, and its metrics."""
        logprobs, values = response_logprobs(
            self.policy,
            batch.prompts,
            batch.responses,
            batch.mask,
            temperature=self._config.temperature,
        )
        return self.loss_of(logprobs, values, batch, beta=self.beta)

    def loss_of(
        self, logprobs: Tensor, values: Tensor, batch: Rollout, *, beta: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, from the policy's log-probs and values [B, T] of the batch's tokens."""
        c, mask = self._config, batch.mask
        assert batch.advantages is not None and batch.returns is not None
        how = c.loss_aggregation
        surrogate = ppo_policy_loss(
            logprobs,
            batch.logprobs,
            batch.advantages,
            mask,
            clip=c.clip,
            style=c.clip_style,
            aggregation=how,
        )
        total, metrics = surrogate, {"policy/loss": surrogate.detach()}
        if c.advantage == "gae":
            critic = value_loss(values, batch.values, batch.returns, mask, clip=c.value_clip)
            total, metrics["value/loss"] = total + c.value_coef * critic, critic.detach()
        if c.kl_place in ("loss", "book_literal"):
            # summed KL is aggregated as the surrogate is; a mean over tokens is a mean already
            ref, kind, per = batch.ref_logprobs, c.kl_estimator, c.kl_aggregation
            tokens = kl_tokens(logprobs, ref, mask, estimator=kind, aggregation=per)
            kl = aggregate(tokens, mask, how if per == "sequence_sum" else "sequence_sum")
            total, metrics["policy/kl_loss"] = total + beta * kl, kl.detach()
        return total, metrics | update_metrics(logprobs.detach(), batch, c.clip)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a later step depends on, as flat tensors for one safetensors file."""
        state = {f"policy.{k}": v.detach().clone() for k, v in self.policy.state_dict().items()}
        state |= {f"optimiser.{k}": v for k, v in self.optimiser.state_dict().items()}
        beta = torch.tensor(self.controller.beta, dtype=torch.float64)
        counts = {"steps": torch.tensor(self.steps), "beta": beta}
        return state | counts | {"generator": self.generator.get_state().clone()}

    def copy(self) -> "PPO":
        """A run in the same state with weights of its own: what it does leaves this one alone."""
        copied = PPO(
            copy.deepcopy(self.policy),
            self.reference,
            self.reward_model,
            self.prompts,
            self._config,
            eos=self.eos,
            prices=self.prices,
        )
        copied.load_state_dict(self.state_dict())
        return copied

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where state_dict() was taken; the steps that follow are equal bit for bit."""
        for prefix, part in (("policy.", self.policy), ("optimiser.", self.optimiser)):
            named = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            part.load_state_dict(named)
        self.steps, self.controller.beta = int(state["steps"]), float(state["beta"])
        self.generator.set_state(state["generator"])


def _controller(config: PPOConfig) -> FixedKL | AdaptiveKL:
    if config.kl_target is None:
        return FixedKL(config.beta)
    return AdaptiveKL(config.beta, config.kl_target, config.kl_horizon)
