"""The autopsy's panel and figures: both ends of every dial, and the direction theory predicts."""

import io
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import tiny_model
from PIL import Image

from minirlhf.autopsy.convention import Convention
from minirlhf.autopsy.parts import split
from minirlhf.autopsy.pushes import length_weights, leverage
from minirlhf.autopsy.reconciliation import recomputed
from minirlhf.autopsy.what_ifs import repricer, rescored, what_if, what_if_clip
from minirlhf.config import PPOConfig
from minirlhf.drift.data import shipped
from minirlhf.lab.panels import batch_plots
from minirlhf.lab.panels.batch import BEFORE, FIRST_WHY, BatchPanel
from minirlhf.lab.panels.batch_plots import (
    concentration,
    fork,
    fork_figure,
    lorenz_figure,
    part_means,
    waterfall_figure,
)
from minirlhf.lab.picture import Panel
from minirlhf.lab.plots import BLUE, ORANGE, VERMILLION
from minirlhf.model import response_logprobs, response_outputs
from minirlhf.ppo import PPO
from minirlhf.rollout import Rollout

WORDS = ["<pad>", "<eos>", "<b>", "yes", "&"]


def run_and_batch(**settings) -> tuple[PPO, Rollout]:
    """A run of a real Transformer in float64, and a batch that it sampled."""
    policy, reference = (tiny_model(i, context=12, spread=1.5) for i in (0, 100))
    options = {"batch": 40, "max_new_tokens": 6, "minibatches": 2, "beta": 0.2, "lr": 0.02}
    config = PPOConfig(**{**options, **settings})
    prompts = torch.randint(2, 5, (8, 4), generator=torch.Generator().manual_seed(1))
    scorer = lambda p, r, m: (r == 3).double().sum(1) - 0.2 * m.sum(1)  # noqa: E731
    run = PPO(policy, reference, scorer, prompts, config)
    return run, run.rollout()[0]


def make(ours, batch, **options) -> BatchPanel:
    """Verbose: long and costly in KL; the score of a length bias is a price on length."""
    costly = (batch.logprobs - batch.ref_logprobs).sum(1) > 0
    verbose = (batch.lengths >= 4) & costly
    given = {
        "verbose": verbose,
        "concise": batch.lengths < 4,
        "words": [[WORDS[i] for i in row] for row in batch.responses.tolist()],
        "scores": {d: batch.scores + (d - 0.1) * batch.lengths for d in (0.0, 0.1, 0.3)},
        "strata": np.where(np.arange(len(batch)) % 2, "odd", "even"),
        "run": ours,
    }
    Panel._shown.pop("batch", None)  # else it would close the panel that other tests share
    return BatchPanel(batch, Convention.of(ours.config), **{**given, **options})


@pytest.fixture(scope="module")
def ready():
    return run_and_batch()


@pytest.fixture(scope="module")
def shared(ready):
    return make(*ready)


@pytest.fixture
def panel(shared):
    """A panel with every dial where it stood, and no update taken."""
    shared._updates.clear()
    shared._latest.clear()
    start = {"beta": 0.2, "bias": 0.1, "eps": 0.0, "stratum": "even", "refit": False}
    for name, value in start.items():
        shared.controls[name].value = value
    yield shared
    shared.wait()


def pixels(panel) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(panel.live.data)).convert("RGB")).astype(int)


# ------------------------------------------------------------------ beta and length bias
def test_the_start_shows_the_batch_as_it_was_logged(ready, panel):
    _, batch = ready
    assert panel.controls["bias"].value == 0.1 and panel.controls["beta"].value == 0.2
    assert torch.allclose(panel.seen, batch.advantages)
    parts = split(batch, panel._convention)
    rows = panel._kinds["verbose"] & panel._strata["even"]
    mean = (parts.kl.sum(1) / batch.lengths)[rows].mean()
    assert panel.shown["sides"]["verbose"]["kl"] == pytest.approx(float(mean))
    share = (batch.advantages[rows][batch.mask[rows]] > 0).double().mean()
    assert panel.shown["positive"]["verbose"] == pytest.approx(float(share))
    assert FIRST_WHY in panel.live.view.value and "exact for this batch" in panel.live.view.value


