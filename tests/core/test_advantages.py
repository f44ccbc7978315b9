"""Rewards to advantages: GAE against a double sum, by hand, and the split that must add up."""

from dataclasses import replace

import pytest
import torch
from fakes import fake_rollout, naive_gae
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minirlhf.advantages import (
    gae,
    grpo_advantages,
    masked_mean,
    rescale,
    rloo_advantages,
    shape_rewards,
    whiten,
    whitening_moments,
)
from minirlhf.autopsy.parts import decompose_advantages
from minirlhf.text import last_token


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@st.composite
def masks(draw, batch: int = 4, steps: int = 6) -> Tensor:
    """Any mask: empty rows, full rows and holes inside an answer."""
    bits = draw(st.lists(st.booleans(), min_size=batch * steps, max_size=batch * steps))
    return torch.tensor(bits).view(batch, steps)


unit = st.floats(0, 1)


# --- where things sit -------------------------------------------------------------------------


def test_last_token_is_the_last_true_and_minus_one_without_any():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool()
    assert last_token(mask).tolist() == [1, 3, -1, 2]


def test_score_sits_on_the_last_token_and_kl_on_every_one():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    kl = tensor([1, 2, 3, 50], [4, 50, 50, 50], [1, 1, 1, 1])
    rewards = shape_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, beta=0.5)
    expected = tensor([-0.5, -1, 8.5, 0], [18, 0, 0, 0], [-0.5, -0.5, -0.5, 29.5])
    assert torch.equal(rewards, expected)


def test_an_answer_without_a_token_gets_no_reward():
    mask = torch.tensor([[False, False], [True, False]])
    rewards = shape_rewards(torch.tensor([7.0, 1.0]), torch.ones(2, 2), mask, beta=0.0)
    assert rewards.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_beta_zero_with_any_kl_leaves_only_the_score():
    r = fake_rollout()
    rewards = shape_rewards(r.scores, torch.full_like(r.values, 1e30), r.mask, beta=0.0)
    torch.testing.assert_close(rewards.sum(-1), r.scores, rtol=1e-12, atol=1e-12)


# --- GAE --------------------------------------------------------------------------------------


@given(masks(), unit, unit, st.integers(0, 1000))
def test_gae_is_the_double_sum(mask, gamma, lam, seed):
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, *mask.shape, generator=g, dtype=torch.float64)
    found = gae(rewards, values, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(
        found, naive_gae(rewards, values, mask, gamma, lam), rtol=1e-12, atol=1e-12
    )
    single = gae(rewards.float(), values.float(), mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=1e-5)


def test_gae_by_hand_with_the_score_on_eos():
    # rewards 1, 0, 2; values 3, 5, 7; gamma 1/2, lambda 1/2: gamma lambda = 1/4
    # deltas: 1 + 5/2 - 3 = 1/2;  0 + 7/2 - 5 = -3/2;  2 + 0 - 7 = -5
    # A3 = -5;  A2 = -3/2 - 5/4 = -11/4;  A1 = 1/2 - 11/16 = -3/16
    mask = torch.tensor([[True, True, True, False]])
    found = gae(tensor([1, 0, 2, 9]), tensor([3, 5, 7, 9]), mask, gamma=0.5, lam=0.5)
    assert found.tolist() == [[-3 / 16, -11 / 4, -5.0, 0.0]]


def test_gae_by_hand_with_the_score_one_slot_after_eos():
    # the layout of other frameworks: one more slot, with a value of its own (4) and the score 2.
    # Here that is simply a longer mask: A4 = 2 - 4 = -2; delta3 = 0 + 4/2 - 7 = -5;
    # A3 = -5 - 2/4 = -11/2;  A2 = -3/2 - 11/8 = -23/8;  A1 = 1/2 - 23/32 = -7/32
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = gae(tensor([1, 0, 0, 2]), tensor([3, 5, 7, 4]), mask, gamma=0.5, lam=0.5)
    assert found.tolist() == [[-7 / 32, -23 / 8, -11 / 2, -2.0]]


def test_lambda_zero_is_the_td_error_and_lambda_one_the_return_minus_value():
    r = fake_rollout(3)
    rewards = r.ref_logprobs
    after = torch.cat([r.values[:, 1:], torch.zeros(len(r), 1)], 1)
    td = torch.where(r.mask, rewards + 0.9 * after - r.values, 0.0)
    torch.testing.assert_close(gae(rewards, r.values, r.mask, gamma=0.9, lam=0.0), td)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    found = gae(rewards, r.values, r.mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(found, torch.where(r.mask, to_go - r.values, 0.0))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8)])
