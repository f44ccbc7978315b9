"""The core's annotations, checked while tests run: `Float[Tensor, "B T"]` refuses [B, T + 1].

jaxtyping's import hook decorates every function and dataclass of the modules below with beartype.
A run of the product installs nothing: there the annotations are for the reader alone.

A check takes about as long as a small tensor's sum, and the core's functions are called a hundred
times in a PPO step. So each function is checked in its first calls of every test, and then is
left alone until the next test: a wrong shape shows in the first call or hardly ever.
"""

import contextlib
import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# not config: it holds no tensor, and refuses a wrong setting itself, in a sentence that is tested
CHECKED = (
    "advantages",
    "checkpoints",
    "critic",
    "dpo",
    "engine.packing",
    "generate",
    "kl",
    "metrics",
    "model",
    "ppo",
    "reward",
    "rollout",
    "sft",
    "text",
)
CHECKS = 4  # of a function in a test: arguments and result of two calls

# an int is welcome where a float is asked for, as to every type checker (PEP 484)
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))
_made: Counter[str] = Counter()  # checks in this test, by function
_left_alone: list[Any] = []  # functions that were checked often enough


def install() -> Callable[[], None]:
    """Check what is imported of the core from now on; what comes back ends that."""
    hook = install_import_hook([f"minirlhf.{name}" for name in CHECKED], "shapes.checker")
    return hook.uninstall


def checker(stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """jaxtyping hands in a function of the same name and signature, which is called to check."""
    if "<locals>" in stand_in.__qualname__:
        return stand_in  # a function in a function comes here at each call, a millisecond each
    check = _beartype(stand_in)
    name = f"{stand_in.__module__}:{stand_in.__qualname__}"

    def counted(*args: Any, **kwargs: Any) -> Any:
        _made[name] += 1
        if _made[name] == CHECKS:
            _leave_alone(name)
        return check(*args, **kwargs)

    return counted


def _leave_alone(name: str) -> None:
    """Set what typing.no_type_check sets, at which jaxtyping steps aside."""
    with contextlib.suppress(AttributeError):  # what jaxtyping makes to find a wrong argument
        found = pkgutil.resolve_name(name)
        function = inspect.unwrap(getattr(found, "fget", found))
        function.__no_type_check__ = True
        _left_alone.append(function)


def afresh() -> None:
    """A new test begins: every function is checked again."""
    for function in _left_alone:
        function.__no_type_check__ = False
    _left_alone.clear()
    _made.clear()


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """As in a run of the product: what is wrong is met by the product's own refusal, or by none."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
