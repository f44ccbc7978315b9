"""pyproject.toml, constraints.txt, environment.yml and what is installed say the same thing."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import minirlhf

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HOME = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((HOME / "environment.yml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS["dev"]]
PYTHONS = ["3.10.13", "3.11.2", "3.11.7", "3.12.1", "3.13.0"]


def pins(python=None):
    """{name: version} of constraints.txt as pip reads it on that Python; no name twice."""
    found = {}
    for line in (HOME / "constraints.txt").read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        if not text:
            continue
        pin = Requirement(text)
        assert re.fullmatch(r"==[0-9][0-9.]*", str(pin.specifier)), f"not an exact version: {text}"
        if pin.marker is None or pin.marker.evaluate(environment(python)):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} is pinned twice on Python {python}"
            found[name] = str(pin.specifier)[2:]
    return found


def environment(python):
    if python is None:
        return {}
    short = ".".join(python.split(".")[:2])
    return {"python_version": short, "python_full_version": python}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_is_pinned_within_its_range(python):
    pinned = pins(python)
    for need in DIRECT:
        if need.marker is None or need.marker.evaluate(environment(python)):
            version = pinned[canonicalize_name(need.name)]
            assert need.specifier.contains(version), f"{need} but pinned {version}"


def test_pins_are_for_the_python_that_runs_this():
    """Each installed package that minirlhf brings in is pinned, at this very version."""
    pinned, todo, seen = pins(), [("minirlhf", "dev")], set()
    if Version(metadata.version("torch")).public != pinned["torch"]:
        pytest.skip("another torch: a machine of its own, not the tested environment")
    wrong = []
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found = metadata.distribution(name)
        version = Version(found.version).public
        if name != "minirlhf" and pinned.get(name) != version:
            wrong.append(f"{name}=={version}, pinned {pinned.get(name)}")
        for text in found.requires or []:
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in ("", extra)):
                todo += [(canonicalize_name(need.name), e) for e in ("", *need.extras)]
    foreign = {"colorama", "pywinpty", "appnope"}  # Windows and macOS only
    cuda = re.compile("(nvidia|cuda|triton|setuptools)")
    wrong = [text for text in wrong if text.split("==")[0] not in foreign and not cuda.match(text)]
    assert not sorted(wrong)
    assert len(seen) > 100, "the walk went nowhere"


def test_environment_installs_the_very_same_pins():
    conda = [item for item in ENVIRONMENT["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in ENVIRONMENT["dependencies"] if isinstance(item, dict)]
    assert pip == ["-c constraints.txt", "-e .[dev]"]
    versions = dict(item.split("=") for item in conda if "=" in item)
    assert set(conda) == {"pip", *(f"{k}={v}" for k, v in versions.items())}
    assert versions["pytorch-cpu"] == pins()["torch"]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(versions["python"])
    assert ENVIRONMENT["name"] == PROJECT["name"]


def test_dev_brings_dask_along():
    """The backend for clusters is tested wherever the tests run."""
    assert set(EXTRAS) == {"dev", "dask"}
    assert set(EXTRAS["dask"]) < set(EXTRAS["dev"])


def test_version_is_the_same_everywhere():
    assert metadata.version("minirlhf") == minirlhf.__version__
    citation = yaml.safe_load((HOME / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == minirlhf.__version__
    assert f"## {minirlhf.__version__}" in (HOME / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (HOME / "LICENSE").read_text(encoding="utf-8")


def test_every_dependency_has_its_reason_in_the_readme():
    text = (HOME / "README.md").read_text(encoding="utf-8")
    reasons = text.split("why each is there:")[1].split("\n[docs/metrics.md]")[0]
    assert [need.name for need in DIRECT if not re.search(rf"\b{need.name}\b", reasons)] == []


def test_citation_is_complete():
    citation = yaml.safe_load((HOME / "CITATION.cff").read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(citation["date-released"]))
    assert citation["authors"] == [{"name": PROJECT["authors"][0]["name"]}]
    assert {"cff-version", "message", "title", "type"} <= citation.keys()


def test_the_readme_has_a_row_for_every_notebook_and_the_map_a_link():
    for path in (HOME / "notebooks").glob("[0-9]*.ipynb"):
        link = f"[{path.stem}](notebooks/{path.name})"
        assert link in (HOME / "README.md").read_text(encoding="utf-8")
    first = (HOME / "notebooks" / "masters" / "00_start_here.py").read_text(encoding="utf-8")
    for path in (HOME / "notebooks").glob("0[1-9]*.ipynb"):
        assert f"]({path.name})" in first, "the map of notebook 00 links it"


def make(*words):
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    done = subprocess.run(
        ["make", *words], cwd=HOME, capture_output=True, encoding="utf-8", check=False, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_make_lab_opens_the_first_notebook_and_keeps_the_token():
    code, said = make("-n", "lab", "VENV=no-such-folder")
    assert code == 0
    assert "-c constraints.txt -e" in said, "lab makes the environment where there is none"
    assert said.index("2 GB, 1-2 minutes") < said.index("pip install"), "pip itself is silent"
    assert said.index("pip install") < said.index("/jupyter lab ")
    assert "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb" in said
    assert "token" not in said and "password" not in said


def test_make_test_runs_every_part():
    code, said = make("-n", "test", "VENV=no-such-folder")
    assert code == 0
    parts = ["ruff format --check", "ruff check", "pyright", "build_notebooks.py --check", "pytest"]
    places = [said.index(part) for part in parts]
    assert places == sorted(places)
    (run,) = [line for line in said.replace("\\\n", "").splitlines() if "-m pytest" in line]
    assert " tests " in run and " notebooks " in run and "--nbval " in run
    assert "--nbval-lax" not in run, "stored outputs are compared"


def test_ci_is_make_test():
    script = (HOME / ".ci" / "run").read_text(encoding="utf-8")
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script
    assert "\nmake test" in script
