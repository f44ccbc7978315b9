"""The notebook builder: what it stores, what it keeps across builds, and what its check catches."""

import copy
import subprocess
import sys

import build_notebooks as bn
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

MASTER = """# %% [markdown]
# # A title

# %%
x = 6 * 7
print(x)


# %% tags=["smoke"]
import ipywidgets as W

W.FloatSlider(value=0.5)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with one master and the notebook built from it (one kernel start, about 2 s)."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "masters").mkdir()
    (folder / "masters" / "00_tiny.py").write_text(MASTER, encoding="utf-8")
    assert list(bn.build(folder / "masters" / "00_tiny.py", folder)) == ["00_tiny.ipynb"]
    return folder


@pytest.fixture
def notebook(built):
    return nbformat.read(built / "00_tiny.ipynb", as_version=4)


def test_built_notebook_is_executed_and_passes_its_own_check(built, notebook):
    assert bn.check(built) == []
    assert notebook.cells[1].outputs[0].text == "42\n"
    assert [cell.get("execution_count") for cell in notebook.cells[1:]] == [1, 2]
    assert notebook.cells[2].metadata == {"tags": ["smoke"]}
    assert bn.WIDGET in notebook.cells[2].outputs[0].data
    assert "widgets" not in notebook.metadata and "jupytext" not in notebook.metadata


def test_second_build_writes_the_same_bytes(built):
    target = built / "00_tiny.ipynb"
    before = target.read_bytes()
    bn.build(built / "masters" / "00_tiny.py", built)
    assert target.read_bytes() == before


def test_ids_stay_with_their_cells_when_one_is_inserted(tmp_path, notebook):
    master = tmp_path / "m.py"
    master.write_text("# %%\nnew = 1\n\n" + MASTER + "\n# %%\nnew = 1\n", encoding="utf-8")
    changed = bn.read_master(master)
    bn.keep_ids(changed, notebook)
    ids = [cell.id for cell in changed.cells]
    assert ids[1:4] == [cell.id for cell in notebook.cells]
    assert len(set(ids)) == 5  # the two equal new cells differ
    again = bn.read_master(master)
    bn.keep_ids(again, notebook)
    assert [cell.id for cell in again.cells] == ids


def test_prints_are_joined_however_they_arrived():
    def stream(text, name="stdout"):
        return nbformat.v4.new_output("stream", name=name, text=text)

    picture = nbformat.v4.new_output("display_data", data={"text/plain": "x"})
    given = [stream("a\n"), stream("b\n"), picture, stream("c\n"), stream("d\n", "stderr")]
    assert [o.get("text") for o in bn.joined(given)] == ["a\nb\n", None, "c\n", "d\n"]


def test_failing_cell_leaves_the_old_notebook(tmp_path):
    (tmp_path / "bad.py").write_text("# %%\nraise ValueError('no')\n", encoding="utf-8")
    old = nbformat.v4.writes(nbformat.v4.new_notebook())
    (tmp_path / "bad.ipynb").write_text(old, encoding="utf-8")
    with pytest.raises(CellExecutionError, match="no"):
        bn.build(tmp_path / "bad.py", tmp_path)
    assert (tmp_path / "bad.ipynb").read_text(encoding="utf-8") == old
    assert len(list(tmp_path.iterdir())) == 2


def stored_error(nb):
    nb.cells[1].outputs = [nbformat.v4.new_output("error", ename="KeyError", evalue="k")]


def stderr(nb):
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", name="stderr", text="warning")]


def stale_count(nb):
    nb.cells[2].execution_count = 7


def not_run(nb):
    nb.cells[1].execution_count = None


def widget_state(nb):
    nb.metadata["widgets"] = {}


def other_kernel(nb):
    nb.metadata.kernelspec.name = "my-env"


def twin_ids(nb):
    nb.cells[1].id = nb.cells[0].id


def own_path(nb):
    nb.cells[1].outputs[0].text = "saved to /home/ada/course/run"


def windows_path(nb):
    nb.cells[1].outputs[0].text = r"saved to C:\Users\ada"


def edited(nb):
    nb.cells[1].source += "\nprint('by hand')"


def lost_tag(nb):
    nb.cells[2].metadata = nbformat.NotebookNode()


def lost_cell(nb):
    del nb.cells[2]


def too_big(nb):
    nb.cells[1].outputs[0].text = "x" * bn.MAX_BYTES


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (stored_error, "cell 1: an error is stored: KeyError"),
        (stderr, "cell 1: something was written to stderr"),
        (stale_count, "execution counts are not 1..n"),
        (not_run, "execution counts are not 1..n"),
        (widget_state, "widget state is stored"),
        (other_kernel, "the kernel is not python3"),
        (twin_ids, "cell ids are missing or not unique"),
        (own_path, "cell 1: a path of one machine: /home/ada"),
        (windows_path, r"cell 1: a path of one machine: C:\Users"),
        (edited, "cell 1: source differs from the master"),
        (lost_tag, "cell 2: metadata differs from the master"),
        (lost_cell, "2 cells, its master has 3"),
        (too_big, "kB, the limit is 500"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_check_catches(spoil, message, built, notebook, tmp_path):
    (tmp_path / "masters").mkdir()
    (tmp_path / "masters" / "00_tiny.py").write_text(MASTER, encoding="utf-8")
    spoilt = copy.deepcopy(notebook)
    spoil(spoilt)
    (tmp_path / "00_tiny.ipynb").write_text(nbformat.v4.writes(spoilt), encoding="utf-8")
    problems = bn.check(tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith("00_tiny.ipynb: ")
    assert message in problems[0]


def test_check_says_what_is_no_notebook(tmp_path):
    (tmp_path / "masters").mkdir()
    (tmp_path / "masters" / "00_a.py").write_text(MASTER, encoding="utf-8")
    for text in ("", "{}", "[1]"):
        (tmp_path / "00_a.ipynb").write_text(text, encoding="utf-8")
        (problem,) = bn.check(tmp_path)
        assert problem.startswith("00_a.ipynb: not a notebook")


def test_check_names_masters_and_notebooks_without_each_other(tmp_path):
    (tmp_path / "masters").mkdir()
    (tmp_path / "masters" / "01_a.py").write_text(MASTER, encoding="utf-8")
    (tmp_path / "02_b.ipynb").write_text("{}", encoding="utf-8")
    assert bn.check(tmp_path) == [
        "01_a.ipynb: not built from its master",
        "02_b.ipynb: no master in masters/",
    ]


def test_web_addresses_and_fractions_are_no_paths():
    for text in ("arxiv.org/abs/1707.06347", "https://a.b/home/x", "tokens/home/x", "kl: 3/work"):
        assert bn.OWN_PATH.search(text) is None


EXERCISES = """# %% [markdown]
# # Two exercises: [back](00_tiny.ipynb), [out](https://arxiv.org), [down](#below)

