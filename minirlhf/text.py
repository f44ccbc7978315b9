"""Words to token ids and back, and the two paddings that the whole package uses.

One word is one token, so a heat map reads as English and every id can be checked by eye. There
is no sub-word merging and no lower-casing: an unknown word is an error, never a silent <unk>.
Prompts are padded on the left and responses on the right, so that the last prompt token and the
first response token are neighbours in every row of a batch.
"""

import difflib
import hashlib
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

SPECIALS = ("<pad>", "<eos>", "<sep>")
# Their ids
PAD = 0
EOS = 1
SEP = 2


class UnknownWord(ValueError):
    """A word that is not in the vocabulary."""


class Vocabulary:
    """A fixed word list; ids 0, 1, 2 are <pad>, <eos> and <sep> (end of the prompt).

    The padding id differs from EOS on purpose: where they are one, the end of an answer is
    masked out of the loss and the policy never learns to stop.
    """

    pad = PAD
    eos = EOS
    sep = SEP

    def __init__(self, words: Iterable[str]):
        self.words: tuple[str, ...] = (*SPECIALS, *words)
        self._ids: dict[str, int] = {}
        for i, word in enumerate(self.words):
            if word in self._ids:
                raise ValueError(f"vocabulary lists {word!r} twice; list every word once")
            if word.split() != [word]:
                raise ValueError(f"word {word!r} is empty or holds white space; no text can say it")
            self._ids[word] = i

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`, split on white space. Raises UnknownWord."""
        try:
            return [self._ids[word] for word in text.split()]
        except KeyError as missing:
            word = str(missing.args[0])
            near = difflib.get_close_matches(word, self.words, n=3)
            if not near:
                near = [known for known in self.words if known.isalpha()][:3]
            raise UnknownWord(
                f"unknown word {word!r} in {text!r}; the {len(self)} known words include "
                f"{', '.join(near)} (write punctuation as a word of its own: 'friday .')"
            ) from None

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Text of `ids`, without the special tokens."""
        said = [int(i) for i in ids]
        return " ".join(self.words[i] for i in said if i >= len(SPECIALS))

    @property
    def fingerprint(self) -> str:
        """A short hash of the word list; a checkpoint stores it to refuse another vocabulary."""
        text = "\n".join(self.words)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def left_pad(sequences: Sequence[Sequence[int]], width: int | None = None) -> Int[Tensor, "B P"]:
    """Prompts as one LongTensor, padded on the left to `width` or to the longest.

    Raises ValueError if one is empty or does not fit.
    """
    if width is None:
        width = max(len(ids) for ids in sequences)
    out = torch.full((len(sequences), width), PAD)
    for row, ids in enumerate(sequences):
        _check_width(row, ids, width, "prompt")
        out[row, width - len(ids) :] = torch.tensor(ids)
    return out


def right_pad(
    sequences: Sequence[Sequence[int]], width: int | None = None
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Responses padded on the right to `width` or to the longest; their mask: True on given ids.

    Raises ValueError if one is empty or does not fit.
    """
    if width is None:
        width = max(len(ids) for ids in sequences)
    out = torch.full((len(sequences), width), PAD)
    # a mask of its own, as an answer may hold the padding's id: a policy can sample it
    mask = torch.zeros(out.shape, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        _check_width(row, ids, width, "response")
        out[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    return out, mask


def _check_width(row: int, ids: Sequence[int], width: int, kind: str) -> None:
    if not 0 < len(ids) <= width:
        raise ValueError(
            f"{kind} {row} has {len(ids)} tokens; between 1 and {width} fit: shorten it or widen"
        )


def after_padding(tokens: Int[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
    """True from the first word of each row on: all but the padding on its left."""
    return (tokens != PAD).cumsum(1) > 0  # a pad id inside the text is a token like others


def last_token(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Index of the last True of each row; -1 for a row that has none."""
    # a True counts as its place, from 1 on, so that a row without any has 0 as its largest
    steps = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    return (mask * steps).amax(-1) - 1
