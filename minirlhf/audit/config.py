"""When and on what a policy is audited."""

from dataclasses import dataclass

from minirlhf.config import demand_positive


@dataclass(frozen=True)
class AuditConfig:
    """When and on what the policy is audited."""

    every: int = 10
    """PPO steps between two audits"""
    probes: int = 256
    """fixed prompts, half of them from each kind of question"""
    reference_samples: int = 4
    """reference answers per probe, by which its stratum is measured and scores are scaled"""
    brief_below: float = 14.0
    """a prompt is brief if the reference's answers average fewer tokens than this"""
    verbose_padding: int = 8
    """padding, in tokens, from which an answer counts as verbose in a batch"""

    def __post_init__(self) -> None:
        demand_positive(
            "audit",
            self,
            "every",
            "probes",
            "reference_samples",
            "brief_below",
            "verbose_padding",
        )
