"""What can be said of the optimum where answers are too many to list: answers, weighted anew.

From M answers that the *reference* gave to one prompt, and their scores, two policies that were
never trained can be measured: pi* ~ pi_ref e^(r / beta), by weighting each answer, and best-of-n,
by counting how often each would have won. Both come with a standard error, and an estimate whose
effective sample size is too small is refused instead of printed: pi* of a small beta lives where
the reference hardly ever goes. That size is *necessary*, not sufficient: it is computed from the
answers that were drawn, and a rich mode of which none was drawn leaves no trace in it.
`unseen_share` says what such a mode could hold; knowing better takes draws from elsewhere.

Every function takes scores [..., M] and values [..., M] of the same answers, one row a prompt,
in float64 inside; estimates are [...]. Left out: weights that are cut off or smoothed, which
trade the refusal for a bias that cannot be seen.

Sources: Owen (2013), "Monte Carlo theory, methods and examples", sections 9.2 and 9.3; Beirami
et al. (2024, arXiv 2401.01879) for the KL of best-of-n, which shows that the usual formula is an
upper bound; Efron (1982) for the influence functions behind the standard errors.
"""

from math import expm1, log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MINIMUM = 50.0  # effective answers below which nothing is said


class Estimate(NamedTuple):
    """An estimate [...] and how far to trust it."""

    mean: Tensor
    se: Tensor
    """standard error, in the unit of the mean"""
    ess: Tensor
    """effective sample size: so many unweighted answers would tell as much"""


def weights(scores: Tensor, beta: float, *, minimum: float = MINIMUM) -> tuple[Tensor, Tensor]:
    """Self-normalised weights [..., M] ~ e^(scores / beta) and their effective sizes [...].

    Raises ValueError if beta is not positive, or if a row's 1 / sum(w^2) is below `minimum`.
    """
    # The answers come from pi_ref, so each counts pi* / pi_ref ~ e^(r / beta) (Owen, section 9.2).
    w = _tilts(scores, beta).softmax(-1)
    return w, _effective_size(w, minimum, f"beta {beta}", "raise beta")


def _tilts(scores: Tensor, beta: float) -> Tensor:
    """scores / beta in float64, the logs of the weights but for a constant."""
    if not beta > 0:  # NaN fails too
        raise ValueError(f"beta is {beta}; it must be positive: the price of KL, points per nat")
    return scores.double() / beta


def _effective_size(w: Tensor, minimum: float, where: str, mend: str) -> Tensor:
    size = 1 / w.square().sum(-1)  # Owen, section 9.3: M for equal weights, 1 if one holds all
    if not bool((size >= minimum).all()):
        raise ValueError(
            f"at {where} the {w.shape[-1]} answers count as {float(size.min()):.1f}, fewer than "
            f"{minimum:g}: the reference hardly ever goes there; {mend} or draw more answers"
        )
    return size


def under_optimum(
    scores: Tensor, values: Tensor, beta: float, *, minimum: float = MINIMUM
) -> Estimate:
    """E of `values` under pi* ~ pi_ref e^(r / beta); raises as `weights` does.

    The bias falls as 1 / M, the standard error (delta method) as 1 / sqrt(M).
    """
    w, size = weights(scores, beta, minimum=minimum)
    mean = (w * values).sum(-1)
    # A ratio of two means: by the delta method its variance is sum w^2 (f - mean)^2 (section 9.2).
    off = values - mean[..., None]
    se = (w * off).square().sum(-1).sqrt()
    return Estimate(mean, se, size)


def kl_of_optimum(scores: Tensor, beta: float, *, minimum: float = MINIMUM) -> Estimate:
    """KL(pi* || pi_ref) = E_pi*[r] / beta - log Z of whole answers, nats; raises as `weights`."""
    w, size = weights(scores, beta, minimum=minimum)
    count = w.shape[-1]
    ratio = w * count  # pi* / pi_ref of each answer, as estimated
    # An answer whose weight underflowed to 0 counts for nothing: 0 * log 0 would be nan.
    kl = (w * torch.where(w > 0, ratio.log(), 0.0)).sum(-1)
    # What an answer adds to E_pi*[r] / beta is ratio (t - mean t), and to log Z it is ratio - 1.
    tilts = _tilts(scores, beta)
    centred = tilts - (w * tilts).sum(-1, keepdim=True)
    influence = ratio * centred - (ratio - 1)
    return Estimate(kl, influence.std(-1) / count**0.5, size)


