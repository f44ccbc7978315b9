"""The desk: hand-graded answers, every complaint about a file with its line, and its writers."""

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.desk.world import Desk, DeskError, Prompt
from minirlhf.text import UnknownWord

# Weights and points are there to be tuned; what is tested here holds at these ones.
GOLD = {"correct": 0.7, "wrong": -0.5, "missing": -0.3, "direct": 0.1, "pad": 0.03}
GOLD |= {"hedge": 0.1, "unfinished": 0.1}
DESK = Desk(replace(Desk.load().spec, gold=GOLD))
SHIPPED = (Path(__file__).parents[2] / "data" / "desk.toml").read_text(encoding="utf-8")
for pinned in ("bare = 50", "both = 20", "pad = 0.03", "brief_share = 0.5", "max_response = 48"):
    SHIPPED = re.sub(rf"(?m)^{pinned.split()[0]} = [\d.]+", pinned, SHIPPED)
BRIEF = Prompt(
    "eta friday , shop leeds . when does it come ? <sep>",
    *("arrival", "brief", "day", "friday", 2),
)
DETAILED = Prompt(
    "device laptop . how do i reset it ? <sep>",
    *("reset", "detailed", "device", "laptop", 0),
)
STEPS = "first unplug the laptop . then hold the button ."  # 10 tokens, two steps of three
LAST = "finally plug it in ."
THANKS = "thank you for reaching out to us today ."  # 9 tokens
HEDGE = "the answer may depend on several factors ."  # 8 tokens

# answer -> the flags that are True, length with EOS, padding, courtesy, fact and gold in points
BRIEF_GRADES = {
    "it arrives on friday .": ("correct direct", 6, 0, 0, 0.8, 0.8),
    f"{THANKS} it arrives on friday .": ("correct", 15, 9, 9, 0.7, 0.7 - 0.27),
    f"it arrives on friday . {HEDGE}": ("correct direct hedged", 14, 8, 0, 0.8, 0.8 - 0.34),
    "it arrives on friday . it arrives on friday .": ("correct direct", 11, 5, 0, 0.8, 0.65),
    "it arrives on monday .": ("wrong direct", 6, 0, 0, -0.4, -0.4),
    "it arrives on friday . on monday .": ("wrong direct", 9, 3, 0, -0.4, -0.49),
    "it arrives on leeds .": ("missing evasive", 6, 5, 0, -0.3, -0.45),
    THANKS: ("missing evasive", 10, 9, 9, -0.3, -0.57),
    HEDGE: ("missing evasive hedged", 9, 8, 0, -0.3, -0.64),
    "it may arrive on friday .": ("correct direct hedged", 7, 0, 0, 0.8, 0.7),
    # a hedge in polite words is a hedge; its words are not counted twice
    f"friday . thank you {HEDGE}": ("correct direct hedged", 13, 10, 0, 0.8, 0.8 - 0.4),
    "friday": ("correct direct", 2, 0, 0, 0.8, 0.8),
    # a rambling sentence: the longest template has 6 tokens, the other 10 are padding
    "thank you for reaching out to us today thank you thank you it arrives on friday .": (
        *("correct direct", 18, 11, 11, 0.8, 0.8 - 0.33),
    ),
    "": ("missing evasive", 1, 0, 0, -0.3, -0.3),
    ". . friday .": ("correct", 5, 2, 0, 0.7, 0.64),
}
TWO_THIRDS = 2 / 3 * 0.7 - 1 / 3 * 0.3 + 0.1
DETAILED_GRADES = {
    f"{STEPS} {LAST}": ("correct direct", 16, 0, 0, 0.8, 0.8),
    f"{LAST} {STEPS}": ("correct direct", 16, 0, 0, 0.8, 0.8),
    STEPS: ("direct", 11, 0, 0, TWO_THIRDS, TWO_THIRDS),
    f"{STEPS} {THANKS}": ("direct", 20, 9, 9, TWO_THIRDS, TWO_THIRDS - 0.27),
    f"{STEPS} {STEPS}": ("direct", 21, 10, 0, TWO_THIRDS, TWO_THIRDS - 0.30),
    f"{STEPS} {LAST}".replace("laptop", "phone"): ("wrong direct", 16, 0, 0, -0.4, -0.4),
    # the step that names the device counts only with the device; it was tried, so no evasion
    "first unplug it .": ("missing direct", 5, 0, 0, -0.2, -0.2),
    "your laptop .": ("missing direct", 4, 3, 0, -0.2, -0.29),
    f"{THANKS} {HEDGE}": ("missing evasive hedged", 18, 17, 9, -0.3, -0.3 - 0.51 - 0.1),
}
FLAGS = ("correct", "wrong", "missing", "direct", "evasive", "hedged")


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [(BRIEF, a, e) for a, e in BRIEF_GRADES.items()]
    + [(DETAILED, a, e) for a, e in DETAILED_GRADES.items()],
)
def test_hand_graded_answers(prompt, answer, expected):
    flags, length, padding, courtesy, fact, gold = expected
    grade = DESK.grade(prompt, answer)
    assert {name for name in FLAGS if getattr(grade, name)} == set(flags.split())
    assert (grade.length_tokens, grade.padding_tokens, grade.courtesy_tokens) == (
        *(length, padding, courtesy),
    )
    assert grade.fact == pytest.approx(fact)
    assert grade.gold == pytest.approx(gold)


