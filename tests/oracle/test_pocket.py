"""The pocket desk: its sums against brute force, closed forms and the library's own losses."""

import itertools
from copy import deepcopy

import pytest
import torch
from fakes import every_answer, tiny_model
from pocket_checks import (
    OBJECTIVES,
    farthest,
    gain_within_lengths,
    moved,
    name,
    sampled_gradients,
    started,
)

from minirlhf.advantages import grpo_advantages
from minirlhf.generate import generate
from minirlhf.kl import ESTIMATORS, exact_kl
from minirlhf.model import response_logprobs
from minirlhf.oracle.pocket import (
    CAP,
    PROMPTS,
    WORDS,
    Pocket,
    Score,
    anneal,
    pocket_desk,
    settings,
    total_variation,
    train_reference,
)
from minirlhf.oracle.reweighted import best_of_n_kl_bound
from minirlhf.ppo import PPO, price_and_credit
from minirlhf.rollout import Rollout
from minirlhf.text import EOS

BETAS = torch.logspace(-1.3, 1, 24, dtype=torch.float64)


@pytest.fixture(scope="module")
def desk():
    return pocket_desk()


@pytest.fixture(scope="module")
def exact():
    """A desk of two tokens in float64, from random weights, with its policy: both far from flat."""
    reference, policy = (tiny_model(s, vocab=8, n_layer=1, context=3) for s in (1, 2))
    prompts = torch.tensor([[2], [5]])
    return Pocket(reference, prompts, Score(0.3), Score(-0.2), cap=2), policy


# --- the list of answers and their probabilities ----------------------------------------------


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_every_answer_is_listed_once(cap):
    model = tiny_model(vocab=4)
    desk = Pocket(model, torch.tensor([[2]]), Score(0), Score(0), cap=cap)
    listed = zip(desk.responses.tolist(), desk.mask.tolist(), strict=True)
    expected = zip(*(x.tolist() for x in every_answer(4, cap)), strict=True)
    assert sorted(listed) == sorted(expected)


def test_the_course_desk_is_of_the_promised_size(desk):
    assert (len(WORDS), CAP, len(PROMPTS)) == (8, 4, 4)
    assert desk.responses.shape == (2801, 4) and desk.ref.shape == (4, 2801)
    assert not (desk.responses[desk.mask] == EOS).all() and desk.lengths.min() == 1


def test_probabilities_sum_to_one_and_are_the_models_own(desk):
    policy = moved(desk, 0.3).double()
    with torch.no_grad():
        table = desk.along(desk.levels(policy))
    torch.testing.assert_close(
        table.sum(-1).exp().sum(-1), torch.ones(4).double(), atol=1e-12, rtol=0
    )
    rows = torch.randperm(2801, generator=torch.Generator().manual_seed(0))[:300]
    for p, prompt in enumerate(desk.prompts):
        given = (prompt.expand(300, -1), desk.responses[rows], desk.mask[rows])
        found = response_logprobs(policy, *given)[0]
        torch.testing.assert_close(table[p, rows], found, atol=1e-10, rtol=0)


def test_the_sampler_draws_from_the_listed_probabilities(desk):
    n = 4000
    g = torch.Generator().manual_seed(1)
    prompts = desk.prompts.repeat_interleave(n, 0)
    out = generate(desk.reference, prompts, max_new_tokens=CAP, eos=EOS, generator=g)
    for scorer, column in ((Score(1.0, 0.0), 0), (desk.score, 1)):
        scores = scorer(prompts, *out).double().view(4, n)
        expected = desk.expect(desk.ref, desk.table(scorer))
        z = (scores.mean(1) - expected) / (scores.std(1) / n**0.5)
        assert z.abs().max() < 3.5, f"column {column}"


