"""Where to compute: a device, or chunks of a batch on several cores with the bits of one.

A batch goes through the model in chunks of rows (Transformer.by_rows) that need nothing of each
other, and torch lets go of Python's lock inside its operations: so worker threads take chunks
side by side, the longest first. Backward, autograd walks a graph on one thread; therefore every
chunk has a graph of its own and stands in the main graph as one node. When the gradient has
reached the gate in front of these nodes, workers walk the chunks' graphs; the nodes then hand out
what was found, last chunk first. One core does the same, one chunk after the other, so that sums
are added up in one order.

Preferred to threads inside each operation (torch.set_num_threads): those change the order of
sums, gain no more at this size, and spin while another program has the core. Left out: sampling,
whose steps are too small to share; double backward.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_pool: ThreadPoolExecutor | None = None


def available() -> int:
    """Cores that this process may run on."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def use(count: int) -> None:
    """From now on, `count` chunks at a time, each operation on one thread.

    Raises ValueError if count < 1.
    """
    global _pool
    if count < 1:
        raise ValueError(f"cannot compute on {count} cores; give at least 1")
    torch.set_num_threads(1)
    _keep_memory()
    one = {"initializer": torch.set_num_threads, "initargs": (1,)}
    _pool = ThreadPoolExecutor(count, "minirlhf-core", **one) if count > 1 else None


def _keep_memory() -> None:
    """Tell glibc to keep freed blocks: giving them back to the system, and asking for them anew a
    moment later, costs page faults; a twentieth of a PPO step, and half of one where the process
    was started to give everything back, as dask starts its workers."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            for option, size in ((-1, 1 << 28), (-3, 1 << 25)):  # M_TRIM_, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(option, size)


def in_chunks(
    function: Callable[..., Tensor], parts: Sequence[tuple[Tensor, ...]], parameters: list[Tensor]
) -> Tensor:
    """torch.cat([function(*part) for part in parts]), on as many cores as `use` was told.

    Gradients reach `parameters`, and nothing else that `function` may read.
    """
    submit = _now if _pool is None else _pool.submit
    inference, learns = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    learners = [p for p in parameters if p.requires_grad] if learns else []

    def forward(part: tuple[Tensor, ...]) -> Tensor:  # a thread has grad modes of its own
        with torch.inference_mode(inference), torch.set_grad_enabled(bool(learners)):
            return function(*part)

    # the last ones first: chunks come by length, and a long one begun last is waited for
    started = [submit(forward, part) for part in reversed(parts)]
    found = [task.result() for task in reversed(started)]
    if not learners:
        return torch.cat(found)
    walks: list[Future] = []
    nodes = [_Chunk.apply(i, x.detach(), walks, *learners) for i, x in enumerate(found)]
    return _Gate.apply(submit, found, learners, walks, *nodes)  # type: ignore[return-value]


def _now(function: Callable[..., Any], *given: Any) -> Future:
    """As an executor's submit, with the work done before it returns: one core's pool."""
    done: Future = Future()
    done.set_result(function(*given))
    return done


def pick_device(name: str) -> str:
    """cpu, cuda or mps; `auto` takes the fastest there is. Raises ValueError if it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    there["mps"] = torch.backends.mps.is_available()
    if name == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if there[d])
    if not there.get(name, False):
        have = ", ".join(d for d, ok in there.items() if ok)
        raise ValueError(f"--device {name} is not available here; use auto or one of: {have}")
    return name


class _Chunk(torch.autograd.Function):
    """One chunk, as the main graph sees it: out of the parameters, into the gate."""

    @staticmethod
    def forward(ctx: Any, number: int, x: Tensor, walks: list[Future], *learners: Tensor) -> Tensor:
        ctx.number, ctx.walks = number, walks
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return (None, None, None, *ctx.walks[ctx.number].result())


class _Gate(torch.autograd.Function):
    """The chunks' states, end to end; backward it sets the workers off, last chunk first."""

    @staticmethod
    def forward(
        ctx: Any,
        submit: Callable[..., Future],
        found: list[Tensor],
        learners: list[Tensor],
        walks: list[Future],
        *nodes: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*found)  # let go with the main graph, unless that is retained
        ctx.submit, ctx.learners, ctx.walks = submit, learners, walks
        return torch.cat(nodes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        found = ctx.saved_tensors
        grads = grad.split([len(x) for x in found])

        def walk(i: int) -> tuple[Tensor, ...]:
            asked = {"retain_graph": True, "allow_unused": True}
            return torch.autograd.grad(found[i], ctx.learners, grads[i], **asked)

        started = {i: ctx.submit(walk, i) for i in reversed(range(len(found)))}
        ctx.walks[:] = [started[i] for i in range(len(found))]
        return (None, None, None, None, *grads)
