"""The slow tests' table: written after a complete run, and only then."""

import subprocess
import sys
from pathlib import Path

import pytest
from ladder import HEADS, Ladder
from tables import rows

HERE = Path(__file__).parents[1]
SLOW = """
import pytest

def test_fast():
    pass

@pytest.mark.slow
@pytest.mark.parametrize("claim, seed", [(0.5, 3), (0.9, 4)])
def test_claim(ladder, claim, seed):
    assert ladder.add("L0 end points", f"claim {claim}", claim, 0.51, 0.02, seed=seed)
"""


def test_a_row_is_held_within_its_tolerance_or_as_told():
    table = Ladder()
    assert table.add("L1", "a", 0.5, 0.519, 0.02)
    assert not table.add("L1", "b", 0.5, 0.521, 0.02)
    assert table.add("L0", "c", "> 0.98", 0.991, held=True, seed="0-2")
    page = table.markdown()
    assert ["c", "> 0.98", "trained", "0.991", "", "0-2", "yes"] in rows(page)
    assert ["b", "0.500", "trained", "0.521", "0.020", "0", "**no**"] in rows(page)
    assert page.index("## L0") < page.index("## L1") and "2 of 3 claims held" in page
    assert "failed" not in page and "failed: test_x" in table.markdown(["test_x"])


def test_a_row_says_how_its_value_was_found():
    table = Ladder()
    table.add("L1", "closed form", 1, 1, 0, how="exact")
    table.add("L0", "mean of draws", 0.0, 0.1, 0.2, how="sampled", seed=7)
    page = table.markdown()
    # no seed: nothing was drawn
    assert ["closed form", "1", "exact", "1", "0", "", "yes"] in rows(page)
    assert ["mean of draws", "0.000", "sampled", "0.100", "0.200", "7", "yes"] in rows(page)
    assert "0 trained, 1 sampled, 1 exact" in page
    assert not any("measured" in row for row in rows(page))
    with pytest.raises(ValueError, match="how is 'measured'; it must be one of trained, sampled"):
        table.add("L0", "x", 1, 1, 0, how="measured")


def test_a_bar_in_a_cell_opens_no_column():
    table = Ladder()
    table.add("L0", "P(a | b)", 0.5, 0.5, 0.1)
    heads, row = rows(table.markdown())
    assert heads == [*HEADS] and row[0] == r"P(a \| b)" and len(row) == len(HEADS)


def test_the_table_is_written_by_a_complete_slow_run_alone(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "ladder.py", "shapes.py"):
        (tmp_path / "tests" / name).write_bytes((HERE / name).read_bytes())
    settings = "[tool.pytest.ini_options]\naddopts = \"-m 'not slow'\"\nmarkers = ['slow: x']\n"
    (tmp_path / "pyproject.toml").write_text(settings)
    (tmp_path / "tests" / "test_one.py").write_text(SLOW)
    page = tmp_path / "docs" / "ladder.md"
    # in one process, as each start costs seconds
    runs = [["tests"], ["-m", "slow", "tests", "-k", "0.5"], ["-m", "slow", "tests/test_one.py"]]
    script = """
import sys, pathlib, pytest
for args in {}:
    for name in [n for n in sys.modules if n in ("conftest", "ladder", "test_one")]:
        del sys.modules[name]
    print(int(pytest.main(["-q", "-p", "no:cacheprovider", *args])))
    print("page", pathlib.Path("docs/ladder.md").exists())
"""
    command = [sys.executable, "-c", script.format([*runs, ["-m", "slow", "tests"]])]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.count("page False") == 3, found.stdout + found.stderr
    assert "2 deselected" in found.stdout and "ladder.md not written: only a part" in found.stdout
    assert found.stdout.endswith("1\npage True\n")  # a claim that fails is written down too
    text = page.read_text(encoding="utf-8")
    assert "make slow" in text and "test_claim[0.9-4]" in text.split("##")[0]
    assert ["claim 0.5", "0.500", "trained", "0.510", "0.020", "3", "yes"] in rows(text)
    assert ["claim 0.9", "0.900", "trained", "0.510", "0.020", "4", "**no**"] in rows(text)
