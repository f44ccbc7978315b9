"""Reading data/desk.toml: from a text that a lecturer edits to a checked `DeskSpec`.

Every rule that grading relies on is checked here, once, and every complaint names the file, the
line and what to change: a desk that loads can be graded. What the entries mean is written beside
them in the file itself, what is done with them in `desk`. Left out on purpose: default entries.
"""

import re
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its old name
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

STRATA = ("brief", "detailed")
WRITERS = ("reference", "candidate")
PARTS = ("answer", "wrong", "partial", "other")  # what a style may hold besides phrases
GOLD = ("correct", "wrong", "missing", "direct", "pad", "hedge", "unfinished")


class DeskError(ValueError):
    """A desk file that cannot be used; the message names file, line and what to change."""


@dataclass(frozen=True)
class Intent:
    """One kind of request. `says` lists what a full answer states, in order.

    Detailed: one (key word, wordings) a step. Brief: the single entry ("", wordings).
    """

    name: str
    stratum: str
    slot: str
    questions: tuple[str, ...]
    says: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def sentences(self) -> list[str]:
        """Every wording of every entry, slots unfilled."""
        return [text for _, wordings in self.says for text in wordings]

    @property
    def longest(self) -> dict[str, int]:
        """Most tokens that a writer spends on each entry of `says`."""
        return {key: max(len(text.split()) for text in texts) for key, texts in self.says}


@dataclass(frozen=True)
class DeskSpec:
    """A checked desk file. Lengths are in tokens, EOS included; shares are probabilities."""

    max_response: int
    brief_share: float
    facts: tuple[int, int]  # fewest and most facts on a record line
    slots: dict[str, tuple[str, ...]]  # slot -> values
    labels: dict[str, str]  # slot -> its word on the record line
    intents: dict[str, Intent]
    phrases: dict[str, tuple[str, ...]]  # opener, closer, hedge and further groups
    markers: frozenset[str]  # words that make a sentence a hedge
    styles: dict[str, tuple[str, ...]]  # style -> parts, in order
    writers: dict[tuple[str, str], tuple[list[str], list[float]]]  # styles, cumulative shares
    gold: dict[str, float]  # coefficients of gold, in points

    def courtesy(self) -> list[str]:
        """All phrases that are polite rather than evasive."""
        return [p for group, phrases in self.phrases.items() if group != "hedge" for p in phrases]

    def plain(self) -> list[str]:
        """All sentences that are not courtesy: questions, answers, steps, hedges."""
        texts = [*self.phrases["hedge"]]
        for intent in self.intents.values():
            texts += [*intent.questions, *intent.sentences]
        return texts

    def words(self) -> set[str]:
        """Every word that a prompt or an answer may hold."""
        texts = [*self.courtesy(), *self.plain(), ", ."]
        words = {word for text in texts for word in text.split() if "{" not in word}
        return words.union(*self.slots.values(), self.labels.values(), self.markers)


def read_desk(path: Path) -> DeskSpec:
    """Read and check a desk file. Raises DeskError."""
    sheet = _Sheet(path)
    slots = {name: sheet.texts(f"slots.{name}", "values") for name in sheet.table("slots")}
    intents = {name: _intent(sheet, name, slots) for name in sheet.table("intents")}
    groups = dict.fromkeys(("opener", "closer", "hedge", *sheet.table("phrases")))
    phrases = {group: sheet.texts("phrases", group) for group in groups}
    for text in (text for texts in phrases.values() for text in texts):
        _sentence(sheet, "phrases", text, None)
    for stratum in STRATA:
        if all(intent.stratum != stratum for intent in intents.values()):
            raise sheet.error("intents", "", f"no {stratum} intent; write at least one")
    spec = DeskSpec(
        max_response=int(sheet.number("desk", "max_response", 8, 512)),
        brief_share=sheet.number("desk", "brief_share", 0, 1),
        facts=_facts(sheet, len(slots)),
        slots=slots,
        labels={name: _label(sheet, name) for name in slots},
        intents=intents,
        phrases=phrases,
        markers=frozenset(sheet.texts("markers", "hedge")),
        styles={name: sheet.texts("styles", name, False) for name in sheet.table("styles")},
        writers={},
        gold={name: float(sheet.number("gold", name, -10, 10)) for name in GOLD},
    )
    _check_words(sheet, spec)
    _check_questions(sheet, spec)
    for writer in WRITERS:
        for stratum in STRATA:
            spec.writers[writer, stratum] = _writer(sheet, spec, writer, stratum)
    return spec


