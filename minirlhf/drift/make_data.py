"""data/ made anew from one default run, and the manifest that lists it.

Everything in data/ but desk.toml and seeds.json comes out of one run (seed 0), and reward models
trained on its pairs labelled anew at other length-bias dials. Left out: reading it (data.py).
"""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minirlhf.audit.auditor import Auditor
from minirlhf.checkpoints import save_model
from minirlhf.desk.preferences import relabel
from minirlhf.desk.world import Desk
from minirlhf.drift.batches import clearest
from minirlhf.drift.config import DriftConfig
from minirlhf.drift.data import DIALS, dial_file
from minirlhf.drift.run import Drift
from minirlhf.drift.stages import Progress
from minirlhf.engine.files import (
    data_folder,
    read_json,
    sha256,
    write_atomic,
    write_json,
    write_table,
)
from minirlhf.reward import RewardModel, train_reward

COMMAND = "minirlhf data"
OURS = (  # what an earlier build may have left behind under other numbers
    "reward_bias_*.safetensors",
    "drift/policy_*.safetensors",
    "rollouts/step_*.safetensors",
    "before/step_*.safetensors",
)
BATCHES = 3  # the mid-run batch, the one before and the one after


def build(
    folder: Path, *, config: DriftConfig | None = None, report: Progress | None = None
) -> dict[str, Any]:
    """Make all of data/ but desk.toml and seeds.json anew; the manifest.

    What a file holds depends on the seed alone, so times are left out of it. Nothing in `folder`
    changes before everything is made. Raises StoreError, DeskError or what training raises.
    """
    config = config or DriftConfig()
    desk = Desk.load(folder / "desk.toml")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        made = Path(scratch) / "data"
        run = Drift(config, out, desk=desk, progress=report or (lambda *_: None))
        summary = run.run()
        _tables(run, summary, made)
        _policies_and_batches(run, summary["batch"], out, made)
        _reward_models(run, made, report)
        _replace(made, folder)
    return write_manifest(folder, seed=config.seed)


def _tables(run: Drift, summary: Mapping[str, Any], made: Path) -> None:
    """Summary, metrics and answers, all without times."""
    timeless = [{k: v for k, v in step.items() if "seconds" not in k} for step in run.metrics]
    write_json(made / "drift" / "summary.json", {**summary, "seconds": {}})
    write_table(made / "drift" / "metrics.parquet", timeless)
    write_table(made / "drift" / "answers.parquet", run.answers)


def _policies_and_batches(run: Drift, batch: Mapping[str, Any], out: Path, made: Path) -> None:
    """The reference and every audited policy; `batch` is mid_run's, and says which batches."""
    save_model(made / "reference.safetensors", run.reference, vocabulary=run.vocabulary.fingerprint)
    for path in sorted((out / "policies").glob("*.safetensors")):
        _copy(path, made / "drift" / path.name.replace("step_", "policy_"))
    for path in _around(sorted((out / "rollouts").glob("*")), batch["step"]):
        _copy(path, made / "rollouts" / path.name)
    # weights and both moments are as large as three policies: one state is enough to take apart
    step = clearest(run.batches, batch["steps"])
    before = f"before/step_{step:03d}.safetensors"
    _copy(out / before, made / before)


def _copy(source: Path, target: Path) -> None:
    write_atomic(target, lambda path: path.write_bytes(source.read_bytes()))


def _replace(made: Path, folder: Path) -> None:
    """Put every made file in its place in `folder`; drop what an earlier build left there."""
    new = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    for name in sorted(new):
        _copy(made / name, folder / name)
    for old in (path for pattern in OURS for path in folder.glob(pattern)):
        if old.relative_to(folder) not in new:
            old.unlink()


def _around(paths: list[Path], step: int) -> list[Path]:
    """BATCHES of the paths, with that of `step` in the middle where it is not at an end."""
    middle = [path.stem for path in paths].index(f"step_{step:03d}")
    latest = max(len(paths) - BATCHES, 0)
    first = min(max(middle - BATCHES // 2, 0), latest)
    return paths[first : first + BATCHES]


def _reward_models(run: Drift, folder: Path, report: Progress | None) -> None:
    """One reward model per dial, trained on the run's own pairs with labels drawn anew."""
    usual = run.config.preferences.length_bias
    dials = sorted({*DIALS, usual})
    for done, dial in enumerate(dials, 1):
        model = run.reward_model if dial == usual else _reward_model(run, dial)
        save_model(
            folder / dial_file(dial),
            model.trunk,
            vocabulary=run.vocabulary.fingerprint,
            scale={"mean": float(model.mean), "sd": float(model.sd)},
            length_bias=dial,
        )
        if report:
            report("dials", done, len(dials), {"length bias": dial})


def _reward_model(run: Drift, dial: float) -> RewardModel:
    """The run's pairs ranked by labelers with another length bias, and what is learnt of them."""
    config = run.config
    rng = np.random.default_rng(run.stream(f"labels {dial}"))
    labels = replace(config.preferences, length_bias=dial)
    pairs = relabel(run.preferences, labels, rng).train

    model = RewardModel(copy.deepcopy(run.reference).requires_grad_(True))
    train_reward(model, pairs, config.reward, generator=run.generator("reward"))
    # on the scale of the run's own reward model: the reference's answers have mean 0 and sd 1
    auditor = Auditor(run.desk, run.reference, model, config.audit, seed=run.stream("audit"))
    auditor.calibrate()
    return model


def ship(tables: Mapping[str, Path], *, command: str, seed: int) -> None:
    """Put tables (Parquet) into data/evidence and list them, with their command."""
    folder = data_folder()
    for name, path in tables.items():
        _copy(path, folder / "evidence" / f"{name}.parquet")
    made = {f"evidence/{name}.parquet": (command, seed) for name in tables}
    write_manifest(folder, seed=DriftConfig().seed, made=made)


def write_manifest(
    folder: Path, *, seed: int, made: Mapping[str, tuple[str, int]] | None = None
) -> dict[str, Any]:
    """MANIFEST.json of every file below `folder`, itself left out.

    `made`: command and seed of files that other commands made; of evidence/ what was listed stays.
    """
    path = folder / "MANIFEST.json"
    origin = {"desk.toml": ("written by hand", seed), "seeds.json": ("minirlhf seeds", seed)}
    listed = read_json(path)["files"] if path.exists() else {}
    for name, entry in listed.items():
        if name.startswith("evidence/"):
            origin[name] = (entry["command"], entry["seed"])
    origin.update(made or {})

    files = {}
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = file.relative_to(folder).as_posix()
        if name == "MANIFEST.json" or name.startswith("."):
            continue
        command, drawn = origin.get(name, (COMMAND, seed))
        files[name] = {
            "sha256": sha256(file),
            "bytes": file.stat().st_size,
            "seed": drawn,
            "command": command,
        }
    write_json(path, {"files": files})
    return {"files": files}
