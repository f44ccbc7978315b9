"""`minirlhf check`: is this machine ready for the course? One row for each thing that may be wrong.

Each row says what was looked at, whether it is OK, what was found and what to do. FAIL means that
something will not run; WARN that it runs but differs from what was tested.

Whatever may be broken is imported where its row is made, torch included. Left out: repairing
anything, the network, and the JupyterLab server itself (on a JupyterHub it may live in another
environment that cannot be seen from here).
"""

import hashlib
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import tyro
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

Status = Literal["OK", "WARN", "FAIL"]
HOME = Path(__file__).resolve().parents[2]  # a checkout, or the folder of an installed wheel
INSTALL = 'pip install -c constraints.txt -e ".[dev]"'


@dataclass(frozen=True)
class Options:
    """What `minirlhf check` can be given."""

    out: Path = Path()
    """a folder that runs would write to"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""


def run(options: Annotated[Options, tyro.conf.arg(name="")]) -> int:
    """Print the table of what is ready and what is not; 1 where something is not."""
    rows = check(out=options.out, device=options.device)
    print(render(rows))
    return exit_code(rows)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    status: Status
    """"OK", "WARN" (runs, but is not what was tested) or "FAIL" (will not run)"""
    what: str
    """what was looked at: "Python", "torch", "data" """
    found: str
    """what was found there"""
    do: str = ""
    """what to do about it; empty for OK"""


def check(home: Path = HOME, out: Path = Path(), device: str = "auto") -> list[Row]:
    """Look at everything and return the rows; nothing is changed and nothing raised.

    `home` is the checkout (constraints.txt and data/ are looked for there; an installed wheel has
    its data beside the package), `out` the folder that a run would write to, `device` one of
    "auto", "cpu", "cuda", "mps" (as in `minirlhf drift --device`).
    """
    python = Row("OK", "Python", f"{sys.version.split()[0]} ({sys.executable})")
    rows = [python, *_packages(home), _device(device), _widgets()]
    return [*rows, _data(_data_folder(home)), _writable(out)]


def render(rows: list[Row]) -> str:
    """Return the rows as an aligned plain-ASCII table, one line each, and a closing line."""
    width = max(len(row.what) for row in rows)
    lines = []
    for row in rows:
        mark = f"[{row.status}]".ljust(6)
        todo = f"  -> {row.do}" if row.do else ""
        lines.append(f"{mark} {row.what.ljust(width)}  {row.found}{todo}")
    failed = sum(row.status == "FAIL" for row in rows)
    warned = sum(row.status == "WARN" for row in rows)
    lines.append(f"{len(rows)} checks, {failed} failed, {warned} warned")
    return "\n".join(lines).encode("ascii", "replace").decode("ascii")


def exit_code(rows: list[Row]) -> int:
    """Return 1 if any row is a FAIL, else 0: WARN does not stop anybody."""
    return int(any(row.status == "FAIL" for row in rows))


def read_pins(path: Path) -> dict[str, str]:
    """Read a constraints file: {canonical name: version} of the lines that hold on this Python."""
    pins: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        if text:
            pin = Requirement(text)
            if pin.marker is None or pin.marker.evaluate():
                pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    return pins


def _packages(home: Path) -> Iterator[Row]:
    """One row for each direct dependency, held against its range and against what was tested."""
    try:
        requires = metadata.requires("minirlhf") or []
    except metadata.PackageNotFoundError:
        yield Row("FAIL", "minirlhf", "not installed in this Python", INSTALL)
        return
    constraints = home / "constraints.txt"
    pins = read_pins(constraints) if constraints.is_file() else {}
    for text in requires:
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            yield _package(need, pins.get(canonicalize_name(need.name)))


def _package(need: Requirement, pin: str | None) -> Row:
    try:
        found = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Row("FAIL", need.name, "not installed", INSTALL)
    public = Version(found).public  # torch calls its CPU build 2.13.0+cpu: the same release
    if not need.specifier.contains(public, prereleases=True):
        return Row("FAIL", need.name, f"{found}, needs {need.specifier}", INSTALL)
    if pin is not None and Version(pin).public != public:
        return Row(
            "WARN", need.name, f"{found}, tested with {pin}", "should work; figures may differ"
        )
    return Row("OK", need.name, found)


def _device(wanted: str) -> Row:
    """Say which device a run would take, after a sum on it: a driver may be there and not work."""
    try:
        import torch
    except Exception as error:  # a broken torch raises OSError, ImportError or worse
        return Row("FAIL", "device", f"torch does not load: {_first_line(error)}", INSTALL)
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted not in ("auto", *has):
        return Row("FAIL", "device", f"unknown device {wanted!r}", "use auto, cpu, cuda or mps")
    name = next(kind for kind in has if has[kind]) if wanted == "auto" else wanted
    if not has[name]:
        return Row("FAIL", "device", f"no {name} device for torch {torch.__version__}", "use cpu")
    try:
        torch.ones(2, device=name).sum().item()
    except RuntimeError as error:
        return Row("FAIL", "device", f"{name}: {_first_line(error)}", "use --device cpu")
    if name == "cpu" and shutil.which("nvidia-smi") and torch.version.cuda is None:
        todo = "for the GPU install a CUDA build of torch; the course itself needs none"
        return Row("WARN", "device", "cpu: an NVIDIA driver, but a torch without CUDA", todo)
    detail = (
        torch.cuda.get_device_name() if name == "cuda" else f"{torch.get_num_threads()} threads"
    )
    return Row("OK", "device", f"{name} ({detail})")


def _widgets() -> Row:
    """Kernel side (ipywidgets, ipykernel) and browser side (jupyterlab_widgets) must be a pair."""
    found = {}
    for name in ("ipywidgets", "jupyterlab_widgets", "ipykernel"):
        try:
            importlib.import_module(name)
            found[name] = metadata.version(name)
        except Exception as error:
            return Row("FAIL", "widgets", f"{name}: {_first_line(error)}", INSTALL)
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if found["ipywidgets"].split(".")[0] != "8" or found["jupyterlab_widgets"].split(".")[0] != "3":
        todo = "install ipywidgets 8 and jupyterlab_widgets 3 together, then reload the browser"
        return Row("FAIL", "widgets", text, todo)
    return Row("OK", "widgets", text)


def _data_folder(home: Path) -> Path:
    """As engine.files.data_folder, which needs the torch that may be what is wrong."""
    inside = home / "minirlhf" / "data"  # of an installed wheel
    return inside if inside.is_dir() else home / "data"


def _data(folder: Path) -> Row:
    """Hold every file that data/MANIFEST.json lists against its size and sha256."""
    manifest = folder / "MANIFEST.json"
    again = "get data/ again (git checkout -- data), or rebuild it (make data)"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        bad = [name for name, entry in files.items() if not _intact(folder / name, entry)]
    except FileNotFoundError:
        return Row("FAIL", "data", f"{manifest} is missing", again)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Row("FAIL", "data", f"{manifest} cannot be read: {_first_line(error)}", again)
    if bad:
        names = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        return Row("FAIL", "data", f"missing or changed: {names}", again)
    size = sum(entry["bytes"] for entry in files.values()) / 1e6
    return Row("OK", "data", f"{len(files)} files, {size:.1f} MB, sha256 as listed")


def _intact(path: Path, entry: dict) -> bool:
    """Compare the size first: it is free, and tells most damage."""
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]


def _writable(out: Path) -> Row:
    """Write a file that vanishes: permissions tell too little on Windows and on network drives."""
    out = out.absolute()
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"minirlhf")
    except OSError as error:
        todo = "choose another folder with --out"
        return Row("FAIL", "output", f"{there}: {error.strerror or error}", todo)
    free = shutil.disk_usage(there).free / 1e9
    if free < 0.5:
        return Row("WARN", "output", f"{there}: {free:.2f} GB free", "a run may need 0.5 GB")
    return Row("OK", "output", f"{there} ({free:.0f} GB free)")


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
