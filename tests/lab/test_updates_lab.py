"""Notebook 05's panels: both ends of every dial, and the direction that theory predicts."""

import copy
import io
import math
from dataclasses import replace

import build_notebooks as bn
import numpy as np
import pytest
import torch
from PIL import Image

from minirlhf.advantages import gae
from minirlhf.drift.data import shipped
from minirlhf.lab.panels.updates import (
    ClipDial,
    CreditDial,
    clip_figure,
    clip_share,
    curves_figure,
    frontier_figure,
)
from minirlhf.oracle.chain import ForkChain
from minirlhf.oracle.closed_form import two_answer
from minirlhf.ppo import PPO, ppo_policy_loss

GAP, BETA, P0 = 0.3, 0.05, 0.02


@pytest.fixture(scope="module")
def notebook():
    """The notebook's own `real_updates` and `road`, with the names that their cells meet."""
    from minirlhf.kl import kl_k3
    from minirlhf.model import response_logprobs

    scope = {"torch": torch, "copy": copy, "math": math, "replace": replace, "PPO": PPO}
    scope |= {"kl_k3": kl_k3, "response_logprobs": response_logprobs, "EPSILONS": (0.02, 0.8)}
    scope |= {"ppo_policy_loss": ppo_policy_loss, "p0": P0, "gap": GAP, "beta": BETA}
    for cell in bn.read_master(bn.NOTEBOOKS / "masters" / "05_ppo.py").cells:
        for name in ("def real_updates", "def road", "def literal_road"):
            if name in cell.source:
                exec(cell.source[cell.source.index(name) :].split("\n\n\n")[0], scope)
    return scope


@pytest.fixture(scope="module")
def dial(notebook):
    case = shipped()
    table, score = case.desk.encode(case.prompts()), case.reward_model().score
    config = replace(case.config.ppo, batch=64)
    run = PPO(case.policy(10), case.reference, score, table, config)
    batch, _ = run.rollout()
    before = {k: v.clone() for k, v in run.state_dict().items()}
    sweep = {eps: (r, kl) for eps, r, kl in notebook["real_updates"](run, batch)}
    for name, value in run.state_dict().items():
        assert torch.equal(value, before[name]), "the sweep moved the run it was given"
    paths = {eps: notebook["road"](eps) for eps in sweep}
    return ClipDial(sweep, paths, float(two_answer(P0, GAP, BETA)))


def colours(panel):
    """How many pixels of a panel's picture are not white."""
    picture = np.asarray(Image.open(io.BytesIO(panel.live.data)).convert("RGB"))
    return int((picture < 250).any(-1).sum())


def test_a_smaller_epsilon_clips_more_moves_less_takes_longer_and_ends_the_same(dial):
    shown = {}
    for eps in dial._sweep:
        dial.controls["eps"].value = eps
        shown[eps] = dial.shown
        assert f"epsilon {eps:g} " in dial.live.alt and colours(dial) > 5000
    small, large = shown[0.02], shown[0.8]
    assert small["clip_share"] > 3 * large["clip_share"] > 0
    assert 0 < small["kl_nats"] < large["kl_nats"]
    assert small["half_way"] > 1.5 * large["half_way"]
    for end in (small["end"], large["end"]):
        assert end == pytest.approx(float(two_answer(P0, GAP, BETA)), abs=0.005)


def test_the_dial_draws_the_numbers_that_it_says(dial):
    dial.controls["eps"].value = 0.8
    band, bars, said, share, move, line = dial._artists
    homes = {a: a.axes.get_title(loc="left") for a in (band, bars, share, move, line)}
    assert homes[band] == homes[bars] == "ratios after the update"
    assert homes[share] == "tokens outside" and homes[move] == "move, nats/answer"
    assert homes[line] == "two answers"
    assert (band.get_x(), band.get_width()) == pytest.approx((0.2, 1.6))
    assert "0.2 to 1.8" in said.get_text()
    ratios, nats = dial._sweep[0.8]
    assert share.get_ydata()[0] == clip_share(0.8, ratios) == dial.shown["clip_share"]
    assert move.get_ydata()[0] == nats
    assert list(line.get_ydata()) == list(dial._paths[0.8])
    drawn = bars.get_data().values
    assert drawn[drawn > 0.5].sum() == len(ratios)  # the outermost bins hold what is beyond


