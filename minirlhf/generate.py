"""Sampling answers with a key/value cache.

Every answer draws its uniform numbers in advance, one per step, and inverts the cumulative
distribution (one draw a row, where torch.multinomial would draw a number for every word). So
what a row says does not depend on which rows have ended, and ended rows are dropped from the
cache without changing a word. Log-probs and values fall out of sampling for free.

Left out: top-k, top-p, repetition penalties. Each makes the sampled distribution another one
than the scored one, and then a sampled KL can be negative on average.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.engine.packing import HIDDEN
from minirlhf.model import Transformer
from minirlhf.text import PAD

SHRINK_BELOW = 0.75  # rows still running, as a share, under which the cache is packed anew
BLOCK = 32  # columns by which the cache grows


class Sample(NamedTuple):
    """Answers and what the sampler knew; [B, T] each, 0 outside the mask."""

    responses: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor


class Cache:
    """Keys and values of the tokens read so far, for the rows that still run.

    Columns are the padded prompt, then the answer; it grows by BLOCK of them. A query meets all
    and a bias hides those without a token: plain products over some too many are the faster.
    """

    def __init__(self, model: Transformer, prompts: Tensor, steps: int):
        c, (rows, width) = model.config, prompts.shape
        zeros, head = model.tokens.weight.new_zeros, c.d_model // c.n_head
        self.heads, self.filled, self.limit = c.n_head, 0, width + steps
        # keys lie transposed, so that a query meets them in one product; all start empty
        self.keys = [zeros(rows, c.n_head, head, 0) for _ in range(c.n_layer)]
        self.values = [zeros(rows, c.n_head, 0, head) for _ in range(c.n_layer)]
        padding = (prompts != PAD).cumsum(1) == 0  # (R, P)
        self.places = (~padding).cumsum(1).sub_(1).clamp_(min=0)  # [R, s] of the next tokens
        self.bias = zeros(rows, c.n_head, 1, width) + HIDDEN * padding[:, None, None]

    def open(self, steps: int) -> Tensor:
        """Make room for `steps` tokens; the bias [R * H, s, columns] of their queries."""
        self.filled, self.places = self.filled + steps, self.places[:, -1:] + 1
        columns = min(-(-self.filled // BLOCK) * BLOCK, self.limit)
        more = columns - self.keys[0].shape[-1]
        if more:
            self.keys = [F.pad(k, (0, more)) for k in self.keys]
            self.values = [F.pad(v, (0, 0, 0, more)) for v in self.values]
            self.bias = F.pad(self.bias, (0, columns - self.bias.shape[-1]), value=HIDDEN)
        if steps > 1:
            causal = self.bias.new_full((steps, columns), HIDDEN).triu(1)
            return (self.bias + causal).flatten(0, 1)
        self.bias[..., self.filled - 1] = 0
        return self.bias.flatten(0, 1)

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows."""
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        self.places, self.bias = self.places[rows], self.bias[rows]


