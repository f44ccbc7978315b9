"""Sweeps: each cell is the run alone, and neither order, nor backend, nor a kill changes a row."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny_drift import TINY

from minirlhf.cli.main import main
from minirlhf.drift.run import Drift
from minirlhf.engine import jobs
from minirlhf.engine.files import StoreError, plain
from minirlhf.engine.jobs import JobsFailed, Workers
from minirlhf.sweeps.cells import claim, run_cell, run_cells
from minirlhf.sweeps.grid import Cell, Grid

HERE = Path(__file__).parent
BASE = replace(TINY, ppo=replace(TINY.ppo, kl_target=None))
GRID = Grid(beta=(0.02, 0.2), remedy=("none", "length_penalty"), seed=(3, 4))
TABLES = ("sweep", "trajectories")
ONE = Workers("sequential", retries=0)
SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {helpers!r}]
from test_grid import BASE, GRID, Workers, run_cells
if __name__ == "__main__":
    run_cells(GRID.cells(BASE), BASE, Path(sys.argv[1]), Workers("sequential"))
"""


def tables(out: Path) -> list[Any]:
    return [pd.read_parquet(out / f"{name}.parquet") for name in TABLES]


def assert_same_tables(one: Path, two: Path) -> None:
    for left, right in zip(tables(one), tables(two), strict=True):
        pd.testing.assert_frame_equal(left, right, check_exact=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The sweep that nobody disturbed, in this process."""
    out = tmp_path_factory.mktemp("sweep")
    run_cells(GRID.cells(BASE), BASE, out, ONE)
    return out


def test_a_cell_is_the_run_alone_bit_for_bit(whole):
    rows, steps = tables(whole)
    assert len(rows) == 8 and len(steps) == 8 * BASE.steps
    config = replace(BASE, seed=4, ppo=replace(BASE.ppo, beta=0.2))
    alone = Drift(config)
    summary = alone.run()
    at = (rows["beta"] == 0.2) & (rows["seed"] == 4) & (rows["remedy"] == "none")
    (row,) = rows[at].to_dict("records")
    final = summary["final"]
    assert row["rm_score_sd"] == final["rm_score_sd"] and row["kl_nats"] == final["kl_nats"]
    for stratum in ("brief", "detailed"):
        for name, value in final[stratum].items():
            found = row[f"final_{stratum}_{name}"]
            assert found == value or (pd.isna(found) and value is None), name
    assert json.loads(row["config"]) == json.loads(json.dumps(plain(asdict(config))))
    path = steps[(steps["beta"] == 0.2) & (steps["seed"] == 4) & (steps["remedy"] == "none")]
    lengths = [m["response/length_tokens"] for m in alone.metrics]
    assert path["length_tokens"].tolist() == lengths and path["step"].tolist() == [1, 2, 3, 4]
    assert path["advantage_verbose"].isna().iloc[-1]  # no batch is kept at step 4


def test_dials_reach_their_cells_and_nothing_else(whole):
    rows, _ = tables(whole)
    for row in rows.to_dict("records"):
        config = json.loads(row["config"])
        assert config["ppo"]["beta"] == row["beta"] and config["seed"] == row["seed"]
    means = rows.groupby(["remedy", "beta"])["kl_nats"].mean()
    assert means.nunique() == 4


def test_two_processes_give_the_same_tables(whole, tmp_path):
    run_cells(list(reversed(GRID.cells(BASE))), BASE, tmp_path, Workers("loky", jobs=2, retries=0))
    assert_same_tables(whole, tmp_path)
    assert not list((tmp_path / "work").iterdir())  # nothing half-done is left


def test_killed_at_random_five_times_and_resumed_gives_the_same_tables(whole, tmp_path):
    script, out, dice = tmp_path / "go.py", tmp_path / "out", random.Random(0)
    script.write_text(SCRIPT.format(tests=str(HERE), helpers=str(HERE.parent)))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(5):
        before = {p: p.stat().st_mtime for p in out.rglob("*") if p.is_file()}
        run = subprocess.Popen([sys.executable, script, out], env=env, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while time.monotonic() < until and run.poll() is None:  # killed once it has begun to write
            if {p: p.stat().st_mtime for p in out.rglob("*.safetensors") if p.exists()} != {
                p: t for p, t in before.items() if p.suffix == ".safetensors" and p.exists()
            }:
                break
            time.sleep(0.02)
        time.sleep(dice.random() * 1.5)
        run.send_signal(signal.SIGKILL)
        run.wait()
    run_cells(GRID.cells(BASE), BASE, out, ONE)
    assert_same_tables(whole, out)


def test_a_resumed_sweep_may_grow_and_runs_no_cell_twice(whole, tmp_path, monkeypatch):
    few = replace(GRID, seed=(3,))
    run_cells(few.cells(BASE), BASE, tmp_path, ONE)
    ran = []
    real = Drift.run
    monkeypatch.setattr(Drift, "run", lambda self: ran.append(self.config.seed) or real(self))
    run_cells(GRID.cells(BASE), BASE, tmp_path, ONE)
    assert ran == [4] * 4
    assert_same_tables(whole, tmp_path)


def test_a_cell_that_fails_loses_only_itself(tmp_path, monkeypatch):
    real = Drift.run

    def broken(self):
        if self.config.ppo.beta == 0.2 and self.config.seed == 4:
            raise FloatingPointError("reward model loss is nan")
        return real(self)

    monkeypatch.setattr(Drift, "run", broken)
    cells = replace(GRID, remedy=("none",)).cells(BASE)
    said = []
    report = lambda stage: lambda text, done, total: said.append(text)  # noqa: E731
    with pytest.raises(JobsFailed, match=r"1 of 4 jobs failed 2 times .*beta0.2.*loss is nan"):
        run_cells(cells, BASE, tmp_path, Workers("sequential", retries=1), report)
    assert len(tables(tmp_path)[0]) == 3 and sum("failed" in text for text in said) == 2
    monkeypatch.setattr(Drift, "run", real)
    rows, _ = run_cells(cells, BASE, tmp_path, ONE)
    assert len(rows) == 4


def test_what_cells_share_is_trained_once_and_a_cell_alone_trains_its_own(tmp_path, monkeypatch):
    fitted = []
    real = Drift.fit_reward
    monkeypatch.setattr(
        Drift, "fit_reward", lambda self, *a: fitted.append(self.config.seed) or real(self, *a)
    )
    cells = Grid(beta=(0.02, 0.2), remedy=("none", "balanced")).cells(BASE)
    rows, _ = run_cells(cells, BASE, tmp_path / "all", ONE)
    assert fitted == [3, 3]  # one of the plain pairs, one of the balanced ones
    alone = run_cell(cells[0], BASE, tmp_path / "elsewhere")
    assert fitted == [3, 3, 3]
    assert plain(alone["row"]) in rows


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        (Grid(beta=(0.1, 0.1)), "grid.beta is (0.1, 0.1); give no value twice"),
        (Grid(beta=(-0.1,)), "ppo.beta is -0.1; it must be at least 0"),
        (Grid(clip=(1.5,)), "ppo.clip is 1.5"),
        (Grid(remedy=("patience",)), "no remedy 'patience': there are adaptive_beta, "),
        (Grid(length_bias=(float("inf"),)), "preferences.length_bias is inf"),
    ],
)
def test_a_grid_that_cannot_run_is_refused_before_any_run(grid, sentence):
    with pytest.raises(ValueError) as caught:
        grid.cells(BASE)
    assert sentence in str(caught.value)


def test_a_folder_belongs_to_one_sweep(tmp_path):
    claim(tmp_path, BASE, resume=False)
    claim(tmp_path, BASE, resume=False)  # it holds no run yet
    (tmp_path / "done" / "runs").mkdir(parents=True)
    (tmp_path / "done" / "runs" / "one.json").write_text("{}")
    claim(tmp_path, replace(BASE, ppo=replace(BASE.ppo, beta=0.3)), resume=True)  # a dial
    with pytest.raises(StoreError, match="already holds a sweep; add --resume"):
        claim(tmp_path, BASE, resume=False)
    with pytest.raises(StoreError, match="holds a sweep with other settings"):
        claim(tmp_path, replace(BASE, steps=5), resume=True)


def test_keys_are_file_names_for_every_arm():
    from minirlhf.remedies.arms import ARMS

    cells = [Cell(name, 1e-05, 0.2, -0.05, 0) for name in (*ARMS, "matched+larger_beta")]
    jobs._check_keys({cell.key: (print, ()) for cell in cells})


def test_the_command_line_sweeps_and_goes_on(tmp_path, capsys):
    tiny = ["--quick", "--steps", "2", "--preferences.pairs", "120", "--sft.demonstrations", "200"]
    tiny += ["--audit.probes", "8", "--ppo.batch", "16", "--ppo.max-new-tokens", "12"]
    line = ["sweep", "--grid.beta", "0.02", "0.2", "--grid.length-bias", "0.08", *tiny]
    line += ["--backend", "sequential", "--out", str(tmp_path / "s")]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "sweep.parquet" in out and "final_brief_gold" in out
    assert len(tables(tmp_path / "s")[0]) == 2
    assert main(line) == 1 and "add --resume" in capsys.readouterr().err
    assert main([*line, "--resume", "--grid.seed", "0", "1"]) == 0
    assert len(tables(tmp_path / "s")[0]) == 4


def test_a_folder_refuses_a_remedy_that_has_changed_but_takes_new_ones(tmp_path, monkeypatch):
    from minirlhf.remedies import arms, scores

    claim(tmp_path, BASE, ["none", "length_penalty"], resume=False)
    claim(tmp_path, BASE, ["matched"], resume=True)
    other = arms.on_scores(scores.length_penalty, alpha=0.5)
    monkeypatch.setitem(arms.ARMS, "length_penalty", other)
    claim(tmp_path, BASE, ["none", "matched"], resume=True)
    with pytest.raises(StoreError, match="holds a sweep with another length_penalty"):
        claim(tmp_path, BASE, ["length_penalty"], resume=True)


def test_seeds_name_their_dials_in_the_claim(tmp_path):
    claim(tmp_path, BASE, resume=False, dials={})
    with pytest.raises(StoreError, match="other settings"):
        claim(tmp_path, replace(BASE, ppo=replace(BASE.ppo, beta=0.3)), resume=True, dials={})


def test_an_arm_that_changes_the_reference_has_one_of_its_own(monkeypatch):
    from minirlhf.remedies import arms

    def longer(recipe):
        sft = replace(recipe.config.sft, steps=12)
        return replace(recipe, config=replace(recipe.config, sft=sft))

    monkeypatch.setitem(arms.ARMS, "longer", longer)
    plain_, own = (Cell(name, 0.07, 0.2, 0.0455, 3) for name in ("none", "longer"))
    assert plain_.reference(BASE) == "none_seed3" and own.reference(BASE) == "longer_seed3"
    assert plain_.upstream(BASE) != own.upstream(BASE)


@pytest.mark.parametrize(
    "names", ["dpo+larger_beta", "best_of_n+early_stop", "book_literal+per_stratum_beta"]
)
def test_a_stack_of_which_a_part_would_do_nothing_is_refused(names):
    with pytest.raises(ValueError, match=r"makes no use of|need kl_place reward"):
        Grid(remedy=(names,)).cells(BASE)
    Grid(remedy=("dpo+counterfactual", "best_of_n+capped")).cells(BASE)
