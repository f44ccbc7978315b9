"""The audit against scripted answers: strata as measured, grades and batch facts by hand."""

import math

import numpy as np
import pytest
import torch
from fakes import tiny_model

from minirlhf import audit
from minirlhf.audit import AuditConfig, Auditor, batch_facts, judge, mid_run, summarise_grades
from minirlhf.desk import Desk, Prompt
from minirlhf.model import response_logprobs
from minirlhf.preferences import PreferenceConfig, make_pairs
from minirlhf.reward import RewardModel
from minirlhf.rollout import Rollout
from minirlhf.text import right_pad

DESK = Desk.load()
VOCABULARY = DESK.vocabulary
CONFIG = AuditConfig(probes=10, reference_samples=3, brief_below=9.0, verbose_padding=5)
THANKS = "thank you for being so loyal ."  # 7 tokens of courtesy


class Ruler:
    """A reward model that counts tokens, EOS included."""

    def score(self, prompts, responses, mask):
        return mask.sum(1).float()

    __call__ = score


def model(seed: int = 0):
    context = DESK.prompt_width + DESK.max_response
    return tiny_model(seed, vocab=len(VOCABULARY), context=context, spread=1.0, dtype=torch.float32)


def auditor(reward_model=None, config: AuditConfig = CONFIG, **options) -> Auditor:
    return Auditor(DESK, model(), reward_model or Ruler(), config, **options)  # pyright: ignore


def encoded(answers: list[str]):
    ids = [[*VOCABULARY.encode(text), VOCABULARY.eos] for text in answers]
    return right_pad(ids, DESK.max_response)


# --- strata -------------------------------------------------------------------------------------


def test_strata_are_measured_from_the_references_own_lengths(monkeypatch):
    """Probe i is answered in 2i + {0, 1, 5} words: the label that the desk gave it is not asked."""
    extra = {40: 0, 41: 1, 42: 5}  # the three samples are drawn with seed, seed + 1, seed + 2

    def scripted(desk, reference, prompts, seed):
        return encoded([" ".join(["we"] * (2 * i + extra[seed])) for i in range(len(prompts))])

    monkeypatch.setattr(audit, "answer", scripted)
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
    responses, mask = audit.answer(DESK, policy, one.prompts, one.seed)
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
    answers = [audit.answer(DESK, one.reference, one.prompts, one.seed + i) for i in range(3)]
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


# --- the facts of a batch -----------------------------------------------------------------------

PROMPT = Prompt("eta friday . when does it come ? <sep>", "arrival", "brief", "day", "friday", 2)
STEPS = Prompt(
    "device phone . how do i reset it ? <sep>", "reset", "detailed", "device", "phone", 0
)


def batch(answers: list[str], prompts: list[Prompt], ratios: list[float], pushes: list[float]):
    """A rollout in which every token of answer i has log-ratio ratios[i], advantage pushes[i]."""
    responses, mask = encoded(answers)
    ratio, push = (torch.tensor(x)[:, None] * mask for x in (ratios, pushes))
    zeros = torch.zeros_like(ratio)
    return Rollout(
        DESK.encode(prompts), responses, mask, ratio - 3.0 * mask, -3.0 * mask, zeros, zeros[:, 0],
        advantages=push,
    )  # fmt: skip