def test_the_clip_is_no_fence(dial):
    """A shared network carries tokens beyond a band in which their own gradient is gone."""
    ratios, _ = dial._sweep[0.02]
    assert ratios.max() > 1.5 and ratios.min() < 0.7


def test_clip_share_counts_both_sides():
    assert clip_share(0.2, np.array([0.5, 0.9, 1.1, 1.5])) == 0.5
    assert clip_share(0.05, np.array([0.5, 0.9, 1.1, 1.5])) == 1.0


@pytest.mark.parametrize("eps", [0.02, 0.8])
def test_the_exact_road_takes_the_steps_of_the_closed_form(notebook, eps):
    """With an open clip and one epoch the first step of Adam is its learning rate."""
    path = notebook["road"](eps, rollouts=1, epochs=1)
    moved = math.log(path[1] / (1 - path[1])) - math.log(P0 / (1 - P0))
    assert moved == pytest.approx(2 * 0.02, rel=1e-3)  # both logits move


def test_the_books_penalty_pushes_on_where_it_is_stale(notebook):
    ends = [notebook["literal_road"](beta) for beta in (0.0, 0.25, 1.0)]
    assert ends == sorted(ends) and ends[-1] - ends[0] > 0.1
    fresh = [notebook["literal_road"](beta, rollouts=400, epochs=1) for beta in (0.0, 1.0)]
    assert fresh[0] == pytest.approx(fresh[1])  # one epoch: no gradient on average


def credit(tokens, gamma, lam):
    chain = ForkChain(P0, GAP, BETA, steps=tokens)
    critics = ("flat", "exact")
    return {c: chain.advantages(0.1, critic=c, gamma=gamma, lam=lam)[0].numpy() for c in critics}


def test_credit_over_length_at_both_ends_of_every_dial():
    panel = CreditDial(credit, limit=0.35)
    lam, gamma, tokens = (panel.controls[name] for name in ("lam", "gamma", "tokens"))
    start = panel.live.data
    for control in (lam, gamma, tokens):
        for at in (control.min, control.max):
            control.value = at
            assert len(panel.shown["flat"]) == tokens.value and colours(panel) > 1000
            inside = np.concatenate(list(panel.shown.values()))
            assert (np.abs(inside) <= 0.35).all()
    assert panel.live.data != start
    gamma.value = 1.0
    forks = {}
    for lam.value in (0.0, 0.95, 1.0):
        forks[lam.value] = {c: float(a[0]) for c, a in panel.shown.items()}
    assert forks[0.0]["flat"] < forks[0.95]["flat"] < 0 < forks[1.0]["flat"]
    assert forks[0.0]["exact"] == pytest.approx(forks[1.0]["exact"])
    assert "60 tokens above 0" in panel.live.alt and "fork +0.19, 1 tokens" in panel.live.alt
    for length in (tokens.min, tokens.max):  # a discount charges the long answer
        gamma.value, tokens.value = 0.9, length
        forks[length] = float(panel.shown["exact"][0])
    assert forks[tokens.max] < 0 < forks[tokens.min]


def test_what_science_says_about_the_first_of_sixty_tokens():
    score = torch.zeros(1, 60)
    score[0, -1] = 1.0
    got = gae(score, 0 * score, score > -1, gamma=1.0, lam=0.95)[0, 0]
    assert float(got) == pytest.approx(0.95**59, rel=1e-5)


def test_figures_are_labelled_with_their_numbers():
    four = {"proxy": ("points", [0.5, 1.5], 1.6), "KL gradient": ("share", [0.0, 1.0], None)}
    figure = curves_figure([0, 8], four)
    assert "proxy 0.5 to 1.5 points" in figure.get_label()
    assert [len(ax.lines) for ax in figure.axes] == [2, 1]
    figure = frontier_figure([2.0, 1.0, 0.0], [3.0, 2.0, 0.0], [0.0, 1.0], [0.0, 1.9])
    assert "the frontier stands at 2.0" in figure.get_label()
    sweep = {0.1: (np.array([0.5, 1.0, 9.0]), 0.2), 0.3: (np.array([1.0, 1.1, 1.2]), 0.4)}
    figure = clip_figure(sweep, {0.1: [0, 1], 0.3: [0, 1]}, 0.9)
    assert "tokens outside 67% to 0%, move 0.20 to 0.40 nats" in figure.get_label()
