"""The explorer shows the runs of one computed cell and no other; its formula is the oracle's."""

import io
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fakes_evidence import sweep_rows
from PIL import Image

from minirlhf.config import PPOConfig
from minirlhf.desk.world import Desk
from minirlhf.drift.run import DriftConfig
from minirlhf.engine.intervals import student_t, student_t_rows
from minirlhf.lab.panels import explorer as module
from minirlhf.lab.panels.explorer import CANCEL, LIVE, SweepExplorer, closed_form
from minirlhf.model import Transformer, TransformerConfig
from minirlhf.oracle.closed_form import two_answer
from minirlhf.reward import RewardModel

DESK = Desk.load()


@pytest.fixture(scope="module")
def tables():
    return sweep_rows()


@pytest.fixture(scope="module")
def panel(tables):
    return SweepExplorer(*tables)


def turn(panel, **dials):
    for name, value in dials.items():
        panel.controls[name].value = value
    return panel.shown


def cells(panel):
    values = {name: [v for _, v in c.options] for name, c in panel.controls.items()}
    return [
        {"beta": b, "clip": c, "length_bias": k}
        for b in values["beta"]
        for c in values["clip"]
        for k in values["length_bias"]
    ]


def of(table, cell):
    return table[np.logical_and.reduce([table[name] == value for name, value in cell.items()])]


def test_every_cell_shows_its_own_rows_and_no_other(panel, tables):
    sweep, paths = tables
    seen = set()
    for cell in cells(panel):
        shown, own = turn(panel, **cell), of(sweep, cell)
        assert panel.cell == cell
        assert shown["final_brief_gold"] == pytest.approx(own["final_brief_gold"].mean())
        lengths = of(paths, cell).groupby("step")["length_tokens"].mean()
        assert shown["length"] == pytest.approx(lengths.to_dict())
        runs = [segment[0, 1] for segment in panel._length._seeds.get_segments()]
        first = of(paths, cell).query("step == 1")["length_tokens"]
        assert sorted(runs) == pytest.approx(sorted(first))
        assert f"beta {cell['beta']:g}, epsilon {cell['clip']:g}" in panel.live.alt
        assert "3 seeds" in panel._title.get_text()
        seen.add(panel.live.data)
    assert len(seen) == 12


def test_ends_over_beta_are_those_of_the_chosen_epsilon_and_bias(panel, tables):
    sweep, _ = tables
    turn(panel, beta=0.2, clip=0.1, length_bias=0.0455)
    for ends, column in zip(panel._ends, module.ENDS, strict=True):
        for at, beta in enumerate((0.02, 0.07, 0.2)):
            own = of(sweep, {"beta": beta, "clip": 0.1, "length_bias": 0.0455})[column]
            found = student_t(own.to_numpy())
            assert ends._mean.get_xydata()[at] == pytest.approx((at, found.mean))
            (_, low), (_, high) = ends._bars.get_segments()[at]
            assert (low, high) == pytest.approx((found.low, found.high))
        assert ends._ring.get_xdata()[0] == 2  # beta 0.2
        assert ends._mean.get_linestyle() == "None"  # nothing between what was computed


def test_advantages_are_drawn_at_the_kept_batches_alone(panel, tables):
    cell = {"beta": 0.07, "clip": 0.2, "length_bias": 0.0455}
    shown, own = turn(panel, **cell), of(tables[1], cell)
    for side, sign in (("verbose", 1), ("concise", -1)):
        assert [*shown[side]] == [1, 10, 20]
        assert shown[side][10] == pytest.approx(sign * 0.07 + own["seed"].unique().mean())


def test_the_band_is_the_interval_of_the_means():
    values = np.array([[1.0, 2.0, 6.0, np.nan], [3.0, 5.0, 4.0, 9.0], [7.0, 8.0, np.nan, np.nan]])
    found = np.transpose(student_t_rows(values))
    for row, three in zip(values[:2], found, strict=False):
        assert tuple(three) == pytest.approx(tuple(student_t(row)))
    assert found[2][0] == 7.5 and np.isnan(found[2][1:]).all()  # two values: no band


def test_closed_form_is_the_two_answer_tilt_of_every_run(panel, tables):
    rows = tables[0].head(4).assign(beta=[0.05, 0.1, 0.1, 0.0])
    rows["gap_courtesy_brief_sd"] = [0.2, 0.2, -0.2, 0.3]
    rows["reference_brief_verbose_rate"], rows["reference_brief_n"] = [0.1, 0.1, 0.1, 0.0], 1e9
    found = closed_form(rows)
    assert found[:3] == pytest.approx(
        [float(two_answer(0.1, gap, beta)) for gap, beta in ((0.2, 0.05), (0.2, 0.1), (-0.2, 0.1))]
    )
    assert found[0] > found[1] > 0.1 > found[2] and found[3] == 1  # beta 0: all of it
    assert 0 < closed_form(rows.assign(beta=10.0, reference_brief_n=100))[3] < 0.01


