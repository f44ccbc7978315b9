"""data/: as listed, small, readable, showing the case; and made anew to the same bytes."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_drift import TINY, strict

from minirlhf.audit.auditor import Auditor, answer, grade
from minirlhf.desk.world import DeskError
from minirlhf.drift import make_data
from minirlhf.drift.batches import clearest
from minirlhf.drift.data import DIALS, shipped
from minirlhf.drift.make_data import BATCHES, COMMAND, build
from minirlhf.drift.run import DriftConfig
from minirlhf.engine import files as file_module
from minirlhf.engine.files import StoreError, data_folder, sha256

DATA = Path(__file__).parents[2] / "data"
MADE = (DATA / "MANIFEST.json").is_file()
needs_data = pytest.mark.skipif(not MADE, reason="data/MANIFEST.json is not there: `make data`")


# --- the folder in the checkout -------------------------------------------------------------------


@needs_data
def test_every_file_is_listed_and_every_listed_file_is_intact():
    listed = strict(DATA / "MANIFEST.json")["files"]
    there = {p.relative_to(DATA).as_posix(): p for p in DATA.rglob("*") if p.is_file()}
    assert there.keys() - {"MANIFEST.json"} == listed.keys()
    for name, entry in listed.items():
        assert sha256(there[name]) == entry["sha256"], f"{name} changed: make data"
        assert there[name].stat().st_size == entry["bytes"]
        assert isinstance(entry["seed"], int) and entry["command"]
    assert sum(entry["bytes"] for entry in listed.values()) <= 20e6
    assert {listed["reference.safetensors"]["command"]} == {COMMAND}


@needs_data
def test_every_loader_works_and_the_parts_belong_together():
    case = shipped()
    assert case.folder == DATA == data_folder()
    summary, answers, metrics = case.summary, case.answers, case.metrics
    steps = [entry["step"] for entry in summary["history"]]
    assert case.steps == steps == sorted(set(answers["step"])) and steps[0] == 0
    assert metrics["step"].tolist() == list(range(1, steps[-1] + 1))
    assert len(case.batch_steps) == BATCHES and summary["batch"]["step"] in case.batch_steps
    for step in steps:
        assert case.policy(step).config == case.reference.config
    start, reference = case.policy(0).state_dict(), case.reference.state_dict()
    moved = {name for name in reference if not torch.equal(start[name], reference[name])}
    assert moved == {"scalar.weight", "scalar.bias"}, "only the critic's fit moved before step 1"
    for step in case.batch_steps:
        rollout = case.rollout(step)
        assert len(rollout) == summary["config"]["ppo"]["batch"]
        assert rollout.advantages is not None
    assert len(DIALS) >= 5 and DIALS[0] == 0.0
    default = summary["config"]["preferences"]["length_bias"]
    same = case.reward_model(), case.reward_model(default)
    assert torch.equal(same[0].mean, same[1].mean)
    with pytest.raises(StoreError, match=r"no file .*policy_999"):
        case.policy(999)
    with pytest.raises(StoreError, match=r"no file .*reward_bias_"):
        case.reward_model(0.7)


@needs_data
def test_the_shipped_settings_are_the_defaults():
    """A default that was tuned after data/ was made: `make data`."""
    assert shipped().summary["config"] == json.loads(json.dumps(asdict(DriftConfig())))


@needs_data
def test_the_shipped_claims_are_there():
    rows = shipped().seeds
    assert {row["arm"] for row in rows} == {"drift", "control"}
    assert all({"claim", "threshold", "mean", "held", "runs"} <= row.keys() for row in rows)


@needs_data
def test_the_three_facts_hold_in_nine_of_ten_runs_and_in_no_control_run():
    rows = {(row["arm"], row["claim"]): row for row in shipped().seeds}
    for claim, least in (("fact a", 9), ("fact b", 9), ("fact c", 9), ("all three facts", 9)):
        (row,) = [row for (arm, name), row in rows.items() if arm == "drift" and claim in name]
        assert row["held"] >= least and row["runs"] == 10
    (control,) = [row for (arm, name), row in rows.items() if arm == "control" and "all" in name]
    assert control["held"] == control["runs"] == 10 and control["most"] == 0.0
    assert {row["runs"] for row in shipped().fresh_seeds} == {5}


@needs_data
def test_the_reference_answers_brief_questions_correctly():
    case = shipped()
    probes = [p for p in case.desk.probes(256) if p.stratum == "brief"]
    prompts = case.desk.encode(probes)
    grades = grade(case.desk, probes, *answer(case.desk, case.reference, prompts, 1))
    assert grades["correct"].mean() >= 0.8
    assert grades["length_tokens"].mean() < 12 and grades["finished"].mean() > 0.99


@needs_data
def test_the_dial_of_the_labelers_shows_in_the_reward_models():
    """What one courtesy phrase adds to a concise correct answer, by the labelers' length bias."""
    case, gaps = shipped(), []
    probes = [p for p in case.desk.probes(200) if p.stratum == "brief"]
    for dial in DIALS:
        model = case.reward_model(dial)
        config = DriftConfig().audit
        auditor = Auditor(case.desk, case.reference, model, replace(config, probes=4))
        gaps.append(float(auditor.matched_gaps(probes).mean()))
    ranks = np.argsort(np.argsort(gaps))
    assert np.corrcoef(ranks, range(len(DIALS)))[0, 1] > 0.8, gaps
    assert gaps[0] < 0 < gaps[-1], gaps


