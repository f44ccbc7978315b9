"""DPO against its formula, its gradient, and the optimum of a policy with two answers.

Bugs planted by hand that each fail here: winner and loser exchanged, the reference added instead
of subtracted, beta outside the sigmoid, a mean over tokens for the sum.
"""

import math

import numpy as np
import pytest
import torch
from fakes import dense, tiny_model
from fakes_pairs import Pairs, separable

from minirlhf.dpo import DPOConfig, answer_logprobs, dpo_loss, train_dpo
from minirlhf.model import Transformer, TransformerConfig
from minirlhf.oracle.closed_form import two_answer

# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_loss_is_the_papers_in_float64(beta):
    given = np.random.default_rng(0).normal(-8, 3, (4, 7))
    pc, pr, rc, rr = given
    margin = np.log(np.exp(pc) / np.exp(rc)) - np.log(np.exp(pr) / np.exp(rr))
    expected = -np.log(1 / (1 + np.exp(-beta * margin))).mean()
    found = dpo_loss(*torch.from_numpy(given), beta=beta)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_at_the_reference_the_loss_is_log_two_and_the_gradient_half_of_beta():
    start = torch.tensor([[-3.0, -7.0, -1.5], [-2.0, -9.0, -4.0]], dtype=torch.float64)
    policy = start.clone().requires_grad_()
    loss = dpo_loss(*policy, *start, beta=0.3)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    (grad,) = torch.autograd.grad(loss, policy)
    expected = torch.full((3,), 0.3 / 2 / 3, dtype=torch.float64)
    torch.testing.assert_close(grad, torch.stack([-expected, expected]))


def test_log_probs_are_sums_over_the_tokens_of_an_answer():
    model, pairs = tiny_model(), separable(0, 6)
    won, lost = answer_logprobs(model, pairs, slice(1, 5))
    for found, ids, mask in (
        (won, pairs.chosen[1:5], pairs.chosen_mask[1:5]),
        (lost, pairs.rejected[1:5], pairs.rejected_mask[1:5]),
    ):
        for value, row, keep in zip(found, ids, mask, strict=True):
            said = row[keep].tolist()
            logp = dense(model, [2, *said])[0].log_softmax(-1)
            expected = sum(logp[t, word] for t, word in enumerate(said))
            torch.testing.assert_close(value, expected)


# --- training ---------------------------------------------------------------------------------


def fresh(seed: int = 0) -> Transformer:
    config = TransformerConfig(5, 8, d_model=16, n_layer=1, n_head=2)
    return Transformer(config, generator=torch.Generator().manual_seed(seed))


def log_odds(model: Transformer, pairs: Pairs) -> float:
    """log pi(3) - log pi(4), the two answers, after the prompt."""
    with torch.no_grad():
        logits, _ = model(pairs.prompts[:1])
    return (logits[0, -1, 3] - logits[0, -1, 4]).item()


@pytest.mark.parametrize(("beta", "wins"), [(0.5, 3), (1.0, 3), (0.5, 1)])
def test_two_answers_end_at_the_tilted_reference(beta, wins):
    """3 wins `wins` of 4 labels, as sigmoid(dr) says: the optimum is logit p0 + dr / beta."""
    words, one = torch.tensor([3] * wins + [4] * (4 - wins))[:, None], torch.ones(4, 1).bool()
    pairs = Pairs(torch.full((4, 1), 2), words, one, 7 - words, one)
    policy, reference = fresh(), fresh()
    start = log_odds(reference, pairs)
    config = DPOConfig(beta=beta, epochs=400, batch=4, lr=1e-2)
    train_dpo(policy, reference, pairs, config, generator=torch.Generator().manual_seed(0))
    gap = math.log(wins / (4 - wins))
    end = torch.tensor(log_odds(policy, pairs)).sigmoid().item()
    best = two_answer(torch.tensor(start).sigmoid().item(), gap, beta).item()
    assert end == pytest.approx(best, abs=2e-3)
    assert log_odds(reference, pairs) == start  # the reference is left as it is


def test_the_winners_of_new_pairs_gain_on_the_losers_over_the_reference():
    policy, reference, seen = fresh(), fresh(), []
    config = DPOConfig(epochs=4, batch=32, lr=1e-2)
    history = train_dpo(
        policy, reference, separable(0, 640), config,
        generator=torch.Generator().manual_seed(0), progress=lambda *row: seen.append(row),
    )  # fmt: skip
    new = separable(1, 300)
    with torch.no_grad():
        now, then = (torch.stack(answer_logprobs(m, new, slice(None))) for m in (policy, reference))
    gain = (now - then)[0] - (now - then)[1]
    # not all: a log-ratio says something of every token, and the lengths of these differ
    assert gain.mean() > 2 and (gain > 0).double().mean() > 0.7
    assert history[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-1]["dpo/loss"] < 0.55 and history[-1]["dpo/accuracy"] > 0.7
    assert [(s, t) for s, t, _ in seen] == [(i + 1, 80) for i in range(80)]


def test_the_seed_decides_the_training():
    policies, config = [fresh(), fresh()], DPOConfig(batch=16)
    histories = [
        train_dpo(p, fresh(), separable(0, 64), config, generator=torch.Generator().manual_seed(3))
        for p in policies
    ]
    assert histories[0] == histories[1]
    for a, b in zip(*(p.parameters() for p in policies), strict=True):
        assert torch.equal(a, b)


# --- refusals ---------------------------------------------------------------------------------


def test_settings_that_make_no_sense_are_refused_by_name():
    for name in ("beta", "epochs", "batch", "lr", "max_grad_norm"):
        with pytest.raises(ValueError, match=rf"^dpo.{name} is 0; it must be positive"):
            DPOConfig(**{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"20 pairs do not fill one batch of 64: .*dpo.batch"):
        train_dpo(fresh(), fresh(), separable(0, 20), DPOConfig(), generator=torch.Generator())
