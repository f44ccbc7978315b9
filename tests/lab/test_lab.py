"""What is drawn is what was measured: lines, labels, roles of sentences, the report's page."""

import copy
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_case import STEPS, answers, batch, summary
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.desk.world import Desk
from minirlhf.drift.data import shipped
from minirlhf.lab import plots
from minirlhf.lab.answers import ROLES, answer_html, draw_answer, read_answer
from minirlhf.lab.picture import Picture, png
from minirlhf.lab.report import _settings, examples, report_html

DESK = Desk.load()
PROMPT = DESK.probes(1)[0]
FACT = DESK.concise(PROMPT)
OPENER, HEDGE = (DESK.spec.phrases[group][0] for group in ("opener", "hedge"))
WRONG = FACT.replace(
    PROMPT.value, next(v for v in DESK.spec.slots[PROMPT.slot] if v != PROMPT.value)
)
BIAS = {key: 0.2 + 0.1 * i for i, key in enumerate(plots.BIASES.values())}
ROW = {"arm": "drift", "claim": "a long claim of the course (points)", "digits": 2, "mean": 0.5}
ROW |= {"low": 0.4, "high": 0.6, "least": 0.1, "most": 0.9, "held": 9, "runs": 10}


# ------------------------------------------------------------------ sentences and their roles
def test_roles_of_a_hand_made_answer():
    said = read_answer(DESK, PROMPT, f"{OPENER} {FACT} {FACT} {HEDGE} {WRONG} we are .")
    roles = ["courtesy", "answers", "repeats", "hedges", "wrong", "other"]
    assert [s.role for s in said] == roles
    assert [s.value for s in said][1:5:3] == [
        PROMPT.value,
        WRONG.split()[FACT.split().index(PROMPT.value)],
    ]


def test_steps_answer_and_repeat():
    prompt = next(p for p in DESK.probes(4) if p.stratum == "detailed")
    steps = DESK.concise(prompt)
    said = read_answer(DESK, prompt, f"{steps} {steps}")
    half = len(said) // 2
    assert {s.role for s in said[:half]} == {"answers"}
    assert {s.role for s in said[half:]} == {"repeats"}


def test_a_step_without_its_fact_does_not_answer():
    prompt = next(p for p in DESK.probes(8) if "reset" in p.text)
    steps = DESK.concise(prompt).split(" . ")
    garbled = steps[0].replace(prompt.value, "first") + " ."
    assert not DESK.grade(prompt, garbled).correct and not DESK.grade(prompt, garbled).evasive
    said = read_answer(DESK, prompt, f"{garbled} {garbled} {DESK.concise(prompt)}")
    assert [s.role for s in said] == ["other", "repeats", *["answers"] * len(steps)]


@given(st.lists(st.sampled_from(DESK.vocabulary.words[3:]), max_size=48), st.integers(0, 9))
def test_roles_never_disagree_with_the_grade(words, probe):
    prompt, text = DESK.probes(10)[probe], " ".join(words)
    said, grade = read_answer(DESK, prompt, text), DESK.grade(prompt, text)
    assert " ".join(s.text for s in said) == text
    roles = {s.role for s in said}
    assert ("hedges" in roles) == grade.hedged
    if grade.evasive:
        assert not roles & {"answers", "repeats", "wrong"}
    if "wrong" in roles:
        assert grade.wrong
    if "answers" in roles:
        assert grade.steps_share > 0 and not grade.missing
    if not roles & {"hedges", "wrong"}:
        assert ("answers" in roles) == (grade.steps_share > 0)
        assert grade.correct == (grade.steps_share == 1)
    idle = [s for s in said if s.role in ("courtesy", "repeats")]
    assert grade.padding_tokens >= sum(len(s.text.split()) for s in idle)


def test_answers_are_escaped_and_marked_in_words():
    said = read_answer(DESK, PROMPT, f"<script> & . {FACT}")
    page = answer_html(said, finished=False)
    assert "<script>" not in page and "&lt;script&gt; &amp; ." in page
    assert ">other</span>" in page and ">answers</span>" in page
    assert f"<b><u>{PROMPT.value}</u></b>" in page
    assert "cut off" in page
    assert "no words" in answer_html([])


def _luminance(color):
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_black_text_is_readable_on_every_tint():
    for tint, *_ in ROLES.values():
        assert (_luminance(tint) + 0.05) / (_luminance("#111111") + 0.05) > 7  # WCAG AAA


# ------------------------------------------------------------------ figures
def drift_lines(figure):
    """{title: [line data]} of every axes."""
    return {
        ax.get_title(loc="left"): [(list(x), list(y)) for x, y in map(_data, ax.get_lines())]
        for ax in figure.axes
    }


def _data(line):
    return line.get_xdata(), line.get_ydata()


