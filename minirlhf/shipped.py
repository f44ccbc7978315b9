"""data/: what the notebooks start from, made by one command and read by name.

    case = shipped()
    case.policy(40), case.reward_model(0.0), case.rollout(8), case.summary["final"]

Everything in it comes out of one default run (seed 0): its reference, its policy at every audit,
three of its batches, the run as it was before one of them, its tables, and reward models trained
on the *same pairs* labelled anew at other length-bias dials. MANIFEST.json lists every file with
its sha256, seed and command.
"""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minirlhf.audit import Auditor
from minirlhf.checkpoints import load_model, load_rollout, reward_from, save_model
from minirlhf.desk import Desk, Prompt
from minirlhf.drift import Drift
from minirlhf.drift_config import DriftConfig
from minirlhf.engine.files import (
    data_folder,
    load_tensors,
    read_json,
    sha256,
    write_atomic,
    write_json,
    write_table,
)
from minirlhf.facts import clearest
from minirlhf.model import Transformer
from minirlhf.ppo import PPO
from minirlhf.preferences import relabel
from minirlhf.reward import RewardModel, train_reward
from minirlhf.rollout import Rollout
from minirlhf.upstream import Progress

COMMAND = "minirlhf data"
DIALS = (0.0, 0.02, 0.035, 0.0455, 0.06, 0.08)  # length bias, points a token; 0.0455 is default
OURS = ("reward_bias_*.safetensors", "drift/policy_*.safetensors")
OURS += ("rollouts/step_*.safetensors", "before/step_*.safetensors")
BATCHES = 3  # the mid-run batch, the one before and the one after


class Shipped:
    """The shipped run, each part read from disk when it is first asked for."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or data_folder()

    @cached_property
    def desk(self) -> Desk:
        """The desk of data/desk.toml."""
        return Desk.load(self.folder / "desk.toml")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json of the run."""
        return read_json(self.folder / "drift" / "summary.json")

    @cached_property
    def answers(self):
        """One row per audit step and probe, a pandas DataFrame."""
        return self._table("answers")

    @cached_property
    def metrics(self):
        """One row per PPO step (docs/metrics.md), a pandas DataFrame."""
        return self._table("metrics")

    def _table(self, name: str, folder: str = "drift"):
        import pandas as pd

        return pd.read_parquet(self.folder / folder / f"{name}.parquet")

    @cached_property
    def remedies(self):
        """One row per arm and seed of `minirlhf remedies`, a pandas DataFrame."""
        return self._table("remedies", "evidence")

    @cached_property
    def sweep(self):
        """One row per cell of the shipped sweep, a pandas DataFrame."""
        return self._table("sweep", "evidence")

    @cached_property
    def one_axis(self):
        """The same of arms on a desk whose labelers have no bias for hedges, only for length."""
        return self._table("one_axis", "evidence")

    @cached_property
    def trajectories(self):
        """One row per cell and PPO step of the shipped sweep, a pandas DataFrame."""
        return self._table("trajectories", "evidence")

    @property
    def seeds(self) -> list[dict[str, Any]]:
        """The claims table of `minirlhf seeds`, of the seeds at which settings were chosen."""
        return [row for row in self._claims if row["seeds"] != "fresh seeds"]

    @property
    def fresh_seeds(self) -> list[dict[str, Any]]:
        """The same of seeds at which nothing was chosen."""
        return [row for row in self._claims if row["seeds"] == "fresh seeds"]

    @property
    def _claims(self) -> list[dict[str, Any]]:
        return read_json(self.folder / "seeds.json")["table"]

    @property
    def steps(self) -> list[int]:
        """PPO steps with a shipped policy."""
        return _numbers(self.folder / "drift", "policy_")

    @property
    def batch_steps(self) -> list[int]:
        """PPO steps with a shipped batch."""
        return _numbers(self.folder / "rollouts", "step_")

    @property
    def before_steps(self) -> list[int]:
        """PPO steps before which the run is shipped."""
        return _numbers(self.folder / "before", "step_")

    @cached_property
    def reference(self) -> Transformer:
        """The reference: what PPO started from."""
        return self._model("reference.safetensors")

    def policy(self, step: int) -> Transformer:
        """The policy after `step` PPO steps. Raises StoreError if it is not shipped."""
        return self._model(f"drift/policy_{step:03d}.safetensors")

    def _model(self, name: str) -> Transformer:
        return load_model(self.folder / name, vocabulary=self.desk.vocabulary.fingerprint)

    def reward_model(self, dial: float | None = None) -> RewardModel:
        """The reward model of a length-bias dial (None: the default's), on its scale."""
        default: float = self.summary["config"]["preferences"]["length_bias"]
        dial = default if dial is None else dial
        path = self.folder / f"reward_bias_{round(10_000 * dial):04d}.safetensors"
        return reward_from(*load_tensors(path), self.desk.vocabulary.fingerprint, path)

    def rollout(self, step: int) -> Rollout:
        """The batch that PPO learnt from in `step`."""
        return load_rollout(self.folder / "rollouts" / f"step_{step:03d}.safetensors")[0]

    def prompts(self) -> list[Prompt]:
        """The prompt table of the run, into which every batch's `index` points."""
        return Drift(self.config, desk=self.desk).prompt_table()

    @cached_property
    def config(self) -> DriftConfig:
        """The settings of the run."""
        return DriftConfig.of(self.summary["config"])

    def run_before(self, step: int) -> PPO:
        """The run as it was before `step`, whose batch is shipped: its rollout() draws that batch
        again. Raises StoreError if that state is not shipped."""
        run = PPO(
            copy.deepcopy(self.reference),
            self.reference,
            self.reward_model().score,
            self.desk.encode(self.prompts()),
            self.config.ppo,
            eos=self.desk.vocabulary.eos,
        )
        run.load_state_dict(
            load_tensors(self.folder / "before" / f"step_{step:03d}.safetensors")[0]
        )
        return run


def shipped(folder: Path | None = None) -> Shipped:
    """The shipped run of this installation, or of another data folder."""
    return Shipped(folder)


def _dial_file(dial: float) -> str:
    return f"reward_bias_{round(10_000 * dial):04d}.safetensors"  # ten-thousandths of a point


def _numbers(folder: Path, prefix: str) -> list[int]:
    found = folder.glob(f"{prefix}*.safetensors")
    return sorted(int(path.stem.removeprefix(prefix)) for path in found)


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
