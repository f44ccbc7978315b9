"""docs/metrics.md and the code name the same metrics, each once, each with a unit."""

import copy
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import ragged_batch, tiny_model

from minirlhf.ppo import PPO, PPOConfig
from minirlhf.reward import RewardConfig, RewardModel, train_reward
from minirlhf.sft import SFTConfig, train_sft

TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def listed() -> list[tuple[str, str, str]]:
    return ROW.findall(TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def emitted() -> dict[str, float]:
    found: dict[str, float] = {}
    reference = tiny_model(0, dtype=torch.float32)
    plain = PPOConfig(batch=8, max_new_tokens=4, epochs=1)
    in_loss = replace(plain, kl_place="loss", kl_estimator="k2")
    for config in (plain, in_loss, replace(plain, advantage="rloo")):
        policy = copy.deepcopy(reference)
        run = PPO(policy, reference, lambda p, r, m: m.sum(1).float(), ragged_batch(0)[0], config)
        found |= run.step().metrics
    prompts, chosen, mask = ragged_batch(0, batch=8)
    _, rejected, other = ragged_batch(1, batch=8)
    pairs = SimpleNamespace(
        prompts=prompts, chosen=chosen, chosen_mask=mask, rejected=rejected, rejected_mask=other
    )
    g = torch.Generator()
    model = RewardModel(tiny_model(1, dtype=torch.float32))
    found |= train_reward(model, pairs, RewardConfig(epochs=1, batch=8), generator=g)[-1]
    sft = SFTConfig(steps=1, batch=4)
    return found | train_sft(policy, prompts, chosen, mask, sft, generator=g)[-1]


def test_what_is_emitted_is_listed_and_the_reverse(emitted):
    names = {name for name, _, _ in listed()}
    assert set(emitted) - names == set(), "emitted, but not in docs/metrics.md"
    assert names - set(emitted) == set(), "in docs/metrics.md, but never emitted"


def test_each_is_defined_once_with_a_unit_and_a_slash():
    rows = listed()
    assert max(Counter(name for name, _, _ in rows).values()) == 1
    for name, unit, meaning in rows:
        assert re.fullmatch(r"[a-z]+/[a-z_]+", name) and unit.strip() and len(meaning) > 5, name


def test_every_metric_is_a_finite_number(emitted):
    for name, value in emitted.items():
        assert isinstance(value, float) and value == value and abs(value) < float("inf"), name
