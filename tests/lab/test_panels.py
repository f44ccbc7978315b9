"""Panels: what the controls say is what is shown, from any thread, with and without a kernel."""

import base64
import io
import threading

import numpy as np
import pytest
import torch
from fake_case import STEPS, case
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from minirlhf.desk.config import PreferenceConfig
from minirlhf.desk.preferences import label_probability, make_pairs, raw_bias, relabel
from minirlhf.desk.world import Desk
from minirlhf.lab.panels.first_look import FirstLook, _text_html
from minirlhf.lab.panels.labelers import LabelerDials, expected_bias
from minirlhf.lab.panels.next_word import NextWord
from minirlhf.lab.picture import LiveFigure, Panel, slider
from minirlhf.lab.plots import blank
from minirlhf.model import Transformer, TransformerConfig

DESK = Desk.load()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def dot_panel(name="dot"):
    """One dot that follows one slider; `move` says where it is."""
    figure = blank(3, 2)
    ax = figure.subplots()
    ax.set(xlim=(0, 10), ylim=(-1, 1))
    (dot,) = ax.plot([0], [0], "o", ms=20)

    def move(at):
        dot.set_xdata([at])
        return f"at <{at:.0f}>"

    return Panel(
        name, {"at": slider("at", 0, 0, 10, 1)}, LiveFigure(figure, [dot], width=300), move
    )


# ------------------------------------------------------------------ LiveFigure and Panel
def test_a_blit_is_the_picture_that_a_full_draw_gives():
    panel = dot_panel()
    start = pixels(panel.live.data)
    panel.controls["at"].value = 7
    blitted = pixels(panel.live.data)
    assert (start != blitted).any()
    figure = blank(3, 2)
    ax = figure.subplots()
    ax.set(xlim=(0, 10), ylim=(-1, 1))
    ax.plot([7], [0], "o", ms=20)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    full = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    assert (np.abs(full - blitted).max(-1) > 32).mean() < 0.005
    panel.controls["at"].value = 0  # nothing of the earlier dot is left behind
    assert (pixels(panel.live.data) == start).all()


def test_the_view_holds_the_picture_and_its_escaped_sentence():
    panel = dot_panel()
    panel.controls["at"].value = 3
    value = panel.live.view.value
    assert 'alt="at &lt;3&gt;"' in value and panel.live.alt == "at <3>"
    assert base64.b64encode(panel.live.data).decode() in value


def test_a_page_without_a_kernel_gets_a_picture_and_no_html():
    data, notes = dot_panel()._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    assert pixels(base64.b64decode(data["image/png"])).shape == (200, 300, 3)
    assert data["text/plain"] == "at <0>" == notes["image/png"]["alt"]


def test_the_cell_run_again_closes_the_panel_before():
    first, other = dot_panel(), dot_panel("another")
    second = dot_panel()
    assert first.comm is None and first.controls["at"].comm is None
    assert first.live.view.comm is None
    assert second.comm is not None and other.comm is not None


