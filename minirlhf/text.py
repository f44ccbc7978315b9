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
from torch import Tensor

PAD, EOS, SEP = 0, 1, 2
SPECIALS = ("<pad>", "<eos>", "<sep>")


class UnknownWord(ValueError):
    """A word that is not in the vocabulary."""


class Vocabulary:
    """A fixed word list; ids 0, 1, 2 are <pad>, <eos> and <sep> (end of the prompt).

    The padding id differs from EOS on purpose: where they are one, the end of an answer is
    masked out of the loss and the policy never learns to stop.
    """

    pad, eos, sep = PAD, EOS, SEP

    def __init__(self, words: Iterable[str]):
        self.words: tuple[str, ...] = (*SPECIALS, *words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            twice = sorted({w for w in self.words if self.words.count(w) > 1})
            raise ValueError(f"vocabulary lists {twice[0]!r} twice; list every word once")
        split = [word for word in self.words if word.split() != [word]]
        if split:
            raise ValueError(f"word {split[0]!r} is empty or holds white space; no text can say it")

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`, split on white space. Raises UnknownWord."""
        try:
            return [self._ids[word] for word in text.split()]
        except KeyError as missing:
            word = str(missing.args[0])
            near = difflib.get_close_matches(word, self.words, n=3)
            near = near or [w for w in self.words if w.isalpha()][:3]
            raise UnknownWord(
                f"unknown word {word!r} in {text!r}; the {len(self)} known words include "
                f"{', '.join(near)} (write punctuation as a word of its own: 'friday .')"
            ) from None

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Text of `ids`, without the special tokens."""
        return " ".join(self.words[int(i)] for i in ids if int(i) >= len(SPECIALS))

    @property
    def fingerprint(self) -> str:
        """A short hash of the word list; a checkpoint stores it to refuse another vocabulary."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()[:16]


def left_pad(sequences: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    """Prompts as one LongTensor [B, P], padded on the left. ValueError if one does not fit."""
    width = max(map(len, sequences)) if width is None else width
    out = torch.full((len(sequences), width), PAD)
    for row, ids in enumerate(sequences):
        _check_width(row, ids, width, "prompt")
        out[row, width - len(ids) :] = torch.tensor(ids)
    return out


def right_pad(
    sequences: Sequence[Sequence[int]], width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Responses [B, T] padded on the right and their mask [B, T], True on every given id."""
    width = max(map(len, sequences)) if width is None else width
    out = torch.full((len(sequences), width), PAD)
    for row, ids in enumerate(sequences):
        _check_width(row, ids, width, "response")
        out[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    lengths = torch.tensor([len(ids) for ids in sequences])
    return out, torch.arange(width) < lengths[:, None]


def _check_width(row: int, ids: Sequence[int], width: int, kind: str) -> None:
    if not 0 < len(ids) <= width:
        raise ValueError(
            f"{kind} {row} has {len(ids)} tokens; between 1 and {width} fit: shorten it or widen"
        )


def last_token(mask: Tensor) -> Tensor:
    """Index [B] of the last True of each row; -1 for a row that has none."""
    steps = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    return (mask * steps).amax(-1) - 1
