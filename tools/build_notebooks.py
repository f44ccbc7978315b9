"""Build notebooks/NN_name.ipynb from notebooks/masters/NN_name.py, executed; or check them.

A master is a script in percent format (`# %%`, `# %% [markdown]`, `# %% tags=["reveal"]`): the
source of truth, reviewed like code. The notebook is built from it, run from top to bottom in a
fresh kernel and committed with its outputs, so that it can be read where no kernel runs.

A master with exercises makes two editions. The student's leaves the solutions out and puts each,
folded, behind its check; solved/NN_name.ipynb has them filled in. CONTRIBUTING.md has the format.

    python tools/build_notebooks.py [NAME ...]       build (all, or those named: 00_start_here)
    python tools/build_notebooks.py --check          run nothing: is what is committed in order?

Widgets are stored without their state: it goes stale, and a page shows the picture beside it.
"""

import argparse
import ast
import difflib
import hashlib
import re
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CELL_TIMEOUT = 120  # seconds, as in `make test`
MAX_BYTES = 500_000
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
SOLVED = "solved"  # the folder of the solved editions, beside the students'
BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
SOLUTION = re.compile(rf"^( *){BEGIN}\n(.*?)^ *{END}(?:\n|\Z)", re.MULTILINE | re.DOTALL)
NO_MASTER = "no master in masters/"
YOUR_TURN = "...  # your turn"
# a link to a file of the course: not a web address, not a place in the same notebook
NEIGHBOUR = re.compile(r"(\]\()(?![a-z]+:|[/#])")
# a folder of one person's machine, in what a cell says or printed
OWN_PATH = re.compile(
    r"(?<![\w./:])/(?:home|root|Users|tmp|work|mnt|var|private|content)/[\w.-]+"
    r"|(?<!\w)[A-Za-z]:\\{1,2}[\w.-]+"
)


