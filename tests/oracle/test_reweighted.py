"""The bridge: estimates from a sample, held against the pocket desk's sums, then on real data."""

import itertools

import numpy as np
import pytest
import torch

from minirlhf.drift.data import shipped
from minirlhf.generate import generate
from minirlhf.oracle.pocket import pocket_desk
from minirlhf.oracle.reweighted import (
    best_of_n,
    best_of_n_kl_bound,
    kl_of_optimum,
    under_optimum,
    unseen_share,
    weights,
)
from minirlhf.text import EOS

BETA, DRAWS, TIMES = 0.5, 2000, 600


@pytest.fixture(scope="module")
def desk():
    return pocket_desk()


@pytest.fixture(scope="module")
def drawn(desk):
    """TIMES samples of DRAWS reference answers to the second prompt: their places in the list."""
    rng = np.random.default_rng(0)
    p = desk.ref[1].exp().numpy()
    return torch.from_numpy(rng.choice(len(p), size=(TIMES, DRAWS), p=p / p.sum()))


def agrees(found, truth):
    """Intervals of two standard errors hold the truth as often as they say, and without bias."""
    z = (found.mean - truth) / found.se
    covered = (z.abs() < 1.96).double().mean()
    bias = (found.mean.mean() - truth) / (found.mean.std() / TIMES**0.5)
    spread = found.mean.std() / found.se.mean()
    return 0.92 < covered < 0.975 and bias.abs() < 4 and 0.9 < spread < 1.1


@pytest.mark.parametrize("what", ["proxy", "gold", "lengths"])
def test_expectations_under_the_optimum_agree_with_the_sums(desk, drawn, what):
    values = desk.lengths if what == "lengths" else getattr(desk, what)[1]
    truth = desk.expect(desk.optimum(BETA)[1], values)
    assert abs(truth - desk.expect(desk.ref[1], values)) > 0.05, "the tilt must matter"
    assert agrees(under_optimum(desk.proxy[1][drawn], values[drawn], BETA), truth)


def test_the_optimums_kl_agrees_with_the_sum(desk, drawn):
    truth = desk.standing(desk.optimum(BETA)).kl[1]
    found = kl_of_optimum(desk.proxy[1][drawn], BETA)
    assert truth > 0.2 and agrees(found, truth)


@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("what", ["proxy", "gold"])
def test_best_of_n_agrees_with_the_sums(desk, drawn, what, n):
    values = getattr(desk, what)[1]
    truth = desk.expect(desk.best_of(n)[1], values)
    assert agrees(best_of_n(desk.proxy[1][drawn], values[drawn], n), truth)


def test_best_of_n_where_the_score_leaves_ties_between_unlike_answers(desk, drawn):
    """A score of two values: what tells answers apart is the lot, and the interval must know."""
    scores, values = (desk.proxy[1] > 1).double(), desk.lengths
    above = scores.bool()
    p = desk.ref[1].exp()
    share = p[above].sum()
    means = [(p * values)[a].sum() / p[a].sum() for a in (above, ~above)]
    truth = (1 - (1 - share) ** 3) * means[0] + (1 - share) ** 3 * means[1]
    assert agrees(best_of_n(scores[drawn], values[drawn], 3), truth)


def test_best_of_n_is_the_mean_over_every_set():
    g = torch.Generator().manual_seed(0)
    scores, values = torch.randn(2, 7, generator=g).double()
    sets = [max(s, key=lambda i: scores[i]) for s in itertools.combinations(range(7), 3)]
    expected = values[torch.tensor(sets)].mean()
    found = best_of_n(scores, values, 3, minimum=1)
    torch.testing.assert_close(found.mean, expected, atol=1e-12, rtol=0)
    tied = best_of_n(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([5.0, 1.0, 3.0]), 2, minimum=1)
    assert tied.mean.item() == pytest.approx(2.0)  # a lot decides between 1 and 3


def test_the_effective_size_by_hand():
    w, size = weights(torch.tensor([0.0, np.log(3.0)]), 1.0, minimum=1)
    assert w.tolist() == pytest.approx([0.25, 0.75]) and size.item() == pytest.approx(1 / 0.625)
    assert weights(torch.zeros(80), 0.1)[1].item() == pytest.approx(80)


def test_rows_are_prompts_of_their_own(desk, drawn):
    scores, values = desk.proxy[:2, :][:, drawn[0]], desk.gold[:2, :][:, drawn[0]]
    for estimate in (
        lambda s, v: under_optimum(s, v, 2.0),
        lambda s, v: best_of_n(s, v, 4),
        lambda s, v: kl_of_optimum(s, 2.0),
    ):
        both, alone = estimate(scores, values), estimate(scores[1], values[1])
        assert all(x.shape == (2,) for x in both)
        for found, expected in zip(both, alone, strict=True):
            torch.testing.assert_close(found[1], expected)


def test_too_few_effective_answers_are_refused_in_a_sentence(desk, drawn):
    scores = desk.proxy[0][drawn[0]]
    for ask in (weights, kl_of_optimum, lambda s, b: under_optimum(s, s, b)):
        with pytest.raises(
            ValueError, match=r"at beta 0.02 the 2000 answers count as .*raise beta"
        ):
            ask(scores, 0.02)
    with pytest.raises(ValueError, match=r"at n 500 the 2000 answers count as .*lower n"):
        best_of_n(torch.arange(2000.0), torch.zeros(2000), 500)


