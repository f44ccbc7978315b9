"""What a resumed sweep knows a recipe by: its settings, and its rules' names and options."""

from functools import partial

import pytest

from minirlhf.drift.recipe import Recipe, described
from minirlhf.remedies.arms import ARMS, on_scores
from minirlhf.remedies.scores import capped, length_penalty

PLAIN = Recipe()


def recipe_of(rule) -> Recipe:
    return PLAIN.rule(scores=rule)


def test_the_same_recipe_has_one_description():
    one, two = (on_scores(length_penalty, alpha=0.3)(Recipe()) for _ in range(2))
    assert described(one) == described(two) != described(PLAIN)


@pytest.mark.parametrize(
    "other",
    [
        recipe_of(capped),
        recipe_of(partial(length_penalty, alpha=0.3)),
        recipe_of(partial(length_penalty, 0.3)),
        recipe_of(length_penalty).rule(scores=length_penalty),
        recipe_of(length_penalty).ppo(beta=0.4),
    ],
    ids=["another rule", "another option", "something given", "twice", "another setting"],
)
def test_what_differs_is_told_apart(other):
    assert described(other) != described(recipe_of(length_penalty))


def test_every_arm_can_be_told_from_every_other():
    found = {name: described(change(Recipe())) for name, change in ARMS.items()}
    alike = {name for name in found if list(found.values()).count(found[name]) > 1}
    # a correct run has KL in the reward and summed already
    assert alike == {"none", "placement", "sequence_sum"}


def test_a_rule_without_a_name_is_refused():
    def cap(limit):
        return lambda scorer, run: scorer

    for rule in (cap(1.0), lambda scorer, run: scorer, partial(cap(1.0), limit=2.0)):
        with pytest.raises(ValueError, match=r"has no name of its own.*function of a module"):
            described(recipe_of(rule))
