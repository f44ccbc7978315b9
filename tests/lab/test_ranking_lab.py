"""Notebook 03's figure and dial: what is handed in is what is shown, and a training can be left."""

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from minirlhf.lab.panels.ranking import LengthDial

DIALS = (0.0, 0.02, 0.0455, 0.08)


def labelers(bias):
    """More likely with the bias, even at 0.03 (what gold charges for a token)."""
    return {"brief": 1 / (1 + np.exp(-40 * (bias - 0.03))), "detailed": 0.5 + 5 * (bias - 0.03)}


COMPUTED = {d: {s: (p, 10 * (d - 0.03)) for s, p in labelers(d).items()} for d in DIALS}


def dial(learn=lambda bias, progress: dict.fromkeys(("brief", "detailed"), (0.9, 1.5))):
    return LengthDial(labelers, COMPUTED, learn, 0.0455)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_both_ends_of_the_dial_show_what_theory_says():
    panel, seen = dial(), []
    for low in (True, False):
        bias = panel.controls["bias"]
        bias.value = bias.min if low else bias.max
        assert (
            panel.shown["bias"] == panel.shown["nearest"] == bias.value == DIALS[0 if low else -1]
        )
        assert (panel.shown["labelers"]["brief"] < 0.5) == low
        sign = "-0.30" if low else "+0.50"
        assert f"worth {sign} on brief and {sign} on detailed" in panel.live.alt
        seen.append(pixels(panel.live.data))
        assert (seen[-1] < 200).any(-1).sum() > 2000  # not an empty plot
    assert (np.abs(seen[0] - seen[1]).max(-1) > 32).sum() > 200


@pytest.mark.parametrize(
    ("bias", "near"), [(0.0095, 0.0), (0.0105, 0.02), (0.06, 0.0455), (0.064, 0.08)]
)
def test_it_snaps_to_the_nearest_model_and_says_so(bias, near):
    panel = dial()
    panel.controls["bias"].value = bias
    assert panel.shown["nearest"] == near
    assert f"At {bias:.4f}" in panel.live.alt and f"beforehand, {near:.4f}:" in panel.live.alt
    assert panel.live.alt in panel.caption.value  # on screen, not in the alt text alone
    assert panel.shown["labelers"] == labelers(bias)


def test_every_step_of_the_dial_is_one_that_a_browser_can_take():
    bias = dial().controls["bias"]
    for value in (bias.value, bias.max):
        steps = (value - bias.min) / bias.step
        assert abs(steps - round(steps)) < 1e-6


def test_training_shows_progress_then_a_star_that_stays():
    said = []

    def learn(bias, progress):
        for step in (1, 2):
            progress(step, 2, {})
            said.append(panel._note.value)
        return {"brief": (0.9, 1.5), "detailed": (0.8, 1.2)}

    panel = dial(learn)
    before = pixels(panel.live.data)
    panel.row.children[0].click()
    panel.job.join(10)
    assert said == ["0.0455: step 1 of 2", "0.0455: step 2 of 2"]
    assert panel._note.value == "0.0455: trained"
    assert panel.shown["trained"] == {0.0455: {"brief": (0.9, 1.5), "detailed": (0.8, 1.2)}}
    assert "Trained here at 0.0455: one courtesy phrase is worth +1.50 on brief" in panel.live.alt
    assert (before != pixels(panel.live.data)).any()
    panel.controls["bias"].value = 0.0  # the star stays where it was trained
    assert list(panel.shown["trained"]) == [0.0455] and "Trained here at 0.0455" in panel.live.alt


def endless(bias, progress):
    for step in range(100_000):
        progress(step, 100_000, {})
        time.sleep(0.001)
    return {}


def test_cancel_ends_the_training_and_leaves_the_old_picture():
    panel = dial(endless)
    picture, alt = panel.live.data, panel.live.alt
    panel.row.children[0].click()
    while "step" not in panel._note.value:
        time.sleep(0.005)
    panel.row.children[1].click()
    assert not panel.job.thread.is_alive()
    assert "cancelled, nothing changed" in panel._note.value
    assert (panel.live.data, panel.live.alt, panel.shown["trained"]) == (picture, alt, {})
    panel.stop()  # nothing to stop: no error


def test_a_second_start_stops_the_first_and_the_dial_stays_usable():
    panel, threads = dial(endless), threading.active_count()
    panel.start()
    first = panel.job.thread
    panel.controls["bias"].value = 0.02
    assert panel.shown["nearest"] == 0.02
    panel.start()
    assert not first.is_alive() and panel.job.busy
    panel.stop()
    assert threading.active_count() == threads


def test_a_training_that_fails_says_why():
    def learn(bias, progress):
        raise FloatingPointError("lower reward.lr")

    panel = dial(learn)
    panel.start()
    panel.job.join(10)
    assert panel._note.value == "0.0455: failed, FloatingPointError: lower reward.lr"
    assert panel.shown["trained"] == {}


def test_reset_forgets_what_was_trained_and_goes_back():
    panel = dial()
    before = panel.live.data
    panel.controls["bias"].value = 0.08
    panel.start()
    panel.job.join(10)
    assert panel.shown["trained"] and panel._note.value and panel.live.data != before
    panel.reset()
    assert panel.shown["trained"] == {} and panel._note.value == ""
    assert panel.controls["bias"].value == panel.shown["bias"] == 0.0455
    assert panel.live.data == before and "Trained here" not in panel.caption.value
