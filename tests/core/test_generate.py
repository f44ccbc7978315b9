"""Sampling: the words come from the scored distribution, and the cache changes nothing."""

import pytest
import torch
from fakes import every_answer, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from minirlhf import generate as generate_module
from minirlhf.generate import _pick, generate, sample
from minirlhf.model import response_logprobs
from minirlhf.text import left_pad

MODEL = tiny_model()
PROMPTS = left_pad([[3, 2], [4, 4, 3, 2], [2], [3, 3, 2]])


def draw(seed: int = 0, prompts: torch.Tensor = PROMPTS, **options):
    options = {"max_new_tokens": 8, "eos": 1} | options
    generator = torch.Generator().manual_seed(seed)
    return sample(options.pop("model", MODEL), prompts, generator=generator, **options)


# --- what comes out ---------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_mask_is_true_up_to_and_including_eos(seed):
    responses, mask, logprobs, values = draw(seed)
    for answer, chosen in zip(responses.tolist(), mask.tolist(), strict=True):
        length = answer.index(1) + 1 if 1 in answer else 8
        assert chosen == [True] * length + [False] * (8 - length)
    for x in (responses, logprobs, values):
        assert x[~mask].eq(0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_sampled_logprobs_and_values_are_those_of_the_scoring_pass(temperature, dtype, tolerance):
    model = tiny_model(4, dtype=dtype)
    prompts = PROMPTS.repeat(8, 1)
    answers = draw(1, prompts, model=model, temperature=temperature)
    with torch.no_grad():
        scored = response_logprobs(
            model, prompts, answers.responses, answers.mask, temperature=temperature
        )
    for x, y in zip(answers[2:], scored, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def test_what_is_sampled_may_be_learnt_from():
    answers = draw()
    assert not any(x.is_inference() for x in answers)
    assert not any(x.requires_grad for x in answers)


def test_the_generator_decides_everything():
    first, again, other = draw(3), draw(3), draw(4)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first.responses, other.responses)
    g = torch.Generator().manual_seed(3)
    responses, mask = generate(MODEL, PROMPTS, max_new_tokens=8, eos=1, generator=g)
    assert torch.equal(responses, first.responses) and torch.equal(mask, first.mask)


def test_dropping_ended_rows_changes_no_word(monkeypatch):
    prompts = PROMPTS.repeat(16, 1)
    found = {}
    for share in (0.0, 0.75, 1.0):  # never, as shipped, at once
        monkeypatch.setattr(generate_module, "SHRINK_BELOW", share)
        found[share] = draw(5, prompts, max_new_tokens=12)
    lengths = found[0.0].mask.sum(1)
    assert lengths.min() == 1 and lengths.max() == 12  # the rows do end at different times
    for share in (0.75, 1.0):
        assert torch.equal(found[share].responses, found[0.0].responses)
        assert torch.equal(found[share].mask, found[0.0].mask)
        for x, y in zip(found[share][2:], found[0.0][2:], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_a_row_says_the_same_whatever_stands_beside_it_and_however_it_is_padded():
    whole = draw(6)
    wide = draw(6, torch.nn.functional.pad(PROMPTS, (3, 0)))
    assert torch.equal(whole.responses, wide.responses)
    torch.testing.assert_close(whole.logprobs, wide.logprobs, rtol=0, atol=1e-12)
    others = PROMPTS.clone()
    others[1:] = PROMPTS[[3, 1, 2]]
    assert torch.equal(draw(6, others).responses[0], whole.responses[0])


# --- the distribution -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_match_enumeration(temperature):
    model, n = tiny_model(2, vocab=4, dtype=torch.float32), 4000
    responses, mask = every_answer(4, 3)
    prompt = torch.tensor([[0, 3, 2]])
    with torch.no_grad():
        logprobs, _ = response_logprobs(
            model, prompt.expand(len(mask), -1), responses, mask, temperature=temperature
        )
    p = logprobs.double().sum(1).exp()
    # 40 answers; the cap, EOS and a sampled pad id are all among them
    drawn = draw(0, prompt.expand(n, -1), model=model, max_new_tokens=3, temperature=temperature)
    place = torch.tensor([64, 16, 4, 1]).flip(0)[:3]
    code = ((responses + 1) * mask * place).sum(1)
    seen = ((drawn.responses + 1) * drawn.mask * place).sum(1)
    counts = (seen[:, None] == code[None]).sum(0)
    assert counts.sum() == n  # no answer outside of the enumeration
    expected = p * n
    common = expected >= 5
    chi = ((counts - expected)[common].square() / expected[common]).sum().item()
    freedom = int(common.sum()) - 1
    assert freedom >= 8 and chi < freedom + 4 * (2 * freedom) ** 0.5
    rare = counts[~common].sum().item()
    assert abs(rare - expected[~common].sum()) < 4 * max(expected[~common].sum().item(), 1) ** 0.5


def test_inverse_cdf_at_its_edges():
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, 0.0, -inf, 0.0, -inf]])  # thirds on 1, 2 and 4
    almost_one = 1 - 2**-24  # the largest number that torch.rand gives
    for uniform, token in [
        (0.0, 1), (0.33, 1), (0.34, 2), (0.66, 2), (0.67, 4), (almost_one, 4)
    ]:  # fmt: skip
        picked, logp = _pick(logits, torch.tensor([uniform]))
        assert picked.item() == token, uniform
        assert logp.item() == pytest.approx(-1.0986123, abs=1e-6)


