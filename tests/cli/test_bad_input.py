"""What may be wrong, in one list: each is answered by one clear sentence, and nothing is spoilt.

A sentence says what was wrong, where, and what to do about it. How each is found out is tested
beside the module that finds it; this list is the promise as a whole.
"""

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from command_line import SMALL
from tiny_drift import TINY, nan_loss, nan_scores, no_scrap, run

from minirlhf import checkpoints
from minirlhf.checkpoints import load_model
from minirlhf.cli.main import main
from minirlhf.desk.world import Desk
from minirlhf.drift.run import Drift
from minirlhf.engine import files as file_module
from minirlhf.engine.files import load_tensors
from minirlhf.generate import generate
from minirlhf.model import Transformer, TransformerConfig

DESK_TOML = Path(__file__).parents[2] / "data" / "desk.toml"


def a_model(vocabulary: int = 12, context: int = 10) -> Transformer:
    config = TransformerConfig(vocabulary, context, d_model=8, n_layer=1, n_head=2)
    return Transformer(config, generator=torch.Generator().manual_seed(0))


def desk_without(tmp_path: Path, old: str, new: str) -> None:
    text = DESK_TOML.read_text(encoding="utf-8")
    edited, count = re.subn(old, new, text, count=1, flags=re.MULTILINE)
    assert count == 1
    (tmp_path / "desk.toml").write_text(edited, encoding="utf-8")
    Desk.load(tmp_path / "desk.toml")


# --- each takes an empty folder and a MonkeyPatch, and does what should not be done ---------------


def unknown_word(tmp_path, patch):
    desk = Desk.load()
    prompt = desk.probes(1)[0]
    desk.encode([replace(prompt, text="eta frday . when does it come ? <sep>")])


def response_beyond_the_context(tmp_path, patch):
    prompts = torch.tensor([[3, 4, 5]])
    generate(a_model(), prompts, max_new_tokens=9, eos=1, generator=torch.Generator())


def text_beyond_the_context(tmp_path, patch):
    a_model()(torch.full((1, 11), 3))


def run_beyond_the_context(tmp_path, patch):
    Drift(replace(TINY, ppo=replace(TINY.ppo, max_new_tokens=400)), tmp_path / "run")


def empty_section(tmp_path, patch):
    desk_without(tmp_path, r'^hedge = \["may".*$', "")


def slot_without_values(tmp_path, patch):
    desk_without(tmp_path, r"^values = .*monday.*$", "values = []")


def slot_without_a_line_of_values(tmp_path, patch):
    desk_without(tmp_path, r"^values = .*monday.*$", "")


def unreadable_desk(tmp_path, patch):
    Desk.load(tmp_path / "nowhere.toml")


def another_vocabulary(tmp_path, patch):
    checkpoints.save_model(tmp_path / "model.safetensors", a_model(), vocabulary="0123")
    load_model(tmp_path / "model.safetensors", vocabulary=Desk.load().vocabulary.fingerprint)


def truncated(tmp_path, patch):
    path = checkpoints.save_model(tmp_path / "model.safetensors", a_model(), vocabulary="0123")
    path.write_bytes(path.read_bytes()[:-1])
    load_model(path, vocabulary="0123")


def not_a_checkpoint(tmp_path, patch):
    (tmp_path / "model.safetensors").write_text("weights", encoding="utf-8")
    load_model(tmp_path / "model.safetensors", vocabulary="0123")


def in_use(tmp_path, patch):
    for _ in range(2):
        Drift(TINY, tmp_path / "run")


def out_is_a_file(tmp_path, patch):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    Drift(TINY, tmp_path / "file")


def read_only(tmp_path, patch):
    """As on a read-only drive: root may write anywhere else."""
    write = Path.write_text

    def refused(self, *given, **options):
        if tmp_path in self.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return write(self, *given, **options)

    patch.setattr(Path, "write_text", refused)
    Drift(TINY, tmp_path / "run")


