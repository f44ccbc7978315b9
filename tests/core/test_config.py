"""Every config refuses what cannot work: the message names the field, the value and the way out."""

import inspect
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from minirlhf.ppo import PPOConfig
from minirlhf.reward import RewardConfig
from minirlhf.sft import SFTConfig

NAN = float("nan")
POSITIVE = "must be positive"
NOT_NEGATIVE = "must be at least 0"
SHARE = r"must be in \[0, 1\]"
POSITIVE_OR_NONE = r"must be positive \(or none\)"
BAD_PPO = [
    *(
        (name, value, POSITIVE)
        for name in ("batch", "max_new_tokens", "temperature", "epochs", "minibatches", "lr")
        for value in (0, -1)
    ),
    ("lr", NAN, POSITIVE),
    *((name, -0.1, NOT_NEGATIVE) for name in ("beta", "value_coef", "missing_eos_penalty")),
    ("beta", NAN, NOT_NEGATIVE),
    *((name, v, SHARE) for name in ("gamma", "lam") for v in (-0.1, 1.1, NAN)),
    *(
        (name, v, POSITIVE_OR_NONE)
        for name in ("kl_target", "value_clip", "kl_horizon", "max_grad_norm")
        for v in (0.0, -1.0)
    ),
    *(("clip", v, "must lie between 0 and 1, for example 0.2") for v in (0.0, 1.0, 1.5, -0.2, NAN)),
    ("minibatches", 3, r"must divide ppo.batch \(128\)"),
    ("kl_place", "rewards", "must be one of reward, loss, book_literal, none"),
    ("kl_estimator", "k4", "must be one of k1, k2, k3"),
    ("kl_aggregation", "mean", "must be one of sequence_sum, token_mean"),
    ("clip_style", "shulman", "must be one of schulman, book, none"),
    ("advantage", "reinforce", "must be one of gae, rloo, grpo"),
    ("whiten_advantages", True, "must be one of none, scale, shift_scale"),
    ("whiten_rewards", "yes", "must be one of none, scores, rewards"),
    ("missing_eos", "penalty", "must be one of subtract, replace, none"),
    ("loss_aggregation", "mean", "must be one of token_mean, sequence_mean, sequence_sum"),
]


@pytest.mark.parametrize("name, value, hint", BAD_PPO)
def test_ppo_config(name, value, hint):
    with pytest.raises(ValueError, match=rf"^ppo\.{name} is {re.escape(str(value))}; it {hint}"):
        PPOConfig(**{name: value})


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
@pytest.mark.parametrize("group", [1, 3])
def test_groups(advantage, group):
    with pytest.raises(
        ValueError, match=rf"ppo.group is {group}; it must be >= 2 and divide ppo.b"
    ):
        PPOConfig(advantage=advantage, group=group)
    PPOConfig(group=group)  # of no matter where a critic is the baseline


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_book_knows_one_estimator(estimator):
    with pytest.raises(ValueError, match=rf"ppo.kl_estimator is {estimator}; it must be k1 with"):
        PPOConfig(kl_place="book_literal", kl_estimator=estimator)


def test_an_adaptive_beta_cannot_start_at_zero():
    with pytest.raises(ValueError, match=r"ppo.beta is 0.0; it must be positive where kl_target"):
        PPOConfig(beta=0.0, kl_target=6.0)
    PPOConfig(beta=0.0)


def test_a_dial_turned_mid_run_is_checked_too():
    with pytest.raises(ValueError, match=r"ppo\.clip is 2"):
        replace(PPOConfig(), clip=2.0)


@pytest.mark.parametrize("name", ["epochs", "batch", "lr", "max_grad_norm"])
@pytest.mark.parametrize("value", [0, -1, NAN])
def test_reward_config(name, value):
    with pytest.raises(ValueError, match=rf"reward.{name} is {value}; it must be positive"):
        RewardConfig(**{name: value})


def test_reward_weight_decay():
    with pytest.raises(ValueError, match=r"reward.weight_decay is -0.1; it must be at least 0"):
        RewardConfig(weight_decay=-0.1)


@pytest.mark.parametrize("name", ["demonstrations", "steps", "batch", "lr", "max_grad_norm"])
@pytest.mark.parametrize("value", [0, -1, NAN])
def test_sft_config(name, value):
    with pytest.raises(ValueError, match=rf"sft.{name} is {value}; it must be positive"):
        SFTConfig(**{name: value})


@pytest.mark.parametrize("config", [PPOConfig(), RewardConfig(), SFTConfig()])
def test_configs_are_frozen_and_explain_every_field(config):
    with pytest.raises(AttributeError):
        config.lr = 1.0
    source = inspect.getsource(type(config))
    for name in type(config).__dataclass_fields__:
        assert re.search(rf'\n    {name}: .*\n    """\S', source), f"{name} has no meaning under it"


def test_settings_are_read_without_torch():
    """So that --help answers at once."""
    code = "import sys, minirlhf.config; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["False"], found.stderr