def test_references_of_different_length(desk):
    lengths = desk.standing(desk.ref).length
    assert (lengths.diff() > 0.2).all() and lengths[0] < 2.3 and lengths[-1] > 3.2
    brief = desk.ref[0].exp()[desk.lengths <= 2].sum()
    assert brief > 0.8, "the brief prompt stops after one word"


def test_scores_by_hand():
    yes, no, so = (WORDS.index(w) for w in ("yes", "no", "so"))
    responses = torch.tensor([[yes, EOS, 0, 0], [so, yes, so, so], [EOS, 0, 0, 0], [no, EOS, 0, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    prompts = torch.full((4, 1), yes)
    assert Score(0.3)(prompts, responses, mask).tolist() == pytest.approx([1.3, 2.2, 0.0, 0.3])
    assert Score(-0.2)(prompts, responses, mask).tolist() == pytest.approx([0.8, 0.2, 0.0, -0.2])


def test_a_prompt_that_would_read_as_padding_is_refused():
    with pytest.raises(ValueError, match="id 0, which is read as padding"):
        Pocket(tiny_model(vocab=4), torch.tensor([[0]]), Score(0), Score(0), cap=2)


# --- the optimum ------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.3, 2.0])
def test_soft_values_give_the_tilted_policy_and_its_worth(desk, beta):
    best, (values, policy) = desk.optimum(beta), desk.soft_values(beta)
    torch.testing.assert_close(desk.along(policy).sum(-1), best, atol=1e-9, rtol=0)
    stands = desk.standing(best)
    worth = stands.proxy - beta * stands.kl
    torch.testing.assert_close(values[0][:, 0], worth, atol=1e-9, rtol=0)
    net = desk.proxy - beta * (best - desk.ref)  # what PPO is paid: the same for every answer
    torch.testing.assert_close(net, worth[:, None].expand_as(net), atol=1e-8, rtol=0)


def test_the_optimum_multiplies_odds_by_the_exponential_of_the_gap(desk):
    best, a, b = desk.optimum(0.3), 1, 2000
    shift = (best - desk.ref)[:, a] - (best - desk.ref)[:, b]
    torch.testing.assert_close(shift, (desk.proxy[:, a] - desk.proxy[:, b]) / 0.3)
    torch.testing.assert_close(best.exp().sum(-1), torch.ones(4).double())


def test_no_policy_beats_the_optimum_or_stands_above_the_frontier(desk):
    g = torch.Generator().manual_seed(0)
    best = desk.optimum(0.3)
    top = desk.standing(best)
    for size in (0.01, 0.3, 3.0):
        noise = torch.randn(best.shape, generator=g, dtype=torch.float64) * size
        for start in (best, desk.ref):
            other = desk.standing((start + noise).log_softmax(-1))
            assert ((other.proxy - 0.3 * other.kl) < (top.proxy - 0.3 * top.kl)).all()
            assert other.proxy.mean() < desk.ceiling(other.kl.mean())


def test_the_frontier_lies_on_the_ceiling_and_gold_turns_over(desk):
    curve = desk.frontier(BETAS)
    torch.testing.assert_close(desk.ceiling(curve.kl), curve.proxy, atol=2e-4, rtol=0)
    assert (desk.ceiling(curve.kl) >= curve.proxy - 1e-9).all()
    start = desk.standing(desk.ref)
    torch.testing.assert_close(desk.ceiling(0.0), start.proxy.mean(), atol=5e-3, rtol=0)
    # a smaller beta: more KL, more proxy, longer; gold rises first and then falls for good
    assert (curve.kl.diff() < 0).all() and (curve.proxy.diff() < 0).all()
    peak = int(curve.gold.argmax())
    assert 5 < peak < len(BETAS) - 5
    assert (curve.gold[: peak + 1].diff() > 0).all() and (curve.gold[peak:].diff() < 0).all()
    assert curve.gold[0] < start.gold.mean() < curve.gold[peak]


def test_best_of_n_by_brute_force_and_its_kl_bound(exact, desk):
    small, _ = exact
    p, r = small.ref[0].exp(), small.proxy[0]
    won = torch.zeros_like(p)
    for i, j in itertools.product(range(len(p)), repeat=2):
        best = [k for k in (i, j) if r[k] == max(r[i], r[j])]
        for k in best:
            won[k] += p[i] * p[j] / len(best)
    torch.testing.assert_close(small.best_of(2)[0].exp(), won, atol=1e-12, rtol=0)
    for n in (1, 2, 8, 64):
        stands = desk.standing(desk.best_of(n))
        assert stands.kl.max() <= best_of_n_kl_bound(n) + 1e-9
        assert stands.proxy.mean() <= desk.ceiling(stands.kl.mean()) + 1e-9


def test_total_variation_by_hand():
    a, b = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.2, 0.5, 0.3]]).log()
    assert total_variation(a, b).item() == pytest.approx(0.3)