class _Sheet:
    """A TOML file with line numbers: every complaint about an entry can point at it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DeskError(f"{path} cannot be read ({error}); name a readable file") from None
        self.lines = text.splitlines()
        try:
            self.data: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            at = re.search(r"line (\d+)", str(error))
            line = at.group(1) if at else max(len(self.lines), 1)
            raise DeskError(f"{path}, line {line}: not valid TOML ({error}); correct it") from None

    def error(self, section: str, entry: str, message: str) -> DeskError:
        return DeskError(f"{self.path}, line {self.line(section, entry)}: {message}")

    def line(self, section: str, entry: str = "") -> int:
        """Line of an entry (a key, or a text in quotes), else of the section or its parent."""
        heads = [i for i, line in enumerate(self.lines) if re.match(r"\s*\[[\w.\- ]+\]", line)]
        named = [i for i in heads if self.lines[i].split("]")[0].strip(" [") == section]
        if not named:
            above, _, name = section.rpartition(".")
            return self.line(above, name) if above else max(len(self.lines), 1)
        start = named[0]
        end = next((i for i in heads if i > start), len(self.lines))
        sought = rf"\s*{re.escape(entry)}\s*=|[^#]*[\"']{re.escape(entry)}[\"']"
        hits = (i for i in range(start + 1, end) if entry and re.match(sought, self.lines[i]))
        return next(hits, start) + 1

    def table(self, section: str) -> dict[str, Any]:
        """The table of a dotted name; an absent or empty one is an error."""
        found: Any = self.data
        for name in section.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, dict) or not found:
            state = "is missing" if found is None else "is empty"
            raise self.error(section, "", f"section [{section}] {state}; give it an entry")
        return found

    def number(self, section: str, key: str, low: float, high: float) -> float:
        value = self.table(section).get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return value
        what = f"{key} in [{section}] is {value!r}; give a number in {low}..{high}"
        raise self.error(section, key, what)

    def texts(self, section: str, key: str, unique: bool = True) -> tuple[str, ...]:
        return self.listed(section, key, self.table(section).get(key), unique)

    def listed(
        self, section: str, key: str, values: Any, unique: bool = True, at: str = ""
    ) -> tuple[str, ...]:
        """A list of one or more texts, white space tidied; `at` is an entry on its line."""
        texts = values if isinstance(values, list) else []
        if not texts or not all(isinstance(v, str) and v.split() for v in texts):
            what = f'{key} in [{section}] must list one or more texts: {key} = ["..."]'
            raise self.error(section, at or key, what)
        tidy = tuple(" ".join(v.split()) for v in texts)
        if unique and len(set(tidy)) < len(tidy):
            twice = next(text for text in tidy if tidy.count(text) > 1)
            what = f"{key} in [{section}] has {twice!r} twice; drop one"
            raise self.error(section, at or key, what)
        return tidy


def _label(sheet: _Sheet, slot: str) -> str:
    label = sheet.table(f"slots.{slot}").get("label")
    if not isinstance(label, str) or len(label.split()) != 1:
        what = f"label of [slots.{slot}] is {label!r}; give the one word that records show"
        raise sheet.error(f"slots.{slot}", "label", what)
    return label.strip()


def _facts(sheet: _Sheet, n_slots: int) -> tuple[int, int]:
    match facts := sheet.table("desk").get("facts"):
        case [int(low), int(high)] if 1 <= low <= high <= n_slots:
            return low, high
    what = f"facts in [desk] is {facts!r}; give [fewest, most] within 1..{n_slots}, the slots"
    raise sheet.error("desk", "facts", what)


def _intent(sheet: _Sheet, name: str, slots: dict[str, tuple[str, ...]]) -> Intent:
    section = f"intents.{name}"
    table = sheet.table(section)
    slot = table.get("slot")
    stratum = table.get("stratum")
    if slot not in slots:
        what = f"slot of [{section}] is {slot!r}; use one of {', '.join(slots)}"
        raise sheet.error(section, "slot", what)
    if stratum not in STRATA:
        what = f"stratum of [{section}] is {stratum!r}; use 'brief' or 'detailed'"
        raise sheet.error(section, "stratum", what)
    if stratum == "brief":
        says = (("", sheet.texts(section, "answers")),)
    else:
        says = _steps(sheet, section)
    intent = Intent(name, stratum, slot, sheet.texts(section, "questions"), says)
    for text in intent.sentences:
        _sentence(sheet, section, text, slot)
    for text in says[0][1]:
        if f"{{{slot}}}" not in text.split():
            what = f"{text!r} must name {{{slot}}}: the answer, or its first step, gives the fact"
            raise sheet.error(section, text, what)
    return intent


def _steps(sheet: _Sheet, section: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    raw = sheet.table(section).get("steps")
    if not isinstance(raw, list) or len(raw) < 2:
        what = f"[{section}] is detailed; give it steps = [...] with two or more steps"
        raise sheet.error(section, "steps", what)
    steps: dict[str, tuple[str, ...]] = {}
    for step in raw:
        key = step.get("key") if isinstance(step, dict) else None
        if not isinstance(key, str) or not key or key in steps:
            what = f"each step of [{section}] needs a key word of its own, got {key!r}"
            raise sheet.error(section, key if isinstance(key, str) else "steps", what)
        steps[key] = sheet.listed(section, "say", step.get("say"), at=key)
        for text in steps[key]:
            if key not in text.split():
                raise sheet.error(section, text, f"{text!r} lacks its key word {key!r}; add it")
    return tuple(steps.items())


def _sentence(sheet: _Sheet, section: str, text: str, slot: str | None) -> None:
    """One sentence, which names no slot but `slot`."""
    if text.split().count(".") != 1 or not text.endswith(" ."):
        raise sheet.error(section, text, f"{text!r} must be one sentence that ends in ' .'")
    for word in text.split():
        if ("{" in word or "}" in word) and (slot is None or word != f"{{{slot}}}"):
            known = f"only {{{slot}}} is known here" if slot else "a phrase takes no slot"
            raise sheet.error(section, text, f"{text!r} names the slot {word}; {known}")


def _check_words(sheet: _Sheet, spec: DeskSpec) -> None:
    """A word that decides a grade means one thing only."""
    owner: dict[str, str] = {}
    every: dict[str, str] = {}
    for slot, values in spec.slots.items():
        for value in values:
            if len(value.split()) != 1 or value in owner:
                other = f"a value of {owner[value]}, too" if value in owner else "not one word"
                what = f"value {value!r} of {slot} is {other}; choose another word"
                raise sheet.error(f"slots.{slot}", value, what)
            owner[value] = f"a value of {slot}"
    marker = dict.fromkeys(spec.markers, "a hedge marker")
    for name, intent in spec.intents.items():
        keys = {key: f"the key of a step of {name}" for key, _ in intent.says if key}
        every |= keys
        for key, texts in intent.says:
            others = {other: role for other, role in keys.items() if other != key}
            _refuse(sheet, f"intents.{name}", texts, {**owner, **marker, **others})
        # a question may use the key words of steps: it is never graded
        _refuse(sheet, f"intents.{name}", intent.questions, {**owner, **marker})
    for group, texts in spec.phrases.items():
        taken = {**owner, **every}
        if group != "hedge":
            taken.update(marker)
        _refuse(sheet, "phrases", texts, taken)
    for text in spec.phrases["hedge"]:
        if spec.markers.isdisjoint(text.split()):
            what = f"{text!r} has no hedge marker; list one of its words in [markers]"
            raise sheet.error("phrases", text, what)


def _refuse(sheet: _Sheet, section: str, texts: tuple[str, ...], taken: dict[str, str]) -> None:
    for text in texts:
        for word in text.split():
            if word in taken:
                what = f"{text!r} holds {word!r}, which is {taken[word]}; use another word"
                raise sheet.error(section, text, what)


def _check_questions(sheet: _Sheet, spec: DeskSpec) -> None:
    """Two intents that ask alike could not be told apart; a lone value could not be got wrong."""
    asked: dict[str, str] = {}
    for name, intent in spec.intents.items():
        if len(spec.slots[intent.slot]) < 2:
            what = f"slot {intent.slot} is asked by {name}; give it two or more values"
            raise sheet.error(f"slots.{intent.slot}", "values", what)
        for question in intent.questions:
            if question in asked:
                what = f"{question!r} is a question of {asked[question]}, too; reword one"
                raise sheet.error(f"intents.{name}", question, what)
            asked[question] = name


def _writer(
    sheet: _Sheet, spec: DeskSpec, writer: str, stratum: str
) -> tuple[list[str], list[float]]:
    """Style names of a writer in a stratum and their cumulative shares."""
    section = f"writers.{writer}.{stratum}"
    weights = sheet.table(section)
    for style, weight in weights.items():
        if style not in spec.styles:
            what = f"style {style!r} is not in [styles]; use one of {', '.join(spec.styles)}"
            raise sheet.error(section, style, what)
        if type(weight) not in (int, float) or not 0 < weight < float("inf"):
            what = f"weight of {style} is {weight!r}; give a number above 0 or drop the line"
            raise sheet.error(section, style, what)
        longest = 1 + _longest(sheet, spec, section, style, stratum)
        if longest > spec.max_response:
            what = f"a {stratum} answer in style {style} may take {longest} tokens with its end; "
            what += f"shorten it or raise max_response ({spec.max_response})"
            raise sheet.error(section, style, what)
    total = sum(weights.values())
    return list(weights), [w / total for w in accumulate(weights.values())]


def _longest(sheet: _Sheet, spec: DeskSpec, section: str, style: str, stratum: str) -> int:
    """Tokens of the longest answer in a style, EOS not counted; its parts are checked first."""
    parts = spec.styles[style]
    longest = 0
    full: dict[str, int] = dict.fromkeys(STRATA, 0)
    for intent in spec.intents.values():
        full[intent.stratum] = max(full[intent.stratum], sum(intent.longest.values()))
    room: dict[str, int] = dict.fromkeys(PARTS, full[stratum])
    room["other"] = max(full.values())  # an answer to another question, of any stratum
    for part in dict.fromkeys(parts):
        times = parts.count(part)
        phrases = spec.phrases.get(part, ())
        if part not in PARTS and not phrases:
            known = ", ".join((*PARTS, *spec.phrases))
            what = f"style {style} has the unknown part {part!r}; use {known}"
            raise sheet.error("styles", style, what)
        if part == "partial" and stratum == "brief":
            what = f"style {style} drops steps, but brief answers have none; drop the line"
            raise sheet.error(section, style, what)
        if phrases and times > len(phrases):
            what = f"style {style} needs {times} different {part} phrases; write more of them"
            raise sheet.error("styles", style, what)
        lengths = sorted((len(p.split()) for p in phrases), reverse=True)
        longest += sum(lengths[:times]) if phrases else times * room[part]
    return longest
