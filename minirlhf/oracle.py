"""Exact answers to hold PPO against: two answers (L0) and a chain of tokens with one fork (L1).

L0: one prompt, a verbose and a concise answer, p the policy's probability of the verbose one, p0
the reference's, delta_r how much more the reward model gives it. Everything is then one number.

Everything is in float64; rewards in reward sd, KL in nats, beta in reward sd per nat. Scalars or
tensors go in, broadcast together; tensors come out (0-dimensional ones for scalars).

Sources: Korbak et al. (2022, arXiv 2205.11275) and Rafailov et al. (2023, arXiv 2305.18290, eq.
4) for the tilt; Tang and Munos (2025, arXiv 2506.09477) for the gradients of KL estimators.
"""

import torch
from torch import Tensor

Number = float | Tensor


def _double(name: str, x: Number, ok: str = "finite") -> Tensor:
    """x in float64; raises ValueError unless it is finite, positive or a probability."""
    t = torch.as_tensor(x, dtype=torch.float64)
    tests = {"finite": t.isfinite(), "positive": (t > 0) & t.isfinite()}
    tests["a probability between 0 and 1"] = (t > 0) & (t < 1)
    if not bool(tests[ok].all()):
        raise ValueError(f"{name} is {x}; it must be {ok}")
    return t


def tilt(ref_probs: Tensor, rewards: Tensor, beta: Number) -> Tensor:
    """The policy that maximises E[r] - beta KL(pi || ref): pi* ~ ref * exp(r / beta).

    ref_probs and rewards [..., A] over A answers (or tokens); beta a number or [..., 1]. Because
    E[r] - beta KL(pi || ref) = beta log Z - beta KL(pi || pi*), nothing beats pi*, whatever the
    policy's form (Rafailov et al. eq. 4). Raises ValueError for shapes that differ, rows of
    ref_probs that are no distribution, or beta <= 0.
    """
    ref, r = torch.as_tensor(ref_probs, dtype=torch.float64), _double("rewards", rewards)
    if ref.shape != r.shape:
        raise ValueError(f"ref_probs {list(ref.shape)} and rewards {list(r.shape)} must agree")
    if not (bool((ref >= 0).all()) and bool(((ref.sum(-1) - 1).abs() < 1e-4).all())):
        raise ValueError("ref_probs must be >= 0 and sum to 1 over their last dimension")
    return (ref.log() + r / _double("beta", beta, "positive")).softmax(-1)


def two_answer(p0: Number, delta_r: Number, beta: Number) -> Tensor:
    """The tilt for two answers: logit p* = logit p0 + delta_r / beta; p* out, as p0 went in.

    The odds of verbose are multiplied by exp(delta_r / beta). Raises ValueError unless
    0 < p0 < 1 and beta > 0.
    """
    p0, gap = _double("p0", p0, "a probability between 0 and 1"), _double("delta_r", delta_r)
    return torch.sigmoid(p0.logit() + gap / _double("beta", beta, "positive"))
