"""Where the real tokens of a batch are, so that padding goes through no matrix.

The model computes on flat lists of real tokens; attention alone needs a table with a row an answer.
Packing as in Krell et al. (2021, arXiv 2107.02027).
"""

import torch
from torch import Tensor

HIDDEN = -1e30  # added to a score that must not count: exp() of it is 0, without NaN


class Packing:
    """Where the real tokens of a batch are, so that padding goes through no matrix.

    valid [B, S] marks real tokens (contiguous in each row), keep [B, S] those whose final state
    is wanted. Flat tensors list tokens row by row: M of them valid, K of them kept. Attention
    needs a table [B, W]. Its rows *end* in the last column, so the kept tokens stand in the last
    `asked` columns, and in the last block no other token asks anything.
    """

    def __init__(self, valid: Tensor, keep: Tensor, heads: int, dtype: torch.dtype):
        lengths, rank = valid.sum(1, keepdim=True), valid.cumsum(1) - 1
        self.rows, self.width = len(valid), int(lengths.max())
        before = self.width - lengths  # [B, 1] empty columns in front of a row's first token
        place = rank + before
        self.positions = rank.masked_select(valid)  # (M,)
        self.kept = keep.masked_select(valid).nonzero().squeeze(1)  # [K] of the M
        self.asked = self.width - int(place.where(keep, self.width - 1).min())
        row = torch.arange(self.rows, device=valid.device)[:, None]
        self.slots = (place + row * self.width).masked_select(valid)
        self.kept_slots = (place + row * self.asked - self.width + self.asked).masked_select(keep)
        if len(self.slots) == self.rows * self.width:
            before, heads = before[:1], 1  # all rows alike
        column = torch.arange(self.width, device=valid.device)
        hidden = (column > column[:, None]) | (column < before[..., None])
        # finite, so that a query in an empty slot, which sees nothing, gives no NaN
        bias = torch.zeros(hidden.shape, dtype=dtype, device=valid.device)
        self.bias = bias.masked_fill_(hidden, HIDDEN).repeat_interleave(heads, 0)  # (B * H, W, W)

    def spread(self, x: Tensor) -> Tensor:
        """[M, D] flat -> the table [B, W, D], zeros where it is empty."""
        size = self.rows * self.width
        if len(x) < size:
            x = x.new_zeros(size, x.shape[-1]).index_copy_(0, self.slots, x)
        return x.view(self.rows, self.width, -1)

    def gather(self, x: Tensor, last: bool) -> Tensor:
        """[B, W, D] -> [M, D] flat, or in the last block [B, asked, D] -> [K, D]."""
        x, slots = x.flatten(0, 1), self.kept_slots if last else self.slots
        return x if len(x) == len(slots) else x.index_select(0, slots)

    def keep(self, x: Tensor) -> Tensor:
        """[M, D] -> [K, D]: the tokens whose final state is wanted."""
        return x if len(x) == len(self.kept) else x.index_select(0, self.kept)
