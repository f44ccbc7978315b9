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
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minirlhf.audit.auditor import Auditor, answer, judge, texts
from minirlhf.checkpoints import build_model, reward_from, save_model
from minirlhf.desk.preferences import Pairs, PreferenceData, make_pairs, raw_bias
from minirlhf.desk.world import STRATA, Desk, Prompt
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

    prompts: list[Prompt]
    """PPO's prompt table, which drift/run.py draws: rules may ask for it"""

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
        self.config = config
        self.out = out
        self.progress = progress
        self.recipe = recipe or Recipe(config)
        self.rules = self.recipe.rules
        self.device = torch.device(device)
        self.desk = desk or Desk.load()
        self.vocabulary = self.desk.vocabulary
        # the model's context is as long as a prompt and max_response
        if config.ppo.max_new_tokens > self.desk.max_response:
            raise ValueError(
                f"ppo.max_new_tokens is {config.ppo.max_new_tokens}, but the desk's answers end at "
                f"{self.desk.max_response} tokens; lower it, or raise max_response in desk.toml"
            )
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.notes: dict[str, Any] = {}
        if out is not None:
            self._claim(out, resume)

    def _claim(self, out: Path, resume: bool) -> None:
        """Say in `out` whose folder it is, or find that it is this run's."""
        wanted = {
            "config": plain(asdict(self.config)),
            "vocabulary": self.vocabulary.fingerprint,
            "desk": self.desk.fingerprint,
        }
        if self.recipe.names:
            wanted["remedies"] = list(self.recipe.names)
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
        start = time.perf_counter()
        self.auditor = self._auditor(self.reward_model)
        self.seconds["audit"] += time.perf_counter() - start

    def _auditor(self, reward_model: RewardModel) -> Auditor:
        seed = self.stream("audit")
        return Auditor(self.desk, self.reference, reward_model, self.config.audit, seed=seed)

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
        """The model of this name: read from `out` if it is there, else made and kept there."""
        vocabulary = self.vocabulary.fingerprint
        if self.out is None:
            return make()
        path = self.out / f"{name}.safetensors"
        if path.exists():
            tensors, meta = load_tensors(path)
            self.seconds.update(meta.get("seconds", {}))  # what was spent before counts
            model = build_model(tensors, meta, vocabulary=vocabulary, source=path)
            return model.to(self.device)
        model = make()
        save_model(path, model, vocabulary=vocabulary, seconds=self.seconds)
        return model

    def _train_reference(self) -> Transformer:
        start = time.perf_counter()
        desk = self.desk
        vocabulary = desk.vocabulary
        rng = np.random.default_rng(self.stream("demonstrations"))
        prompts = desk.prompts(self.config.sft.demonstrations, rng)
        answers = [vocabulary.encode(desk.demonstration(prompt, rng)) for prompt in prompts]
        finished = [[*answer, vocabulary.eos] for answer in answers]
        responses, mask = right_pad(finished, desk.max_response)

        size = TransformerConfig(len(vocabulary), desk.prompt_width + desk.max_response)
        model = Transformer(size, generator=self.generator("weights")).to(self.device)
        train_sft(
            model,
            desk.encode(prompts).to(self.device),
            responses.to(self.device),
            mask.to(self.device),
            self.config.sft,
            generator=self.generator("sft"),
            progress=partial(self.progress, "sft"),
        )
        self.seconds["sft"] += time.perf_counter() - start
        return model

    @cached_property
    def preferences(self) -> PreferenceData:
        """The labelled pairs of this run; half of the answers are the reference's own."""
        start = time.perf_counter()
        seed = self.stream("candidates")

        def sampler(prompts: Sequence[Prompt]) -> list[str]:
            written: list[str] = []
            for first in range(0, len(prompts), 1024):
                part = self.desk.encode(prompts[first : first + 1024]).to(self.device)
                responses, mask = answer(self.desk, self.reference, part, seed + first)
                written += texts(self.desk, responses, mask)
                self.progress("preferences", len(written), len(prompts), {})
            return written

        rng = np.random.default_rng(self.stream("pairs"))
        data = make_pairs(self.desk, self.config.preferences, rng, sampler)
        self.seconds["preferences"] += time.perf_counter() - start
        return data

    def _train_reward(self) -> RewardModel:
        """The reward model, and in `notes` what is known of it and its pairs."""
        data = self.preferences  # made first: it counts its own seconds
        start = time.perf_counter()
        model = self.fit_reward(data.train, "reward")
        auditor = self._auditor(model)
        auditor.calibrate()
        judged = judge(model, data.heldout.to(self.device))
        self.notes["raw_pairs"] = raw_bias(data.train)
        self.notes["reward_model"] = {**judged, "matched_gap_sd": matched_gaps(auditor)}
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
        self.rules.fit(
            model,
            self.ruled(pairs).to(self.device),
            self.config.reward,
            generator=self.generator(name),
            progress=partial(self.progress, "reward"),
        )
        return model

    def member(self, number: int) -> RewardModel:
        """A further reward model, of the same pairs resampled and in another order."""
        name = f"member_{number}"
        if (found := self._read_reward(name)) is not None:
            return found
        train = self.preferences.train
        rng = np.random.default_rng(self.stream(name))
        resampled = train.select(rng.integers(len(train), size=len(train)))
        model = self.fit_reward(resampled, name)
        self.auditor.calibrate(model)
        self._write_reward(model, name, {})
        return model

    def _write_reward(self, model: RewardModel, name: str, notes: dict[str, Any]) -> None:
        if self.out is None:
            return
        save_model(
            self.out / f"{name}.safetensors",
            model.trunk,
            vocabulary=self.vocabulary.fingerprint,
            scale={"mean": float(model.mean), "sd": float(model.sd)},
            notes=notes,
            seconds=self.seconds,
        )

    def _read_reward(self, name: str) -> RewardModel | None:
        if self.out is None:
            return None
        path = self.out / f"{name}.safetensors"
        if not path.exists():
            return None
        tensors, meta = load_tensors(path)
        self.notes = meta["notes"] or self.notes  # a further member has none
        self.seconds.update(meta.get("seconds", {}))
        return reward_from(tensors, meta, self.vocabulary.fingerprint, path).to(self.device)

    def prompt_table(self) -> list[Prompt]:
        """The customers' prompts that PPO draws from."""
        rng = np.random.default_rng(self.stream("prompts"))
        return self.desk.prompts(self.config.prompts, rng)


def matched_gaps(auditor: Auditor) -> dict[str, float]:
    """What one courtesy phrase adds to the score of a concise answer, reward sd, by stratum."""
    gaps = {}
    for stratum in STRATA:
        probes = [auditor.probes[row] for row in np.flatnonzero(auditor.stratum == stratum)]
        if probes:
            gaps[stratum] = float(auditor.matched_gaps(probes).mean())
    return gaps