def test_credit_of_the_score_falls_by_gamma_lambda_per_token(gamma, lam):
    # with a critic that says 0, a score of 1 reaches k tokens back as (gamma lambda)^k:
    # at lambda .95 only .358, .0059, 4e-5 of it after 20, 100, 200 tokens
    steps = 201
    mask = torch.ones(1, steps, dtype=torch.bool)
    rewards = torch.zeros(1, steps, dtype=torch.float64)
    rewards[0, -1] = 1.0
    found = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=lam)[0]
    powers = (gamma * lam) ** torch.arange(steps, dtype=torch.float64).flip(0)
    torch.testing.assert_close(found, powers, rtol=1e-12, atol=0.0)


def test_published_credit_figures():
    assert [round(0.95**k, 4) for k in (20, 100)] == [0.3585, 0.0059]


def test_tokens_that_the_policy_did_not_choose_change_nothing():
    mask = torch.tensor([[True, True, True]])
    rewards, values = tensor([1, -2, 3]), tensor([0.5, 1.5, -1])
    plain = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    # a tool's output between tokens 1 and 2, full of garbage
    wide = torch.tensor([[True, False, False, True, True]])
    junk_r, junk_v = tensor([1, 50, 60, -2, 3]), tensor([0.5, 70, 80, 1.5, -1])
    found = gae(junk_r, junk_v, wide, gamma=0.9, lam=0.7)
    assert torch.equal(found[wide], plain[0]) and found[~wide].eq(0).all()


def test_padding_is_never_read():
    r = fake_rollout(5)
    junk = torch.where(r.mask, r.values, torch.tensor(float("nan"), dtype=torch.float64))
    rewards = torch.where(r.mask, r.logprobs, torch.tensor(1e30, dtype=torch.float64))
    found = gae(rewards, junk, r.mask)
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in (r.logprobs, r.values, r.mask)]
    assert torch.equal(gae(*wider)[:, :-3], found) and found.isfinite().all()


def test_one_token_and_full_rows():
    mask = torch.tensor([[True, False, False], [True, True, True]])
    found = gae(tensor([2, 9, 9], [0, 0, 2]), tensor([0.5, 9, 9], [0, 0, 0.5]), mask, lam=0.0)
    assert found.tolist() == [[1.5, 0.0, 0.0], [0.0, 0.5, 1.5]]


# --- whitening --------------------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitened_entries_have_mean_zero_and_variance_one(ddof):
    r = fake_rollout(7)
    x = torch.where(r.mask, r.values * 3 + 5, 1e6)  # the junk outside must not count
    white = whiten(x, r.mask, ddof=ddof)
    inside = white[r.mask]
    assert inside.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert inside.var(correction=ddof).item() == pytest.approx(1.0, abs=1e-6)
    assert white[~r.mask].eq(0).all()


