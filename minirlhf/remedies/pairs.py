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
    return _balanced(pairs, np.zeros(len(pairs), int), rng)


def match(pairs: Pairs, run: Run, rng: np.random.Generator, *, hedges: bool = True) -> Pairs:
    """The same within every bin of |length difference|, in either stratum; with `hedges` also
    within the pairs whose longer answer alone hedges, and those whose shorter one does."""
    longer = np.sign(_longer(pairs))
    doubt = (pairs.hedged_chosen.astype(int) - pairs.hedged_rejected) * hedges
    kinds = np.stack([np.abs(_longer(pairs)) // BIN, pairs.stratum == "brief", longer * doubt], 1)
    numbers = np.unique(kinds, axis=0, return_inverse=True)[1].ravel()
    return _balanced(pairs, numbers, rng, sign=np.where(longer == 0, doubt, longer))


def equal(pairs: Pairs, run: Run, rng: np.random.Generator) -> Pairs:
    """Only pairs of about equally long answers that both hedge or both do not."""
    same = pairs.hedged_chosen == pairs.hedged_rejected
    return pairs.select((np.abs(_longer(pairs)) < BIN) & same)


def _longer(pairs: Pairs) -> np.ndarray:
    return pairs.length_chosen - pairs.length_rejected


def _balanced(
    pairs: Pairs, bins: np.ndarray, rng: np.random.Generator, sign: np.ndarray | None = None
) -> Pairs:
    """In each bin as many pairs with a positive sign (the longer one won) as with a negative."""
    sign = np.sign(_longer(pairs)) if sign is None else sign
    kept = sign == 0
    for number in np.unique(bins):
        sides = [np.flatnonzero((bins == number) & (sign == s)) for s in (1, -1)]
        for side in sides:
            kept[rng.permutation(side)[: min(map(len, sides))]] = True
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
    desk, made = run.desk, []
    prompts = desk.prompts(round(weight * len(pairs)), rng)
    for prompt in prompts:
        concise = desk.concise(prompt, rng)
        made.append((concise, desk.padded(concise, rng, hedges=hedges)))
    added = replace(pack_pairs(desk, prompts, *zip(*made, strict=True)), p_label=np.ones(len(made)))
    if tie:
        added = _tied(added, np.ones(len(made), bool), rng)
    return pairs.join(added)


def other_prompts(
    pairs: Pairs, run: Run, rng: np.random.Generator, *, weight: float = 0.5
) -> Pairs:
    """Adds, for `weight` of the pairs, either answer against one to another prompt, over which it
    wins, and two answers to another prompt, a tie: what is good about any prompt cancels out."""
    count = round(weight * len(pairs))
    here, there = (pairs.select(rng.permutation(len(pairs))[:count]) for _ in range(2))
    swapped = here.swap(np.ones(count, bool))
    added = [_against(mine, there) for mine in (here, swapped)]
    elsewhere = replace(there, prompts=here.prompts, stratum=here.stratum)
    for part in (*added, _tied(elsewhere, np.ones(count, bool), rng)):
        pairs = pairs.join(part)
    return pairs


def _against(mine: Pairs, theirs: Pairs) -> Pairs:
    """The winners of `mine` over the winners of `theirs`, to the prompts of `mine`."""
    names = ("{}", "{}_mask", "gold_{}", "fact_{}", "length_{}", "hedged_{}")
    lost = {n.format("rejected"): getattr(theirs, n.format("chosen")) for n in names}
    return replace(mine, **lost, p_label=np.ones(len(mine)))


def ties(pairs: Pairs, run: Run, rng: np.random.Generator) -> Pairs:
    """A slight preference for the longer answer, however little longer, counts as a tie."""
    return _tied(pairs, (_longer(pairs) > 0) & (pairs.p_label < SLIGHT), rng)


def _tied(pairs: Pairs, rows: np.ndarray, rng: np.random.Generator) -> Pairs:
    voted = pairs.swap(rows & (rng.random(len(pairs)) < 0.5))
    return replace(voted, p_label=np.where(rows, 0.5, voted.p_label))