# %% tags=["exercise"]
def double(x):
    \"\"\"Twice x.\"\"\"
    # BEGIN SOLUTION
    twice = 2 * x
    return twice
    # END SOLUTION


# %% tags=["check"]
print({None: "not written yet", 6: "right"}[double(3)])

# %% tags=["exercise"]
def largest(values):
    top = values[0]
    for value in values:
        # BEGIN SOLUTION
        top = max(top, value)
        # END SOLUTION
    return top


# %% tags=["check"]
print("right" if largest([1, 3, 2]) == 3 else "the first")
"""
STUDENT = '''def double(x):
    """Twice x."""
    ...  # your turn'''
FILLED_IN = '''def double(x):
    """Twice x."""
    twice = 2 * x
    return twice'''


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with a master of two exercises and both editions (two kernels, about 3 s)."""
    folder = tmp_path_factory.mktemp("editions")
    (folder / "masters").mkdir()
    (folder / "masters" / "03_two.py").write_text(EXERCISES, encoding="utf-8")
    made = bn.build(folder / "masters" / "03_two.py", folder)
    assert list(made) == ["03_two.ipynb", "solved/03_two.ipynb"]
    return folder


def test_students_edition_has_stubs_and_folded_solutions(two):
    cells = nbformat.read(two / "03_two.ipynb", as_version=4).cells
    kinds = [cell.metadata.get("tags", [""])[0] for cell in cells]
    assert kinds == ["", "exercise", "check", "solution", "exercise", "check", "solution"]
    assert cells[1].source == STUDENT
    assert "        ...  # your turn\n    return top" in cells[4].source
    assert [cells[i].outputs[0].text for i in (2, 5)] == ["not written yet\n", "the first\n"]
    assert cells[3].source.startswith("<details><summary>Solution</summary>")
    assert f"```python\n{FILLED_IN}\n```" in cells[3].source
    assert "[back](00_tiny.ipynb)" in cells[0].source