def test_a_higher_beta_makes_the_kl_part_of_verbose_answers_more_negative():
    panel = make(*run_and_batch(whiten_advantages="none"))  # whitening divides by what beta moves
    seen, start = {}, pixels(panel)
    beta = panel.controls["beta"]
    for value in (0.0, 0.2, beta.max):
        beta.value = value
        seen[value] = panel.shown
        assert f"Beta {value:.3f}" in panel.live.alt
    low, mid, high = seen.values()
    verbose = [x["sides"]["verbose"] for x in (low, mid, high)]
    assert verbose[0]["kl"] == 0 > verbose[1]["kl"] > verbose[2]["kl"]
    assert verbose[0]["total"] > verbose[1]["total"] > verbose[2]["total"]
    assert low["positive"]["verbose"] > high["positive"]["verbose"]
    assert (pixels(panel) != start).any()


def test_without_length_bias_the_reward_part_of_verbose_answers_falls(panel):
    seen, dial = [], panel.controls["bias"]
    for dial.value in (0.0, 0.1, 0.3):
        seen.append(panel.shown)
        assert f"length bias {dial.value}" in panel.live.alt
    reward = [x["sides"]["verbose"]["reward"] for x in seen]
    assert reward[0] < reward[1] < reward[2]
    assert [sum(x["length"].values()) for x in seen] == sorted(
        sum(x["length"].values()) for x in seen
    )


def test_words_picture_and_reasons_leave_in_one_message(panel, monkeypatch):
    sent, view = [], panel.live.view
    monkeypatch.setattr(view, "send_state", lambda key=None: sent.append(view.value))
    panel.controls["beta"].value = 0.0
    assert len(sent) == 1
    page = sent[0]
    assert page.index("minirlhf-heat") < page.index("exact") < page.index("<img ")


def test_words_are_data(ready):
    run, batch = ready
    panel = make(run, batch, words=[["<script>"] * batch.mask.shape[1]] * len(batch))
    assert "&lt;script&gt;" in panel.live.view.value and "<script>" not in panel.live.view.value


def test_a_critic_fitted_again_takes_up_part_of_the_cost(ready, panel):
    panel.controls["beta"].value = high = panel.controls["beta"].max
    frozen = panel.shown
    panel.controls["refit"].value = True
    _, batch = ready
    expected = what_if(batch, panel._convention, beta=high, scores=panel._scores[0.1],
                       features=batch.values[batch.mask][:, None])  # fmt: skip
    assert torch.equal(panel.seen, expected.advantages)
    assert panel.shown["absorbed"] == expected.figures["absorbed"]
    assert panel.shown["sides"]["verbose"]["baseline"] > frozen["sides"]["verbose"]["baseline"]
    assert "approximate: the critic is fitted again" in panel.live.view.value


@pytest.mark.parametrize("settings", [
    {}, {"whiten_advantages": "none", "lam": 0.9}, {"whiten_advantages": "shift_scale"},
    {"whiten_rewards": "scores"}, {"whiten_rewards": "rewards"}, {"advantage": "grpo", "group": 4},
    {"kl_estimator": "k3", "kl_aggregation": "token_mean"},
], ids=str)  # fmt: skip
def test_pricing_under_a_dial_is_the_what_if(settings):
    run, batch = run_and_batch(**settings)
    convention, scores = (
        Convention.of(run.config),
        {"old": batch.scores, "new": batch.lengths * 0.1},
    )
    priced = repricer(batch, convention, scores)
    for beta, name in ((0.0, "old"), (0.2, "new"), (1.2, "new")):
        expected = what_if(batch, convention, scores=scores[name], beta=beta)
        found = priced(beta, name)
        assert (found.exact, found.why) == (expected.exact, expected.why)
        for part, x in vars(expected.parts).items():
            assert x is None or torch.allclose(getattr(found.parts, part), x, atol=1e-12)


