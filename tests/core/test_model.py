"""The Transformer against a plain dense one written in fakes.py: outputs, gradients, padding."""

import math

import pytest
import torch
from fakes import dense, every_answer, ragged_batch, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minirlhf.model import (
    Transformer,
    TransformerConfig,
    answer_scalars,
    response_logprobs,
    response_outputs,
    token_logprobs,
)

MODEL = tiny_model()
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def alone(prompts: Tensor, responses: Tensor, mask: Tensor, row: int) -> tuple[list, list]:
    """One row as plain lists of ids: the prompt without padding, and the answer."""
    prompt = prompts[row, (prompts[row] != 0).cumsum(0) > 0].tolist()
    return prompt, responses[row, : int(mask[row].nonzero().max()) + 1].tolist()


# --- outputs ----------------------------------------------------------------------------------


def test_forward_equals_the_dense_oracle_and_left_padding_changes_nothing():
    prompts, _, _ = ragged_batch(2, width=6)
    logits, values = MODEL(prompts)
    for row, ids in enumerate(prompts):
        real = (ids != 0).cumsum(0) > 0
        expected_logits, expected_values = dense(MODEL, ids[real].tolist())
        torch.testing.assert_close(logits[row, real], expected_logits, **CLOSE)
        torch.testing.assert_close(values[row, real], expected_values, **CLOSE)
        assert logits[row, ~real].eq(0).all() and values[row, ~real].eq(0).all()


def test_shapes_and_types():
    model = tiny_model(dtype=torch.float32)
    logits, values = model(torch.randint(1, 5, (3, 4), generator=torch.Generator()))
    assert (logits.shape, values.shape) == ((3, 4, 5), (3, 4))
    assert logits.dtype == values.dtype == torch.float32


@pytest.mark.parametrize("seed", range(4))
def test_response_outputs_are_the_states_before_each_token(seed):
    batch = ragged_batch(seed)
    logits, values = response_outputs(MODEL, *batch)
    _, responses, mask = batch
    for row in range(len(mask)):
        prompt, answer = alone(*batch, row)
        expected_logits, expected_values = dense(MODEL, prompt + answer)
        before = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
        torch.testing.assert_close(logits[row, mask[row]], expected_logits[before], **CLOSE)
        torch.testing.assert_close(values[row, mask[row]], expected_values[before], **CLOSE)
    assert logits[~mask].eq(0).all() and values[~mask].eq(0).all()
    assert logits.shape == (*responses.shape, 5) and values.shape == responses.shape


def test_response_outputs_agree_with_forward_over_the_whole_text():
    prompts, responses, mask = ragged_batch(3)
    logits, values = MODEL(torch.cat([prompts, responses], 1))
    found_logits, found_values = response_outputs(MODEL, prompts, responses, mask)
    start = prompts.shape[1] - 1
    for whole, found in ((logits, found_logits), (values, found_values)):
        cut = whole[:, start : start + mask.shape[1]]
        torch.testing.assert_close(found[mask], cut[mask], **CLOSE)


def test_full_rows_without_any_padding_take_the_dense_path_to_the_same_result():
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, 5, (4, 3), generator=g)
    responses = torch.randint(2, 5, (4, 5), generator=g)
    mask = torch.ones(4, 5, dtype=torch.bool)
    together = response_logprobs(MODEL, prompts, responses, mask)
    wider = torch.cat([prompts.new_zeros(4, 2), prompts], 1)
    for whole, padded in zip(
        together, response_logprobs(MODEL, wider, responses, mask), strict=True
    ):
        torch.testing.assert_close(whole, padded, **CLOSE)
    for row in range(4):
        one = (x[row : row + 1] for x in (prompts, responses, mask))
        for whole, single in zip(together, response_logprobs(MODEL, *one), strict=True):
            torch.testing.assert_close(whole[row : row + 1], single, **CLOSE)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))