def test_drift_figure_draws_the_audits():
    s = summary()
    lines = drift_lines(plots.drift_figure(s))
    assert lines["RM score"] == [(list(STEPS), [e["rm_score_sd"] for e in s["history"]])]
    for title, key in (("gold quality", "gold"), ("evasive answers", "evasion_rate")):
        expected = [[e[name][key] for e in s["history"]] for name in ("brief", "detailed")]
        assert [y for _, y in lines[title]] == expected
    assert len(lines) == 6


def test_caption_says_the_first_and_the_last_audit():
    said = str(plots.drift_figure(summary()).get_label())
    assert "20 PPO steps" in said and "from 0.0 to 1.2 reward sd" in said
    assert "gold goes from 0.5 to -0.5 points" in said
    assert "length from 8 to 28 tokens" in said


def test_audits_are_in_order_and_not_doubled():
    s = summary()
    s["history"] = s["history"][::-1][:2]  # the reference is not in the history
    assert [e["step"] for e in plots.audits(s)] == list(STEPS)


def test_unmeasured_values_leave_a_gap():
    s = copy.deepcopy(summary())
    for e in s["history"]:
        e["detailed"] = dict.fromkeys(e["detailed"])
    lines = drift_lines(plots.drift_figure(s))["gold quality"]
    assert np.isnan(lines[1][1]).all() and not np.isnan(lines[0][1]).any()


def every_figure():
    rng = np.random.default_rng(0)
    words = PROMPT.text.split()
    weights = rng.dirichlet(np.ones(len(words)), (2, len(words)))
    lengths = {"brief": [7, 8, 9], "detailed": [20, 30, 48]}
    return {
        "drift": plots.drift_figure(summary()),
        "bias": plots.bias_figure({"labelers of the course": BIAS, "all dials 0": BIAS}),
        "length": plots.length_figure(lengths),
        "batch": plots.batch_figure(batch()),
        "bars": plots.bars_figure({"T = 1": {"wednesday": 0.7, "it": 0.3}}, "probability"),
        "token": plots.token_figure(words, rng.random(len(words)), "entropy", "nats"),
        "attention": plots.attention_figure(weights, words, ["block 1, head 1", "block 2, head 4"]),
        "seeds": plots.seeds_figure([ROW, {**ROW, "arm": "control"}, ROW]),
    }


@pytest.mark.parametrize("name", every_figure())
def test_no_text_is_cut_and_every_figure_says_what_it_shows(name):
    figure = every_figure()[name]
    png(figure)  # lays it out
    box = figure.get_tightbbox()  # inches; ticks outside the axes are not drawn and not counted
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02
    assert len(str(figure.get_label())) > 20


def test_a_cut_text_would_be_seen():
    figure = plots.drift_figure(summary())
    figure.text(0.9, 0.02, "a legend that is longer than the figure has room for")
    png(figure)
    assert figure.get_tightbbox().x1 > figure.get_size_inches()[0] + 0.02


def test_batch_figure_draws_the_three_facts():
    facts, heights = batch(), []
    for ax in plots.batch_figure(facts).axes:
        heights.append([bar.get_height() for bar in ax.patches])
    assert heights == [
        [0.0, facts["rm_gap_sd"]],
        [facts["kl_concise_nats"], facts["kl_verbose_nats"]],
        [facts["advantage_concise"], facts["advantage_verbose"]],
    ]


def test_batch_without_concise_answers_leaves_a_gap():
    facts = batch() | {"kl_concise_nats": None, "advantage_concise": None}
    kl = plots.batch_figure(facts).axes[1]
    assert np.isnan(kl.patches[0].get_height()) and kl.patches[1].get_height() == 4.2


def test_seeds_figure_shows_one_arm():
    none = ROW | dict.fromkeys(("mean", "low", "high", "least", "most"))  # in no run measured
    figure = plots.seeds_figure([ROW, none, {**ROW, "arm": "control", "mean": -3.0}])
    assert [ax.get_lines()[2].get_xdata()[0] for ax in figure.axes] == [0.5]
    assert "held 9/10" in str(figure.get_label())


def test_strata_differ_in_more_than_colour():
    brief, detailed = plots.STRATUM.values()
    assert all(brief[key] != detailed[key] for key in ("color", "ls", "marker"))


def test_picture_is_a_png_with_its_sentence():
    figure = plots.batch_figure(batch())
    data, notes = Picture(figure)._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"}  # text/html would outrank the picture
    assert data["text/plain"] == notes["image/png"]["alt"] == figure.get_label()


def test_same_numbers_same_bytes():
    assert png(plots.drift_figure(summary())) == png(plots.drift_figure(summary()))


def test_long_answers_stay_in_their_box():
    ax = plots.blank(4, 3).subplots()
    said = read_answer(DESK, PROMPT, " ".join([OPENER] * 12))
    draw_answer(ax, said, columns=40, lines=6)
    assert ax.texts[-1].get_text() == "..."
    assert all(text.get_position()[1] <= 6 for text in ax.texts)


