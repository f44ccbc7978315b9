"""A decoder-only Transformer with a language-model head and a scalar head on one trunk.

Policy and critic share the trunk (half the arithmetic of two networks); a reward model is the
same class, read through its scalar head at the last token of an answer. Pre-norm blocks, learned
positions, ReLU, tied embeddings, no dropout: a log-prob recomputed is the same log-prob.

Real tokens are *packed* (engine/packing.py): padding goes through no matrix, answers that end
early cost what they are long, and the last block's queries and MLP and the heads run only where
an output is asked for. Nothing that changes a result is skipped. The plain network (one row, no
packing) is written out as `forward` in notebook 02, and a cell there holds its logits equal to
these. Left out: rotary positions, grouped queries.

Sources: Vaswani et al. (2017, arXiv 1706.03762); Radford et al. (2019, GPT-2); packing as in
Krell et al. (2021, arXiv 2107.02027).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minirlhf.engine.compute import in_chunks
from minirlhf.engine.packing import Packing
from minirlhf.text import after_padding, last_token

# Shapes in the core: B rows of a batch, P tokens of a prompt, T of a response, S of a sequence
# (a prompt and what follows it), V words of the vocabulary, D width of the model, H heads of
# width hd, W columns of an attention table. Flat lists hold tokens row by row: M real ones, N in
# the mask (or any number), K whose state is kept.

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
            value = getattr(self, name)
            if not value >= 1:
                raise ValueError(f"model.{name} is {value}; it must be at least 1")
        if self.d_model % self.n_head:
            raise ValueError(
                f"model.d_model {self.d_model} is not a multiple of model.n_head {self.n_head}"
            )


class Block(nn.Module):
    """Attention, then an MLP of four times the width, each on a normalised copy of x."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.d_model
        self.n_head = config.n_head
        self.attention_norm = nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)  # queries, keys and values in one product
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self, x: Float[Tensor, "M D"], packing: Packing, last: bool
    ) -> Float[Tensor, "N D"]:
        """States before the block -> after it: of all M tokens, or of the K kept ones if last."""
        mixed = self.attention(self.attention_norm(x), packing, last)
        if last:
            x = packing.keep(x)  # nobody reads the states of the others
        x = x + self.out(mixed)
        return x + self.mlp(self.mlp_norm(x))

    def attention(
        self, x: Float[Tensor, "M D"], packing: Packing, last: bool
    ) -> Float[Tensor, "N D"]:
        """Each token reads those before it in its row, and itself; `out` is still to come."""
        table = packing.spread(self.qkv(x))  # (B, W, 3 * D): a row an answer
        table = table.unflatten(-1, (3, self.n_head, -1))  # (B, W, 3, H, hd)
        # a head of a row is one product in a batch of B * H
        q, k, v = table.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)  # (B * H, W, hd)
        bias = packing.bias
        if last:
            # kept tokens stand in the last columns: only these ask, and all are read
            q = q[:, -packing.asked :]
            bias = bias[:, -packing.asked :]
        # Written out: at this size two batched products beat the fused kernel. The bias is 0, or
        # -1e30 on what lies ahead and on padding.
        weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        weights = weights.softmax(-1)
        mixed = torch.bmm(weights, v)  # (B * H, W, hd); of W queries, `asked` if last
        mixed = mixed.unflatten(0, (-1, self.n_head)).transpose(1, 2).flatten(2)  # (B, W, D)
        return packing.gather(mixed, last)

    def mlp(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """What a token makes of what it has read; every token for itself."""
        return self.down(self.up(x).relu_())  # in place: its gradient needs the result alone


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
        for name, p in self.named_parameters():
            if p.dim() == 1:
                if "norm" not in name:
                    p.zero_()  # the biases of the linear layers
                continue
            if name == "tokens.weight":
                # large enough that a word is told from another at step 0, which is when copying
                # a fact from the prompt is learnt
                std = 0.2
            elif name == "positions.weight":
                std = 0.02
            else:
                std = p.shape[1] ** -0.5  # what goes through a matrix keeps its size
            if name.endswith(("out.weight", "down.weight")):
                std /= (2 * self.config.n_layer) ** 0.5  # the residual stream adds them up
            # drawn on the CPU so that a seed means the same weights on every device
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        self.scalar.weight.zero_()  # the critic starts at 0 everywhere

    def forward(
        self, tokens: Int[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B S V"], Float[Tensor, "B S"]]:
        """Logits and values at every position; zeros at padding on the left.

        Logits at position s predict the token at s + 1. Raises ValueError past the context.
        """
        valid = after_padding(tokens)
        logits, values = self.heads(self.states(tokens, valid, valid))
        return _unpack(logits, valid), _unpack(values, valid)

    def states(
        self,
        tokens: Int[Tensor, "B S"],
        valid: Bool[Tensor, "B S"],
        keep: Bool[Tensor, "B S"],
    ) -> Float[Tensor, "K D"]:
        """Final hidden states of the kept tokens, row by row.

        `valid` marks the real tokens, contiguous in each row; `keep` is a part of them.
        Raises ValueError past the context.
        """
        # many rows: in chunks, each of which comes back here
        if len(tokens) > CHUNK and tokens.is_cpu:
            return self.by_rows(self.states, tokens, valid, keep)
        packing = Packing(valid, keep, self.config.n_head, self.tokens.weight.dtype)
        if packing.width > self.config.context:
            raise ValueError(
                f"a prompt and its response have {packing.width} tokens together, but the model's "
                f"context is {self.config.context}: shorten them or train with a longer context"
            )
        # what a word is, and where it stands
        x = self.tokens(tokens.masked_select(valid)) + self.positions(packing.positions)  # (M, D)
        for i, block in enumerate(self.blocks):
            x = block(x, packing, last=i == len(self.blocks) - 1)
        return self.final_norm(x)

    def heads(self, x: Float[Tensor, "*N D"]) -> tuple[Float[Tensor, "*N V"], Float[Tensor, "*N"]]:
        """Final hidden states -> logits and scalars."""
        logits = F.linear(x, self.tokens.weight)  # tied: a word is said as it is read
        return logits, self.scalar(x).squeeze(-1)

    def by_rows(
        self,
        read: Callable[..., Tensor],
        tokens: Int[Tensor, "B S"],
        valid: Bool[Tensor, "B S"],
        keep: Bool[Tensor, "B S"],
        *others: Tensor,
    ) -> Float[Tensor, "K ..."]:
        """read(tokens, valid, keep, *others), [K, ...] of the kept tokens, row by row.

        On a CPU many rows are read in chunks of similar length: short rows then share a narrow
        table, and what a chunk needs stays in the processor's cache.
        """
        if len(tokens) <= CHUNK or not tokens.is_cpu:
            return read(tokens, valid, keep, *others)
        order = valid.sum(1).argsort(stable=True)
        columns = [x[order].split(CHUNK) for x in (tokens, valid, keep, *others)]
        chunks = list(zip(*columns, strict=True))
        found = in_chunks(read, chunks, list(self.parameters()))
        # back to the order in which rows were given: the number of each kept token there
        number = (keep.flatten().cumsum(0) - 1).view_as(keep)
        number = number[order].masked_select(keep[order])  # (K,)
        return torch.empty_like(found).index_copy_(0, number, found)


def _unpack(flat: Tensor, where: Tensor) -> Tensor:
    """Flat values of the True entries of `where` [B, S], back in place among zeros."""
    out = flat.new_zeros(*where.shape, *flat.shape[1:])
    return out.index_put((where,), flat)


def token_logprobs(
    logits: Float[Tensor, "*N V"],
    tokens: Int[Tensor, "*N"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*N"]:
    """log pi(token) in nats.

    Policy and reference both go through here with the *sampling* temperature; scoring at another
    one measures the KL of a policy that was never run. Raises ValueError if temperature <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive (1.0 = as trained)")
    if temperature != 1.0:
        logits = logits / temperature
    logits = logits.flatten(0, -2)
    # cross-entropy of one word is -log softmax at that word, in one pass over the logits
    logprobs = -F.cross_entropy(logits, tokens.flatten(), reduction="none")
    return logprobs.view(tokens.shape)


def _response_inputs(
    prompts: Tensor, responses: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, valid and keep, [B, P + T - 1] each, of what is asked about tokens in the mask."""
    # the last token of an answer is predicted but never read, so it is no input at all
    tokens = torch.cat([prompts, responses[:, :-1]], 1)
    # False entries inside the mask (a tool's output, say) are still read
    steps = torch.arange(responses.shape[1], device=mask.device)
    read = steps[:-1] < last_token(mask)[:, None]
    valid = torch.cat([after_padding(prompts), read], 1)
    # token t is predicted by the state *before* it, in column P - 1 + t
    nothing = torch.zeros_like(prompts[:, 1:], dtype=torch.bool)
    keep = torch.cat([nothing, mask], 1)
    return tokens, valid, keep


def response_states(
    model: Transformer,
    prompts: Int[Tensor, "B P"],
    responses: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "N D"]:
    """Final hidden states before each of the N response tokens in the mask, row by row."""
    tokens, valid, keep = _response_inputs(prompts, responses, mask)
    return model.states(tokens, valid, keep)


def response_heads(
    model: Transformer,
    prompts: Int[Tensor, "B P"],
    responses: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"]]:
    """Flat logits and values of the N response tokens in the mask, row by row."""
    return model.heads(response_states(model, prompts, responses, mask))


def response_outputs(
    model: Transformer,
    prompts: Int[Tensor, "B P"],
    responses: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T"]]:
    """Logits and values of the states *before* each response token; 0 outside the mask.

    Prompts are padded on the left, responses on the right.
    """
    logits, values = response_heads(model, prompts, responses, mask)
    return _unpack(logits, mask), _unpack(values, mask)


def response_logprobs(
    model: Transformer,
    prompts: Int[Tensor, "B P"],
    responses: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    temperature: float = 1.0,
    eos: int | None = None,
) -> tuple[Float[Tensor, "B T"], ...]:
    """Log-probs (nats) and values of given responses, and with `eos` the log-probs of stopping.

    One function scores the policy in the update and the reference: equal weights and rows give
    equal bits. The sampler's log-probs come from its cache and agree to rounding (1e-5).
    """
    asked = [responses]
    if eos is not None:
        asked.append(torch.full_like(responses, eos))

    def read(tokens: Tensor, valid: Tensor, keep: Tensor, *asked: Tensor) -> Tensor:
        # the heads too go chunk by chunk: logits are the largest table of all
        logits, values = model.heads(model.states(tokens, valid, keep))
        at = keep[:, -responses.shape[1] :]  # the chunk's mask: states stand before their tokens
        columns = [token_logprobs(logits, x[at], temperature=temperature) for x in asked]
        columns.insert(1, values)
        return torch.stack(columns, 1)  # (K, 2 or 3)

    tokens, valid, keep = _response_inputs(prompts, responses, mask)
    columns = model.by_rows(read, tokens, valid, keep, *asked)
    return tuple(_unpack(x, mask) for x in columns.unbind(1))


def answer_scalars(
    model: Transformer,
    prompts: Int[Tensor, "B P"],
    responses: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B ..."]:
    """The scalar head after the *last* token of each answer, [B]: how a reward model reads.

    A head that was given several outputs has them in a last axis. Raises ValueError if an answer
    is empty.
    """
    last = last_token(mask)
    if (last < 0).any():
        raise ValueError(f"answer {int(last.argmin())} is empty; a score needs one token at least")
    steps = torch.arange(responses.shape[1], device=mask.device)
    given = after_padding(prompts)
    # unlike a policy, a scorer reads the last token too, and is asked there alone
    tokens = torch.cat([prompts, responses], 1)
    valid = torch.cat([given, steps <= last[:, None]], 1)
    keep = torch.cat([torch.zeros_like(given), steps == last[:, None]], 1)
    return model.scalar(model.states(tokens, valid, keep)).squeeze(-1)
