"""Checks of notebook 04: each runs a student's function and returns one sentence.

"not written yet: ..." for None, "right: ..." or the name of the mistake; nothing is raised. The
numbers are away from zero and differ, so that no two mistakes look alike.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from checks.said import compare
from minirlhf.kl import kl_k3, kl_tokens
from minirlhf.oracle import net_advantages


def check_k3(student: Callable[..., Any]) -> str:
    """Exercise 1: k3 from log-probs."""
    a = torch.tensor([[-0.4, -2.0, -1.1], [-0.7, -3.0, -0.2]])
    b = torch.tensor([[-1.3, -0.9, -1.6], [-2.6, -1.2, -1.0]])
    ratio = a - b
    mistakes = {
        "the ratio is upside down: the mean of exp(l) - 1 - l is not KL, "
        "exp(-l) is reference over policy": ratio.exp() - 1 - ratio,
        "the sign of l is turned round in both places: policy and reference are swapped": (
            kl_k3(b, a)
        ),
        "the -1 is missing: the same policy would be charged 1": (-ratio).exp() + ratio,
        "the log-ratio is missing: exp(-l) - 1 has mean 0, whatever the distance": (-ratio).exp()
        - 1,
        "that is k1, the log-ratio": ratio,
        "that is k2, half its square": ratio**2 / 2,
        "that is minus k1: reference minus policy": -ratio,
        "+ l has become - l: then its mean is minus KL": (-ratio).exp() - 1 - ratio,
    }
    praise = "never negative, 0 where both agree, and its mean is KL"
    return compare(lambda: student(a.clone(), b.clone()), kl_k3(a, b), mistakes, praise=praise)


def check_penalty_climb(student: Callable[..., Any]) -> str:
    """Exercise 2: what -beta KL adds to the climb on z."""
    p, p0 = (torch.tensor(x, dtype=torch.float64) for x in ((0.3, 0.8, 0.05), (0.02, 0.4, 0.2)))
    beta = torch.tensor([0.2, 0.7, 1.5], dtype=torch.float64)
    far, slope = p.logit() - p0.logit(), p * (1 - p)
    kl = p * (p / p0).log() + (1 - p) * ((1 - p) / (1 - p0)).log()
    mistakes = {
        "the sign is turned round: this pushes on instead of holding back": beta * slope * far,
        "beta is left out": -slope * far,
        "p (1 - p) is left out: that is the slope in p, and z moves p by dp/dz": -beta * far,
        "that is the forward KL's, which does not see how rare V is: -beta (p - p0)": (
            -beta * (p - p0)
        ),
        "only log(p / p0) is charged: C has a log-ratio, too": -beta * slope * (p / p0).log(),
        "that is the penalty itself, not its slope": -beta * kl,
        "that is zero: k1 differentiated in the loss, the book's formula": torch.zeros_like(p),
        "a sample's log-ratio times p (1 - p) squared: dp/dz goes in once": -beta * slope**2 * far,
    }
    praise = "it grows with the log-odds already moved, and is 0 at the reference"
    right = -beta * slope * far
    return compare(
        lambda: student(p.clone(), p0.clone(), beta.clone()), right, mistakes, praise=praise
    )


def check_charge(student: Callable[..., Any]) -> str:
    """Exercise 3: an answer's charge as a sum and as a mean over its tokens."""
    ratio = torch.tensor([[1.5, 0.3, -0.2, 0.4], [2.5, 0.7, 0.9, 5.0], [0.6, 3.0, 4.0, 7.0]])
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])

    def kl(how: Any) -> Tensor:
        return kl_tokens(ratio, torch.zeros_like(ratio), mask, aggregation=how).sum(1)

    total, mean, every = kl("sequence_sum"), kl("token_mean"), ratio.sum(1)
    mistakes = {
        "the mask is ignored: padding is charged": torch.stack([every, every / 4]),
        "the mean divides by the width T, not by the answer's own length": (
            torch.stack([total, total / 4])
        ),
        "sum and mean are swapped": torch.stack([mean, total]),
        "both are sums: `how` is not used": torch.stack([total, total]),
        "both are means: `how` is not used, or compared with another name": torch.stack(
            [mean, mean]
        ),
        "the mean is over all tokens of the batch: long answers weigh more": (
            torch.stack([total, total / mask.sum()])
        ),
        "the mean is over answers, not over tokens": torch.stack([total, total / 3]),
        "the sum ignores the mask": torch.stack([every, mean]),
        "absolute values are charged: a negative log-ratio is paid back": torch.stack(
            [(ratio.abs() * mask).sum(1), (ratio.abs() * mask).sum(1) / mask.sum(1)]
        ),
    }

    def asked(how: str) -> Any:
        return student(ratio.clone(), mask.clone(), how)

    for how, right in (
        ("sequence_sum", total),
        ("token_mean", mean),
    ):  # is each a number an answer at all?
        said = compare(partial(asked, how), right, {})
        if not said.startswith(("right", "the sign", "not yet")):
            return f'"{how}": {said}' if said.startswith(("a ", "the shape")) else said

    def both() -> Tensor:
        return torch.stack([asked("sequence_sum"), asked("token_mean")])

    praise = "a longer answer hides its fork in the mean, not in the sum"
    return compare(both, torch.stack([total, mean]), mistakes, praise=praise)


def check_net_advantages(student: Callable[..., Any]) -> str:
    """Exercise 4: the net advantage of both answers."""
    p, p0, gap, beta = 0.3, 0.05, 0.4, 0.1
    x, x0 = torch.tensor([p, 1 - p]), torch.tensor([p0, 1 - p0])
    ratios = (x / x0).log()

    def credit(rewards: Tensor) -> Tensor:
        return rewards - (x * rewards).sum()

    r = torch.tensor([gap, 0.0])
    only_v = torch.stack([ratios[0], torch.tensor(0.0)])
    mistakes = {
        "KL is added to the reward: a penalty is subtracted": credit(r + beta * ratios),
        "nothing is expected: the baseline V is missing": r - beta * ratios,
        "KL is left out: that is the advantage of the score alone": credit(r),
        "only V is charged: C has a log-ratio, too (a negative one, so a bonus)": (
            credit(r - beta * only_v)
        ),
        "beta is left out": credit(r - ratios),
        "V and C are swapped": credit(r - beta * ratios).flip(0),
        "the baseline is that of the reference's shares: the policy samples": (
            r - beta * ratios - (x0 * (r - beta * ratios)).sum()
        ),
        "the baseline is the plain mean of both: V is said with probability p": (
            r - beta * ratios - (r - beta * ratios).mean()
        ),
        "the weights p and 1 - p are swapped in the baseline": (
            r - beta * ratios - (x.flip(0) * (r - beta * ratios)).sum()
        ),
    }
    right = torch.stack(net_advantages(p, p0, gap, beta))
    praise = "positive for V as long as p is below p*"
    return compare(lambda: student(p, p0, gap, beta), right, mistakes, praise=praise)
