"""The whole case as one run: desk -> reference -> preferences -> reward model -> PPO -> audit.

    run = Drift(DriftConfig(seed=0), out=Path("runs/first"))
    summary = run.run()

Each stage draws from a random stream of its own (seed, stage), is written when it is done, and is
read back by a later call with resume=True; PPO is saved at every audit. So a run that was killed
ends with the same bits as one that was not. Without `out` nothing is written.
Left out: drawing and the terminal (callers pass `progress`), and grids of runs.

Sources: the pipeline of Ouyang et al. (2022, arXiv 2203.02155, figure 2).
"""

import copy
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirlhf.audit import Auditor, answer, judge, texts
from minirlhf.autopsy import Convention
from minirlhf.critic import fit_critic
from minirlhf.desk import Desk, Prompt
from minirlhf.drift_config import DriftConfig
from minirlhf.facts import batch_facts, mid_run, pooled_facts
from minirlhf.model import Transformer, TransformerConfig
from minirlhf.ppo import PPO
from minirlhf.preferences import PreferenceData, make_pairs, raw_bias
from minirlhf.reward import RewardModel, reward_from, train_reward
from minirlhf.rollout import Rollout
from minirlhf.sft import train_sft
from minirlhf.store import (
    StoreError,
    build_model,
    load_rollout,
    load_tensors,
    plain,
    read_json,
    save_model,
    save_rollout,
    save_tensors,
    write_json,
    write_table,
)
from minirlhf.text import right_pad

Progress = Callable[[str, int, int, dict[str, float]], None]
STAGES = ("sft", "preferences", "reward", "ppo", "audit")


