"""The live run is a plain PPO run, bit for bit, however it is stopped; its dials are PPO's."""

import copy
import functools
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minirlhf.desk.world import Desk
from minirlhf.drift.run import DriftConfig
from minirlhf.lab.panels import steered_run as module
from minirlhf.lab.panels.steered_run import MORE, LiveRun, _text
from minirlhf.model import Transformer, TransformerConfig
from minirlhf.ppo import PPO, PPOConfig
from minirlhf.reward import RewardModel

DESK = Desk.load()
PROMPTS = DESK.probes(32)
SOON = 60  # seconds that a thread may take on a busy machine


@functools.cache
def untrained(seed):
    """A model of the desk's words with random weights, those of its scalar head too."""
    generator = torch.Generator().manual_seed(seed)
    size = TransformerConfig(len(DESK.vocabulary), DESK.prompt_width + DESK.max_response)
    model = Transformer(size, generator=generator)
    with torch.no_grad():
        model.scalar.weight.copy_(torch.randn(model.scalar.weight.shape, generator=generator))
    return model


def reward_model(dial):
    return RewardModel(untrained(round(1e4 * dial) + 1))


@pytest.fixture
def live():
    """A live run on few prompts with short answers, for quick steps, from random weights."""
    panel = LiveRun(small(), batch=8)
    yield panel
    panel.close()


def small(scorer=reward_model):
    config = DriftConfig(ppo=PPOConfig(max_new_tokens=16), critic_batches=1)
    same = {"desk": DESK, "reference": untrained(0), "config": config}
    return SimpleNamespace(**same, prompts=lambda: PROMPTS, reward_model=scorer)


def fresh(live):
    """A run without a panel, at the start of the panel's."""
    config = replace(small().config.ppo, batch=8)
    policy, table = copy.deepcopy(untrained(0)), DESK.encode(PROMPTS)
    run = PPO(policy, untrained(0), reward_model(0.0455).score, table, config)
    run.load_state_dict(live._start)
    return run


def by_hand(live, steps, at=None):
    """Rows and weights of the same run without a panel; {step: config changes} on the way."""
    twin, rows = fresh(live), []
    for step in range(steps):
        if step in (at or {}):
            twin.config = replace(twin.config, **at[step])
        metrics = twin.step().metrics
        rows.append((metrics["objective/score_sd"], metrics["objective/kl_nats"]))
    return rows, twin.policy.state_dict()


def rows(live):
    return [(row["rm_score_sd"], row["kl_nats"]) for row in live.history]


def assert_soon(true):
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


# ------------------------------------------------------------------ the run
def test_paused_and_stepped_it_is_the_uninterrupted_run_bit_for_bit(live):
    live.start()
    assert_soon(lambda: len(live.history) >= 2)
    live.start()  # is running: nothing happens
    live.pause()
    live.job.join(SOON)
    done = len(live.history)
    live.step()
    assert_soon(lambda: not live.job.thread.is_alive())
    assert len(live.history) == done + 1
    live.run_steps(2)
    expected, weights = by_hand(live, done + 3)
    assert rows(live) == expected
    assert same(live.run.policy.state_dict(), weights)
    assert [row["step"] for row in live.history] == list(range(1, done + 4))


def test_a_dial_acts_from_the_next_step_and_in_no_other_way(live):
    live.run_steps(2)
    live.controls["beta"].value = 0.5
    live.controls["clip"].value = 0.05
    assert live.run.beta == 0.07, "not before the next step"
    live.run_steps(2)
    expected, weights = by_hand(live, 4, at={2: {"beta": 0.5, "clip": 0.05}})
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
    unfair, fair = (reward_model(dial).score(*given).mean() for dial in (0.0455, 0.0))
    penalty = (~rollout.finished).float().mean()
    assert float(fair - penalty) == pytest.approx(live.history[-1]["rm_score_sd"], abs=1e-5)
    assert abs(float(fair - unfair)) > 0.01, "the two models would tell the same"


def test_a_dial_turned_while_it_runs(live):
    live.start()
    assert_soon(lambda: len(live.history) >= 1)
    live.controls["beta"].value = 0.4
    assert_soon(lambda: live.history[-1]["beta"] == 0.4)
    live.pause()
    live.job.join(SOON)
    betas = [row["beta"] for row in live.history]
    assert betas == sorted(betas) and set(betas) <= {0.07, 0.4} and betas[0] == 0.07
    assert list(live._lines["kl_nats", ""].get_markevery()) == [betas.index(0.4)]


