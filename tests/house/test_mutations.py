"""Every planted bug of mutations.py is caught by the test it names, and by a failing assertion."""

import subprocess
import sys

import pytest
from mutations import MUTATIONS, ROOT, part_of

PARTS = 8  # of a run over all of them, spread over the workers (conftest.py)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.title)
def test_the_text_to_change_is_still_there_once(mutation):
    source = (ROOT / "minirlhf" / mutation.file).read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1, "rewrite the entry after the code has changed"
    assert mutation.new != mutation.old
    file, test = mutation.test.split("::")
    assert f"def {test.split('[')[0]}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_titles_are_unique_and_many():
    assert len({m.title for m in MUTATIONS}) == len(MUTATIONS) >= 14


def test_the_parts_are_all_of_them():
    found = [m.title for part in range(1, PARTS + 1) for m in part_of(MUTATIONS, part, PARTS)]
    assert sorted(found) == sorted(m.title for m in MUTATIONS)


@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_every_bug_is_caught(part):
    command = [sys.executable, str(ROOT / "tests" / "mutations.py"), "--part", f"{part}/{PARTS}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    others = [line for line in found.stdout.splitlines() if not line.startswith("caught")]
    assert found.returncode == 0, "\n".join([*others, found.stderr[-2000:]])
    assert found.stdout.count("caught  ") == len(part_of(MUTATIONS, part, PARTS))