def test_many_threads_may_turn_the_dials():
    panel, errors = dot_panel(), []

    def turn(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(20):
                panel.controls["at"].value = int(rng.integers(0, 11))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=turn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    panel.update()
    assert not errors
    data, alt, at = panel.live.data, panel.live.alt, panel.controls["at"].value
    again = dot_panel()
    again.controls["at"].value = at
    assert alt == again.live.alt == f"at <{at}>"
    assert data == again.live.data


# ------------------------------------------------------------------ notebook 00
def test_first_look_shows_the_rows_of_the_table():
    run = case()
    look = FirstLook(run)
    step, probe = look.controls["step"], look.controls["probe"]
    assert (step.min, step.max, step.step) == (0, 20, 10) and step.value == STEPS[-1]
    for at in (STEPS[0], STEPS[1], STEPS[-1]):
        for i in (0, 3, 15):
            step.value, probe.value = at, i
            table = run.answers.set_index(["step", "probe"])
            for name, s in (("before", STEPS[0]), ("now", at)):
                row = table.loc[(s, i)]
                shown = look.shown[name]
                assert shown["step"] == s
                for key in ("answer", "length_tokens", "rm_score_sd", "gold"):
                    assert shown[key] == row[key]
            assert f"gold {table.loc[(at, i)].gold:+.2f} points" in look.live.alt


def test_uneven_audits_show_the_last_one_so_far():
    run = case()
    run.summary["history"][1]["step"], late = 15, {10: 15, 20: 20}
    run.answers["step"] = run.answers.step.replace(late)
    look = FirstLook(run)
    dial = look.controls["step"]
    assert dial.step == 5 and (dial.min, dial.max) == (0, 20)
    for at, shown in ((5, 0), (15, 15), (20, 20), (10, 0)):
        dial.value = at
        assert look.shown["now"]["step"] == shown and f"step {shown} says" in look.live.alt
        assert look._marks[0].get_xdata()[0] == shown
    assert pixels(look.still()[0]).any()


def test_no_two_prompts_of_the_list_read_the_same():
    names = [name for name, _ in FirstLook(case()).controls["probe"].options]
    assert len(set(names)) == len(names) == 16
    asked = [name.split(". ", 1)[1] for name in names]
    assert len(set(asked)) == len(asked), "the customer's question and fact tell them apart too"


def test_first_look_moves_its_markers():
    look = FirstLook(case())
    look.controls["step"].value = STEPS[1]
    line, _, score, brief, detailed = look._marks
    entry = case().summary["history"][1]
    assert list(line.get_xdata()) == [STEPS[1]] * 2
    assert list(score.get_ydata()) == [entry["rm_score_sd"]]
    golds = [brief.get_ydata()[0], detailed.get_ydata()[0]]
    assert golds == [entry["brief"]["gold"], entry["detailed"]["gold"]]


def test_first_look_escapes_and_survives_odd_answers():
    run = case()
    late = run.answers.step == STEPS[-1]
    odd = {0: "", 1: "<script>alert(1)</script> & .", 2: ". . .", 3: " ".join(["it ."] * 24)}
    for probe, text in odd.items():
        run.answers.loc[late & (run.answers.probe == probe), "answer"] = text
    run.answers["finished"] = False
    look = FirstLook(run)
    for probe in odd:
        look.controls["probe"].value = probe
        page = look.children[2].value
        assert "<script>" not in page and "cut off" in page
        assert pixels(look.still()[0]).shape[1] == 960


def test_a_desk_may_hold_any_word_in_its_prompts():
    look = FirstLook(case())
    row = look.shown["now"] | {"prompt": "eta <b> . when & why ? <sep>"}
    page = _text_html({"before": row, "now": row}, [[], []])
    assert "eta &lt;b&gt; . when &amp; why ?" in page and "<sep>" not in page


def test_first_look_fits_a_small_screen():
    look = FirstLook(case())
    height = pixels(look.still()[0]).shape[0]
    assert height <= 640
    # two controls, the text of fixed height, the figure: CSS pixels
    figure = look.live._canvas.figure
    assert 2 * 32 + (20 + 20 + 180 + 40 + 8) + figure.get_figheight() * 100 < 600


def test_first_look_refuses_the_answers_of_another_desk():
    run = case()
    run.answers.loc[run.answers.probe == 4, "prompt"] = "who are you ? <sep>"
    with pytest.raises(ValueError, match="other probes"):
        FirstLook(run)


def test_the_saved_picture_holds_both_answers():
    look = FirstLook(case())
    before = pixels(look.still()[0])
    look.controls["probe"].value = 5
    after = pixels(look.still()[0])
    half, top = before.shape[1] // 2, before.shape[0] // 2
    for side in (np.s_[:top, :half], np.s_[:top, half:]):
        assert (before[side] != after[side]).any()


# ------------------------------------------------------------------ notebook 01
@pytest.fixture(scope="module")
def pairs():
    return make_pairs(DESK, PreferenceConfig(pairs=1500), np.random.default_rng(0))


def test_expected_bias_is_the_mean_of_many_labellings(pairs):
    config = PreferenceConfig(length_bias=0.05, hedge_bias=0.3, skim=0.5)
    found = expected_bias(pairs.train, config)
    draws = [
        raw_bias(relabel(pairs, config, np.random.default_rng(seed)).train) for seed in range(40)
    ]
    for key, value in found.items():
        seen = np.array([draw[key] for draw in draws])
        assert abs(seen.mean() - value) < 4 * seen.std() / np.sqrt(len(seen)) + 1e-9, key


def test_expected_bias_does_not_depend_on_who_won(pairs):
    config = PreferenceConfig()
    swapped = pairs.train.swap(np.random.default_rng(0).random(len(pairs.train)) < 0.5)
    assert expected_bias(swapped, config) == pytest.approx(expected_bias(pairs.train, config))


def test_labeler_dials_reach_from_fair_to_caricature(pairs):
    panel = LabelerDials(pairs.train, PreferenceConfig())
    for control in panel.controls.values():
        control.value = control.min
    fair = PreferenceConfig(length_bias=0, hedge_bias=0, skim=0)
    assert panel.shown == expected_bias(pairs.train, fair)
    assert panel.shown["longer_wins_matched"] < 0.5 and panel.shown["hedged_wins_matched"] < 0.5
    for control in panel.controls.values():
        control.value = control.max
    assert min(panel.shown.values()) > 0.5
    assert f"{panel.shown['longer_wins']:.0%}" in panel.live.alt
    assert "expected over" in panel.live.alt  # a drawn share is another number
    assert panel.live._canvas.figure.axes[0].get_xlabel().startswith("expected share")


def test_the_browser_need_not_move_a_dial_onto_a_step(pairs):
    for control in LabelerDials(pairs.train, PreferenceConfig()).controls.values():
        steps = (control.value - control.min) / control.step
        assert abs(steps - round(steps)) < 1e-6


def test_skimmers_do_not_see_the_fact(pairs):
    one = pairs.train.select(np.arange(len(pairs.train)))
    config = PreferenceConfig(length_bias=0, hedge_bias=0, skim=1.0)
    gold = one.gold_chosen - one.gold_rejected
    fact = one.fact_chosen - one.fact_rejected
    p = label_probability(gold, fact, fact * 0, fact * 0, config)
    assert np.allclose(p, label_probability(gold - fact, fact * 0, fact * 0, fact * 0, config))


# ------------------------------------------------------------------ notebook 02
@pytest.fixture(scope="module")
def model():
    size = TransformerConfig(
        len(DESK.vocabulary), DESK.prompt_width + DESK.max_response, d_model=16
    )
    return Transformer(size, generator=torch.Generator().manual_seed(0))


def test_next_word_shows_the_model_at_every_position(model):
    prompt = DESK.probes(1)[0]
    answer = DESK.concise(prompt)
    panel = NextWord(model, DESK, prompt, answer)
    words = answer.split()
    for at, temperature in ((0, 1.0), (2, 0.2), (len(words), 3.0)):
        panel.controls["at"].value, panel.controls["temperature"].value = at, temperature
        ids = DESK.vocabulary.encode(" ".join([prompt.text, *words[:at]]))
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0][0, -1].double()
        p = torch.exp(logits / temperature) / torch.exp(logits / temperature).sum()
        expected = p.sort(descending=True).values[:8].tolist()
        assert list(panel.shown.values()) == pytest.approx(expected, abs=1e-5)
        first = DESK.vocabulary.words[int(p.argmax())]
        assert next(iter(panel.shown)) == first and f": {first} " in panel.live.alt
        assert panel._texts[0].get_text().startswith(first)


def test_next_word_bars_fit_the_axis(model):
    prompt = DESK.probes(1)[0]
    panel = NextWord(model, DESK, prompt, DESK.concise(prompt))
    panel.controls["temperature"].value = panel.controls["temperature"].min
    assert all(bar.get_width() <= 1 for bar in panel._bars)
    assert [bar.get_width() for bar in panel._bars] == list(panel.shown.values())
