"""Labelers: probabilities against closed forms, labels against binomial intervals, bias by hand."""

import math
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from minirlhf.desk.config import PreferenceConfig
from minirlhf.desk.preferences import (
    Pairs,
    bayes_ceiling,
    gold_ceiling,
    label_probability,
    make_pairs,
    raw_bias,
    relabel,
)
from minirlhf.desk.world import Desk, Prompt
from minirlhf.text import EOS

# Points are there to be tuned; what is tested here holds at these ones.
GOLD = {"correct": 0.7, "wrong": -0.5, "missing": -0.3, "direct": 0.1, "pad": 0.03}
DESK = Desk(replace(Desk.load().spec, gold={**GOLD, "hedge": 0.1, "unfinished": 0.1}))
BIASED = PreferenceConfig(
    pairs=2000,
    length_bias=0.08,
    hedge_bias=0.15,
    skim=0.4,
    temperature=0.5,
    holdout=0.1,
    sampled=0.5,
)
FAIR = replace(BIASED, length_bias=0.0, hedge_bias=0.0, skim=0.0)
DATA = make_pairs(DESK, BIASED, np.random.default_rng(0))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pairs_of(**columns: list) -> Pairs:
    """Pairs with hand-written columns; what is not given is 0."""
    n = len(next(iter(columns.values())))
    blank = {f.name: np.zeros(n) for f in fields(Pairs)}
    blank |= {f: torch.zeros(n, 1) for f in ("prompts", "chosen", "chosen_mask", "rejected")}
    blank |= {"rejected_mask": torch.zeros(n, 1)} | {k: np.array(v) for k, v in columns.items()}
    return Pairs(**blank)


def differences(pairs: Pairs) -> list[np.ndarray]:
    return [
        getattr(pairs, f"{name}_chosen").astype(float) - getattr(pairs, f"{name}_rejected")
        for name in ("gold", "fact", "length", "hedged")
    ]


@pytest.mark.parametrize(
    ("difference", "dials", "expected"),
    [
        # ten tokens of padding: gold -0.3, bias +0.8, noise 0.5
        ((-0.3, 0.0, 10, 0), {"length_bias": 0.08, "skim": 0.0}, sigma(0.5 / 0.5)),
        ((-0.3, 0.0, 10, 0), {"length_bias": 0.0, "skim": 0.0}, sigma(-0.3 / 0.5)),
        ((-0.3, 0.0, 10, 0), {"length_bias": 0.0, "temperature": 2.0}, sigma(-0.3 / 2)),
        # a hedge: gold -0.1 and the dial
        ((-0.1, 0.0, 0, 1), {"length_bias": 0.0, "hedge_bias": 0.25}, sigma(0.15 / 0.5)),
        # a right answer against an evasion: who skims sees no difference at all
        ((1.1, 1.1, 0, 0), {"skim": 0.0}, sigma(1.1 / 0.5)),
        ((1.1, 1.1, 0, 0), {"skim": 1.0}, 0.5),
        ((1.1, 1.1, 0, 0), {"skim": 0.3}, 0.7 * sigma(2.2) + 0.3 * 0.5),
        # both: the skimmer keeps gold's charge for style, -0.4
        (
            (0.7, 1.1, -5, -1),
            {"length_bias": 0.1, "hedge_bias": 0.2, "skim": 0.5},
            0.5 * sigma((0.7 - 0.7) / 0.5) + 0.5 * sigma((-0.4 - 0.7) / 0.5),
        ),
    ],
)
def test_label_probability_closed_form(difference, dials, expected):
    a_minus_b = [np.array([float(d)]) for d in difference]
    config = replace(FAIR, **dials)
    assert label_probability(*a_minus_b, config)[0] == pytest.approx(expected, abs=1e-12)
    flipped = label_probability(*(-d for d in a_minus_b), config)[0]
    assert flipped == pytest.approx(1 - expected, abs=1e-12)


def test_huge_gaps_do_not_overflow():
    config = replace(FAIR, temperature=1e-300)
    gap = np.array([1.0, -1.0])
    assert label_probability(gap, gap, 0 * gap, 0 * gap, config).tolist() == [1.0, 0.0]


