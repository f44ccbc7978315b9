"""The faces of the wings: what __init__.pyi lists is there, loaded only when it is asked for."""

import importlib
import subprocess
import sys

import density
import pytest

WINGS = ("desk", "oracle", "audit", "autopsy", "drift", "remedies")


@pytest.mark.parametrize("wing", WINGS)
def test_every_name_is_there_and_is_no_module(wing):
    face = importlib.import_module(f"minirlhf.{wing}")
    modules = {path.stem for path in (density.PACKAGE / wing).glob("*.py")}
    assert face.__doc__ and len(face.__all__) >= 5
    assert not set(face.__all__) & modules, "a name must not mean two things"
    for name in face.__all__:
        assert getattr(face, name) is not None
        assert name in dir(face)


def test_a_name_that_is_not_there_is_an_attribute_error():
    face = importlib.import_module("minirlhf.autopsy")
    with pytest.raises(AttributeError, match="attribute spilt"):
        _ = face.spilt


def test_a_face_loads_nothing_before_it_is_asked():
    wings = ", ".join(f"minirlhf.{wing}" for wing in WINGS)
    code = f"import sys, {wings}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.split() == ["False", "False"]
