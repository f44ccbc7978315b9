"""Exact answers to hold the core against: closed forms, enumeration, reweighting."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "closed_form": [
            "clip_steps",
            "kl_pull",
            "largest_drift",
            "moving_reference",
            "net_advantages",
            "runaway_threshold",
            "tilt",
            "two_answer",
            "two_answer_end",
        ],
        "chain": ["ForkChain"],
        "pocket": ["pocket_desk", "two_word_policy", "verbose_share"],
    },
)