def test_labels_fall_as_often_as_their_probability_says():
    config = replace(BIASED, pairs=300, holdout=0.0)
    data = make_pairs(DESK, config, np.random.default_rng(1))
    p = data.train.p_label
    assert np.allclose(p, label_probability(*differences(data.train), config), atol=1e-12)
    rng, rounds = np.random.default_rng(2), 200
    stays = np.zeros(len(p))
    for _ in range(rounds):
        drawn = relabel(data, config, rng).train
        same = (drawn.chosen == data.train.chosen).all(1).numpy()
        assert np.allclose(drawn.p_label, np.where(same, p, 1 - p), atol=1e-12)
        stays += same
    z = (stays - rounds * p) / np.sqrt(rounds * p * (1 - p))
    assert np.abs(z).max() < 4.5 and abs(z.mean()) < 4 / np.sqrt(len(p))
    assert 0.8 < z.std() < 1.2, "labels are independent draws"


def test_columns_agree_with_the_tensors():
    for pairs in (DATA.train, DATA.heldout):
        vocabulary = DESK.vocabulary
        for end in ("chosen", "rejected"):
            tokens, mask = getattr(pairs, end), getattr(pairs, f"{end}_mask")
            assert tokens.shape == mask.shape == (len(pairs), DESK.max_response)
            assert (mask.sum(1).numpy() == getattr(pairs, f"length_{end}")).all()
            last = mask.sum(1) - 1
            assert (tokens[torch.arange(len(pairs)), last] == EOS).all()
            assert (tokens[~mask] == 0).all() and (tokens[mask] != 0).all()
        for i in range(0, len(pairs), 37):
            text = vocabulary.decode(pairs.prompts[i])
            (prompt,) = [p for p in _prompts_of(text) if p.stratum == pairs.stratum[i]]
            for end in ("chosen", "rejected"):
                grade = DESK.grade(prompt, vocabulary.decode(getattr(pairs, end)[i]))
                assert grade.gold == getattr(pairs, f"gold_{end}")[i]
                assert grade.fact == getattr(pairs, f"fact_{end}")[i]
                assert grade.hedged == getattr(pairs, f"hedged_{end}")[i]


def _prompts_of(text: str):
    """The prompt behind a decoded text: the asked value is the one after its slot's label."""
    words = text.split()
    for intent in DESK.spec.intents.values():
        for wording, question in enumerate(intent.questions):
            if text.endswith(f" . {question}"):
                value = words[words.index(DESK.spec.labels[intent.slot]) + 1]
                yield Prompt(text, intent.name, intent.stratum, intent.slot, value, wording)


def test_the_two_answers_differ_and_the_split_is_a_partition():
    config = replace(BIASED, pairs=500, holdout=0.2)
    data = make_pairs(DESK, config, np.random.default_rng(3))
    assert (len(data.train), len(data.heldout)) == (400, 100)
    for pairs in (data.train, data.heldout):
        assert not (pairs.chosen == pairs.rejected).all(1).any()
    whole = make_pairs(DESK, replace(config, holdout=0.0), np.random.default_rng(3)).train
    rows = sorted(whole.prompts.tolist())
    assert rows == sorted(data.train.prompts.tolist() + data.heldout.prompts.tolist())
    assert (
        len(make_pairs(DESK, replace(config, holdout=0.0), np.random.default_rng(3)).heldout) == 0
    )


def test_relabel_changes_winners_and_nothing_else():
    data = relabel(DATA, FAIR, np.random.default_rng(4))
    for old, new in ((DATA.train, data.train), (DATA.heldout, data.heldout)):
        flipped = (old.chosen != new.chosen).any(1).numpy()
        assert 0.1 < flipped.mean() < 0.7
        undone = new.swap(flipped)
        for field in fields(Pairs):
            if field.name != "p_label":
                a, b = getattr(old, field.name), getattr(undone, field.name)
                assert (a == b).all(), field.name
    same_dials = [relabel(DATA, FAIR, np.random.default_rng(4)) for _ in range(2)]
    assert torch.equal(same_dials[0].train.chosen, same_dials[1].train.chosen)


def test_without_bias_the_shorter_of_two_right_answers_wins():
    """Equal in fact and hedging, k padding tokens apart: P(longer wins) = sigmoid(-.03 k / .5)."""
    pairs = relabel(DATA, FAIR, np.random.default_rng(5)).train
    gold, fact, length, hedged = differences(pairs)
    # answers without a repeated step, so that every extra token is padding
    style_only = np.isclose(fact, 0) & (hedged == 0) & np.isclose(gold, -0.03 * length)
    rows = style_only & (length != 0)
    assert rows.sum() > 100
    expected = np.array([sigma(-0.03 * k / 0.5) for k in np.abs(length[rows])])
    wins = (length[rows] > 0).sum()
    assert abs(wins - expected.sum()) < 4 * np.sqrt((expected * (1 - expected)).sum())
    assert wins / rows.sum() < 0.5
    biased = relabel(DATA, replace(FAIR, length_bias=0.08), np.random.default_rng(5)).train
    assert raw_bias(biased)["longer_wins_matched"] > 0.6 > 0.5 > raw_bias(pairs)["longer_wins"]


