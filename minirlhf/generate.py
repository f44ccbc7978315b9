"""Sampling answers with a key/value cache.

Every answer draws its uniform numbers in advance, one per step, and inverts the cumulative
distribution (one draw a row, where torch.multinomial would draw a number for every word). So
what a row says does not depend on which rows have ended, and ended rows are dropped from the
cache without changing a word. Log-probs and values fall out of sampling for free.

This is a second forward pass of model.py's network (`_read` is its states and heads, `_attend` its
attention), for speed alone: the model itself would read each answer anew for every word of it,
and sampling 64 answers of 32 words took 8 times as long. tests/core/test_generate.py holds the
log-probs and values of the two passes equal, to rounding.

Left out: top-k, top-p, repetition penalties. Each makes the sampled distribution another one
than the scored one, and then a sampled KL can be negative on average.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf.engine.packing import HIDDEN
from minirlhf.model import Transformer
from minirlhf.text import PAD, after_padding

SHRINK_BELOW = 0.75  # rows still running, as a share, under which the cache is packed anew
BLOCK = 32  # columns by which the cache grows


class Sample(NamedTuple):
    """Answers and what the sampler knew of them; 0 (responses: `pad`) outside the mask."""

    responses: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]


class Cache:
    """Keys and values of the tokens read so far, for the B rows that still run.

    Columns are the padded prompt, then the answer. A query meets all C of them, and a bias hides
    those that hold no token: plain products over some columns too many are the faster.
    """

    def __init__(self, model: Transformer, prompts: Int[Tensor, "B P"], steps: int):
        config = model.config
        rows, width = prompts.shape
        head = config.d_model // config.n_head
        zeros = model.tokens.weight.new_zeros
        self.heads = config.n_head
        self.filled = 0  # columns in use
        self.limit = width + steps
        # one of each a layer; keys lie transposed, so that a query meets them in one product
        self.keys = [zeros(rows, self.heads, head, 0) for _ in range(config.n_layer)]
        self.values = [zeros(rows, self.heads, 0, head) for _ in range(config.n_layer)]
        # positions of the tokens that come next: a row's first word is at 0
        given = after_padding(prompts)
        self.places = given.cumsum(1).sub_(1).clamp_(min=0)  # (B, P)
        # added to the scores; (B, H, 1, C), the same for every query of a row
        self.bias = zeros(rows, self.heads, 1, width) + HIDDEN * ~given[:, None, None]

    def open(self, steps: int) -> Float[Tensor, "BH s C"]:
        """Make room for the next `steps` tokens of each row; the bias of their queries."""
        self.filled += steps
        self.places = self.places[:, -1:] + 1
        # by whole blocks, as making room copies the cache
        columns = min(math.ceil(self.filled / BLOCK) * BLOCK, self.limit)
        more = columns - self.keys[0].shape[-1]
        if more:
            self.keys = [F.pad(k, (0, more)) for k in self.keys]
            self.values = [F.pad(v, (0, 0, 0, more)) for v in self.values]
            self.bias = F.pad(self.bias, (0, columns - self.bias.shape[-1]), value=HIDDEN)
        if steps == 1:
            self.bias[..., self.filled - 1] = 0  # the new token may be read from now on
            return self.bias.flatten(0, 1)
        # the prompt: its words must not read ahead
        causal = self.bias.new_full((steps, columns), HIDDEN).triu(1)
        return (self.bias + causal).flatten(0, 1)

    def select(self, rows: Bool[Tensor, " B"]) -> None:
        """Keep only the given rows."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.places = self.places[rows]
        self.bias = self.bias[rows]


Affine = tuple[Tensor, Tensor]
"""weight and bias"""


class _Weights(NamedTuple):
    """What a block's modules hold: calling these on a word a row would cost sampling 7 % more."""

    attention_norm: Affine
    mlp_norm: Affine
    qkv: Affine
    out: Affine
    up: Affine
    down: Affine


def _weights(block: Any) -> _Weights:
    """The weights of a model.Block, without its modules."""
    parts = block.named_children()
    return _Weights(**{name: (part.weight, part.bias) for name, part in parts})


