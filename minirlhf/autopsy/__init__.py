"""One PPO batch taken apart, wherever it came from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "convention": ["Convention"],
        "reconciliation": ["reconcile"],
        "parts": ["AdvantageParts", "decompose_advantages", "split"],
        "facts": ["three_facts"],
        "pushes": ["CLASSES", "push", "reference_entropy", "token_classes"],
        "what_ifs": ["follow", "rescored", "what_if", "what_if_clip"],
        "battery": ["diagnose"],
        "battery_desk": ["TwoAnswerDesk"],
    },
)
