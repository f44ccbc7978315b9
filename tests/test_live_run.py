"""The live run is a plain PPO run, bit for bit, however it is stopped; its dials are PPO's."""

import copy
import functools
import threading
import time
from dataclasses import replace

import pytest
import torch

from minirlhf.lab import live_run as module
from minirlhf.lab.live_run import LiveRun, _text, live_run
from minirlhf.ppo import PPO
from minirlhf.shipped import shipped

CASE = shipped()
SOON = 60  # seconds that a thread may take on a busy machine


@pytest.fixture(scope="module")
def made():
    """The course's live run, small; and the state that it starts from."""
    panel = live_run(CASE, batch=8)
    run, start = panel.run, panel.run.state_dict()
    panel.close()
    config = replace(run.config, max_new_tokens=16)  # shorter answers, quicker steps
    return panel, start, config


def fresh(made):
    """A run of its own, at the start."""
    panel, start, config = made
    score, table = panel.run.reward_model, panel.run.prompts
    run = PPO(copy.deepcopy(CASE.reference), CASE.reference, score, table, config)
    run.load_state_dict(start)
    return run


def panel_of(made, scorers=None):
    panel = made[0]
    scorers = scorers or panel._scorers
    return LiveRun(fresh(made), CASE.desk, panel._prompts, scorers, length_bias=0.0455)


@pytest.fixture
def live(made):
    panel = panel_of(made)
    yield panel
    panel.close()


@pytest.fixture
def by_hand(made):
    """Rows and weights of the same run without a panel; {step: config changes} on the way."""
    return functools.partial(_by_hand, made)


def _by_hand(made, steps, at=None):
    twin, rows = fresh(made), []
    for step in range(steps):
        if step in (at or {}):
            twin.config = replace(twin.config, **at[step])
        metrics = twin.step().metrics
        rows.append((metrics["objective/score_sd"], metrics["objective/kl_nats"]))
    return rows, twin.policy.state_dict()


def rows(live):
    return [(row["rm_score_sd"], row["kl_nats"]) for row in live.history]


def wait(true):
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


# ------------------------------------------------------------------ the run
def test_paused_and_stepped_it_is_the_uninterrupted_run_bit_for_bit(live, by_hand):
    live.start()
    wait(lambda: len(live.history) >= 2)
    live.start()  # is running: nothing happens
    live.pause()
    live._thread.join(SOON)
    done = len(live.history)
    live.step()
    wait(lambda: not live._thread.is_alive())
    assert len(live.history) == done + 1
    live.run_steps(2)
    expected, weights = by_hand(done + 3)
    assert rows(live) == expected
    assert same(live.run.policy.state_dict(), weights)
    assert [row["step"] for row in live.history] == list(range(1, done + 4))


def test_a_dial_acts_from_the_next_step_and_in_no_other_way(live, by_hand):
    live.run_steps(2)
    live.controls["beta"].value = 0.5
    live.controls["clip"].value = 0.05
    assert live.run.beta == 0.07, "not before the next step"
    live.run_steps(2)
    expected, weights = by_hand(4, at={2: {"beta": 0.5, "clip": 0.05}})
    assert rows(live) == expected and live.run.beta == 0.5
    assert same(live.run.policy.state_dict(), weights)
    assert [row["beta"] for row in live.history] == [0.07, 0.07, 0.5, 0.5]
    assert "beta 0.50, epsilon 0.05, length bias 0.0455" in live.live.alt


def test_the_length_bias_swaps_what_pays_the_run(live):
    live.run_steps(1)
    live.controls["length_bias"].value = 0.0
    before = live.run.state_dict()
    live.run_steps(1)
    assert live.history[-1]["length_bias"] == 0.0
    live.run.load_state_dict(before)  # the batch of that step again, scored by hand
    rollout, _ = live.run.rollout()
    given = (rollout.prompts, rollout.responses, rollout.mask)
    unfair, fair = (CASE.reward_model(dial).score(*given).mean() for dial in (None, 0.0))
    penalty = (~rollout.finished).float().mean()
    assert float(fair - penalty) == pytest.approx(live.history[-1]["rm_score_sd"], abs=1e-5)
    assert abs(float(fair - unfair)) > 0.01, "the two models would tell the same"


def test_a_dial_turned_while_it_runs(live):
    live.start()
    wait(lambda: len(live.history) >= 1)
    live.controls["beta"].value = 0.4
    wait(lambda: live.history[-1]["beta"] == 0.4)
    live.pause()
    live._thread.join(SOON)
    betas = [row["beta"] for row in live.history]
    assert betas == sorted(betas) and set(betas) <= {0.07, 0.4} and betas[0] == 0.07
    assert live._turns == [betas.index(0.4) + 1]


