"""The Python of the README runs as it stands."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_a_block_of_the_readme_runs(block, capsys):
    scope: dict = {}
    exec(block, scope)
    assert scope["case"].desk
    if "push(" in block:
        assert "reward" in capsys.readouterr().out


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
