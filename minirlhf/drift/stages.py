"""Everything before PPO: the reference, the labelled pairs, the reward model, the auditor.

Each stage draws from a random stream of its own (seed, stage), is written to `out` when it is
done, and is read back where it is there already. What a recipe's rules do to the pairs and to the
training of the reward model is done here. Left out: PPO and what comes after it (drift/run.py).

Sources: the pipeline of Ouyang et al. (2022, arXiv 2203.02155, figure 2, steps 1 and 2).
"""

import copy
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minirlhf.audit.auditor import Auditor, answer, judge, texts
from minirlhf.checkpoints import build_model, reward_from, save_model
from minirlhf.desk.preferences import Pairs, PreferenceData, make_pairs, raw_bias
from minirlhf.desk.world import Desk, Prompt
from minirlhf.drift.config import DriftConfig
from minirlhf.drift.recipe import Recipe
from minirlhf.engine.files import StoreError, load_tensors, plain, read_json, write_json
from minirlhf.model import Transformer, TransformerConfig
from minirlhf.reward import RewardModel
from minirlhf.sft import train_sft
from minirlhf.text import right_pad

Progress = Callable[[str, int, int, dict[str, float]], None]
STAGES = ("sft", "preferences", "reward", "ppo", "audit")


class Upstream:
    """The stages up to the auditor; prepare() goes through those that are not done yet."""

    def __init__(
        self,
        config: DriftConfig,
        out: Path | None = None,
        *,
        device: str = "cpu",
        desk: Desk | None = None,
        resume: bool = False,
        progress: Progress = lambda stage, done, total, metrics: None,
        recipe: Recipe | None = None,
    ):
        """`recipe` adds rules to the settings (drift/recipe.py), whose own settings are not read.
        Raises StoreError if `out` holds another run, or one and resume is False."""
        self.config, self.out, self.progress = config, out, progress
        self.recipe = recipe or Recipe(config)
        self.rules = self.recipe.rules
        self.device, self.desk = torch.device(device), desk or Desk.load()
        self.vocabulary = self.desk.vocabulary
        if config.ppo.max_new_tokens > self.desk.max_response:
            raise ValueError(  # the context is as long as a prompt and max_response
                f"ppo.max_new_tokens is {config.ppo.max_new_tokens}, but the desk's answers end at "
                f"{self.desk.max_response} tokens; lower it, or raise max_response in desk.toml"
            )
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.notes: dict[str, Any] = {}
        if out is not None:
            self._claim(out, resume)

    def _claim(self, out: Path, resume: bool) -> None:
        wanted = {"config": plain(asdict(self.config)), "vocabulary": self.vocabulary.fingerprint}
        wanted["desk"] = self.desk.fingerprint
        wanted |= {"remedies": list(self.recipe.names)} if self.recipe.names else {}
        path = out / "config.json"
        if path.exists() and not resume:
            raise StoreError(f"{out} already holds a run; add --resume or choose another --out")
        if path.exists() and read_json(path) != wanted:
            raise StoreError(
                f"{out} holds a run with other settings (see {path}); give the same options and "
                "the same desk.toml to resume it, or choose another --out"
            )
        write_json(path, wanted)

    def prepare(self) -> None:
        """Reference, reward model and auditor: trained, or read from `out`."""
        self.make_reference()
        self.reward_model = self._read_reward("reward") or self._train_reward()
        start, seed = time.perf_counter(), self.stream("audit")
        given = (self.desk, self.reference, self.reward_model, self.config.audit)
        self.auditor = Auditor(*given, seed=seed)
        self.seconds["audit"] += time.perf_counter() - start

    def make_reference(self) -> None:
        """The reference alone."""
        self.reference = self._stage("reference", self._train_reference)

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

    @cached_property
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
        data = self.preferences
        start, desk = time.perf_counter(), self.desk
        heldout = data.heldout.to(self.device)
        model = self.fit_reward(data.train, "reward")
        auditor = Auditor(desk, self.reference, model, self.config.audit, seed=self.stream("audit"))
        auditor.calibrate()
        self.notes = {"raw_pairs": raw_bias(data.train), "reward_model": judge(model, heldout)}
        probes = {s: [p for p, m in zip(auditor.probes, auditor.stratum == s, strict=True) if m]
                  for s in ("brief", "detailed")}  # fmt: skip
        gaps = {s: float(auditor.matched_gaps(p).mean()) for s, p in probes.items() if p}
        self.notes["reward_model"]["matched_gap_sd"] = gaps
        self.seconds["reward"] += time.perf_counter() - start
        self._write_reward(model, "reward", plain(self.notes))
        return model

    def ruled(self, pairs: Pairs) -> Pairs:
        """What the rules make of the pairs, one after the other."""
        for number, rule in enumerate(self.rules.pairs):
            pairs = rule(pairs, self, np.random.default_rng(self.stream(f"rule {number}")))
        return pairs

    def fit_reward(self, pairs: Pairs, name: str) -> RewardModel:
        """A reward model of the pairs, after the rules, with the stage's own stream; no scale."""
        model = RewardModel(copy.deepcopy(self.reference).requires_grad_(True)).to(self.device)
        given = (model, self.ruled(pairs).to(self.device), self.config.reward)
        report = self._report("reward")
        self.rules.fit(*given, generator=self.generator(name), progress=report)
        return model

    def member(self, number: int) -> RewardModel:
        """A further reward model, of the same pairs resampled and in another order."""
        name = f"member_{number}"
        if (found := self._read_reward(name)) is not None:
            return found
        train, rng = self.preferences.train, np.random.default_rng(self.stream(name))
        model = self.fit_reward(train.select(rng.integers(len(train), size=len(train))), name)
        self.auditor.calibrate(model)
        self._write_reward(model, name, {})
        return model

    def _write_reward(self, model: RewardModel, name: str, notes: dict[str, Any]) -> None:
        if self.out is None:
            return
        scale = {"mean": float(model.mean), "sd": float(model.sd)}
        save_model(
            self.out / f"{name}.safetensors",
            model.trunk,
            vocabulary=self.vocabulary.fingerprint,
            scale=scale,
            notes=notes,
            seconds=self.seconds,
        )

    def _read_reward(self, name: str) -> RewardModel | None:
        path = None if self.out is None else self.out / f"{name}.safetensors"
        if path is None or not path.exists():
            return None
        tensors, meta = load_tensors(path)
        self.notes = meta["notes"] or self.notes
        self._restore_seconds(meta)
        return reward_from(tensors, meta, self.vocabulary.fingerprint, path).to(self.device)

    def prompt_table(self) -> list[Prompt]:
        """The customers' prompts that PPO draws from."""
        return self.desk.prompts(self.config.prompts, np.random.default_rng(self.stream("prompts")))
