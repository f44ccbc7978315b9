"""Sampling answers with a key/value cache.

Every answer draws its uniform numbers in advance, one per step, and inverts the cumulative
distribution (one draw a row, where torch.multinomial would draw a number for every word). So
what a row says does not depend on which rows have ended, and ended rows are dropped from the
cache without changing a word. Log-probs and values fall out of sampling for free.

Left out: top-k, top-p, repetition penalties. Each makes the sampled distribution another one
than the scored one, and then a sampled KL can be negative on average.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.model import Block, Transformer
from minirlhf.text import PAD

SHRINK_BELOW = 0.75  # rows still running, as a share, under which the cache is packed anew


class Sample(NamedTuple):
    """Answers and what the sampler knew; [B, T] each, 0 outside the mask."""

    responses: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor


class Cache:
    """Keys and values of the tokens read so far, for the rows that still run."""

    def __init__(self, model: Transformer, prompts: Tensor, steps: int):
        c, (batch, width) = model.config, prompts.shape
        head, size = c.d_model // c.n_head, width + steps
        new = model.tokens.weight.new_empty
        # keys lie transposed, so that a query meets them in one plain batched product
        self.keys = [new(batch, c.n_head, head, size) for _ in range(c.n_layer)]
        self.values = [new(batch, c.n_head, size, head) for _ in range(c.n_layer)]
        padding = (prompts != PAD).cumsum(1) == 0  # (B, P)
        self.start = padding.sum(1)
        bias = torch.zeros(padding.shape, dtype=new(0).dtype, device=padding.device)
        bias = bias.masked_fill(padding, float("-inf"))[:, None, None]
        self.bias = F.pad(bias, (0, steps)) if bool(padding.any()) else None
        self.filled = 0

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.start = self.start[rows]
        self.bias = None if self.bias is None else self.bias[rows]


def _attend(block: Block, x: Tensor, cache: Cache, layer: int, causal: Tensor | None) -> Tensor:
    """Write x's keys and values into the cache, attend over all of it: [R, s, D] -> [R, s, D]."""
    rows, steps, width = x.shape
    end = cache.filled + steps
    qkv = block.qkv(block.attention_norm(x)).view(rows, steps, 3, block.n_head, -1)
    q, k, v = qkv.unbind(2)  # (R, s, H, hd)
    cache.keys[layer][..., cache.filled : end] = k.permute(0, 2, 3, 1)
    cache.values[layer][:, :, cache.filled : end] = v.transpose(1, 2)
    scores = q.transpose(1, 2) @ cache.keys[layer][..., :end] / q.shape[-1] ** 0.5  # (R, H, s, end)
    if causal is not None:
        scores = scores + causal
    if cache.bias is not None:
        scores = scores + cache.bias[..., :end]
    # a padding query sees nothing at all: its row of NaN would be multiplied into the cache
    weights = scores.softmax(-1) if causal is None else scores.softmax(-1).nan_to_num(0.0)
    return block.out((weights @ cache.values[layer][:, :, :end]).transpose(1, 2).flatten(2))


def _read(model: Transformer, tokens: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """Feed tokens [R, s] and return logits [R, V] and values [R] after the last of them."""
    steps = tokens.shape[1]
    columns = torch.arange(cache.filled, cache.filled + steps, device=tokens.device)
    positions = (columns - cache.start[:, None]).clamp(min=0)
    x = model.tokens(tokens) + model.positions(positions)
    causal = None
    if steps > 1:
        causal = torch.full((steps, steps), float("-inf"), device=tokens.device, dtype=x.dtype)
        causal = causal.triu(1)
    for layer, block in enumerate(model.blocks):
        attended = _attend(block, x, cache, layer, causal)  # type: ignore[arg-type]
        if layer == len(model.blocks) - 1:
            x, attended = x[:, -1:], attended[:, -1:]
        x = x + attended
        x = x + block.mlp(x)
    cache.filled += steps
    return model.heads(model.final_norm(x[:, -1]))


def _pick(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the CDF: logits [R, V] and uniform [R] in [0, 1) -> tokens [R], logprobs [R]."""
    logp = logits.log_softmax(-1)
    cdf = logp.exp().cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]
    picked = torch.searchsorted(cdf, target, right=True).clamp(max=logits.shape[-1] - 1)
    return picked.squeeze(1), logp.gather(1, picked).squeeze(1)


def sample(
    model: Transformer,
    prompts: Tensor,
    *,
    max_new_tokens: int,
    eos: int,
    pad: int = PAD,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Sample:
    """Answers with the log-probs (at `temperature`, nats) and values met while sampling them.

    prompts [B, P] padded on the left. Raises ValueError if P + max_new_tokens passes the context,
    if a prompt is empty, or if temperature <= 0. The generator is a CPU generator, so that one
    seed means one set of draws on every device.
    """
    _check(model, prompts, max_new_tokens, temperature)
    batch, device = len(prompts), prompts.device
    uniform = torch.rand(batch, max_new_tokens, generator=generator).T.to(device)
    responses = torch.full((batch, max_new_tokens), pad, device=device)
    mask = torch.zeros(batch, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(batch, max_new_tokens, device=device, dtype=model.tokens.weight.dtype)
    out = Sample(responses, mask, logprobs, torch.zeros_like(logprobs))
    _fill(out, model, prompts, uniform, eos, temperature)
    return out


@torch.inference_mode()  # allocated outside of it, so that the update may learn from `out`
def _fill(
    out: Sample, model: Transformer, prompts: Tensor, uniform: Tensor, eos: int, temperature: float
) -> None:
    """Write answers into `out`, step by step, dropping ended rows from the cache."""
    cache, tokens = Cache(model, prompts, len(uniform)), prompts
    rows = torch.arange(len(prompts), device=prompts.device)
    running = torch.ones_like(rows, dtype=torch.bool)  # one flag per row in the cache
    for t, draws in enumerate(uniform):
        logits, value = _read(model, tokens, cache)
        picked, logp = _pick(logits / temperature, draws[rows])
        live = rows[running]
        out.responses[live, t], out.mask[live, t] = picked[running], True
        out.logprobs[live, t], out.values[live, t] = logp[running], value[running]
        running = running & (picked != eos)
        left = int(running.sum())
        if left == 0:
            break
        tokens = picked[:, None]
        if left < SHRINK_BELOW * len(rows):
            cache.select(running)
            rows, tokens, running = rows[running], tokens[running], running[running]


def generate(
    model: Transformer,
    prompts: Tensor,
    *,
    max_new_tokens: int,
    eos: int,
    pad: int = PAD,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one answer to each prompt: responses [B, T] and mask [B, T], T = max_new_tokens.

    The mask is True up to and including EOS; an answer without EOS was cut at the cap. Errors as
    in sample(), which also returns log-probs and values.
    """
    out = sample(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        eos=eos,
        pad=pad,
        temperature=temperature,
        generator=generator,
    )
    return out.responses, out.mask


def _check(model: Transformer, prompts: Tensor, max_new_tokens: int, temperature: float) -> None:
    longest = int((prompts != PAD).cumsum(1).gt(0).sum(1).max())
    if longest + max_new_tokens > model.config.context + 1:
        raise ValueError(
            f"a prompt of {longest} tokens and a response of up to {max_new_tokens} pass the "
            f"model's context of {model.config.context}: lower max_new_tokens"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for at least one")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive (1.0 = as trained)")
    if bool((prompts[:, -1] == PAD).any()):
        raise ValueError("a prompt is empty or padded on the right; pad prompts on the left")