def test_from_a_second_thread_the_same_numbers(panel):
    def turn():
        panel.controls["beta"].value = 0.0
        panel.controls["bias"].value = 0.3

    other = threading.Thread(target=turn)
    other.start()
    other.join()
    threaded, picture = panel.shown, panel.live.data
    panel.controls["beta"].value = 0.2
    turn()
    assert panel.shown == threaded and panel.live.data == picture


def test_the_stratum_chooses_whose_answers_are_shown(ready, panel):
    before, panel.controls["stratum"].value = panel.shown, "odd"
    assert panel.shown["sides"] != before["sides"] and "odd prompts" in panel.live.alt
    assert panel.shown["length"] == before["length"]  # every stratum at once


# ------------------------------------------------------------------ epsilon
def test_a_smaller_epsilon_cuts_more_tokens(ready, panel):
    run, batch = ready
    shares = {}
    for panel.controls["eps"].value in (0.8, 0.02):
        panel.wait()
        eps = panel.controls["eps"].value
        expected = what_if_clip(batch, split(batch, panel._convention),
                                replace(run.config, clip=eps), run=run)  # fmt: skip
        assert torch.allclose(panel.seen, expected.advantages, atol=1e-9)
        shares[eps] = panel.cut_share
        assert panel.cut_share == pytest.approx(expected.figures["cut_share"])
        assert "exact: the real update, taken again" in panel.live.view.value
    assert shares[0.02] > shares[0.8]
    assert panel.progress.value == panel.progress.max == run.config.epochs * 2


def test_length_is_the_push_before_any_clip_at_every_epsilon(ready, panel):
    """What a small epsilon leaves of the push is no measure of where the update went."""
    _, batch = ready
    first = panel.shown["length"]
    moves = {k: float((w * batch.advantages).sum()) for k, w in panel._lengths.items()}
    assert first == pytest.approx(moves) and all(first.values())
    for panel.controls["eps"].value in (0.02, 0.1, 0.8):
        panel.wait()
        assert panel.shown["length"] == first
        left = panel._moves(panel.seen)
        assert left != first, "there would be nothing to mix up"
        assert BEFORE in panel.live.alt and f"one step, seen on these answers; {BEFORE}." in (
            panel.live.view.value
        )
    panel.controls["beta"].value = 0.0  # beta moves it, at any epsilon
    assert panel.shown["length"] != first


def test_an_update_is_reused_and_says_so_where_beta_has_moved(ready, panel):
    panel.controls["eps"].value = 0.1
    panel.wait()
    cut, kept = panel.cut_share, dict(panel._updates)
    panel.controls["beta"].value = 0.0
    assert panel._updates.keys() == kept.keys() and panel.cut_share == cut
    assert "approximate: the clip has cut" in panel.live.view.value
    panel.button.click()
    panel.wait()
    assert len(panel._updates) == 2 and "exact: the real update" in panel.live.view.value
    run, batch = ready  # the update of the batch as it would have been priced
    free = replace(panel._convention, beta=0.0)
    made = {k: recomputed(batch, free)[k] for k in ("advantages", "returns")}
    parts, config = split(batch, free), replace(run.config, clip=0.1)
    expected = what_if_clip(replace(batch, **made), parts, config, run=run)
    assert torch.allclose(panel.seen, expected.advantages, atol=1e-9)
    panel.controls["beta"].value = 0.2  # the first one is still there
    assert "exact: the real update" in panel.live.view.value


def test_without_a_run_epsilon_is_refused_in_a_sentence(ready):
    run, batch = ready
    panel = make(run, batch, run=None)
    panel.controls["eps"].value = 0.1
    panel.wait()
    assert "refused: the ratio is 1 on every token" in panel.live.view.value
    assert torch.allclose(panel.seen, batch.advantages)
    assert "tokens per unit" in panel.live.alt


