"""A grid of runs: beta x epsilon x length bias x remedy x seed, and what its cells have in common.

    cells = Grid(beta=(0.02, 0.2), seed=(0, 1)).cells(DriftConfig(steps=60))

A cell is one run: its dials, its remedies, its seed. Cells of one seed share a reference; those
that also share their pairs and rules share a reward model. Each cell says under which name.
Left out: running them (cells.py).
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

from minirlhf.drift.config import DriftConfig
from minirlhf.drift.recipe import Recipe, changed
from minirlhf.remedies.arms import ARMS, stack

Row = dict[str, Any]
REFERENCE = {"sft"}  # what of a recipe a reference depends on
REWARD_MODEL = {"pairs", "fit", "sft", "preferences", "reward"}  # and what a reward model does
DIALS = {
    "ppo": ("beta", "clip"),
    "preferences": ("length_bias",),
}  # settings that a cell's key names


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    remedy: str
    beta: float
    clip: float
    length_bias: float
    seed: int

    @property
    def key(self) -> str:
        """Its name, good for a file."""
        dials = f"beta{self.beta:g}_clip{self.clip:g}_bias{self.length_bias:g}"
        return f"{self.remedy}_{dials}_seed{self.seed}"

    def recipe(self, base: DriftConfig) -> Recipe:
        """The settings of `base` with this cell's dials, and the remedy's change."""
        dialled = replace(
            base,
            seed=self.seed,
            ppo=replace(base.ppo, beta=self.beta, clip=self.clip),
            preferences=replace(base.preferences, length_bias=self.length_bias),
        )
        return stack(self.remedy, dialled)

    def upstream(self, base: DriftConfig) -> str:
        """The name of what it shares with other cells: its pairs and its reward model."""
        names = self._acting(base, REWARD_MODEL)
        return f"{names}_bias{self.length_bias:g}_seed{self.seed}"

    def reference(self, base: DriftConfig) -> str:
        """The name of the reference that it shares."""
        return f"{self._acting(base, REFERENCE)}_seed{self.seed}"

    def _acting(self, base: DriftConfig, parts: set[str]) -> str:
        """Those of its remedies that change one of these parts of a recipe, joined."""
        usual = replace(self, remedy="none").recipe(base)
        names = self.remedy.split("+")
        acting = [name for name in names if changed(usual, ARMS[name](usual)) & parts]
        return "+".join(acting) or "none"


@dataclass(frozen=True)
class Grid:
    """The values of every dial; each combination is a run."""

    beta: tuple[float, ...] = ()
    """price of KL, reward sd per nat (none given: that of the settings, as for the others)"""
    clip: tuple[float, ...] = ()
    """epsilon of the clipped ratio"""
    length_bias: tuple[float, ...] = ()
    """what labelers pay for a token, gold points"""
    remedy: tuple[str, ...] = ("none",)
    """arms of remedies/arms.py; several joined by + are applied one after the other"""
    seed: tuple[int, ...] = ()
    """every random draw of a run"""

    def cells(self, base: DriftConfig) -> list[Cell]:
        """Every combination once. Raises ValueError, before any run, for one that cannot be."""
        dials = {
            "beta": self.beta or (base.ppo.beta,),
            "clip": self.clip or (base.ppo.clip,),
            "seed": self.seed or (base.seed,),
            "length_bias": self.length_bias or (base.preferences.length_bias,),
            "remedy": self.remedy or ("none",),
        }
        for name, values in dials.items():
            if len(set(values)) < len(values):
                raise ValueError(f"grid.{name} is {values}; give no value twice")
        cells = []
        for values in itertools.product(*dials.values()):
            cell = Cell(**dict(zip(dials, values, strict=True)))
            cell.recipe(base)  # refuses settings that no run can have
            cells.append(cell)
        return cells
