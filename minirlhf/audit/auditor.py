"""The audit: what the team watched, and what an auditor finds who knows the truth.

Offline evaluation is one number, the reward model's mean score on fixed probe prompts. The
targeted audit reads the same answers against the desk's truth, apart for prompts on which the
*reference itself* answers briefly and those where it does not. Nothing here feeds back into
training.

*Stratum* means two things. `Auditor.stratum` is measured, from the lengths of the reference's
samples; `Prompt.stratum` is the desk's label. They differ on about one probe in fifty. The audit
uses the first throughout; a PPO batch is split by the second.

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
# What the table of answers holds of a grade.
GRADES = (
    "finished",
    "length_tokens",
    "gold",
    "correct",
    "direct",
    "evasive",
    "hedged",
    "padding_tokens",
)


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
        self.desk = desk
        self.reference = reference
        self.reward_model = reward_model
        self.config = config
        self.seed = seed
        self.probes = desk.probes(config.probes)
        self.prompts = desk.encode(self.probes).to(reference.tokens.weight.device)
        # The reference answers here, once: on these answers the strata are measured, and the scale
        # of the scores.
        samples = []
        lengths = []
        for i in range(config.reference_samples):
            responses, mask = answer(desk, reference, self.prompts, seed + i)
            samples.append((responses, mask))
            lengths.append(grade(desk, self.probes, responses, mask)["length_tokens"])
        self._scored = tuple(torch.cat(part) for part in zip(*samples, strict=True))
        self.reference_length = np.mean(lengths, 0)  # (probes,) tokens
        # The measured stratum, not the desk's label (probe.stratum): a policy drifts away from
        # what its reference does, whatever the desk calls the question.
        brief, detailed = STRATA
        self.stratum = np.where(self.reference_length < config.brief_below, brief, detailed)

    @torch.no_grad()
    def stopped_by(self, tokens: int) -> np.ndarray:
        """How sure the reference is to have stopped by token `tokens` [probes], in [0, 1].

        Along each of its sampled answers, 1 minus the product of the probabilities of going on;
        the mean over the samples. A second way to the strata (brief where it is at least 1/2),
        less at the mercy of one long sample than a mean length is. A state after an answer's end
        is not seen, which makes it a little low where there are several places to stop.
        """
        by_sample = (part[:, :tokens].split(len(self.probes)) for part in self._scored)
        stopped = []
        for responses, mask in zip(*by_sample, strict=True):
            logits, _ = response_outputs(self.reference, self.prompts, responses, mask)
            stops = logits.softmax(-1)[..., self.desk.vocabulary.eos] * mask
            stopped.append(1 - (1 - stops).prod(1))
        return torch.stack(stopped).mean(0).cpu().numpy()

    def calibrate(self, model: RewardModel | None = None) -> None:
        """Put a reward model on the scale of the reference's own answers to the probes."""
        scaled = self.reward_model if model is None else model
        responses, mask = self._scored
        scaled.calibrate(self.prompts.repeat(self.config.reference_samples, 1), responses, mask)

    @torch.no_grad()
    def sample(self, policy: Transformer, seed: int | None = None) -> Sampled:
        """The policy's answers to the probes, the same for the same policy and seed."""
        # One seed for every policy: two of them differ by what they learnt, not by their draws.
        drawn_with = self.seed if seed is None else seed
        responses, mask = answer(self.desk, policy, self.prompts, drawn_with)
        logprobs, _ = response_logprobs(policy, self.prompts, responses, mask)
        ref_logprobs, _ = response_logprobs(self.reference, self.prompts, responses, mask)
        return responses, mask, (logprobs - ref_logprobs).sum(1)

    def __call__(self, policy: Transformer, step: int) -> tuple[dict[str, Any], list[dict]]:
        """One entry of the history, and the answers behind it (a row per probe)."""
        return self.judge(self.sample(policy), step)

    def judge(self, sampled: Sampled, step: int) -> tuple[dict[str, Any], list[dict]]:
        """The same of answers that are there already."""
        responses, mask, log_ratio = sampled
        scores = self.reward_model.score(self.prompts, responses, mask)
        grades = grade(self.desk, self.probes, responses, mask)
        entry: dict[str, Any] = {
            "step": step,
            "rm_score_sd": float(scores.mean()),
            "kl_nats": float(log_ratio.mean()),  # k1's mean: without bias, and free to be negative
        }
        for name in STRATA:
            here = self.stratum == name  # as measured, not as labelled
            entry[name] = summarise_grades(grades, here)
        return entry, self._rows(step, texts(self.desk, responses, mask), scores, grades)

    def closing(self, sampled: Sampled) -> dict[str, dict[str, float]]:
        """Per stratum, what a comparison of runs needs beside an entry: KL, nats per answer; the
        share of steps (of the fact, if brief) that was given; the share of verbose answers."""
        responses, mask, log_ratio = sampled
        grades = grade(self.desk, self.probes, responses, mask)
        measures = {
            "kl_nats": log_ratio.cpu().numpy(),
            "steps_share": grades["steps_share"],
            "verbose_rate": grades["padding_tokens"] >= self.config.verbose_padding,
        }
        found = {}
        for name in STRATA:
            here = self.stratum == name  # as measured, not as labelled
            found[name] = {k: mean_or_nan(values[here]) for k, values in measures.items()}
        return found

    def _rows(
        self, step: int, answers: list[str], scores: Tensor, grades: dict[str, np.ndarray]
    ) -> list[dict]:
        """The table of answers: a row per probe."""
        rows = []
        for i, probe in enumerate(self.probes):
            row = {
                "step": step,
                "probe": i,
                "stratum": str(self.stratum[i]),  # as measured, not probe.stratum
                "prompt": probe.text,
                "answer": answers[i],
                "rm_score_sd": float(scores[i]),
            }
            row.update({name: grades[name][i].item() for name in GRADES})
            rows.append(row)
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
        if not prompts:
            return np.zeros(0)
        rng = np.random.default_rng(seed)
        pairs = [self.desk.matched_pair(prompt, rng, hedge=hedge) for prompt in prompts]
        concise, courteous = zip(*pairs, strict=True)
        without = self.score_texts(prompts, concise, scorer)
        return self.score_texts(prompts, courteous, scorer) - without

    def score_texts(
        self, prompts: Sequence[Prompt], answers: Sequence[str], scorer: Scorer | None = None
    ) -> np.ndarray:
        """Scores [N] of written answers, EOS added, by the reward model or by another scorer."""
        device = self.prompts.device
        words = self.desk.vocabulary
        ids = [[*words.encode(text), words.eos] for text in answers]
        responses, mask = right_pad(ids, self.desk.max_response)
        score = self.reward_model.score if scorer is None else scorer
        scores = score(self.desk.encode(prompts).to(device), responses.to(device), mask.to(device))
        return scores.numpy(force=True)


