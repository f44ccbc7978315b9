"""The pictures of the remedies show the rows' own numbers; the panel says what the rows say."""

import io
import re
import threading
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from fakes_evidence import DEFAULT, MENDED, PARTS, every_arm, remedy_rows
from matplotlib.text import Text
from PIL import Image

from minirlhf.lab.panels.remedy import (
    RemedyPanel,
    distance_figure,
    forest_figure,
    push_figure,
    remedy_table_html,
)
from minirlhf.lab.panels.remedy_plots import FOREST, about, by_place
from minirlhf.lab.picture import Picture
from minirlhf.lab.plots import PURPLE
from minirlhf.remedies.arms import ARMS, FAULTS, REMEDIES
from minirlhf.sweeps.remedy_table import MEASURES, measured

GIVEN = {
    "none": DEFAULT,
    "counterfactual": MENDED,
    "odin": {**MENDED, "steps": 0.3},  # shortens what needs its length
    "larger_beta": {**DEFAULT, "brief_length": 15.0, "verbose": 0.3, "push": 0.01},
    "capped": {**MENDED, "push": 0.06},  # ends well, against its push
    "dpo": DEFAULT,
    "best_of_n": DEFAULT,
    "grpo": DEFAULT,
    "dr_grpo": {**DEFAULT, "push": 0.03},
}


@pytest.fixture(scope="module")
def rows():
    return remedy_rows(GIVEN)


@pytest.fixture(scope="module")
def panel(rows):
    return RemedyPanel(rows)


def turn(panel, remedy, compare=""):
    panel.controls["remedy"].value = remedy
    panel.controls["compare"].value = compare
    return panel.shown


def names_on(axis):
    return [label.get_text().removeprefix("✓ ") for label in axis.get_yticklabels()]


# ------------------------------------------------------------------ all arms at once
def test_every_arm_has_a_place_and_a_title():
    frame = pd.DataFrame({"remedy": [*ARMS, "odin+larger_beta"]})
    placed = [name for names in by_place(frame).values() for name in names]
    assert sorted(placed) == sorted(frame["remedy"])
    assert all(about(name).title for name in placed)
    both = about("odin+larger_beta")
    assert both.acts == "two at once"
    for part in ("odin", "larger_beta"):
        assert REMEDIES[part].equation in both.equation and REMEDIES[part].title in both.title


def test_forest_lines_are_the_runs_their_means_and_their_intervals(rows):
    figure, each = forest_figure(rows), measured(rows)
    names = names_on(figure.axes[0])
    for ax, measure in zip(figure.axes, FOREST, strict=True):
        for name, values in each.groupby("remedy")[measure]:
            y, mean = names.index(name), values.mean()
            here = [x for x in ax.lines if len(x.get_ydata()) and set(x.get_ydata()) == {y}]
            drawn = sorted(tuple(np.round(line.get_xdata(), 9)) for line in here)
            dots, interval = np.round(tuple(values), 9), 2.776445 * values.std() / 5**0.5
            assert tuple(dots) in drawn and (round(mean, 9),) in drawn
            ends = next(x for x in drawn if len(x) == 2)
            assert ends == pytest.approx((mean - interval, mean + interval), rel=1e-5)


def test_forest_marks_those_that_pass_both_sides(rows):
    figure = forest_figure(rows)
    said = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {text for text in said if text.startswith("✓")} == {"✓ counterfactual", "✓ capped"}
    assert "2 pass" in figure.get_label() and "odin" not in figure.get_label()
    assert [ax.get_xlabel().count("better") for ax in figure.axes] == [0, 1, 1, 1]
    zones = [
        ax.patches[0].get_extents().transformed(ax.transData.inverted()) for ax in figure.axes[:3]
    ]
    assert [round(zone.x0, 2) for zone in zones] == [0.7, -0.05, 0.8]
    assert round(zones[0].x1, 2) == 1.3 and not figure.axes[3].patches