def test_each_dial_moves_its_own_share():
    def shares(**dials: float) -> dict[str, float]:
        config = replace(FAIR, temperature=0.1, **dials)
        return raw_bias(relabel(DATA, config, np.random.default_rng(6)).train)

    fair, longer, hedger, skim = (
        *(shares(), shares(length_bias=0.1), shares(hedge_bias=0.5), shares(skim=1.0)),
    )
    assert longer["longer_wins"] > fair["longer_wins"] + 0.2
    assert hedger["hedged_wins"] > fair["hedged_wins"] + 0.15
    assert abs(hedger["longer_wins"] - fair["longer_wins"]) < 0.1
    rejected_facts = [
        (relabel(DATA, replace(FAIR, temperature=0.1, skim=s), np.random.default_rng(6)).train)
        for s in (0.0, 1.0)
    ]
    right = [float((p.fact_chosen > p.fact_rejected)[_unequal(p)].mean()) for p in rejected_facts]
    # who checks ranks by the fact; who skims is right as often as style happens to agree with it
    gold, fact, _, _ = (d[_unequal(DATA.train)] for d in differences(DATA.train))
    agrees = np.array(
        [sigma(s * (g - f) / 0.1) for g, f, s in zip(gold, fact, np.sign(fact), strict=True)]
    )
    spread = np.sqrt((agrees * (1 - agrees)).sum()) / len(agrees)
    assert abs(right[1] - agrees.mean()) < 4 * spread
    assert right[0] > 0.9 and right[0] > right[1] + 0.1
    assert skim["n_longer_wins"] == fair["n_longer_wins"], "the pairs are the same"


def _unequal(pairs: Pairs) -> np.ndarray:
    return ~np.isclose(pairs.fact_chosen, pairs.fact_rejected)


def test_raw_bias_by_hand():
    pairs = pairs_of(
        length_chosen=[9, 5, 7, 7, 20],
        length_rejected=[5, 9, 7, 6, 8],
        hedged_chosen=[True, False, True, False, False],
        hedged_rejected=[False, True, True, False, False],
        fact_chosen=[0.8, 0.8, 0.1, 0.8, 0.3],
        fact_rejected=[0.8, 0.8, 0.8, -0.3, 0.3],
    )
    assert raw_bias(pairs) == {
        "n": 5,
        "longer_wins": 3 / 4,
        "n_longer_wins": 4,
        "longer_wins_matched": 2 / 3,
        "n_longer_wins_matched": 3,
        "hedged_wins": 1 / 2,
        "n_hedged_wins": 2,
        "hedged_wins_matched": 1 / 2,
        "n_hedged_wins_matched": 2,
    }
    none = raw_bias(pairs.select(np.array([False, False, True, False, False])))
    assert math.isnan(none["longer_wins"]) and none["n_hedged_wins"] == 0


def test_ceilings_by_hand_and_by_labels():
    pairs = pairs_of(
        p_label=[0.9, 0.2, 0.6, 0.5],
        gold_chosen=[1.0, 1.0, 0.0, 0.3],
        gold_rejected=[0.0, 0.0, 1.0, 0.3],
    )
    assert bayes_ceiling(pairs) == pytest.approx((0.9 + 0.8 + 0.6 + 0.5) / 4)
    assert gold_ceiling(pairs) == pytest.approx((0.9 + 0.2 + 0.4 + 0.5) / 4)
    # fair labelers: the auditor's ranking is the best there is, ties apart
    fair = relabel(DATA, FAIR, np.random.default_rng(7)).train
    assert gold_ceiling(fair) == pytest.approx(bayes_ceiling(fair), abs=1e-9)
    biased = DATA.train
    assert gold_ceiling(biased) < bayes_ceiling(biased) - 0.1
    # the ceiling is what the best ranking scores on labels that were really drawn
    best = np.where(biased.p_label > 0.5, 1.0, 0.0)
    n = len(biased)
    assert abs(best.mean() - bayes_ceiling(biased)) < 4 * 0.5 / math.sqrt(n)


