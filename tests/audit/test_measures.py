"""The table of measures: one name, unit and direction a number, and no number that is not there."""

import dataclasses
import re
from pathlib import Path

import pandas as pd
import pytest
from tiny_drift import TINY

from minirlhf.audit.auditor import Auditor
from minirlhf.audit.controls import MEANS, PADDED
from minirlhf.audit.measures import AUDIT, BATCH, LABELS, MEASURES, RATES, REMEDY, STEP, Measure
from minirlhf.drift.run import Drift
from minirlhf.engine.files import data_folder
from minirlhf.sweeps.cells import TRAJECTORY, style_gaps

METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"
EVIDENCE = data_folder() / "evidence" / "remedies.parquet"


def listed() -> dict[str, str]:
    """{metric: unit} as docs/metrics.md has it."""
    text = METRICS.read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \| [^|]+ \|$", text, re.MULTILINE))


def keys(tree: dict, above: str = "") -> set[str]:
    found = {above + name for name in tree}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= keys(value, f"{above}{name}.")
    return found


@pytest.fixture(scope="module")
def run() -> tuple[Drift, dict]:
    """A tiny run that is over, and its summary."""
    drift = Drift(TINY)
    return drift, drift.run()


def test_every_measure_of_an_audit_is_in_one(run):
    drift, summary = run
    auditor: Auditor = drift.auditor
    closing = auditor.closing(auditor.sample(drift.reference))
    final = summary["final"]
    assert set(AUDIT) <= {*final, *final["brief"], *closing["brief"]}


def test_every_rate_is_a_mean_of_the_controls_in_the_unit_of_the_audit():
    assert set(RATES) <= {*MEANS, *PADDED}
    for measure in RATES.values():
        known = AUDIT.get(measure.name)
        if known is None:
            assert measure.name == "courteous", "the audit counts no courtesy"
        else:
            assert (measure.unit, measure.better) == (known.unit, known.better)


def test_every_metric_is_one_that_a_step_reports(run):
    drift, _ = run
    assert set(STEP) <= set(drift.metrics[0])
    assert set(STEP) == set(TRAJECTORY), "those that a sweep keeps of every step"


def test_every_fact_of_a_batch_and_of_the_labels_is_in_a_summary(run):
    _, summary = run
    assert set(BATCH) <= set(summary["batch"])
    there = keys(summary["raw_pairs"]) | keys(summary["reward_model"])
    # to the tiny reference every prompt is brief
    assert {name.replace(".detailed", ".brief") for name in LABELS} <= there


@pytest.mark.skipif(not EVIDENCE.is_file(), reason="data/evidence is not there")
def test_every_measure_of_a_remedy_is_a_column_of_its_rows(run):
    drift, _ = run
    assert set(REMEDY) <= set(pd.read_parquet(EVIDENCE))
    assert {name for name in REMEDY if name.endswith("_sd")} <= set(style_gaps(drift))


@pytest.mark.parametrize("name", STEP)
def test_a_metric_has_the_unit_that_docs_metrics_gives_it(name):
    assert STEP[name].unit == listed()[name]


def test_a_column_of_a_trajectory_and_its_metric_have_one_unit_and_direction():
    shown = {"score_sd": "rm_score_sd"}  # of a batch, and of the probes
    for metric, column in TRAJECTORY.items():
        measure = AUDIT.get(shown.get(column, column))
        if measure is not None:
            mine = (measure.unit, measure.better, measure.digits)
            assert mine == (STEP[metric].unit, STEP[metric].better, STEP[metric].digits)
    assert {shown.get(c, c) for c in TRAJECTORY.values()} & set(AUDIT) == {
        "length_tokens",
        "rm_score_sd",
        "kl_nats",
    }


def test_names_are_the_keys_and_no_table_has_another_ones():
    tables = (AUDIT, STEP, BATCH, LABELS, REMEDY)
    assert sum(map(len, tables)) == len(MEASURES), "a key stands in two tables"
    for name, measure in MEASURES.items():
        assert measure.name == name and measure.title and measure.unit
        assert measure.better in ("up", "down", "")


def test_words_of_a_measure():
    evasion, length = AUDIT["evasion_rate"], AUDIT["length_tokens"]
    assert (evasion.axis, evasion.direction) == ("share, ↓ better", "lower is better")
    assert (length.unit, length.short, length.axis) == ("tokens per answer", "tokens", "tokens")
    assert (length.arrow, length.direction) == ("", "")
    assert AUDIT["gold"].labels == ("gold", "points", "↑ better")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Measure("a", "a", "share").unit = "points"  # type: ignore[misc]