def answer(desk: Desk, model: Transformer, prompts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Sampled answers [B, T] and their mask, the same for the same seed."""
    return generate(
        model,
        prompts,
        max_new_tokens=desk.max_response,
        eos=desk.vocabulary.eos,
        generator=torch.Generator().manual_seed(seed),
    )


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
    measures = {
        "length_tokens": grades["length_tokens"],
        "gold": grades["gold"],
        "correct_rate": grades["correct"],
        "direct_rate": grades["direct"],
        "evasion_rate": grades["evasive"],
        "hedged_rate": grades["hedged"],
        "truncated_rate": ~grades["finished"].astype(bool),
    }
    means = {name: mean_or_nan(values[rows]) for name, values in measures.items()}
    return means | {"n": int(rows.sum())}


def mean_or_nan(x: np.ndarray) -> float:
    """The mean, or nan of nothing, without numpy's warning."""
    return float(np.mean(x)) if len(x) else float("nan")


@torch.no_grad()
def judge(model: RewardModel, heldout: Any) -> dict[str, float]:
    """Accuracy on held-out labels, its Bayes ceiling, the ruler null, and accuracy against gold.

    The null ranks by length alone; gold accuracy counts the pairs whose gold differs.
    """
    chosen, rejected = score_pairs(model, heldout)
    gap = (chosen - rejected).cpu().numpy()
    gold = heldout.gold_chosen - heldout.gold_rejected
    agrees = gap * gold > 0
    differs = np.abs(gold) > 1e-9
    longer = np.sign(heldout.length_chosen - heldout.length_rejected)  # 1, 0 or -1
    return {
        "heldout_accuracy": ranking_accuracy(model, heldout),
        "bayes_ceiling": bayes_ceiling(heldout),
        "gold_ceiling": gold_ceiling(heldout),
        "length_ruler_accuracy": float(((longer + 1) / 2).mean()),  # a tie counts one half
        "gold_accuracy": float(agrees[differs].mean()),
    }
