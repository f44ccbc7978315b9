"""The map, minirlhf/README.md: every wing in a sentence, every word of a lecture at one place."""

import importlib
import re

import density
import pytest

TEXT = (density.PACKAGE / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|`]+) \| `([\w/]+\.py)` \| `(\w+)`", TEXT, re.MULTILINE)
WORDS = """sampling; reward model; k3; adaptive beta; GAE; clip; audit; what-if; sweep; oracle;
advantage split; push; whitening; critic; reference; ranking; Bradley-Terry; KL penalty; EOS;
stratum; drift; counterfactual pairs; remedy; fork; policy"""


def test_every_word_of_a_lecture_has_one_place():
    words = [" ".join(word.split()) for word in WORDS.split(";")]
    assert len(words) == 25
    assert sorted(word for word, _, _ in ROWS) == sorted(words)


@pytest.mark.parametrize(("word", "place", "name"), ROWS, ids=[word for word, _, _ in ROWS])
def test_the_place_is_there(word, place, name):
    assert (density.PACKAGE / place).is_file()
    module = importlib.import_module(f"minirlhf.{place.removesuffix('.py').replace('/', '.')}")
    assert hasattr(module, name)


def test_every_wing_and_every_core_file_is_on_the_map():
    entries = [path for path in density.PACKAGE.iterdir() if path.name[0] not in "_."]
    for path in entries:
        if path.is_dir():
            assert f"| `{path.name}/` |" in TEXT
        elif path.suffix == ".py":
            assert f"`{path.stem}`" in TEXT


def test_every_file_it_names_exists():
    for name in re.findall(r"`([\w/]+\.py)`", TEXT):
        assert any(density.PACKAGE.rglob(name)), name