@given(st.integers(0, 100_000))
def test_a_token_of_probability_zero_is_never_picked(seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, 9, generator=g) * 5
    logits[torch.rand(64, 9, generator=g) < 0.5] = -float("inf")
    logits[:, 4] = 0.0
    uniform = torch.rand(64, generator=g)
    uniform[::3], uniform[1::3] = 0.0, 1 - 2**-24
    picked, logp = _pick(logits, uniform)
    assert logits.gather(1, picked[:, None]).isfinite().all()
    torch.testing.assert_close(logp, logits.log_softmax(-1).gather(1, picked[:, None])[:, 0])


def test_forbidding_tokens_would_make_the_sampled_kl_negative():
    # why there is no top-p here: sample from a truncated policy, score with the whole one
    responses, mask = every_answer(5, 2)
    prompts = torch.tensor([[3, 2]]).expand(len(mask), -1)
    with torch.no_grad():
        policy, _ = response_logprobs(MODEL, prompts, responses, mask)
        other, _ = response_logprobs(tiny_model(9), prompts, responses, mask)
    p, log_ratio = policy.sum(1).exp(), policy.sum(1) - other.sum(1)
    assert (p * log_ratio).sum() > 0
    kept = torch.where(log_ratio < 0, p, 0.0)
    assert (kept / kept.sum() * log_ratio).sum() < 0


# --- bounds -----------------------------------------------------------------------------------


def test_one_token_answers():
    answers = draw(max_new_tokens=1)
    assert answers.mask.all() and answers.responses.shape == (4, 1)


def test_context_is_used_to_the_last_token_and_not_beyond():
    model = tiny_model(context=6)
    prompts = torch.tensor([[0, 3, 3, 2]])  # 3 real tokens; the last answer token is never read
    draw(0, prompts, model=model, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"prompt of 3 tokens and a response of up to 5 .* of 6"):
        draw(0, prompts, model=model, max_new_tokens=5)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        (PROMPTS, {"max_new_tokens": 0}, "max_new_tokens is 0; ask for at least one"),
        (PROMPTS, {"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        (torch.tensor([[0, 0], [3, 2]]), {}, "a prompt is empty or padded on the right"),
        (torch.tensor([[3, 0], [3, 2]]), {}, "pad prompts on the left"),
    ],
)
def test_bad_input_is_one_sentence(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        draw(0, prompts, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_seed_means_the_same_draws_on_a_gpu():
    model = tiny_model(4)
    on_cpu = draw(1, model=model)
    on_gpu = draw(1, PROMPTS.to("cuda"), model=model.to("cuda"))
    assert torch.equal(on_cpu.responses, on_gpu.responses.cpu())
    torch.testing.assert_close(on_cpu.logprobs, on_gpu.logprobs.cpu(), rtol=1e-8, atol=1e-10)