def test_a_mode_never_drawn_is_not_seen_by_the_effective_size_but_by_the_bound():
    """One answer of chance 1e-4 that pays 15 beta: pi* gives it .997, most samples nothing."""
    p, beta, pays, count = 1e-4, 0.1, 1.5, 2000
    truth = p * np.exp(pays / beta) / (1 - p + p * np.exp(pays / beta))
    assert truth == pytest.approx(0.997, abs=1e-3)
    hits = torch.from_numpy(np.random.default_rng(0).binomial(count, p, size=600))
    missed = (hits == 0).double().mean().item()
    assert missed == pytest.approx((1 - p) ** count, abs=0.04) and missed > 0.75
    scores = torch.zeros(count, dtype=torch.float64)  # what those samples look like
    blind = under_optimum(scores, scores, beta)  # answered, not refused
    assert blind.ess == pytest.approx(count) and blind.mean == 0 == blind.se
    assert float(unseen_share(scores, beta, pays)) > truth
    assert float(unseen_share(scores, beta, 0.1)) < 0.01  # where the score can pay no more
    seen = scores.clone()
    seen[0] = pays
    with pytest.raises(ValueError, match=r"the 2000 answers count as 1\.0"):  # one hit is enough
        weights(seen, beta)


@pytest.mark.parametrize("count", [50, 2000])
def test_the_bound_on_what_was_not_drawn_errs_one_time_in_twenty(count):
    """By the chance to draw none: for every mode that beats its bound that is below 5 %."""
    beta, pays = 0.5, 2.0
    bound = unseen_share(torch.full((count,), 0.3), beta, pays)
    p = torch.logspace(-6, -0.1, 4000, dtype=torch.float64)
    inside = p * np.exp(pays / beta)
    share = inside / (inside + (1 - p) * np.exp(0.3 / beta))
    beats = share > bound
    none = (1 - p) ** count
    assert beats.any() and none[beats].max() < 0.05 < none[~beats].min() + 1e-3
    small = 3 / count * np.exp((pays - 0.3) / beta)  # the rule of three
    assert float(bound / (1 - bound)) == pytest.approx(small, rel=0.04)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_beta_that_is_no_price_is_refused(bad):
    for ask in (weights, lambda s, b: unseen_share(s, b, 1.0)):
        with pytest.raises(ValueError, match="it must be positive"):
            ask(torch.zeros(100), bad)


@pytest.mark.parametrize("n", [0, 101])
def test_best_of_impossible_many_is_refused(n):
    with pytest.raises(ValueError, match="n must lie between 1 and 100"):
        best_of_n(torch.zeros(100), torch.zeros(100), n)


def test_the_bound_on_best_of_ns_kl():
    found = [best_of_n_kl_bound(n) for n in (1, 4, 16, 64)]
    assert found == pytest.approx([0.0, 0.6363, 1.8351, 3.1745], abs=1e-4)


def test_the_bound_is_met_where_no_answer_is_likely():
    """4000 answers alike in chance and no two in score: KL of best-of-8, summed."""
    place = torch.arange(4001, dtype=torch.float64) / 4000
    p = (place**8).diff()
    kl = (p * (p * 4000).log()).sum().item()
    assert kl == pytest.approx(best_of_n_kl_bound(8), abs=1e-3) and kl < best_of_n_kl_bound(8)


# --- the support desk -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def support():
    """Scores [4, 200] and lengths of the shipped reference's answers to four prompts."""
    case, each = shipped(), 200
    prompts = case.rollout(case.batch_steps[0]).prompts[:4]
    rows = prompts.repeat_interleave(each, 0)
    g = torch.Generator().manual_seed(0)
    out = generate(case.reference, rows, max_new_tokens=48, eos=EOS, generator=g)
    with torch.no_grad():
        scores = case.reward_model().score(rows, *out)
    return scores.view(4, each).double(), out[1].sum(-1).view(4, each).double()


def test_on_the_support_desk_a_large_beta_is_answered_and_a_tiny_one_refused(support):
    scores, lengths = support
    wide, mild = (under_optimum(scores, lengths, beta) for beta in (100.0, 2.0))
    assert (wide.ess > 199).all() and (mild.ess < wide.ess).all() and (mild.ess > 60).all()
    torch.testing.assert_close(wide.mean, lengths.mean(1), rtol=0.05, atol=0)
    assert (kl_of_optimum(scores, 2.0).mean > kl_of_optimum(scores, 100.0).mean).all()
    with pytest.raises(ValueError, match=r"at beta 0.01 the 200 answers count as"):
        under_optimum(scores, lengths, 0.01)


def test_on_the_support_desk_the_pull_is_towards_length(support):
    """The tilt of the default reward model and best-of-4 both lengthen the mean answer."""
    scores, lengths = support
    for found in (under_optimum(scores, lengths, 0.5, minimum=10), best_of_n(scores, lengths, 4)):
        gained = found.mean - lengths.mean(1)
        se = found.se.square().sum().sqrt() / 4
        assert gained.mean() > 3 * se
