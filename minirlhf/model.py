"""A decoder-only Transformer with a language-model head and a scalar head on one trunk.

Policy and critic share the trunk (half the arithmetic of two networks); a reward model is the
same class, read through its scalar head at the last token of an answer. Pre-norm blocks, learned
positions, ReLU, tied embeddings, no dropout: a log-prob recomputed is the same log-prob.

Real tokens are *packed*: padding goes through no matrix, answers that end early cost what they
are long, and the last block's queries and MLP and the heads run only where an output is asked
for. Nothing that changes a result is skipped. Left out: rotary positions, grouped queries.

Sources: Vaswani et al. (2017, arXiv 1706.03762); Radford et al. (2019, GPT-2); packing as in
Krell et al. (2021, arXiv 2107.02027).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.engine.compute import in_chunks
from minirlhf.engine.packing import Packing
from minirlhf.text import PAD, last_token

CHUNK = 16  # rows that go through the blocks together


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Transformer."""

    vocab_size: int
    """words, specials included"""
    context: int
    """longest prompt + response, tokens"""
    d_model: int = 64
    """width of the residual stream; a multiple of n_head"""
    n_layer: int = 2
    """blocks"""
    n_head: int = 4
    """attention heads"""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "d_model", "n_layer", "n_head"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.d_model % self.n_head:
            raise ValueError(
                f"model.d_model {self.d_model} is not a multiple of model.n_head {self.n_head}"
            )


class Block(nn.Module):
    """Attention, then an MLP of four times the width, each on a normalised copy of x."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def attend(self, qkv: Tensor, packing: Packing, last: bool) -> Tensor:
        """Causal attention within rows: [M, 3D] -> [M, D], or [K, D] in the last block.

        Written out: at this size two batched products beat the fused kernel.
        """
        table = packing.spread(qkv).unflatten(-1, (3, self.n_head, -1))  # (B, W, 3, H, hd)
        q, k, v = table.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)  # (B * H, W, hd)
        bias, asked = packing.bias, packing.asked
        if last:
            q, bias = q[:, -asked:], bias[:, -asked:]
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        mixed = torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, self.n_head))
        return packing.gather(mixed.transpose(1, 2).flatten(2), last)

    def forward(self, x: Tensor, packing: Packing, last: bool) -> Tensor:
        """[M, D] -> [M, D], or [K, D] in the last block, where only kept tokens go on."""
        mixed = self.attend(self.qkv(self.attention_norm(x)), packing, last)
        x = (packing.keep(x) if last else x) + self.out(mixed)
        return x + self.down(self.up(self.mlp_norm(x)).relu_())


class Transformer(nn.Module):
    """Token ids in; next-token logits and a scalar per position out."""

    def __init__(self, config: TransformerConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # nn's layers draw from the global RNG when made
            self.tokens = nn.Embedding(config.vocab_size, config.d_model)
            self.positions = nn.Embedding(config.context, config.d_model)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.final_norm = nn.LayerNorm(config.d_model)
            self.scalar = nn.Linear(config.d_model, 1)
        self._initialise(generator or torch.Generator())

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        # Drawn on the CPU so that a seed means the same weights on every device. Matrices keep
        # the size of what goes through them; embeddings are large enough that a word is told
        # from another at step 0, which is when copying a fact from the prompt is learnt.
        for name, p in self.named_parameters():
            if p.dim() > 1:
                embedded = {"tokens.weight": 0.2, "positions.weight": 0.02}
                std = embedded[name] if name in embedded else p.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):
                    std /= (2 * self.config.n_layer) ** 0.5  # the residual stream adds them up
                p.copy_(torch.randn(p.shape, generator=generator) * std)
            elif "norm" not in name:
                p.zero_()
        self.scalar.weight.zero_()  # the critic starts at 0 everywhere

    def by_rows(self, read: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """read(tokens, valid, keep, ...), [K, ...] of the kept tokens, row by row.

        On a CPU many rows are read in chunks of similar length: short rows then share a narrow
        table, and what a chunk needs stays in the processor's cache.
        """
        tokens, valid, keep, *_ = given
        if len(tokens) <= CHUNK or not tokens.is_cpu:
            return read(*given)
        order = valid.sum(1).argsort(stable=True)
        parts = zip(*(x[order].split(CHUNK) for x in given), strict=True)
        x = in_chunks(read, list(parts), list(self.parameters()))
        number = (keep.flatten().cumsum(0) - 1).view_as(keep)[order].masked_select(keep[order])
        return torch.empty_like(x).index_copy_(0, number, x)  # rows as they were given

    def states(self, tokens: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
        """Final hidden states [K, D] of the kept tokens of tokens [B, S], row by row.

        Raises ValueError past the context.
        """
        if len(tokens) > CHUNK and tokens.is_cpu:
            return self.by_rows(self.states, tokens, valid, keep)
        packing = Packing(valid, keep, self.config.n_head, self.tokens.weight.dtype)
        if packing.width > self.config.context:
            raise ValueError(
                f"a prompt and its response have {packing.width} tokens together, but the model's "
                f"context is {self.config.context}: shorten them or train with a longer context"
            )
        x = self.tokens(tokens.masked_select(valid)) + self.positions(packing.positions)  # (M, D)
        for i, block in enumerate(self.blocks):
            x = block(x, packing, last=i == len(self.blocks) - 1)
        return self.final_norm(x)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [..., D] -> logits [..., V] and scalars [...]."""
        return F.linear(x, self.tokens.weight), self.scalar(x).squeeze(-1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, S] -> logits [B, S, V] and values [B, S]; zeros at padding on the left.

        Logits at position s predict the token at s + 1. Raises ValueError past the context.
        """
        valid = (tokens != PAD).cumsum(1) > 0  # a pad id inside the text is a token like others
        logits, values = self.heads(self.states(tokens, valid, valid))
        return _unpack(logits, valid), _unpack(values, valid)


def _unpack(flat: Tensor, where: Tensor) -> Tensor:
    """Flat values of the True entries of `where` [B, S], back in place among zeros."""
    out = flat.new_zeros(*where.shape, *flat.shape[1:])
    return out.index_put((where,), flat)


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log pi(token) in nats: logits [..., V] and tokens [...] -> [...].

    Policy and reference both go through here with the *sampling* temperature; scoring at another
    one measures the KL of a policy that was never run. Raises ValueError if temperature <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive (1.0 = as trained)")
    scaled = (logits / temperature if temperature != 1.0 else logits).flatten(0, -2)
    return -F.cross_entropy(scaled, tokens.flatten(), reduction="none").view(tokens.shape)


def _response_inputs(prompts: Tensor, responses: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Tokens, valid and keep [B, P+T-1]: the state *before* token t sits at column P - 1 + t.

    The last token of an answer is predicted but never read, so it is no input at all.
    """
    steps = torch.arange(responses.shape[1], device=mask.device)
    read = steps[:-1] < last_token(mask)[:, None]  # interior False entries are still read
    tokens = torch.cat([prompts, responses[:, :-1]], 1)
    valid = torch.cat([(prompts != PAD).cumsum(1) > 0, read], 1)
    keep = torch.cat([torch.zeros_like(prompts[:, 1:], dtype=torch.bool), mask], 1)
    return tokens, valid, keep


