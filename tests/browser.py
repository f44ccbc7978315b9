"""A notebook in real JupyterLab, driven as a reader would: Debian's Chromium through Playwright.

    with served(folder, home) as url, opened(url) as lab:
        lab.open("00_start_here.ipynb"); lab.run_all(); lab.sliders()

The server gets folders of its own for settings and data and writes nowhere else; nothing is
downloaded. Playwright's own browser builds are not used: `chromium()` finds an installed one.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 300  # seconds for anything that a slow, loaded machine may take long for
MISSING = "no chromium on this machine: apt install chromium, or name one in CHROMIUM"
SETTINGS = {  # everything is drawn, also what is out of sight; no question about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
WIDGET = "application/vnd.jupyter.widget-view+json"
# what the notebook's own model says; a stored count would be none of ours, so `copied` strips it
STATE = """() => {
  const panel = window.jupyterapp?.shell.currentWidget;
  if (!panel?.context?.isReady || !panel.sessionContext?.session?.kernel) return 'opening';
  const cells = panel.content.widgets.filter(
    c => c.model.type === 'code' && c.model.sharedModel.getSource().trim());
  for (const cell of cells)
    for (const output of cell.model.outputs.toJSON())
      if (output.output_type === 'error' || output.name === 'stderr')
        return `error: ${output.ename ?? 'stderr'}: ${output.evalue ?? output.text}`;
  if (panel.sessionContext.session.kernel.status !== 'idle') return 'running';
  if (cells.every(c => c.model.executionCount === null)) return 'idle';
  return cells.every(c => c.model.executionCount !== null) ? 'done' : 'running';
}"""
SHOWN = f"""() => [...document.querySelectorAll('[data-mime-type="{WIDGET}"]')].every(
  o => o.querySelector('.jupyter-widgets') && !o.querySelector('.jupyter-widgets-error-widget'))"""
# the picture of a slider's panel: its images, or its text where it has none
PICTURE = """handle => {
  const panel = handle.closest('.jp-OutputArea-output');
  const images = [...panel.querySelectorAll('img')].map(i => i.src);
  const texts = [...panel.querySelectorAll('.widget-html-content')].map(t => t.innerHTML);
  return (images.length ? images : texts).join('');
}"""


def chromium() -> str | None:
    """Path of an installed Chromium, $CHROMIUM first; None if there is none."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def copied(source: Path, target: Path) -> None:
    """The course's notebooks with their checks, without outputs: what is seen is of this run."""
    target.mkdir()
    if (source / "checks").is_dir():
        shutil.copytree(source / "checks", target / "checks")
    for path in source.glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
        (target / path.name).write_text(json.dumps(notebook), encoding="utf-8")


@contextmanager
def served(folder: Path, home: Path) -> Iterator[str]:
    """JupyterLab on `folder`, at a free port; gives its address with a %s for the page's path."""
    token, log = secrets.token_hex(16), home / "server.log"
    places = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA")}
    places |= {"JUPYTER_RUNTIME_DIR": str(home / "runtime"), "IPYTHONDIR": str(home / "ipython")}
    for name, chosen in SETTINGS.items():
        path = home / "config/lab/user-settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(chosen), encoding="utf-8")
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]
    options += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}"]
    options += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    with log.open("w", encoding="utf-8") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env={**os.environ, **places, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            base = _answering(server, home / "runtime", token, log)
            yield f"{base}%s?token={token}&reset"
        finally:
            server.terminate()  # takes its kernels along
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def _answering(server: subprocess.Popen, runtime: Path, token: str, log: Path) -> str:
    """The address of the server, once it answers. Raises RuntimeError with its log if it dies."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        time.sleep(0.1)
        try:
            (note,) = runtime.glob("jpserver-*.json")
            base = json.loads(note.read_text(encoding="utf-8"))["url"]
            with urllib.request.urlopen(f"{base}api/status?token={token}", timeout=10):
                return base
        except (ValueError, urllib.error.URLError, TimeoutError):
            continue  # no note yet, half a note, or not listening yet
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")


class Lab:
    """One browser page with JupyterLab in it; `faults` collects what its console complains of."""

    def __init__(self, page: Any, url: str, screenshots: Path):
        self.page, self.url, self.screenshots, self.faults = page, url, screenshots, []
        self.patience = 60.0  # seconds that a slider may take to show
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: self.faults.append(f"page error: {error}"))
        page.on("console", self._heard)

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.faults.append(f"{message.text} ({message.location.get('url', '')})")

    def state(self, *wanted: str) -> None:
        """Wait for one of the states of STATE. Raises AssertionError if a cell fails."""
        self.page.wait_for_function(
            f"wanted => wanted.some(w => ({STATE})().startsWith(w))", arg=[*wanted, "error"]
        )
        now = self.page.evaluate(STATE)
        assert not now.startswith("error"), now

    def open(self, name: str) -> None:
        """Show a notebook and wait for its kernel."""
        self.name = Path(name).stem
        self.page.goto(self.url % f"lab/tree/{name}")
        self.state("idle")

    def run_all(self) -> None:
        """Run > Run All Cells; wait until every cell has run and every widget is on the page."""
        self.page.click(".lm-MenuBar-item:has-text('Run')")
        self.page.click("li[data-command='runmenu:run-all']")
        self.state("done")
        self.page.wait_for_function(SHOWN)

    def sliders(self) -> list[str]:
        """Move every slider to both its ends; labels in order.

        Raises AssertionError if one leaves its panel's picture as it was, or if a panel is
        higher than a projector shows, or changes its height under the slider.
        """
        labels, handles = [], self.page.locator(".jp-OutputArea-output .noUi-handle")
        for index in range(handles.count()):
            handle = handles.nth(index)
            row = handle.locator("xpath=ancestor::*[contains(@class, 'widget-slider')][1]")
            labels.append(row.locator(".widget-label").inner_text())
            handle.scroll_into_view_if_needed()
            panel = handle.locator("xpath=ancestor::*[contains(@class, 'jp-OutputArea-output')][1]")
            before = round(panel.bounding_box()["height"])
            moved = [self._press(handle, key, labels[-1]) for key in ("Home", "End")]
            assert any(moved), f"{labels[-1]}: the slider does not move"
            after = round(panel.bounding_box()["height"])
            assert before == after <= 600, f"{labels[-1]}: height {before}, then {after} pixels"
            self.picture(f"slider_{index}", panel)
        return labels

    def _press(self, handle: Any, key: str, label: str) -> bool:
        """Press a key on a slider; if it moved, wait for its panel's new picture."""
        value, picture = handle.get_attribute("aria-valuenow"), handle.evaluate(PICTURE)
        handle.press(key)
        if handle.get_attribute("aria-valuenow") == value:
            return False
        deadline = time.monotonic() + self.patience
        while handle.evaluate(PICTURE) == picture:
            assert time.monotonic() < deadline, f"{label}: {key} did not change the picture"
            self.page.wait_for_timeout(50)
        return True

    def picture(self, what: str, of: Any = None) -> None:
        """Keep a screenshot of the page or a part, for whoever reads the CI's output."""
        self.screenshots.mkdir(parents=True, exist_ok=True)
        (of or self.page).screenshot(path=self.screenshots / f"{self.name}_{what}.png")


@contextmanager
def opened(url: str, screenshots: Path) -> Iterator[Lab]:
    """A page of a headless browser, the size of a lecture room's projector."""
    from playwright.sync_api import sync_playwright

    # root has no sandbox, containers hardly any /dev/shm
    options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=options)
        try:
            yield Lab(browser.new_page(viewport={"width": 1366, "height": 768}), url, screenshots)
        finally:
            browser.close()
