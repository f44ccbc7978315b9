"""Rules on pairs, by hand: which rows stay, what is added and who wins it; gold is never read."""

import math
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minirlhf.desk.config import PreferenceConfig
from minirlhf.desk.preferences import Pairs, make_pairs, pack_pairs
from minirlhf.desk.world import Desk
from minirlhf.remedies import pairs as pair_rules
from minirlhf.text import EOS

DESK = Desk.load()
RUN: Any = SimpleNamespace(desk=DESK)
PHRASES = {phrase: group for group, said in DESK.spec.phrases.items() for phrase in said}
REAL = make_pairs(DESK, PreferenceConfig(pairs=400, holdout=0.0), np.random.default_rng(5)).train
B, D = "brief", "detailed"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pairs_of(rows: list[tuple]) -> Pairs:
    """Pairs from (length won, length lost, won hedges, lost hedges, stratum[, p_label]).

    Row i is recognisable everywhere: its prompt is i, its winner 10 i + 1 and its loser 10 i + 2.
    """
    n, number = len(rows), torch.arange(len(rows))[:, None]
    lengths, hedges = np.array([r[:2] for r in rows]), np.array([r[2:4] for r in rows], bool)
    words = {"gold": lambda k: np.arange(n) * 0.1 + k, "fact": lambda k: np.arange(n) * 0.2 - k}
    made: dict[str, Any] = {"prompts": number, "stratum": np.array([r[4] for r in rows])}
    for k, end in enumerate(("chosen", "rejected")):
        made |= {end: 10 * number + 1 + k, f"{end}_mask": torch.ones(n, 1, dtype=torch.bool)}
        made |= {f"length_{end}": lengths[:, k], f"hedged_{end}": hedges[:, k]}
        made |= {f"{name}_{end}": column(k) for name, column in words.items()}
    return Pairs(p_label=np.array([r[5] if len(r) > 5 else 0.9 for r in rows]), **made)


def same(one: Pairs, other: Pairs) -> bool:
    """Every column equal, bit for bit."""
    columns = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Pairs)]
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in columns)


def rows_of(kept: Pairs, pairs: Pairs) -> list[int]:
    """Which rows of hand-made pairs were kept, after a check that nothing else is different."""
    rows = kept.prompts[:, 0].numpy()
    assert (np.diff(rows) > 0).all(), "none twice, and in the old order"
    assert same(kept, pairs.select(rows)), "kept pairs are not changed"
    return rows.tolist()


def count(rows: list[int], *groups: range) -> list[int]:
    return [sum(row in group for row in rows) for group in groups]


# --- which of them are ranked -------------------------------------------------------------------


def test_balance_keeps_as_many_longer_winners_as_shorter_ones_and_every_tie():
    pairs = pairs_of([(9, 4, 0, 0, B)] * 5 + [(4, 30, 0, 0, D)] * 2 + [(7, 7, 0, 1, B)] * 3)
    chosen = set()
    for seed in range(12):
        kept = rows_of(pair_rules.balance(pairs, RUN, rng(seed)), pairs)
        assert count(kept, range(5), range(5, 7), range(7, 10)) == [2, 2, 3]
        chosen |= {row for row in kept if row < 5}
    assert chosen == set(range(5)), "which of the many are kept is drawn at random"
    turned = pairs.swap(np.ones(10, bool))  # the shorter ones are the many: they are cut as well
    kept = rows_of(pair_rules.balance(turned, RUN, rng()), turned)
    assert count(kept, range(5), range(5, 7), range(7, 10)) == [2, 2, 3]


def test_pairs_that_one_side_always_wins_cannot_be_balanced():
    one_sided = pairs_of([(9, 4, 0, 0, B)] * 5)
    assert len(pair_rules.balance(one_sided, RUN, rng())) == 0