def test_distance_puts_every_arm_where_its_rows_are(rows):
    figure, each = distance_figure(rows), measured(rows)
    key = {t.get_text() for t in figure.axes[2].texts}
    number = {
        re.sub(r" \(.*", "", t).split()[1]: t.split()[0] for t in key if t.strip()[0].isdigit()
    }
    assert set(number) == set(GIVEN) - {"grpo"}  # the faults are left out
    assert any("KL: a bound" in text for text in key)
    for ax, stratum in zip(figure.axes, ("brief", "detailed"), strict=False):
        at = {one: text.xy for text in ax.texts for one in text.get_text().split(", ")}
        for name, of in each[each["remedy"] != "grpo"].groupby("remedy"):
            far = np.sqrt(of[f"{stratum}_kl_nats"].clip(lower=0)).mean()
            gold = of[f"{stratum}_gold_change"].mean()
            assert at[number[name]] == pytest.approx((far, gold))
    assert "none -1.5" in figure.get_label()


def test_distance_numbers_do_not_lie_on_each_other():
    figure = distance_figure(every_arm())
    figure.draw_without_rendering()
    for ax in figure.axes[:2]:
        numbers = [one for text in ax.texts for one in text.get_text().split(", ")]
        assert sorted(map(int, numbers)) == [*range(1, len(ARMS) - len(FAULTS) + 1)]
        boxes = [Text.get_window_extent(text) for text in ax.texts]  # without its leader
        middles = np.array([((b.x0 + b.x1) / 2, (b.y0 + b.y1) / 2) for b in boxes])
        wide = np.array([b.width for b in boxes])
        gaps = np.abs(middles[:, None] - middles[None])
        close = (gaps[..., 0] < (wide[:, None] + wide) / 2 - 2) & (gaps[..., 1] < 10)
        assert close.sum() == len(boxes)  # each only with itself


def test_table_has_a_line_per_arm_and_marks_the_two_sided_test(rows):
    page = remedy_table_html(rows)
    table = ElementTree.fromstring(page[page.index("<table") : page.index("</table>") + 8])
    lines = [line for line in table.iter("tr") if line.find("td") is not None]
    by = {line.findall("th")[-1].text: [cell.text for cell in line.findall("td")] for line in lines}
    assert set(by) == set(GIVEN)
    assert by["counterfactual"][0] == "✓ repaired" and by["odin"][0] == "✗ steps"
    assert by["none"][0] == "✗ length, gold"
    means = rows.groupby("remedy")["push_verbose"].mean()
    push = f"{means['odin']:+.{MEASURES['push_verbose'].digits}f} ["
    assert any(cell.startswith(push) for cell in by["odin"])
    assert "–" in by["dpo"] and "–" not in by["odin"]
    with pytest.raises(ValueError, match="old_one"):
        remedy_table_html(rows.replace({"remedy": {"capped": "old_one"}}))


# ------------------------------------------------------------------ pushes
def heights(ax, places):
    bars = [patch.get_height() for patch in ax.patches]
    return np.array(bars).reshape(-1, places)


def test_push_bars_add_up_to_the_rows_sum(rows):
    names = ["none", "counterfactual", "larger_beta"]
    figure = push_figure(rows, names)
    for ax, side in zip(figure.axes, ("verbose", "concise"), strict=True):
        parts = rows.groupby("remedy")[[f"push_{side}_{p}" for p in PARTS]].mean().loc[names]
        found = heights(ax, 3)
        assert found.sum(0) == pytest.approx(parts.sum(axis=1).to_numpy())
        assert found[0] == pytest.approx(parts[f"push_{side}_reward"].to_numpy())
        (sums,) = (line for line in ax.lines if line.get_marker() == "D")
        assert sums.get_ydata() == pytest.approx(parts.sum(axis=1).to_numpy())
    assert "counterfactual -0.05" in figure.get_label()
    with pytest.raises(ValueError, match="dpo"):
        push_figure(rows, ["none", "dpo"])


# ------------------------------------------------------------------ the panel
def test_before_is_the_arm_that_the_row_names(panel, rows):
    means = rows.groupby("remedy")["push_verbose"].mean()
    for name, before in (("counterfactual", "none"), ("dr_grpo", "grpo")):
        shown = turn(panel, name)["push_verbose"]
        assert [*shown][:2] == [before, name]
        assert shown[before] == pytest.approx(means[before])
        assert shown[name] == pytest.approx(means[name])