def test_solved_edition_is_filled_in_runs_and_links_one_folder_up(two):
    cells = nbformat.read(two / "solved" / "03_two.ipynb", as_version=4).cells
    kinds = [cell.metadata.get("tags", [""])[0] for cell in cells]
    assert kinds == ["", "exercise", "check", "exercise", "check"]
    assert cells[1].source == FILLED_IN
    assert [cells[i].outputs[0].text for i in (2, 4)] == ["right\n", "right\n"]
    links = "[back](../00_tiny.ipynb), [out](https://arxiv.org), [down](#below)"
    assert links in cells[0].source
    assert "[this notebook](../03_two.ipynb)" in cells[0].source
    for path in (two / "03_two.ipynb", two / "solved" / "03_two.ipynb"):
        assert "SOLUTION" not in path.read_text(encoding="utf-8")


def test_check_compares_both_editions(two, tmp_path):
    (tmp_path / "masters").mkdir()
    (tmp_path / "solved").mkdir()
    (tmp_path / "masters" / "03_two.py").write_text(EXERCISES, encoding="utf-8")
    names = "03_two.ipynb", "solved/03_two.ipynb"
    assert bn.check(two) == []
    assert bn.check(tmp_path) == [f"{name}: not built from its master" for name in names]
    for name in names:  # an edition where the other one belongs
        other = names[name == names[0]]
        text = (two / other).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text, encoding="utf-8")
    problems = bn.check(tmp_path)
    for name in names:
        assert f"{name}: cell 1: source differs from the master: run `make notebooks`" in problems


def test_a_solved_edition_that_nothing_makes_is_named(tmp_path):
    (tmp_path / "masters").mkdir()
    (tmp_path / "solved").mkdir()
    (tmp_path / "masters" / "00_a.py").write_text(MASTER, encoding="utf-8")
    for name in ("00_a", "09_z"):
        (tmp_path / "solved" / f"{name}.ipynb").write_text("{}", encoding="utf-8")
    assert bn.check(tmp_path) == [
        "00_a.ipynb: not built from its master",
        "solved/00_a.ipynb: its master has no exercise",
        "solved/09_z.ipynb: no master in masters/",
    ]


BEGIN, END = "    # BEGIN SOLUTION\n", "    # END SOLUTION\n"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (BEGIN, "", "cell 1: an exercise needs one BEGIN SOLUTION and, below it, one END SOLUTION"),
        (END, "", "has BEGIN SOLUTION"),
        (BEGIN, END, "has END SOLUTION, END SOLUTION"),
        (BEGIN, BEGIN + BEGIN, "has BEGIN SOLUTION, BEGIN SOLUTION, END SOLUTION"),
        ("    twice = 2 * x\n    return twice\n", "\n", "nothing stands between"),
        ("2 * x", "2 *", "line 3 of an edition is no Python"),
        ('"""Twice x."""', "def inner(): pass", None),
        ("def double", "x = 1\n\n\ndef double", None),
        ("def double", "def y(): pass\n\n\ndef double", "cell 1: an exercise defines one function"),
        ('tags=["exercise"]\ndef double', "\ndef double", '"# BEGIN SOLUTION" outside a cell with'),
        ('tags=["exercise"]\ndef double', "[markdown]\n# x\n\n# %%\ndef double", "cell 2: "),
        ('tags=["check"]\nprint({', "\nprint({", "cell 1: an exercise has no check"),
        (
            '# %% tags=["check"]\nprint("r',
            '# %% [markdown]\n# a\n\n# %%\nprint("r',
            "cell 3: an ex",
        ),
        ('# %% tags=["check"]\nprint({', '# %%\n1\n\n# %% tags=["check"]\nprint({', "cell 1: an"),
        (
            "# %% [markdown]",
            '# %% tags=["check"]\n1\n\n# %% [markdown]',
            "cell 0: a check does not",
        ),
    ],
)
def test_broken_exercises_are_one_sentence(old, new, fault, tmp_path):
    (tmp_path / "masters").mkdir()
    master = tmp_path / "masters" / "03_two.py"
    assert old in EXERCISES
    master.write_text(EXERCISES.replace(old, new, 1), encoding="utf-8")
    if fault is None:  # what is allowed: a function inside, a line above
        assert len(bn.editions(master)) == 2
        return
    with pytest.raises(bn.MasterError) as caught:
        bn.editions(master)
    message = str(caught.value)
    assert message.startswith("03_two.py, cell ") and "\n" not in message
    assert fault in message
    assert bn.check(tmp_path) == [message]


def test_checks_are_found_beside_both_editions():
    """A kernel's folder comes first on its path: the same import must work in either."""
    for folder in (bn.NOTEBOOKS, bn.NOTEBOOKS / bn.SOLVED):
        code = "import checks, pathlib; print(pathlib.Path(checks.__path__[0]).resolve())"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str(bn.NOTEBOOKS / "checks")
