"""The battery names what was planted, from nine runs of a black box, and says when it cannot."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed

from minirlhf.autopsy.battery import (
    BATCH,
    GROUP,
    MOVING,
    NO_GAP,
    PENALTIES,
    PRICES,
    SCORES,
    SMALL,
    Trace,
    World,
    diagnose,
    ends,
    judge,
    lift,
    near,
    shown,
)
from minirlhf.autopsy.battery_desk import P0, QUESTIONS, TwoAnswerDesk, log_odds
from minirlhf.config import PPOConfig
from minirlhf.engine.workers import available
from minirlhf.model import Transformer, response_outputs
from minirlhf.oracle.closed_form import two_answer

BOOK, K3 = PENALTIES["book_literal", "k1"], PENALTIES["loss", "k3"]
IN_LOSS = {"kl_place": "loss", "kl_estimator": "k3"}
PLANTS = {  # what is planted -> settings, the names that must be found, and no others
    "small beta": ({}, {SMALL}),
    "book-literal": ({"kl_place": "book_literal"}, {BOOK}),
    "k3 in the loss": (IN_LOSS, {K3}),
    "whiten before KL": ({"whiten_rewards": "scores"}, {SCORES}),
    "GRPO-std": ({"advantage": "grpo", "group": 8, **IN_LOSS}, {GROUP, K3}),
    "moving reference": ({}, {MOVING}),
    "no length bias": ({}, {NO_GAP}),
}


def planted(name: str, seed: int) -> TwoAnswerDesk:
    """The subject with one cause in it; beta, gap, p0, epochs and the rest differ by seed."""
    r = np.random.default_rng(seed)
    gap = float(r.uniform(0.15, 0.6))
    beta = gap / float(r.uniform(1.5, 5.0))
    odds = np.array(P0) / (1 - np.array(P0)) * np.exp(r.uniform(-0.7, 0.7, 8))
    p0 = odds / (1 + odds)  # .0015 to .67
    options = {"beta": beta, "epochs": int(r.integers(1, 3)), **PLANTS[name][0]}
    refresh = int(r.integers(5, 12))
    # over the batch's sd, as the default is, where that changes the size of a step alone
    outside = options.get("kl_place") == "loss" or seed % 2
    options["whiten_advantages"] = "none" if outside else "scale"
    if name == "no length bias":
        gap = 0.0
    moving = {"refresh": refresh} if name == "moving reference" else {}
    return TwoAnswerDesk(PPOConfig(**options), gap, p0=p0, seed=seed, **moving)


@functools.cache
def judged(name: str, seed: int):
    return diagnose(planted(name, seed))


@pytest.mark.parametrize("name", PLANTS)
def test_what_was_planted_is_named_and_nothing_else(name):
    found, _ = judged(name, 1)
    assert found.causes == PLANTS[name][1]
    assert found.lines and all(line.fits for line in found.lines)
    assert not set(found.others) & PLANTS[name][1]
    said, gap, head, *rest = found.table().splitlines()
    assert said == f"Verdict: {found.said}." and gap == ""
    at = head.index("measured") + len("measured")
    for row, x in zip(rest, found.lines, strict=False):
        assert row.split()[0] == "fits" and row[5:].startswith(x.symptom)
        assert row[:at].endswith(f" {shown(x.measured)}") and row[at:] == f"  {x.expected}"


def test_rounding_alone_is_not_told_apart():
    assert shown(4.28e-07) == shown(-1.9e-07) == "< 1e-6"
    assert (shown(0.0), shown(1.5e-06), shown(-0.98765)) == ("0", "1.5e-06", "-0.988")


def test_the_push_is_gap_less_the_price_of_the_log_odds_moved():
    """With a correct penalty the loss's own gradient is the ascent of L0, probe by probe."""
    _, traces = judged("small beta", 1)  # advantages not whitened at odd seeds
    for name in PRICES:
        t = traces[name]
        net, free = lift(t.net, t), lift(t.free, t)
        exact = t.gap - t.beta[:, None] * (t.share.logit() - t.start.logit())
        seen = net.isfinite()
        assert int(seen.sum()) > 10
        assert torch.allclose(net[seen], exact[seen], atol=2e-3)
        assert torch.allclose(free[seen], torch.tensor(t.gap, dtype=torch.float64), atol=1e-4)


def test_k3_pulls_less_than_the_log_odds_moved():
    """Its pull is (p - p0) / (p (1 - p)), that of the forward KL."""
    t = judged("k3 in the loss", 1)[1]["as it is"]
    net, p, p0 = lift(t.net, t), t.share, t.start
    exact = t.gap - t.beta[:, None] * (p - p0) / (p * (1 - p))
    seen = net.isfinite()
    assert torch.allclose(net[seen], exact[seen], atol=1e-3)
    assert ((p.logit() - p0.logit()) * t.beta[:, None])[-1].max() > t.gap  # k1 would have held


def test_the_books_penalty_pushes_every_answer_down_and_holds_none_back():
    t = judged("book-literal", 1)[1]["as it is"]
    seen = lift(t.net, t).isfinite()
    assert torch.allclose(lift(t.net, t)[seen], lift(t.free, t)[seen], atol=1e-3)
    each = (t.net - t.free)[seen]
    assert torch.allclose(each, -t.beta[:, None, None].expand_as(t.net)[seen], atol=1e-3)


def test_grpo_pays_a_rare_answer_the_same_whatever_the_gap():
    """A lone V of a group of 8 stands 7 / sqrt(8) sd above its mean, sqrt((1 - p) / p) at 1/8."""
    traces = judged("GRPO-std", 1)[1]
    highest = float(traces["as it is"].free[..., 0].nan_to_num(0.0).max())
    assert highest == pytest.approx(7 / math.sqrt(8), rel=0.01)
    first = [float(lift(t.free, t)[0].nanmean()) for t in traces.values()]
    runs = dict(zip(traces, first, strict=True))
    assert runs["gap / 100"] == pytest.approx(runs["as it is"], rel=0.15)