# --- gradients, to the last digits ------------------------------------------------------------


def autograd(value, model):
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    pairs = zip(found, model.parameters(), strict=True)
    return torch.cat([(p * 0 if g is None else g).flatten() for g, p in pairs])


def worth(desk, model, values):
    """E of values [P, N] as a function of the weights: nothing is held fixed."""
    return (desk.logprobs(model).exp() * values).sum(-1).mean()


@pytest.mark.parametrize("aggregation", ["sequence_sum", "token_mean"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reward_and_loss_gradients_add_up_by_the_product_rule(exact, estimator, aggregation):
    """d E[r - beta k] = E[(r - beta k) s] - beta E[dk]: only the sum is a gradient."""
    desk, policy = exact
    kinds = {"beta": 0.7, "estimator": estimator, "aggregation": aggregation}
    in_reward, in_loss = (desk.gradient(policy, place=p, **kinds) for p in ("reward", "loss"))
    tokens = desk.along(desk.levels(policy))
    k = ESTIMATORS[estimator](tokens, desk.ref_tokens).sum(-1)  # 0 outside the mask: l = 0 there
    k = k / desk.lengths if aggregation == "token_mean" else k
    total = autograd(worth(desk, policy, desk.proxy - 0.7 * k), policy)
    plain = autograd(worth(desk, policy, desk.proxy), policy)
    assert (in_reward - plain).abs().max() > 0.01
    torch.testing.assert_close(in_reward + in_loss - plain, total, atol=1e-9, rtol=0)
    if (estimator, aggregation) == ("k1", "sequence_sum"):  # dk averages to 0: this one is exact
        torch.testing.assert_close(in_reward, total, atol=1e-9, rtol=0)


def test_what_each_estimator_pulls_at_in_the_loss(exact):
    """k1 at nothing, k2 at the KL of each state, k3 at the forward KL of each state."""
    desk, policy = exact
    plain = desk.gradient(policy, beta=1.0, place="none")
    torch.testing.assert_close(plain, autograd(worth(desk, policy, desk.proxy), policy))
    for place in ("loss", "book_literal"):
        found = desk.gradient(policy, beta=9.0, place=place)
        torch.testing.assert_close(found, plain, atol=1e-9, rtol=0)
    first = desk.levels(policy)[0].detach()[..., desk.words].flatten(1)
    visits = [torch.ones(2, 1).double(), first.exp()]
    for estimator, flip in (("k2", 1), ("k3", -1)):
        pairs = zip(desk.levels(policy), desk.ref_levels, strict=True)
        kl = [exact_kl(*(a, b)[::flip]) for a, b in pairs]
        per_state = sum((v * k).sum(-1).mean() for v, k in zip(visits, kl, strict=True))
        found = desk.gradient(policy, beta=1.0, place="loss", estimator=estimator)
        torch.testing.assert_close(found, plain - autograd(per_state, policy), atol=1e-9, rtol=0)


def test_k1_in_the_loss_averaged_over_tokens_is_a_bonus_for_length(exact):
    """The reference cancels as ever, but E[s / |y|] is the gradient of E[1 / |y|]: what is left
    of beta times the mean log-ratio is a reward of -beta / |y|, more for a longer answer."""
    desk, policy = exact
    for place in ("loss", "book_literal"):
        found = desk.gradient(policy, beta=0.7, place=place, aggregation="token_mean")
        expected = autograd(worth(desk, policy, desk.proxy - 0.7 / desk.lengths), policy)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    plain = desk.gradient(policy, beta=0.7, place="none")
    assert (found - plain).abs().max() > 0.01


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_the_librarys_loss_has_the_enumerated_gradient(exact, objective):
    """E over answers of the gradient of PPO.loss, one answer at a time, with a critic."""
    desk, policy = exact
    config = settings(0.7, max_new_tokens=2, value_coef=0.0, **objective)
    run = PPO(deepcopy(policy), desk.reference, desk.score, desk.prompts, config)
    n, losses = len(desk.responses), []
    for p, prompt in enumerate(desk.prompts):
        given = (prompt.expand(n, -1), desk.responses, desk.mask)
        with torch.no_grad():
            logprobs, values = response_logprobs(policy, *given)
        fields = (*given, logprobs, desk.ref_tokens[p], values, desk.proxy[p])
        rollout = Rollout(*fields, **price_and_credit(Rollout(*fields), config, 0.7))
        parts = [run.loss(rollout.select(torch.tensor([i])))[0] for i in range(n)]
        losses.append((logprobs.sum(-1).exp() * torch.stack(parts)).sum())
    found = -autograd(torch.stack(losses).mean(), run.policy)
    expected = desk.gradient(policy, beta=0.7, **exact_kinds(objective))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def exact_kinds(objective):
    return {key.removeprefix("kl_"): value for key, value in objective.items()}


def returns_under(desk, policy, place):
    """What an answer nets, [P, N]: beta 0.7, k3, charged in the reward or not at all."""
    tokens = desk.along(desk.levels(policy)).detach()
    charge = ESTIMATORS["k3"](tokens, desk.ref_tokens).sum(-1)
    return desk.proxy - (0.7 * charge if place == "reward" else 0.0)


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_rewards_over_their_sd_are_the_gradient_of_the_mean_over_a_fixed_sd(exact, place):
    """By enumeration: d E[net] / sd of each prompt, by the sum's own gradient; k3's as it was."""
    desk, policy = exact
    net, p = returns_under(desk, policy, place), desk.logprobs(policy).exp().detach()
    mean = (p * net).sum(-1, keepdim=True)
    sd = ((p * net.square()).sum(-1, keepdim=True) - mean.square()).sqrt()
    assert sd.max() / sd.min() > 1.1, "or the prompts would not tell the division from a factor"
    kinds = {"beta": 0.7, "place": place, "estimator": "k3"}
    found = desk.gradient(policy, scale_by_sd=True, **kinds)
    charged = desk.gradient(policy, **kinds) - autograd(worth(desk, policy, net), policy)
    expected = autograd(worth(desk, policy, net / sd), policy) + charged
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert (found - desk.gradient(policy, **kinds)).abs().max() > 0.01
    if place == "reward":
        assert charged.abs().max() < 1e-9


def test_rewards_over_their_sd_are_grpos_push_in_a_large_group(exact):
    """By sampling: the library's own advantages of one group of 200 000 a prompt."""
    desk, policy = exact
    net, group = returns_under(desk, policy, "reward"), 200_000
    logp = desk.logprobs(policy)
    g = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logp.detach().exp(), group, replacement=True, generator=g)
    advantages = grpo_advantages(net.gather(1, drawn).flatten(), group).view(drawn.shape)
    sampled = autograd((advantages * logp.gather(1, drawn)).mean(), policy)
    found = desk.gradient(policy, beta=0.7, estimator="k3", scale_by_sd=True)
    assert (sampled - found).norm() < 0.03 * found.norm()
    plain = desk.gradient(policy, beta=0.7, estimator="k3")
    assert (sampled - plain).norm() > 0.1 * found.norm()


def test_at_the_optimum_the_reward_gradient_is_zero_even_before_averaging():
    """One state, so the tilt is within reach: two logits set by hand."""
    model = tiny_model(vocab=4, n_layer=1, context=2)
    desk = Pocket(model, torch.tensor([[2]]), Score(0.5), Score(0.0), cap=1)
    policy = deepcopy(model)
    tables = desk.optimum(0.4)
    assert desk.gradient(policy, beta=0.4).abs().max() > 1e-2
    optimiser = torch.optim.LBFGS(policy.parameters(), max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimiser.zero_grad()
        logp = desk.logprobs(policy)
        loss = -(tables.exp() * logp).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert total_variation(desk.logprobs(policy), tables).max() < 1e-5
    assert desk.gradient(policy, beta=0.4).abs().max() < 1e-4


# --- by sampling ------------------------------------------------------------------------------

FAST = [o for o in OBJECTIVES if name(o) in ("reward-k1-sequence_sum", "loss-k3-sequence_sum")]


def test_sampled_gradients_agree_with_the_exact_ones(desk):
    policy = moved(desk, 0.5)
    for objective, found in sampled_gradients(desk, policy, FAST, beta=1.0, batches=30):
        kinds = exact_kinds(objective)
        right, wrong = (desk.gradient(policy, beta=b, **kinds) for b in (1.0, -1.0))
        away, bound = farthest(found, right, right)
        assert away < bound, f"{name(objective)}: {away:.1f} standard errors off"
        assert farthest(found, wrong, right - wrong)[0] > 2 * bound, (
            "KL with the wrong sign must be seen"
        )


def test_ppo_converges_to_the_enumerated_optimum(desk):
    run = started(desk, settings(0.3), seed=0)
    for _ in anneal(run, 90):
        pass
    with torch.no_grad():
        found = desk.logprobs(run.policy)
    away, stands = total_variation(found, desk.optimum(0.3)), desk.standing(found)
    assert away.mean() < 0.05 and away.max() < 0.08
    # not above it is a theorem, whatever the policy: what can fail is to come close
    assert -1e-9 <= desk.ceiling(stands.kl.mean()) - stands.proxy.mean() < 0.02
    # prompts answered briefly by the reference are not the ones that move most: an inverted U
    assert stands.kl.argmax() in (1, 2) and stands.proxy.mean() > 1.7


def test_anneal_lowers_the_rate_and_leaves_the_rest(desk):
    run = started(desk, settings(0.3, batch=8), seed=0)
    rates = [(run.config.lr, run.config.beta) for _ in anneal(run, 4)]
    assert rates == [pytest.approx((0.01 * share, 0.3)) for share in (1.0, 0.75, 0.5, 0.25)]


# --- longer, or better? -----------------------------------------------------------------------


def test_a_proxy_that_pays_for_words_gains_by_length_and_a_clean_one_within_lengths(desk):
    """Share of the gained reward that is left within answers of equal length, exact optima."""
    shares = []
    for slope in (0.0, 0.3, 0.6, 1.2):
        other = pocket_desk(slope, reference=desk.reference)
        total, within = gain_within_lengths(other, other.optimum(0.3 if slope < 1 else 0.6))
        shares.append(float(within / total))
    assert shares[0] > 0.8 and shares[-1] < 0.3 and shares == sorted(shares, reverse=True)
    pure = Pocket(desk.reference, desk.prompts, Score(0.3, right=0.0), Score(0.0))
    total, within = gain_within_lengths(pure, pure.optimum(0.3))
    assert total > 0.2 and abs(within) < 1e-9


def test_reference_is_the_same_every_time(desk):
    pairs = zip(train_reference().parameters(), desk.reference.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
