"""The whole run, made tiny: what it writes, that it repeats, and that being killed changes nothing.

Stages of the tiny run by optimiser step: 1-10 reference, 11-13 reward model, 14-21 PPO, in which
two steps lie between two audits. A "kill" raises before one of those steps; one real SIGKILL
strikes another process in the middle of a write.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_drift import TINY, nan_loss, nan_scores, no_scrap, run, strict

from minirlhf.checkpoints import load_rollout
from minirlhf.desk.world import Desk
from minirlhf.drift.run import Drift, DriftConfig
from minirlhf.engine import files
from minirlhf.engine.adamw import FlatAdamW
from minirlhf.engine.compute import pick_device
from minirlhf.engine.files import StoreError, load_tensors
from minirlhf.ppo import TrainingDiverged

TOTAL = 10 + 3 + 4 * 2  # optimiser steps


class Killed(BaseException):
    """Not an Exception: nothing in the package may catch it."""


def frozen(folder: Path) -> dict[str, bytes]:
    """Every file of a run by its bytes, but those that hold times."""
    times = {"summary.json", "metrics.parquet", "reference.safetensors", "reward.safetensors"}
    times |= {"ppo.safetensors"}
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in times}


def timeless(value):
    """The same value without anything called seconds."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def assert_same_run(one: Path, two: Path) -> None:
    """Bit for bit, times apart."""
    a, b = frozen(one), frozen(two)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []
    for name in ("reference", "reward", "ppo"):
        (x, notes), (y, others) = (load_tensors(f / f"{name}.safetensors") for f in (one, two))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        assert timeless(notes) == timeless(others)
    left, right = (strict(f / "summary.json") for f in (one, two))
    assert json.dumps(timeless(left)) == json.dumps(timeless(right)), "order of keys included"
    tables = [pd.read_parquet(f / "metrics.parquet") for f in (one, two)]
    a, b = (t.drop(columns=[c for c in t if "seconds" in c]) for t in tables)
    pd.testing.assert_frame_equal(a, b, check_exact=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out)
    return out


# --- what is written ------------------------------------------------------------------------------


def test_summary_has_everything_that_was_promised(whole):
    summary = strict(whole / "summary.json")
    top = "seed config seconds raw_pairs reward_model reference final history batch"
    assert set(top.split()) <= summary.keys()
    stages = {"sft", "preferences", "reward", "ppo", "audit", "total"}
    assert summary["seconds"].keys() == stages
    parts = [v for k, v in summary["seconds"].items() if k != "total"]
    assert summary["seconds"]["total"] == pytest.approx(sum(parts)) and min(parts) > 0
    assert {"longer_wins", "hedged_wins"} <= summary["raw_pairs"].keys()
    judged = summary["reward_model"]
    figures = {"heldout_accuracy", "gold_accuracy", "bayes_ceiling", "matched_gap_sd"}
    assert figures <= judged.keys()
    assert set(judged["matched_gap_sd"]) <= {"brief", "detailed"}
    grades = "length_tokens gold correct_rate direct_rate evasion_rate truncated_rate"
    for entry in (summary["reference"], summary["final"], *summary["history"]):
        assert {"step", "rm_score_sd", "kl_nats", "brief", "detailed"} <= entry.keys()
        for stratum in ("brief", "detailed"):
            assert set(grades.split()) <= entry[stratum].keys()
    batch = "rm_gap_sd kl_verbose_nats kl_concise_nats advantage_verbose advantage_concise"
    batch += " positive_token_share_verbose kl_share_top_decile"
    assert set(batch.split()) <= summary["batch"].keys()
    assert [entry["step"] for entry in summary["history"]] == [0, 2, 4]
    assert (summary["reference"], summary["final"]) == tuple(summary["history"][i] for i in (0, -1))
    assert summary["reference"]["kl_nats"] == 0.0 < abs(summary["final"]["kl_nats"])
    assert summary["config"]["ppo"]["kl_target"] == 1.0 and summary["seed"] == 3


def test_the_folder_holds_what_the_help_says(whole):
    found = {p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()}
    models = {f"{name}.safetensors" for name in ("reference", "reward", "ppo")}
    models |= {f"policies/step_{step:03d}.safetensors" for step in (0, 2, 4)}
    logged = ("rollouts", "before")
    batches = {f"{folder}/step_{step:03d}.safetensors" for folder in logged for step in (1, 2, 3)}
    tables = {"config.json", "summary.json", "metrics.parquet", "answers.parquet"}
    assert found == models | batches | tables
    metrics = pd.read_parquet(whole / "metrics.parquet")
    assert metrics["step"].tolist() == [1, 2, 3, 4] and metrics["objective/beta"].nunique() > 1
    answers = pd.read_parquet(whole / "answers.parquet")
    assert len(answers) == 3 * 8 and answers["probe"].max() == 7
    rollout, meta = load_rollout(whole / "rollouts" / "step_003.safetensors")
    assert len(rollout) == 16 and meta["step"] == 3 and meta["ppo"]["batch"] == 16
    assert metrics["objective/score_sd"][2] == rollout.scores.mean().item()
    last = load_tensors(whole / "policies" / "step_004.safetensors")[0]
    state = load_tensors(whole / "ppo.safetensors")[0]
    assert all(torch.equal(state[f"policy.{name}"], last[name]) for name in last)