def test_ends_are_those_of_the_closed_forms():
    t = judged("small beta", 1)[1]["as it is"]
    beta, gap = float(t.beta[-1]), t.gap
    tilt = ends(World("reward", "k1", "plain", False), t)
    assert torch.allclose(tilt, two_answer(t.start, gap, beta))
    scores = ends(World("reward", "k1", "scores", False), t)
    sd = float(t.score_sd[-1])
    assert torch.allclose(scores, two_answer(t.start, gap, beta * sd))
    assert (ends(World("book_literal", "k1", "plain", False), t) == 1).all()
    assert ends(World("reward", "k1", "plain", True), t) is None
    p = ends(World("loss", "k3", "plain", False), t)
    assert torch.allclose(beta * (p - t.start), gap * p * (1 - p), atol=1e-6)


def altered(traces, **how):
    return {name: replace(t, **{k: f(t) for k, f in how.items()}) for name, t in traces.items()}


def test_it_cannot_tell_what_is_not_on_the_list():
    traces = judged("small beta", 1)[1]
    assert judge(traces).causes == {SMALL}
    g = torch.Generator().manual_seed(0)

    def anywhere(t: Trace):
        return torch.rand(8, generator=g, dtype=torch.float64)

    drifted = altered(traces, end=anywhere)  # p moves at random
    stated = altered(traces, beta=lambda t: 3 * t.beta)  # a third of the price is charged
    blind = altered(traces, net=lambda t: torch.randn(t.net.shape, generator=g).double())
    half = altered(traces, kl=lambda t: t.kl * torch.tensor([0.8, 1.0]))
    for doctored in (drifted, stated, blind, half):
        found = judge(doctored)
        assert found.causes is None and "cannot tell" in found.said
    unpaid = altered(traces, scores=lambda t: t.scores * 0)  # it rises although nothing is paid
    assert judge(unpaid).causes is None


def test_rewards_of_chance_alone_name_no_cause():
    class Noisy(TwoAnswerDesk):
        def score(self, gap):
            g = torch.Generator().manual_seed(9)
            return lambda prompts, y, mask: 0.5 * torch.randn(len(y), generator=g)

    found, _ = diagnose(Noisy(PPOConfig(beta=0.1), 0.3, steps=12))
    assert found.causes in (None, {NO_GAP})


def test_the_desk_says_what_it_was_asked_to_say():
    desk = TwoAnswerDesk(PPOConfig(), 0.3)
    p = torch.sigmoid(log_odds(desk.reference).double())
    wanted = torch.tensor([0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.35, 0.5], dtype=torch.float64)
    assert torch.allclose(p, wanted, rtol=0.1)
    tokens = QUESTIONS[torch.tensor([5, 0, 5])]
    whole = Transformer(desk.reference.config)
    whole.load_state_dict(desk.reference.state_dict())
    answers = torch.ones(3, 1, dtype=torch.long)
    given = (tokens, answers, answers > 0)
    for ours, plain in zip(
        response_outputs(desk.reference, *given), response_outputs(whole, *given), strict=True
    ):
        assert torch.allclose(ours, plain, atol=1e-6)


def test_bad_subjects_are_refused_in_one_sentence():
    for options, word in (({"refresh": 0}, "refresh"), ({}, "gap")):
        gap = math.nan if word == "gap" else 0.3
        with pytest.raises(ValueError, match=word):
            TwoAnswerDesk(PPOConfig(), gap, **options)
    with pytest.raises(ValueError, match="beta"):
        TwoAnswerDesk(PPOConfig(beta=0.0), 0.3)


def test_what_was_not_measured_speaks_against():
    assert near("x", 1.04, 1, 0.05).fits and not near("x", 1.06, 1, 0.05).fits
    assert not near("x", math.nan, 1, 0.05).fits


def causes(name: str, seed: int):
    return diagnose(planted(name, seed))[0].causes


FRESH = range(300, 310)  # thresholds were set while looking at others


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTS)
def test_nine_of_ten_planted_runs_are_named(ladder, name):
    """And none gets a wrong name: what is not right is "cannot tell"."""
    wanted, right, wrong = PLANTS[name][1], 0, []
    calls = (delayed(causes)(name, seed) for seed in FRESH)
    for seed, found in zip(FRESH, Parallel(n_jobs=min(2, available()))(calls), strict=True):
        right += found == wanted
        wrong += [seed] if found is not None and found != wanted else []
    words = f"at least 9 of 10 named {' and '.join(sorted(wanted))}, none wrongly"
    good = right >= 9 and not wrong
    assert ladder.add(
        "L4 the mechanism battery", f"planted: {name}", words, right, held=good, seed="300-309"
    ), wrong


@pytest.mark.slow
def test_two_causes_at_once_are_both_named(ladder):
    options = {"whiten_advantages": "none", "beta": 0.1, **IN_LOSS}
    found, _ = diagnose(TwoAnswerDesk(PPOConfig(**options), 0.3, refresh=8))
    assert found.causes == {K3, MOVING}
    options = {"whiten_advantages": "scale", "beta": 0.1, **IN_LOSS}
    found, _ = diagnose(TwoAnswerDesk(PPOConfig(**options), 0.3))
    assert found.causes == {K3, BATCH}


@pytest.mark.slow
def test_a_dear_price_lets_nothing_drift():
    found, _ = diagnose(TwoAnswerDesk(PPOConfig(beta=4.0, whiten_advantages="none"), 0.2))
    assert found.causes == frozenset() and "nothing drifted" in found.said
