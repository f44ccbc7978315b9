"""Where the real tokens of a batch are, so that padding goes through no matrix.

The model computes on flat lists of real tokens; attention alone needs a table with a row an answer.

Source: packing as in Krell et al. (2021, arXiv 2107.02027).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

HIDDEN = -1e30  # added to a score that must not count: exp() of it is 0, without NaN


class Packing:
    """The way from flat lists of tokens to the table of attention, and back.

    valid [B, S] marks real tokens (contiguous in each row), keep [B, S] those whose final state
    is wanted. Flat tensors list tokens row by row: M of them valid, K of them kept. Attention
    needs a table [B, W], W the longest row. Its rows *end* in the last column, so the kept tokens
    stand in the last `asked` columns, and in the last block no other token asks anything.
    """

    def __init__(
        self,
        valid: Bool[Tensor, "B S"],
        keep: Bool[Tensor, "B S"],
        heads: int,
        dtype: torch.dtype,
    ):
        lengths = valid.sum(1, keepdim=True)  # (B, 1)
        self.rows = len(valid)
        self.width = int(lengths.max())

        # a row's first token is at position 0, however much padding stands in front of it
        rank = valid.cumsum(1) - 1  # (B, S)
        self.positions = rank.masked_select(valid)  # (M,)

        # a slot is a cell of the table, counted row by row
        before = self.width - lengths  # (B, 1) empty columns in front of a row's first token
        column = rank + before
        row = torch.arange(self.rows, device=valid.device)[:, None]
        self.slots = (column + row * self.width).masked_select(valid)  # (M,)

        # the last block has a smaller table: from the first column on that holds a kept token
        first = int(column.where(keep, self.width - 1).min())
        self.asked = self.width - first
        self.kept_slots = (column - first + row * self.asked).masked_select(keep)  # (K,)
        self.kept = keep.masked_select(valid).nonzero().squeeze(1)  # (K,) places among the M

        self.bias = self._bias(before, heads, dtype)

    def _bias(self, before: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, [B * H, W, W]: HIDDEN where a query must not look."""
        if len(self.slots) == self.rows * self.width:
            # no cell is empty, so all rows are alike and one table serves them all: (1, W, W)
            before = before[:1]
            heads = 1
        column = torch.arange(self.width, device=before.device)
        future = column > column[:, None]  # (W, W)
        empty = column < before[..., None]  # (B, 1, W)
        # finite, so that a query in an empty cell, which sees nothing, gives no NaN
        bias = torch.zeros(len(before), self.width, self.width, dtype=dtype, device=before.device)
        bias.masked_fill_(future | empty, HIDDEN)
        return bias.repeat_interleave(heads, 0)

    def spread(self, x: Float[Tensor, "M D"]) -> Float[Tensor, "B W D"]:
        """Flat tokens -> the table, zeros where it is empty."""
        size = self.rows * self.width
        if len(x) < size:
            x = x.new_zeros(size, x.shape[-1]).index_copy_(0, self.slots, x)
        return x.view(self.rows, self.width, -1)

    def gather(self, x: Float[Tensor, "B W D"], last: bool) -> Float[Tensor, "N D"]:
        """The table -> flat tokens, N = M; in the last block [B, asked, D] -> [K, D]."""
        slots = self.kept_slots if last else self.slots
        x = x.flatten(0, 1)
        if len(x) == len(slots):
            return x  # no cell is empty: nothing to copy
        return x.index_select(0, slots)

    def keep(self, x: Float[Tensor, "M D"]) -> Float[Tensor, "K D"]:
        """The tokens whose final state is wanted."""
        if len(x) == len(self.kept):
            return x
        return x.index_select(0, self.kept)