def test_every_choice_draws_itself_and_its_sentence_follows_the_rows(panel, rows):
    pushes = rows.groupby("remedy")["push_verbose"].mean()
    pictures, fault = set(), dict(zip(rows["remedy"], rows["fault"], strict=True))
    for name in GIVEN:
        if name == "none":
            continue
        turn(panel, name)
        said = panel.said[name]
        assert said in panel.live.alt and f"<b>{name}</b>" in panel.live.view.value
        pictures.add(panel.live.data)
        a, b = pushes[name], pushes[fault[name]]
        if np.isnan(a):
            assert "no push" in said and "turns" not in said
        elif fault[name] != name:
            turned = "turns from + to −" if a < 0 < b else "stays +"
            assert turned in said
        share = rows.loc[rows["remedy"] == name, "final_brief_verbose_rate"].mean()
        assert f"In the end {share:.0%} of" in said
    assert len(pictures) >= len(GIVEN) - 2
    lengths = rows.groupby("remedy")["final_brief_length_tokens"].mean()
    shorter = f"{lengths['none'] - lengths['odin']:.1f} tokens shorter"
    assert f"{shorter} than before the change, as the change" in panel.said["odin"]
    assert "down from 45%" in panel.said["counterfactual"]
    assert "shorter than before the change, against" in panel.said["capped"]
    assert "do not tell" in panel.said["dr_grpo"] and "tokens" not in panel.said["dr_grpo"]
    assert "✗ steps" in panel.said["odin"] and "✓ repaired" in panel.said["counterfactual"]


def test_to_compare_adds_a_third_and_nothing_takes_it_away(panel):
    alone = turn(panel, "counterfactual"), panel.live.data
    assert "" in alone[0]["push_verbose"] and np.isnan(alone[0]["push_verbose"][""])
    both = turn(panel, "counterfactual", "larger_beta")["push_verbose"]
    assert both["counterfactual"] < 0 < both["larger_beta"]
    assert panel.live.data != alone[1] and panel.said["larger_beta"] in panel.live.alt
    turn(panel, "counterfactual")
    assert panel.live.data == alone[1]


def test_the_text_below_keeps_its_height_and_is_escaped(panel):
    turn(panel, "counterfactual", "odin")
    page = panel.live.view.value
    below = page[page.index("<div") :]
    assert "height:126px" in below and REMEDIES["counterfactual"].source in below
    assert "(x, y) &gt; (x, padded y)" in below


def test_dots_of_the_outcome_are_the_seeds(panel, rows):
    turn(panel, "counterfactual")
    _, dots, means = panel._ends["gold"]
    of = rows[rows["remedy"] == "counterfactual"]
    ends = np.concatenate([of[f"final_{s}_gold"] for s in ("brief", "detailed")])
    assert list(dots[1].get_ydata()) == list(ends) and len(dots[0].get_ydata()) == 10
    assert means[1].get_ydata()[0] == pytest.approx(of["final_brief_gold"].mean())
    assert np.isnan(means[2].get_ydata()).all()


def test_the_panel_is_a_picture_where_no_kernel_runs(panel):
    turn(panel, "counterfactual")
    data, notes = panel._repr_mimebundle_()
    assert notes["image/png"]["alt"] == panel.live.alt and data["image/png"]
    image = np.asarray(Image.open(io.BytesIO(panel.live.data)).convert("RGB"))
    purple = tuple(int(PURPLE[i : i + 2], 16) for i in (1, 3, 5))
    assert (image == purple).all(-1).any()  # the fork's bars


def test_dropdowns_may_be_turned_from_another_thread(panel):
    turn(panel, "odin")
    mine = threading.Thread(target=turn, args=(panel, "counterfactual", "capped"))
    mine.start()
    mine.join()
    assert panel.said["counterfactual"] in panel.live.alt


def test_rows_without_the_changed_arm_are_refused(rows):
    with pytest.raises(ValueError, match="grpo"):
        RemedyPanel(rows[~rows["remedy"].isin(["grpo"])])


def test_a_still_picture_has_its_sentence(rows):
    assert Picture(push_figure(rows, ["none"])).alt.startswith(
        "Push in nats a step on verbose: none"
    )
