"""Two answers and the fork chain: closed forms against enumeration, against PPO's own parts, and
(a subset; the rest is in test_ladder_two_answers.py) against PPO trained on a Transformer."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from fakes_bandit import bandit, kl_gradients, refreshed, settle, whole_batches  # noqa: F401
from torch.nn.functional import logsigmoid

from minirlhf.advantages import gae, grpo_advantages, rloo_advantages
from minirlhf.kl import ESTIMATORS
from minirlhf.oracle.chain import ForkChain
from minirlhf.oracle.closed_form import (
    clip_steps,
    kl_pull,
    largest_drift,
    moving_reference,
    net_advantages,
    runaway_threshold,
    tilt,
    two_answer,
    two_answer_end,
)
from minirlhf.oracle.pocket import two_word_policy, verbose_share

FAST = ((30, 1e-2), (30, 2e-3), (30, 4e-4))
SETTINGS = [("reward", "k1"), ("reward", "k2"), ("reward", "k3")]
SETTINGS += [("loss", "k1"), ("loss", "k2"), ("loss", "k3")]


def near(x, tolerance=5e-4):
    return pytest.approx(x, abs=tolerance)


def listed(x):
    return x.flatten().tolist()


# --- L0: formulas ------------------------------------------------------------------------------


def test_the_tilt_beats_every_other_policy(generator):
    ref = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    ref /= ref.sum(-1, keepdim=True)
    rewards, beta = torch.randn(3, 5, generator=generator, dtype=torch.float64), 0.3
    best = tilt(ref, rewards, beta)

    def objective(p):
        return (p * (rewards - beta * (p / ref).log())).sum(-1)

    z = (ref * (rewards / beta).exp()).sum(-1)
    torch.testing.assert_close(objective(best), beta * z.log())
    for size in (1e-3, 0.1, 1.0):
        other = (best.log() + size * torch.randn(3, 5, generator=generator)).softmax(-1)
        assert (objective(other) < objective(best)).all()


def test_two_answers_by_hand():
    assert float(two_answer(0.02, 0.1, 0.02)) == near(0.7517)
    assert float(two_answer(0.02, 0.1, 0.05)) == near(0.1310)
    p0 = torch.tensor([0.001, 0.01, 0.1])
    gap = torch.tensor([0.4, 0.2])[:, None]
    found = two_answer(p0, gap, 0.1)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    odds = p0.double() / (1 - p0.double()) * (gap.double() / 0.1).exp()
    torch.testing.assert_close(found, odds / (1 + odds))
    both = torch.stack([p0, 1 - p0], -1)
    rewards = torch.tensor([0.4, 0.0]).expand(3, 2)
    torch.testing.assert_close(tilt(both, rewards, 0.1)[..., 0], found[0], rtol=1e-6, atol=0)


def test_the_prompt_that_moves_most_is_brief():
    grid = torch.linspace(1e-4, 1 - 1e-4, 20001, dtype=torch.float64)
    for k, at, by in ((2.0, 0.269, 0.462), (4.0, 0.119, 0.762), (6.0, 0.047, 0.905)):
        moved = two_answer(grid, k * 0.1, 0.1) - grid
        assert float(largest_drift(k * 0.1, 0.1)) == near(float(grid[moved.argmax()]), 1e-4)
        assert float(largest_drift(k, 1.0)) == near(at)
        assert float(moved.max()) == near(by) == near(1 - 2 * at, 2e-3)


def test_a_moving_reference_climbs_a_staircase():
    assert listed(moving_reference(0.01, 0.2, 0.1, 5)) == near([0.069, 0.355, 0.803, 0.968, 0.996])
    step, p = [], torch.tensor([0.01, 0.3])
    for _ in range(3):
        p = two_answer(p, 0.1, 0.2)
        step.append(p)
    torch.testing.assert_close(
        moving_reference(torch.tensor([0.01, 0.3]), 0.1, 0.2, 3), torch.stack(step)
    )


def test_net_advantages_say_which_side_of_the_optimum_p_is_on():
    p = torch.tensor([0.05, 0.1, 0.5, 0.95])
    verbose, concise = net_advantages(p, 0.02, 0.3, 0.05)
    torch.testing.assert_close(p * verbose + (1 - p) * concise, torch.zeros(4).double())
    assert (verbose > 0).tolist() == (p < two_answer(0.02, 0.3, 0.05)).tolist()
    r_v, r_c = 0.3 - 0.05 * (p / 0.02).log(), -0.05 * ((1 - p) / 0.98).log()
    mean = p * r_v + (1 - p) * r_c
    torch.testing.assert_close(verbose.float(), r_v - mean)
    torch.testing.assert_close(concise.float(), r_c - mean)
    assert float(verbose[1]) == near(0.194)
    assert net_advantages(two_answer(0.02, 0.3, 0.05), 0.02, 0.3, 0.05)[0].abs() < 1e-12


@pytest.mark.parametrize("place, estimator", SETTINGS)
def test_the_pull_is_the_expected_gradient(place, estimator):
    """By enumeration of both answers, through kl.py and autograd."""
    for p, p0 in itertools.product((0.02, 0.3, 0.9), (0.01, 0.5)):
        x = torch.tensor(p, dtype=torch.float64).logit().requires_grad_()
        logprobs = torch.stack([logsigmoid(x), logsigmoid(-x)])
        ref = torch.tensor([p0, 1 - p0], dtype=torch.float64).log()
        cost, weights = ESTIMATORS[estimator](logprobs, ref), logprobs.exp().detach()
        if place == "reward":
            cost = cost.detach() * logprobs
        (gradient,) = torch.autograd.grad((weights * cost).sum(), x)
        pull = kl_pull(p, p0, place=place, estimator=estimator)
        assert p * (1 - p) * float(pull) == pytest.approx(gradient.item(), abs=1e-12)


def test_the_gradients_of_the_estimators_by_number():
    """p = .3, p0 = .01: true gradient of KL .787, of the forward KL .290."""
    found = [0.21 * float(kl_pull(0.3, 0.01, place=a, estimator=b)) for a, b in SETTINGS]
    assert found == near([0.787, 1.202, 0.497, 0.0, 0.787, 0.290])
    assert float(kl_pull(0.3, 0.01, place="book_literal")) == 0.0


def test_end_points_of_k1_and_k2_are_the_tilt_and_the_books_is_one():
    p0, gap = torch.tensor([0.01, 0.2, 0.7]), torch.tensor([[0.3], [0.05], [-0.2], [0.0]])
    for options in ({}, {"place": "loss", "estimator": "k2"}, {"scale": "advantages"}):
        torch.testing.assert_close(
            two_answer_end(p0, gap, 0.1, **options), two_answer(p0, gap, 0.1)
        )
    book = two_answer_end(p0, gap, torch.tensor(1.0), place="book_literal")
    same = two_answer_end(p0, gap, torch.tensor(0.05), place="book_literal")
    assert torch.equal(book, same)
    assert listed(book[:3]) == [1.0] * 6 + [0.0] * 3
    torch.testing.assert_close(book[3], p0.double())  # no gap, no way


def test_k3_in_the_loss_hardly_protects_a_rare_answer():
    p0 = torch.tensor([0.1, 0.001, 0.01, 0.001, 0.001])
    k = torch.tensor([2.0, 2.0, 8.0, 8.0, 10.0])
    p = two_answer_end(p0, 0.1 * k, 0.1, place="loss", estimator="k3")
    assert listed(p) == near([0.585, 0.501, 0.876, 0.875, 0.900])
    torch.testing.assert_close(k * p * (1 - p), p - p0, check_dtype=False, rtol=1e-6, atol=1e-7)
    assert listed(two_answer(p0, 0.1 * k, 0.1)) == near([0.451, 0.007, 0.968, 0.749, 0.957])


def test_k3_in_the_reward_rests_below_a_threshold_and_runs_away_above():
    p0 = torch.tensor([0.1, 0.01, 0.001])
    k = runaway_threshold(p0)
    assert listed(k) == near([0.597, 2.635, 4.911], 1e-3)
    below, above = (two_answer_end(p0, x * 0.1, 0.1, estimator="k3") for x in (k - 0.01, k + 0.01))
    assert (below < 0.7).all() and listed(above) == [1.0] * 3
    assert float(two_answer_end(0.1, 0.04, 0.1, estimator="k3")) == near(0.301)
    assert float(runaway_threshold(0.5)) == 0.0  # from a half up, nothing holds it
    assert float(two_answer_end(0.1, -0.001, 0.1, estimator="k3")) == 0.0  # nor down, from below
    assert float(runaway_threshold(0.1, estimator="k1")) == math.inf
    assert float(runaway_threshold(0.1, place="loss")) == math.inf
    assert float(runaway_threshold(0.1, estimator="k1", place="loss")) == 0.0


@pytest.mark.parametrize("p0", [1e-30, 1e-9, 1e-300])
def test_a_start_however_rare_still_finds_its_rest_point(p0):
    """The way to a half alone is -logit p0: 69 logits from 1e-30."""
    way = -torch.tensor(p0, dtype=torch.float64).logit()
    for beyond in (-4.0, 0.0, 3.0):
        gap = 0.1 * (way + beyond)
        want = torch.sigmoid(torch.tensor(beyond, dtype=torch.float64))
        torch.testing.assert_close(two_answer_end(p0, gap, 0.1), want)
        assert ForkChain(p0, float(gap), 0.1).end() == near(float(want), 1e-6)
    assert float(two_answer_end(1e-30, 6.5, 0.1)) == near(0.0167, 1e-4)
    k = float(runaway_threshold(p0))  # the pull of k3 in the reward peaks near a half
    assert k == near(float(way) - 2, 1e-2)  # x - x0 - e^x, largest at x = 0, less 1
    below, above = (two_answer_end(p0, 0.1 * (k + d), 0.1, estimator="k3") for d in (-0.1, 0.1))
    assert below < 0.5 and above == 1.0
    far = two_answer_end(1 - 1e-15, -3.0, 0.1)  # and from the other end
    assert float(far) == near(float(two_answer(1 - 1e-15, -3.0, 0.1)), 1e-9)


def test_the_two_sides_are_mirror_images():
    for place, estimator in SETTINGS:
        for scale in ("none", "scores", "advantages"):
            options = {"place": place, "estimator": estimator, "scale": scale}
            up = two_answer_end(torch.tensor([0.05, 0.4]), 0.13, 0.3, **options)
            down = two_answer_end(torch.tensor([0.95, 0.6]), -0.13, 0.3, **options)
            torch.testing.assert_close(up, 1 - down)


def test_a_division_by_sd_erases_the_size_of_the_gap():
    loss = {"place": "loss", "estimator": "k3", "scale": "advantages"}
    for gap in (1e-3, 0.1, 10.0):
        p = float(two_answer_end(0.01, gap, 0.04, **loss))
        assert p == near(0.9984, 1e-4)
        assert math.sqrt(p * (1 - p)) == near(0.04 * (p - 0.01), 1e-8)
    assert float(two_answer_end(0.01, 0.1, 0.04, place="loss", estimator="k3")) == near(0.607)
    small = [float(two_answer_end(0.01, 0.1, 0.04, group=g, **loss)) for g in (2, 4, 8, 64)]
    assert small == sorted(small) and small[1] == near(0.973)
    # scores over their sd before KL: the charge shrinks as beta * sd would
    ends = [float(two_answer_end(0.02, 0.3, b, scale="scores")) for b in (0.2, 0.5, 1.0)]
    assert ends == near([1.0, 0.529, 0.199])
    p = ends[1]
    sd = 0.3 * math.sqrt(p * (1 - p))
    assert float(two_answer(0.02, 0.3, 0.5 * sd)) == near(p, 1e-6)


@pytest.mark.parametrize("group", [2, 4, 6])
def test_the_push_of_a_finite_group_by_listing_every_group(group):
    """With k2 in the loss at rest, the pull equals the mean push of all 2^G groups."""
    end = float(two_answer_end(0.2, 0.4, 0.9, place="loss", estimator="k2", scale="advantages",
                               group=group))  # fmt: skip
    assert 0.2 < end < 0.99
    push = 0.0
    for row in itertools.product((1.0, 0.0), repeat=group):
        verbose = torch.tensor(row, dtype=torch.float64)
        advantages = grpo_advantages(1e3 * verbose, group)  # the 1e-4 beside the sd is nothing
        chance = end ** sum(row) * (1 - end) ** (group - sum(row))
        push += chance * float((advantages * (verbose - end)).mean())
    assert push / (end * (1 - end)) == near(0.9 * float(kl_pull(end, 0.2)), 1e-6)


def test_clip_bounds_a_step_not_the_journey():
    for p, clip, steps in ((1e-3, 0.2, 35), (1e-2, 0.2, 22), (1e-3, 0.1, 66), (1e-2, 0.1, 42)):
        assert clip_steps(p, 0.5, clip, verbose_only=True) == steps
        assert steps == math.ceil(math.log(0.5 / p) / math.log(1 + clip))
    assert clip_steps(1e-3, 0.9, 0.2) == 7 and clip_steps(1e-3, 0.9, 0.2, verbose_only=True) == 38
    assert clip_steps(0.001, 0.2, 0.2) == 1  # 0.2008 in one: the concise side moves mass


# --- L1: the fork chain ------------------------------------------------------------------------

TOY = ForkChain(p0=0.02, delta_r=0.3, beta=0.05)


@pytest.mark.parametrize(
    "critic, lam, fork, second, last, positive",
    [
        ("flat", 1.0, 0.194, 0.274, 0.274, 30),
        ("flat", 0.95, -0.019, 0.065, 0.274, 29),
        ("flat", 0.0, -0.080, 0.0, 0.274, 1),
        ("exact", 1.0, 0.194, 0.0, 0.0, 1),
        ("exact", 0.95, 0.194, 0.0, 0.0, 1),
        ("exact", 0.0, 0.194, 0.0, 0.0, 1),
    ],
)
@pytest.mark.parametrize("short", [1, 30])
def test_who_gets_the_credit(critic, lam, fork, second, last, positive, short):
    advantages = replace(TOY, short=short).advantages(0.1, critic=critic, lam=lam)
    verbose = advantages[0]
    assert [float(verbose[i]) for i in (0, 1, -1)] == near([fork, second, last])
    assert int((verbose > 1e-9).sum()) == positive
    if critic == "flat":  # the same last advantage, passed back over 28 tokens of filler
        passed = sum(lam**j for j in range(29))
        assert float(verbose.sum() - verbose[0]) == near(float(verbose[-1]) * passed, 1e-9)
    if lam == 1.0 or critic == "exact":  # L0's own advantages, whoever the critic is
        exact = net_advantages(0.1, 0.02, 0.3, 0.05)
        assert listed(advantages[:, 0]) == near([float(a) for a in exact], 1e-12)


def test_values_are_the_mean_of_the_returns():
    chain = replace(TOY, steps=5, short=3, filler_kl=0.2)
    p, gamma = torch.tensor([0.1, 0.6]), 0.9
    rewards, values = chain.rewards(p), chain.values(p, gamma=gamma)
    for t in range(5):
        discounts = gamma ** torch.arange(5 - t)
        to_come = (rewards[..., t:] * discounts).sum(-1)
        expected = to_come if t else p * to_come[:, 0] + (1 - p) * to_come[:, 1]
        if t == 0:
            torch.testing.assert_close(values[:, 0, 0], expected)
            torch.testing.assert_close(values[:, 1, 0], expected)
        else:
            torch.testing.assert_close(values[..., t], torch.where(chain.mask[:, t], expected, 0.0))
    flat = chain.values(p, critic="flat", gamma=gamma)
    assert torch.equal(flat[..., 0, 4], values[..., 0, 0])


@pytest.mark.parametrize("p0, gap, beta", [(0.02, 0.3, 0.05), (0.3, 0.1, 0.2), (0.6, -0.2, 0.1)])
def test_the_chain_ends_where_the_two_answers_do(p0, gap, beta):
    end = float(two_answer(p0, gap, beta))
    eos, equal = ForkChain(p0, gap, beta), ForkChain(p0, gap, beta, short=30)
    assert [eos.end(), equal.end(lam=0.5)] == near([end] * 2, 1e-6)
    assert eos.end(critic="flat") == near(end, 1e-6)
    assert replace(equal, place="loss").end(lam=0.0) == near(end, 1e-6)


def test_lambda_and_gamma_move_the_end_only_where_credit_is_lost_on_the_way():
    chain = replace(TOY, short=30)
    for lam in (0.95, 0.0):  # a flat critic passes lam^29 of the score on to the fork
        left = 0.3 * lam**29
        assert chain.end(critic="flat", lam=lam) == near(float(two_answer(0.02, left, 0.05)), 1e-6)
    discounted = float(two_answer(0.02, 0.3 * 0.95**29, 0.05))
    assert chain.end(gamma=0.95) == near(discounted, 1e-6) == TOY.end(gamma=0.95)


def test_a_loss_token_by_token_forgets_the_kl_still_to_come():
    """30 filler tokens of .1 nats; k = 6, p0 = .02."""
    chain = ForkChain(0.02, 0.6, 0.1, steps=31, filler_kl=0.1)
    assert chain.end() == near(0.291) and replace(chain, place="loss").end() == near(0.892)
    assert chain.end() == near(float(two_answer(0.02, 0.6 - 0.1 * 3, 0.1)), 1e-6)


def test_a_mean_over_tokens_makes_the_fork_cheaper_the_longer_the_answer():
    chains = [replace(TOY, beta=1.0, steps=n, aggregation="token_mean") for n in (1, 4, 30, 60)]
    assert [c.end() for c in chains] == near([0.0268, 0.0569, 0.2143, 0.2431])
    per_token = [float(replace(c, p0=0.05).charges(1 - 1e-9)[0, 0]) for c in chains[1:]]
    nats = math.log(20)
    assert per_token == near([nats / 4, nats / 30, nats / 60], 1e-6)
    summed = [replace(c, aggregation="sequence_sum").end() for c in chains]
    assert summed == near([float(two_answer(0.02, 0.3, 1.0))] * 4, 1e-6)


def test_going_on_costs_at_most_minus_log_of_the_chance_to_go_on():
    for eos, nats in ((0.95, 3.0), (0.99, 4.6)):
        chain = ForkChain(1 - eos, 0.3, 0.05)
        total = float(chain.charges(1 - 1e-9)[0].sum())
        assert total == near(-math.log(1 - eos), 1e-6) == near(nats, 0.01)


def test_no_critic_changes_the_gap_between_the_answers(generator):
    """(d): right or wrong, as long as lam is 1."""
    rewards, mask = TOY.rewards(0.1), TOY.mask
    gap = TOY.advantages(0.1)[:, 0]
    for _ in range(5):
        start, blind = torch.randn(2, generator=generator, dtype=torch.float64)
        values = torch.randn(2, 30, generator=generator, dtype=torch.float64) + blind
        values[:, 0] = start  # the state before the fork is one state
        found = gae(rewards, values, mask, lam=1.0)[:, 0]
        torch.testing.assert_close(found[0] - found[1], gap[0] - gap[1])
        assert (found[0] - gap[0]).abs() > 1e-3  # while the advantages themselves do change


@pytest.mark.parametrize("group", [2, 3, 6])
def test_group_baselines_leave_the_ascent_too_by_listing_every_group(group):
    """(d): RLOO's mean push is the exact one; GRPO's without sd is (G - 1) / G of it, as its
    mean counts the answer itself: another step size, the same zero."""
    p, returns = 0.1, TOY.rewards(0.1).sum(-1)
    exact = p * (1 - p) * float(returns[0] - returns[1])
    pushes = {"rloo": 0.0, "grpo": 0.0}
    for row in itertools.product((0, 1), repeat=group):  # 0 is verbose
        answers = torch.tensor(row)
        score = (answers == 0).double() - p  # of logit p
        chance = p ** row.count(0) * (1 - p) ** row.count(1)
        own = {
            "rloo": rloo_advantages(returns[answers], group),
            "grpo": grpo_advantages(returns[answers], group, scale_by_sd=False),
        }
        for kind, advantages in own.items():
            pushes[kind] += chance * float((advantages * score).mean())
    assert pushes["rloo"] == near(exact, 1e-12) and abs(exact) > 0.01
    assert pushes["grpo"] == near(exact * (group - 1) / group, 1e-12)


# --- PPO on a Transformer ----------------------------------------------------------------------


def test_a_policy_with_the_given_share():
    for p0 in (0.001, 0.3, 0.99):
        assert verbose_share(two_word_policy(p0, seed=4)) == near(p0, 1e-6)


@pytest.mark.parametrize("place, estimator", SETTINGS)
def test_sampled_gradients_of_the_kl_term(place, estimator):
    """(c): the interval of k1 in the loss covers 0 and that of k2 is far from it."""
    found = kl_gradients(place, estimator)
    mean, se = found.mean().item(), found.std().item() / math.sqrt(len(found))
    exact = 0.3 * 0.7 * float(kl_pull(0.3, 0.01, place=place, estimator=estimator))
    assert abs(mean - exact) < 3 * se
    if (place, estimator) == ("loss", "k1"):
        assert abs(mean) < 3 * se and found.std().item() == near(0.458, 0.01)
    else:
        assert mean > 20 * se


@pytest.mark.parametrize(
    "p0, gap, beta, options",
    [
        (0.05, 0.2, 0.1, {}),  # (a)
        (0.1, -0.1, 0.1, {}),
        (0.5, 0.1, 0.1, {"kl_place": "loss", "kl_estimator": "k2"}),
        (0.02, 0.1, 0.05, {"kl_place": "loss", "kl_estimator": "k2"}),
        (0.1, 0.2, 0.1, {"kl_place": "loss", "kl_estimator": "k3"}),
        (0.1, 0.04, 0.1, {"kl_estimator": "k3"}),
        (0.1, 0.1, 0.1, {"kl_estimator": "k3"}),  # runs away
        (0.02, 0.3, 1.0, {"kl_place": "book_literal"}),  # (b)
        (0.05, 0.1, 0.5, {"whiten_rewards": "scores"}),
    ],
)
def test_ppo_ends_where_theory_says(p0, gap, beta, options):
    known = {"place": options.get("kl_place"), "estimator": options.get("kl_estimator")}
    known = {name: value for name, value in known.items() if value}
    if "whiten_rewards" in options:
        known["scale"] = options["whiten_rewards"]
    predicted = float(two_answer_end(p0, gap, beta, **known))
    found = settle(bandit(p0, gap, beta, batch=512, **options), FAST)
    assert found == near(predicted, 0.02)


def test_ppo_against_a_moving_reference_climbs_the_stairs():
    found = refreshed(0.05, 0.2, 0.1, 2, FAST)
    assert found == near(listed(moving_reference(0.05, 0.2, 0.1, 2)), 0.02)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: two_answer(0.0, 0.1, 0.1), "p0 is 0.0; it must be between 0 and 1"),
        (lambda: two_answer(0.1, math.inf, 0.1), "delta_r is inf; it must be finite"),
        (lambda: two_answer(0.1, 0.1, 0.0), "beta is 0.0; it must be positive"),
        (lambda: tilt(torch.ones(2), torch.ones(2), 1.0), "ref_probs must be >= 0 and sum to 1"),
        (lambda: tilt(torch.ones(2) / 2, torch.ones(3), 1.0), r"\[2\] and rewards \[3\] must"),
        (lambda: kl_pull(0.1, 0.1, place="lost"), "place is 'lost'; it must be one of reward, "),
        (lambda: kl_pull(0.1, 0.1, estimator="k4"), "estimator is 'k4'; it must be one of k1"),
        (lambda: two_answer_end(0.1, 0.1, 1.0, scale="sd"), "scale is 'sd'; it must be one of"),
        (lambda: clip_steps(0.5, 0.1, 0.2), "needs 0 < p < q < 1 and 0 < clip < 1"),
        (lambda: TOY.advantages(0.1, critic="none"), "critic is 'none'; it must be one of exact"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