class Drift:
    """One run of the case; run() goes through the stages that are not done yet."""

    def __init__(
        self,
        config: DriftConfig,
        out: Path | None = None,
        *,
        device: str = "cpu",
        desk: Desk | None = None,
        resume: bool = False,
        progress: Progress = lambda stage, done, total, metrics: None,
    ):
        """Raises StoreError if `out` holds another run, or one and resume is False."""
        self.config, self.out, self.progress = config, out, progress
        self.device, self.desk = torch.device(device), desk or Desk.load()
        self.vocabulary = self.desk.vocabulary
        if config.ppo.max_new_tokens > self.desk.max_response:
            raise ValueError(  # the context is as long as a prompt and max_response
                f"ppo.max_new_tokens is {config.ppo.max_new_tokens}, but the desk's answers end at "
                f"{self.desk.max_response} tokens; lower it, or raise max_response in desk.toml"
            )
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.history: list[dict[str, Any]] = []
        self.metrics: list[dict[str, float]] = []
        self.answers: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []
        self.kept: dict[int, tuple[Rollout, float]] = {}  # and the beta that it was priced at
        self.notes: dict[str, Any] = {}
        if out is not None:
            self._claim(out, resume)

    def _claim(self, out: Path, resume: bool) -> None:
        desk = json.dumps(plain(asdict(self.desk.spec)), sort_keys=True)
        wanted = {"config": plain(asdict(self.config)), "vocabulary": self.vocabulary.fingerprint}
        wanted["desk"] = hashlib.sha256(desk.encode()).hexdigest()[:16]
        path = out / "config.json"
        if path.exists() and not resume:
            raise StoreError(f"{out} already holds a run; add --resume or choose another --out")
        if path.exists() and read_json(path) != wanted:
            raise StoreError(
                f"{out} holds a run with other settings (see {path}); give the same options and "
                "the same desk.toml to resume it, or choose another --out"
            )
        write_json(path, wanted)

    def run(self) -> dict[str, Any]:
        """All stages, in order; the summary (also written to `out`, beside the tables)."""
        self.reference = self._stage("reference", self._train_reference)
        self.reward_model = self._read_reward() or self._train_reward()
        self.auditor = self._auditor()
        self._train_policy()
        summary = self.summary()
        if self.out is not None:
            write_table(self.out / "metrics.parquet", self.metrics)
            write_table(self.out / "answers.parquet", self.answers)
            write_json(self.out / "summary.json", summary)
        return summary

    # ------------------------------------------------------------------ helpers of the stages
    def stream(self, name: str) -> int:
        """The seed of a stage: another one for every (seed, name), and stable over versions."""
        state = np.random.SeedSequence([self.config.seed, zlib.crc32(name.encode())])
        return int(state.generate_state(1)[0])

    def generator(self, name: str) -> torch.Generator:
        """A torch generator of the stage's own."""
        return torch.Generator().manual_seed(self.stream(name))

    def _stage(self, name: str, make: Callable[[], Transformer]) -> Transformer:
        path = None if self.out is None else self.out / f"{name}.safetensors"
        if path is not None and path.exists():
            tensors, meta = load_tensors(path)
            self._restore_seconds(meta)
            model = build_model(tensors, meta, vocabulary=self.vocabulary.fingerprint, source=path)
            return model.to(self.device)
        model = make()
        if path is not None:
            print_ = self.vocabulary.fingerprint
            save_model(path, model, vocabulary=print_, seconds=self.seconds)
        return model

    def _restore_seconds(self, meta: dict[str, Any]) -> None:
        self.seconds.update(meta.get("seconds", {}))

    def _report(self, stage: str) -> Callable[[int, int, dict[str, float]], None]:
        return lambda done, total, metrics: self.progress(stage, done, total, metrics)

    # ------------------------------------------------------------------ stages
    def _train_reference(self) -> Transformer:
        start, desk = time.perf_counter(), self.desk
        rng = np.random.default_rng(self.stream("demonstrations"))
        prompts = desk.prompts(self.config.sft.demonstrations, rng)
        ids = [desk.vocabulary.encode(desk.demonstration(p, rng)) for p in prompts]
        responses, mask = right_pad([[*i, desk.vocabulary.eos] for i in ids], desk.max_response)
        size = TransformerConfig(len(desk.vocabulary), desk.prompt_width + desk.max_response)
        model = Transformer(size, generator=self.generator("weights")).to(self.device)
        given = (desk.encode(prompts), responses, mask)
        asked, said, kept = (t.to(self.device) for t in given)
        train_sft(
            model,
            asked,
            said,
            kept,
            self.config.sft,
            generator=self.generator("sft"),
            progress=self._report("sft"),
        )
        self.seconds["sft"] += time.perf_counter() - start
        return model

    def preferences(self) -> PreferenceData:
        """The labelled pairs of this run; half of the answers are the reference's own."""
        start = time.perf_counter()
        rng, draws = np.random.default_rng(self.stream("pairs")), self.stream("candidates")

        def sampler(prompts: Sequence[Prompt]) -> list[str]:
            written: list[str] = []
            for first in range(0, len(prompts), 1024):
                part = self.desk.encode(prompts[first : first + 1024]).to(self.device)
                written += texts(self.desk, *answer(self.desk, self.reference, part, draws + first))
                self.progress("preferences", len(written), len(prompts), {})
            return written

        data = make_pairs(self.desk, self.config.preferences, rng, sampler)
        self.seconds["preferences"] += time.perf_counter() - start
        return data

    def _train_reward(self) -> RewardModel:
        data = self.preferences()
        start, desk = time.perf_counter(), self.desk
        train, heldout = (p.to(self.device) for p in (data.train, data.heldout))
        model = RewardModel(copy.deepcopy(self.reference)).to(self.device)
        train_reward(
            model,
            train,
            self.config.reward,
            generator=self.generator("reward"),
            progress=self._report("reward"),
        )
        auditor = Auditor(desk, self.reference, model, self.config.audit, seed=self.stream("audit"))
        auditor.calibrate()
        self.notes = {"raw_pairs": raw_bias(data.train), "reward_model": judge(model, heldout)}
        probes = {s: [p for p, m in zip(auditor.probes, auditor.stratum == s, strict=True) if m]
                  for s in ("brief", "detailed")}  # fmt: skip
        gaps = {s: float(auditor.matched_gaps(p).mean()) for s, p in probes.items() if p}
        self.notes["reward_model"]["matched_gap_sd"] = gaps
        self.seconds["reward"] += time.perf_counter() - start
        self._write_reward(model)
        return model

    def _write_reward(self, model: RewardModel) -> None:
        if self.out is None:
            return
        scale = {"mean": float(model.mean), "sd": float(model.sd)}
        save_model(
            self.out / "reward.safetensors",
            model.trunk,
            vocabulary=self.vocabulary.fingerprint,
            scale=scale,
            notes=plain(self.notes),
            seconds=self.seconds,
        )

    def _read_reward(self) -> RewardModel | None:
        path = None if self.out is None else self.out / "reward.safetensors"
        if path is None or not path.exists():
            return None
        tensors, meta = load_tensors(path)
        self.notes = meta["notes"]
        self._restore_seconds(meta)
        return reward_from(tensors, meta, self.vocabulary.fingerprint, path).to(self.device)

    def _auditor(self) -> Auditor:
        start, seed = time.perf_counter(), self.stream("audit")
        reward_model, config = self.reward_model, self.config.audit
        auditor = Auditor(self.desk, self.reference, reward_model, config, seed=seed)
        self.seconds["audit"] += time.perf_counter() - start
        return auditor

    def prompt_table(self) -> list[Prompt]:
        """The customers' prompts that PPO draws from."""
        return self.desk.prompts(self.config.prompts, np.random.default_rng(self.stream("prompts")))

    def _train_policy(self) -> None:
        self.prompts = self.prompt_table()
        self.ppo = PPO(
            copy.deepcopy(self.reference),
            self.reference,
            self.reward_model.score,
            self.desk.encode(self.prompts).to(self.device),
            self.config.ppo,
            seed=self.stream("ppo"),
            eos=self.vocabulary.eos,
        )
        self._load_ppo()
        if not self.history:
            fit_critic(self.ppo, batches=self.config.critic_batches)
            self._audit()
        while self.ppo.steps < self.config.steps:
            start = time.perf_counter()
            before = self.ppo.state_dict() if self._logs(self.ppo.steps + 1) else {}
            metrics, rollout = self.ppo.step()
            self.seconds["ppo"] += time.perf_counter() - start
            self.metrics.append({"step": self.ppo.steps, **metrics})
            if self._logs(self.ppo.steps):
                self._keep(rollout, before)
            self.progress("ppo", self.ppo.steps, self.config.steps, metrics)
            last = self.ppo.steps == self.config.steps
            if self.ppo.steps % self.config.audit.every == 0 or last:
                self._audit()
                self._save_ppo()

    def _audit(self) -> None:
        start = time.perf_counter()
        entry, rows = self.auditor(self.ppo.policy, self.ppo.steps)
        self.history.append(entry)
        self.answers += rows
        self.seconds["audit"] += time.perf_counter() - start
        if self.out is not None:
            path = self.out / "policies" / f"step_{self.ppo.steps:03d}.safetensors"
            save_model(path, self.ppo.policy, vocabulary=self.vocabulary.fingerprint)

    def _logs(self, step: int) -> bool:
        return step in self.config.log_batches

    def _keep(self, rollout: Rollout, before: dict[str, Tensor]) -> None:
        """The batch, its facts, and the run as it was when it drew the batch."""
        start = time.perf_counter()
        assert rollout.index is not None
        prompts = [self.prompts[i] for i in rollout.index.tolist()]
        facts = batch_facts(self.auditor, rollout, prompts)
        self.batches.append({"step": self.ppo.steps, **facts})
        self.kept[self.ppo.steps] = rollout, float(before["beta"])
        self.seconds["audit"] += time.perf_counter() - start
        if self.out is not None:
            path = self._logged("rollouts", self.ppo.steps)
            save_tensors(self._logged("before", self.ppo.steps), before, {"kind": "ppo"})
            meta = {"step": self.ppo.steps, "beta": float(before["beta"])}
            save_rollout(path, rollout, **meta, ppo=plain(asdict(self.config.ppo)))

    def _logged(self, folder: str, step: int) -> Path:
        assert self.out is not None
        return self.out / folder / f"step_{step:03d}.safetensors"

    def _save_ppo(self) -> None:
        if self.out is None:
            return
        names = ("history", "metrics", "answers", "batches", "seconds")
        meta = {"kind": "ppo", **{name: plain(getattr(self, name)) for name in names}}
        save_tensors(self.out / "ppo.safetensors", self.ppo.state_dict(), meta)

    def _load_ppo(self) -> None:
        path = None if self.out is None else self.out / "ppo.safetensors"
        if path is None or not path.exists():
            return
        state, meta = load_tensors(path)
        self.ppo.load_state_dict(state)
        for name in ("history", "metrics", "answers", "batches"):
            setattr(self, name, meta[name])
        self._restore_seconds(meta)
        for step in (batch["step"] for batch in self.batches):
            rollout, meta = load_rollout(self._logged("rollouts", step))
            self.kept[step] = rollout, meta["beta"]

    # ------------------------------------------------------------------ what came out
    def facts(self) -> dict[str, Any]:
        """The three facts of the batches in the middle of the drift, with intervals."""
        middle = (self.kept[step] for step in mid_run(self.batches).get("steps", []))
        batches = [(r, Convention.of(self.config.ppo, beta=beta)) for r, beta in middle]
        return pooled_facts(self.auditor, batches, self.prompts, seed=self.stream("facts"))

    def summary(self) -> dict[str, Any]:
        """Everything a reader of the run needs, as plain JSON values (nan becomes None)."""
        seconds = self.seconds | {"total": sum(self.seconds.values())}
        return plain(
            {
                "seed": self.config.seed,
                "config": asdict(self.config),
                "seconds": seconds,
                **self.notes,
                "reference": self.history[0],
                "final": self.history[-1],
                "history": self.history,
                "batch": mid_run(self.batches),
                "batches": self.batches,
                "facts": self.facts(),
            }
        )
