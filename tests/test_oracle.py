"""Two answers and the fork chain: the closed forms agree with enumeration, with PPO's own parts,
and (a subset here, the rest in test_ladder_two_answers.py) with PPO trained on a Transformer."""

import math

import pytest
import torch

from minirlhf.oracle import tilt, two_answer


def test_the_tilt_beats_every_other_policy(generator):
    ref = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    ref /= ref.sum(-1, keepdim=True)
    rewards, beta = torch.randn(3, 5, generator=generator, dtype=torch.float64), 0.3
    best = tilt(ref, rewards, beta)

    def objective(p):
        return (p * (rewards - beta * (p / ref).log())).sum(-1)

    z = (ref * (rewards / beta).exp()).sum(-1)
    torch.testing.assert_close(objective(best), beta * z.log())
    for size in (1e-3, 0.1, 1.0):
        other = (best.log() + size * torch.randn(3, 5, generator=generator)).softmax(-1)
        assert (objective(other) < objective(best)).all()


def test_two_answers_by_hand():
    assert float(two_answer(0.02, 0.1, 0.02)) == pytest.approx(0.7517, abs=1e-4)
    assert float(two_answer(0.02, 0.1, 0.05)) == pytest.approx(0.1310, abs=1e-4)
    p0 = torch.tensor([0.001, 0.01, 0.1])
    gap = torch.tensor([0.4, 0.2])[:, None]
    found = two_answer(p0, gap, 0.1)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    odds = p0.double() / (1 - p0.double()) * (gap.double() / 0.1).exp()
    torch.testing.assert_close(found, odds / (1 + odds))
    both = torch.stack([p0, 1 - p0], -1)
    rewards = torch.tensor([0.4, 0.0]).expand(3, 2)
    torch.testing.assert_close(tilt(both, rewards, 0.1)[..., 0], found[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: two_answer(0.0, 0.1, 0.1), "p0 is 0.0; it must be a probability"),
        (lambda: two_answer(0.1, math.inf, 0.1), "delta_r is inf; it must be finite"),
        (lambda: two_answer(0.1, 0.1, 0.0), "beta is 0.0; it must be positive"),
        (lambda: tilt(torch.ones(2), torch.ones(2), 1.0), "ref_probs must be >= 0 and sum to 1"),
        (lambda: tilt(torch.ones(2) / 2, torch.ones(3), 1.0), r"\[2\] and rewards \[3\] must"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
