"""The settings of a PPO run: every one with its meaning, unit and limits.

Left out: the models and the prompts (arguments of PPO), and the number of steps (the caller's).
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args, get_origin

from minirlhf.kl import Estimator


@dataclass(frozen=True)
class PPOConfig:
    """Everything that decides a PPO run besides its models and prompts."""

    batch: int = 128
    """answers in one rollout"""
    max_new_tokens: int = 48
    """cap on an answer's length, tokens"""
    temperature: float = 1.0
    """sampling temperature; policy and reference are scored at it too"""
    epochs: int = 1
    """passes over a rollout"""
    minibatches: int = 2
    """optimiser steps in a pass"""
    lr: float = 3.5e-4
    """AdamW learning rate"""
    max_grad_norm: float = 1.0
    """gradient norm above which a step is scaled down"""
    beta: float = 0.07
    """price of KL, reward sd per nat (the starting value if adaptive); with KL in the loss the
    unit is that of the advantages, so whitening rescales it there"""
    kl_place: Literal["reward", "loss", "book_literal", "none"] = "reward"
    """where the penalty acts; book_literal differentiates the sampled log-ratio itself"""
    kl_estimator: Estimator = "k1"
    """k1, k2 or k3 (kl.py)"""
    kl_aggregation: Literal["sequence_sum", "token_mean"] = "sequence_sum"
    """an answer pays the sum of its tokens' KL, or their mean"""
    kl_target: float | None = None
    """nats per answer that an adaptive beta aims at; none = fixed beta"""
    kl_horizon: float = 10_000.0
    """answers over which an adaptive beta reacts"""
    clip: float = 0.2
    """epsilon of the clipped ratio"""
    clip_style: Literal["schulman", "book", "none"] = "schulman"
    """schulman: pessimistic two-sided; book: min(ratio, 1 + clip); none: no clipping"""
    value_clip: float | None = None
    """how far a value may move from its old one, reward sd; none = freely"""
    value_coef: float = 0.03
    """weight of the value loss"""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """critic and GAE, or a baseline from the other answers to the same prompt"""
    group: int = 4
    """answers to one prompt (rloo, grpo)"""
    gamma: float = 1.0
    """discount per token"""
    lam: float = 1.0
    """GAE lambda; 1 carries the whole score to every token"""
    whiten_advantages: Literal["none", "scale", "shift_scale"] = "scale"
    """over the whole rollout; scale keeps every sign, shift_scale centres the batch as well"""
    whiten_rewards: Literal["none", "scores", "rewards"] = "none"
    """divide scores by their sd before KL is added (this rescales beta!), or rewards after"""
    missing_eos: Literal["subtract", "replace", "none"] = "subtract"
    """what happens to the score of an answer that was cut at the cap"""
    missing_eos_penalty: float = 1.0
    """how much is subtracted, or the negative of what replaces the score, reward sd"""
    loss_aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """mean over tokens; mean of each answer's mean (1/|y|); or mean of each answer's sum"""

    def __post_init__(self) -> None:
        for f in fields(self):  # a misspelt option would silently mean another one
            if get_origin(f.type) is Literal:
                value, options = getattr(self, f.name), get_args(f.type)
                _demand(value in options, f.name, value, f"must be one of {', '.join(options)}")
        for name in ("batch", "max_new_tokens", "temperature", "epochs", "minibatches", "lr"):
            _demand(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("beta", "value_coef", "missing_eos_penalty"):
            _demand(getattr(self, name) >= 0, name, getattr(self, name), "must be at least 0")
        for name in ("gamma", "lam"):
            _demand(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be in [0, 1]")
        for name in ("kl_target", "value_clip", "kl_horizon", "max_grad_norm"):
            value = getattr(self, name)
            _demand(value is None or value > 0, name, value, "must be positive (or none)")
        _demand(0 < self.clip < 1, "clip", self.clip, "must lie between 0 and 1, for example 0.2")
        _demand(
            self.batch % self.minibatches == 0,
            "minibatches",
            self.minibatches,
            f"must divide ppo.batch ({self.batch})",
        )
        if self.advantage != "gae":
            ok = self.group >= 2 and self.batch % self.group == 0
            _demand(ok, "group", self.group, f"must be >= 2 and divide ppo.batch ({self.batch})")
        if self.kl_place == "book_literal":
            hint = "must be k1 with kl_place book_literal, which is the log-ratio itself"
            _demand(self.kl_estimator == "k1", "kl_estimator", self.kl_estimator, hint)
        if self.kl_target is not None:
            _demand(self.kl_place != "none", "kl_target", self.kl_target, "needs a kl_place")
            _demand(self.beta > 0, "beta", self.beta, "must be positive where kl_target moves it")


def _demand(ok: bool, name: str, value: object, hint: str) -> None:
    if not ok:
        raise ValueError(f"ppo.{name} is {value}; it {hint}")


@dataclass(frozen=True)
class SFTConfig:
    """How the reference is trained."""

    demonstrations: int = 12_000
    """prompt-answer pairs drawn from the desk"""
    steps: int = 400
    """optimiser steps"""
    batch: int = 64
    """demonstrations in a step"""
    lr: float = 6e-3
    """learning rate after the first tenth of the steps; it then falls linearly to 0"""
    max_grad_norm: float = 1.0
    """gradient norm above which a step is scaled down"""

    def __post_init__(self) -> None:
        for name in ("demonstrations", "steps", "batch", "lr", "max_grad_norm"):
            if not getattr(self, name) > 0:  # NaN fails too
                raise ValueError(f"sft.{name} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True)
class RewardConfig:
    """How the reward model is trained."""

    section: ClassVar = "reward"
    """what these settings are called in messages and metrics"""
    epochs: int = 2
    """passes over the pairs"""
    batch: int = 64
    """pairs in a step"""
    lr: float = 2e-3
    """learning rate after the first tenth of the steps; it then falls linearly to 0"""
    weight_decay: float = 0.01
    """AdamW decay"""
    max_grad_norm: float = 1.0
    """gradient norm above which a step is scaled down"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "lr", "max_grad_norm"):
            if not getattr(self, name) > 0:  # NaN fails too
                given = f"{self.section}.{name} is {getattr(self, name)}"
                raise ValueError(f"{given}; it must be positive")
        if not self.weight_decay >= 0:
            given = f"{self.section}.weight_decay is {self.weight_decay}"
            raise ValueError(f"{given}; it must be at least 0")


@dataclass(frozen=True)
class DPOConfig(RewardConfig):
    """How a policy is trained on pairs directly; steps and rates as in a reward model's fit."""

    section: ClassVar = "dpo"
    beta: float = 0.1
    """price of moving away from the reference, nats of label per nat of log-ratio"""
    epochs: int = 1
    """passes over the pairs"""
    lr: float = 2e-4
    """learning rate after the first tenth of the steps; it then falls linearly to 0"""
    weight_decay: float = 0.0
    """AdamW decay; the reference was trained without"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"dpo.beta is {self.beta}; it must be positive")
