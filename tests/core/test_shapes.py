"""The shapes in the core's signatures: a test run refuses what breaks them, a run asks nothing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import shapes
import torch
from fakes import fake_rollout
from jaxtyping import TypeCheckError

import minirlhf
from minirlhf.advantages import gae, masked_mean, price_and_credit, shape_rewards
from minirlhf.kl import exact_kl, kl_k1, kl_tokens
from minirlhf.ppo import PPOConfig, ppo_policy_loss, value_loss

B, T = 4, 3
TOKENS, MASK = torch.zeros(B, T), torch.ones(B, T, dtype=torch.bool)


def assert_refused(parameter: str):
    return pytest.raises(TypeCheckError, match=f"typechecking parameter '{parameter}'")


def test_values_with_one_state_too_many_are_refused():
    with assert_refused("values"):
        gae(TOKENS, torch.zeros(B, T + 1), MASK)


def test_a_mask_that_lies_on_its_side_is_refused():
    with assert_refused("mask"):
        ppo_policy_loss(TOKENS, TOKENS, TOKENS, MASK.T)
    with assert_refused("mask"):
        value_loss(TOKENS, TOKENS, TOKENS, MASK.T)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_mask_of_numbers_is_refused(dtype):
    with assert_refused("mask"):
        masked_mean(TOKENS, MASK.to(dtype))


def test_one_score_a_token_is_refused():
    with assert_refused("scores"):
        shape_rewards(TOKENS, TOKENS, MASK, beta=0.1)


def test_a_price_for_each_answer_is_a_column():
    """[B] would be spread over tokens where B = T, and then charge each token another price."""
    with assert_refused("beta"):
        shape_rewards(torch.zeros(B), TOKENS, MASK, beta=torch.ones(B))
    with assert_refused("beta"):
        price_and_credit(fake_rollout(0), PPOConfig(), torch.ones(6))


def test_two_vocabularies_and_two_batches_are_refused():
    with assert_refused("ref_logits"):
        exact_kl(torch.zeros(B, T, 5), torch.zeros(B, T, 6))
    with assert_refused("ref_logprobs"):
        kl_k1(TOKENS, torch.zeros(1, T))


def test_another_number_of_tokens_is_refused_whatever_the_axes_before():
    many = TOKENS.expand(2, B, T)
    assert kl_tokens(many, many, MASK).shape == (2, B, T)
    with assert_refused("mask"):
        kl_tokens(many, many, MASK[:, 1:])


def test_token_ids_are_whole_numbers():
    rollout = fake_rollout(0)
    with assert_refused("prompts"):
        replace(rollout, prompts=rollout.prompts.float())


def test_a_whole_number_is_welcome_where_a_float_is_asked_for():
    assert gae(TOKENS, TOKENS, MASK, gamma=1, lam=0).shape == (B, T)
    with assert_refused("gamma"):
        gae(TOKENS, TOKENS, MASK, gamma="1")  # type: ignore[arg-type]


def test_a_function_is_checked_in_its_first_calls_of_each_test():
    wide = torch.zeros(B, T + 1)
    for _ in range(shapes.CHECKS):
        gae(TOKENS, TOKENS, MASK)
    assert gae(TOKENS, wide, MASK).shape == (B, T)
    shapes.afresh()  # as before every test
    with assert_refused("values"):
        gae(TOKENS, wide, MASK)


def test_every_file_of_the_core_is_checked():
    files = {path.stem for path in Path(minirlhf.__file__).parent.glob("*.py")}
    assert set(shapes.CHECKED) == files - {"__init__", "config"} | {"engine.packing"}


def test_unchecked_is_as_in_the_product_and_ends():
    wide = torch.zeros(B, T + 1)
    with shapes.unchecked():
        assert gae(TOKENS, wide, MASK).shape == (B, T)
    with assert_refused("values"):
        gae(TOKENS, wide, MASK)


def test_a_run_of_the_product_checks_nothing_and_loads_no_checker():
    code = """
        import sys, torch, minirlhf.ppo
        from minirlhf.advantages import gae
        assert gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3).bool()).shape == (2, 3)
        print("beartype" in sys.modules, hasattr(gae, "__wrapped__"))
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert found.stdout.split() == ["False", "False"], found.stderr
    assert hasattr(gae, "__wrapped__")  # here it is checked