def test_match_on_length_counts_within_bins_of_three_tokens_and_within_a_stratum():
    pairs = pairs_of(
        [(8, 5, 0, 0, B)] * 3 + [(5, 10, 1, 0, B)]  # bin 3-5, brief: 3 against 1
        + [(9, 5, 0, 0, D)] + [(5, 9, 0, 0, D)] * 2  # the same bin, detailed: 1 against 2
        + [(11, 5, 0, 0, B)] * 2 + [(5, 10, 0, 0, D)] * 0  # bin 6-8: nobody to match with
        + [(6, 6, 1, 0, B)] * 2  # equally long: blind to hedges, so they stay
        + [(7, 5, 0, 0, B), (5, 8, 0, 0, B)]  # 2 and 3 tokens lie in different bins
    )  # fmt: skip
    for seed in range(5):
        rule = partial(pair_rules.match, hedges=False)
        kept = rows_of(rule(pairs, RUN, rng(seed)), pairs)
        groups = (range(3), range(3, 4), range(4, 5), range(5, 7), range(7, 9), range(9, 11))
        # row 12 (3 tokens, brief) joins the shorter winners of the first bin: 2 against 2
        first, other, *rest = count(kept, *groups)
        assert first == 2 and other + (12 in kept) == 2
        assert rest == [1, 1, 0, 2] and 11 not in kept


def test_match_on_both_axes_counts_apart_who_hedges():
    pairs = pairs_of(
        [(9, 5, 1, 0, B)] * 3 + [(5, 9, 0, 1, B)]  # the longer one hedges: 3 against 1
        + [(9, 5, 0, 1, B)] + [(5, 9, 1, 0, B)] * 2  # the shorter one hedges: 1 against 2
        + [(9, 5, 1, 1, B)] * 2 + [(5, 9, 0, 0, B)] * 2  # both or neither: one kind, 2 against 2
        + [(6, 6, 1, 0, D)] * 3 + [(6, 6, 0, 1, D)]  # equally long: the hedger won 3, lost 1
        + [(6, 6, 1, 1, D), (6, 6, 0, 0, D)]  # nothing to match
    )  # fmt: skip
    edges = [0, 3, 4, 5, 7, 9, 11, 14, 15, 17]
    groups = [range(a, b) for a, b in pairwise(edges)]
    for seed in range(5):
        kept = rows_of(pair_rules.match(pairs, RUN, rng(seed)), pairs)
        assert count(kept, *groups) == [1, 1, 1, 1, 2, 2, 1, 1, 2]
        blind = rows_of(pair_rules.match(pairs, RUN, rng(seed), hedges=False), pairs)
        assert len(blind) == 10 + 6, "without hedges 6 longer winners against 5, and all 6 ties"


