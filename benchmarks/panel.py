"""From key to repaint: the batch panel's beta and length bias in JupyterLab, in headless Chromium.

    python benchmarks/panel.py [moves]

Prints milliseconds from a keydown to the frame after the panel's new picture, beside a slider that
changes one word: what browser, server and kernel take without any panel. Needs the test extra.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import opened, served  # pyright: ignore[reportMissingImports]

CELLS = (
    """from minirlhf.audit import grade
from minirlhf.autopsy import Convention
from minirlhf.lab.batch import BatchPanel
from minirlhf.shipped import DIALS, shipped
from minirlhf.whatif import rescored
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


def main(moves: int = 60) -> None:
    """Print one line a slider."""
    with tempfile.TemporaryDirectory() as folder:
        place, home = Path(folder) / "notebooks", Path(folder) / "home"
        place.mkdir()
        home.mkdir()
        notebook(place / "panel.ipynb")
        with served(place, home) as url, opened(url, home / "screenshots") as lab:
            lab.open("panel.ipynb")
            lab.run_all()
            for label in ("floor", "beta", "length bias"):
                row = lab.page.locator(f".widget-slider:has(.widget-label:text-is('{label}'))")
                handle = row.locator(".noUi-handle")
                handle.focus()
                taken = []
                for i in range(moves):
                    taken.append(handle.evaluate(MOVE, KEYS[i % len(KEYS)]))
                    lab.page.wait_for_timeout(120)
                ms = sorted(x for x in taken if x is not None)
                print(
                    f"{label}: median {statistics.median(ms):.0f} ms, "
                    f"p95 {ms[int(0.95 * len(ms)) - 1]:.0f} ms, {len(ms)} moves seen"
                )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
