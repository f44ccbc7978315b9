"""What the tests of the checks share: the functions that an edition's exercises define."""

from typing import Any

import build_notebooks as bn


def written(master: str, change, **scope: Any) -> dict[str, Any]:
    """The functions of a master's exercises, each cell made by `change` (bn.solved, bn.student)."""
    for cell in bn.read_master(bn.NOTEBOOKS / "masters" / f"{master}.py").cells:
        if "exercise" in bn.tags(cell):
            exec(change(cell.source), scope)
    return scope
