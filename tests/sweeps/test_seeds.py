"""The table over seeds, from summaries made by hand: claims, intervals, thresholds, absences."""

import json
import math

import numpy as np
import pytest
import tables
from fakes_summary import brief_facts, stratum, summary

from minirlhf.drift.run import DriftConfig
from minirlhf.engine.jobs import Workers
from minirlhf.sweeps import seeds
from minirlhf.sweeps.seeds import CONTROL, DRIFT, markdown, run_seeds, table


def rows_of(summaries: list[dict]) -> dict[tuple[str, str], dict]:
    return {(row["arm"], row["claim"]): row for row in table(summaries)}


def claim(rows: dict, words: str, arm: str = "drift") -> dict:
    (found,) = [row for (a, name), row in rows.items() if a == arm and words in name]
    return found


def test_a_run_that_shows_the_case_holds_every_claim():
    rows = table([summary(seed, arm) for seed in range(3) for arm in ("drift", "control")])
    assert len(rows) == len(DRIFT) + len(CONTROL)
    assert {(row["held"], row["runs"]) for row in rows} == {(3, 3)}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("RM score, final", 2.0),
        ("end against the two audits", 2.0 - (1.5 + 1.9) / 2),
        ("brief: length, final", 3.0),
        ("brief: gold, change", -0.7),
        ("brief: direct rate", -0.4),
        ("brief: evasion rate", 0.18),
        ("growth of brief / growth of detailed", 3.0 / 1.5),
        ("KL(policy", 7.0),
        ("RM gap of one courtesy", 0.3),
        ("batch: advantage, verbose", 0.5),
        ("fact a", 0.4),
        ("fact b", 2.5),
        ("fact c", 0.3),
        ("all three", 1.0),
        ("advantage, concise", -0.3),
        ("advantage > 0 (share)", 0.8),
        ("top tenth", 0.9),
        ("held-out labels", 0.7),
        ("Bayes", 0.78),
    ],
)
def test_values_by_hand(words, value):
    row = claim(rows_of([summary()]), words)
    assert row["mean"] == row["least"] == row["most"] == pytest.approx(value)
    assert (row["low"], row["high"]) == pytest.approx((value, value)), "one run has no spread"


FAILING = [  # what must not count as held
    ("RM score, final", {"final": {**summary()["final"], "rm_score_sd": 0.9}}),
    ("end against the two", {"history": [{"rm_score_sd": x} for x in (0.0, 2.2, 2.3, 2.0)]}),
    ("brief: length", {"final": {**summary()["final"], "brief": stratum(13, -0.1, 0.5, 0.2)}}),
    ("brief: gold", {"final": {**summary()["final"], "brief": stratum(21, 0.3, 0.5, 0.2)}}),
    ("direct rate", {"final": {**summary()["final"], "brief": stratum(21, -0.1, 0.75, 0.2)}}),
    ("evasion rate", {"final": {**summary()["final"], "brief": stratum(21, -0.1, 0.5, 0.05)}}),
    ("KL(policy", {"final": {**summary()["final"], "kl_nats": 3.9}}),
    ("RM gap", {"batch": {**summary()["batch"], "rm_gap_sd": 0.7}}),
    ("RM gap", {"batch": {**summary()["batch"], "rm_gap_sd": -0.1}}),
    ("fact a", {"facts": {"brief": brief_facts(phrase=-0.01)}}),
    ("fact b", {"facts": {"brief": brief_facts(kl=-0.01)}}),
    ("fact c", {"facts": {"brief": brief_facts(advantage=-0.01)}}),
    ("fact c", {"facts": {}}),
    ("all three", {"facts": {"brief": brief_facts(advantage=-0.01)}}),
    ("all three", {"facts": {}}),
    ("batch: advantage, verbose", {"batch": {**summary()["batch"], "advantage_verbose": 0.0}}),
    ("advantage, concise", {"batch": {**summary()["batch"], "advantage_concise": 0.0}}),
    ("> 0 (share)", {"batch": {**summary()["batch"], "positive_token_share_verbose": 0.69}}),
    ("top tenth", {"batch": {**summary()["batch"], "kl_share_top_decile": 0.5}}),
    ("held-out", {"reward_model": {**summary()["reward_model"], "heldout_accuracy": 0.6}}),
]


@pytest.mark.parametrize(("words", "change"), FAILING)
def test_a_threshold_that_is_missed_is_not_held(words, change):
    row = claim(rows_of([summary(0), summary(1, **change)]), words)
    assert (row["held"], row["runs"]) == (1, 2)


@pytest.mark.parametrize(
    ("verbose", "concise", "holds"),
    [
        (3.0, -0.5, True),  # 6 times, and 2.5 nats above
        (1.0, 0.1, True),  # 10 times, 0.9 nats above
        (5.0, -3.0, True),  # less than twice, 2 nats above |concise|
        (4.0, -3.0, False),
        (1.0, 0.5, False),
        (-1.0, 0.0, False),
        (0.0, 0.0, False),
    ],
)
def test_kl_of_verbose_is_five_times_or_two_nats_above(verbose, concise, holds):
    batch = {**summary()["batch"], "kl_verbose_nats": verbose, "kl_concise_nats": concise}
    row = claim(rows_of([summary(batch=batch)]), "2 nats")
    assert row["held"] == holds