def read_master(path: Path) -> NotebookNode:
    """Read a percent script; of its header nothing is kept, so that the lab does not pair it."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        cell.metadata.pop("lines_to_next_cell", None)  # jupytext's note to itself
    return notebook


class MasterError(ValueError):
    """A master breaks the format of exercises; the sentence names file, cell and what to do."""


def tags(cell: NotebookNode) -> list[str]:
    """Return the tags of a cell."""
    return cell.metadata.get("tags", [])


def exercise_fault(cells: list[NotebookNode], index: int) -> str:
    """Say what is wrong with the markers and the exercise of one cell, or nothing."""
    cell = cells[index]
    lines = [line.strip() for line in cell.source.splitlines()]
    marks = [line for line in lines if line in (BEGIN, END)]
    if "exercise" not in tags(cell):
        if marks:
            return f'"{marks[0]}" outside a cell with tags=["exercise"]'
        if "check" in tags(cell) and (index == 0 or "exercise" not in tags(cells[index - 1])):
            return "a check does not follow an exercise: put it in the next cell"
        return ""
    if marks != [BEGIN, END]:
        found = ", ".join(mark[2:] for mark in marks) or "none"
        return f"an exercise needs one BEGIN SOLUTION and, below it, one END SOLUTION; has {found}"
    if not SOLUTION.search(cell.source) or not SOLUTION.search(cell.source)[2].strip():
        return "nothing stands between BEGIN SOLUTION and END SOLUTION"
    for edition in (student(cell.source), solved(cell.source)):
        try:
            body = ast.parse(edition).body
        except SyntaxError as error:
            return f"line {error.lineno} of an edition is no Python: {error.msg}"
        if sum(isinstance(node, ast.FunctionDef) for node in body) != 1:
            return "an exercise defines one function"
    if index + 1 == len(cells) or "check" not in tags(cells[index + 1]):
        return 'an exercise has no check: the next cell needs tags=["check"]'
    return ""


def student(source: str) -> str:
    """Leave the solution of an exercise out."""
    return SOLUTION.sub(rf"\1{YOUR_TURN}\n", source).rstrip("\n")


def solved(source: str) -> str:
    """Leave only the markers of an exercise out."""
    return SOLUTION.sub(r"\2", source).rstrip("\n")


def solution_cell(source: str) -> NotebookNode:
    """Make the folded cell that shows the solution of an exercise."""
    code = f"```python\n{solved(source)}\n```"
    text = f"<details><summary>Solution</summary>\n\n{code}\n\n</details>"
    return nbformat.v4.new_markdown_cell(text, metadata={"tags": ["solution"]})


def editions(path: Path) -> dict[str, NotebookNode]:
    """Return the notebooks of a master by their path below notebooks/: one, or two.

    Raises MasterError if markers, exercises and checks do not fit together.
    """
    master, name = read_master(path), f"{path.stem}.ipynb"
    for index in range(len(master.cells)):
        if fault := exercise_fault(master.cells, index):
            raise MasterError(f"{path.name}, cell {index}: {fault}")
    if not any("exercise" in tags(cell) for cell in master.cells):
        return {name: master}
    key, cells, source = read_master(path), [], ""
    for cell in master.cells:
        cells.append(cell)
        if "exercise" in tags(cell):
            cell.source, source = student(cell.source), cell.source
        elif "check" in tags(cell):
            cells.append(solution_cell(source))
    master.cells = cells
    for cell in key.cells:
        if cell.cell_type == "markdown":
            cell.source = NEIGHBOUR.sub(r"\1../", cell.source)
        elif "exercise" in tags(cell):
            cell.source = solved(cell.source)
    key.cells[0].source += f"\n\n*Solved edition of [this notebook](../{name}).*"
    return {name: master, f"{SOLVED}/{name}": key}


def keep_ids(notebook: NotebookNode, old: NotebookNode | None) -> None:
    """Give unchanged cells the ids they had, and others one made from what they say."""
    sources = [cell.source for cell in notebook.cells]
    ids: list[str | None] = [None] * len(sources)
    if old is not None:
        before = [cell.source for cell in old.cells]
        matcher = difflib.SequenceMatcher(a=before, b=sources, autojunk=False)
        for block in matcher.get_matching_blocks():
            for k in range(block.size):
                ids[block.b + k] = old.cells[block.a + k].get("id")
    taken = {name for name in ids if name}
    for index, cell in enumerate(notebook.cells):
        name, salt = ids[index], 0
        while name is None:
            text = f"{cell.cell_type}\n{cell.source}\n{salt}"
            fresh = hashlib.sha256(text.encode()).hexdigest()[:8]
            name, salt = (fresh, salt) if fresh not in taken else (None, salt + 1)
        taken.add(name)
        cell.id = name


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join prints that follow each other: how many messages they came in is chance."""
    whole: list[NotebookNode] = []
    for output in outputs:
        name = output.get("name")  # streams have one
        if name and whole and whole[-1].get("name") == name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def settle(notebook: NotebookNode) -> None:
    """Take out what differs from run to run: widget ids, times, where prints were cut in two."""
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = joined(cell.outputs)
        for index, output in enumerate(cell.get("outputs", [])):
            if WIDGET in output.get("data", {}):
                name = f"{cell.id}/{index}"
                output.data[WIDGET]["model_id"] = uuid.uuid5(uuid.NAMESPACE_OID, name).hex


def write_atomic(path: Path, text: str) -> None:
    """Write beside the file, then replace it: never half a notebook."""
    half = path.with_name(path.name + ".tmp")
    half.write_text(text, encoding="utf-8", newline="\n")
    half.replace(path)


def build(master: Path, notebooks: Path = NOTEBOOKS) -> dict[str, float]:
    """Build and execute the editions of a master; seconds by their path below `notebooks`.

    Cells run in a fresh `python3` kernel in the notebook's own folder, as in the lab. Raises
    MasterError or CellExecutionError, and then writes none of them.
    """
    made, seconds = editions(master), {}
    for name, notebook in made.items():
        start, target = time.perf_counter(), notebooks / name
        target.parent.mkdir(exist_ok=True)
        keep_ids(notebook, nbformat.read(target, as_version=4) if target.exists() else None)
        NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT,
            kernel_name="python3",
            store_widget_state=False,
            record_timing=False,
            resources={"metadata": {"path": str(target.parent)}},
        ).execute()
        settle(notebook)
        nbformat.validate(notebook)
        seconds[name] = time.perf_counter() - start
    for name, notebook in made.items():
        write_atomic(notebooks / name, nbformat.writes(notebook) + "\n")
    return seconds