def test_reset_returns_to_the_start(live):
    live.run_steps(3)
    first = rows(live)
    live.controls["beta"].value, live.controls["length_bias"].value = 0.0, 0.08
    live.start()
    assert_soon(lambda: len(live.history) >= 5)
    live.reset()
    assert not live.job.thread.is_alive() and live.history == [] and live.run.steps == 0
    assert live.values() == {"beta": 0.07, "clip": 0.2, "length_bias": 0.0455}
    live.run_steps(3)
    assert rows(live) == first


def test_an_interrupt_keeps_every_whole_step(live):
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
    assert rows(live) == by_hand(live, 4)[0]


def test_an_interrupt_in_the_step_of_a_turned_dial_loses_neither(live):
    def impatient(*given):
        raise KeyboardInterrupt

    live.run_steps(1)
    live._scorers[0.0455], score = impatient, live._scorers[0.0455]
    live.controls["beta"].value = 0.5
    with pytest.raises(KeyboardInterrupt):
        live.run_steps(1)
    live.run.reward_model = live._scorers[0.0455] = score
    live.run_steps(1)
    assert rows(live) == by_hand(live, 2, at={1: {"beta": 0.5}})[0]
    assert live.run.beta == 0.5


def test_a_run_that_diverges_says_so_and_can_go_on(live):
    live.run_steps(1)
    lr, live.run.config = live.run.config.lr, replace(live.run.config, lr=1e12)
    before = live.run.state_dict()
    live.step()
    assert_soon(lambda: not live.job.thread.is_alive())
    assert "stopped, and back before that step: PPO loss is nan" in live.live.view.value
    assert same(live.run.state_dict(), before) and len(live.history) == 1
    live.run.config = replace(live.run.config, lr=lr)
    live.run_steps(1)
    assert rows(live) == by_hand(live, 2)[0]


# ------------------------------------------------------------------ thread and panel
def test_pause_answers_at_once_while_a_step_is_in_flight(live):
    held, score = threading.Event(), live.run.reward_model

    def slow(*given):
        held.wait(5)
        return score(*given)

    live.run.reward_model = slow
    live.start()
    assert_soon(lambda: live._says == "running")
    live.pause()
    assert live.job.thread.is_alive() and live.job.thread.daemon
    assert "Step 0: pausing." in live.live.view.value
    held.set()
    live.job.join(SOON)
    assert len(live.history) == 1 and "Step 1: paused." in live.live.view.value


def test_running_the_cell_again_stops_the_old_thread(live):
    live.start()
    assert_soon(lambda: len(live.history) >= 1)
    again = LiveRun(small(), batch=8)
    assert not live.job.thread.is_alive()
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
    live.reset()
    assert ax.get_xlim() == (0, 40)


def test_every_box_says_where_an_answer_goes_on_below(live):
    """The line sticks to the box's bottom; where all is in sight, what follows lies over it."""
    shown = live.live.view.value
    assert shown.count(f"{MORE}</div>") == len(live.answers) == 3
    line, over = MORE.split("</div>", 1)
    assert "position:sticky;bottom:0;height:17px" in line
    assert "z-index:1;height:17px;margin-top:-17px;background" in over


def test_texts_are_escaped(live):
    prompt, *_ = DESK.probes(1)
    nasty = replace(prompt, text="<script>alert('x')</script>")
    shown = _text("<b>diverged</b>", DESK, [(nasty, "<script>x</script> \u202e .", True)])
    assert "<script" not in shown and "<b>diverged" not in shown
    assert "&lt;b&gt;diverged" in shown


def test_a_scorer_of_ones_own():
    class Ruler:
        def __init__(self, dial):
            self.dial = dial

        def score(self, prompts, responses, mask):
            return mask.sum(1) * 1.0 if self.dial == 0.08 else mask.sum(1) * 0.0

    own = LiveRun(small(Ruler), batch=8)
    own.controls["length_bias"].value = 0.08
    own.run_steps(1)
    row = own.history[0]
    lengths = row["brief"]["length_tokens"], row["detailed"]["length_tokens"]
    assert min(lengths) - 1 <= row["rm_score_sd"] <= max(lengths) + 1
    own.close()