def by_kind(pairs: Pairs) -> dict[tuple, Counter]:
    """(bin, stratum, who alone hedges) -> how often the longer one won (1) and lost (-1)."""
    found: dict[tuple, Counter] = {}
    columns = (pairs.length_chosen, pairs.length_rejected, pairs.hedged_chosen, pairs.stratum)
    for won, lost, hedge, stratum, other in zip(*columns, pairs.hedged_rejected, strict=True):
        longer_won, who = won > lost, "neither or both"
        if won != lost and hedge != other:
            who = "longer" if hedge == longer_won else "shorter"
        sign = 1 if longer_won else -1
        if won == lost:
            sign = int(hedge) - int(other)
        found.setdefault((abs(won - lost) // 3, stratum, who), Counter())[sign] += 1
    return found


def test_matched_pairs_of_the_desk_say_nothing_about_the_longer_one():
    """In the first bin, equally long pairs of which one hedges are counted among the others."""
    before, after = by_kind(REAL), by_kind(pair_rules.match(REAL, RUN, rng(1)))
    assert any(c[1] >= c[-1] + 3 for c in before.values())
    for kind, counts in before.items():
        fewer = min(counts[1], counts[-1])
        left = after.get(kind, Counter())
        assert left[1] == left[-1] == fewer and left[0] == counts[0], kind


def test_equal_keeps_pairs_of_nearly_one_length_and_manner():
    rows = [(9, 7, 0, 0, B), (7, 9, 1, 1, D), (9, 6, 0, 0, B), (6, 9, 1, 1, B)]
    rows += [(8, 8, 1, 0, B), (9, 8, 0, 1, D), (8, 8, 0, 0, D)]
    pairs = pairs_of(rows)
    assert rows_of(pair_rules.equal(pairs, RUN, rng()), pairs) == [0, 1, 6]


@pytest.mark.parametrize(
    "rule",
    [
        pair_rules.balance,
        pair_rules.match,
        pair_rules.equal,
        pair_rules.ties,
        pair_rules.other_prompts,
        pair_rules.counterfactual,
        partial(pair_rules.counterfactual, tie=True),
    ],
)
def test_no_rule_reads_gold_and_none_changes_what_it_is_given(rule):
    pairs = REAL.select(np.arange(120))
    order, others = rng(9).permutation(120), {}
    for name in ("gold_chosen", "gold_rejected", "fact_chosen", "fact_rejected"):
        others[name] = getattr(pairs, name)[order] + 3.0
    copied = pairs.select(np.arange(120))
    found, blind = (rule(p, RUN, rng(2)) for p in (pairs, replace(pairs, **others)))
    for name in (f.name for f in fields(Pairs) if f.name not in others):
        assert np.array_equal(np.asarray(getattr(found, name)), np.asarray(getattr(blind, name)))
    assert same(pairs, copied)


# --- twins --------------------------------------------------------------------------------------


def texts(pairs: Pairs, end: str) -> list[str]:
    rows = zip(getattr(pairs, end), getattr(pairs, f"{end}_mask"), strict=True)
    return [DESK.vocabulary.decode(row[keep].tolist()) for row, keep in rows]


def around(concise: str, padded: str) -> list[str]:
    """The groups of the phrases around a text that must stand in it word by word.

    What fills the response is cut there, as any answer is: its last phrase may lack its end.
    """
    assert padded.count(concise) == 1
    before, after = (part.split(" . ") for part in f" {padded} ".split(concise))
    said = [f"{s.strip()} ." for s in (*before, *after) if s.strip()]
    if len(padded.split()) == DESK.max_response and said[-1] not in PHRASES:
        (said[-1],) = {p for p in PHRASES if p.startswith(said[-1].removesuffix(" ."))}
    assert len(set(said)) == len(said), "no phrase twice"
    assert all(PHRASES[f"{s.strip()} ."] == "opener" for s in before if s.strip())
    return [PHRASES[phrase] for phrase in said]


def test_padding_is_one_to_four_phrases_and_the_answer_stays():
    prompts = DESK.prompts(400, rng(1))
    for hedges in (False, True):
        drawn, groups = rng(2), Counter()
        counts = Counter()
        for prompt in prompts:
            concise = DESK.concise(prompt, drawn)
            found = around(concise, DESK.padded(concise, drawn, hedges=hedges))
            assert found.count("opener") <= 1 and found.count("closer") <= 1
            assert found.count("filler") <= 2 and found.count("hedge") <= 2 * hedges
            counts[len(found)] += 1
            groups.update(set(found))
        assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 40, counts
        wanted = {"opener", "filler", "closer", *(("hedge",) if hedges else ())}
        assert set(groups) == wanted and min(groups.values()) > 100


def test_a_matched_pair_with_a_hedge_is_the_answer_and_one_hedge_after_it():
    drawn, seen = rng(3), set()
    for prompt in DESK.prompts(40, rng(4)):
        concise, hedged = DESK.matched_pair(prompt, drawn, hedge=True)
        assert DESK.grade(prompt, concise).correct and not DESK.grade(prompt, concise).hedged
        assert hedged.startswith(f"{concise} ") and DESK.grade(prompt, hedged).hedged
        seen.add(hedged.removeprefix(f"{concise} "))
        concise, polite = DESK.matched_pair(prompt, drawn)
        assert around(concise, polite)[0] in ("opener", "closer")
    assert seen == set(DESK.spec.phrases["hedge"])


@pytest.mark.parametrize(("weight", "hedges"), [(1.0, True), (0.5, False), (2.0, True)])
def test_the_concise_twin_wins_and_the_padded_one_says_the_same(weight, hedges):
    pairs = REAL.select(np.arange(60))
    rule = partial(pair_rules.counterfactual, weight=weight, hedges=hedges)
    found = rule(pairs, RUN, rng(6))
    assert len(found) == 60 + round(60 * weight)
    assert same(found.select(np.arange(60)), pairs), "the old pairs come first, as they were"
    added = found.select(np.arange(60, len(found)))
    assert (added.p_label == 1).all() and (added.length_chosen < added.length_rejected).all()
    groups = [around(*both) for both in zip(texts(added, "chosen"), texts(added, "rejected"),
                                            strict=True)]  # fmt: skip
    assert {len(g) for g in groups} == {1, 2, 3, 4}
    assert (added.hedged_rejected == np.array(["hedge" in g for g in groups])).all()
    assert not added.hedged_chosen.any() and added.hedged_rejected.any() == hedges
    # the winner is right, and nothing is said that it need not say: its loser costs only style
    right = DESK.spec.gold["correct"] + DESK.spec.gold["direct"]
    assert np.allclose(added.gold_chosen, right) and (added.gold_rejected < right).all()
    assert set(added.stratum) == {B, D}


def binomial(n: int, z: float = 4.0) -> tuple[float, float]:
    half = z * math.sqrt(n) / 2
    return n / 2 - half, n / 2 + half


def test_as_a_tie_either_twin_wins_half_the_time():
    pairs = REAL.select(np.arange(4))
    rule = partial(pair_rules.counterfactual, weight=100.0, tie=True)
    added = rule(pairs, RUN, rng(7)).select(np.arange(4, 404))
    assert (added.p_label == 0.5).all()
    padded_won = int((added.length_chosen > added.length_rejected).sum())
    low, high = binomial(400)
    assert low < padded_won < high
    for one, other in zip(texts(added, "chosen"), texts(added, "rejected"), strict=True):
        around(*sorted((one, other), key=len))


# --- other prompts, ties ------------------------------------------------------------------------


def test_answers_to_other_prompts_lose_and_two_of_them_tie():
    n, p = 300, 0.7
    pairs = pairs_of([(9, 5, 1, 0, B if i % 3 else D, p) for i in range(n)])
    found = pair_rules.other_prompts(pairs, RUN, rng(8))
    assert len(found) == n + 3 * 150 and same(found.select(np.arange(n)), pairs)
    winners, losers, tied = (
        found.select(np.arange(n + 150 * k, n + 150 * (k + 1))) for k in range(3)
    )
    for part, code, length, hedge in ((winners, 1, 9, True), (losers, 2, 5, False)):
        own, other = part.chosen // 10, part.rejected // 10
        assert torch.equal(own, part.prompts), "the winner belongs to its prompt"
        assert (part.chosen % 10 == code).all() and (part.rejected % 10 == 1).all()
        assert (own == other).sum() <= 3, "the loser is another prompt's winner"
        assert (part.p_label == 1).all() and (part.length_chosen == length).all()
        assert (part.length_rejected == 9).all() and part.hedged_rejected.all()
        assert (part.hedged_chosen == hedge).all()
        rows = part.prompts[:, 0].numpy()
        assert len(set(rows)) == 150 and np.array_equal(part.stratum, pairs.stratum[rows])
    assert torch.equal(tied.prompts, winners.prompts) and (tied.p_label == 0.5).all()
    assert torch.equal(tied.chosen // 10, tied.rejected // 10)
    assert torch.equal(tied.chosen // 10, winners.rejected // 10), "both answer the other prompt"
    assert np.array_equal(tied.stratum, winners.stratum)
    low, high = binomial(150)
    assert low < int((tied.chosen % 10 == 2).sum()) < high


def test_the_weight_of_other_prompts_is_a_share_of_the_pairs():
    pairs = pairs_of([(9, 5, 0, 0, B)] * 20)
    found = pair_rules.other_prompts(pairs, RUN, rng(), weight=0.2)
    assert len(found) == 20 + 3 * 4


def test_only_slight_wins_of_the_longer_one_are_ties():
    kinds = [(9, 5, 1, 0, B, 0.60), (9, 5, 0, 0, B, 0.75), (9, 5, 0, 0, B, 0.90)]
    kinds += [(5, 9, 0, 0, B, 0.60), (7, 7, 0, 0, B, 0.60), (9, 5, 0, 0, D, 0.40)]
    pairs = pairs_of([kind for kind in kinds for _ in range(200)])
    found = pair_rules.ties(pairs, RUN, rng(3))
    kind = np.repeat(np.arange(6), 200)
    slight = (kind == 0) | (kind == 5)
    assert (found.p_label[slight] == 0.5).all()
    assert same(found.select(~slight), pairs.select(~slight))
    turned = (found.chosen % 10 == 2)[:, 0].numpy()
    low, high = binomial(200)
    for k in (0, 5):
        assert low < turned[kind == k].sum() < high
    assert np.array_equal(found.length_chosen[slight], np.where(turned[slight], 5, 9))
    assert torch.equal(found.chosen + found.rejected, pairs.chosen + pairs.rejected)
    assert torch.equal(found.prompts, pairs.prompts)


# --- the columns that rules work on -------------------------------------------------------------


def test_joined_pairs_stand_one_after_the_other_in_every_column():
    one, other = pairs_of([(9, 5, 1, 0, B, 0.6)] * 2), pairs_of([(4, 8, 0, 1, D, 0.7)] * 3)
    joined = one.join(other)
    assert len(joined) == 5 and joined.prompts[:, 0].tolist() == [0, 1, 0, 1, 2]
    assert same(joined.select(np.arange(2)), one) and same(joined.select(np.arange(2, 5)), other)
    assert joined.chosen_mask.dtype == torch.bool and joined.hedged_chosen.dtype == bool


def test_written_answers_are_packed_with_their_grades():
    prompt = next(p for p in DESK.prompts(50, rng()) if p.intent == "arrival")
    long = " ".join(["have a great day ."] * 20)  # 100 tokens: cut at 48, and never finished
    right = f"it arrives on {prompt.value} ."
    packed = pack_pairs(DESK, [prompt] * 2, [right, long], [f"{right} have a great day .", right])
    assert packed.length_chosen.tolist() == [6, 48]
    assert packed.length_rejected.tolist() == [11, 6]
    assert packed.chosen_mask.sum(1).tolist() == [6, 48]
    assert packed.chosen[0, 5] == EOS and EOS not in packed.chosen[1]
    assert texts(packed, "chosen") == [right, " ".join(long.split()[:48])]
    gold, pad = DESK.spec.gold, DESK.spec.gold["pad"]
    right_gold = gold["correct"] + gold["direct"]
    assert packed.gold_chosen[0] == pytest.approx(right_gold)
    assert packed.gold_rejected[0] == pytest.approx(right_gold - 5 * pad)
    assert packed.gold_chosen[1] == pytest.approx(gold["missing"] - 48 * pad - gold["unfinished"])
    assert packed.p_label.tolist() == [0.5, 0.5] and packed.stratum.tolist() == [B, B]
    assert torch.equal(packed.prompts, DESK.encode([prompt] * 2))