def differences(master: NotebookNode, notebook: NotebookNode) -> Iterator[str]:
    """Say where the notebook's cells are not those of its master."""
    for index, (want, have) in enumerate(zip(master.cells, notebook.cells, strict=False)):
        for part in ("cell_type", "source", "metadata"):
            if want[part] != have[part]:
                yield f"cell {index}: {part} differs from the master: run `make notebooks`"
    if len(master.cells) != len(notebook.cells):
        yield f"{len(notebook.cells)} cells, its master has {len(master.cells)}"


def unclean(notebook: NotebookNode) -> Iterator[str]:
    """Say what a committed notebook must not hold."""
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    if "widgets" in notebook.metadata:
        yield "widget state is stored"
    ids = [cell.get("id") for cell in notebook.cells]
    if None in ids or len(set(ids)) < len(ids):
        yield "cell ids are missing or not unique"
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "execution counts are not 1..n: it was not run once from top to bottom"
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                yield f"cell {index}: an error is stored: {output.ename}"
            if output.get("name") == "stderr":
                yield f"cell {index}: something was written to stderr"
        if found := OWN_PATH.search(_text(cell)):
            yield f"cell {index}: a path of one machine: {found.group()}"


def _text(cell: NotebookNode) -> str:
    """Return what a cell says and printed: its source, streams and text outputs, no pictures."""
    parts = [cell.source]
    for output in cell.get("outputs", []):
        parts.append(output.get("text", ""))
        parts += [str(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(parts)


def check(notebooks: Path = NOTEBOOKS) -> list[str]:
    """Return every problem of masters and committed notebooks, each naming its file; [] if none."""
    problems, wanted, broken = [], {}, set()
    for path in (notebooks / "masters").glob("*.py"):
        try:
            wanted |= editions(path)
        except MasterError as error:
            problems.append(str(error))
            broken |= {f"{path.stem}.ipynb", f"{SOLVED}/{path.stem}.ipynb"}
    there = [*notebooks.glob("*.ipynb"), *(notebooks / SOLVED).glob("*.ipynb")]
    built = {path.relative_to(notebooks).as_posix(): path for path in there}
    problems += [f"{name}: not built from its master" for name in wanted.keys() - built]
    for name in built.keys() - wanted - broken:
        lone = name.removeprefix(f"{SOLVED}/") in wanted
        problems.append(f"{name}: " + ("its master has no exercise" if lone else NO_MASTER))
    for name in wanted.keys() & built:
        try:
            # v4.reads: nbformat.read would mend doubled cell ids on the way
            notebook = nbformat.v4.reads(built[name].read_text(encoding="utf-8"))
        except (ValueError, KeyError, AttributeError) as error:
            problems.append(f"{name}: not a notebook: {error!r}")
            continue
        found = [*differences(wanted[name], notebook), *unclean(notebook)]
        if (size := built[name].stat().st_size) > MAX_BYTES:
            found.append(f"{size / 1e3:.0f} kB, the limit is {MAX_BYTES / 1e3:.0f}")
        problems += [f"{name}: {text}" for text in found]
    return sorted(problems)


def main(argv: list[str] | None = None) -> int:
    """Build or check; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check what is there")
    parser.add_argument("names", nargs="*", help="notebooks to build, default all")
    options = parser.parse_args(argv)
    masters = sorted((NOTEBOOKS / "masters").glob("*.py"))
    if unknown := set(options.names) - {path.stem for path in masters}:
        parser.error(f"no such master: {', '.join(sorted(unknown))}")
    if not options.check:
        for master in masters:
            if not options.names or master.stem in options.names:
                try:
                    for name, seconds in build(master).items():
                        print(f"{name}: {seconds:.1f} s")
                except MasterError as error:
                    print(error)
                    return 1
                except CellExecutionError as error:
                    print(f"{master.name}: a cell failed, nothing written\n{error}")
                    return 1
        return 0
    problems = check()
    print("\n".join(problems) or f"{len(masters)} masters: all notebooks as they say, and clean")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