def test_an_update_can_be_cancelled_and_taken_anew(ready, panel, monkeypatch):
    before = ready[0].state_dict()
    loss = PPO.loss
    slow = lambda self, batch: (time.sleep(0.3), loss(self, batch))[1]  # noqa: E731
    monkeypatch.setattr(PPO, "loss", slow)
    panel.controls["eps"].value = 0.05
    assert panel.busy and "being taken again" in panel.live.view.value
    assert panel.button.description == "cancel the update"
    deadline = time.monotonic() + 60
    while panel.progress.value < 1:  # under way, so that a later minibatch has to hear of it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    panel.button.click()
    panel.wait()
    assert not panel._updates and panel.progress.value < panel.progress.max
    assert "no update with this epsilon yet" in panel.live.view.value
    monkeypatch.undo()
    panel.button.click()
    panel.wait()
    assert "exact: the real update" in panel.live.view.value
    after = ready[0].state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "the run is left as it was"


# ------------------------------------------------------------------ any batch
def test_a_batch_without_strata_or_other_scores_will_do(ready):
    run, batch = ready
    panel = make(run, batch, scores=None, strata=None, run=None)
    assert panel.controls["bias"].value == "as logged"
    panel.controls["beta"].value = 0.0
    assert "all prompts" in panel.live.alt


def test_a_batch_whose_kl_is_not_in_the_reward_refuses_beta_in_a_sentence():
    run, batch = run_and_batch(kl_place="loss", kl_estimator="k2")
    panel = make(run, batch)
    panel.controls["beta"].value = panel.controls["beta"].max
    assert "no advantage depends on beta" in panel.live.view.value
    panel.controls["beta"].value = 0.0
    assert "Beta 0.000" in panel.live.alt


def test_a_stratum_without_answers_of_a_kind_is_shown_empty(ready):
    run, batch = ready
    panel = make(run, batch, verbose=torch.zeros(len(batch), dtype=torch.bool))
    assert np.isnan(panel.shown["positive"]["verbose"]) and panel.live.data


def test_on_the_shipped_batch_the_dials_do_what_the_case_says():
    case = shipped()
    batch, convention = case.rollout(8), Convention.of(case.config.ppo)
    scores = {d: rescored(batch, case.reward_model(d), convention) for d in (0.0, 0.0455)}
    table = case.prompts()
    brief = torch.tensor([table[i].stratum == "brief" for i in batch.index.tolist()])
    long = batch.lengths > 20
    words = [[case.desk.vocabulary.words[i] for i in row] for row in batch.responses.tolist()]
    given = {"verbose": long & brief, "concise": ~long & brief, "words": words, "scores": scores}
    Panel._shown.pop("batch", None)
    panel = BatchPanel(batch, convention, **given)
    start, beta, bias = panel.shown, panel.controls["beta"], panel.controls["bias"]
    assert bias.value == 0.0455 and start["sides"]["verbose"]["kl"] < -0.05
    beta.value = beta.max
    assert panel.shown["sides"]["verbose"]["kl"] < start["sides"]["verbose"]["kl"]
    assert panel.shown["length"]["all"] < start["length"]["all"]
    beta.value, bias.value = 0.07, 0.0
    assert panel.shown["sides"]["verbose"]["reward"] < start["sides"]["verbose"]["reward"] - 0.5
    assert panel.shown["positive"]["verbose"] < start["positive"]["verbose"] - 0.2


# ------------------------------------------------------------------ length
def test_the_push_on_length_is_a_real_step_to_first_order(ready):
    run, batch = ready
    rows = torch.ones(len(batch), dtype=torch.bool)
    weights, unit, _ = length_weights(batch, {"all": rows}, run)
    centred = (batch.lengths - batch.lengths.double().mean()) / len(batch)
    given = (batch.prompts, batch.responses, batch.mask)
    assert unit == "tokens per step"
    plain = leverage(run, batch, centred, optimiser="sgd", lr=1e-6)
    run = PPO(run.policy, run.reference, run.reward_model, run.prompts,
              replace(run.config, value_coef=0.0, lr=1e-6))  # fmt: skip
    plain = leverage(run, batch, centred, optimiser="sgd")
    moved = run.copy()
    loss, _ = moved.loss(batch)
    loss.backward()
    moved.optimiser.clip_grad(run.config.max_grad_norm)
    moved.optimiser.flat.sub_(moved.optimiser.grad, alpha=1e-6)
    with torch.no_grad():
        new, old = (response_logprobs(r.policy, *given)[0].sum(1) for r in (moved, run))
    reweighted = ((new - old).exp() * batch.lengths).sum() / (new - old).exp().sum()
    change = float(reweighted - batch.lengths.double().mean())
    assert float((plain * batch.advantages).sum()) == pytest.approx(change, rel=0.02)
    assert (weights["all"][~batch.mask] == 0).all()


