"""A decoder-only Transformer with a language-model head and a scalar head on one trunk.

Policy and critic share the trunk (half the arithmetic of two networks); a reward model is the
same class, read through its scalar head at the last token of an answer. Pre-norm blocks, learned
positions, ReLU, tied embeddings, no dropout: a log-prob recomputed is the same log-prob.

Real tokens are *packed*: padding goes through no matrix, answers that end early cost what they
are long, and the last block's MLP and the heads run only where an output is asked for. Nothing
that changes a result is skipped. Left out: rotary positions, grouped queries, fused kernels.

Sources: Vaswani et al. (2017, arXiv 1706.03762); Radford et al. (2019, GPT-2); packing as in
Krell et al. (2021, arXiv 2107.02027).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.advantages import last_token
from minirlhf.text import PAD


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


class Packing:
    """Where the real tokens of a batch are: rows moved to the left, padding left out.

    valid [B, S] marks real tokens (contiguous in each row), keep [B, S] those whose final state
    is wanted. Flat tensors list tokens row by row: M of them valid, K of them kept.
    """

    def __init__(self, valid: Tensor, keep: Tensor):
        self.batch, lengths = valid.shape[0], valid.sum(1)
        self.width = int(lengths.max())
        self.positions = (valid.cumsum(1) - 1)[valid]  # (M,)
        self.dense = bool((lengths == self.width).all())
        rows = torch.arange(self.batch, device=valid.device)
        self.slots = rows.repeat_interleave(lengths) * self.width + self.positions  # (M,)
        self.kept = None if bool((keep == valid).all()) else torch.nonzero(keep[valid]).squeeze(1)

    def spread(self, x: Tensor) -> Tensor:
        """[M, D] flat -> [B, W, D], every row starting at 0, zeros behind its last token."""
        if not self.dense:
            empty = x.new_zeros(self.batch * self.width, x.shape[-1])
            x = empty.index_copy(0, self.slots, x)
        return x.view(self.batch, self.width, -1)

    def gather(self, x: Tensor) -> Tensor:
        """[B, W, D] -> [M, D] flat; the inverse of spread."""
        x = x.reshape(self.batch * self.width, -1)
        return x if self.dense else x.index_select(0, self.slots)

    def keep(self, x: Tensor) -> Tensor:
        """[M, D] -> [K, D]: the tokens whose final state is wanted."""
        return x if self.kept is None else x.index_select(0, self.kept)


class Block(nn.Module):
    """Attention, then an MLP of four times the width, each on a normalised copy of x."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def mlp(self, x: Tensor) -> Tensor:
        """The residual update of the MLP, [..., D] -> [..., D]."""
        return self.down(F.relu(self.up(self.mlp_norm(x))))

    def forward(self, x: Tensor, packing: Packing, last: bool) -> Tensor:
        """[M, D] -> [M, D], or [K, D] in the last block, where only kept tokens go on."""
        qkv = packing.spread(self.qkv(self.attention_norm(x)))  # (B, W, 3D)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, W, hd)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = packing.gather(mixed.transpose(1, 2).flatten(2))  # (M, D)
        if last:
            x, mixed = packing.keep(x), packing.keep(mixed)
        x = x + self.out(mixed)
        return x + self.mlp(x)


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
                std = {"tokens.weight": 0.2, "positions.weight": 0.02}.get(name, p.shape[1] ** -0.5)
                if name.endswith(("out.weight", "down.weight")):
                    std /= (2 * self.config.n_layer) ** 0.5  # the residual stream adds them up
                p.copy_(torch.randn(p.shape, generator=generator) * std)
            elif "norm" not in name:
                p.zero_()
        self.scalar.weight.zero_()  # the critic starts at 0 everywhere

    def states(self, tokens: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
        """Final hidden states [K, D] of the kept tokens of tokens [B, S], row by row."""
        packing = Packing(valid, keep)
        if packing.width > self.config.context:
            raise ValueError(
                f"a prompt and its response have {packing.width} tokens together, but the model's "
                f"context is {self.config.context}: shorten them or train with a longer context"
            )
        x = self.tokens(tokens[valid]) + self.positions(packing.positions)  # (M, D)
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


def response_heads(
    model: Transformer, prompts: Tensor, responses: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Flat logits [N, V] and values [N] of the N masked response tokens, row by row."""
    return model.heads(model.states(*_response_inputs(prompts, responses, mask)))


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

    One function for policy, old policy and reference, so that equal weights give equal bits.
    """
    logits, values = response_heads(model, prompts, responses, mask)
    found = token_logprobs(logits, responses[mask], temperature=temperature)
    out = (_unpack(found, mask), _unpack(values, mask))
    if eos is None:
        return out
    stop = token_logprobs(logits, responses[mask] * 0 + eos, temperature=temperature)
    return (*out, _unpack(stop, mask))


def answer_scalars(
    model: Transformer, prompts: Tensor, responses: Tensor, mask: Tensor
) -> Tensor:
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