def test_batch_facts_by_hand():
    answers = [
        f"{THANKS} friday .",  # verbose: 7 tokens of padding, 10 in all
        f"friday . {THANKS} {THANKS}",  # verbose, 17 tokens
        "friday .",  # concise, 3 tokens
        "it arrives on friday .",  # concise, 6 tokens
        "monday .",  # wrong: neither
        THANKS,  # evades: verbose, 8 tokens
        f"first unplug the phone . {THANKS}",  # detailed: not asked about
    ]
    prompts = [PROMPT] * 6 + [STEPS]
    ratios, pushes = [0.5, 1.0, -0.1, 0.2, 9.0, 0.0, 2.0], [1.0, -1.0, -2.0, 0.5, 7.0, 3.0, 9.0]
    rollout = batch(answers, prompts, ratios, pushes)
    # one of the first answer's ten tokens is pushed down
    advantages = rollout.advantages.clone()
    advantages[0, 0] = -4.0
    rollout = Rollout(**{**rollout.tensors(), "advantages": advantages})
    one = auditor()
    found = batch_facts(one, rollout, prompts)
    lengths = [10, 17, 3, 6, 3, 8, 13]
    assert rollout.lengths.tolist() == lengths
    assert (found["n_verbose"], found["n_concise"]) == (3, 2)
    assert found["kl_verbose_nats"] == pytest.approx((0.5 * 10 + 1.0 * 17 + 0) / 3)
    assert found["kl_concise_nats"] == pytest.approx((-0.3 + 1.2) / 2)
    assert found["advantage_verbose"] == pytest.approx(((9 - 4) / 10 - 1 + 3) / 3)
    assert found["advantage_concise"] == pytest.approx((-2 + 0.5) / 2)
    assert found["positive_token_share_verbose"] == pytest.approx((9 + 0 + 8) / (10 + 17 + 8))
    # 60 tokens, the top six: three of 9 nats and three of 2
    sizes = sum(abs(r) * n for r, n in zip(ratios, lengths, strict=True))
    assert found["kl_share_top_decile"] == pytest.approx((3 * 9 + 3 * 2) / sizes)
    assert found["rm_gap_sd"] == one.matched_gaps([PROMPT] * 6).mean()
    # the other stratum: one answer, verbose, and nothing concise to compare with
    detailed = batch_facts(one, rollout, prompts, stratum="detailed")
    assert detailed["kl_verbose_nats"] == pytest.approx(2 * 13) and detailed["n_concise"] == 0
    assert math.isnan(detailed["kl_concise_nats"]) and math.isnan(detailed["advantage_concise"])


def test_a_batch_without_the_stratum_has_no_facts_and_does_not_crash():
    rollout = batch(["friday ."], [STEPS], [1.0], [1.0])
    found = batch_facts(auditor(), rollout, [STEPS])
    assert found["n_verbose"] == found["n_concise"] == 0
    unknown = {"rm_gap_sd", "kl_verbose_nats", "kl_concise_nats", "positive_token_share_verbose"}
    unknown |= {"advantage_verbose", "advantage_concise"}
    assert {name for name, value in found.items() if math.isnan(value)} == unknown


def facts(step: int, verbose: int, concise: int, kl: float | None) -> dict:
    return {"step": step, "rm_gap_sd": 0.1 * step, "kl_verbose_nats": kl, "n_verbose": verbose,
            "n_concise": concise}  # fmt: skip


def test_the_middle_of_the_drift_pools_three_batches_by_their_answers():
    batches = [
        facts(1, 2, 50, 1.0),
        facts(4, 30, 20, 2.0),
        facts(6, 40, 20, 3.0),  # the first with two verbose answers for one concise
        facts(8, 60, 10, 4.0),
        facts(10, 90, 10, 5.0),
    ]
    pooled = mid_run(batches)
    assert (pooled["step"], pooled["steps"]) == (6, [4, 6, 8])
    assert (pooled["n_verbose"], pooled["n_concise"]) == (130, 50)
    assert pooled["kl_verbose_nats"] == pytest.approx((30 * 2 + 40 * 3 + 60 * 4) / 130)
    assert pooled["rm_gap_sd"] == pytest.approx(0.6)
    kept = list(batches[0])
    assert list(pooled) == ["step", "steps", *kept[1:]], "the same order in every process"


def test_the_middle_of_a_run_without_one():
    assert mid_run([]) == {}
    never = [facts(1, 2, 50, 1.0), facts(4, 3, 50, 2.0), facts(6, 4, 50, 3.0)]
    assert mid_run(never)["steps"] == [4, 6] and mid_run(never)["step"] == 6
    all_gone = [facts(1, 0, 0, None), facts(2, 0, 0, float("nan"))]
    pooled = mid_run(all_gone)
    assert math.isnan(pooled["kl_verbose_nats"]) and pooled["n_verbose"] == 0
    # a batch without a figure has no say in it
    mixed = [facts(4, 0, 5, None), facts(6, 10, 5, 3.0)]
    assert mid_run(mixed)["kl_verbose_nats"] == 3.0


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
