"""What a check says of a student's numbers: one sentence, whatever comes back."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def compare(
    mine: Callable[[], Any],
    right: Tensor,
    mistakes: Mapping[str, Tensor],
    *,
    praise: str = "as the library has it",
) -> str:
    """The sentence for what `mine` returns, given the right answer and what mistakes lead to.

    "not written yet" for None, "right", the name of the mistake, or the entry that is farthest off;
    nothing is raised.
    """
    try:
        found = mine()
    except Exception as error:
        return f"your function stopped with {type(error).__name__}: {error}"
    if found is None:
        return "not written yet: the function returns None"
    if isinstance(found, int | float) and not right.shape:
        found = torch.tensor(float(found))
    if not isinstance(found, Tensor):
        wanted = "tensor" if right.shape else "number"
        return f"a {type(found).__name__} came back; return a {wanted}"
    if found.shape != right.shape:
        more = ": one number came back, one for every entry is asked" * (found.numel() == 1)
        return f"the shape is {list(found.shape)}, expected {list(right.shape)}{more}"
    found, right = found.detach().double(), right.double()
    if not found.isfinite().all():
        return "there are NaN or infinite entries: does something divide by 0 or take log(0)?"
    if torch.allclose(found, right, atol=1e-4):
        return f"right: {praise}"
    for name, wrong in {**mistakes, "the sign is turned round: look again": -right}.items():
        if torch.allclose(found, wrong.double(), atol=1e-4):
            return name
    where = int((found - right).abs().flatten().argmax())
    got, want = found.flatten()[where].item(), right.flatten()[where].item()
    return f"not yet: entry {where} is {got:.3f}, expected {want:.3f}"