def test_without_a_run_length_moves_by_a_covariance(ready):
    _, batch = ready
    rows = torch.arange(len(batch)) < 30
    weights = length_weights(batch, {"some": rows}, None)[0]["some"]
    mean = (batch.advantages.sum(1) / batch.lengths)[rows]
    expected = np.cov(mean.numpy(), batch.lengths[rows].numpy(), ddof=0)[0, 1]
    assert float((weights * batch.advantages).sum()) == pytest.approx(expected)


# ------------------------------------------------------------------ figures
def test_the_waterfall_starts_each_part_where_the_last_one_ended(ready):
    run, batch = ready
    parts = split(batch, Convention.of(replace(run.config, whiten_advantages="shift_scale")))
    long = batch.lengths >= 4
    sides = part_means(parts, batch.mask, {"verbose": long, "concise": ~long})
    total = (parts.total.sum(1) / batch.lengths)[long].mean()
    assert sides["verbose"]["total"] == pytest.approx(float(total))
    figure = waterfall_figure(sides)
    bars = figure.axes[0].containers[0]
    ends = [bar.get_y() + bar.get_height() for bar in bars]
    assert [bar.get_y() for bar in bars][1:4] == pytest.approx(ends[:3]) and bars[4].get_y() == 0
    assert ends[3] == pytest.approx(ends[4]) and ends[4] == pytest.approx(float(total))
    low, high = figure.axes[0].get_ylim()
    assert low < min(ends) and max(ends) < high
    assert f"total {float(total):+.2f}" in figure.get_label() and "shift" in figure.get_label()


def test_the_fork_reads_both_models_and_the_advantage_of_what_was_taken(ready):
    run, batch = ready
    one = batch.select(torch.tensor([0, 0, 1]))
    changed = one.responses.clone()
    changed[1, 0] = 4 if changed[0, 0] != 4 else 3  # the same prompt, another first word
    one = replace(one, responses=changed)
    p, p0, taken = fork(run.policy, run.reference, one, 0, 0)
    expected = response_outputs(run.policy, one.prompts, one.responses, one.mask)[0][0, 0]
    assert torch.allclose(p, expected.softmax(-1)) and float(p0.sum()) == pytest.approx(1)
    assert not torch.allclose(p, p0)
    mine, other = (int(changed[i, 0]) for i in (0, 1))
    if (one.prompts[2] != one.prompts[0]).any():
        assert taken.keys() == {mine, other}
    assert taken[mine] == pytest.approx(float(one.advantages[0, 0]))
    figure = fork_figure(WORDS, p, p0, taken, top=3)
    assert f"{float(p.max()):.2f}" in figure.get_label()
    widths = [bar.get_width() for bar in figure.axes[0].containers[0]]
    assert widths == sorted(widths, reverse=True) and len(widths) == 3


def test_the_lorenz_curve_of_one_token_and_of_equal_ones():
    one = torch.zeros(10)
    one[3] = -4.0
    assert concentration(one.abs()) == 1.0 and concentration(torch.ones(10)) == pytest.approx(0.2)
    assert "A fifth of the tokens carries 100%" in lorenz_figure(one).get_label()
    line = lorenz_figure(torch.arange(1.0, 5.0)).axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([0, 0.1, 0.3, 0.6, 1])


def test_the_colours_of_the_sides_are_not_those_of_up_and_down():
    sides = {look["color"] for look in batch_plots.SIDE.values()}
    assert len(sides) == 2 and not sides & {BLUE, ORANGE, VERMILLION}
