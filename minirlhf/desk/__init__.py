"""The world: a support desk, its customers, and the labelers who rank its answers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "world": ["Desk", "DeskError", "Grade", "Prompt", "STRATA"],
        "config": ["PreferenceConfig"],
        "preferences": [
            "Pairs",
            "bayes_ceiling",
            "label_probability",
            "make_pairs",
            "raw_bias",
            "relabel",
        ],
    },
)
