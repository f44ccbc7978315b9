"""The notebooks in real JupyterLab: every cell runs, every slider moves its picture.

Skipped, with a line that says why, where Chromium or Playwright is missing; left out by
`pytest -m "not browser and not slow"`. Screenshots land in build/screenshots, which git ignores.
"""

import json
from pathlib import Path

import pytest
from browser import MISSING, chromium, copied, opened, served

HOME = Path(__file__).resolve().parents[2]
NOTEBOOKS = ("00_start_here", "07_the_autopsy")

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab") / "notebooks"


@pytest.fixture(scope="module")
def url(folder):
    pytest.importorskip("playwright", reason="no playwright here: pip install playwright")
    if chromium() is None:
        pytest.skip(MISSING)
    copied(HOME / "notebooks", folder)
    with served(folder, folder.parent) as url:
        yield url


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_runs_and_every_slider_changes_its_picture(url, name):
    with opened(url, HOME / "build" / "screenshots") as lab:
        lab.open(f"{name}.ipynb")
        lab.run_all()
        lab.picture("ran")
        labels = lab.sliders()
    assert labels, "no slider on the page"
    assert not lab.faults


def write(path, *sources):
    """A notebook of these cells."""
    blank = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [blank | {"source": source, "id": f"cell{i}"} for i, source in enumerate(sources)]
    kernel = {"name": "python3", "display_name": "Python 3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(whole), encoding="utf-8")


def test_what_is_broken_is_noticed(url, folder, tmp_path):
    """A slider that moves nothing, a complaint in the console, and a cell that fails."""
    dead = 'import ipywidgets as w\nw.VBox([w.IntSlider(1, 0, 2, description="dead"), w.HTML(".")])'
    say = "from IPython.display import Javascript\nJavascript(\"console.error('planted')\")"
    write(folder / "dead.ipynb", say, dead)
    write(folder / "broken.ipynb", "1 / 0", "2")
    with opened(url, tmp_path) as lab:
        lab.open("dead.ipynb")
        lab.run_all()
        lab.patience = 1
        with pytest.raises(AssertionError, match="dead: Home did not change the picture"):
            lab.sliders()
        assert len(lab.faults) == 1 and lab.faults[0].startswith("planted")
        lab.open("broken.ipynb")
        with pytest.raises(AssertionError, match="ZeroDivisionError: division by zero"):
            lab.run_all()
