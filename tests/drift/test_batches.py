"""The facts of batches: by hand, pooled, and with intervals."""

import math
from dataclasses import replace

import pytest
import torch
from fakes_audit import DESK, THANKS, auditor, encoded

from minirlhf.autopsy.convention import Convention
from minirlhf.desk.world import Prompt
from minirlhf.drift.batches import batch_facts, clearest, mid_run, pooled_facts
from minirlhf.rollout import Rollout

PROMPT = Prompt("eta friday . when does it come ? <sep>", "arrival", "brief", "day", "friday", 2)
STEPS = Prompt(
    "device phone . how do i reset it ? <sep>", "reset", "detailed", "device", "phone", 0
)


def batch(answers: list[str], prompts: list[Prompt], ratios: list[float], pushes: list[float]):
    """A rollout in which every token of answer i has log-ratio ratios[i], advantage pushes[i]."""
    responses, mask = encoded(answers)
    ratio = torch.tensor(ratios, dtype=torch.float32)[:, None] * mask
    push = torch.tensor(pushes, dtype=torch.float32)[:, None] * mask
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


def test_pooled_facts_are_those_of_all_answers_together():
    answers = [f"{THANKS} friday .", "friday .", f"friday . {THANKS}", "it arrives on friday ."]
    ratios, pushes = ([0.5, -0.1, 1.0, 0.2], [1.0, -2.0, 0.5, 0.25]), ([0.7, 0, 2, 1], [3, 1, 1, 1])
    batches = []
    for number, (ratio, push) in enumerate(3 * (ratios, pushes)):  # 12 prompts of either kind
        one = batch(answers, [PROMPT] * 4, list(ratio), list(push))
        index = torch.arange(4) + 4 * number
        batches.append(replace(one, index=index, scores=torch.tensor([1.0, 0.0, 2.0, 0.5])))
    plain = Convention(whiten_advantages="none", beta=0.1)
    audited = auditor()
    found = pooled_facts(audited, [(b, plain) for b in batches], [PROMPT] * 24)["brief"]
    assert (found["n_verbose"], found["n_concise"], found["prompts"]) == (12, 12, 24)
    kl = found["intervals"]["kl"]
    assert kl["verbose"][0] == pytest.approx((5 + 10 + 7 + 20) / 4)
    assert kl["concise"][0] == pytest.approx((-0.3 + 1.2 + 0 + 6) / 4)
    assert kl["gap"][0] == pytest.approx(kl["verbose"][0] - kl["concise"][0])
    assert kl["verbose"][1] < kl["verbose"][0] < kl["verbose"][2]
    assert found["intervals"]["advantage"]["verbose"][0] == pytest.approx((1 + 0.5 + 3 + 1) / 4)
    # the parts are those of the convention: at lambda 1 the first token pays the whole answer's KL
    pays = [0.1 * r * (n + 1) / 2 for r, n in ((0.5, 10), (1, 10), (0.7, 10), (2, 10))]
    assert found["intervals"]["kl_part"]["verbose"][0] == pytest.approx(-sum(pays) / 4)
    # a ruler pays every phrase its length: always more than nothing
    assert found["intervals"]["phrase"]["gap"][0] == audited.matched_gaps([PROMPT] * 24).mean()
    assert found["holds"] == [True, True, True]


def test_without_verbose_answers_only_the_phrase_is_known():
    only = replace(batch(["friday ."], [PROMPT], [1.0], [1.0]), index=torch.tensor([0]))
    found = pooled_facts(auditor(), [(only, Convention())], [PROMPT])["brief"]
    assert (found["n_verbose"], found["n_concise"], found["prompts"]) == (0, 1, 1)
    mean, *limits = found["intervals"].pop("phrase")["gap"]
    assert mean == auditor().matched_gaps([PROMPT]).mean() and not found["intervals"]
    assert all(math.isnan(x) for x in limits), "one prompt has no interval"
    assert found["holds"] == [False, False, False]
    assert pooled_facts(auditor(), [], [PROMPT]) == {}


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


def test_the_clearest_batch_is_the_one_whose_smaller_group_is_largest():
    rows = [(8, 31, 28), (10, 41, 15), (12, 6, 52), (14, 90, 80)]
    batches = [{"step": s, "n_verbose": v, "n_concise": c} for s, v, c in rows]
    assert clearest(batches, [8, 10, 12]) == 8  # not 14, which is none of the three
    assert clearest(batches, [12, 10]) == 10  # whichever of the two groups is the smaller one