def test_packed_equals_padded_equals_one_row_at_a_time(seed, left, right):
    prompts, responses, mask = ragged_batch(seed)
    found = response_logprobs(MODEL, prompts, responses, mask, eos=1)
    wide = [
        torch.nn.functional.pad(prompts, (left, 0)),
        torch.nn.functional.pad(responses, (0, right)),
        torch.nn.functional.pad(mask, (0, right)),
    ]
    for x, y in zip(found, response_logprobs(MODEL, *wide, eos=1), strict=True):
        torch.testing.assert_close(x, y[:, :-right], **CLOSE)
    row = seed % len(mask)
    one = (x[row : row + 1] for x in (prompts, responses, mask))
    for x, y in zip(found, response_logprobs(MODEL, *one, eos=1), strict=True):
        torch.testing.assert_close(x[row : row + 1], y, **CLOSE)


def test_tokens_behind_the_mask_are_never_read():
    prompts, responses, mask = ragged_batch(4)
    junk = torch.where(mask, responses, 3)
    for x, y in zip(
        response_logprobs(MODEL, prompts, responses, mask),
        response_logprobs(MODEL, prompts, junk, mask),
        strict=True,
    ):
        assert torch.equal(x, y)


def test_a_hole_in_the_mask_is_read_but_not_scored():
    # a tool's output inside the answer: the policy reads it and is not charged for it
    prompts = torch.tensor([[3, 2]])
    responses = torch.tensor([[4, 3, 3, 1]])
    hole = torch.tensor([[True, False, True, True]])
    full = response_logprobs(MODEL, prompts, responses, torch.ones_like(hole))
    for x, y in zip(response_logprobs(MODEL, prompts, responses, hole), full, strict=True):
        torch.testing.assert_close(x, torch.where(hole, y, 0.0), **CLOSE)


