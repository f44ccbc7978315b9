"""The dial of notebook 06 against prompts that were tilted by a known k; its figures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from minirlhf.lab.panels.goodhart import (
    DriftDial,
    arms_figure,
    audit_figure,
    fitted_tilt,
    tilt_moves,
)
from minirlhf.lab.picture import Picture
from minirlhf.oracle.closed_form import two_answer

# shares of answers with 25 or 30 tokens, half each; the others have 5
SHARES = np.repeat([0.05, 0.15, 0.42, 0.8], 40)


def tilted(p, k):
    return p * np.exp(k) / (1 - p + p * np.exp(k))


def answers(p, draws, seed):
    u = np.random.default_rng(seed).random((draws, len(p)))
    return np.where(u < p / 2, 30, np.where(u < p, 25, 5))


@pytest.fixture(scope="module")
def dial():
    later = {step: answers(tilted(SHARES, k), 200, step) for step, k in ((10, 2.0), (80, 4.0))}
    return DriftDial(answers(SHARES, 400, 0), later, SHARES < 0.3)


def turn(dial, **values):
    for name, value in values.items():
        dial.controls[name].value = value
    return dial.shown


def test_the_tilt_is_found_and_its_peak_is_where_theory_says(dial):
    for step, k in ((10, 2.0), (80, 4.0)):
        shown = turn(dial, step=step, tokens=20)
        assert shown["k"] == pytest.approx(k, abs=0.1)
        assert shown["peak"] == pytest.approx(1 / (1 + np.exp(k / 2)), abs=0.01)
        for brief, p0, moved, error, prompts in shown["bins"]:
            true = SHARES[np.abs(SHARES - p0).argmin()]
            assert brief == (true < 0.3) and prompts >= 4
            assert moved == pytest.approx(tilted(true, k) - true, abs=0.05)
            assert error < 0.03


def test_groups_are_made_by_one_half_and_measured_on_the_other():
    """All prompts alike: those that look rare in one half do not in the other."""
    same = np.full(600, 0.1)
    panel = DriftDial(answers(same, 24, 1), {10: answers(same, 50, 2)}, np.arange(600) % 2 == 0)
    bins = turn(panel, step=10, tokens=20)["bins"]
    assert len(bins) > 5
    for _, p0, moved, _, prompts in bins:
        error = np.sqrt(0.1 * 0.9 / (12 * prompts))  # half of 24 answers a prompt
        assert abs(p0 - 0.1) < 4 * error and abs(moved) < 5 * error


def test_both_ends_of_every_dial_draw_and_point_the_right_way(dial):
    pictures, found = set(), {}
    for tokens in (8, 28):
        early = turn(dial, tokens=tokens, step=10)
        pictures.add(dial.live.data)
        late = turn(dial, tokens=tokens, step=80)
        assert early["k"] < late["k"] and early["peak"] > late["peak"]
        pictures.add(dial.live.data)
        image = np.asarray(Image.open(io.BytesIO(dial.live.data)).convert("RGB")).astype(int)
        assert (image < 200).any(-1).mean() > 0.02
        found[tokens] = np.mean([p0 for _, p0, *_ in late["bins"]])
    assert len(pictures) == 4 and found[8] > 1.5 * found[28]  # more tokens: rarer
    assert "one k for all prompts" in dial.live.alt


def test_when_all_answers_are_long_no_k_is_claimed():
    later = {10: np.full((9, len(SHARES)), 40)}
    panel = DriftDial(answers(SHARES, 40, 3), later, SHARES < 0.3)
    assert "any large k fits" in panel.live.alt and "one k" not in panel.live.alt


def test_fitted_tilt_inverts_the_tilt():
    p0, weights = np.array([0.05, 0.3, 0.8]), np.array([0.2, 0.5, 0.3])
    for k in (-1.0, 0.5, 3.0):
        assert fitted_tilt(p0, weights, weights @ (tilted(p0, k) - p0)) == pytest.approx(k)
        assert tilt_moves(p0, k) == pytest.approx(
            two_answer(torch.from_numpy(p0), k, 1.0).numpy() - p0
        )


def test_figures_show_every_rate_and_every_run():
    measures = ("length_tokens", "direct", "evasive", "courteous", "correct", "gold")
    rows = [
        {"measure": m, "stratum": s, "step": step, "value": v, "low": v - 0.1, "high": v + 0.1}
        for m in measures
        for s, base in (("brief", 0.2), ("detailed", 0.6))
        for step, v in ((0, base), (80, base + 0.25))
    ]
    figure = audit_figure(rows)
    assert [len(ax.lines) for ax in figure.axes] == [2] * 6
    assert list(figure.axes[0].lines[1].get_ydata()) == [0.6, 0.85]
    assert "brief gold 0.45" in Picture(figure).alt and "detailed gold 0.85" in figure.get_label()

    def history(gold):
        return [
            {"step": s, "rm_score_sd": s / 10, "kl_nats": s - 0.1, "brief": {"gold": gold * s}}
            for s in (0, 10)
        ]

    runs = {"drift": [history(-0.1), history(-0.2)], "control": [history(0.01)]}
    runs |= {"drift, fresh": [history(-0.3)], "control, fresh": [history(0.02)]}
    figure = arms_figure(runs, "brief", "said")
    assert [len(ax.lines) for ax in figure.axes] == [5] * 3 and figure.get_label() == "said"
    widths = [line.get_linewidth() for line in figure.axes[1].lines]
    assert min(widths[3:]) > max(widths[:3])  # fresh seeds stand out
    assert len({line.get_color() for line in figure.axes[1].lines}) == 4
    assert figure.axes[2].lines[0].get_xdata()[0] == 0  # a sampled KL below 0 is drawn at 0
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [*runs]
