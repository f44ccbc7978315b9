"""The audit against scripted answers: strata as measured, grades and batch facts by hand."""

import math

import numpy as np
import pytest
import torch
from fakes_audit import DESK, Ruler, auditor, encoded, model

from minirlhf.audit import auditor as auditor_module
from minirlhf.audit.auditor import judge, summarise_grades
from minirlhf.audit.config import AuditConfig
from minirlhf.desk.config import PreferenceConfig
from minirlhf.desk.preferences import make_pairs
from minirlhf.model import response_logprobs
from minirlhf.reward import RewardModel

# --- strata -------------------------------------------------------------------------------------


def test_strata_are_measured_from_the_references_own_lengths(monkeypatch):
    """Probe i is answered in 2i + {0, 1, 5} words: the label that the desk gave it is not asked."""
    extra = {40: 0, 41: 1, 42: 5}  # the three samples are drawn with seed, seed + 1, seed + 2

    def scripted(desk, reference, prompts, seed):
        return encoded([" ".join(["we"] * (2 * i + extra[seed])) for i in range(len(prompts))])

    monkeypatch.setattr(auditor_module, "answer", scripted)
    found = auditor(seed=40)
    assert found.reference_length.tolist() == [2 * i + 2 + 1 for i in range(10)]  # and EOS
    # 3, 5, 7 | 9 tokens: what averages exactly `brief_below` is not brief any more
    assert found.stratum.tolist() == ["brief"] * 3 + ["detailed"] * 7
    assert [p.stratum for p in found.probes] == ["brief", "detailed"] * 5, "labels say otherwise"


def test_an_empty_stratum_has_no_means_and_makes_no_noise(recwarn):
    config = AuditConfig(probes=4, reference_samples=1, brief_below=1000.0)
    one = auditor(config=config)
    entry, rows = one(one.reference, 0)
    assert entry["detailed"]["n"] == 0 and math.isnan(entry["detailed"]["gold"])
    assert entry["brief"]["n"] == len(rows) == 4
    assert not recwarn.list


# --- one entry of the history -------------------------------------------------------------------


def test_summarised_grades_by_hand():
    grades = {
        "length_tokens": np.array([4, 10, 6, 99]),
        "gold": np.array([0.8, -0.3, 0.1, 99.0]),
        "correct": np.array([True, False, False, True]),
        "direct": np.array([True, True, False, True]),
        "evasive": np.array([False, True, False, True]),
        "hedged": np.array([False, True, True, True]),
        "finished": np.array([True, False, True, True]),
    }
    found = summarise_grades(grades, np.array([True, True, True, False]))
    expected = {"length_tokens": 20 / 3, "gold": 0.2, "correct_rate": 1 / 3, "direct_rate": 2 / 3}
    expected |= {"evasion_rate": 1 / 3, "hedged_rate": 2 / 3, "truncated_rate": 1 / 3, "n": 3}
    assert found == pytest.approx(expected)


def test_an_entry_is_the_grades_of_the_answers_behind_it():
    one = auditor(seed=3)
    policy = model(1)
    entry, rows = one(policy, 7)
    assert repr((entry, rows)) == repr(one(policy, 7)), (
        "the same policy is measured in the same way"
    )
    assert len(rows) == 10 and {row["step"] for row in rows} == {7} == {entry["step"]}
    assert entry["rm_score_sd"] == pytest.approx(np.mean([row["rm_score_sd"] for row in rows]))
    for probe, row in zip(one.probes, rows, strict=True):
        by_hand = DESK.grade(probe, row["answer"], row["finished"])
        assert row["prompt"] == probe.text and row["gold"] == by_hand.gold
        assert (row["evasive"], row["padding_tokens"]) == (by_hand.evasive, by_hand.padding_tokens)
    for name in ("brief", "detailed"):
        gold = [row["gold"] for row in rows if row["stratum"] == name]
        assert entry[name]["n"] == len(gold)
        assert not gold or entry[name]["gold"] == pytest.approx(np.mean(gold))
    # answers end by EOS or at the cap, and who was cut counts as truncated
    shares = [entry[s]["truncated_rate"] * entry[s]["n"] for s in ("brief", "detailed")
              if entry[s]["n"]]  # fmt: skip
    assert sum(shares) == pytest.approx(sum(not row["finished"] for row in rows))


def test_kl_is_zero_at_the_reference_and_positive_elsewhere():
    one = auditor(config=AuditConfig(probes=100, reference_samples=1))
    assert one(one.reference, 0)[0]["kl_nats"] == 0.0
    policy = model(1)
    responses, mask = auditor_module.answer(DESK, policy, one.prompts, one.seed)
    here, there = (
        response_logprobs(m, one.prompts, responses, mask)[0].sum(1).mean().item()
        for m in (policy, one.reference)
    )
    entry, _ = one(policy, 1)
    assert entry["kl_nats"] == pytest.approx(here - there, abs=1e-4) and entry["kl_nats"] > 1


def test_the_scale_is_that_of_the_references_samples():
    reward_model = RewardModel(model(2))
    one = auditor(reward_model)
    one.calibrate()
    answers = [
        auditor_module.answer(DESK, one.reference, one.prompts, one.seed + i) for i in range(3)
    ]
    scores = torch.cat([reward_model.score(one.prompts, *a) for a in answers])
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1, abs=1e-5)


# --- what one courtesy phrase is worth ----------------------------------------------------------


def test_matched_gap_of_a_ruler_is_the_length_of_the_phrase():
    one = auditor()
    rng = np.random.default_rng(0)
    pairs = [DESK.matched_pair(prompt, rng) for prompt in one.probes]
    lengths = [len(polite.split()) - len(plain.split()) for plain, polite in pairs]
    found = one.matched_gaps(one.probes)
    assert found.tolist() == lengths and min(lengths) > 0
    assert one.matched_gaps([]).shape == (0,)


def test_written_answers_are_scored_with_their_end():
    assert auditor().score_texts(auditor().probes[:2], ["we", "we may"]).tolist() == [2, 3]


# --- what the reward model is worth -------------------------------------------------------------


def test_a_ruler_is_judged_as_one():
    pairs = make_pairs(DESK, PreferenceConfig(pairs=300), np.random.default_rng(0)).train
    found = judge(Ruler(), pairs)  # pyright: ignore[reportArgumentType]
    assert found["heldout_accuracy"] == pytest.approx(found["length_ruler_accuracy"])
    longer = pairs.length_chosen - pairs.length_rejected
    better = pairs.gold_chosen - pairs.gold_rejected
    rows = [i for i in range(len(pairs)) if abs(better[i]) > 1e-9]
    agree = [longer[i] * better[i] > 0 for i in rows]
    assert found["gold_accuracy"] == pytest.approx(np.mean(agree))
    assert 0.5 < found["bayes_ceiling"] <= 1 and found["gold_ceiling"] <= found["bayes_ceiling"]


@pytest.mark.parametrize(
    "name", ["every", "probes", "reference_samples", "brief_below", "verbose_padding"]
)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^audit\.{name} is .*; it must be positive$"):
        AuditConfig(**{name: value})
