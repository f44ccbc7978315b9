"""The support desk: a small world in real English in which the truth of an answer is known.

A prompt is a record line with facts and a customer's question. *Brief* prompts ask for one fact,
*detailed* prompts for a few steps, so length is deserved only on the latter. The desk writes
prompts and human-like answers, and it grades any text exactly. Grades belong to the auditor: no
model ever sees them. All words and numbers live in data/desk.toml; edit it, get another desk.

Left out on purpose: spelling, grammar and paraphrase. An answer is graded by its words alone (the
values of the asked slot, the key words of the steps, the marker words of a hedge), so a grade is
defined for any text that a policy may emit, and it cannot be argued with.

Sources: the two spurious axes, length and hedging, follow Singhal et al. 2023 (arXiv 2310.03716)
and Ouyang et al. 2022 (arXiv 2203.02155, section 4.3).
"""

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from minirlhf.desk.toml import PARTS, STRATA, DeskError, DeskSpec, Intent, read_desk
from minirlhf.engine.files import data_folder, fingerprint
from minirlhf.text import Vocabulary, left_pad

__all__ = ["STRATA", "Desk", "DeskError", "Grade", "Prompt"]


@dataclass(frozen=True)
class Prompt:
    """A customer's request. `value` is the true value of the asked `slot` on this record."""

    text: str
    intent: str
    stratum: str  # "brief" or "detailed": the desk's label; the audit measures its own
    slot: str
    value: str
    wording: int  # which of the intent's questions


class Grade(NamedTuple):
    """The auditor's view of one answer. Tokens are words and punctuation."""

    length_tokens: int  # with EOS if finished
    correct: bool  # the right value and no other of its slot; detailed: and every step
    wrong: bool  # another value of the asked slot stands anywhere
    missing: bool  # not wrong, but no right value (detailed: no complete step) either
    direct: bool  # the first sentence already names a value of the slot, or a step
    evasive: bool  # no value of the asked slot and no step anywhere
    hedged: bool  # some sentence has a hedge marker
    finished: bool  # ended by EOS
    padding_tokens: int  # tokens that do not state the fact or a step for the first time
    courtesy_tokens: int  # padding in sentences with a courtesy word and no hedge marker
    steps_share: float  # share of the steps that are complete; brief: 1 with the right value
    fact: float  # the part of gold, in points, that only a reader of the record can see
    gold: float  # quality in points


