"""The token heat map and the batch table: safe with any text, readable by anyone, right order."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from fakes import fake_rollout

from minirlhf.autopsy.convention import Convention
from minirlhf.autopsy.parts import split
from minirlhf.autopsy.pushes import surrogate_slope
from minirlhf.config import PPOConfig
from minirlhf.lab import heatmap
from minirlhf.lab.heatmap import heat_map, passed_up, shade, token_columns, token_table, visible
from minirlhf.lab.panels.batch_table import BatchTable, batch_rows, order

NASTY = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert('1')>",
    "javascript:alert(1)",
    "\u202egnp.exe",
    "a\u200fb\u2066c",
    "\x00\x1b[31m",
    "two\nlines",
    "zero\u200bwidth\ufeff",
    "\u05e9\u05dc\u05d5\u05dd",
    "</bdi></p></div>",
    "   ",
    "",
    "&lt;b&gt;",
    "x" * 5000,
]


class Reader(HTMLParser):
    """Elements with attributes and own text; complains where tags do not balance."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])
        self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][2] += data

    def tokens(self):
        return [e for e in self.found if e[0] == "bdi" and "tabindex" in e[1]]


def drawn(words, values=None, **options):
    """The map of one or more answers, every word in it."""
    t = max(map(len, words))
    mask = torch.tensor([[i < len(row) for i in range(t)] for row in words])
    values = torch.zeros(mask.shape) if values is None else values
    return heat_map(words, values, mask, **{"unit": "sd", "limit": 2.0, **options})


def test_every_token_is_there_with_its_value_and_within_reach_of_the_keyboard():
    values = torch.tensor([[0.5, -2.5, 0.0], [1.0, 9.0, 9.0]])
    found = Reader(drawn([["a", "b", "c"], ["d"]], values)).tokens()
    assert [e[2] for e in found] == ["a", "b", "c", "d"]
    assert [e[1]["class"] for e in found] == ["p p2", "n n8", "z", "p p4"]
    assert [e[1]["title"] for e in found] == ["+0.500 sd", "-2.500 sd", "+0.000 sd", "+1.000 sd"]
    assert found[1][1]["aria-label"] == "b, token 1: advantage -2.500 sd"
    assert all(e[1]["tabindex"] == "0" and e[1]["role"] == "img" for e in found)


def test_legend_says_numbers_unit_and_direction():
    text = drawn([["a"]], limit=0.5, unit="reward sd", up="more likely", down="less likely")
    for part in ("advantage, reward sd", "0.5 or more", "0.25", "above 0: more likely"):
        assert part in text
    assert "below 0: less likely" in text


@pytest.mark.parametrize("hostile", NASTY)
def test_texts_of_a_batch_are_data(hostile):
    columns = {f"c {hostile}": torch.ones(1, 2)}
    given = {"titles": [hostile], "unit": hostile, "name": hostile, "up": hostile, "down": hostile}
    text = drawn([[hostile, "end"]], torch.ones(1, 2), columns=columns, **given)
    plain = drawn([["a", "end"]], torch.ones(1, 2), columns={"c": torch.ones(1, 2)})
    a, b = Reader(text), Reader(plain)
    assert [(e[0], set(e[1])) for e in a.found] == [(e[0], set(e[1])) for e in b.found]
    assert a.tokens()[0][2] == visible(hostile)
    body = text.replace(heatmap.STYLE, "")
    assert not re.search("[\u200b-\u200f\u202a-\u202e\u2066\u2067\ufeff\x00-\x09\x0b-\x1f]", body)
    assert "\n" not in body


def test_hidden_characters_are_shown_by_their_code():
    assert visible("\u202egnp") == r"\u202egnp"
    assert visible("a\nb\x00") == r"a\u000ab\u0000"
    assert visible("caf\u00e9 \u05e9") == "caf\u00e9 \u05e9"
    assert visible("  ") == "'  '" and visible("") == "''"
    assert len(visible("x" * 99)) == heatmap.WIDTH


def test_right_to_left_words_are_isolated_in_attributes_too():
    (found,) = Reader(drawn([["\u05e9\u05dc"]])).tokens()
    assert found[1]["aria-label"].startswith("\u2068\u05e9\u05dc\u2069,")