@pytest.mark.parametrize(("facts", "held"), [({}, 1), ({"brief": brief_facts()}, 0)])
def test_in_the_control_arm_the_three_facts_must_not_hold(facts, held):
    row = claim(rows_of([summary(arm="control", facts=facts)]), "all three", "control")
    assert row["held"] == held


@pytest.mark.parametrize("length, held", [(4.8, 0), (5.0, 1), (8.0, 1), (8.2, 0)])
def test_control_length_is_held_on_both_sides(length, held):
    final = {**summary(arm="control")["final"], "brief": stratum(length, 0.65, 0.9, 0.0)}
    row = claim(rows_of([summary(arm="control", final=final)]), "brief: length", "control")
    assert row["held"] == held, "-30 % ... +15 % of 7 tokens"


def test_interval_is_of_the_mean_over_seeds():
    rng = np.random.default_rng(1)
    scores = rng.normal(2.0, 0.5, 40)
    runs = [
        summary(i, final={**summary()["final"], "rm_score_sd": x}) for i, x in enumerate(scores)
    ]
    row = claim(rows_of(runs), "RM score, final")
    assert row["mean"] == pytest.approx(scores.mean())
    assert (row["least"], row["most"]) == (scores.min(), scores.max())
    half = 1.96 * scores.std(ddof=1) / math.sqrt(40)  # the bootstrap's large-sample limit
    assert row["high"] - row["mean"] == pytest.approx(half, rel=0.1)
    assert row["mean"] - row["low"] == pytest.approx(half, rel=0.1)
    assert rows_of(runs[::-1]) == rows_of(runs), "the order in which runs end does not matter"


def test_a_run_without_a_figure_counts_as_not_held_and_has_no_say_in_the_mean():
    gone = {**summary()["batch"], "kl_concise_nats": None, "advantage_concise": None}
    empty = {**summary()["final"], "brief": dict.fromkeys(stratum(0, 0, 0, 0))}
    rows = rows_of([summary(0), summary(1, batch=gone), summary(2, batch={}, final=empty)])
    row = claim(rows, "advantage, concise")
    assert (row["held"], row["runs"], row["mean"]) == (1, 3, -0.3)
    assert claim(rows, "2 nats")["held"] == 1 and claim(rows, "RM gap")["held"] == 2
    assert claim(rows, "brief: length")["held"] == 2 and claim(rows, "KL(policy")["held"] == 3


def test_a_figure_that_no_run_has_is_none_and_strict_json(recwarn):
    row = claim(rows_of([summary(batch={})]), "RM gap")
    assert [row[k] for k in ("mean", "low", "high", "least", "most", "held")] == [None] * 5 + [0]
    json.dumps(table([summary(batch={})]), allow_nan=False)
    found = tables.rows(markdown([row], "command", note=""))
    assert found[1][2:] == ["none [none, none]", "none … none", "0/1"]
    assert found[2:] == [[*seeds.HEADS]], "heads alone for the arm without a run"
    assert not recwarn.list


def test_markdown():
    rows = table([summary(seed, arm) for seed in range(2) for arm in ("drift", "control")])
    text = markdown(rows, "minirlhf seeds --seeds 2", note="All of them.")
    head = "# The case over seeds\n\nMade by `minirlhf seeds --seeds 2`.\n\nAll of them.\n"
    assert text.startswith(head)
    lines = tables.rows(text)
    assert len(lines) == len(rows) + 2, "a head for each arm"
    assert {len(line) for line in lines} == {5}, "a bar in a name would open a column"
    assert r"5 \|concise\| or" in text
    assert text.count("|") - text.count(r"\|") == 6 * (len(lines) + 2)

    def of(words, page=text):
        return next(line for line in tables.rows(page) if words in line[0])

    length = of("brief: length", text.split("## control")[1])
    assert length[1:] == ["0.70 … 1.15", "0.93 [0.93, 0.93]", "0.93 … 0.93", "2/2"]
    assert of("brief: length")[1:3] == ["≥ 2.00", "3.00 [3.00, 3.00]"]
    assert of("advantage, verbose")[1] == "> 0" and of("advantage, concise")[1] == "< 0"
    # what has no threshold is not counted
    _, threshold, mean, _, held = of("Bayes")
    assert (threshold, mean, held) == ("", "0.780 [0.780, 0.780]", "")


def test_both_arms_of_every_seed_are_run_once(monkeypatch, tmp_path):
    config, ran = DriftConfig(steps=7), []

    def fake(c, arm):
        ran.append((arm, c.seed))
        bias = c.preferences.length_bias
        return {"arm": arm, "seed": c.seed, "steps": c.steps, "bias": bias}

    monkeypatch.setattr(seeds, "run_one", fake)
    one = Workers("sequential", retries=0)
    run_seeds(config, [5], tmp_path, one)
    found = run_seeds(config, [4, 5], tmp_path, one)  # seed 5 lies there already
    wanted = [("control", 4), ("control", 5), ("drift", 4), ("drift", 5)]
    assert [(s["arm"], s["seed"]) for s in found] == sorted(ran) == wanted
    assert all(s["steps"] == 7 and (s["bias"] == 0) == (s["arm"] == "control") for s in found)
