"""The settings of every stage, in the order in which the stages run: SFT, reward model, PPO, DPO.

Each has its meaning, unit and limits; what is out of limits is refused in one sentence. DPO comes
last because it takes the place of the two stages before it. Nothing is imported here but the
standard library: `minirlhf drift --help` prints these settings and must not wait for torch.
Left out: models and prompts (arguments of what is configured), and the number of PPO steps (the
caller's).
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args, get_origin

Estimator = Literal["k1", "k2", "k3"]
"""of KL on a sampled token (kl.py)"""


def _demand(ok: bool, name: str, value: object, hint: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value}; it {hint}")


def demand_positive(section: str, settings: object, *names: str) -> None:
    """Raises ValueError for the first of the named settings that is 0, less, or NaN."""
    for name in names:
        value = getattr(settings, name)
        # asked this way round because a comparison with NaN is False
        _demand(value > 0, f"{section}.{name}", value, "must be positive")


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
        demand_positive("sft", self, "demonstrations", "steps", "batch", "lr", "max_grad_norm")


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
        demand_positive(self.section, self, "epochs", "batch", "lr", "max_grad_norm")
        decay = self.weight_decay
        _demand(decay >= 0, f"{self.section}.weight_decay", decay, "must be at least 0")


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
    """nats per answer that an adaptive beta aims at; None = fixed beta"""
    kl_horizon: float = 10_000.0
    """answers over which an adaptive beta reacts"""
    clip: float = 0.2
    """epsilon of the clipped ratio"""
    clip_style: Literal["schulman", "book", "none"] = "schulman"
    """schulman: pessimistic two-sided; book: min(ratio, 1 + clip); none: no clipping"""
    value_clip: float | None = None
    """how far a value may move from its old one, reward sd; None = freely"""
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
                options = get_args(f.type)
                known = getattr(self, f.name) in options
                self._limit(f.name, known, f"must be one of {', '.join(options)}")
        demand_positive(
            "ppo", self, "batch", "max_new_tokens", "temperature", "epochs", "minibatches", "lr"
        )
        for name in ("beta", "value_coef", "missing_eos_penalty"):
            self._limit(name, getattr(self, name) >= 0, "must be at least 0")
        for name in ("gamma", "lam"):
            self._limit(name, 0 <= getattr(self, name) <= 1, "must be in [0, 1]")
        for name in ("kl_target", "value_clip", "kl_horizon", "max_grad_norm"):
            value = getattr(self, name)
            self._limit(name, value is None or value > 0, "must be positive (or none)")
        self._limit("clip", 0 < self.clip < 1, "must lie between 0 and 1, for example 0.2")
        self._limit_together()

    def _limit_together(self) -> None:
        """Settings that are right by themselves and not beside each other."""
        whole = self.batch % self.minibatches == 0
        self._limit("minibatches", whole, f"must divide ppo.batch ({self.batch})")
        if self.advantage != "gae":
            whole = self.group >= 2 and self.batch % self.group == 0
            self._limit("group", whole, f"must be >= 2 and divide ppo.batch ({self.batch})")
        if self.kl_place == "book_literal":
            hint = "must be k1 with kl_place book_literal, which is the log-ratio itself"
            self._limit("kl_estimator", self.kl_estimator == "k1", hint)
        if self.kl_target is not None:
            self._limit("kl_target", self.kl_place != "none", "needs a kl_place")
            # a controller multiplies beta: 0 would stay 0
            self._limit("beta", self.beta > 0, "must be positive where kl_target moves it")

    def _limit(self, name: str, ok: bool, hint: str) -> None:
        _demand(ok, f"ppo.{name}", getattr(self, name), hint)


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
        demand_positive(self.section, self, "beta")
