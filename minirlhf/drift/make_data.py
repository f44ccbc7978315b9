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
from minirlhf.drift.data import DIALS
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

OURS = ("reward_bias_*.safetensors", "drift/policy_*.safetensors")

OURS += ("rollouts/step_*.safetensors", "before/step_*.safetensors")

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
        out, made = Path(scratch) / "run", Path(scratch) / "data"
        run = Drift(config, out, desk=desk, progress=report or (lambda *_: None))
        summary = run.run()
        write_json(made / "drift" / "summary.json", {**summary, "seconds": {}})
        timeless = [{k: v for k, v in m.items() if "seconds" not in k} for m in run.metrics]
        write_table(made / "drift" / "metrics.parquet", timeless)
        write_table(made / "drift" / "answers.parquet", run.answers)
        print_ = run.vocabulary.fingerprint
        save_model(made / "reference.safetensors", run.reference, vocabulary=print_)
        for path in sorted((out / "policies").glob("*.safetensors")):
            _copy(path, made / "drift" / path.name.replace("step_", "policy_"))
        for path in _around(sorted((out / "rollouts").glob("*")), summary["batch"]["step"]):
            _copy(path, made / "rollouts" / path.name)
        before = f"before/step_{clearest(run.batches, summary['batch']['steps']):03d}.safetensors"
        _copy(out / before, made / before)
        _reward_models(run, made, report)
        _replace(made, folder)
    return write_manifest(folder, seed=config.seed)


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
    at = [path.stem for path in paths].index(f"step_{step:03d}")
    first = min(max(at - BATCHES // 2, 0), max(len(paths) - BATCHES, 0))
    return paths[first : first + BATCHES]


def _reward_models(run: Drift, folder: Path, report: Progress | None) -> None:
    """One reward model per dial, trained on the run's own pairs with labels drawn anew."""
    pairs, config = run.preferences, run.config
    dials = sorted({*DIALS, config.preferences.length_bias})
    for done, dial in enumerate(dials):
        labels = replace(config.preferences, length_bias=dial)
        rng = np.random.default_rng(run.stream(f"labels {dial}"))
        if dial == config.preferences.length_bias:
            model = run.reward_model
        else:
            model = RewardModel(copy.deepcopy(run.reference).requires_grad_(True))
            given = relabel(pairs, labels, rng).train
            train_reward(model, given, config.reward, generator=run.generator("reward"))
            seed = run.stream("audit")
            Auditor(run.desk, run.reference, model, config.audit, seed=seed).calibrate()
        scale = {"mean": float(model.mean), "sd": float(model.sd)}
        path = folder / f"reward_bias_{round(10_000 * dial):04d}.safetensors"
        print_ = run.vocabulary.fingerprint
        save_model(path, model.trunk, vocabulary=print_, scale=scale, length_bias=dial)
        if report:
            report("dials", done + 1, len(dials), {"length bias": dial})


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
    path, by = folder / "MANIFEST.json", {"desk.toml": ("written by hand", seed)}
    by["seeds.json"] = ("minirlhf seeds", seed)
    listed = read_json(path)["files"] if path.exists() else {}
    kept = {k: (v["command"], v["seed"]) for k, v in listed.items() if k.startswith("evidence/")}
    by |= kept | dict(made or {})
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if name == "MANIFEST.json" or name.startswith("."):
            continue
        command, drawn = by.get(name, (COMMAND, seed))
        facts = {"sha256": sha256(file), "bytes": file.stat().st_size}
        files[name] = facts | {"seed": drawn, "command": command}
    write_json(path, {"files": files})
    return {"files": files}
