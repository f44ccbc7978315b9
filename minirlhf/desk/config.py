"""How the pairs are made and who labels them.

Left out: the desk itself, which is a file (data/desk.toml).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PreferenceConfig:
    """How many pairs are labelled, and by whom. Utilities are in gold points."""

    pairs: int = 12_000
    """labelled pairs in all, held-out ones included"""
    holdout: float = 0.1
    """share of the pairs kept from training, in [0, 1)"""
    length_bias: float = 0.0455
    """utility of one more token, in points; gold charges 0.03 for a token of padding"""
    hedge_bias: float = 0.32
    """utility of a hedge, in points; gold charges 0.1 for hedging"""
    skim: float = 0.55
    """chance that a labeler did not check the facts and saw length and hedges only, in [0, 1]"""
    temperature: float = 0.18
    """label noise, in points: a gap this large is ranked right 73 % of the time"""
    sampled: float = 0.5
    """share of answers that come from the reference model, where one is given, in [0, 1]"""

    def __post_init__(self):
        if self.pairs < 2:
            raise ValueError(f"preferences.pairs is {self.pairs}; label at least 2 pairs")
        for name in ("holdout", "skim", "sampled"):
            below = 1.0 if name == "holdout" else None
            value = getattr(self, name)
            if not 0 <= value <= 1 or value == below:
                limit = "[0, 1)" if below else "[0, 1]"
                raise ValueError(f"preferences.{name} is {value}; give a share in {limit}")
        if round(self.pairs * self.holdout) == self.pairs:
            raise ValueError(
                f"preferences.holdout {self.holdout} leaves none of {self.pairs} pairs to train "
                "on; lower it or label more pairs"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"preferences.temperature is {self.temperature}; give a number > 0")
        for name in ("length_bias", "hedge_bias"):
            if not math.isfinite(value := getattr(self, name)):
                raise ValueError(f"preferences.{name} is {value}; give a finite number of points")
