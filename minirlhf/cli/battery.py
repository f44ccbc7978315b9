"""`minirlhf battery`: why PPO with some settings drifts, told by nine short runs."""

from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from minirlhf.cli.terminal import Bars
from minirlhf.config import PPOConfig


@dataclass(frozen=True)
class Options:
    """What `minirlhf battery` can be given: the settings that are diagnosed, and the desk."""

    ppo: PPOConfig = field(default_factory=PPOConfig)
    gap: float = 0.3
    """what the reward model pays more for the verbose answer, reward sd"""
    refresh: int | None = None
    """steps after which the reference becomes the policy; None = it stays"""
    seed: int = 0
    """seed of the runs"""


def run(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Diagnose the settings, and print the evidence line by line."""
    from minirlhf.autopsy.battery import diagnose
    from minirlhf.autopsy.battery_desk import TwoAnswerDesk
    from minirlhf.engine import compute

    compute.use(1)  # eight prompts: more cores only wait for one another
    desk = TwoAnswerDesk(options.ppo, options.gap, refresh=options.refresh, seed=options.seed)
    print(
        "Nine short runs of PPO with these settings on a desk of eight prompts with two one-word\n"
        "answers, V and C. The settings are diagnosed there; no run on the support desk is read.\n"
        "Discount, aggregation, EOS and --ppo.batch play no part with answers of one word."
    )
    with closing(Bars()) as bars:
        found, _ = diagnose(desk, lambda name, done, total: bars.move("runs", done, total, name))
    print(found.table())
    return 0
