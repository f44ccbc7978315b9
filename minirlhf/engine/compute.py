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
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_pool: ThreadPoolExecutor | None = None


def use(count: int) -> None:
    """From now on, `count` chunks at a time, each operation on one thread.

    Raises ValueError if count < 1.
    """
    global _pool
    if count < 1:
        raise ValueError(f"cannot compute on {count} cores; give at least 1")
    torch.set_num_threads(1)
    _keep_memory()
    if count == 1:
        _pool = None
        return
    # what was set above holds for this thread alone
    _pool = ThreadPoolExecutor(
        count, "minirlhf-core", initializer=torch.set_num_threads, initargs=(1,)
    )


def _keep_memory() -> None:
    """Tell glibc to keep freed blocks for the next step instead of giving them to the system."""
    # Measured on two cores: page faults of blocks that were given back and asked for anew cost 5 %
    # of a PPO step, and half of one where a process was started to give everything back, as dask
    # starts its workers.
    if sys.platform == "linux":
        trim_threshold = -1  # both of malloc.h
        mmap_threshold = -3
        with suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(trim_threshold, 256 << 20)  # bytes
            libc.mallopt(mmap_threshold, 32 << 20)


def in_chunks(
    function: Callable[..., Tensor], parts: Sequence[tuple[Tensor, ...]], parameters: list[Tensor]
) -> Tensor:
    """torch.cat([function(*part) for part in parts]), on as many cores as `use` was told.

    Gradients reach `parameters`, and nothing else that `function` may read.
    """
    submit = _now if _pool is None else _pool.submit
    inference = torch.is_inference_mode_enabled()
    learners: list[Tensor] = []
    if torch.is_grad_enabled():
        learners = [p for p in parameters if p.requires_grad]

    def forward(part: tuple[Tensor, ...]) -> Tensor:
        # a thread has grad modes of its own: it is told those of who asks
        with torch.inference_mode(inference), torch.set_grad_enabled(bool(learners)):
            return function(*part)

    # the last ones first: chunks come by length, and a long one begun last is waited for
    started = [submit(forward, part) for part in reversed(parts)]
    found = [task.result() for task in reversed(started)]
    if not learners:
        return torch.cat(found)
    # cut from its own graph, each chunk stands in the main one as a node; backward, the gate puts
    # a walk of every chunk's graph into `walks`, where the nodes find them
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
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.append("mps")
    if torch.cuda.is_available():
        there.append("cuda")
    if name == "auto":
        return there[-1]
    if name not in there:
        have = ", ".join(there)
        raise ValueError(f"--device {name} is not available here; use auto or one of: {have}")
    return name


class _Chunk(torch.autograd.Function):
    """One chunk, as the main graph sees it: out of the parameters, into the gate."""

    @staticmethod
    def forward(ctx: Any, number: int, x: Tensor, walks: list[Future], *learners: Tensor) -> Tensor:
        ctx.number = number
        ctx.walks = walks
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        # nothing for number, x and walks: the gradient of x has gone into the chunk's own graph
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
        ctx.submit = submit
        ctx.learners = learners
        ctx.walks = walks
        return torch.cat(nodes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        found = ctx.saved_tensors
        grads = grad.split([len(x) for x in found])

        def walk(i: int) -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                found[i], ctx.learners, grads[i], retain_graph=True, allow_unused=True
            )

        started = [ctx.submit(walk, i) for i in reversed(range(len(found)))]
        ctx.walks[:] = reversed(started)
        return (None, None, None, None, *grads)