def test_a_pad_id_that_was_sampled_is_a_token_like_others():
    prompts, responses = torch.tensor([[0, 3, 2]]), torch.tensor([[4, 0, 3, 1]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    logits, _ = response_outputs(MODEL, prompts, responses, mask)
    torch.testing.assert_close(logits[0], dense(MODEL, [3, 2, 4, 0, 3, 1])[0][1:5], **CLOSE)
    logits, _ = MODEL(torch.cat([prompts, responses], 1))
    torch.testing.assert_close(logits[0, 1:], dense(MODEL, [3, 2, 4, 0, 3, 1])[0], **CLOSE)


def test_the_future_is_not_seen():
    ids = torch.tensor([[3, 4, 2, 3, 4]])
    changed = ids.clone()
    changed[0, 3:] = 2
    for x, y in zip(MODEL(ids), MODEL(changed), strict=True):
        assert torch.equal(x[:, :3], y[:, :3]) and not torch.equal(x[:, 3:], y[:, 3:])


# --- log-probs --------------------------------------------------------------------------------


def test_token_logprobs_of_a_two_token_language():
    # logits (0, log 3): the second token has probability 3/4 at temperature 1, and
    # sqrt(3) / (1 + sqrt(3)) at temperature 2
    logits = torch.tensor([0.0, math.log(3)], dtype=torch.float64).expand(1, 2, 2)
    tokens = torch.tensor([[0, 1]])
    assert token_logprobs(logits, tokens).exp().tolist() == [pytest.approx([0.25, 0.75])]
    root = math.sqrt(3)
    found = token_logprobs(logits, tokens, temperature=2.0).exp()
    assert found.tolist() == [pytest.approx([1 / (1 + root), root / (1 + root)])]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
def test_token_logprobs_against_log_softmax(temperature, generator):
    logits = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) * 4
    tokens = torch.randint(7, (2, 3), generator=generator)
    expected = (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    found = token_logprobs(logits, tokens, temperature=temperature)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=rf"temperature is {temperature}; it must be positive"):
        token_logprobs(torch.zeros(1, 1, 2), torch.zeros(1, 1).long(), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_all_answers_together_have_probability_one(temperature):
    responses, mask = every_answer(5, 3)
    prompts = torch.tensor([[0, 3, 2]]).expand(len(responses), -1)
    logprobs, _ = response_logprobs(MODEL, prompts, responses, mask, temperature=temperature)
    assert logprobs.sum(-1).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_log_prob_of_stopping_is_that_of_eos_at_every_step():
    batch = ragged_batch(5)
    logits, _ = response_outputs(MODEL, *batch)
    _, _, stop = response_logprobs(MODEL, *batch, temperature=0.8, eos=1)
    expected = (logits / 0.8).log_softmax(-1)[..., 1]
    torch.testing.assert_close(stop, torch.where(batch[2], expected, 0.0), **CLOSE)


# --- gradients --------------------------------------------------------------------------------


def test_gradient_of_the_packed_loss_is_that_of_the_dense_one():
    model = tiny_model(7, n_layer=3)
    prompts, responses, mask = ragged_batch(8)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(9)).double()
    logprobs, values = response_logprobs(model, prompts, responses, mask, temperature=0.9)
    packed = (weights * mask * (logprobs + values.square())).sum()
    plain = torch.zeros((), dtype=torch.float64)
    for row in range(len(mask)):
        prompt, answer = alone(prompts, responses, mask, row)
        logits, states = dense(model, prompt + answer)
        for t, token in enumerate(answer):
            at = len(prompt) - 1 + t
            logp = (logits[at] / 0.9).log_softmax(-1)[token]
            plain = plain + weights[row, t] * (logp + states[at].square())
    torch.testing.assert_close(packed, plain, **CLOSE)
    parameters = dict(model.named_parameters())
    found, expected = (torch.autograd.grad(x, list(parameters.values())) for x in (packed, plain))
    for name, x, y in zip(parameters, found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-11, msg=f"gradient of {name}")
        assert x.any(), name  # nothing is left out


# --- the scorer's reading ---------------------------------------------------------------------


def test_answer_scalars_read_after_the_last_token_whatever_the_padding():
    prompts, responses, mask = ragged_batch(6)
    found = answer_scalars(MODEL, prompts, responses, mask)
    for row in range(len(mask)):
        prompt, answer = alone(prompts, responses, mask, row)
        expected = dense(MODEL, prompt + answer)[1][-1]
        assert found[row].item() == pytest.approx(expected.item(), abs=1e-12)
    junk = torch.nn.functional.pad(torch.where(mask, responses, 4), (0, 2), value=3)
    wide = torch.nn.functional.pad(prompts, (2, 0)), junk, torch.nn.functional.pad(mask, (0, 2))
    torch.testing.assert_close(answer_scalars(MODEL, *wide), found, **CLOSE)


def test_an_empty_answer_cannot_be_scored():
    prompts, responses, mask = ragged_batch(6)
    mask[2] = False
    with pytest.raises(ValueError, match="answer 2 is empty"):
        answer_scalars(MODEL, prompts, responses, mask)


# --- bounds and set-up ------------------------------------------------------------------------


def test_the_context_counts_real_tokens_and_the_last_one_is_never_read():
    model = tiny_model(context=6)
    prompts = torch.tensor([[0, 0, 0, 3, 3, 2]])  # 3 real tokens, padding is free
    responses, mask = torch.full((1, 4), 3), torch.ones(1, 4, dtype=torch.bool)
    response_logprobs(model, prompts, responses, mask)  # 3 + 4 - 1 = 6 are read
    long = torch.full((1, 5), 3), torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"7 tokens together, but the model's context is 6: shorten"
    ):
        response_logprobs(model, prompts, *long)
    with pytest.raises(ValueError, match="context is 6"):
        answer_scalars(model, prompts, responses, mask)  # a scorer reads the last token too


@pytest.mark.parametrize("name", ["vocab_size", "context", "d_model", "n_layer", "n_head"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_must_be_positive(name, value):
    sizes = {"vocab_size": 5, "context": 8, name: value}
    with pytest.raises(ValueError, match=rf"model.{name} is {value}; it must be at least 1"):
        TransformerConfig(**sizes)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"model.d_model 64 is not a multiple of model.n_head 5"):
        TransformerConfig(5, 8, n_head=5)


def test_the_seed_decides_the_weights_and_the_critic_starts_at_zero():
    config = TransformerConfig(5, 8, d_model=8)
    models = [Transformer(config, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    first, again, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert models[0](torch.tensor([[3, 4]]))[1].eq(0).all()


def test_making_a_model_without_a_generator_leaves_the_global_rng_alone():
    before = torch.get_rng_state()
    Transformer(TransformerConfig(5, 8, d_model=8))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cpu_and_gpu_agree():
    model, batch = tiny_model(2, dtype=torch.float32), ragged_batch(1)
    on_cpu = response_logprobs(model, *batch)
    on_gpu = response_logprobs(model.to("cuda"), *(x.to("cuda") for x in batch))
    for x, y in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(x, y.cpu(), rtol=1e-4, atol=1e-5)