def test_a_long_response_is_cut_with_a_sentence():
    columns = {f"column {i}": torch.ones(1, 10_000) for i in range(7)}
    words = [["word"] * 10_000]
    text = drawn(words, torch.ones(1, 10_000), columns=columns)
    assert len(text.encode()) < 300_000
    assert "9600 more tokens are left out: only the first 400 are shown." in text
    assert len(Reader(text).tokens()) == 400
    assert "left out" not in drawn([["word"] * 48] * 4)


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_text_on_every_ground():
    grounds = dict(re.findall(r"\.([pn]\d)\{background:(#\w{6})\}", heatmap.STYLE))
    assert len(grounds) == 2 * (heatmap.LEVELS + 1)
    assert all(contrast("#111111", ground) >= 4.5 for ground in grounds.values())
    assert contrast("#595959", "#ffffff") >= 4.5 and contrast("#222222", "#ffffff") >= 4.5
    assert "color:#111;padding" in heatmap.STYLE and "background:#fff;color:#222" in heatmap.STYLE
    for level in range(heatmap.LEVELS + 1):  # in grey, shade is size and nothing else
        up, down = luminance(shade("p", level)), luminance(shade("n", level))
        assert abs(up - down) < 0.05
        assert level == 0 or up < luminance(shade("p", level - 1))


def test_sign_is_told_without_colour_and_on_paper():
    assert '.p::before{content:"+"' in heatmap.STYLE
    assert '.n::before{content:"\\2212"' in heatmap.STYLE
    assert "solid" in heatmap.STYLE and "dotted" in heatmap.STYLE
    assert "print-color-adjust:exact" in heatmap.STYLE


def test_stops_that_were_passed_up():
    r = fake_rollout(0)
    ended = torch.full_like(r.responses, 3)
    ended[0, r.last[0]] = 1
    r = replace(r, ref_eos_logprobs=torch.full_like(r.logprobs, 0.7).log(), responses=ended)
    p = passed_up(r)
    assert float(p[0, r.last[0]]) == 0
    assert torch.allclose(p[r.mask & (ended != 1)], torch.tensor(0.7, dtype=p.dtype))
    assert not p[~r.mask].any()
    text = drawn([["a", "b"]], stops=torch.tensor([[0.49, 0.5]]))
    first, second = Reader(text).tokens()
    assert "would have stopped" not in first[1]["aria-label"]
    assert "stopped before this word (0.50)" in second[1]["aria-label"]
    assert "the policy went on" in text and "the policy went on" not in drawn([["a"]])
    with pytest.raises(ValueError, match="no ref_eos_logprobs"):
        passed_up(replace(r, ref_eos_logprobs=None))


def test_the_table_holds_every_number():
    config = PPOConfig(batch=6, group=3, minibatches=1)
    r = fake_rollout(1)
    parts = split(r, Convention.of(config))
    columns = token_columns(r, parts, config)
    told = replace(r, advantages=parts.total)
    weight = 1000 * surrogate_slope(r.logprobs, told, config) * parts.total
    assert torch.equal(columns["gradient weight, thousandths"], weight)
    inside = sum(x for name, x in columns.items() if name.endswith(" part"))
    assert torch.allclose(inside, columns["advantage"])
    assert torch.equal(columns["log-ratio, nats"], r.logprobs - r.ref_logprobs)
    words = [[f"w{t}" for t in range(r.mask.shape[1])]] * len(r)
    found = Reader(token_table(words, columns, r.mask))
    cells = [e[2] for e in found.found if e[0] == "td"]
    rows = np.argwhere(r.mask.numpy())
    expected = [[str(t), *(f"{x[b, t]:+.3f}" for x in columns.values())] for b, t in rows]
    assert cells == [cell for row in expected for cell in row]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"values": torch.tensor([[0.0, torch.nan]])}, "advantage is nan at answer 0, token 1"),
        ({"values": torch.tensor([[torch.inf, 0.0]])}, "advantage is inf at answer 0, token 0"),
        ({"values": torch.zeros(1, 3)}, "shape"),
        ({"limit": 0.0}, "limit is 0.0"),
        ({"limit": torch.nan}, "limit is nan"),
        ({"words": [["a"]]}, "1 words, but its mask reaches token 1"),
        ({"words": []}, "for 0 answers"),
        ({"mask": torch.ones(1, 2)}, "give a bool"),
        ({"titles": ["a", "b"]}, "2 titles for 1 answers"),
        ({"words": [["a", "b"]] * 17, "mask": torch.ones(17, 2, dtype=torch.bool)}, "not 17"),
    ],
)
def test_bad_input_is_one_sentence(given, said):
    good = {"words": [["a", "b"]], "values": torch.zeros(1, 2), "mask": torch.tensor([[True] * 2])}
    with pytest.raises(ValueError, match=said) as raised:
        heat_map(**{**good, "unit": "sd", "limit": 1.0, **given})
    assert "\n" not in str(raised.value)


