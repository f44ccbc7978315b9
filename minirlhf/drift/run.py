"""The whole case as one run: desk -> reference -> preferences -> reward model -> PPO -> audit.

    run = Drift(DriftConfig(seed=0), out=Path("runs/first"))
    summary = run.run()

PPO is saved at every audit, and what comes before it (drift/stages.py) stage by stage, so a run
that was killed ends, with resume=True, with the same bits as one that was not. Without `out`
nothing is written. Left out: drawing and the terminal (callers pass `progress`), and grids of runs.

Sources: the pipeline of Ouyang et al. (2022, arXiv 2203.02155, figure 2).
"""

import copy
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from minirlhf.audit.auditor import Sampled
from minirlhf.autopsy.convention import Convention
from minirlhf.checkpoints import load_rollout, save_model, save_rollout
from minirlhf.critic import fit_critic
from minirlhf.drift.batches import batch_facts, mid_run, pooled_facts
from minirlhf.drift.config import DriftConfig
from minirlhf.drift.stages import Upstream
from minirlhf.engine.files import load_tensors, plain, save_tensors, write_json, write_table
from minirlhf.model import Transformer
from minirlhf.ppo import PPO
from minirlhf.rollout import Rollout


class Drift(Upstream):
    """One run of the case; run() goes through the stages that are not done yet."""

    def __init__(self, config: DriftConfig, out: Path | None = None, **options: Any):
        """As Upstream: device, desk, resume, progress, recipe."""
        super().__init__(config, out, **options)
        self.history: list[dict[str, Any]] = []
        self.metrics: list[dict[str, float]] = []
        self.answers: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []
        self.kept: dict[int, tuple[Rollout, float]] = {}  # and the beta that it was priced at
        self.ending: Sampled | None = None  # the last audited answers

    def run(self) -> dict[str, Any]:
        """All stages, in order; the summary (also written to `out`, beside the tables)."""
        self.prepare()
        train = self.rules.policy or Drift.train_policy
        train(self)
        summary = self.summary()
        if self.out is not None:
            write_table(self.out / "metrics.parquet", self.metrics)
            write_table(self.out / "answers.parquet", self.answers)
            write_json(self.out / "summary.json", summary)
        return summary

    def prepare(self) -> None:
        """All that comes before the first step: upstream, the prompt table and PPO itself."""
        super().prepare()
        self.prompts = self.prompt_table()
        self.ppo = self._make_ppo()

    def _make_ppo(self) -> PPO:
        scorer = self.reward_model.score
        for rule in self.rules.scores:
            scorer = rule(scorer, self)
        return PPO(
            copy.deepcopy(self.reference),
            self.reference,
            scorer,
            self.desk.encode(self.prompts).to(self.device),
            self.config.ppo,
            seed=self.stream("ppo"),
            eos=self.vocabulary.eos,
            prices=None if self.rules.prices is None else self.rules.prices(self),
        )

    def _done(self) -> bool:
        if self.rules.stop is not None and self.metrics and self.rules.stop(self.metrics[-1]):
            return True
        return self.ppo.steps >= self.config.steps

    def train_policy(self) -> None:
        """PPO from where it was saved, or from the reference with its critic fitted."""
        self._load_ppo()
        if not self.history:
            fit_critic(self.ppo, batches=self.config.critic_batches)
            self.audit(self.ppo.policy, 0)
        while not self._done():
            start = time.perf_counter()
            logged = self.ppo.steps + 1 in self.config.log_batches
            before = self.ppo.state_dict() if logged else {}
            metrics, rollout = self.ppo.step()
            self.seconds["ppo"] += time.perf_counter() - start
            self.metrics.append({"step": self.ppo.steps, **metrics})
            if logged:
                self._keep(rollout, before)
            self.progress("ppo", self.ppo.steps, self.config.steps, metrics)
            if self.ppo.steps % self.config.audit.every == 0 or self._done():
                self.audit(self.ppo.policy, self.ppo.steps)
                self._save_ppo()
        # a run that was already at its end when it was resumed has audited nothing
        self.ending = self.ending or self.auditor.sample(self.ppo.policy)

    def audit(self, policy: Transformer | Sampled, step: int) -> None:
        """One entry of the history: of a policy, which is kept, or of answers to the probes."""
        start = time.perf_counter()
        made = isinstance(policy, Transformer)
        self.ending = self.auditor.sample(policy) if made else policy
        entry, rows = self.auditor.judge(self.ending, step)
        self.history.append(entry)
        self.answers += rows
        self.seconds["audit"] += time.perf_counter() - start
        if self.out is not None and made:
            path = self._numbered("policies", step)
            save_model(path, policy, vocabulary=self.vocabulary.fingerprint)

    def _keep(self, rollout: Rollout, before: dict[str, Tensor]) -> None:
        """The batch, its facts, and the run as it was when it drew the batch."""
        start = time.perf_counter()
        assert rollout.index is not None
        prompts = [self.prompts[i] for i in rollout.index.tolist()]
        step = self.ppo.steps
        beta = float(before["beta"])
        facts = batch_facts(self.auditor, rollout, prompts)
        self.batches.append({"step": step, **facts})
        self.kept[step] = rollout, beta
        self.seconds["audit"] += time.perf_counter() - start
        if self.out is not None:
            save_tensors(self._numbered("before", step), before, {"kind": "ppo"})
            save_rollout(
                self._numbered("rollouts", step),
                rollout,
                step=step,
                beta=beta,
                ppo=plain(asdict(self.config.ppo)),
            )

    def _numbered(self, folder: str, step: int) -> Path:
        assert self.out is not None
        return self.out / folder / f"step_{step:03d}.safetensors"

    def _save_ppo(self) -> None:
        if self.out is None:
            return
        meta: dict[str, Any] = {"kind": "ppo"}
        for name in ("history", "metrics", "answers", "batches", "seconds"):
            meta[name] = plain(getattr(self, name))
        save_tensors(self.out / "ppo.safetensors", self.ppo.state_dict(), meta)

    def _load_ppo(self) -> None:
        if self.out is None:
            return
        path = self.out / "ppo.safetensors"
        if not path.exists():
            return
        state, meta = load_tensors(path)
        self.ppo.load_state_dict(state)
        for name in ("history", "metrics", "answers", "batches"):
            setattr(self, name, meta[name])
        self.seconds.update(meta["seconds"])
        for batch in self.batches:
            rollout, meta = load_rollout(self._numbered("rollouts", batch["step"]))
            self.kept[batch["step"]] = rollout, meta["beta"]

    # ------------------------------------------------------------------ what came out
    def facts(self) -> dict[str, Any]:
        """The three facts of the batches in the middle of the drift, with intervals."""
        batches = []
        for step in mid_run(self.batches).get("steps", []):
            rollout, beta = self.kept[step]
            batches.append((rollout, Convention.of(self.config.ppo, beta=beta)))
        return pooled_facts(self.auditor, batches, self.prompts, seed=self.stream("facts"))

    def summary(self) -> dict[str, Any]:
        """Everything a reader of the run needs, as plain JSON values (nan becomes None)."""
        return plain(
            {
                "seed": self.config.seed,
                "config": asdict(self.config),
                "seconds": {**self.seconds, "total": sum(self.seconds.values())},
                **self.notes,
                "reference": self.history[0],
                "final": self.history[-1],
                "history": self.history,
                "batch": mid_run(self.batches),
                "batches": self.batches,
                "facts": self.facts(),
            }
        )