def test_a_larger_bias_is_a_larger_prediction_and_a_larger_beta_a_smaller_one(panel):
    low = turn(panel, beta=0.07, clip=0.2, length_bias=0.0)["closed_form"]
    high = turn(panel, length_bias=0.0455)["closed_form"]
    assert turn(panel, beta=0.2)["closed_form"] < high and low < high
    assert "formula" in panel.live.alt


def test_the_picture_has_ink_and_the_sentence(panel):
    data, notes = panel._repr_mimebundle_()
    image = np.asarray(Image.open(io.BytesIO(panel.live.data)).convert("RGB")).astype(int)
    assert (image < 200).any(-1).mean() > 0.02 and data["image/png"]
    assert notes["image/png"]["alt"] == panel.live.alt


def test_a_cell_that_was_not_computed_is_not_made_up(tables):
    sweep, paths = tables
    gone = {"beta": 0.2, "clip": 0.1, "length_bias": 0.0}
    left = [d.drop(of(d, gone).index) for d in (sweep, paths)]
    panel = SweepExplorer(*left)
    turn(panel, **gone)
    assert panel.cell != gone and "was not computed" in panel.live.alt
    assert sum(panel.cell[name] != gone[name] for name in gone) == 1
    mean = of(sweep, panel.cell)["final_brief_gold"].mean()
    assert panel.shown["final_brief_gold"] == pytest.approx(mean)


def test_remedies_in_the_sweep_are_left_out_and_none_is_an_error(tables):
    other = [d.assign(remedy="odin") for d in tables]
    both = SweepExplorer(*(pd.concat(pair) for pair in zip(tables, other, strict=True)))
    assert len(both.shown["seeds"]) == 3
    with pytest.raises(ValueError, match="none"):
        SweepExplorer(*other)


# ------------------------------------------------------------------ the live run
def untrained(seed):
    size = TransformerConfig(len(DESK.vocabulary), DESK.prompt_width + DESK.max_response)
    return Transformer(size, generator=torch.Generator().manual_seed(seed))


def case():
    prompts = DESK.probes(16)
    config = DriftConfig(ppo=PPOConfig(max_new_tokens=12, batch=8), critic_batches=1)
    parts = {"desk": DESK, "reference": untrained(0), "config": config}
    models = {dial: RewardModel(untrained(round(1e4 * dial) + 1)) for dial in module.DIALS}
    return SimpleNamespace(**parts, prompts=lambda: prompts, reward_model=models.__getitem__)


@pytest.fixture(scope="module")
def lively(tables):
    panel = SweepExplorer(*tables, case(), steps=2)
    yield panel
    panel.close()


def test_a_live_run_takes_the_cells_dials_and_draws_its_own_steps(lively):
    turn(lively, beta=0.07, clip=0.2, length_bias=0.0455)
    lively.run_live()
    lively.wait()
    assert lively.live_run.values() == lively.cell and len(lively.live_run.history) == 2
    assert lively.progress.value == 2 and lively.button.description == LIVE
    assert "shipped" in lively.note.value and "0.0455" in lively.note.value
    row = lively.live_run.history[0]
    n = [row[s]["n"] for s in ("brief", "detailed")]
    mean = np.average(
        [row[s]["length_tokens"] if row[s]["n"] else 0 for s in ("brief", "detailed")], weights=n
    )
    assert lively._run.get_ydata()[0] == pytest.approx(mean)
    turn(lively, beta=0.2)
    assert not len(lively._run.get_ydata())  # it belongs to the other cell
    turn(lively, beta=0.07)
    assert len(lively._run.get_ydata()) == 2


def test_cancel_stops_after_the_step_in_flight(lively, monkeypatch):
    turn(lively, beta=0.02)
    steps = module.LiveRun.run_steps

    def one(self, count):
        steps(self, count)
        assert lively.button.description == CANCEL
        lively.cancel()

    monkeypatch.setattr(module.LiveRun, "run_steps", one)
    lively.run_live()
    lively.wait()
    assert len(lively.live_run.history) == 1 and not lively.busy
    assert lively.button.description == LIVE


def test_a_bias_without_a_reward_model_is_refused(tables):
    odd = [d.replace({"length_bias": {0.0455: 0.05}}) for d in tables]
    panel = SweepExplorer(*odd, case())
    turn(panel, length_bias=0.05)
    panel.run_live()
    assert "No reward model" in panel.note.value and panel.live_run is None
    assert SweepExplorer(*odd).button.disabled  # nothing to start from
    panel.close()
