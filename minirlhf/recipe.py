"""What a run is made of beside its settings: the places at which one thing can be changed.

A run of the case goes desk -> reference -> pairs -> reward model -> PPO -> audit. `Rules` names
every joint between two of them at which somebody who wants to repair the drift can put something
in; a `Recipe` is the settings and the rules. A remedy (remedies.py) is a function from recipe to
recipe, so two of them stack by calling one after the other, and what one changed can be listed.
Left out: the run (drift.py) and the remedies themselves.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from minirlhf.drift_config import DriftConfig
from minirlhf.engine.files import plain
from minirlhf.ppo import Scorer
from minirlhf.preferences import Pairs
from minirlhf.reward import train_reward

if TYPE_CHECKING:
    from minirlhf.drift import Drift
    from minirlhf.upstream import Upstream

PairsRule = Callable[[Pairs, "Upstream", np.random.Generator], Pairs]
ScoreRule = Callable[[Scorer, "Drift"], Scorer]


@dataclass(frozen=True)
class Rules:
    """Where a run can be changed; every default leaves it as it is."""

    pairs: tuple[PairsRule, ...] = ()
    """what is done, in turn, to the training pairs before they are ranked"""
    fit: Callable[..., Any] = train_reward
    """trains the reward model in place: (model, pairs, config, *, generator, progress)"""
    scores: tuple[ScoreRule, ...] = ()
    """what is done, in turn, to the reward model's scores before PPO sees them"""
    prices: Callable[["Drift"], Tensor] | None = None
    """multiples of beta, one for each row of the prompt table [N]"""
    stop: Callable[[dict[str, float]], bool] | None = None
    """whether to end PPO after a step with these metrics"""
    policy: Callable[["Drift"], None] | None = None
    """what is done in place of PPO"""


@dataclass(frozen=True)
class Recipe:
    """Settings and rules of a run, and the names of the remedies that led to them."""

    config: DriftConfig = field(default_factory=DriftConfig)
    rules: Rules = field(default_factory=Rules)
    names: tuple[str, ...] = ()

    def ppo(self, **changes: Any) -> "Recipe":
        """The same recipe with other PPO settings."""
        return replace(self, config=replace(self.config, ppo=replace(self.config.ppo, **changes)))

    def rule(self, **changes: Any) -> "Recipe":
        """The same recipe with other rules; those that act in turn are added at the end."""
        turns = {k: (*getattr(self.rules, k), v) for k, v in changes.items() if k in IN_TURN}
        return replace(self, rules=replace(self.rules, **{**changes, **turns}))


IN_TURN = ("pairs", "scores")


def changed(before: Recipe, after: Recipe) -> set[str]:
    """Names of the rules and of the stages of settings ("ppo", "reward", ...) that differ."""
    found = set()
    for a, b in ((before.rules, after.rules), (before.config, after.config)):
        found |= {f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)}
    return found


def fingerprint(recipe: Recipe) -> str:
    """A hash of the settings and of what every rule does: its source, its options, and what it has
    from around it. Two recipes with one fingerprint make the same runs."""

    def told(rule: Any) -> Any:
        if isinstance(rule, tuple):
            return [told(each) for each in rule]
        if isinstance(rule, partial):
            return [told(rule.func), {k: told(v) for k, v in rule.keywords.items()}]
        if callable(rule):
            around = [told(cell.cell_contents) for cell in getattr(rule, "__closure__", ()) or ()]
            return [inspect.getsource(rule), around]
        return repr(rule)

    rules = {f.name: told(getattr(recipe.rules, f.name)) for f in fields(recipe.rules)}
    text = json.dumps([plain(asdict(recipe.config)), rules], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