def test_nan_outside_the_mask_carries_no_meaning():
    mask = torch.tensor([[True, False]])
    assert "nan" not in heat_map(
        [["a", "b"]], torch.tensor([[1.0, torch.nan]]), mask, unit="sd", limit=1.0
    )


# --- the batch table --------------------------------------------------------------------------


def batch():
    r = fake_rollout(2)
    return replace(
        r,
        advantages=torch.randn(
            r.mask.shape, dtype=r.logprobs.dtype, generator=torch.Generator().manual_seed(0)
        ),
    )


def test_columns_by_hand():
    r = batch()
    found = batch_rows(r)
    for b in range(len(r)):
        inside = r.mask[b]
        assert found["length"][b] == int(inside.sum())
        if not inside.any():
            assert np.isnan(found["advantage"][b]) and np.isnan(found["positive_share"][b])
            continue
        a = r.advantages[b][inside]
        assert found["advantage"][b] == pytest.approx(float(a.mean()))
        assert found["positive_share"][b] == pytest.approx(float((a > 0).double().mean()))
        kl = (r.logprobs - r.ref_logprobs)[b][inside].sum()
        assert found["kl"][b] == pytest.approx(float(kl))
    with pytest.raises(ValueError, match="no advantages"):
        batch_rows(replace(r, advantages=None))
    with pytest.raises(ValueError, match="1 strata"):
        batch_rows(r, ["brief"])


def test_order_keeps_ties_and_puts_nan_last():
    x = np.array([2.0, np.nan, 1.0, 2.0])
    assert order(x, descending=False).tolist() == [2, 0, 3, 1]
    assert order(x, descending=True).tolist() == [0, 3, 2, 1]
    assert order(np.array(["b", "a", "b"]), descending=True).tolist() == [0, 2, 1]


def test_sorting_chooses_the_first_line_and_choosing_is_heard():
    r, heard = batch(), []
    table = BatchTable(r, ["brief", "detailed"] * (len(r) // 2), on_choose=heard.append)
    table.choose(2)
    assert heard == [2]
    for by in ("row", "stratum", "length", "score", "kl", "advantage", "positive_share"):
        table.by.value = by
        for down in (True, False):
            table.down.value = down
            column = table.columns[table.by.value]
            listed = [row for _, row in table.answers.options]
            assert listed == order(column, descending=down).tolist()
            assert table.row == table.answers.value == listed[0] == heard[-1]
    assert all(a != b for a, b in pairwise(heard)), "told of nothing new"
    table.choose(2)
    told = list(heard)
    table.show(replace(r, advantages=-r.advantages))
    assert table.row == table.answers.value == 2 and heard == told
    assert len({len(line) for line, _ in table.answers.options}) == 1
    with pytest.raises(ValueError, match="no answer 99"):
        table.choose(99)


def test_buttons_step_through_the_list_and_stop_at_its_ends():
    r, heard = batch(), []
    table = BatchTable(r, on_choose=heard.append)
    back, on = table.steps
    table.by.value = "length"
    listed = [row for _, row in table.answers.options]
    heard.clear()
    back.click()
    assert heard == [] and table.row == listed[0]
    for _ in listed:
        on.click()
    assert heard == listed[1:] and table.row == listed[-1]
    back.click()
    assert table.row == heard[-1] == listed[-2]


def test_the_height_of_the_list_is_not_that_of_the_sort_box():
    """A browser's list box has a size, its one-line box has none."""
    assert re.findall(r"[^ {]*select[^{]*", BatchTable(batch()).note.value) == ["select[size]"]


def test_a_list_without_a_kernel_is_text():
    below = widgets.HTML("<p>map</p>")
    table = BatchTable(batch(), below=below)
    table.by.value, table.down.value = "length", True
    shown = table._repr_mimebundle_()
    head, first, *_ = shown["text/plain"].splitlines()
    assert head.split()[:2] == ["answer", "stratum"] and "map" not in shown["text/plain"]
    assert int(first.split()[2]) == batch().lengths.max()
    assert "application/vnd.jupyter.widget-view+json" in shown and table.children[-1] is below


def test_strata_with_hidden_characters():
    r = batch()
    table = BatchTable(r, ["\u202e<b>"] * len(r))
    assert all("\u202e" not in line for line, _ in table.answers.options)
