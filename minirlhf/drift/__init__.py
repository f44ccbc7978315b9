"""The case as one run, and data/, which came of one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["DriftConfig"],
        "recipe": ["Recipe", "changed"],
        "run": ["Drift"],
        "batches": ["kinds"],
        "data": ["DIALS", "Shipped", "shipped"],
    },
)
