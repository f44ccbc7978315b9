"""PPO for language models: the losses, and a loop that the caller drives one step at a time.

    run = PPO(policy, reference, reward_model, prompts, config, seed=0)
    step = run.step()                               # Step(metrics, rollout)
    run.config = replace(run.config, beta=0.2)      # a dial turned mid-run acts from the next step

One step: sample answers; score them under the reference and the reward model; shape rewards and
estimate advantages; then `epochs` passes over the batch in `minibatches` optimiser steps each.
Departures from Schulman et al.: the KL penalty to a frozen reference (in the reward, in the loss,
as a textbook's formula reads, or absent), one trunk for policy and critic, group baselines as
alternatives to the critic. Left out: several devices. Nothing
here reads a word: prompts and answers are ids.

Sources: Schulman et al. (2017, arXiv 1707.06347, eq. 7 and 9); Ziegler et al. (2019, arXiv
1909.08593, eq. 2); Xiao and Zhu (2025, arXiv 2501.09223, chapter 4) for the `book` forms.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf.advantages import masked_mean, price_and_credit, treat_missing_eos
from minirlhf.config import PPOConfig
from minirlhf.engine.adamw import FlatAdamW
from minirlhf.generate import sample
from minirlhf.kl import AdaptiveKL, FixedKL, kl_tokens
from minirlhf.metrics import summarise, update_metrics
from minirlhf.model import Transformer, response_logprobs
from minirlhf.rollout import Rollout
from minirlhf.text import EOS

Scorer = Callable[
    [Int[Tensor, "B P"], Int[Tensor, "B T"], Bool[Tensor, "B T"]], Float[Tensor, " B"]
]
"""(prompts, responses, mask) -> the scores of the answers, reward sd"""


class TrainingDiverged(RuntimeError):
    """A loss stopped being finite; the weights are those of before the failed minibatch."""


def aggregate(
    x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], how: str = "token_mean"
) -> Float[Tensor, ""]:
    """Per-token terms [B, T] to one scalar: token_mean, sequence_mean or sequence_sum."""
    if how == "token_mean":
        return masked_mean(x, mask)  # every token weighs alike: a long answer weighs more
    sums = torch.where(mask, x, 0.0).sum(-1)
    if how == "sequence_mean":
        sums = sums / mask.sum(-1).clamp(min=1)  # every answer weighs alike: 1 / |y|
    elif how != "sequence_sum":
        raise ValueError(f"no aggregation {how!r}: token_mean, sequence_mean or sequence_sum")
    return sums.mean()


def ppo_policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip: float = 0.2,
    style: Literal["schulman", "book", "none"] = "schulman",
    aggregation: str = "token_mean",
) -> Float[Tensor, ""]:
    """The clipped surrogate, negated for descent; [B, T] inputs, a scalar out.

    schulman: -min(rho A, clip(rho, 1-eps, 1+eps) A). book: -min(rho, 1+eps) A, which for A < 0
    neither stops below 1-eps nor pulls back above 1+eps. none: -rho A. rho = pi_theta / pi_old.
    """
    ratio = (logprobs - old_logprobs).exp()
    if style == "schulman":
        # Schulman et al. (2017, eq. 7): the worse of the two, so that moving further than the
        # clip earns nothing and going back is always worth it
        bounded = ratio.clamp(1 - clip, 1 + clip)
        surrogate = torch.minimum(ratio * advantages, bounded * advantages)
    elif style == "book":
        # Xiao and Zhu (2025, chapter 4)
        surrogate = ratio.clamp(max=1 + clip) * advantages
    elif style == "none":
        surrogate = ratio * advantages
    else:
        raise ValueError(f"no clip style {style!r}: use schulman, book or none")
    return -aggregate(surrogate, mask, aggregation)


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip: float | None = None,
) -> Float[Tensor, ""]:
    """Half the mean squared error of values [B, T] to returns; with `clip`, the worse of the
    free and the clipped error, so that moving past old_values +- clip earns nothing."""
    error = (values - returns).square()  # L^VF of Schulman et al. (2017, eq. 9)
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * masked_mean(error, mask)


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
        prompts: Int[Tensor, "N P"],
        config: PPOConfig,
        *,
        seed: int = 0,
        eos: int = EOS,
        prices: Float[Tensor, " N"] | None = None,
    ):
        """prompts [N, P] is the table rollouts draw from; reward_model maps (prompts, responses,
        mask) to scores [B] in reward sd; prices [N] multiply beta for the answers to each prompt.
        Raises ValueError if policy and reference share weights, or for prices that are not charged.
        """
        _demand_two_models(policy, reference)
        if prices is not None and (config.kl_place != "reward" or len(prices) != len(prompts)):
            raise ValueError(
                f"prices [{len(prices)}] multiply the KL charged in the reward, one for each of "
                f"{len(prompts)} prompts; with kl_place {config.kl_place} leave them out"
            )
        # a copy of a reference that an earlier run froze is frozen too: thaw it
        self.policy = policy.requires_grad_(True)
        self.reference = reference.requires_grad_(False)
        self.reward_model = reward_model
        self.prompts = prompts
        self.prices = prices
        self.eos = eos
        self.optimiser = FlatAdamW(policy, lr=config.lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self._config = config
        self.controller = _controller(config)

    @property
    def config(self) -> PPOConfig:
        """The settings of the next step; assign a new one (dataclasses.replace) to change them."""
        return self._config

    @config.setter
    def config(self, config: PPOConfig) -> None:
        old = self._config
        self._config = config
        # another dial leaves an adaptive beta where it has moved to
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
        scored = time.perf_counter()
        metrics = {**summarise(rollout, self.beta), **self.update(rollout)}
        end = time.perf_counter()
        metrics["seconds/update"] = end - scored
        metrics.update(seconds)
        metrics["seconds/step"] = end - start
        # last, so that the batch was charged the beta that its metrics report
        self.controller.update(metrics["objective/kl_nats"], len(rollout))
        self.steps += 1
        return Step(metrics, rollout)

    def rollout(self) -> tuple[Rollout, dict[str, float]]:
        """One batch, scored and credited, and the seconds that sampling and scoring took."""
        config = self._config
        start = time.perf_counter()
        # a group baseline needs several answers to a prompt, as neighbours in the batch
        each = 1 if config.advantage == "gae" else config.group
        drawn = torch.randint(len(self.prompts), (config.batch // each,), generator=self.generator)
        index = drawn.repeat_interleave(each).to(self.prompts.device)
        prompts = self.prompts[index]
        answers = sample(
            self.policy,
            prompts,
            max_new_tokens=config.max_new_tokens,
            eos=self.eos,
            temperature=config.temperature,
            generator=self.generator,
        )
        sampled = time.perf_counter()
        rollout = self._score(prompts, answers, index)
        scored = time.perf_counter()
        seconds = {"seconds/rollout": sampled - start, "seconds/scoring": scored - sampled}
        return rollout, seconds

    @torch.no_grad()
    def _score(
        self, prompts: Int[Tensor, "B P"], answers: tuple[Tensor, ...], index: Int[Tensor, " B"]
    ) -> Rollout:
        """What was sampled, with the reference's opinion, its scores and its advantages."""
        responses, mask, logprobs, values = answers
        ref_logprobs, _, ref_eos_logprobs = response_logprobs(
            self.reference,
            prompts,
            responses,
            mask,
            temperature=self._config.temperature,  # that of sampling, or KL is of another policy
            eos=self.eos,
        )
        # within the mask: an EOS of the prompt, or behind the answer, ends nothing
        finished = ((responses == self.eos) & mask).any(-1)
        scores = self.reward_model(prompts, responses, mask)
        scores = treat_missing_eos(scores, finished, self._config)
        rollout = Rollout(
            prompts=prompts,
            responses=responses,
            mask=mask,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            scores=scores,
            finished=finished,
            ref_eos_logprobs=ref_eos_logprobs,
            index=index,
        )
        beta = self.beta
        if self.prices is not None:
            beta = beta * self.prices[index][:, None]
        return replace(rollout, **price_and_credit(rollout, self._config, beta))

    def update(
        self, rollout: Rollout, *, progress: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """The optimiser steps that one rollout pays for; metrics averaged over them.

        `progress` is called before each of them; what it raises ends the update there.
        """
        config = self._config
        self.optimiser.lr = config.lr
        rows: list[dict[str, Tensor]] = []
        for _ in range(config.epochs):
            order = torch.randperm(len(rollout), generator=self.generator)
            order = order.to(rollout.mask.device)
            for part in order.split(len(rollout) // config.minibatches):
                progress()
                loss, metrics = self.loss(rollout.select(part))
                self.optimiser.zero_grad()
                loss.backward()
                norm = self.optimiser.clip_grad(config.max_grad_norm)
                if not torch.isfinite(loss + norm):  # a finite loss may have a NaN gradient
                    raise TrainingDiverged(
                        f"PPO loss is {loss.item()}, its gradient norm {norm.item()} in step "
                        f"{self.steps + 1}: the weights of before are kept; lower ppo.lr "
                        f"({config.lr}) or look for a score that is huge"
                    )
                self.optimiser.step()
                metrics["update/grad_norm"] = norm
                rows.append(metrics)
        return {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}

    def loss(self, batch: Rollout) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
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
        self,
        logprobs: Float[Tensor, "B T"],
        values: Float[Tensor, "B T"],
        batch: Rollout,
        *,
        beta: float,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The same, from the policy's log-probs and values [B, T] of the batch's tokens."""
        config = self._config
        mask = batch.mask
        assert batch.advantages is not None and batch.returns is not None
        total = ppo_policy_loss(
            logprobs,
            batch.logprobs,
            batch.advantages,
            mask,
            clip=config.clip,
            style=config.clip_style,
            aggregation=config.loss_aggregation,
        )
        metrics = {"policy/loss": total.detach()}
        if config.advantage == "gae":
            critic = value_loss(values, batch.values, batch.returns, mask, clip=config.value_clip)
            total = total + config.value_coef * critic
            metrics["value/loss"] = critic.detach()
        if config.kl_place in ("loss", "book_literal"):
            tokens = kl_tokens(
                logprobs,
                batch.ref_logprobs,
                mask,
                estimator=config.kl_estimator,
                aggregation=config.kl_aggregation,
            )
            # summed KL is aggregated as the surrogate is; a mean over tokens is a mean already
            how = config.loss_aggregation
            if config.kl_aggregation == "token_mean":
                how = "sequence_sum"
            kl = aggregate(tokens, mask, how)
            total = total + beta * kl
            metrics["policy/kl_loss"] = kl.detach()
        metrics.update(update_metrics(logprobs.detach(), batch, config.clip))
        return total, metrics

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a later step depends on, as flat tensors for one safetensors file."""
        state = {}
        for name, tensor in self.policy.state_dict().items():
            state[f"policy.{name}"] = tensor.detach().clone()
        for name, tensor in self.optimiser.state_dict().items():
            state[f"optimiser.{name}"] = tensor
        state["steps"] = torch.tensor(self.steps)
        # float64, as a Python float is: an adaptive beta goes on where it was
        state["beta"] = torch.tensor(self.controller.beta, dtype=torch.float64)
        state["generator"] = self.generator.get_state().clone()
        return state

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
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            part.load_state_dict(own)
        self.steps = int(state["steps"])
        self.controller.beta = float(state["beta"])
        self.generator.set_state(state["generator"])


def _demand_two_models(policy: Transformer, reference: Transformer) -> None:
    """Raises ValueError if the two share a weight, which a step would move in both."""
    ours = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    if any(p.untyped_storage().data_ptr() in ours for p in reference.parameters()):
        raise ValueError(
            "policy and reference share weights, so their KL would be 0 for ever; give PPO "
            "a copy: copy.deepcopy(reference)"
        )


def _controller(config: PPOConfig) -> FixedKL | AdaptiveKL:
    if config.kl_target is None:
        return FixedKL(config.beta)
    return AdaptiveKL(config.beta, config.kl_target, config.kl_horizon)
