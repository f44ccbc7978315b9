"""The table against numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest
import tables

from minirlhf.audit import measures
from minirlhf.desk.world import STRATA
from minirlhf.engine.intervals import student_t
from minirlhf.remedies.arms import REMEDIES
from minirlhf.remedies.on_batch import PARTS
from minirlhf.sweeps.remedy_table import (
    ABOUT,
    AT_BATCH,
    MEASURES,
    SHOWN,
    agreement,
    levels,
    markdown,
    measured,
    repaired,
    summarise,
    wide,
)

RATES = ("direct_rate", "evasion_rate", "hedged_rate", "verbose_rate")


def row(remedy: str, seed: int, **given) -> dict:
    found = {"remedy": remedy, "seed": seed, "fault": "none", "rm_score_sd": 1.0, "kl_nats": 2.0}
    for moment in ("reference", "final"):
        for s in STRATA:
            at = {"length_tokens": 10.0, "gold": 0.5, "kl_nats": 1.0, "steps_share": 1.0}
            at |= dict.fromkeys(RATES, 0.2)
            found |= {f"{moment}_{s}_{k}": v for k, v in at.items()}
    for side in ("verbose", "concise"):
        found |= {f"{what}_{side}": 0.1 for what in ("push", "fork")}
        found |= {f"push_{side}_{part}": 0.0 for part in PARTS}
    found |= {f"gap_{k}": 0.3 for k in ("score", "cost", "effective")}
    found |= {"gap_courtesy_brief_sd": 0.4, "gap_hedge_brief_sd": 0.6, "verbose_then": 0.4}
    return {**found, **given}


def test_student_interval_by_hand():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * np.sqrt(2.5 / 5)  # t(0.975, 4) from the printed table
    assert student_t(values) == pytest.approx((3.0, 3 - half, 3 + half))
    one = student_t(np.array([np.nan, 7.0]))
    assert one.mean == 7.0 and np.isnan(one.low) and np.isnan(one.high)
    assert np.isnan(student_t(np.array([])).mean)


def test_changes_are_paired_with_the_reference_of_the_same_run():
    start, end = "reference_brief_length_tokens", "final_brief_length_tokens"
    rows = [row("none", s, **{start: 10.0 + s, end: 20.0 + s}) for s in range(3)]
    found = measured(pd.DataFrame(rows))["brief_length_ratio"]
    assert found.tolist() == pytest.approx([20 / 10, 21 / 11, 22 / 12])
    gold = pd.DataFrame([row("none", 0, final_brief_gold=-0.1)])
    assert measured(gold)["brief_gold_change"][0] == pytest.approx(-0.6)  # end minus reference
    assert set(MEASURES) <= set(measured(gold))


@pytest.mark.parametrize(
    ("given", "fails"),
    [
        ({}, None),
        ({"final_brief_length_tokens": 13.1}, "length"),
        ({"final_brief_length_tokens": 6.9}, "length"),
        ({"final_brief_gold": 0.44}, "gold"),
        ({"final_detailed_steps_share": 0.79}, "steps"),
        ({"final_brief_length_tokens": 12.9, "final_brief_gold": 0.46}, None),
    ],
)
def test_the_test_is_two_sided(given, fails):
    found = repaired(pd.DataFrame([row("matched", 0, **given)])).iloc[0]
    assert found["repaired"] == (fails is None)
    assert [k for k in ("length", "gold", "steps") if not found[k]] == ([fails] if fails else [])


def test_agreement_pairs_a_remedy_with_what_it_repairs():
    """Changes of the push against changes of length, by seed; a sign that is not told is said."""
    rows = []
    for s in range(3):
        long, short = 30.0 + s, 12.0 + s  # the seed's own offset cancels
        rows.append(row("none", s, push_verbose=0.2 + s, final_brief_length_tokens=long))
        rows.append(row("matched", s, push_verbose=0.1 + s, final_brief_length_tokens=short))
        rows.append(row("par", s, push_verbose=0.3 + s, final_brief_length_tokens=short))
        rows.append(row("rloo", s, push_verbose=0.1 + s, final_brief_length_tokens=long + s - 1))
        rows.append(row("dpo", s, push_verbose=np.nan))
        rows.append(row("grpo", s, fault="grpo", push_verbose=9.0, final_brief_length_tokens=40.0))
        given = {"push_verbose": 8.0, "final_brief_length_tokens": 41.0 + 0.1 * s}
        rows.append(row("dr_grpo", s, fault="grpo", **given))
    found = agreement(pd.DataFrame(rows)).set_index("remedy")
    assert found.index[found["agrees"]].tolist() == ["matched"]
    assert found.index[found["told"]].tolist() == ["matched", "par", "dr_grpo"]
    assert found.index.tolist() == ["matched", "par", "rloo", "dr_grpo"]
    assert found.loc["matched", "push"] == pytest.approx(-0.1)
    assert found.loc["matched", "moved"] == pytest.approx(-18)
    assert found.loc["dr_grpo", "push"] == -1 and found.loc["dr_grpo", "moved"] > 0


def test_levels_ask_for_the_side_of_the_logged_policy():
    ends = {"none": (0.2, 0.9), "matched": (-0.2, 0.1), "larger_beta": (0.2, 0.1)}
    rows = [
        row(name, s, push_verbose=push, final_brief_verbose_rate=end + 0.01 * s)
        for name, (push, end) in ends.items()
        for s in range(3)
    ]
    found = levels(pd.DataFrame([*rows, row("dpo", 0, push_verbose=np.nan)])).set_index("remedy")
    assert found["agrees"].to_dict() == {"none": True, "matched": True, "larger_beta": False}
    assert found.loc["none", "moved"] == pytest.approx(0.51) and found["told"].all()


def test_arms_come_in_the_order_of_the_remedies_and_stacks_last():
    ends = {"matched+larger_beta": (0.1, 9.0), "par": (0.3, 20.0), "none": (0.2, 30.0)}
    rows = pd.DataFrame(
        [
            row(n, s, push_verbose=ends[n][0], final_brief_length_tokens=ends[n][1] + s)
            for n in ends
            for s in (0, 1)
        ]
    )
    assert list(dict.fromkeys(summarise(rows)["remedy"])) == ["none", "par", "matched+larger_beta"]
    cell = wide(rows, ["brief_gold_change"]).loc["par", "brief_gold_change"]
    assert cell == "+0.00 [+0.00, +0.00]"
    text = markdown(rows, "minirlhf remedies --seeds 2")
    assert "`minirlhf remedies --seeds 2`" in text and "seeds 0, 1" in text
    lines = tables.rows(text)
    assert {len(line) for line in lines} == {2 + len(SHOWN), 2 + len(AT_BATCH), 5, 7}


def test_a_bar_in_a_cell_opens_no_column():
    text = markdown(pd.DataFrame([row("none", 0), row("par", 0)]), "minirlhf remedies --seeds 1")
    about = {line[0]: line for line in tables.rows(text.split("## What each arm is")[1])}
    assert about["arm"] == [*ABOUT] and set(about) == {"arm", *REMEDIES}
    assert about["calibrated"][3] == r"r - f(\|y\|)", "as Markdown wants it"
    assert {len(line) for line in about.values()} == {len(ABOUT)}


def test_units_are_those_of_the_table_of_measures():
    assert MEASURES["brief_gold_change"].unit == measures.MEASURES["gold"].unit == "points"
    assert (MEASURES["kl_nats"].unit, MEASURES["push_concise_kl"].unit) == ("nats", "nats a step")
    assert {MEASURES[f"push_verbose_{part}"].digits for part in PARTS} == {3}