class Desk:
    """The desk of one checked file: it writes prompts and answers, and it grades.

    `vocabulary` holds every word of the desk; `prompt_width` and `max_response` (EOS included)
    are the fixed lengths, in tokens, of a prompt and of the longest response.
    """

    def __init__(self, spec: DeskSpec):
        self.spec = spec
        self.max_response = spec.max_response
        self.vocabulary = Vocabulary(sorted(spec.words()))
        questions = [text for intent in spec.intents.values() for text in intent.questions]
        longest = max(len(text.split()) for text in questions)
        # label, value and "," or "." of each fact, the question, "<sep>"
        self.prompt_width = 3 * spec.facts[1] + longest + 1
        self._by_stratum = {s: [i for i in spec.intents.values() if i.stratum == s] for s in STRATA}
        # What grading looks up, made once: a batch is graded at every audit of every run.
        self._values: dict[str, frozenset[str]] = {}  # intent -> values of its slot
        self._room: dict[str, dict[str, int]] = {}  # intent -> tokens of each entry it says
        for name, intent in spec.intents.items():
            self._values[name] = frozenset(spec.slots[intent.slot])
            self._room[name] = intent.longest
        plain = {word for text in spec.plain() for word in text.split()}
        self._polite = {word for text in spec.courtesy() for word in text.split()} - plain

    @classmethod
    def load(cls, path: str | Path | None = None) -> "Desk":
        """The desk of a file, or the one that ships with the package. Raises DeskError."""
        return cls(read_desk(Path(path) if path else data_folder() / "desk.toml"))

    @property
    def fingerprint(self) -> str:
        """A short hash of the whole file; a run stores it to refuse another desk."""
        return fingerprint(asdict(self.spec))

    # ------------------------------------------------------------------ prompts
    def prompts(self, n: int, rng: np.random.Generator, stratum: str | None = None) -> list[Prompt]:
        """`n` random prompts, mixed by the desk's brief_share or all of one `stratum`."""
        if stratum is not None and stratum not in STRATA:
            raise ValueError(f"stratum is {stratum!r}; use 'brief', 'detailed' or None for both")
        out = []
        for _ in range(n):
            kind = stratum or STRATA[rng.random() >= self.spec.brief_share]
            intent = _pick(self._by_stratum[kind], rng)
            out.append(self._prompt(intent, rng))
        return out

    def probes(self, n: int, seed: int = 0) -> list[Prompt]:
        """`n` fixed prompts, all different, in turn over the strata and over their intents."""
        rng = np.random.default_rng(seed)
        found: dict[str, Prompt] = {}
        for number in range(n):
            turn, stratum = divmod(number, len(STRATA))
            intents = self._by_stratum[STRATA[stratum]]
            intent = intents[turn % len(intents)]
            for _ in range(200):
                prompt = self._prompt(intent, rng)
                if prompt.text not in found:
                    found[prompt.text] = prompt
                    break
            else:
                raise ValueError(f"no {n} different probes exist; ask for fewer or add values")
        return list(found.values())

    def _prompt(self, intent: Intent, rng: np.random.Generator) -> Prompt:
        spec = self.spec
        fewest, most = spec.facts
        # which facts the record shows: the asked one, at any place among some others
        others = [slot for slot in spec.slots if slot != intent.slot]
        order = rng.permutation(len(others))
        count = fewest - 1 + int(rng.random() * (most - fewest + 1))
        shown = [others[i] for i in order[:count]]
        shown.insert(int(rng.random() * (len(shown) + 1)), intent.slot)
        values = {slot: _pick(spec.slots[slot], rng) for slot in shown}
        facts = " , ".join(f"{spec.labels[slot]} {value}" for slot, value in values.items())
        wording = int(rng.random() * len(intent.questions))
        text = f"{facts} . {intent.questions[wording]} <sep>"
        value = values[intent.slot]
        return Prompt(text, intent.name, intent.stratum, intent.slot, value, wording)

    def encode(self, prompts: Sequence[Prompt]) -> Tensor:
        """Prompts as one LongTensor [B, prompt_width], padded on the left."""
        ids = [self.vocabulary.encode(prompt.text) for prompt in prompts]
        return left_pad(ids, self.prompt_width)

    # ------------------------------------------------------------------ answers
    def demonstration(self, prompt: Prompt, rng: np.random.Generator) -> str:
        """An answer as the reference's teachers write it: mostly to the point."""
        return self._write("reference", prompt, rng)

    def candidate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        """An answer as annotators get it to compare: every style of the desk occurs."""
        return self._write("candidate", prompt, rng)

    def concise(self, prompt: Prompt, rng: np.random.Generator | None = None) -> str:
        """A correct answer without padding, in the first wording or in a random one."""
        return self._fill(prompt, self._says(prompt), prompt.value, rng)

    def matched_pair(
        self, prompt: Prompt, rng: np.random.Generator, *, hedge: bool = False
    ) -> tuple[str, str]:
        """(concise, the same with ONE opener or closer): they differ in courtesy only. Or, with
        `hedge`, with one hedge after it."""
        concise = self.concise(prompt, rng)
        if hedge:
            return concise, f"{concise} {_pick(self.spec.phrases['hedge'], rng)}"
        if rng.random() < 0.5:
            return concise, f"{_pick(self.spec.phrases['opener'], rng)} {concise}"
        return concise, f"{concise} {_pick(self.spec.phrases['closer'], rng)}"

    def padded(self, answer: str, rng: np.random.Generator, *, hedges: bool = False) -> str:
        """An answer inside one to four phrases, none twice: the same content in another manner."""
        groups = ["opener", "filler", "filler", "closer"]
        if hedges:
            groups += ["hedge", "hedge"]
        kept = rng.permutation(len(groups))[: 1 + int(rng.random() * 4)]
        said = {}  # phrase -> group: a phrase that is picked twice is said once
        for i in sorted(kept):
            said[_pick(self.spec.phrases[groups[i]], rng)] = groups[i]
        before = [phrase for phrase, group in said.items() if group == "opener"]
        after = [phrase for phrase, group in said.items() if group != "opener"]
        return " ".join([*before, answer, *after])

    def _write(self, writer: str, prompt: Prompt, rng: np.random.Generator) -> str:
        """An answer in one of the writer's styles, part by part."""
        styles, cumulative = self.spec.writers[writer, prompt.stratum]
        drawn = bisect(cumulative, rng.random())
        style = styles[min(drawn, len(styles) - 1)]  # shares may end a rounding below 1
        said: list[str] = []
        for part in self.spec.styles[style]:
            if part in PARTS:
                said.append(self._part(part, prompt, rng))
            else:  # a phrase, never twice in one answer
                unsaid = [phrase for phrase in self.spec.phrases[part] if phrase not in said]
                said.append(_pick(unsaid, rng))
        return " ".join(said)

    def _part(self, part: str, prompt: Prompt, rng: np.random.Generator) -> str:
        """The answer, or what is said in its place: a wrong value, some steps, another answer."""
        if part == "other":
            intents = [i for i in self.spec.intents.values() if i.name != prompt.intent]
            return self.concise(self._prompt(_pick(intents, rng), rng), rng)
        texts = self._says(prompt)
        value = prompt.value
        if part == "partial":  # at least one step, in order, but not all
            kept = rng.permutation(len(texts))[: 1 + int(rng.random() * (len(texts) - 1))]
            texts = [texts[i] for i in sorted(kept)]
        if part == "wrong":
            value = _pick([other for other in self.spec.slots[prompt.slot] if other != value], rng)
        return self._fill(prompt, texts, value, rng)

    def _says(self, prompt: Prompt) -> list[tuple[str, ...]]:
        """The wordings of each sentence of a full answer."""
        return [wordings for _, wordings in self.spec.intents[prompt.intent].says]

    def _fill(
        self,
        prompt: Prompt,
        texts: Sequence[Sequence[str]],
        value: str,
        rng: np.random.Generator | None,
    ) -> str:
        """One wording of each sentence, the slot filled with `value`."""
        said = [wordings[0] if rng is None else _pick(wordings, rng) for wordings in texts]
        return " ".join(said).replace(f"{{{prompt.slot}}}", value)

    # ------------------------------------------------------------------ grades
    def grade(self, prompt: Prompt, answer: str, finished: bool = True) -> Grade:
        """The exact quality of any text as an answer to `prompt`. Never raises on a text."""
        words = answer.split()
        room = self._room[prompt.intent]
        fact_key = next(iter(room))  # the entry that counts only with the record's value
        tried: set[str] = set()  # facts and steps stated once, rightly or wrongly
        done: set[str] = set()  # those that were right
        stated: set[str] = set()  # values of the asked slot
        direct = hedged = False
        padding = courtesy = 0
        for i, (sentence, here, tries) in enumerate(self._statements(prompt, words)):
            if i == 0:
                direct = bool(here or tries)
            hedges = not self.spec.markers.isdisjoint(sentence)
            hedged |= hedges
            # The first statement earns as many tokens as a writer would spend on it; whatever
            # is beyond (a repetition, a rambling sentence) is padding.
            extra = max(0, len(sentence) - sum(room[key] for key in tries - tried))
            padding += extra
            if extra and not hedges and not self._polite.isdisjoint(sentence):
                courtesy += extra
            stated |= here
            tried |= tries
            done |= tries if prompt.value in here else tries - {fact_key}
        wrong = bool(stated - {prompt.value})
        share = len(done) / len(room)
        fact = self._fact(share, wrong, direct)
        return Grade(
            length_tokens=len(words) + bool(finished),
            correct=share == 1 and not wrong,
            wrong=wrong,
            missing=not done and not wrong,
            direct=direct,
            evasive=not tried and not stated,
            hedged=hedged,
            finished=bool(finished),
            padding_tokens=padding,
            courtesy_tokens=courtesy,
            steps_share=share,
            fact=fact,
            gold=fact - self._style_cost(padding, hedged, finished),
        )

    def _statements(
        self, prompt: Prompt, words: list[str]
    ) -> Iterator[tuple[list[str], frozenset[str], set[str]]]:
        """Each sentence, the values of the asked slot in it, and the facts or steps it states."""
        values = self._values[prompt.intent]
        room = self._room[prompt.intent]
        for sentence in _sentences(words):
            here = values.intersection(sentence)
            stated = room.keys() & sentence  # a step is told by its key word
            if here and "" in room:  # brief: any value of the slot states the one fact
                stated = {""}
            yield sentence, here, stated

    def _fact(self, share: float, wrong: bool, direct: bool) -> float:
        """The part of gold, in points, that needs the record."""
        gold = self.spec.gold
        right = share * gold["correct"] + (1 - share) * gold["missing"]
        points = gold["wrong"] if wrong else right
        return points + gold["direct"] if direct else points

    def _style_cost(self, padding: int, hedged: bool, finished: bool) -> float:
        """What the style of an answer costs, in points."""
        gold = self.spec.gold
        hedging = gold["hedge"] if hedged else 0.0
        cut_off = 0.0 if finished else gold["unfinished"]
        return gold["pad"] * padding + hedging + cut_off

    def grade_many(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        finished: Sequence[bool] | np.ndarray | Tensor | None = None,
    ) -> dict[str, np.ndarray]:
        """Grades of B answers, one array [B] per field of `Grade`; all finished if not said."""
        ended = [True] * len(answers) if finished is None else [bool(flag) for flag in finished]
        if not len(prompts) == len(answers) == len(ended):
            counts = f"{len(prompts)} prompts, {len(answers)} answers, {len(ended)} finish flags"
            raise ValueError(f"{counts}: give one of each for every answer")
        grades = [self.grade(*row) for row in zip(prompts, answers, ended, strict=True)]
        return {name: np.array([getattr(g, name) for g in grades]) for name in Grade._fields}


def _sentences(words: list[str]) -> Iterator[list[str]]:
    """Runs of words up to and including a full stop; the last one may lack it."""
    start = 0
    for end, word in enumerate(words, 1):
        if word == ".":
            yield words[start:end]
            start = end
    if start < len(words):
        yield words[start:]


def _pick(options: Sequence, rng: np.random.Generator):
    """A uniform choice; ten times as fast as rng.choice, and the desk draws by the million."""
    return options[int(rng.random() * len(options))]
