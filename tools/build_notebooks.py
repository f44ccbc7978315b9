"""Build notebooks/NN_name.ipynb from notebooks/masters/NN_name.py, executed; or check them.

A master is a script in percent format (`# %%`, `# %% [markdown]`, `# %% tags=["exercise"]`): the
source of truth, reviewed like code. The notebook is built from it, run from top to bottom in a
fresh kernel and committed with its outputs, so that it can be read where no kernel runs.

    python tools/build_notebooks.py [NAME ...]       build (all, or those named: 00_start_here)
    python tools/build_notebooks.py --check          run nothing: is what is committed in order?

Widgets are stored without their state: it goes stale, and a page shows the picture beside it.
"""

import argparse
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


def settle(notebook: NotebookNode) -> None:
    """Take out what differs from run to run: widget ids, times, the Python version."""
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for index, output in enumerate(cell.get("outputs", [])):
            if WIDGET in output.get("data", {}):
                name = f"{cell.id}/{index}"
                output.data[WIDGET]["model_id"] = uuid.uuid5(uuid.NAMESPACE_OID, name).hex


def write_atomic(path: Path, text: str) -> None:
    """Write beside the file, then replace it: never half a notebook."""
    half = path.with_name(path.name + ".tmp")
    half.write_text(text, encoding="utf-8", newline="\n")
    half.replace(path)


def build(master: Path, notebooks: Path = NOTEBOOKS) -> Path:
    """Build and execute one notebook; raises CellExecutionError and writes nothing if a cell does.

    Cells run in a fresh `python3` kernel with `notebooks` as working folder.
    """
    target = notebooks / f"{master.stem}.ipynb"
    notebook = read_master(master)
    keep_ids(notebook, nbformat.read(target, as_version=4) if target.exists() else None)
    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        store_widget_state=False,
        record_timing=False,
        resources={"metadata": {"path": str(notebooks)}},
    ).execute()
    settle(notebook)
    nbformat.validate(notebook)
    write_atomic(target, nbformat.writes(notebook) + "\n")
    return target


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
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get(
                "tags", []
            ):
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
    """Return every problem of the committed notebooks, each naming its file; [] if none."""
    masters = {path.stem: path for path in (notebooks / "masters").glob("*.py")}
    built = {path.stem: path for path in notebooks.glob("*.ipynb")}
    problems = [f"{name}.ipynb: not built from its master" for name in masters.keys() - built]
    problems += [f"{name}.ipynb: no master in masters/" for name in built.keys() - masters]
    for name in masters.keys() & built:
        try:
            # v4.reads: nbformat.read would mend doubled cell ids on the way
            notebook = nbformat.v4.reads(built[name].read_text(encoding="utf-8"))
        except (ValueError, KeyError, AttributeError) as error:
            problems.append(f"{name}.ipynb: not a notebook: {error!r}")
            continue
        found = [*differences(read_master(masters[name]), notebook), *unclean(notebook)]
        if (size := built[name].stat().st_size) > MAX_BYTES:
            found.append(f"{size / 1e3:.0f} kB, the limit is {MAX_BYTES / 1e3:.0f}")
        problems += [f"{name}.ipynb: {text}" for text in found]
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
                start = time.perf_counter()
                try:
                    target = build(master)
                except CellExecutionError as error:
                    print(f"{master.name}: a cell failed, nothing written\n{error}")
                    return 1
                print(f"{target.name}: {time.perf_counter() - start:.1f} s")
        return 0
    problems = check()
    print("\n".join(problems) or f"{len(masters)} notebooks: as their masters, and clean")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