def test_reset_returns_to_the_start(live):
    live.run_steps(3)
    first = rows(live)
    live.controls["beta"].value, live.controls["length_bias"].value = 0.0, 0.08
    live.start()
    wait(lambda: len(live.history) >= 5)
    live.reset()
    assert not live._thread.is_alive() and live.history == [] and live.run.steps == 0
    assert live.values() == {"beta": 0.07, "clip": 0.2, "length_bias": 0.0455}
    live.run_steps(3)
    assert rows(live) == first


def test_an_interrupt_keeps_every_whole_step(live, by_hand):
    calls, score = [], live.run.reward_model

    def impatient(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*given)

    live.run.reward_model = impatient
    with pytest.raises(KeyboardInterrupt):
        live.run_steps(9)
    assert len(live.history) == live.run.steps == 2 and "interrupted" in live.live.alt
    live.run_steps(2)
    assert rows(live) == by_hand(4)[0]


def test_a_run_that_diverges_says_so_and_can_go_on(live, by_hand):
    live.run_steps(1)
    lr, live.run.config = live.run.config.lr, replace(live.run.config, lr=1e12)
    before = live.run.state_dict()
    live.step()
    wait(lambda: not live._thread.is_alive())
    assert "stopped, and back before that step: PPO loss is nan" in live.live.view.value
    assert same(live.run.state_dict(), before) and len(live.history) == 1
    live.run.config = replace(live.run.config, lr=lr)
    live.run_steps(1)
    assert rows(live) == by_hand(2)[0]


# ------------------------------------------------------------------ thread and panel
def test_pause_answers_at_once_while_a_step_is_in_flight(live):
    held, score = threading.Event(), live.run.reward_model

    def slow(*given):
        held.wait(SOON)
        return score(*given)

    live.run.reward_model = slow
    live.start()
    wait(lambda: live._says == "running")
    live.pause()
    assert live._thread.is_alive() and live._thread.daemon
    assert "Step 0: pausing." in live.live.view.value
    held.set()
    live._thread.join(SOON)
    assert len(live.history) == 1 and "Step 1: paused." in live.live.view.value


def test_running_the_cell_again_stops_the_old_thread(live, made):
    live.start()
    wait(lambda: len(live.history) >= 1)
    again = panel_of(made)
    assert not live._thread.is_alive()
    assert again.history == []
    again.close()


def test_at_most_ten_pictures_a_second(live, monkeypatch):
    shown = []
    live.live.view.observe(lambda change: shown.append(time.perf_counter()), "value")
    monkeypatch.setattr(module, "EVERY", 0.5)
    start = time.perf_counter()
    live.run_steps(12)
    assert len(shown) <= (time.perf_counter() - start) / 0.5 + 2  # and one at the end
    assert len(live._lines["kl_nats", ""].get_xdata()) == 12, "the last picture shows all"


def test_picture_and_text_are_one_message_and_the_page_never_jumps(live):
    sent = []
    live.live.view.observe(lambda change: sent.append(change["new"]), "value")
    live.run_steps(1)
    assert len(sent) == 1
    assert sent[0].index("Step 1: paused.") < sent[0].index("<img alt=")
    asked = module.html.escape(live.answers[0][0].text.removesuffix(" <sep>"))
    assert len(live.answers) == 3 and asked in sent[0]


def test_a_slider_alone_changes_the_picture(live):
    pictures = [live.live.data]
    for name, value in (("beta", 0.5), ("clip", 0.9), ("length_bias", 0.0)):
        live.controls[name].value = value
        pictures.append(live.live.data)
    assert len(set(pictures)) == 4


def test_limits_widen_where_the_run_leaves_them(live):
    live.run_steps(1)
    last = live.history[-1]
    live.history += [last | {"step": step, "kl_nats": 150.0} for step in range(2, 43)]
    live.update()
    ax = live._lines["kl_nats", ""].axes
    assert ax.get_xlim() == (0, 80) and ax.get_ylim()[1] >= 150
    assert live._lines["gold", "brief"].axes.get_xlim() == (0, 80), "all plots share the steps"


def test_texts_are_escaped(live):
    prompt, *_ = CASE.desk.probes(1)
    nasty = replace(prompt, text="<script>alert('x')</script>")
    shown = _text("<b>diverged</b>", CASE.desk, [(nasty, "<script>x</script> \u202e .", True)])
    assert "<script" not in shown and "<b>diverged" not in shown
    assert "&lt;b&gt;diverged" in shown


def test_a_scorer_of_ones_own(live, made):
    scorers = {0.0455: live.run.reward_model, 1.0: lambda p, r, m: m.sum(1).float()}
    own = panel_of(made, scorers)
    own.controls["length_bias"].value = 1.0
    own.run_steps(1)
    row = own.history[0]
    lengths = row["brief"]["length_tokens"], row["detailed"]["length_tokens"]
    assert min(lengths) - 1 <= row["rm_score_sd"] <= max(lengths) + 1
    own.close()