# ---------------------------------------------------------------- the sampler
def test_the_sampler_writes_its_share_of_the_answers():
    asked: list[str] = []

    def sampler(prompts):
        asked.extend(p.text for p in prompts)
        return [f"{DESK.concise(p)} we we we" for p in prompts]

    data = make_pairs(DESK, replace(BIASED, pairs=400), np.random.default_rng(0), sampler)
    assert abs(len(asked) - 400) < 4 * math.sqrt(800 * 0.25)
    we = DESK.vocabulary.encode("we we we")
    ends = 0
    for pairs in (data.train, data.heldout):
        for end in ("chosen", "rejected"):
            for ids, mask in zip(getattr(pairs, end), getattr(pairs, f"{end}_mask"), strict=True):
                ends += ids[mask].tolist()[-4:-1] == we
    # where both answers were the sampler's, and equal, the second one was written anew
    both = len(asked) - len(set(asked))
    assert ends == len(asked) - both > 200
    alone = make_pairs(DESK, replace(BIASED, pairs=40, sampled=0.0), _rng(), sampler=_never)
    assert len(alone.train) == 36


def _never(prompts):
    raise AssertionError("asked although its share is 0")


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_sampled_answers_at_the_edges():
    """Empty answers end at once; one that fills the response was cut off, and is graded so."""
    full = " ".join(["we"] * 60)
    config = replace(BIASED, pairs=200, sampled=1.0, holdout=0.0)
    turn = iter(range(10**6))
    pairs = make_pairs(
        DESK, config, _rng(), lambda prompts: ["" if next(turn) % 2 else full for _ in prompts]
    ).train
    lengths = {(int(a), int(b)) for a, b in _lengths(pairs)}
    assert lengths == {(1, 48), (48, 1)}
    long = pairs.length_chosen == 48
    assert not (pairs.chosen[torch.from_numpy(long)] == EOS).any()
    assert (pairs.chosen[torch.from_numpy(~long), 0] == EOS).all()
    # missing -0.3, 48 padding tokens, cut off
    assert np.allclose(pairs.gold_chosen[long], -0.3 - 48 * 0.03 - 0.1)
    with pytest.raises(ValueError, match="the sampler gave 3 answers to 400 prompts"):
        make_pairs(DESK, config, _rng(), lambda prompts: ["", "", ""])


def _lengths(pairs: Pairs):
    return zip(pairs.length_chosen, pairs.length_rejected, strict=True)


def test_a_desk_with_one_answer_cannot_make_pairs():
    one = replace(
        DESK.spec,
        writers={key: (["dodge"], [1.0]) for key in DESK.spec.writers},
        phrases={**DESK.spec.phrases, "hedge": DESK.spec.phrases["hedge"][:1]},
    )
    with pytest.raises(ValueError, match=r"has one answer only to '.* <sep>'; add a style"):
        make_pairs(Desk(one), PreferenceConfig(pairs=2), _rng())


# ---------------------------------------------------------------- set-up
def test_same_seed_same_pairs_and_fast():
    start = time.process_time()
    a = make_pairs(DESK, PreferenceConfig(), np.random.default_rng(0))
    assert time.process_time() - start < 2.5
    b = make_pairs(DESK, PreferenceConfig(), np.random.default_rng(0))
    for field in fields(Pairs):
        left, right = getattr(a.train, field.name), getattr(b.train, field.name)
        equal = torch.equal if isinstance(left, Tensor) else np.array_equal
        assert equal(left, right)
    other = make_pairs(DESK, PreferenceConfig(), np.random.default_rng(1))
    assert not torch.equal(a.train.prompts, other.train.prompts)


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"pairs": 1}, r"preferences.pairs is 1; label at least 2 pairs"),
        ({"holdout": 1.0}, r"preferences.holdout is 1.0; give a share in \[0, 1\)"),
        ({"holdout": -0.1}, r"preferences.holdout is -0.1; give a share in \[0, 1\)"),
        ({"pairs": 3, "holdout": 0.9}, r"holdout 0.9 leaves none of 3 pairs to train on; lower"),
        ({"skim": 1.5}, r"preferences.skim is 1.5; give a share in \[0, 1\]"),
        ({"sampled": float("nan")}, r"preferences.sampled is nan; give a share in \[0, 1\]"),
        ({"temperature": 0.0}, r"preferences.temperature is 0.0; give a number > 0"),
        ({"temperature": float("inf")}, r"preferences.temperature is inf"),
        ({"length_bias": float("nan")}, r"preferences.length_bias is nan; give a finite number"),
        ({"hedge_bias": float("inf")}, r"preferences.hedge_bias is inf; give a finite number"),
    ],
)
def test_bad_dials_are_named(dials, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**dials)
