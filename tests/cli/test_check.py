"""`minirlhf check`: each row's OK and each way it can fail."""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from minirlhf.cli import check
from minirlhf.cli.check import Row


@pytest.fixture
def home(tmp_path):
    """A checkout with two data files, their manifest and a constraints file."""
    (tmp_path / "data" / "deep").mkdir(parents=True)
    files = {}
    for name, content in {"a.bin": b"\x00\x01", "deep/b.toml": "é\n".encode()}.items():
        (tmp_path / "data" / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files[name] = {"sha256": digest, "bytes": len(content), "seed": 0, "command": "make data"}
    manifest = json.dumps({"files": files})
    (tmp_path / "data" / "MANIFEST.json").write_text(manifest, encoding="utf-8")
    (tmp_path / "constraints.txt").write_text("# none\nnumpy==0.1\n", encoding="utf-8")
    return tmp_path


def row(rows, what):
    (found,) = [r for r in rows if r.what == what]
    return found


def test_every_subject_has_a_row_and_bad_rows_say_what_to_do(home):
    rows = check.check(home, out=home)
    names = [r.what for r in rows]
    assert names[0] == "Python" and names[-4:] == ["device", "widgets", "data", "output"]
    assert {"torch", "numpy", "jupyterlab"} <= set(names)
    assert all(r.do for r in rows if r.status != "OK")
    assert not any(r.do for r in rows if r.status == "OK")
    assert {r.status for r in rows if r.what in ("torch", "data", "widgets", "output")} == {"OK"}


def test_untested_version_warns_and_does_not_fail(home):
    rows = check.check(home, out=home)
    numpy = row(rows, "numpy")
    assert numpy.status == "WARN"
    assert numpy.found == f"{metadata.version('numpy')}, tested with 0.1"
    assert check.exit_code([numpy]) == 0


@pytest.mark.parametrize(
    ("need", "pin", "status", "found"),
    [
        ("torch>=2.6", None, "OK", metadata.version("torch")),
        ("torch>=2.6", torch.__version__.split("+")[0], "OK", metadata.version("torch")),
        ("torch>=99", None, "FAIL", f"{metadata.version('torch')}, needs >=99"),
        ("no-such-package-here", None, "FAIL", "not installed"),
    ],
)
def test_package_rows(need, pin, status, found):
    got = check._package(Requirement(need), pin)
    assert (got.status, got.found) == (status, found)


def test_package_not_installed_at_all(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    (only,) = check._packages(check.HOME)
    assert only.status == "FAIL" and "pip install" in only.do


def test_pins_follow_the_markers(tmp_path):
    path = tmp_path / "c.txt"
    text = (
        'A.b==1.0 ; python_version < "3.0"\na_b==2.0 ; python_version >= "3.0"  # new\n\n# x==3\n'
    )
    path.write_text(text, encoding="utf-8")
    assert check.read_pins(path) == {"a-b": "2.0"}


def test_device_rows(monkeypatch):
    assert check._device("cpu").status == "OK"
    unknown = check._device("tpu")
    assert unknown.status == "FAIL" and "'tpu'" in unknown.found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check._device("cuda") == Row(
        "FAIL", "device", f"no cuda device for torch {torch.__version__}", "use cpu"
    )


def test_a_torch_that_does_not_load_is_a_row_among_the_others(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise OSError('libtorch.so: not found')", encoding="utf-8"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "minirlhf.cli", "check", "--out", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": path}
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (1, "")
    failed = re.findall(r"^\[FAIL\] (\w+) +(.*?)  ->", found.stdout, re.MULTILINE)
    assert failed == [("device", "torch does not load: libtorch.so: not found")]


def test_driver_without_a_cuda_build_warns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(check.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert check._device("cpu").status == "WARN"


def test_driver_that_does_not_work_fails(monkeypatch):
    def broken(*shape, device):
        raise RuntimeError("CUDA error: no kernel image\nsecond line")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", broken)
    got = check._device("auto")
    assert (got.status, got.found) == ("FAIL", "cuda: CUDA error: no kernel image")


def test_widget_halves_must_be_a_pair(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "8.1.0")
    got = check._widgets()
    assert got.status == "FAIL" and "jupyterlab_widgets 8.1.0" in got.found


def test_missing_widgets_are_named(monkeypatch):
    def no_widgets(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(check.importlib, "import_module", no_widgets)
    assert check._widgets().found == "ipywidgets: No module named 'ipywidgets'"


def test_data_rows(home):
    folder = home / "data"
    assert check._data(folder) == Row("OK", "data", "2 files, 0.0 MB, sha256 as listed")
    (folder / "a.bin").write_bytes(b"\x00\x02")  # same size: only the sum can tell
    assert check._data(folder).found == "missing or changed: a.bin"
    (folder / "deep" / "b.toml").unlink()
    got = check._data(folder)
    assert got.status == "FAIL" and got.found == "missing or changed: a.bin, deep/b.toml"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"a.bin": 1}}'])
def test_broken_manifest_fails_in_one_line(home, text):
    (home / "data" / "MANIFEST.json").write_text(text, encoding="utf-8")
    got = check._data(home / "data")
    assert got.status == "FAIL" and "cannot be read" in got.found and "\n" not in got.found


def test_missing_manifest_says_where(tmp_path):
    got = check._data(tmp_path)
    assert got.status == "FAIL" and got.found == f"{tmp_path / 'MANIFEST.json'} is missing"


def test_output_rows(tmp_path, monkeypatch):
    assert check._writable(tmp_path / "not" / "yet").status == "OK"
    assert list(tmp_path.iterdir()) == []

    def read_only(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(check.tempfile, "TemporaryFile", read_only)
    got = check._writable(tmp_path)
    assert (got.status, got.found) == ("FAIL", f"{tmp_path}: Permission denied")


def test_output_below_a_file_fails(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert check._writable(tmp_path / "file" / "run").status == "FAIL"


def test_full_disk_warns(tmp_path, monkeypatch):
    class Full:
        free = 1e8

    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: Full)
    assert check._writable(tmp_path).status == "WARN"


def test_table_is_aligned_ascii_and_counts():
    rows = [
        Row("OK", "Python", "3.11"),
        Row("FAIL", "data", "é lost", "get it"),
        Row("WARN", "x", "y"),
    ]
    assert check.render(rows).splitlines() == [
        "[OK]   Python  3.11",
        "[FAIL] data    ? lost  -> get it",
        "[WARN] x       y",
        "3 checks, 1 failed, 1 warned",
    ]
    assert check.exit_code(rows) == 1
    assert check.exit_code([rows[0], rows[2]]) == 0