def test_lab_never_imports_pyplot():
    modules = "answers, picture, panels, plots, report"
    code = (
        f"from minirlhf.lab import {modules}; import sys; print('matplotlib.pyplot' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# ------------------------------------------------------------------ the report
class Page(HTMLParser):
    """Tags opened and closed, attributes, and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_one_whole_page_without_links_or_scripts():
    s = summary()
    page = Page(report_html(s, answers(DESK), [plots.drift_figure(s), plots.batch_figure(batch())]))
    assert page.open == []
    assert not {"script", "link", "a", "iframe"} & {tag for tag, _ in page.tags}
    sources = [a[key] for _, a in page.tags for key in ("src", "href") if key in a]
    assert len(page.images) == 2 and all(src.startswith("data:image/png") for src in sources)
    assert all(len(image["alt"]) > 20 for image in page.images)
    for said in (
        "seed 3",
        "--ppo.clip-style",
        "price of KL, reward sd per nat",
        "RM score of one courtesy phrase, brief",
        "66.0%",
        "reference: imitating demonstrations",
        "step 10",
        "+4.20",
        "reward sd",
    ):
        assert said in page.text, said
    assert "None" not in page.text and "nan" not in page.text


def test_every_number_of_a_real_run_has_words_in_its_report():
    run = shipped()
    text = Page(report_html(run.summary, run.answers)).text
    keys = [key for part in ("raw_pairs", "reward_model", "seconds") for key in run.summary[part]]
    raw = [key for key in keys if "_" in key and key in text]
    assert len(keys) > 10 and raw == [], "a key is no word"
    unexplained = [option for option, _, meaning in _settings(run.summary["config"]) if not meaning]
    assert unexplained == []
    length = run.summary["final"]["brief"]["length_tokens"]
    assert f"{length:.1f}" in text and f"+{length:.2f}" not in text, "a length has no sign"


def test_report_of_a_quick_run_says_so():
    page = report_html(summary(), answers(DESK), quick=True)
    assert Page(page).open == [] and "too few pairs and steps" in Page(page).text
    assert "--quick" not in Page(report_html(summary(), answers(DESK))).text


def test_report_escapes_what_the_run_said():
    table = answers(DESK)
    table.loc[table.step == STEPS[-1], "answer"] = "<img src=x onerror=alert(1)> & so on"
    page = Page(report_html(summary() | {"config": {"<b>": "</body>"}}, table))
    assert page.images == [] and "<img src=x onerror=alert(1)> & so on" in page.text
    assert page.open == []


def test_report_of_a_run_without_a_batch_or_a_stratum():
    s = copy.deepcopy(summary()) | {"batch": {}}
    for e in (s["reference"], s["final"]):
        e["detailed"] = dict.fromkeys(e["detailed"])
    text = Page(report_html(s, answers(DESK))).text
    assert "none" in text and "Inside PPO" not in text


def test_examples_are_the_first_brief_probes_and_nothing_else():
    table = answers(DESK)
    found = examples(table, 3)
    brief = [i for i, p in enumerate(DESK.probes(20)) if p.stratum == "brief"][:3]
    assert [int(before.name) for before, _ in found] == brief
    assert all((a.step, b.step) == (0, STEPS[-1]) for a, b in found)


def test_charts_hold_their_curves_and_levels():
    curves = {"a": ([0, 1, 2], [3.0, 4.0, 5.0]), "b": ([0, 2], [5.0, 3.0]), "even": ([0], 4.5)}
    figure = plots.chart_figure(
        "said", {"one": ("x", "nats", curves), "two": ("x", "sd", {"c": curves["a"]})}
    )
    one, two = figure.axes
    assert [line.get_label() for line in one.lines] == ["a", "b", "even"]
    assert list(one.lines[0].get_ydata()) == [3, 4, 5] and set(one.lines[2].get_ydata()) == {4.5}
    assert (one.get_xlabel(), one.get_ylabel(), two.get_ylabel()) == ("x", "nats", "sd")
    assert figure.get_label() == "said" and len(png(figure)) > 5000
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in one.lines}
    assert len(looks) == 3
    assert [len(ax.get_legend().get_texts()) for ax in figure.axes] == [3, 1] and not figure.legends


def test_charts_of_the_same_names_share_one_legend_and_their_looks():
    curves = {"a": ([0, 1], [0.0, 1.0]), "b": ([0, 1], [1.0, 0.0])}
    charts = dict.fromkeys(("one", "two", "three"), ("x", "nats", curves))
    figure = plots.chart_figure("said", charts)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]
    looks = [[(li.get_color(), li.get_linestyle()) for li in ax.lines] for ax in figure.axes]
    assert looks[0] == looks[1] == looks[2] and looks[0][0] != looks[0][1]
    assert all(ax.get_legend() is None for ax in figure.axes)