def test_rescaling_keeps_signs_and_whitening_without_shift_keeps_the_mean():
    r = fake_rollout(7)
    x = torch.where(r.mask, r.values * 3 + 5, 1e6)  # the junk outside must not count
    mean, sd = x[r.mask].mean(), x[r.mask].std()
    small, kept, centred = (
        rescale(x, r.mask),
        whiten(x, r.mask, shift_mean=False),
        whiten(x, r.mask),
    )
    torch.testing.assert_close(small[r.mask], x[r.mask] / sd)
    torch.testing.assert_close(kept[r.mask], (x[r.mask] - mean) / sd + mean)
    means = [masked_mean(y, r.mask).item() for y in (small, kept, centred)]
    assert means == pytest.approx([(mean / sd).item(), mean.item(), 0.0], abs=1e-6)
    assert abs(mean - mean / sd) > 0.5, "the three are told apart here"
    assert all(not y[~r.mask].any() for y in (small, kept, centred))


def test_the_shift_alone_turns_signs():
    # raw mean -.8 sd: centring makes about half of all tokens positive, penalised ones included
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4000, generator=g, dtype=torch.float64) - 0.8
    mask = torch.ones_like(x, dtype=torch.bool)
    share = [(scaled(x, mask) > 0).double().mean().item() for scaled in (rescale, whiten)]
    assert share[0] == pytest.approx(0.212, abs=0.02) and share[1] == pytest.approx(0.5, abs=0.02)


@given(st.floats(0.1, 10), st.floats(-10, 10), st.integers(0, 100))
def test_whitening_undoes_any_affine_map(scale, offset, seed):
    r = fake_rollout(seed)
    once = whiten(r.values, r.mask)
    torch.testing.assert_close(whiten(r.values * scale + offset, r.mask), once, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_fewer_than_two_entries_are_not_blown_up(count, ddof, shift_mean):
    mask = torch.tensor([[count == 1, False]])
    white = whiten(torch.tensor([[3.0, 8.0]]), mask, shift_mean=shift_mean, ddof=ddof)
    kept = 3.0 if count and not shift_mean else 0.0  # sd counts as 1
    assert white.tolist() == [[kept, 0.0]]
    assert rescale(torch.tensor([[3.0, 8.0]]), mask).tolist() == [[3.0 * count, 0.0]]
    assert whitening_moments(torch.ones(1, 2), mask, ddof=ddof)[1] == 1


# --- baselines from a group -------------------------------------------------------------------


def test_rloo_is_each_answer_against_the_mean_of_the_others():
    returns = tensor([1, 2, 6, -3, 0, 0])[0]
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, -3 - 0, 0 + 1.5, 0 + 1.5]
    assert rloo_advantages(returns, 3).tolist() == pytest.approx(expected, abs=1e-12)


