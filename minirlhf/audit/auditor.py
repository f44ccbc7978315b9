"""The audit: what the team watched, and what an auditor finds who knows the truth.

Offline evaluation is one number, the reward model's mean score on fixed probe prompts. The
targeted audit reads the same answers against the desk's truth, apart for prompts on which the
*reference itself* answers briefly and those where it does not. The strata are measured from the
reference's samples, not taken from the desk's labels. (A PPO batch is split by the desk's label,
which differs on about one probe in fifty.) Nothing here feeds back into training.

Left out: what a PPO batch says (drift/batches.py), estimates of cause (a batch's autopsy makes
them) and alarms on a deployed policy.

Sources: Gao et al. (2022, arXiv 2210.10760) for proxy against gold; Stiennon et al. (2020, arXiv
2009.01325) for reading samples beside scores.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirlhf.audit.config import AuditConfig
from minirlhf.desk.preferences import bayes_ceiling, gold_ceiling
from minirlhf.desk.world import STRATA, Desk, Prompt
from minirlhf.generate import generate
from minirlhf.model import Transformer, response_logprobs, response_outputs
from minirlhf.ppo import Scorer
from minirlhf.reward import RewardModel, ranking_accuracy, score_pairs
from minirlhf.text import right_pad

Sampled = tuple[Tensor, Tensor, Tensor]  # responses, mask, log-ratio to the reference [B], nats


class Auditor:
    """Fixed probes, one reference, one reward model: measures any policy in the same way."""

    def __init__(
        self,
        desk: Desk,
        reference: Transformer,
        reward_model: RewardModel,
        config: AuditConfig,
        *,
        seed: int = 0,
    ):
        self.desk, self.reference, self.reward_model = desk, reference, reward_model
        self.config, self.seed = config, seed
        self.probes = desk.probes(config.probes)
        self.prompts = desk.encode(self.probes).to(reference.tokens.weight.device)
        lengths = [g["length_tokens"] for g in self._reference_grades()]
        self.reference_length = np.mean(lengths, 0)  # (probes,) tokens
        self.stratum = np.where(self.reference_length < config.brief_below, *STRATA)

    def _reference_grades(self) -> list[dict[str, np.ndarray]]:
        draws = range(self.config.reference_samples)
        answers = [answer(self.desk, self.reference, self.prompts, self.seed + i) for i in draws]
        self._scored = tuple(torch.cat(part) for part in zip(*answers, strict=True))
        return [grade(self.desk, self.probes, *part) for part in answers]

    @torch.no_grad()
    def stopped_by(self, tokens: int) -> np.ndarray:
        """How sure the reference is to have stopped by token `tokens` [probes], in [0, 1].

        Along each of its sampled answers, 1 minus the product of the probabilities of going on;
        the mean over the samples. A second way to the strata (brief where it is at least 1/2),
        less at the mercy of one long sample than a mean length is. A state after an answer's end
        is not seen, which makes it a little low where there are several places to stop.
        """
        eos, stops = self.desk.vocabulary.eos, []
        for part in zip(
            *(t[:, :tokens].split(len(self.probes)) for t in self._scored), strict=True
        ):
            logits, _ = response_outputs(self.reference, self.prompts, *part)
            stops.append(1 - (1 - logits.softmax(-1)[..., eos] * part[1]).prod(1))
        return torch.stack(stops).mean(0).cpu().numpy()

    def calibrate(self, model: RewardModel | None = None) -> None:
        """Put a reward model on the scale of the reference's own answers to the probes."""
        prompts = self.prompts.repeat(self.config.reference_samples, 1)
        (model or self.reward_model).calibrate(prompts, *self._scored)

    @torch.no_grad()
    def sample(self, policy: Transformer, seed: int | None = None) -> Sampled:
        """The policy's answers to the probes, the same for the same policy and seed."""
        chosen = self.seed if seed is None else seed
        responses, mask = answer(self.desk, policy, self.prompts, chosen)
        given = (self.prompts, responses, mask)
        logprobs, ref_logprobs = (response_logprobs(m, *given)[0] for m in (policy, self.reference))
        return responses, mask, (logprobs - ref_logprobs).sum(1)

    def __call__(self, policy: Transformer, step: int) -> tuple[dict[str, Any], list[dict]]:
        """One entry of the history, and the answers behind it (a row per probe)."""
        return self.judge(self.sample(policy), step)

    def judge(self, sampled: Sampled, step: int) -> tuple[dict[str, Any], list[dict]]:
        """The same of answers that are there already."""
        responses, mask, log_ratio = sampled
        scores = self.reward_model.score(self.prompts, responses, mask)
        grades = grade(self.desk, self.probes, responses, mask)
        entry: dict[str, Any] = {"step": step, "rm_score_sd": float(scores.mean())}
        entry["kl_nats"] = float(log_ratio.mean())
        for name in STRATA:
            entry[name] = summarise_grades(grades, self.stratum == name)
        return entry, self._rows(step, texts(self.desk, responses, mask), scores, grades)

    def closing(self, sampled: Sampled) -> dict[str, dict[str, float]]:
        """Per stratum, what a comparison of runs needs beside an entry: KL, nats per answer; the
        share of steps (of the fact, if brief) that was given; the share of verbose answers."""
        grades = grade(self.desk, self.probes, *sampled[:2])
        found = {"kl_nats": sampled[2].cpu().numpy(), "steps_share": grades["steps_share"]}
        found["verbose_rate"] = grades["padding_tokens"] >= self.config.verbose_padding
        rows = {name: self.stratum == name for name in STRATA}
        return {s: {k: mean_or_nan(x[at]) for k, x in found.items()} for s, at in rows.items()}

    def _rows(
        self, step: int, answers: list[str], scores: Tensor, grades: dict[str, np.ndarray]
    ) -> list[dict]:
        kept = ("finished", "length_tokens", "gold", "correct", "direct", "evasive", "hedged")
        rows = []
        for i, probe in enumerate(self.probes):
            row = {"step": step, "probe": i, "stratum": str(self.stratum[i])}
            row |= {"prompt": probe.text, "answer": answers[i], "rm_score_sd": float(scores[i])}
            rows.append(row | {k: grades[k][i].item() for k in (*kept, "padding_tokens")})
        return rows

    def matched_gaps(
        self,
        prompts: Sequence[Prompt],
        seed: int = 0,
        *,
        hedge: bool = False,
        scorer: Scorer | None = None,
    ) -> np.ndarray:
        """Score [N], reward sd, of a concise correct answer with one courtesy phrase (or hedge)
        minus that of the same answer without it."""
        rng = np.random.default_rng(seed)
        if not prompts:
            return np.zeros(0)
        pairs = [self.desk.matched_pair(prompt, rng, hedge=hedge) for prompt in prompts]
        made = (self.score_texts(prompts, list(t), scorer) for t in zip(*pairs, strict=True))
        plain, polite = made
        return polite - plain

    def score_texts(
        self, prompts: Sequence[Prompt], answers: Sequence[str], scorer: Scorer | None = None
    ) -> np.ndarray:
        """Scores [N] of written answers, EOS added, by the reward model or by another scorer."""
        desk, device = self.desk, self.prompts.device
        ids = [[*desk.vocabulary.encode(text), desk.vocabulary.eos] for text in answers]
        responses, mask = (x.to(device) for x in right_pad(ids, desk.max_response))
        scored = scorer or self.reward_model.score
        return scored(desk.encode(prompts).to(device), responses, mask).numpy(force=True)