def response_states(model: Transformer, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
    """Final hidden states [N, D] before each of the N masked response tokens, row by row."""
    return model.states(*_response_inputs(prompts, responses, mask))


def response_heads(
    model: Transformer, prompts: Tensor, responses: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Flat logits [N, V] and values [N] of the N masked response tokens, row by row."""
    return model.heads(response_states(model, prompts, responses, mask))


def response_outputs(
    model: Transformer, prompts: Tensor, responses: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """logits [B, T, V] and values [B, T] of the states *before* each token; 0 outside the mask.

    prompts [B, P] padded on the left, responses and mask [B, T].
    """
    logits, values = response_heads(model, prompts, responses, mask)
    return _unpack(logits, mask), _unpack(values, mask)


def response_logprobs(
    model: Transformer,
    prompts: Tensor,
    responses: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    eos: int | None = None,
) -> tuple[Tensor, ...]:
    """logprobs [B, T] and values [B, T] of given responses (and log-probs of `eos` [B, T]).

    One function scores the policy in the update and the reference: equal weights and rows give
    equal bits. The sampler's log-probs come from its cache and agree to rounding (1e-5).
    """
    asked = [responses] if eos is None else [responses, torch.full_like(responses, eos)]

    def read(tokens: Tensor, valid: Tensor, keep: Tensor, said: Tensor, *others: Tensor) -> Tensor:
        logits, values = model.heads(model.states(tokens, valid, keep))
        at = keep[:, -said.shape[1] :]  # the columns before the answer's tokens
        found = [token_logprobs(logits, x[at], temperature=temperature) for x in (said, *others)]
        return torch.stack([found[0], values, *found[1:]], 1)  # (K, 2 or 3)

    columns = model.by_rows(read, *_response_inputs(prompts, responses, mask), *asked)
    return tuple(_unpack(x, mask) for x in columns.unbind(1))


def answer_scalars(model: Transformer, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
    """The scalar head after the *last* token of each answer, [B]: how a reward model reads."""
    tokens = torch.cat([prompts, responses], 1)
    last = last_token(mask)
    if (last < 0).any():
        raise ValueError(f"answer {int(last.argmin())} is empty; a score needs one token at least")
    steps = torch.arange(responses.shape[1], device=mask.device)
    given = (prompts != PAD).cumsum(1) > 0
    valid = torch.cat([given, steps <= last[:, None]], 1)
    keep = torch.cat([torch.zeros_like(given), steps == last[:, None]], 1)
    return model.scalar(model.states(tokens, valid, keep)).squeeze(-1)
