"""From key to repaint: sliders of a notebook in JupyterLab, in headless Chromium.

    python benchmarks/panel.py [notebook] [moves]

Without a notebook (05_ppo, say) the batch panel is measured, beside a slider that changes one word:
what browser, server and kernel take without any panel. Prints milliseconds from a keydown to the
frame after the panel's new picture. Needs the test extra.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import copied, opened, served  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).parents[1]

CELLS = (
    """from minirlhf.audit.auditor import grade
from minirlhf.autopsy import Convention
from minirlhf.lab.panels.batch import BatchPanel
from minirlhf.drift.data import DIALS, shipped
from minirlhf.autopsy.what_ifs import rescored
import ipywidgets as w, torch
case = shipped(); step = case.batch_steps[1]; batch = case.rollout(step)
run, table, names = case.run_before(step), case.prompts(), case.desk.vocabulary.words
prompts = [table[i] for i in batch.index.tolist()]
found = grade(case.desk, prompts, batch.responses, batch.mask)
verbose = torch.as_tensor(found["padding_tokens"] >= 8)
concise = torch.as_tensor((found["padding_tokens"] == 0) & found["correct"])
setting = Convention.of(run.config, beta=run.beta)
panel = BatchPanel(batch, setting, verbose=verbose, concise=concise, run=run,
    words=[[names[i] for i in row] for row in batch.responses.tolist()],
    scores={d: rescored(batch, case.reward_model(d), setting) for d in DIALS},
    strata=[p.stratum for p in prompts])
panel""",
    """dial, word = w.IntSlider(0, 0, 100, description="floor"), w.HTML("0")
dial.observe(lambda change: setattr(word, "value", f"<i>{change.new}</i>"), "value")
w.VBox([dial, word])""",
)
KEYS = ("Home", *("ArrowRight",) * 4, "ArrowLeft", "ArrowLeft", "End", "ArrowLeft", "ArrowLeft")
MOVE = """(handle, key) => new Promise(done => {
  const panel = handle.closest('.widget-vbox'), start = performance.now();
  const shown = () => [...panel.querySelectorAll('.widget-html-content')];
  const seen = () => shown().map(x => x.innerHTML).join();
  const before = seen(), watch = new MutationObserver(() => {
    if (seen() === before) return;
    watch.disconnect();
    requestAnimationFrame(() => done(performance.now() - start));
  });
  watch.observe(panel, {subtree: true, childList: true, attributes: true});
  handle.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
  setTimeout(() => { watch.disconnect(); done(null); }, 3000);
})"""


def notebook(path: Path) -> None:
    """A notebook of CELLS."""
    blank = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [{**blank, "id": f"c{i}", "source": source} for i, source in enumerate(CELLS)]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = {"nbformat": 4, "nbformat_minor": 5, "metadata": spec, "cells": cells}
    path.write_text(json.dumps(book), encoding="utf-8")


def measure(lab: Any, moves: int) -> None:
    """Print one line for every slider on the page."""
    rows = lab.page.locator(".widget-slider:has(.noUi-handle)")
    for n in range(rows.count()):
        row, taken = rows.nth(n), []
        handle = row.locator(".noUi-handle")
        handle.focus()
        for i in range(moves):
            taken.append(handle.evaluate(MOVE, KEYS[i % len(KEYS)]))
            lab.page.wait_for_timeout(120)
        ms = sorted(x for x in taken if x is not None)
        label = row.locator(".widget-label").inner_text()
        if not ms:
            print(f"{label}: no move was seen")
            continue
        median, p95 = statistics.median(ms), ms[int(0.95 * len(ms)) - 1]
        said = f"{label}: median {median:.0f} ms, p95 {p95:.0f} ms, {len(ms)} of {moves} moves seen"
        print(said, flush=True)


def main(name: Positional[str] = "", moves: Positional[int] = 60, /) -> None:
    """Measure the sliders of a notebook of the course, or those of CELLS."""
    with tempfile.TemporaryDirectory() as folder:
        place, home = Path(folder) / "notebooks", Path(folder) / "home"
        home.mkdir()
        if name:
            copied(HERE / "notebooks", place)
        else:
            place.mkdir()
            notebook(place / "panel.ipynb")
        with served(place, home) as url, opened(url, home / "screenshots") as lab:
            lab.open(f"{name or 'panel'}.ipynb")
            lab.run_all()
            measure(lab, moves)


if __name__ == "__main__":
    tyro.cli(main)