def test_the_run_before_a_logged_batch_draws_that_batch_again(whole):
    logged, meta = load_rollout(whole / "rollouts" / "step_003.safetensors")
    one = Drift(TINY, whole, resume=True)
    one.run()
    one.ppo.load_state_dict(load_tensors(whole / "before" / "step_003.safetensors")[0])
    drawn = one.ppo.rollout()[0].tensors()
    assert meta["beta"] == one.ppo.beta != TINY.ppo.beta, "the controller has moved it"
    assert all(torch.equal(drawn[name], tensor) for name, tensor in logged.tensors().items())


def test_progress_reports_every_stage_to_its_end(tmp_path):
    seen: dict[str, list] = {}
    run(
        None,
        progress=lambda stage, done, total, m: seen.setdefault(stage, []).append((done, total)),
    )
    assert list(seen) == ["sft", "preferences", "reward", "ppo"]
    for rows in seen.values():
        assert rows[-1][0] == rows[-1][1] and sorted(rows) == rows


# --- the same again -------------------------------------------------------------------------------


def test_same_seed_same_run_with_or_without_a_folder(whole, tmp_path):
    run(tmp_path / "again")
    assert_same_run(whole, tmp_path / "again")
    in_memory = json.loads(json.dumps(run(None)))
    assert timeless(in_memory) == timeless(strict(whole / "summary.json"))
    other = run(None, replace(TINY, seed=4))
    assert other["final"] != in_memory["final"] and other["raw_pairs"] != in_memory["raw_pairs"]


def test_every_stage_draws_from_a_stream_of_its_own():
    one, two = Drift(TINY), Drift(replace(TINY, seed=4))
    names = ("demonstrations", "weights", "sft", "pairs", "candidates", "reward", "audit", "ppo")
    seeds = [run.stream(name) for run in (one, two) for name in names]
    assert len(set(seeds)) == len(seeds) and one.stream("ppo") == Drift(TINY).stream("ppo")


def test_control_and_quick_change_what_they_say():
    fair = TINY.control().preferences
    assert (fair.length_bias, fair.hedge_bias, fair.skim) == (0.0, 0.0, 0.0)
    assert replace(TINY.control(), preferences=TINY.preferences) == TINY
    assert replace(TINY.quick(), log_batches=TINY.log_batches) == TINY, "quick raises nothing"
    quick = DriftConfig().quick()
    assert quick.steps <= 10 and quick.sft.steps <= 100 and quick.ppo == DriftConfig().ppo


# --- killed and resumed ---------------------------------------------------------------------------


def kill_before_step(monkeypatch, at: int) -> None:
    """The at-th optimiser step of the run, whichever stage it belongs to, does not happen."""
    taken, step = [0], FlatAdamW.step

    def counted(self):
        taken[0] += 1
        if taken[0] == at:
            raise Killed
        step(self)

    monkeypatch.setattr(FlatAdamW, "step", counted)


@pytest.mark.parametrize("at", [1, 10, 11, 13, 14, 17, 18, 19, TOTAL])
def test_killed_before_any_step_and_resumed_is_the_same_run(monkeypatch, whole, tmp_path, at):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_before_step(patch, at)
        with pytest.raises(Killed):
            run(out)
        assert not (out / "summary.json").exists()
    assert (out / "reference.safetensors").exists() == (at > 10)
    assert (out / "reward.safetensors").exists() == (at > 13)
    assert (out / "ppo.safetensors").exists() == (at > 17)
    run(out, resume=True)
    assert_same_run(whole, out)


@pytest.mark.parametrize(
    "victim", ["reference", "reward", "policies/step_000", "rollouts/step_003"]
)
def test_killed_before_a_file_is_renamed(monkeypatch, whole, tmp_path, victim):
    out, rename = tmp_path / "run", Path.replace

    def interrupted(self, target):
        if Path(target) == out / f"{victim}.safetensors":
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(Killed):
            run(out)
    assert not (out / f"{victim}.safetensors").exists()
    run(out, resume=True)
    assert_same_run(whole, out)
    assert no_scrap(out)


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from tiny_drift import TINY, run
from minirlhf.engine import files
save, out = files.save_file, Path(sys.argv[1])

def half(tensors, path, metadata):
    save(tensors, path, metadata=metadata)
    if "ppo" in path.name and "steps" in tensors and int(tensors["steps"]) == 4:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

