"""Prices of KL that differ by prompt: what PPO charges for each, and who pays four times."""

from dataclasses import replace

import pytest
import torch
from fakes import tiny_model
from fakes_rules import bare_run, draws
from tiny_ppo import PROMPTS, SMALL, likes_threes, untimed, weights

from minirlhf.critic import fit_critic
from minirlhf.drift.recipe import Recipe
from minirlhf.ppo import PPO, PPOConfig
from minirlhf.remedies import arms
from minirlhf.remedies.scores import DRAWS, Usual

CONFIG = replace(SMALL, beta=0.3)


def start(config: PPOConfig = CONFIG, prices=None, seed: int = 0) -> PPO:
    """A run whose policy has left the reference already, so that KL is not zero."""
    reference, policy = tiny_model(0, dtype=torch.float32), tiny_model(0, dtype=torch.float32)
    noise = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=noise))
    given = None if prices is None else torch.tensor(prices)
    return PPO(policy, reference, likes_threes, PROMPTS, config, seed=seed, prices=given)


def after(run: PPO, steps: int = 2):
    """Weights, and all that was reported, after some steps."""
    reports = [untimed(run.step().metrics) for _ in range(steps)]
    return weights(run.policy), reports


def test_prices_of_one_are_no_prices_bit_for_bit():
    (free, said), (priced, others) = after(start()), after(start(prices=[1.0, 1.0, 1.0]))
    assert torch.equal(free, priced) and said == others


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_one_price_for_all_is_a_larger_beta(advantage):
    config = replace(CONFIG, advantage=advantage)
    priced, reports = after(start(config, prices=[4.0] * 3))
    dear, _ = after(start(replace(config, beta=4 * 0.3)))
    free, _ = after(start(config))
    assert torch.equal(priced, dear), "a power of two rounds nothing"
    assert (priced - free).abs().max() > 1e-3, "the price is felt"
    assert reports[0]["objective/beta"] == 0.3


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_any_price_for_all_credits_answers_as_a_larger_beta_does(advantage):
    config = replace(CONFIG, advantage=advantage)
    priced = start(config, prices=[2.7] * 3).rollout()[0]
    dear = start(replace(config, beta=2.7 * 0.3)).rollout()[0]
    for name in ("rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(priced, name), getattr(dear, name), rtol=0, atol=1e-5)


def test_every_answer_pays_the_price_of_its_own_prompt():
    prices = torch.tensor([0.5, 2.0, 8.0])
    rollout = start(prices=prices.tolist()).rollout()[0]
    assert rollout.index is not None and rollout.rewards is not None
    assert set(rollout.index.tolist()) == {0, 1, 2}
    assert torch.equal(rollout.prompts, PROMPTS[rollout.index])
    ratio = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
    assert ratio.abs().max() > 0.5
    for row in range(len(rollout)):
        length, price = int(rollout.mask[row].sum()), float(prices[rollout.index[row]])
        expected = [-0.3 * price * float(ratio[row, t]) for t in range(length)]
        expected[-1] += float(rollout.scores[row])
        expected += [0.0] * (rollout.mask.shape[1] - length)
        assert rollout.rewards[row].tolist() == pytest.approx(expected, abs=1e-5)


def test_prices_follow_their_prompt_through_the_groups():
    config = replace(CONFIG, advantage="rloo", group=4)
    rollout = start(config, prices=[0.0, 1.0, 5.0]).rollout()[0]
    assert rollout.rewards is not None and rollout.index is not None
    kl = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(1)
    prices = torch.tensor([0.0, 1.0, 5.0])[rollout.index]
    totals = rollout.scores - 0.3 * prices * kl
    torch.testing.assert_close(rollout.rewards.sum(1), totals)
    assert rollout.index.view(-1, 4).float().std(1).max() == 0


def test_the_critic_starts_from_priced_rewards():
    heads = []
    for prices, beta in (([4.0] * 3, 0.3), (None, 1.2), (None, 0.3)):
        run = start(replace(CONFIG, beta=beta), prices=prices)
        fit_critic(run, batches=2)
        heads.append(run.policy.scalar.weight.detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_an_adaptive_beta_is_multiplied_too():
    config = replace(CONFIG, kl_target=0.5, kl_horizon=40.0)
    run = start(config, prices=[2.0] * 3)
    run.step()
    assert run.beta != 0.3
    rollout = run.rollout()[0]
    assert rollout.rewards is not None
    ratio = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(1)
    torch.testing.assert_close(rollout.rewards.sum(1), rollout.scores - 2 * run.beta * ratio)


@pytest.mark.parametrize(
    ("changes", "prices", "words"),
    [
        ({}, [1.0, 2.0], r"prices \[2\] multiply the KL charged in the reward, one for each of 3"),
        ({"kl_place": "loss"}, [1.0] * 3, "with kl_place loss leave them out"),
        ({"kl_place": "none"}, [1.0] * 3, "with kl_place none leave them out"),
        ({"kl_place": "book_literal"}, [1.0] * 3, "with kl_place book_literal leave them out"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_prices_that_nobody_would_be_charged_are_refused(changes, prices, words):
    with pytest.raises(ValueError, match=words) as caught:
        start(replace(CONFIG, **changes), prices=prices)
    assert "\n" not in str(caught.value)


# --- who pays more -----------------------------------------------------------------------------


def test_four_times_as_dear_exactly_where_the_reference_is_brief(monkeypatch):
    run = bare_run(40)
    table = run.desk.encode(run.prompts)
    lengths = torch.stack([mask.sum(1) for _, mask in draws(table, run)]).sum(0) / DRAWS
    limit = float(lengths.median())
    run.config = replace(run.config, audit=replace(run.config.audit, brief_below=limit))
    monkeypatch.setattr(run, "reward_model", FakeReward(), raising=False)
    prices = arms.dearer_if_brief(run)
    assert prices.tolist() == [4.0 if length < limit else 1.0 for length in lengths.tolist()]
    assert set(prices.tolist()) == {1.0, 4.0} and (lengths == limit).any(), "at the limit: 1"
    twice = arms.dearer_if_brief(run, times=2.0)
    assert torch.equal(twice, torch.where(prices == 4, 2.0, 1.0))
    by_length = Usual(FakeReward().score, run).look_up(table)[:, 1]
    assert torch.equal(prices == 4, by_length < limit)


class FakeReward:
    """A reward model whose scores must not matter."""

    def score(self, prompts, responses, mask):
        return 100.0 * (1 - mask[:, 0].float())


def test_a_run_hands_its_prices_to_ppo():
    run = bare_run(6)
    run.reward_model = FakeReward()
    assert run._make_ppo().prices is None
    given = torch.arange(6.0)
    dear = bare_run(6)
    dear.reward_model = FakeReward()
    dear.rules = Recipe().rule(prices=lambda drift: given + len(drift.prompts)).rules
    assert torch.equal(dear._make_ppo().prices, given + 6)
