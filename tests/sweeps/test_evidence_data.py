"""data/evidence: complete, of one making, and carrying what the notebook and the README say."""

import json
from typing import Any

import numpy as np
import pytest

from minirlhf.drift.data import shipped
from minirlhf.engine.files import data_folder
from minirlhf.remedies.arms import FAULTS
from minirlhf.sweeps.remedy_runs import EVERY_ARM
from minirlhf.sweeps.remedy_table import agreement, measured, repaired

FOLDER = data_folder() / "evidence"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="data/evidence is not there")


def table(name: str) -> Any:
    """A table of data/evidence; pandas' own types say less than they take."""
    return getattr(shipped(), name)


REPAIR = ("counterfactual", "covariate", "covariate_length", "odin", "matched+larger_beta", "fair")
DO_NOT = ("none", "balanced", "matched", "matched_length", "larger_beta", "par", "dpo", "best_of_n")


def test_every_arm_has_five_seeds_of_the_same_settings():
    rows = table("remedies")
    assert set(rows["remedy"]) == {*EVERY_ARM, "none", *FAULTS}
    assert (
        rows.groupby("remedy")["seed"].agg(lambda s: sorted(s)).map(tuple) == (0, 1, 2, 3, 4)
    ).all()
    assert {json.loads(c)["steps"] for c in rows["config"]} == {60}
    assert rows[["version", "torch", "machine"]].drop_duplicates().shape[0] == 1
    finals = [c for c in rows if c.startswith("final_")]
    assert rows[finals].notna().all().all()
    pushes = rows[~rows["remedy"].isin(["dpo", "best_of_n"])]
    assert pushes["push_verbose"].notna().all() and (pushes["n_concise"] > 0).all()


def test_the_reference_of_a_seed_is_one_and_the_same():
    columns = [c for c in table("remedies") if c.startswith("reference_")]
    assert (table("remedies").groupby("seed")[columns].nunique() == 1).all().all()


def test_what_is_said_of_the_repairs_is_in_the_rows():
    test: Any = repaired(table("remedies")).set_index("remedy")["repaired"]
    assert all(test[name] for name in REPAIR) and not any(test[name] for name in DO_NOT)
    each: Any = measured(table("remedies")).set_index(["remedy", "seed"])
    for name in ("covariate", "odin"):  # in every seed, not on the mean alone
        assert (each.loc[name, "brief_length_ratio"] < 1.3).all(), name
        assert (each.loc[name, "detailed_steps_kept"] > 0.8).all(), name
    assert (each.loc["counterfactual", "brief_length_ratio"] < 1.3).sum() == 4  # of five
    # what acts on length alone leaves a part of the second bias, but no more than there was
    hedges = each["brief_hedged_change"].groupby("remedy").mean()
    for name in ("matched_length", "counterfactual_length", "length_penalty"):
        assert 0.3 < hedges[name] < hedges["none"]
    assert abs(hedges["counterfactual"]) < 0.1 and abs(hedges["covariate"]) < 0.1


def test_with_one_bias_only_matching_still_falls_short():
    rows = table("one_axis").assign(fault="none")
    assert (rows.groupby("remedy")["seed"].nunique() == 5).all()
    assert {json.loads(c)["preferences"]["hedge_bias"] for c in rows["config"]} == {0.0}
    test: Any = repaired(rows).set_index("remedy")
    passed = set(test.index[test["repaired"]])
    assert passed == {"counterfactual_length", "covariate_length"}
    assert 1.3 < test["brief_length_ratio"]["matched_length"] < test["brief_length_ratio"]["none"]


def test_the_push_changes_as_the_outcome_does_in_nine_of_ten():
    signs: Any = agreement(table("remedies"))
    told = signs[signs["told"]]
    assert len(told) >= 20 and told["agrees"].mean() >= 0.9


def test_the_sweep_is_a_whole_grid_with_a_trajectory_each():
    cells, steps = table("sweep"), table("trajectories")
    dials = ["beta", "clip", "length_bias", "seed"]
    sizes = [cells[d].nunique() for d in dials]
    assert len(cells) == np.prod(sizes) == len(cells[dials].drop_duplicates()) and sizes[-1] >= 5
    counts = steps.groupby(dials)["step"].agg(["min", "max", "count"])
    made = {json.loads(c)["steps"] for c in cells["config"]}
    assert len(made) == 1 and len(counts) == len(cells)
    assert (counts.to_numpy() == [1, made.pop(), counts["max"].iloc[0]]).all()
    assert all(path.stat().st_size <= 3_000_000 for path in FOLDER.iterdir())


def test_a_cell_of_the_sweep_is_the_shipped_run_bit_for_bit():
    """Seed 0 at the default dials: the steps of data/drift, made by another command."""
    case, steps = shipped(), table("trajectories")
    c = case.config
    at = (steps["beta"] == c.ppo.beta) & (steps["clip"] == c.ppo.clip) & (steps["seed"] == c.seed)
    path = steps[at & (steps["length_bias"] == c.preferences.length_bias)]
    whole = case.metrics.iloc[: len(path)]
    assert len(path) >= 40
    for mine, theirs in (
        ("length_tokens", "response/length_tokens"),
        ("kl_nats", "objective/kl_nats"),
    ):
        assert path[mine].tolist() == whole[theirs].tolist()


def test_the_closed_form_says_more_bias_more_drift_and_so_do_the_runs():
    cells = table("sweep")
    means = cells.groupby(["length_bias", "beta"])["final_brief_length_tokens"].mean().unstack()
    assert (means.diff(axis=0).iloc[1:] > 0).all().all()  # longer with more bias, at every beta
    # shorter with a larger beta, where there is anything to hold back
    assert (means.diff(axis=1).iloc[1:, 1:] < 0).all().all() and means.iloc[0].max() < 8