def test_grpo_is_the_group_score_and_dr_grpo_only_centres():
    returns = tensor([1, 2, 6, -3, 0, 0])[0]
    sds = tensor([1, 2, 6])[0].std().item(), tensor([-3, 0, 0])[0].std().item()
    centred = [-2.0, -1.0, 3.0, -2.0, 1.0, 1.0]
    scaled = [c / (sds[i // 3] + 1e-4) for i, c in enumerate(centred)]
    assert grpo_advantages(returns, 3).tolist() == pytest.approx(scaled, abs=1e-12)
    bare = grpo_advantages(returns, 3, scale_by_sd=False)
    assert bare.tolist() == pytest.approx(centred, abs=1e-12)


def test_grpo_erases_the_size_of_a_gap_and_rloo_keeps_it():
    big, small = tensor([0, 0, 0.5, 0.5])[0], tensor([0, 0, 0.05, 0.05])[0]
    torch.testing.assert_close(
        grpo_advantages(big, 4), grpo_advantages(small, 4), rtol=5e-3, atol=0
    )
    torch.testing.assert_close(rloo_advantages(big, 4), 10 * rloo_advantages(small, 4))
    # at share p of winners the pull on a winner is sqrt((1 - p) / p), up to ddof, whatever the gap
    assert grpo_advantages(big, 4)[2].item() == pytest.approx((3 / 4) ** 0.5, abs=1e-3)


@pytest.mark.parametrize("baseline", [rloo_advantages, grpo_advantages])
def test_equal_answers_teach_nothing_and_groups_must_divide(baseline):
    assert baseline(torch.full((4,), 3.0), 4).tolist() == [0.0] * 4
    for group in (1, 3):
        with pytest.raises(ValueError, match=rf"4 answers cannot be split into groups of {group}"):
            baseline(torch.zeros(4), group)


# --- the exact split --------------------------------------------------------------------------

DEGENERATE = {
    "one token": torch.tensor([[True]]),
    "one answer": torch.tensor([[True, True, False]]),
    "all full": torch.ones(3, 4, dtype=torch.bool),
    "an empty row": torch.tensor([[False, False], [True, True]]),
    "no token at all": torch.zeros(2, 3, dtype=torch.bool),
    "holes": torch.tensor([[True, False, True, True], [False, True, False, True]]),
}


def whole(rollout, beta: float, gamma: float, lam: float) -> Tensor:
    kl = rollout.logprobs - rollout.ref_logprobs
    rewards = shape_rewards(rollout.scores, kl, rollout.mask, beta=beta)
    return gae(rewards, rollout.values, rollout.mask, gamma=gamma, lam=lam)


@given(st.integers(0, 10_000), st.floats(0, 2), unit, unit)
def test_parts_add_up_to_gae(seed, beta, gamma, lam):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        rollout = fake_rollout(seed, dtype=dtype)
        parts = decompose_advantages(rollout, beta=beta, gamma=gamma, lam=lam)
        gap = (parts.total - whole(rollout, beta, gamma, lam)).abs().max()
        scale = max(1.0, parts.kl.abs().max().item())
        assert gap <= tolerance * scale


@pytest.mark.parametrize("name", DEGENERATE)
def test_parts_add_up_in_degenerate_batches(name):
    rollout = fake_rollout(1, mask=DEGENERATE[name])
    parts = decompose_advantages(rollout, beta=0.3)
    expected = whole(rollout, 0.3, 1.0, 0.95)
    torch.testing.assert_close(parts.total, expected, rtol=0, atol=1e-12)
    white = parts.whitened(rollout.mask)
    torch.testing.assert_close(white.total, whiten(expected, rollout.mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shift", "scaled"), [(True, whiten), (False, rescale)])
def test_the_split_goes_through_whitening(shift, scaled):
    rollout = fake_rollout(2)
    parts = decompose_advantages(rollout, beta=0.3)
    white = parts.whitened(rollout.mask, shift=shift)
    expected = scaled(whole(rollout, 0.3, 1.0, 0.95), rollout.mask)
    torch.testing.assert_close(white.total, expected, rtol=0, atol=1e-12)
    assert white.shift is not None
    assert white.shift[rollout.mask].unique().numel() == 1  # one shift for every token
    assert bool(white.shift.any()) == shift and white.shift[~rollout.mask].eq(0).all()


def test_each_part_depends_on_its_own_cause_only():
    r = fake_rollout(4)
    one, two = (decompose_advantages(r, beta=b, gamma=1.0, lam=0.9) for b in (0.1, 0.2))
    assert torch.equal(one.reward, two.reward) and torch.equal(one.baseline, two.baseline)
    torch.testing.assert_close(two.kl, 2 * one.kl)
    # the reward's part is the score times lambda^k, the KL part the discounted sum of what follows
    k = (r.last[:, None] - torch.arange(r.mask.shape[1])).clamp(min=0)
    torch.testing.assert_close(one.reward, torch.where(r.mask, r.scores[:, None] * 0.9**k, 0.0))
    charged = torch.where(r.mask, -0.1 * (r.logprobs - r.ref_logprobs), 0.0)
    torch.testing.assert_close(one.kl, naive_gae(charged, 0 * charged, r.mask, 1.0, 0.9))


def test_the_split_uses_the_kl_that_was_charged():
    r = fake_rollout(4)
    doubled = replace(r, kl=2 * (r.logprobs - r.ref_logprobs) * r.mask)
    plain, twice = (decompose_advantages(x, beta=0.1).kl for x in (r, doubled))
    torch.testing.assert_close(twice, 2 * plain)
