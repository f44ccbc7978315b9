"""The beta dial: what is on screen is theory and the runs it was given, at every stop."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from minirlhf.lab.panels.penalty import BETAS, SHARES, WAYS, BetaDial

P0 = torch.tensor([0.003, 0.01, 0.1, 0.5, 0.9], dtype=torch.float64)
GAP = 0.3


def tilted(p0, beta):
    """The odds times exp(gap / beta), in odds and not in logits: an own way to the oracle's."""
    odds = p0 / (1 - p0) * np.exp(GAP / beta)
    return odds / (1 + odds)


@pytest.fixture(scope="module")
def dial():
    runs = {("k1 in the reward", b): tilted(P0, b) for b in (0.05, 0.1)}
    return BetaDial(P0, runs, GAP)


def ink(panel):
    """Share of pixels that are not white."""
    image = np.asarray(Image.open(io.BytesIO(panel.live.data)).convert("RGB")).astype(int)
    return (image < 200).any(-1).mean()


def turn(dial, **values):
    for name, value in values.items():
        dial.controls[name].value = value
    return dial.shown


def test_k1_in_the_reward_multiplies_the_odds(dial):
    for beta in BETAS:
        for prompt, p0 in enumerate(P0.tolist()):
            shown = turn(dial, way="k1 in the reward", beta=beta, prompt=prompt)
            assert shown["end"] == pytest.approx(tilted(p0, beta), abs=1e-6)
        assert torch.allclose(shown["ends"], tilted(SHARES, beta), atol=1e-6)


def test_most_is_moved_where_theory_says(dial):
    """At p0 = 1 / (1 + exp(k / 2)), within half a step of the drawn grid (0.1 in log-odds)."""
    for beta in BETAS[2:]:
        peak = turn(dial, way="k2 in the loss", beta=beta)["peak"]
        assert np.log(peak / (1 - peak)) == pytest.approx(-GAP / beta / 2, abs=0.051)


def test_both_ends_of_every_dial_draw_and_point_the_right_way(dial):
    for way in WAYS:
        for prompt in (0, len(P0) - 1):
            weak, strong = (
                turn(dial, way=way, prompt=prompt, beta=beta)["ends"].clone()
                for beta in (BETAS[0], BETAS[-1])
            )
            assert ink(dial) > 0.02 and weak.isfinite().all() and strong.isfinite().all()
            assert (weak >= strong - 1e-9).all() and (strong >= SHARES - 1e-9).all()
            if way == "k1 in the loss: the book's formula":
                assert (strong == 1).all()  # no price of KL holds it
            elif way == "k3 in the reward":
                assert (strong[SHARES > 0.5] == 1).all()
            else:
                assert (strong - SHARES).max() < 0.05 < 0.8 < (weak - SHARES).max()


def test_dots_are_runs_and_only_where_there_is_one(dial):
    shown = turn(dial, way="k1 in the reward", beta=0.1)
    ends, moved = dial._run_ends, dial._run_moves
    assert torch.equal(shown["run"], tilted(P0, 0.1))
    assert np.allclose(ends.get_ydata(), tilted(P0, 0.1))
    assert np.allclose(moved.get_ydata(), tilted(P0, 0.1) - P0)
    assert "trained by PPO" in dial.live.alt
    for other in ({"beta": 0.15}, {"beta": 0.1, "way": "k2 in the loss"}):
        assert turn(dial, **other)["run"] is None
        assert len(ends.get_xdata()) == len(moved.get_xdata()) == 0
        assert "theory only" in dial.live.alt


def test_push_meets_pull_where_it_ends(dial):
    """Interpolated on the drawn pull, the reward's push is met at the marked end."""
    for way in ("k1 in the reward", "k3 in the loss"):
        shown = turn(dial, way=way, beta=0.1, prompt=1)
        pull = np.asarray(dial._lines[0].get_ydata())
        drawn = np.isfinite(pull)
        logits = SHARES.logit().numpy()
        met = np.interp(GAP, pull[drawn], logits[drawn])
        assert 1 / (1 + np.exp(-met)) == pytest.approx(shown["end"], abs=0.01)
        assert list(dial._rest.get_xdata()) == [shown["end"]]
    turn(dial, way="k3 in the reward", beta=0.1, prompt=1)
    assert "runs away" in dial.live.alt and np.isnan(dial._rest.get_ydata()).all()


def test_a_peak_beyond_the_picture_is_not_given_a_place(dial):
    """At beta .02 most moves at p0 = 1 / (1 + exp(7.5)), left of what is drawn."""
    turn(dial, way="k1 in the reward", beta=0.02)
    assert "most where verbose is rarest" in dial.live.alt
    turn(dial, beta=0.03)
    assert "most at p0 = 0.0067" in dial.live.alt