def _attend(w: SimpleNamespace, x: Tensor, cache: Cache, layer: int, bias: Tensor) -> Tensor:
    """Write x's keys and values into the cache, attend over all of it: [R * s, D] -> [R * s, D]."""
    (steps, width), heads = (bias.shape[1], x.shape[1]), cache.heads
    now = slice(cache.filled - steps, cache.filled)
    qkv = F.linear(F.layer_norm(x, (width,), *w.attention_norm), *w.qkv)
    q, k, v = qkv.view(-1, steps, 3, heads, width // heads).permute(2, 0, 3, 1, 4)  # (R, H, s, hd)
    keys, values = cache.keys[layer], cache.values[layer]
    keys[..., now], values[:, :, now] = k.transpose(2, 3), v
    scores = torch.baddbmm(bias, q.flatten(0, 1), keys.flatten(0, 1), alpha=q.shape[-1] ** -0.5)
    mixed = torch.bmm(scores.softmax(-1), values.flatten(0, 1))  # (R * H, s, hd)
    mixed = mixed.view(-1, heads, steps, width // heads).transpose(1, 2).reshape(-1, width)
    return F.linear(mixed, *w.out)


def _read(
    model: Transformer, blocks: list[SimpleNamespace], tokens: Tensor, cache: Cache
) -> tuple[Tensor, Tensor]:
    """Feed tokens [R, s] and return logits [R, V] and values [R] after the last of them."""
    width, steps = model.config.d_model, tokens.shape[1]
    where = F.embedding(cache.places, model.positions.weight)
    x = (F.embedding(tokens, model.tokens.weight) + where).flatten(0, 1)
    bias = cache.open(steps)
    for layer, w in enumerate(blocks):
        attended = _attend(w, x, cache, layer, bias)
        if layer == len(blocks) - 1:
            x, attended = x[steps - 1 :: steps], attended[steps - 1 :: steps]
        x = x + attended
        hidden = F.linear(F.layer_norm(x, (width,), *w.mlp_norm), *w.up).relu_()
        x = x + F.linear(hidden, *w.down)
    norm, scalar = model.final_norm, model.scalar
    x = F.layer_norm(x, (width,), norm.weight, norm.bias)
    return x.mm(model.tokens.weight.t()), torch.addmv(scalar.bias, x, scalar.weight[0])


def _pick(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the CDF: logits [R, V] and uniform [R] in [0, 1) -> tokens [R], logprobs [R]."""
    p = logits.softmax(-1)
    cdf = p.cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]
    picked = torch.searchsorted(cdf, target, right=True).clamp_(max=logits.shape[-1] - 1)
    return picked.squeeze(1), p.gather(1, picked).squeeze(1).log_()


@torch.inference_mode()
def _draw(
    model: Transformer, prompts: Tensor, uniform: Tensor, eos: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probs, values [T, B]; behind a row's EOS stands whatever it went on to say."""
    # (weight, bias) of each block's parts: calling a module takes as long as its work here
    parts = [{n: (m.weight, m.bias) for n, m in block.named_children()} for block in model.blocks]
    blocks = [SimpleNamespace(**named) for named in parts]
    cache, read = Cache(model, prompts, len(uniform)), prompts
    tokens = torch.full(uniform.shape, eos, device=prompts.device)
    logprobs, values = model.tokens.weight.new_zeros(2, *uniform.shape)
    rows = torch.arange(len(prompts), device=prompts.device)  # those in the cache
    running = torch.ones_like(rows, dtype=torch.bool)
    for t in range(len(tokens)):
        logits, value = _read(model, blocks, read, cache)
        picked, logp = _pick(logits if temperature == 1.0 else logits / temperature, uniform[t])
        for out, found in ((tokens, picked), (logprobs, logp), (values, value)):
            out[t].index_copy_(0, rows, found)
        running, read = running & (picked != eos), picked[:, None]
        left = int(running.count_nonzero())
        if left == 0:
            break
        if left < SHRINK_BELOW * len(rows):
            cache.select(running)
            rows, read, uniform = rows[running], read[running], uniform[:, running]
            running = running[running]
    return tokens, logprobs, values


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
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator).T
    drawn = _draw(model, prompts, uniform.to(prompts.device), eos, temperature)
    ends = (drawn[0] == eos).long()
    mask = ends.cumsum(0) == ends  # no EOS before this token
    tokens, logprobs, values = (
        torch.where(mask, x, pad if i == 0 else 0.0).T.contiguous() for i, x in enumerate(drawn)
    )
    return Sample(tokens, mask.T.contiguous(), logprobs, values)


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
    """sample() without log-probs and values: responses [B, T] and mask [B, T], T = max_new_tokens.

    The mask is True up to and including EOS; an answer without EOS was cut at the cap.
    """
    limits = {"max_new_tokens": max_new_tokens, "eos": eos, "pad": pad}
    out = sample(model, prompts, **limits, temperature=temperature, generator=generator)
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
