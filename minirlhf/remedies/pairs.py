"""What a remedy can do to the pairs: which of them are ranked, and which are added.

Each rule takes the training pairs, the run and a generator, and gives back pairs; none of them
reads a gold column. Twins are written anew, as a careful writer would: right answers to fresh
prompts. How sure annotators were (`ties`) is the simulation's own probability of a label. A label
is one person's vote, so a tie is a vote drawn at random: its expected gradient is that of a tie,
-1/2 log sigma(d) - 1/2 log sigma(-d).
Left out: which of them is worth trying, and on what evidence (remedies/arms.py).

Sources: Singhal et al. (2023, arXiv 2310.03716) for balancing; Liu et al. (2024, arXiv
2409.13156, section 3) for answers to other prompts; Lin et al. (2024, arXiv 2406.04770) for ties.
"""

from dataclasses import replace

import numpy as np

from minirlhf.desk.preferences import Pairs, pack_pairs
from minirlhf.drift.recipe import Run

BIN = 3  # tokens: pairs this alike in |length difference| are matched with one another
SLIGHT = 0.75  # a label that fewer annotators than this would repeat is a slight preference


def balance(pairs: Pairs, run: Run, rng: np.random.Generator) -> Pairs:
    """As many pairs that the longer answer won as pairs that the shorter one won."""
    one_bin = np.zeros(len(pairs), int)
    return _balanced(pairs, one_bin, _longer_won(pairs), rng)


def match(pairs: Pairs, run: Run, rng: np.random.Generator, *, hedges: bool = True) -> Pairs:
    """The same within every bin of |length difference|, in either stratum; with `hedges` also
    within the pairs whose longer answer alone hedges, and those whose shorter one does."""
    longer = _longer_won(pairs)
    # who hedges, as seen from the longer answer: 1 it alone, -1 the shorter one alone, else 0
    hedged = _hedger_won(pairs) if hedges else np.zeros(len(pairs), int)
    kinds = np.stack([_apart(pairs) // BIN, pairs.stratum == "brief", longer * hedged], 1)
    _, bins = np.unique(kinds, axis=0, return_inverse=True)
    # of two answers of one length, the hedging one counts as the longer
    won = np.where(longer == 0, hedged, longer)
    return _balanced(pairs, bins.ravel(), won, rng)


def equal(pairs: Pairs, run: Run, rng: np.random.Generator) -> Pairs:
    """Only pairs of about equally long answers that both hedge or both do not."""
    same = pairs.hedged_chosen == pairs.hedged_rejected
    return pairs.select((_apart(pairs) < BIN) & same)


def _apart(pairs: Pairs) -> np.ndarray:
    """|length difference| [N], tokens."""
    return np.abs(pairs.length_chosen - pairs.length_rejected)


def _longer_won(pairs: Pairs) -> np.ndarray:
    """[N]: 1 where the longer answer won, -1 where the shorter one did, 0 for equal lengths."""
    return np.sign(pairs.length_chosen - pairs.length_rejected)


def _hedger_won(pairs: Pairs) -> np.ndarray:
    """[N]: 1 where the winner alone hedges, -1 where the loser alone does, else 0."""
    return pairs.hedged_chosen.astype(int) - pairs.hedged_rejected


def _balanced(pairs: Pairs, bins: np.ndarray, sign: np.ndarray, rng: np.random.Generator) -> Pairs:
    """In each bin as many pairs with a positive sign (the longer one won) as with a negative."""
    kept = sign == 0  # these say nothing about length
    for number in np.unique(bins):
        here = bins == number
        won = np.flatnonzero(here & (sign == 1))
        lost = np.flatnonzero(here & (sign == -1))
        fewer = min(len(won), len(lost))
        for side in (won, lost):
            kept[rng.permutation(side)[:fewer]] = True
    return pairs.select(kept)


def counterfactual(
    pairs: Pairs,
    run: Run,
    rng: np.random.Generator,
    *,
    weight: float = 1.0,
    tie: bool = False,
    hedges: bool = True,
) -> Pairs:
    """Adds `weight` times as many pairs that say the same: a concise answer, and it with one to
    four phrases of courtesy (with `hedges`, or of doubt) around it. The concise one wins; as a
    tie, either does."""
    prompts = run.desk.prompts(round(weight * len(pairs)), rng)
    winners, losers = [], []
    for prompt in prompts:
        concise = run.desk.concise(prompt, rng)
        winners.append(concise)
        losers.append(run.desk.padded(concise, rng, hedges=hedges))
    twins = pack_pairs(run.desk, prompts, winners, losers)
    twins = replace(twins, p_label=np.ones(len(twins)))
    if tie:
        twins = _tied(twins, np.ones(len(twins), bool), rng)
    return pairs.join(twins)


def other_prompts(
    pairs: Pairs, run: Run, rng: np.random.Generator, *, weight: float = 0.5
) -> Pairs:
    """Adds, for `weight` of the pairs, either answer against one to another prompt, over which it
    wins, and two answers to another prompt, a tie: what is good about any prompt cancels out."""
    count = round(weight * len(pairs))
    every = np.ones(count, bool)
    here = pairs.select(rng.permutation(len(pairs))[:count])
    there = pairs.select(rng.permutation(len(pairs))[:count])
    # winner and loser of a pair alike beat what was said to another prompt
    winners = _against(here, there)
    losers = _against(here.swap(every), there)
    elsewhere = replace(there, prompts=here.prompts, stratum=here.stratum)
    return pairs.join(winners).join(losers).join(_tied(elsewhere, every, rng))


def _against(mine: Pairs, theirs: Pairs) -> Pairs:
    """The winners of `mine` over the winners of `theirs`, to the prompts of `mine`."""
    return replace(
        mine,
        rejected=theirs.chosen,
        rejected_mask=theirs.chosen_mask,
        gold_rejected=theirs.gold_chosen,
        fact_rejected=theirs.fact_chosen,
        length_rejected=theirs.length_chosen,
        hedged_rejected=theirs.hedged_chosen,
        p_label=np.ones(len(mine)),
    )


def ties(pairs: Pairs, run: Run, rng: np.random.Generator) -> Pairs:
    """A slight preference for the longer answer, however little longer, counts as a tie."""
    slight = pairs.p_label < SLIGHT
    return _tied(pairs, (_longer_won(pairs) > 0) & slight, rng)


def _tied(pairs: Pairs, rows: np.ndarray, rng: np.random.Generator) -> Pairs:
    """These rows are ties: the winner is drawn, and half the annotators would say the same."""
    swapped = rng.random(len(pairs)) < 0.5
    voted = pairs.swap(rows & swapped)
    return replace(voted, p_label=np.where(rows, 0.5, voted.p_label))