def unseen_share(scores: Tensor, beta: float, highest: float) -> Tensor:
    """The most of pi*, [...] between 0 and 1, that a mode of which nothing was drawn may hold.

    `highest` is the most that its answers may score (what the reward model can pay, not the
    largest score seen). With 95 % confidence, for a set of answers named before drawing: its
    chance under the reference is below about 3 / M, so its odds under pi* are below (3 / M)
    e^(highest / beta) over the sample's mean of e^(r / beta). Raises ValueError for beta <= 0.
    """
    tilts = _tilts(scores, beta)
    count = scores.shape[-1]
    # The largest p that is still missed by M draws one time in twenty, (1 - p)^M = .05. Its odds:
    odds = log(expm1(log(20) / count))
    # In logs nothing overflows: log mean e^(r / beta) is logsumexp less log M.
    return torch.sigmoid(odds + highest / beta + log(count) - tilts.logsumexp(-1))


def best_of_n(scores: Tensor, values: Tensor, n: int, *, minimum: float = MINIMUM) -> Estimate:
    """E of `values` of the best of n answers by score, ties drawn by lot.

    The mean over *every* set of n among the M answers, so it has no bias. The standard error is
    that of large M. Raises ValueError unless 1 <= n <= M, or if the effective size is below
    `minimum`.
    """
    count = scores.shape[-1]
    if not 1 <= n <= count:
        raise ValueError(f"best of {n} from {count} answers: n must lie between 1 and {count}")
    ordered, order = scores.sort(-1)
    own = values.double().gather(-1, order)

    # The answer of rank i wins C(i - 1, n - 1) of the C(M, n) sets: those in which the others are
    # of lower rank. lgamma is the log of a factorial; what all ranks share cancels in the softmax.
    rank = torch.arange(1, count + 1, dtype=torch.float64)
    log_sets = torch.lgamma(rank) - torch.lgamma((rank - n + 1).clamp(min=1))
    share_won = torch.where(rank >= n, log_sets, -torch.inf).softmax(-1)
    won = _mean_of_ties(ordered, share_won)
    size = _effective_size(won, minimum, f"n {n}", "lower n")

    # What an answer brings: itself where it wins, else the best of the other n - 1.
    f = _mean_of_ties(ordered, own)
    below = (rank / count) ** (n - 1)  # chance that n - 1 others are not above it
    others = f * below.diff(prepend=below.new_zeros(1))
    from_here_up = others.flip(-1).cumsum(-1).flip(-1)
    brings = f * below + from_here_up - others
    # n places of a set it may stand in; and within its ties it moves the mean that f is.
    influence = n * brings + count * won * (own - f)
    return Estimate((won * own).sum(-1), influence.std(-1) / count**0.5, size)


def _mean_of_ties(ordered: Tensor, values: Tensor) -> Tensor:
    """Each value [..., M] replaced by the mean over the answers that score the same."""
    rises = ordered.diff(dim=-1) != 0
    group = F.pad(rises, (1, 0)).cumsum(-1)  # number of the tie that an answer belongs to
    values = values.expand(group.shape)
    zeros = ordered.new_zeros(group.shape, dtype=torch.float64)
    sums = zeros.scatter_add(-1, group, values)
    counts = zeros.scatter_add(-1, group, torch.ones_like(values))
    means = sums / counts.clamp(min=1)  # there are as many places as answers; most stay empty
    return means.gather(-1, group)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n nats: the KL of best-of-n to the reference is at most that, and comes
    near it only where no answer is likely and none score alike (Beirami et al. 2024)."""
    return log(n) - (n - 1) / n
