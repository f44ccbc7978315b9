"""The ranking loss in closed form, the scale of scores, and training that generalises."""

import math

import pytest
import torch
from fakes import ragged_batch, tiny_model
from fakes_pairs import Pairs, separable

from minirlhf.engine import files
from minirlhf.model import Transformer, TransformerConfig
from minirlhf.reward import (
    RewardConfig,
    RewardModel,
    bradley_terry_loss,
    ranking_accuracy,
    score_pairs,
    train_reward,
)

# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.5, -1.0])
def test_bradley_terry_loss_and_gradient_in_closed_form(margin):
    chosen = torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.5, 1.0, 0.3], dtype=torch.float64, requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected, margin=margin)
    gaps = [c - r - margin for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    p = [1 / (1 + math.exp(-gap)) for gap in gaps]
    assert loss.item() == pytest.approx(-sum(map(math.log, p)) / 3, abs=1e-12)
    loss.backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-(1 - x) / 3 for x in p], abs=1e-12)
    assert torch.equal(rejected.grad, -chosen.grad)


def test_an_undecided_pair_costs_log_two_and_an_offset_costs_nothing():
    scores = torch.tensor([0.7, -3.0], dtype=torch.float64)
    assert bradley_terry_loss(scores, scores).item() == pytest.approx(math.log(2), abs=1e-12)
    other = scores.flip(0)
    shifted = bradley_terry_loss(scores + 50, other + 50)
    torch.testing.assert_close(shifted, bradley_terry_loss(scores, other))


def test_hopeless_pairs_do_not_overflow():
    chosen = torch.tensor([-1e4], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([1e4]))
    loss.backward()
    assert loss.item() == 2e4 and chosen.grad is not None and chosen.grad.item() == -1.0


# --- the scale --------------------------------------------------------------------------------


def test_calibrated_scores_have_mean_zero_and_sd_one_on_the_reference():
    model = RewardModel(tiny_model())
    batch = ragged_batch(0, batch=40)
    before = model.score(*batch)
    model.calibrate(*batch)
    scores = model.score(*batch)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert scores.std().item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(scores, (before - before.mean()) / before.std(), rtol=0, atol=1e-6)
    model.calibrate(*batch)  # again: from the raw scores, not from the calibrated ones
    torch.testing.assert_close(model.score(*batch), scores)


def test_calibration_needs_answers_that_differ_and_keeps_the_old_scale_otherwise():
    model = RewardModel(tiny_model(), mean=0.5, sd=2.0)
    same = [x[:1].repeat(5, 1) for x in ragged_batch(0)]
    with pytest.raises(ValueError, match="gives every reference answer one score"):
        model.calibrate(*same)
    assert (model.mean.item(), model.sd.item()) == (0.5, 2.0)


def test_scores_depend_on_neither_padding_nor_chunks_nor_neighbours():
    model = RewardModel(tiny_model(), mean=0.3, sd=1.7)
    prompts, responses, mask = ragged_batch(1, batch=9)
    scores = model.score(prompts, responses, mask)
    torch.testing.assert_close(model.score(prompts, responses, mask, chunk=2), scores)
    junk = torch.nn.functional.pad(torch.where(mask, responses, 4), (0, 3), value=3)
    wide = torch.nn.functional.pad(prompts, (4, 0)), junk, torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(model.score(*wide), scores, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model(prompts, responses, mask).detach(), scores)
    assert not scores.requires_grad


def test_the_scale_is_saved_with_the_weights(tmp_path):
    model = RewardModel(tiny_model(), mean=0.3, sd=1.7)
    path = files.save_tensors(tmp_path / "rm", model.state_dict(), {})
    again = RewardModel(tiny_model(5))
    again.load_state_dict(files.load_tensors(path)[0])
    batch = ragged_batch(1)
    assert torch.equal(again.score(*batch), model.score(*batch))


# --- training ---------------------------------------------------------------------------------


def fresh(seed: int = 0) -> RewardModel:
    config = TransformerConfig(5, 8, d_model=16, n_layer=1, n_head=2)
    return RewardModel(Transformer(config, generator=torch.Generator().manual_seed(seed)))


CONFIG = RewardConfig(epochs=4, batch=32, lr=1e-2)


def test_training_ranks_pairs_it_has_not_seen(generator):
    model, seen = fresh(), []
    history = train_reward(
        model, separable(0, 640), CONFIG, generator=generator,
        progress=lambda step, total, metrics: seen.append((step, total, metrics)),
    )  # fmt: skip
    assert ranking_accuracy(model, separable(1, 300)) > 0.95
    assert history[0]["reward/loss"] == pytest.approx(math.log(2), abs=1e-6)  # a zero head
    assert history[-1]["reward/loss"] < 0.2 < history[0]["reward/loss"]
    assert [(s, t) for s, t, _ in seen] == [(i + 1, 80) for i in range(80)]
    assert seen[-1][2] == history[-1]


def test_the_seed_decides_the_training():
    pairs, models = separable(0, 64), [fresh(), fresh()]
    histories = [
        train_reward(m, pairs, CONFIG, generator=torch.Generator().manual_seed(3)) for m in models
    ]
    assert histories[0] == histories[1]
    batch = ragged_batch(0, width=2, steps=6)
    assert torch.equal(models[0].score(*batch), models[1].score(*batch))


def test_fewer_pairs_than_a_batch_are_refused(generator):
    with pytest.raises(ValueError, match=r"20 pairs do not fill one batch of 32: .*reward.batch"):
        train_reward(fresh(), separable(0, 20), CONFIG, generator=generator)


def test_a_loss_that_is_not_finite_stops_with_a_sentence(generator):
    model = fresh()
    with torch.no_grad():
        model.trunk.scalar.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"reward model loss is nan at step 0; lower rew"):
        train_reward(model, separable(0, 64), CONFIG, generator=generator)


def test_accuracy_counts_a_tie_as_one_half():
    pairs = separable(0, 50)
    assert ranking_accuracy(fresh(), pairs) == 0.5  # a zero head scores every answer alike
    model = RewardModel(tiny_model())
    chosen, rejected = score_pairs(model, pairs)
    won = (chosen > rejected).double().mean().item()
    assert ranking_accuracy(model, pairs) == pytest.approx(won, abs=1e-12)
    swapped = Pairs(
        pairs.prompts, pairs.rejected, pairs.rejected_mask, pairs.chosen, pairs.chosen_mask
    )
    assert ranking_accuracy(model, swapped) == pytest.approx(1 - won, abs=1e-12)


def test_pairs_are_scored_as_single_answers_are():
    model, pairs = RewardModel(tiny_model()), separable(2, 10)
    chosen, rejected = score_pairs(model, pairs, slice(3, 7))
    one = model.score(pairs.prompts, pairs.chosen, pairs.chosen_mask)[3:7]
    other = model.score(pairs.prompts, pairs.rejected, pairs.rejected_mask)[3:7]
    torch.testing.assert_close(torch.stack([chosen, rejected]).detach(), torch.stack([one, other]))
