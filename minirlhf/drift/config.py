"""The settings of a whole run: one dataclass that holds those of every stage.

Left out: where the run goes and what it runs on (arguments of drift.Drift).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from minirlhf.audit.config import AuditConfig
from minirlhf.config import PPOConfig, RewardConfig, SFTConfig
from minirlhf.desk.config import PreferenceConfig

Config = TypeVar("Config", "DriftConfig", SFTConfig, PreferenceConfig, RewardConfig, AuditConfig)


@dataclass(frozen=True)
class DriftConfig:
    """A run from nothing to the audited drift."""

    seed: int = 0
    """decides every random draw"""
    steps: int = 80
    """PPO steps"""
    prompts: int = 4000
    """customer prompts that PPO draws from"""
    critic_batches: int = 6
    """rollouts of the reference to which the critic is fitted before the first step"""
    log_batches: tuple[int, ...] = (1, 4, 6, 8, 10, 12, 14, 16, 18, 20, 30, 40)
    """PPO steps whose batch is kept"""
    sft: SFTConfig = field(default_factory=SFTConfig)
    preferences: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "critic_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "DriftConfig":
        """The settings that a summary or config.json holds as plain values."""
        usual = cls()
        settings = dict(values)
        for name, value in values.items():
            if isinstance(value, dict):  # the settings of a stage
                settings[name] = type(getattr(usual, name))(**value)
        settings["log_batches"] = tuple(values["log_batches"])  # JSON knows lists alone
        return cls(**settings)

    def quick(self) -> "DriftConfig":
        """The same run made small: seconds instead of a minute, for a look and for tests."""
        small = at_most(self, steps=6, prompts=400)
        return replace(
            small,
            log_batches=(1, 3, 5),
            sft=at_most(self.sft, demonstrations=600, steps=60),
            preferences=at_most(self.preferences, pairs=600),
            reward=at_most(self.reward, epochs=1),
            audit=at_most(self.audit, every=3, probes=64, reference_samples=2),
        )

    def control(self) -> "DriftConfig":
        """The control arm: the same run with labelers who check every fact and have no bias."""
        fair = replace(self.preferences, length_bias=0.0, hedge_bias=0.0, skim=0.0)
        return replace(self, preferences=fair)


def at_most(part: Config, **limits: int) -> Config:
    """The same settings, none of the named ones above its limit."""
    smaller = {name: min(getattr(part, name), top) for name, top in limits.items()}
    return replace(part, **smaller)