@needs_data
def test_the_shipped_run_shows_the_case():
    summary = shipped().summary
    before, after = summary["reference"], summary["final"]
    assert after["rm_score_sd"] > before["rm_score_sd"] + 1
    assert after["brief"]["gold"] < before["brief"]["gold"] - 0.2
    assert after["brief"]["length_tokens"] > 1.5 * before["brief"]["length_tokens"]
    batch = summary["batch"]
    assert batch["advantage_verbose"] > 0 > batch["advantage_concise"]
    assert batch["rm_gap_sd"] > 0 and batch["kl_verbose_nats"] > batch["kl_concise_nats"]


# --- making it ------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    text = (DATA / "desk.toml").read_text(encoding="utf-8")
    (folder / "desk.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = folder_of(tmp_path_factory.mktemp("data"), "data")
    build(folder, config=TINY)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_a_second_build_writes_the_same_bytes(built, tmp_path):
    again = folder_of(tmp_path, "again")
    seen: dict[str, tuple] = {}
    manifest = build(
        again, config=TINY, report=lambda s, done, total, m: seen.update({s: (done, total)})
    )
    one, two = contents(built), contents(again)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert manifest == strict(again / "MANIFEST.json")
    assert manifest["files"].keys() == one.keys() - {"MANIFEST.json"}
    assert manifest["files"]["desk.toml"]["command"] == "written by hand"
    assert manifest["files"]["drift/summary.json"]["seed"] == TINY.seed
    assert all(done == total for done, total in seen.values()) and "dials" in seen


def test_what_was_built_can_be_read_by_name(built):
    case = shipped(built)
    assert case.steps == [0, 2, 4] and case.batch_steps == [1, 2, 3]
    assert case.policy(4).config == case.reference.config and len(case.rollout(2)) == 16
    assert len(case.metrics) == 4 and not [c for c in case.metrics if "seconds" in c]
    assert case.summary["seconds"] == {} and len(case.answers) == 24
    models = [case.reward_model(dial) for dial in DIALS]
    weights = {float(model.trunk.scalar.weight.detach().sum()) for model in models}
    assert len(weights) == len(DIALS), "a model of its own for every dial"
    assert {float(model.sd) > 0 for model in models} == {True}
    default = case.reward_model()
    assert float(default.sd) == float(case.reward_model(TINY.preferences.length_bias).sd)
    # the default's reward model is the run's own: it scores the run's answers as PPO saw them
    rollout = case.rollout(1)
    scores = default.score(rollout.prompts, rollout.responses, rollout.mask)
    assert rollout.finished is not None
    kept = rollout.finished
    torch.testing.assert_close(scores[kept], rollout.scores[kept])
    torch.testing.assert_close(scores[~kept] - 1.0, rollout.scores[~kept])


def test_the_run_before_the_clearest_batch_draws_it_again(built):
    case = shipped(built)
    step = clearest(case.summary["batches"], case.summary["batch"]["steps"])
    assert [path.name for path in (built / "before").iterdir()] == [f"step_{step:03d}.safetensors"]
    smaller = {b["step"]: min(b["n_verbose"], b["n_concise"]) for b in case.summary["batches"]}
    assert smaller[step] == max(smaller[s] for s in case.summary["batch"]["steps"])
    assert case.config == TINY
    run, logged = case.run_before(step), case.rollout(step)
    assert run.steps == step - 1
    drawn = run.rollout()[0].tensors()
    assert all(torch.equal(drawn[name], tensor) for name, tensor in logged.tensors().items())
    with pytest.raises(StoreError, match=r"no file .*before"):
        case.run_before(77)


def test_a_rebuild_removes_what_is_stale_and_nothing_else(built, tmp_path):
    folder = folder_of(tmp_path, "data")
    kept = [
        folder / "seeds.json",
        folder / "lecture.safetensors",
        folder / "mine" / "a.safetensors",
    ]
    stale = [folder / "drift" / "policy_999.safetensors", folder / "reward_bias_9999.safetensors"]
    for path in (*kept, *stale):
        file_module.write_text(path, "[]")
    build(folder, config=TINY)
    assert all(path.read_text(encoding="utf-8") == "[]" for path in kept)
    assert not any(path.exists() for path in stale)
    files = strict(folder / "MANIFEST.json")["files"]
    assert files["seeds.json"]["command"] == "minirlhf seeds"
    assert contents(built).keys() <= contents(folder).keys()


def test_a_build_that_fails_at_its_last_part_leaves_the_old_data(built, tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "data")
    for name, data in contents(built).items():
        file_module.write_atomic(folder / name, lambda path, data=data: path.write_bytes(data))
    save = make_data.save_model

    def full(path, *given, **options):
        if options.get("length_bias") == DIALS[-1]:
            raise StoreError(f"cannot write {path}: No space left on device")
        return save(path, *given, **options)

    monkeypatch.setattr(make_data, "save_model", full)
    with pytest.raises(StoreError, match="No space left"):
        build(folder, config=replace(TINY, seed=9))
    assert contents(folder) == contents(built)


def test_bad_folders_are_one_sentence(tmp_path):
    with pytest.raises(DeskError, match=r"desk.toml cannot be read"):
        build(tmp_path, config=TINY)
    with pytest.raises(StoreError, match=r"no file .*reference.safetensors"):
        _ = shipped(folder_of(tmp_path, "empty")).reference
    with pytest.raises(StoreError, match=r"cannot read .*summary.json"):
        _ = shipped(tmp_path / "empty").summary


def test_data_of_another_desk_is_refused(built, tmp_path):
    folder = folder_of(tmp_path, "data")
    for name, data in contents(built).items():
        file_module.write_atomic(folder / name, lambda path, data=data: path.write_bytes(data))
    text = (folder / "desk.toml").read_text(encoding="utf-8").replace("pounds", "euros")
    (folder / "desk.toml").write_text(text, encoding="utf-8")
    for read in (lambda c: c.reference, lambda c: c.policy(2), lambda c: c.reward_model()):
        with pytest.raises(StoreError, match=r"was trained with another vocabulary"):
            read(shipped(folder))


# --- imports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["minirlhf.drift", "minirlhf.drift.config", "minirlhf.desk.config"]
)
def test_settings_do_not_wait_for_torch(module):
    """`minirlhf drift --help` prints them, and torch takes a second."""
    asked = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0
