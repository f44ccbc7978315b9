"""Packing skips padding and nothing else: losses and gradients are those of a plain network.

The plain network runs one padding-free row at a time (fakes.dense); the packed one sorts rows
into chunks, lays them out as tables that end together and drops queries nobody reads.
"""

import pytest
import torch
from fakes import dense, ragged_batch, tiny_model
from torch import Tensor

from minirlhf import model as model_module
from minirlhf.model import Transformer, answer_scalars, response_logprobs
from minirlhf.text import last_token


def batch(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """40 rows (more than one chunk) of prompts, responses and mask."""
    prompts, responses, mask = ragged_batch(3, batch=40)
    if name == "full rows":
        prompts = prompts.where(prompts != 0, 4)
        responses, mask = responses.where(mask, 3), torch.ones_like(mask)
    elif name == "one row":
        prompts, responses, mask = (x[:1] for x in (prompts, responses, mask))
    elif name == "holes":  # tokens of somebody else inside an answer: read, not scored
        mask = mask & (torch.arange(40)[:, None] + torch.arange(mask.shape[1]) % 3 != 1)
        mask[5] = mask[7] = False
        mask[:, 2] &= torch.arange(40) % 2 == 0
    elif name == "nothing asked of a chunk":
        mask[mask.sum(1) < 4] = False
    return prompts, responses, mask


def weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def packed_loss(model: Transformer, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
    found = torch.stack(response_logprobs(model, prompts, responses, mask)[:2])
    return (found * weights(mask, found.dtype)).sum() / mask.sum()


def plain_loss(model: Transformer, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
    w, total = weights(mask, model.tokens.weight.dtype), torch.zeros(())
    for b in range(len(mask)):
        prompt = [t for t in prompts[b].tolist() if t]
        ids = prompt + responses[b].tolist()
        logits, values = dense(model, ids)
        for t in mask[b].nonzero().squeeze(1).tolist():
            before = len(prompt) - 1 + t
            logprob = logits[before].log_softmax(-1)[ids[before + 1]]
            total = total + w[0, b, t] * logprob + w[1, b, t] * values[before]
    return total / mask.sum()


def gradients(model: Transformer, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "name", ["ragged", "full rows", "one row", "holes", "nothing asked of a chunk"]
)
def test_packed_loss_and_gradient_are_the_plain_ones(name, dtype, tolerance):
    model, given = tiny_model(5, dtype=dtype), batch(name)
    packed, plain = packed_loss(model, *given), plain_loss(model, *given)
    torch.testing.assert_close(packed, plain, rtol=tolerance, atol=tolerance)
    for x, y in zip(gradients(model, packed), gradients(model, plain), strict=True):
        scale = max(1.0, y.abs().max().item())
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_size_of_a_chunk_changes_nothing(rows, monkeypatch):
    model, given = tiny_model(6), batch("holes")
    answers = ragged_batch(4, batch=40)
    loss, scores = packed_loss(model, *given), answer_scalars(model, *answers)
    before = gradients(model, loss)
    monkeypatch.setattr(model_module, "CHUNK", rows)
    again = packed_loss(model, *given)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(answer_scalars(model, *answers), scores, rtol=0, atol=1e-12)
    for x, y in zip(gradients(model, again), before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_answer_scalars_and_their_gradient_are_the_plain_ones():
    model = tiny_model(7)
    prompts, responses, mask = ragged_batch(8, batch=40)
    w = torch.linspace(-1, 1, 40, dtype=torch.float64)
    plain = torch.zeros((), dtype=torch.float64)
    for b, last in enumerate(last_token(mask).tolist()):
        ids = [t for t in prompts[b].tolist() if t] + responses[b, : last + 1].tolist()
        plain = plain + w[b] * dense(model, ids)[1][-1]
    packed = (answer_scalars(model, prompts, responses, mask) * w).sum()
    torch.testing.assert_close(packed, plain, rtol=1e-12, atol=1e-12)
    wanted = [p for n, p in model.named_parameters() if n != "tokens.weight"]
    pairs = zip(
        torch.autograd.grad(packed, wanted), torch.autograd.grad(plain, wanted), strict=True
    )
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
