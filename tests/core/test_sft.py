"""Supervised fine-tuning learns the distribution of the demonstrations, their end included."""

import math

import pytest
import torch
from fakes import tiny_model
from torch import Tensor

from minirlhf.model import Transformer, TransformerConfig, response_logprobs
from minirlhf.sft import SFTConfig, train_sft
from minirlhf.text import left_pad, right_pad

PROMPTS, ANSWERS = left_pad([[2], [3, 2]]), [[3, 1], [4, 4, 1], [4, 1]]
SHARES = (0.5, 0.25, 0.25)


def demonstrations() -> tuple[Tensor, Tensor, Tensor]:
    answers, mask = right_pad([ANSWERS[i] for i in (0, 0, 1, 2) for _ in range(2)])
    return PROMPTS.repeat(4, 1), answers, mask


def fresh() -> Transformer:
    config = TransformerConfig(5, 8, d_model=16, n_layer=1, n_head=2)
    return Transformer(config, generator=torch.Generator().manual_seed(0))


def train(model: Transformer, config: SFTConfig, seed: int = 0, **options) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return train_sft(model, *demonstrations(), config, generator=generator, **options)


def test_it_learns_the_shares_of_answers_and_where_they_end():
    model, config = fresh(), SFTConfig(steps=150, batch=256, lr=1e-2)
    seen = []
    history = train(model, config, progress=lambda *x: seen.append(x))
    answers, mask = right_pad(ANSWERS)
    for prompt in PROMPTS:
        with torch.no_grad():
            given = (prompt.expand(3, -1), answers, mask)
            p = response_logprobs(model, *given)[0].sum(1).exp()
        assert p.tolist() == pytest.approx(SHARES, abs=0.05)
    # 1.5 bits an answer over 9/4 tokens: what no model can do better than
    floor = 1.5 * math.log(2) / 2.25
    assert history[-1]["sft/loss_nats"] == pytest.approx(floor, abs=0.05)
    assert [x[:2] for x in seen] == [(i + 1, 150) for i in range(150)] and seen[-1][2] == history[
        -1
    ]


def test_the_loss_is_the_mean_over_response_tokens_and_nothing_else():
    model = tiny_model(0, dtype=torch.float32)
    prompts, answers, mask = demonstrations()
    with torch.no_grad():
        logprobs, _ = response_logprobs(model, prompts, answers, mask)
    once = SFTConfig(steps=1, batch=5000)
    junk = torch.where(mask, answers, 3)  # what stands behind EOS is not learnt
    for given in (answers, junk):
        generator = torch.Generator().manual_seed(0)
        copy = tiny_model(0, dtype=torch.float32)
        (row,) = train_sft(copy, prompts, given, mask, once, generator=generator)
        assert row["sft/loss_nats"] == pytest.approx(-logprobs[mask].mean().item(), abs=0.05)


def test_the_seed_decides_the_training():
    models, config = [fresh(), fresh(), fresh()], SFTConfig(steps=5, batch=4)
    histories = [train(m, config, seed=s) for m, s in zip(models, (0, 0, 1), strict=True)]
    assert histories[0] == histories[1] != histories[2]


def test_warm_up_then_down(monkeypatch):
    rates = []
    step = "minirlhf.sft.FlatAdamW.step"
    monkeypatch.setattr(step, lambda self: rates.append(self.lr))
    train(fresh(), SFTConfig(steps=40, batch=4, lr=1.0))
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates.index(max(rates)) == 3 and rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_a_loss_that_is_not_finite_stops_with_a_sentence():
    model = fresh()
    with torch.no_grad():
        model.tokens.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"reference loss is nan at step 0; lower sft.lr"):
        train(model, SFTConfig(steps=5, batch=4))