def _attend(block: _Weights, x: Tensor, cache: Cache, layer: int, bias: Tensor) -> Tensor:
    """As Block.attention, over the cache: flat [B * s, D] -> [B * s, D].

    Writes the keys and values of the s new tokens of each row into it.
    """
    steps = bias.shape[1]
    heads = cache.heads
    width = x.shape[1]
    normed = F.layer_norm(x, (width,), *block.attention_norm)
    qkv = F.linear(normed, *block.qkv).view(-1, steps, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, s, hd)
    keys = cache.keys[layer]  # (B, H, hd, C)
    values = cache.values[layer]  # (B, H, C, hd)
    now = slice(cache.filled - steps, cache.filled)
    keys[..., now] = k.transpose(2, 3)
    values[:, :, now] = v
    q = q.flatten(0, 1)  # (B * H, s, hd)
    weights = torch.baddbmm(bias, q, keys.flatten(0, 1), alpha=q.shape[-1] ** -0.5)
    weights = weights.softmax(-1)  # (B * H, s, C)
    mixed = torch.bmm(weights, values.flatten(0, 1))  # (B * H, s, hd)
    mixed = mixed.view(-1, heads, steps, width // heads).transpose(1, 2).reshape(-1, width)
    return F.linear(mixed, *block.out)


def _read(
    model: Transformer, blocks: list[_Weights], tokens: Tensor, cache: Cache
) -> tuple[Tensor, Tensor]:
    """As Transformer.forward, of the next tokens [B, s]: logits [B, V] and values [B] after them.

    The first call reads the prompts, each later one a word a row.
    """
    width = model.config.d_model
    steps = tokens.shape[1]
    places = F.embedding(cache.places, model.positions.weight)
    x = (F.embedding(tokens, model.tokens.weight) + places).flatten(0, 1)  # (B * s, D)
    bias = cache.open(steps)
    for layer, block in enumerate(blocks):
        attended = _attend(block, x, cache, layer, bias)
        if layer == len(blocks) - 1:
            # only the state after the last token is asked for
            x = x[steps - 1 :: steps]
            attended = attended[steps - 1 :: steps]
        x = x + attended
        normed = F.layer_norm(x, (width,), *block.mlp_norm)
        hidden = F.linear(normed, *block.up).relu_()
        x = x + F.linear(hidden, *block.down)
    x = F.layer_norm(x, (width,), model.final_norm.weight, model.final_norm.bias)
    logits = x.mm(model.tokens.weight.t())
    return logits, torch.addmv(model.scalar.bias, x, model.scalar.weight[0])


def _pick(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the CDF: logits [B, V] and uniform [B] in [0, 1) -> tokens [B], logprobs [B]."""
    p = logits.softmax(-1)
    cdf = p.cumsum(-1)
    # a share of the last sum, which rounding leaves a little off 1
    target = uniform[:, None] * cdf[:, -1:]
    # right: the first word whose sum *passes* the target, so none of probability 0
    picked = torch.searchsorted(cdf, target, right=True)
    picked.clamp_(max=logits.shape[-1] - 1)
    logprobs = p.gather(1, picked).squeeze(1).log_()
    return picked.squeeze(1), logprobs


@torch.inference_mode()
def _draw(
    model: Transformer, prompts: Tensor, uniform: Tensor, eos: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probs, values [T, B]; behind a row's EOS stands whatever it went on to say."""
    blocks = [_weights(block) for block in model.blocks]
    cache = Cache(model, prompts, len(uniform))
    # a row a step, so that what a step writes lies together
    tokens = torch.full(uniform.shape, eos, device=prompts.device)
    logprobs, values = model.tokens.weight.new_zeros(2, *uniform.shape)
    rows = torch.arange(len(prompts), device=prompts.device)  # those in the cache
    running = torch.ones_like(rows, dtype=torch.bool)  # of these, the ones that have not ended
    read = prompts
    for t in range(len(tokens)):
        logits, value = _read(model, blocks, read, cache)
        if temperature != 1.0:
            logits = logits / temperature
        picked, logprob = _pick(logits, uniform[t])
        tokens[t].index_copy_(0, rows, picked)
        logprobs[t].index_copy_(0, rows, logprob)
        values[t].index_copy_(0, rows, value)
        read = picked[:, None]
        running = running & (picked != eos)
        left = int(running.count_nonzero())
        if left == 0:
            break
        # not for every row that ends, as this copies the cache
        if left < SHRINK_BELOW * len(rows):
            cache.select(running)
            rows = rows[running]
            read = read[running]
            uniform = uniform[:, running]
            running = running[running]
    return tokens, logprobs, values


def sample(
    model: Transformer,
    prompts: Int[Tensor, "B P"],
    *,
    max_new_tokens: int,
    eos: int,
    pad: int = PAD,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Sample:
    """Answers with the log-probs (at `temperature`, nats) and values met while sampling them.

    Prompts are padded on the left. Raises ValueError if P + max_new_tokens passes the context,
    if a prompt is empty, or if temperature <= 0. The generator is a CPU generator, so that one
    seed means one set of draws on every device.
    """
    _check(model, prompts, max_new_tokens, temperature)
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator)
    uniform = uniform.T.to(prompts.device)  # (T, B)
    tokens, logprobs, values = _draw(model, prompts, uniform, eos, temperature)
    ends = (tokens == eos).long()
    mask = ends.cumsum(0) == ends  # no EOS before this token
    return Sample(
        responses=torch.where(mask, tokens, pad).T.contiguous(),
        mask=mask.T.contiguous(),
        logprobs=torch.where(mask, logprobs, 0.0).T.contiguous(),
        values=torch.where(mask, values, 0.0).T.contiguous(),
    )


def generate(
    model: Transformer,
    prompts: Int[Tensor, "B P"],
    *,
    max_new_tokens: int,
    eos: int,
    pad: int = PAD,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """sample() without log-probs and values: responses and mask, T = max_new_tokens.

    The mask is True up to and including EOS; an answer without EOS was cut at the cap.
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
    """Raise ValueError, in one sentence, for what cannot be sampled."""
    longest = int(after_padding(prompts).sum(1).max())
    # one more than the context: the last token of an answer is never read
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
