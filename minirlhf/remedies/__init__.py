"""One change each, by where it acts, and what it does to one batch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arms": ["ARMS", "FAULTS", "REMEDIES", "Remedy", "stack"],
    },
)
