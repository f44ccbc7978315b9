"""What an auditor who knows the truth measures, its controls, and the alarm."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["AuditConfig"],
        "auditor": ["Auditor", "answer", "grade", "judge", "texts"],
        "controls": ["nrg", "over_prompts", "rates", "ruler", "slopes"],
        "monitor": ["Monitor", "calibrate", "stream"],
    },
)
