"""Files: safetensors for weights and batches, Parquet for tables, JSON for the rest.

Every write goes to a temporary neighbour first and is then renamed, so a reader never meets half
a file and a full disk leaves the old one. Nothing is pickled: a checkpoint from a stranger can be
refused, but it cannot run code. Every failure is one sentence: what, where, what to do.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = Path(__file__).resolve().parents[1]


class StoreError(RuntimeError):
    """A file could not be written or read; the message says which and what to do."""


class DiskFull(StoreError):
    """There is no room left: trying again will not help."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    """Call write(temporary) and rename the result to `path`. Raises StoreError, leaves no scrap."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        todo = "free some space or"
        if isinstance(error, FileExistsError | NotADirectoryError):
            todo = "a file stands where a folder is needed, so"
        # safetensors gives the number as text
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in reason
        kind = DiskFull if full else StoreError
        raise kind(
            f"cannot write {path}: {reason}; {todo} choose another folder "
            "(an earlier version of the file is untouched)"
        ) from error
    finally:
        # a folder that cannot be written can hold no scrap either
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomic(path, lambda p: p.write_text(text, encoding="utf-8", newline="\n"))


def plain(value: Any) -> Any:
    """JSON values only: numpy scalars as Python's, tuples and sets as lists, nan as None."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, frozenset):
        value = sorted(value)  # a set has no order of its own, and files are compared
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None  # JSON has no NaN
    return value


def write_json(path: Path, value: Any) -> Path:
    """Write strict JSON (no NaN) atomically, two-space indented."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises StoreError where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"cannot read {path}: {error}; restore the file or make it anew"
        ) from error


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as Parquet, atomically."""
    import pandas as pd  # costs 0.4 s: only where a table is made

    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    return write_atomic(path, lambda p: frame.to_parquet(p, index=False))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write tensors and a JSON-able description as one safetensors file."""
    # cloned, for safetensors refuses tensors that share memory, as the views of one vector do
    alone = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    notes = {"minirlhf": json.dumps(dict(meta))}
    return write_atomic(path, lambda p: save_file(alone, p, metadata=notes))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what save_tensors() wrote. Raises StoreError if missing, truncated or foreign."""
    try:
        with safe_open(Path(path), framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(notes.get("minirlhf", "{}"))
    except FileNotFoundError as error:
        raise StoreError(f"no file {path}: check the path or make it anew") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged or not a safetensors file ({error}); restore it or make it anew"
        ) from error


def fingerprint(value: Any) -> str:
    """A short hash of plain values, whatever the order of their keys."""
    text = json.dumps(plain(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def data_folder() -> Path:
    """data/ inside the package of an installed wheel, or beside the package in a checkout."""
    inside = PACKAGE / "data"
    return inside if inside.is_dir() else PACKAGE.parent / "data"