files.save_file = half
run(out)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_real_kill_in_the_middle_of_a_write(whole, tmp_path):
    out = tmp_path / "run"
    code = CHILD.format(tests=str(Path(__file__).parents[1]))
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    child = subprocess.run([sys.executable, "-c", code, str(out)], env=env, timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert (out / ".ppo.safetensors.part").exists(), "half a file, under another name"
    assert int(load_tensors(out / "ppo.safetensors")[0]["steps"]) == 2
    run(out, resume=True)
    assert_same_run(whole, out)  # begun in another process, with other hashes
    assert no_scrap(out)


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(out)
    kill_before_step(monkeypatch, 1)
    run(out, resume=True)
    assert_same_run(whole, out)


# --- the folder belongs to one run ----------------------------------------------------------------


def test_a_folder_with_a_run_is_not_overwritten(whole):
    before = frozen(whole)
    with pytest.raises(StoreError, match=r"already holds a run; add --resume or choose another"):
        Drift(TINY, whole)
    assert frozen(whole) == before


@pytest.mark.parametrize(
    "other", [replace(TINY, steps=5), replace(TINY, ppo=replace(TINY.ppo, beta=0.5))]
)
def test_a_run_with_other_settings_is_not_resumed(whole, other):
    before = frozen(whole)
    with pytest.raises(
        StoreError, match=r"with other settings \(see .*config.json\); give the same"
    ):
        Drift(other, whole, resume=True)
    assert frozen(whole) == before


def test_a_run_at_another_desk_is_not_resumed(whole):
    """Same words, other gold: the vocabulary alone would not tell."""
    spec = Desk.load().spec
    dearer = Desk(replace(spec, gold={**spec.gold, "pad": spec.gold["pad"] + 0.01}))
    assert dearer.vocabulary.fingerprint == Desk.load().vocabulary.fingerprint
    with pytest.raises(StoreError, match=r"and the same desk\.toml to resume it"):
        Drift(TINY, whole, resume=True, desk=dearer)


def test_a_damaged_checkpoint_stops_the_resume(tmp_path, whole):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_before_step(patch, TOTAL)
        with pytest.raises(Killed):
            run(out)
    path = out / "ppo.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        StoreError, match=r"ppo.safetensors is damaged .* restore it or make it anew"
    ):
        run(out, resume=True)
    path.unlink()  # "make it anew": PPO starts again, from the reference and reward model there
    run(out, resume=True)
    assert_same_run(whole, out)


# --- what may go wrong in the middle --------------------------------------------------------------


@pytest.mark.parametrize(
    ("breaks", "error", "message"),
    [
        (nan_scores, ValueError, r"^rollout field 'scores' holds NaN or infinity; find the step"),
        (nan_loss, TrainingDiverged, r"^PPO loss is nan, .* in step 4: the weights of before are"),
    ],
)
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    monkeypatch, whole, tmp_path, breaks, error, message
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        breaks(patch)
        with pytest.raises(error, match=message) as caught:
            run(out)
    assert "\n" not in str(caught.value)
    state, _ = load_tensors(out / "ppo.safetensors")
    assert int(state["steps"]) == 2
    assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())
    assert no_scrap(out) and not (out / "summary.json").exists()
    run(out, resume=True)
    assert_same_run(whole, out)


@pytest.mark.parametrize("victim", ["config.json", "reference", "ppo", "answers", "summary"])
def test_a_full_disk_is_one_sentence_and_nothing_half_written(monkeypatch, whole, tmp_path, victim):
    out, write = tmp_path / "run", files.write_atomic

    def full(path, save):
        def until_full(scratch):
            save(scratch)
            os.truncate(scratch, scratch.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return write(path, until_full if path.name.startswith(victim) else save)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", full)
        with pytest.raises(StoreError, match=r"cannot write .*: No space left") as caught:
            run(out)
    assert "\n" not in str(caught.value) and "free some space" in str(caught.value)
    assert no_scrap(out) and not (out / "summary.json").exists()
    run(out, resume=True)
    assert_same_run(whole, out)


def test_a_cap_beyond_the_context_is_refused_before_any_training(tmp_path):
    long = replace(TINY, ppo=replace(TINY.ppo, max_new_tokens=500))
    with pytest.raises(
        ValueError, match=r"ppo.max_new_tokens is 500, but the desk's answers end at"
    ):
        Drift(long, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- settings and devices -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["steps", "prompts", "critic_batches"])
def test_counts_below_one_are_named(name):
    with pytest.raises(ValueError, match=rf"^{name} is 0; it must be at least 1$"):
        DriftConfig(**{name: 0})
    with pytest.raises(ValueError, match=r"^seed is -1; it must be at least 0$"):
        DriftConfig(seed=-1)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    for name in ("cuda", "mps", "tpu"):
        with pytest.raises(
            ValueError, match=rf"--device {name} is not available here; use auto or"
        ):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu_goes_through_with_a_finite_kl():
    there, here = run(None, device="cuda"), run(None)
    assert there["reference"]["brief"]["n"] == here["reference"]["brief"]["n"]
    assert there["raw_pairs"]["n"] == here["raw_pairs"]["n"]
    assert np.isfinite(there["final"]["kl_nats"])
