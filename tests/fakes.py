"""Small things with known answers: a model whose every response can be listed, and an oracle."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minirlhf.model import Transformer, TransformerConfig
from minirlhf.rollout import Rollout
from minirlhf.text import EOS


def tiny_model(
    seed: int = 0,
    *,
    vocab: int = 5,
    context: int = 16,
    d_model: int = 8,
    n_layer: int = 2,
    n_head: int = 2,
    spread: float = 3.0,
    dtype: torch.dtype = torch.float64,
) -> Transformer:
    """A Transformer far from uniform: initial weights times `spread`, values not zero."""
    generator = torch.Generator().manual_seed(seed)
    config = TransformerConfig(vocab, context, d_model=d_model, n_layer=n_layer, n_head=n_head)
    model = Transformer(config, generator=generator).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(spread)
            else:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        model.scalar.weight.copy_(torch.randn(1, d_model, generator=generator) * 0.3)
    return model


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def dense(model: Transformer, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same network, written plainly for one row without padding: logits [S, V], values [S].

    No packing, no fused attention, an explicit causal mask: the oracle of core/test_model.py.
    """
    w, c, s = dict(model.named_parameters()), model.config, len(ids)
    x = w["tokens.weight"][list(ids)] + w["positions.weight"][:s]
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    for i in range(c.n_layer):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items()}
        h = layer_norm(x, block["attention_norm.weight"], block["attention_norm.bias"])
        q, k, v = (h @ block["qkv.weight"].T + block["qkv.bias"]).chunk(3, -1)
        heads = []
        for part in range(c.n_head):
            own = slice(part * c.d_model // c.n_head, (part + 1) * c.d_model // c.n_head)
            scores = q[:, own] @ k[:, own].T / math.sqrt(c.d_model // c.n_head)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, own])
        x = x + torch.cat(heads, -1) @ block["out.weight"].T + block["out.bias"]
        h = layer_norm(x, block["mlp_norm.weight"], block["mlp_norm.bias"])
        h = (h @ block["up.weight"].T + block["up.bias"]).clamp(min=0)
        x = x + h @ block["down.weight"].T + block["down.bias"]
    x = layer_norm(x, w["final_norm.weight"], w["final_norm.bias"])
    return x @ w["tokens.weight"].T, (x @ w["scalar.weight"].T + w["scalar.bias"])[:, 0]


def every_answer(vocab: int, steps: int, eos: int = EOS) -> tuple[Tensor, Tensor]:
    """All answers of at most `steps` tokens: responses [N, T] and mask [N, T].

    An answer ends by EOS or is cut at the cap; pad is an ordinary token inside an answer.
    """
    rows = []
    for ids in itertools.product(range(vocab), repeat=steps):
        length = ids.index(eos) + 1 if eos in ids else steps
        row = ids[:length] + (0,) * (steps - length), length
        if row not in rows:
            rows.append(row)
    responses = torch.tensor([ids for ids, _ in rows])
    lengths = torch.tensor([length for _, length in rows])
    return responses, torch.arange(steps) < lengths[:, None]


def ragged_batch(
    seed: int = 0, *, vocab: int = 5, batch: int = 6, width: int = 5, steps: int = 7
) -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded prompts, right-padded responses and mask of many lengths, 1 and full included."""
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(2, vocab, (batch, width), generator=g)
    given = torch.randint(1, width + 1, (batch,), generator=g)
    prompts[torch.arange(width) < width - given[:, None]] = 0
    lengths = torch.randint(1, steps + 1, (batch,), generator=g)
    lengths[0], lengths[1] = 1, steps
    mask = torch.arange(steps) < lengths[:, None]
    responses = torch.randint(0, vocab, (batch, steps), generator=g) * mask
    return prompts, responses, mask


def fake_rollout(
    seed: int = 0,
    *,
    batch: int = 6,
    steps: int = 7,
    dtype: torch.dtype = torch.float64,
    mask: Tensor | None = None,
) -> Rollout:
    """A batch of random numbers in the right shapes, zero outside the mask."""
    g = torch.Generator().manual_seed(seed)
    if mask is None:
        prompts, responses, mask = ragged_batch(seed, batch=batch, steps=steps)
    else:
        prompts, responses = torch.full((len(mask), 2), 3), mask.long() * 3

    def noise() -> Tensor:
        return torch.randn(mask.shape, generator=g, dtype=dtype) * mask

    return Rollout(
        prompts=prompts,
        responses=responses,
        mask=mask,
        logprobs=-noise().abs(),
        ref_logprobs=-noise().abs(),
        values=noise(),
        scores=torch.randn(len(mask), generator=g, dtype=dtype),
    )


def naive_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, a double loop in float64 over the unmasked tokens."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(len(mask)):
        at = [t for t in range(mask.shape[1]) if mask[b, t]]
        r = [float(rewards[b, t]) for t in at]
        v = [float(values[b, t]) for t in at] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(at))]
        for i, t in enumerate(at):
            out[b, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(at)))
    return out
