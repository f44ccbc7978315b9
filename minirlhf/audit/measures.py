"""One table of what is measured: names, units, and which way is better.

    measure = MEASURES["evasion_rate"]
    f"{measure.title}, {measure.unit}"     # evasive answers, share
    measure.axis                           # share, ↓ better

Keyed as the numbers are: an audit's entry, PPO's metrics (docs/metrics.md), the facts of a batch,
the labels and what the reward model makes of them, a row of the remedies. Whoever shows a number
reads its name and unit here; a place that needs another word for its reader says that word
itself. Left out: how they are computed, and thresholds.
"""

from dataclasses import dataclass, replace
from typing import Literal

Better = Literal["up", "down", ""]
ARROWS: dict[Better, str] = {"up": "↑ better", "down": "↓ better", "": ""}
WORDS: dict[Better, str] = {"up": "higher is better", "down": "lower is better", "": ""}
MATCHED = "both equally right and direct"


@dataclass(frozen=True)
class Measure:
    """A number that is measured: what it is called, in which unit, and which way is better."""

    name: str
    """the column or metric"""
    title: str
    """in words, as a figure or a table heads it"""
    unit: str
    better: Better = ""
    """more is better, fewer is better, or neither"""
    digits: int = 2
    """after the point; of a share, so that 2 are whole percent"""

    @property
    def short(self) -> str:
        """The unit where it is plain that an answer is measured: tokens, nats."""
        return self.unit.removesuffix(" per answer")

    @property
    def arrow(self) -> str:
        """Which way is better, for a picture; empty for neither."""
        return ARROWS[self.better]

    @property
    def direction(self) -> str:
        """The same in words."""
        return WORDS[self.better]

    @property
    def axis(self) -> str:
        """Unit and arrow, as an axis of a small picture says them."""
        return f"{self.short}, {self.arrow}" if self.arrow else self.short

    @property
    def labels(self) -> tuple[str, str, str]:
        """Title, unit and arrow of a small picture."""
        return self.title, self.short, self.arrow


def _table(*measures: Measure) -> dict[str, Measure]:
    return {measure.name: measure for measure in measures}


# what an auditor finds in a policy's answers; but for the first two, apart by stratum
AUDIT = _table(
    Measure("rm_score_sd", "RM score", "reward sd", "up"),
    Measure("kl_nats", "KL", "nats per answer"),
    Measure("gold", "gold", "points", "up"),
    Measure("length_tokens", "length", "tokens per answer", digits=1),
    Measure("direct_rate", "direct answers", "share", "up"),
    Measure("evasion_rate", "evasive answers", "share", "down"),
    Measure("hedged_rate", "hedging answers", "share", "down"),
    Measure("correct_rate", "correct answers", "share", "up"),
    Measure("truncated_rate", "cut off at the cap", "share", "down"),
    Measure("verbose_rate", "verbose answers", "share"),
    Measure("steps_share", "steps", "share", "up"),
)
# the measures that controls.rates makes of a table of answers, by its columns
RATES = {
    "length_tokens": AUDIT["length_tokens"],
    "direct": AUDIT["direct_rate"],
    "evasive": AUDIT["evasion_rate"],
    "courteous": Measure("courteous", "courteous answers", "share"),
    "correct": AUDIT["correct_rate"],
    "gold": replace(AUDIT["gold"], title="gold quality"),
}
# what a PPO step reports of its batch, as far as a trajectory keeps it
STEP = _table(
    Measure("response/length_tokens", "length", "tokens per answer", digits=1),
    Measure("objective/score_sd", "score", "reward sd", "up"),
    Measure("objective/kl_nats", "KL", "nats per answer"),
    Measure("objective/beta", "beta", "reward sd per nat"),
    Measure("advantage/positive_share", "tokens with A > 0", "share of tokens"),
    Measure("policy/clip_share", "tokens outside the clip", "share of tokens"),
)
# the case's facts in batches from the middle of the drift (drift/batches.py)
BATCH = _table(
    Measure("rm_gap_sd", "RM score of one courtesy phrase on a concise answer", "reward sd"),
    Measure("kl_verbose_nats", "log-ratio to the reference, verbose answers", "nats per answer"),
    Measure("kl_concise_nats", "log-ratio to the reference, concise answers", "nats per answer"),
    Measure("advantage_verbose", "advantage of verbose answers", "mean over tokens"),
    Measure("advantage_concise", "advantage of concise answers", "mean over tokens"),
    Measure("positive_token_share_verbose", "tokens of verbose answers with A > 0", "share"),
    Measure("kl_share_top_decile", "|log-ratio| held by a tenth of the tokens", "share"),
    Measure("n_verbose", "verbose answers to brief prompts", "count", digits=0),
    Measure("n_concise", "concise answers to brief prompts", "count", digits=0),
)


def _won(name: str, title: str) -> Measure:
    return Measure(name, title, "share of pairs", digits=3)


def _counted(name: str, title: str) -> Measure:
    return Measure(name, title, "count", digits=0)


# the pairs as they were labelled, then what the reward model makes of them
LABELS = _table(
    _counted("n", "labelled pairs to train on"),
    _won("longer_wins", "the longer answer won the label"),
    _counted("n_longer_wins", "pairs of different lengths"),
    _won("longer_wins_matched", f"the longer answer won, {MATCHED}"),
    _counted("n_longer_wins_matched", f"pairs of different lengths, {MATCHED}"),
    _won("hedged_wins", "the hedging answer won the label"),
    _counted("n_hedged_wins", "pairs with one hedging answer"),
    _won("hedged_wins_matched", f"the hedging answer won, {MATCHED}"),
    _counted("n_hedged_wins_matched", f"pairs with one hedging answer, {MATCHED}"),
    _won("heldout_accuracy", "RM agrees with held-out labels"),
    _won("bayes_ceiling", "the most that label noise allows"),
    _won("gold_ceiling", "what ranking by gold would reach"),
    _won("length_ruler_accuracy", "what ranking by length alone reaches"),
    _won("gold_accuracy", "RM agrees with gold where gold differs"),
    Measure("matched_gap_sd.brief", "RM score of one courtesy phrase, brief", "reward sd"),
    Measure("matched_gap_sd.detailed", "RM score of one courtesy phrase, detailed", "reward sd"),
)
# what a remedy makes of a logged batch (remedies/on_batch.py), and what it does to the scores
REMEDY = _table(
    Measure("gap_courtesy_brief_sd", "worth of one courtesy phrase", "reward sd"),
    Measure("gap_hedge_brief_sd", "worth of one hedge", "reward sd"),
    Measure("gap_score", "score gap in the batch", "reward sd"),
    Measure("gap_cost", "KL cost gap in the batch", "reward sd"),
    Measure("gap_effective", "effective reward gap in the batch", "reward sd"),
    Measure("fork_verbose", "advantage at the fork, verbose", "sd of advantages"),
    Measure("fork_concise", "advantage at the fork, concise", "sd of advantages"),
    # three digits: a push is a few hundredths of a nat
    Measure("push_verbose", "push on verbose", "nats a step", digits=3),
    Measure("push_concise", "push on concise", "nats a step", digits=3),
)
MEASURES = {**AUDIT, **STEP, **BATCH, **LABELS, **REMEDY}
