"""The whole run, made tiny, and ways to break it."""

import json
from pathlib import Path

import numpy as np

from minirlhf.audit.config import AuditConfig
from minirlhf.desk.config import PreferenceConfig
from minirlhf.drift.run import Drift, DriftConfig
from minirlhf.ppo import PPO, PPOConfig
from minirlhf.reward import RewardConfig, RewardModel
from minirlhf.sft import SFTConfig

TINY = DriftConfig(
    seed=3,
    steps=4,
    prompts=40,
    critic_batches=1,
    log_batches=(1, 2, 3),
    sft=SFTConfig(demonstrations=100, steps=10, batch=16),
    preferences=PreferenceConfig(pairs=110, holdout=0.1),
    reward=RewardConfig(epochs=1, batch=32),
    ppo=PPOConfig(batch=16, epochs=1, max_new_tokens=12, kl_target=1.0, kl_horizon=50.0),
    audit=AuditConfig(every=2, probes=8, reference_samples=2, brief_below=40.0),
)


def strict(path: Path):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def run(out: Path | None, config: DriftConfig = TINY, **options) -> dict:
    return Drift(config, out, **options).run()


def no_scrap(out: Path) -> bool:
    return not list(out.rglob("*.part"))


def nan_scores(monkeypatch) -> None:
    score, calls = RewardModel.score, [0]

    def broken(self, *given, **options):
        scores = score(self, *given, **options)
        if len(scores) == TINY.ppo.batch:  # not the audit's, which has 8 probes
            calls[0] += 1
            scores = scores * (np.nan if calls[0] > 4 else 1.0)  # critic, steps 1, 2, 3
        return scores

    monkeypatch.setattr(RewardModel, "score", broken)


def nan_loss(monkeypatch) -> None:
    loss = PPO.loss

    def broken(self, batch):
        total, metrics = loss(self, batch)
        return total * (np.nan if self.steps == 3 else 1.0), metrics

    monkeypatch.setattr(PPO, "loss", broken)
