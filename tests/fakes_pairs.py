"""Ranked pairs in which the answer with more threes wins."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    prompts: Tensor
    chosen: Tensor
    chosen_mask: Tensor
    rejected: Tensor
    rejected_mask: Tensor


def separable(seed: int, count: int) -> Pairs:
    """The answer with more threes wins; lengths are drawn alike on both sides."""
    g = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, ...]] = []
    while len(found) < count:
        answers = torch.randint(3, 5, (2, 6), generator=g)
        masks = torch.arange(6) < torch.randint(1, 7, (2, 1), generator=g)
        threes = ((answers == 3) & masks).sum(1)
        if threes[0] != threes[1]:
            order = [0, 1] if threes[0] > threes[1] else [1, 0]
            found.append(tuple(x[i] for i in order for x in (answers * masks, masks)))
    a, a_mask, b, b_mask = (torch.stack(x) for x in zip(*found, strict=True))
    return Pairs(torch.full((count, 1), 2), a, a_mask, b, b_mask)
