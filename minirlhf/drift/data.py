"""data/: what the notebooks start from, made by one command and read by name.

    case = shipped()
    case.policy(40), case.reward_model(0.0), case.rollout(8), case.summary["final"]

Everything in it comes out of one default run (seed 0): its reference, its policy at every audit,
three of its batches, the run as it was before one of them, its tables, and reward models trained
on the *same pairs* labelled anew at other length-bias dials. MANIFEST.json lists every file with
its sha256, seed and command.
"""

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from minirlhf.checkpoints import load_model, load_rollout, reward_from
from minirlhf.desk.world import Desk, Prompt
from minirlhf.drift.config import DriftConfig
from minirlhf.drift.run import Drift
from minirlhf.engine.files import data_folder, load_tensors, read_json
from minirlhf.model import Transformer
from minirlhf.ppo import PPO
from minirlhf.reward import RewardModel
from minirlhf.rollout import Rollout

DIALS = (0.0, 0.02, 0.035, 0.0455, 0.06, 0.08)  # length bias, points a token; 0.0455 is default


def dial_file(dial: float) -> str:
    """The name of the reward model of a length-bias dial, which counts in ten-thousandths."""
    return f"reward_bias_{round(10_000 * dial):04d}.safetensors"


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
        if dial is None:
            dial = self.config.preferences.length_bias
        path = self.folder / dial_file(dial)
        tensors, meta = load_tensors(path)
        return reward_from(tensors, meta, self.desk.vocabulary.fingerprint, path)

    def rollout(self, step: int) -> Rollout:
        """The batch that PPO learnt from in `step`."""
        rollout, _ = load_rollout(self.folder / "rollouts" / f"step_{step:03d}.safetensors")
        return rollout

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
        state, _ = load_tensors(self.folder / "before" / f"step_{step:03d}.safetensors")
        run.load_state_dict(state)
        return run


def shipped(folder: Path | None = None) -> Shipped:
    """The shipped run of this installation, or of another data folder."""
    return Shipped(folder)


def _numbers(folder: Path, prefix: str) -> list[int]:
    found = folder.glob(f"{prefix}*.safetensors")
    return sorted(int(path.stem.removeprefix(prefix)) for path in found)