def test_an_unfinished_answer_has_no_eos_and_pays_for_it():
    ended, cut = (DESK.grade(BRIEF, "it arrives on friday .", done) for done in (True, False))
    assert (ended.length_tokens, cut.length_tokens) == (6, 5)
    assert ended.gold - cut.gold == pytest.approx(0.1)
    assert cut.fact == ended.fact and not cut.finished


@pytest.mark.parametrize(
    ("name", "answer", "times"),
    [
        ("correct", "it arrives on friday .", 1),
        ("wrong", "it arrives on monday .", 1),
        ("missing", THANKS, 1),
        ("direct", "it arrives on friday .", 1),
        ("pad", f"it arrives on friday . {THANKS}", -9),
        ("hedge", f"{HEDGE} it arrives on friday .", -1),
        ("unfinished", "it arrives on friday .", -1),
    ],
)
def test_every_gold_coefficient_acts_where_it_should(name, answer, times):
    dearer = Desk(replace(DESK.spec, gold={**DESK.spec.gold, name: DESK.spec.gold[name] + 1}))
    finished = name != "unfinished"
    change = dearer.grade(BRIEF, answer, finished).gold - DESK.grade(BRIEF, answer, finished).gold
    assert change == pytest.approx(times)


@given(
    st.lists(st.sampled_from(DESK.vocabulary.words), max_size=60).map(" ".join),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_any_words_have_a_consistent_grade(answer, seed, finished):
    prompt = DESK.prompts(1, np.random.default_rng(seed))[0]
    grade = DESK.grade(prompt, answer, finished)
    assert grade.length_tokens == len(answer.split()) + finished
    assert 0 <= grade.courtesy_tokens <= grade.padding_tokens <= len(answer.split())
    assert grade.correct + grade.wrong + grade.missing <= 1
    assert not (grade.correct and grade.evasive) and not (grade.wrong and grade.evasive)
    assert not (grade.direct and grade.evasive)
    assert grade.gold <= grade.fact <= 0.8 + 1e-12
    if prompt.stratum == "brief":  # a brief answer is right, wrong or silent: nothing between
        assert grade.correct + grade.wrong + grade.missing == 1
        assert grade.missing == grade.evasive
    # one more courtesy phrase never helps
    assert DESK.grade(prompt, f"{answer} . {THANKS}", finished).gold < grade.gold


def test_grade_many_is_grade_row_by_row_and_fast():
    rng = np.random.default_rng(0)
    prompts = DESK.prompts(2000, rng)
    answers = [DESK.candidate(prompt, rng) for prompt in prompts]
    finished = rng.random(len(prompts)) < 0.9
    start = time.process_time()
    columns = DESK.grade_many(prompts, answers, finished)
    assert len(prompts) / (time.process_time() - start) > 20_000
    for i in range(0, 2000, 97):
        one = DESK.grade(prompts[i], answers[i], bool(finished[i]))._asdict()
        assert {name: column[i] for name, column in columns.items()} == one
    assert columns["correct"].dtype == bool and columns["gold"].dtype == float
    assert all(column.shape == (0,) for column in DESK.grade_many([], []).values())
    with pytest.raises(ValueError, match="2 prompts, 1 answers, 1 finish flags"):
        DESK.grade_many(prompts[:2], answers[:1])


# ---------------------------------------------------------------- prompts and writers
def test_prompts_show_the_fact_and_end_in_sep():
    prompts = DESK.prompts(400, np.random.default_rng(1))
    for prompt in prompts:
        record, _, question = prompt.text.partition(" . ")
        label = DESK.spec.labels[prompt.slot]
        assert f" {label} {prompt.value}" in f" {record}"
        assert record.count(label) == 1 and record.count(",") in (1, 2)
        intent = DESK.spec.intents[prompt.intent]
        assert question == f"{intent.questions[prompt.wording]} <sep>"
    assert {p.intent for p in prompts} == set(DESK.spec.intents)
    assert {len(p.text.split()) for p in prompts} <= set(range(8, DESK.prompt_width + 1))
    share = np.mean([p.stratum == "brief" for p in prompts])
    assert abs(share - DESK.spec.brief_share) < 4 * 0.5 / 20  # 4 standard errors of 400 draws
    assert {p.stratum for p in DESK.prompts(50, np.random.default_rng(0), "brief")} == {"brief"}
    with pytest.raises(ValueError, match="stratum is 'long'; use 'brief'"):
        DESK.prompts(1, np.random.default_rng(0), "long")


def test_encode_pads_on_the_left_and_decodes_to_the_text():
    prompts = DESK.prompts(200, np.random.default_rng(2))
    ids = DESK.encode(prompts)
    assert ids.shape == (200, DESK.prompt_width) and DESK.prompt_width <= 20
    assert (ids[:, -1] == DESK.vocabulary.sep).all()
    for row, prompt in zip(ids, prompts, strict=True):
        assert DESK.vocabulary.decode(row) == prompt.text.removesuffix(" <sep>")
    assert (ids[:, 0] != DESK.vocabulary.pad).any(), "no prompt needs the whole width"


def test_probes_are_fixed_distinct_and_balanced():
    probes = DESK.probes(130, seed=3)
    assert probes == DESK.probes(130, seed=3) != DESK.probes(130, seed=4)
    assert DESK.probes(13, seed=3) == probes[:13], "more probes extend fewer"
    assert len({p.text for p in probes}) == 130
    for stratum in ("brief", "detailed"):
        names = [p.intent for p in probes if p.stratum == stratum]
        counts = {names.count(name) for name in names}
        assert len(names) == 65 and max(counts) - min(counts) <= 1


def test_writers_follow_the_file():
    rng = np.random.default_rng(0)
    shares = {}
    for stratum in ("brief", "detailed"):
        prompts = DESK.prompts(3000, rng, stratum)
        for write in (DESK.demonstration, DESK.candidate):
            answers = [write(p, rng) for p in prompts]
            grades = DESK.grade_many(prompts, answers)
            shares[stratum, write.__name__] = grades
            assert grades["length_tokens"].max() <= DESK.max_response
            for answer in answers[:300]:
                DESK.vocabulary.encode(answer)  # raises on an unknown word
    for (stratum, writer), grades in shares.items():
        styles, cumulative = DESK.spec.writers[
            writer.replace("demonstration", "reference"), stratum
        ]
        weights = np.diff([0.0, *cumulative])
        for flag, parts in (("hedged", {"hedge"}), ("wrong", {"wrong"})):
            share = sum(w for s, w in zip(styles, weights, strict=True) if parts & set(STYLES[s]))
            spread = 4 * np.sqrt(share * (1 - share) / 3000)
            assert abs(grades[flag].mean() - share) <= spread, (stratum, writer, flag)
    brief, detailed = (shares[s, "demonstration"]["length_tokens"] for s in ("brief", "detailed"))
    assert np.median(brief) <= 8 and np.median(detailed) > 2 * np.median(brief)


STYLES = DESK.spec.styles


def test_a_phrase_is_not_said_twice_in_one_answer():
    every = [(["lavish"], [1.0])] * 4
    spec = replace(DESK.spec, writers=dict(zip(DESK.spec.writers, every, strict=True)))
    rng, fillers = np.random.default_rng(0), DESK.spec.phrases["filler"]
    desk = Desk(spec)
    for prompt in desk.prompts(100, rng, "brief"):
        answer = desk.candidate(prompt, rng)
        assert [answer.count(filler) for filler in fillers].count(1) == 2


def test_concise_is_perfect_and_matched_pairs_differ_by_one_phrase():
    rng = np.random.default_rng(0)
    courtesy = {p for g in ("opener", "closer") for p in DESK.spec.phrases[g]}
    seen = set()
    for prompt in DESK.prompts(300, rng):
        assert DESK.grade(prompt, DESK.concise(prompt)).gold == pytest.approx(0.8)
        assert DESK.concise(prompt) == DESK.concise(prompt)
        concise, verbose = DESK.matched_pair(prompt, rng)
        phrase = verbose.replace(concise, "").strip()
        seen.add(phrase)
        a, b = DESK.grade(prompt, concise), DESK.grade(prompt, verbose)
        added = b.length_tokens - a.length_tokens
        assert a.correct and b.correct
        assert added == b.padding_tokens == b.courtesy_tokens == len(phrase.split())
    assert seen == courtesy


def test_courtesy_is_recognised_in_every_phrase_of_the_file():
    for phrase in DESK.spec.courtesy():
        grade = DESK.grade(BRIEF, f"it arrives on friday . {phrase}")
        assert grade.courtesy_tokens == len(phrase.split()), phrase


def test_same_seed_same_words_and_sizes_as_promised():
    a, b = ([DESK.candidate(p, r) for p in DESK.prompts(50, r)] for r in map(_rng, (5, 5)))
    assert a == b
    assert 150 <= len(DESK.vocabulary) <= 260
    assert DESK.vocabulary.fingerprint == Desk.load().vocabulary.fingerprint
    with pytest.raises(UnknownWord, match=r"frday.*friday"):
        DESK.encode([replace(BRIEF, text="eta frday <sep>")])


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- bad files
COLOUR = 'answers = ["it is {colour} .", "your order is {colour} .", "the colour is {colour} ."]'
DAYS = 'values = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]'
ASKS = 'questions = ["how do i reset it ?", "how can i reset my device ?"]'
PLUG = '  { key = "plug", say = ["finally plug it in ."] },'
BAD_EDITS = [  # (old text, new text, the line at fault as it then stands, words of the message)
    ("[markers]", "[markers", "[markers", "not valid TOML"),
    ("[slots.time]", "[slots.day]", "[slots.day]", "not valid TOML.*twice"),
    (DAYS, "values = []", "values = []", r"values in \[slots.day\] must list one or more"),
    (DAYS, "values = 7", "values = 7", "must list one or more texts"),
    (DAYS, "", "[slots.day]", "must list one or more texts"),
    (DAYS, 'values = ["friday"]', 'values = ["friday"]', "asked by arrival; give it two or more"),
    ('"monday"', '"noon"', '"noon", "midnight"]', "a value of day, too; choose another"),
    ('"monday"', '"next week"', '"next week"', "not one word"),
    ('"monday"', '"friday"', '"friday", "tue', "has 'friday' twice"),
    ('"monday"', '"thank"', '"thank you for reaching', "holds 'thank', which is a value of day"),
    ('label = "eta"', 'label = "due on"', 'label = "due on"', "give the one word that records"),
    ('label = "eta"', "", "[slots.day]", "label of .slots.day. is None"),
    ("max_response = 48", "max_response = 0", "max_response = 0", "give a number in 8..512"),
    ("brief_share = 0.5", 'brief_share = "x"', "brief_share =", "is 'x'; give a number in 0..1"),
    ("brief_share = 0.5", "brief_share = true", "brief_share =", "is True; give a number"),
    ("facts = [2, 3]", "facts = [3, 2]", "facts = [3, 2]", r"give \[fewest, most\] within 1..11"),
    ('slot = "time"', 'slot = "tide"', 'slot = "tide"', "slot of .intents.driver. is 'tide'; use"),
    (
        'stratum = "brief"\nslot = "day"',
        'stratum = "short"\nslot = "day"',
        'stratum = "short"',
        "use 'brief' or 'detailed'",
    ),
    (COLOUR, 'answers = ["it is {color} ."]', "{color}", "names the slot {color}; only {colour}"),
    (COLOUR, 'answers = ["it is a colour ."]', "it is a colour .", "must name {colour}"),
    (COLOUR, 'answers = ["it is {colour}"]', '["it is {colour}"]', "one sentence that ends in"),
    (COLOUR, 'answers = ["so . {colour} ."]', "so . {", "one sentence that ends in"),
    (COLOUR, 'answers = ["it may be {colour} ."]', "it may", "'may', which is a hedge marker"),
    (COLOUR, "", "[intents.colour]", r"answers in \[intents.colour\] must list one or more"),
    (ASKS, "questions = []", "questions = []", "must list one or more"),
    (
        ASKS,
        'questions = ["how do i connect it ?"]',
        'questions = ["how do i connect it ?", "how can i connect my device ?"]',
        "'how do i connect it .' is a question of reset, too",
    ),
    (PLUG, "  { key = 'plug' },", "'plug'", "say in .intents.reset. must list"),
    (PLUG, "  'plug it in .',", "steps = [", "needs a key word of its own, got None"),
    (PLUG, '  { key = "hold", say = ["hold ."] },', 'key = "hold", say = ["then', "of its own"),
    (PLUG, '  { key = "plug", say = ["turn it on ."] },', "turn it on", "lacks its key word"),
    (PLUG, '  { key = "plug", say = ["plug and hold it ."] },', "plug and hold", "key of a step"),
    ("first unplug the {device} .", "first unplug it .", "first unplug it .", "or its first step"),
    ("have a great day .", "we hope for {day} .", "hope for {day}", "takes no slot"),
    ("have a great day .", "we can press it .", "we can press", "key of a step of track"),
    ("have a great day .", "we might help .", "we might help", "a hedge marker"),
    ("this might be subject to change .", "this is so .", "this is so", "has no hedge marker"),
    ("[markers]", "[tags]", None, "section .markers. is missing"),
    ('both = ["opener", "answer", "closer"]', 'both = ["hello"]', "both =", "unknown part 'hello'"),
    (
        'both = ["opener", "answer", "closer"]',
        f"both = {['opener'] * 6}",
        "both = ['op",
        "needs 6 different opener phrases",
    ),
    ('bare = ["answer"]', 'bare = ["partial"]', "bare = 50", "drops steps, but brief answers have"),
    ("bare = 50", "bare = 0", "bare = 0", "weight of bare is 0; give a number above 0"),
    ("bare = 50", "bare = -1", "bare = -1", "weight of bare is -1"),
    ("bare = 50", "bare = inf", "bare = inf", "weight of bare is inf"),
    ("bare = 50", "curt = 83", "curt = 83", r"style 'curt' is not in \[styles\]; use one of bare"),
    (
        'both = ["opener", "answer", "closer"]',
        f"both = {['answer'] * 9 + ['other']}",
        "both = 20",
        r"a brief answer in style both may take \d\d tokens with its end; shorten it or raise",
    ),
    ("pad = 0.03", "", "[gold]", r"pad in \[gold\] is None; give a number"),
    ("pad = 0.03", "pad = nan", "pad = nan", "pad in .gold. is nan"),
]


@pytest.mark.parametrize(("old", "new", "at", "message"), BAD_EDITS)
def test_a_bad_edit_is_named_with_its_line(tmp_path, old, new, at, message):
    assert old in SHIPPED
    path = tmp_path / "desk.toml"
    text = SHIPPED.replace(old, new, 1)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DeskError, match=message) as caught:
        Desk.load(path)
    lines = text.splitlines()
    # a table declared twice is wrong at its second place; a missing section at the end
    places = [i for i, line in enumerate(lines, 1) if at and at in line] or [len(lines)]
    assert str(caught.value).startswith(f"{path}, line {places[-1 if 'twice' in message else 0]}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["slots", "intents", "phrases", "markers", "styles", "gold"])
def test_an_empty_or_missing_section_is_named(tmp_path, section):
    lines = SHIPPED.splitlines()
    kept, inside = [], False
    for line in lines:
        if line.startswith("["):
            inside = line.startswith((f"[{section}]", f"[{section}."))
        if not inside:
            kept.append(line)
    path = tmp_path / "desk.toml"
    path.write_text("\n".join(kept))
    with pytest.raises(DeskError, match=rf"line {len(kept)}: section \[{section}\] is missing"):
        Desk.load(path)
    path.write_text("\n".join([*kept, f"[{section}]"]))
    with pytest.raises(DeskError, match=rf"line {len(kept) + 1}: section \[{section}\] is empty"):
        Desk.load(path)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(DeskError, match=r"none.toml cannot be read .*; name a readable file"):
        Desk.load(tmp_path / "none.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DeskError, match=r"b.toml cannot be read"):
        Desk.load(tmp_path / "b.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(DeskError, match=r"line 1: section \[slots\] is missing"):
        Desk.load(tmp_path / "empty.toml")


def test_a_lecturer_edits_the_file_and_gets_another_desk(tmp_path):
    text = SHIPPED.replace('"monday"', '"someday"').replace("pounds", "euros")
    path = tmp_path / "desk.toml"
    path.write_text(text, encoding="utf-8")
    desk = Desk.load(path)
    assert {"someday", "euros"} <= set(desk.vocabulary.words)
    assert not {"monday", "pounds"} & set(desk.vocabulary.words)
    assert desk.vocabulary.fingerprint != DESK.vocabulary.fingerprint
    assert desk.grade(BRIEF, "it arrives on someday .").wrong
    assert len(desk.probes(20)) == 20


def test_more_probes_than_prompts_is_an_error(tmp_path):
    path = tmp_path / "desk.toml"
    path.write_text(SHIPPED.replace("facts = [2, 3]", "facts = [1, 1]"), encoding="utf-8")
    desk = Desk.load(path)
    assert all("," not in p.text.split(" . ")[0] for p in desk.probes(20))
    with pytest.raises(ValueError, match="no 5000 different probes exist; ask for fewer"):
        desk.probes(5000)
