"""How a command's options are read: by tyro, but for what the settings themselves refuse.

tyro says in a box what it cannot read: an option that is not there, beside those that may have been
meant; a word where a number is needed. A setting out of its limits is refused by its dataclass, in
a sentence. tyro would put that into a box as well, behind the names of our variables; the rule
below, tyro's documented way to say how a type is made, lets it pass as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from functools import wraps
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo


class Refused(Exception):
    """What a dataclass refuses, its setting named as on the command line: --ppo.clip-style.

    No ValueError, which tyro would catch.
    """


def read_and_run(
    run: Callable[..., int], program: str, description: str, words: Sequence[str]
) -> int:
    """Call run(options) with the options that the words give; what it returns.

    Raises Refused, SystemExit (--help, or what tyro cannot read), or what `run` raises.
    """
    with _rules():
        return tyro.cli(run, prog=program, description=description, args=words)


def _rules() -> ConstructorRegistry:
    """Dataclasses are read as tyro reads them, and refuse with Refused."""
    registry = ConstructorRegistry()
    asking = False

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not is_dataclass(info.type):
            return None  # tyro's own rules go on
        asking = True
        try:
            usual = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(usual, StructConstructorSpec):
            return None
        return replace(usual, instantiate=_refusing(usual.instantiate))

    return registry


def _refusing(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make, updated=())  # --help shows its docstring above its options
    def made(**settings: Any) -> Any:
        try:
            return make(**settings)
        except ValueError as error:
            name, space, rest = str(error).partition(" ")
            if name.rpartition(".")[2] in settings:
                name = f"--{name.replace('_', '-')}"
            raise Refused(name + space + rest) from error

    return made
