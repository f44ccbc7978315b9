"""What a run is made of beside its settings: the places at which one thing can be changed.

A run of the case goes desk -> reference -> pairs -> reward model -> PPO -> audit. `Rules` names
every joint between two of them at which somebody who wants to repair the drift can put something
in; a `Recipe` is the settings and the rules. A remedy (remedies/arms.py) is a function from recipe
to recipe, so two of them stack by calling one after the other, and what one changed can be listed.
Left out: the run (drift/run.py) and the remedies themselves.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from minirlhf.desk.preferences import Pairs
from minirlhf.desk.world import Desk, Prompt
from minirlhf.drift.config import DriftConfig
from minirlhf.engine.files import fingerprint
from minirlhf.model import Transformer
from minirlhf.ppo import Scorer
from minirlhf.reward import RewardModel, train_reward


class Run(Protocol):
    """What a rule may read of the run that it changes (run.py)."""

    desk: Desk
    prompts: list[Prompt]
    """PPO's prompt table; there once the reward model is trained"""
    reference: Transformer
    reward_model: RewardModel
    device: torch.device
    config: DriftConfig

    def stream(self, name: str) -> int:
        """The seed of a random stream of this name."""
        ...

    def member(self, number: int) -> RewardModel:
        """A further reward model, of the same pairs resampled and in another order."""
        ...


PairsRule = Callable[[Pairs, Run, np.random.Generator], Pairs]
ScoreRule = Callable[[Scorer, Run], Scorer]


@dataclass(frozen=True)
class Rules:
    """Where a run can be changed; every default leaves it as it is."""

    pairs: tuple[PairsRule, ...] = ()
    """what is done, in turn, to the training pairs before they are ranked"""
    fit: Callable[..., Any] = train_reward
    """trains the reward model in place: (model, pairs, config, *, generator, progress)"""
    scores: tuple[ScoreRule, ...] = ()
    """what is done, in turn, to the reward model's scores before PPO sees them"""
    prices: Callable[[Run], Tensor] | None = None
    """multiples of beta, one for each row of the prompt table [N]"""
    stop: Callable[[dict[str, float]], bool] | None = None
    """whether to end PPO after a step with these metrics"""
    policy: Callable[[Any], None] | None = None
    """what is done with the whole run (run.py) in place of PPO"""


@dataclass(frozen=True)
class Recipe:
    """Settings and rules of a run, and the names of the remedies that led to them."""

    config: DriftConfig = field(default_factory=DriftConfig)
    rules: Rules = field(default_factory=Rules)
    names: tuple[str, ...] = ()

    def ppo(self, **changes: Any) -> "Recipe":
        """The same recipe with other PPO settings."""
        ppo = replace(self.config.ppo, **changes)
        return replace(self, config=replace(self.config, ppo=ppo))

    def rule(self, **changes: Any) -> "Recipe":
        """The same recipe with other rules; those that act in turn are added at the end."""
        new = dict(changes)
        for name in IN_TURN:
            if name in changes:
                new[name] = (*getattr(self.rules, name), changes[name])
        return replace(self, rules=replace(self.rules, **new))


IN_TURN = ("pairs", "scores")


def changed(before: Recipe, after: Recipe) -> set[str]:
    """Names of the rules and of the stages of settings ("ppo", "reward", ...) that differ."""
    found = set()
    for old, new in ((before.rules, after.rules), (before.config, after.config)):
        for part in fields(old):
            if getattr(old, part.name) != getattr(new, part.name):
                found.add(part.name)
    return found


def described(recipe: Recipe) -> str:
    """A short hash of the settings, and of the name and options of every rule.

    Two recipes with one description make the same runs as long as no rule's code has changed, which
    nothing here can see: then begin a folder of its own. Raises ValueError for a rule without a
    name by which it could be told from another one (a lambda, a function inside a function).
    """

    def told(rule: Any) -> Any:
        if isinstance(rule, tuple):
            return [told(each) for each in rule]
        if isinstance(rule, partial):
            options = {name: told(value) for name, value in rule.keywords.items()}
            return {"rule": told(rule.func), "given": told(rule.args), "options": options}
        if not callable(rule):
            return repr(rule)
        name = f"{rule.__module__}.{rule.__qualname__}"
        if "<" in name:
            raise ValueError(
                f"the rule {name} has no name of its own, so a resumed run could not tell it from "
                "another one: make it a function of a module, and give it options by partial"
            )
        return name

    rules = {joint.name: told(getattr(recipe.rules, joint.name)) for joint in fields(recipe.rules)}
    return fingerprint({"config": asdict(recipe.config), "rules": rules})