def full_disk(tmp_path, patch):
    def full(tensors, path, metadata):
        path.write_bytes(b"the first half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(file_module, "save_file", full)
    run(tmp_path / "run")


def loss_is_nan(tmp_path, patch):
    nan_loss(patch)
    run(tmp_path / "run")


def score_is_nan(tmp_path, patch):
    nan_scores(patch)
    run(tmp_path / "run")


@dataclass(frozen=True)
class Bad:
    """One thing done wrong, and what, where and what-to-do in the answer, in that order."""

    do: Callable
    words: tuple[str, str, str]


BAD = [
    Bad(unknown_word, ("unknown word 'frday'", "eta frday . when", "friday")),
    Bad(response_beyond_the_context, ("9 pass", "context of 10", "lower max_new_tokens")),
    Bad(text_beyond_the_context, ("11 tokens", "context is 10", "shorten them")),
    Bad(run_beyond_the_context, ("ppo.max_new_tokens is 400", "desk's answers", "lower it")),
    Bad(empty_section, ("desk.toml, line", "[markers] is empty", "give it an entry")),
    Bad(slot_without_values, ("desk.toml, line", "[slots.day]", "must list one or more texts")),
    Bad(slot_without_a_line_of_values, ("desk.toml, line", "[slots.day]", "must list one or more")),
    Bad(unreadable_desk, ("nowhere.toml", "cannot be read", "name a readable file")),
    Bad(
        another_vocabulary, ("model.safetensors", "another vocabulary", "use the desk.toml it was")
    ),
    Bad(truncated, ("model.safetensors", "is damaged", "restore it or make it anew")),
    Bad(not_a_checkpoint, ("model.safetensors", "not a safetensors file", "restore it")),
    Bad(in_use, ("run", "already holds a run", "add --resume or choose another --out")),
    Bad(out_is_a_file, ("cannot write", "config.json", "a file stands where a folder")),
    Bad(read_only, ("config.json", "Read-only file system", "choose another folder")),
    Bad(full_disk, ("reference.safetensors", "No space left", "free some space")),
    Bad(loss_is_nan, ("PPO loss is nan", "in step 4", "lower ppo.lr")),
    Bad(score_is_nan, ("'scores'", "NaN", "find the step")),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.do.__name__)
def test_one_sentence_says_what_where_and_what_to_do(bad, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises((ValueError, RuntimeError)) as caught:
        bad.do(tmp_path, patch)
    said = str(caught.value)
    assert "\n" not in said and 20 < len(said) < 400, said
    assert not re.search(r"Traceback|<class|object at 0x", said)
    for words in bad.words:
        assert any(option in said for option in words.split("|")), (words, said)
    assert no_scrap(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):  # what is there is whole
        if "model" not in path.name:
            load_tensors(path)


LINES = [  # on the command line, where the exit status is not 0 and stderr has one line
    ("--ppo.beta -0.1", "--ppo.beta is -0.1; it must be at least 0"),
    ("--ppo.clip 1", "--ppo.clip is 1.0; it must lie between 0 and 1"),
    ("--ppo.clip 1.5", "--ppo.clip is 1.5; it must lie between 0 and 1"),
    ("--device cuda", "--device cuda is not available here; use auto or one of: cpu"),
    ("--ppo.max-new-tokens 400", "ppo.max_new_tokens is 400, but the desk's answers end at"),
    ("--desk {folder}/nowhere.toml", "nowhere.toml cannot be read"),
    ("--desk {folder}/empty.toml", "empty.toml, line 1: section [slots] is missing; give it an"),
    ("--out {folder}/empty.toml", "cannot write"),
]


@pytest.mark.parametrize(("line", "sentence"), LINES)
def test_on_the_command_line(capsys, tmp_path, monkeypatch, line, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty.toml").write_text("", encoding="utf-8")
    given = ["drift", *SMALL, "--out", str(tmp_path / "run")]
    status = main([*given, *line.format(folder=tmp_path.as_posix()).split()])
    out, err = capsys.readouterr()
    assert status in (1, 2) and out == ""
    assert err.startswith("minirlhf: ") and err.count("\n") == 1 and sentence in err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.toml"]


def test_an_option_that_is_not_there_on_the_command_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["drift", *SMALL, "--out", str(tmp_path / "run"), "--no-such-option"])
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    out, err = capsys.readouterr()
    assert out == "" and "Unrecognized options: --no-such-option" in err


def test_nan_in_the_middle_on_the_command_line(capsys, tmp_path, monkeypatch):
    nan_loss(monkeypatch)
    out = tmp_path / "run"
    options = [*SMALL, "--steps", "4", "--audit.every", "2", "--out", str(out)]
    assert main(["drift", *options]) == 1
    _, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("minirlhf: PPO loss is nan")
    assert "Traceback" not in err
    assert int(load_tensors(out / "ppo.safetensors")[0]["steps"]) == 2
    monkeypatch.undo()
    assert main(["drift", *options, "--resume"]) == 0