def answer(desk: Desk, model: Transformer, prompts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Sampled answers [B, T] and their mask, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    eos, cap = desk.vocabulary.eos, desk.max_response
    return generate(model, prompts, max_new_tokens=cap, eos=eos, generator=generator)


def texts(desk: Desk, responses: Tensor, mask: Tensor) -> list[str]:
    """The answers as text."""
    rows = zip(responses.cpu(), mask.cpu(), strict=True)
    return [desk.vocabulary.decode(row[keep].tolist()) for row, keep in rows]


def grade(
    desk: Desk, prompts: Sequence[Prompt], responses: Tensor, mask: Tensor
) -> dict[str, np.ndarray]:
    """Grades [B] of sampled answers, one array per field of desk.Grade."""
    finished = ((responses == desk.vocabulary.eos) & mask).any(1)
    return desk.grade_many(prompts, texts(desk, responses, mask), finished.cpu())


def summarise_grades(grades: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    """Means over the True rows: length in tokens, gold in points, rates in [0, 1]."""
    out = {"length_tokens": grades["length_tokens"], "gold": grades["gold"]}
    out |= {f"{k}_rate": grades[v] for k, v in (("correct", "correct"), ("direct", "direct"))}
    out |= {"evasion_rate": grades["evasive"], "hedged_rate": grades["hedged"]}
    out |= {"truncated_rate": ~grades["finished"].astype(bool)}
    means = {name: mean_or_nan(values[rows]) for name, values in out.items()}
    return means | {"n": int(rows.sum())}


def mean_or_nan(x: np.ndarray) -> float:
    """The mean, or nan of nothing."""
    return float(np.mean(x)) if len(x) else float("nan")


@torch.no_grad()
def judge(model: RewardModel, heldout: Any) -> dict[str, float]:
    """Accuracy on held-out labels, its Bayes ceiling, the ruler null, and accuracy against gold.

    The null ranks by length alone; gold accuracy counts the pairs whose gold differs.
    """
    chosen, rejected = (s.cpu().numpy() for s in score_pairs(model, heldout))
    gold = heldout.gold_chosen - heldout.gold_rejected
    differs = np.abs(gold) > 1e-9
    longer = np.sign(heldout.length_chosen - heldout.length_rejected)
    return {
        "heldout_accuracy": ranking_accuracy(model, heldout),
        "bayes_ceiling": bayes_ceiling(heldout),
        "gold_ceiling": gold_ceiling(heldout),
        "length_ruler_accuracy": float(((longer + 1) / 2).mean()),
        "gold_accuracy": float((((chosen - rejected) * gold) > 0)[differs].mean()),
    }
