"""A compiled program: the lowered graph and the ranks that run it together."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dmt_compile import torch_internals
from dmt_compile.ir import gradient_ops, id_ops
from dmt_compile.ir.ops import OPERATORS
from dmt_compile.pipeline import PipelineReport
from dmt_compile.runtime.front import Coming, Front
from dmt_compile.runtime.regions import DenseRegion
from dmt_compile.runtime.world import Execution, ProcessWorld, executing

if TYPE_CHECKING:
    from dmt_compile.runtime.prefetch import Ahead


class Program:
    """Runs a lowered graph on this rank; one process where ``world`` is ``None``.

    Args:
        gm: the lowered graph; Dynamo's own, from which inputs go that nothing reads.
        report: what the passes did.
        world: the ranks, or ``None``.
        checksum: a number that must be equal on every rank at this step, or 0.
        buffers: buffers that the graph does not hold; overwritten with rank 0's in each call.
        limit_s: call number, from 1 -> seconds to wait for the other ranks in that call.
        ahead: how a batch's ids can be distributed before its call; ``None`` for one process.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        report: PipelineReport,
        world: ProcessWorld | None,
        checksum: Callable[[], int] = lambda: 0,
        buffers: Sequence[torch.Tensor] = (),
        limit_s: Callable[[int], float] = lambda call: 60.0,
        ahead: Ahead | None = None,
    ) -> None:
        torch_internals.drop_unused_sizes(gm)
        self.gm = gm
        self.report = report
        self.world = world
        self.buffers = buffers
        self.limit_s = limit_s
        self.ahead = ahead
        self.front: Front | str | None = None  # cut when a loader is prefetched first
        self.coming: list[Coming] = []
        self.fingerprint = 0 if world is None else fingerprint(gm)
        self._execution = None if world is None else Execution(world, self.fingerprint, checksum, self._agreed)
        called = {node.target for node in gm.graph.nodes if node.op == "call_function"}
        collective = any(target in OPERATORS and OPERATORS[target].collective for target in called)
        averagings: Any = gm.graph.find_nodes(op="call_function", target=gradient_ops.averaging)
        self._trains = any(node.args[0].tower < 0 for node in averagings)  # and settles what it trains, late
        self._without_header = collective and id_ops.exchange_headers not in called
        self._calls = 0
        self._broadcast_in = 0  # the call that sent the buffers last

    def __call__(self, *args: Any) -> Any:
        if self._execution is None or self.world is None:
            return self.gm(*args)
        self._calls += 1
        self.world.step += 1
        self.world.limit_s = self.limit_s(self._calls)
        for observer in _observers:
            observer(self, args)
        self.world.settle(self._trains)
        with executing(self._execution):
            if self._without_header:
                id_ops.exchange_headers(id_ops.plain_header(), (), ())
            run, given = self._rest(args)
            out = run(*given)
        self.world.run_later()
        return out

    def next_limit_s(self) -> float:
        """Return how long the next call waits for the other ranks."""
        return self.limit_s(self._calls + 1)

    def _rest(self, args: tuple[Any, ...]) -> tuple[fx.GraphModule, tuple[Any, ...]]:
        """Return the graph to run and its arguments: that without the front where the batch was sent off before."""
        assert self.world is not None
        for coming in self.coming:
            if coming.fits(args):
                self.coming.remove(coming)
                start = time.perf_counter()
                given = coming.begin().result()
                self.world.waited_s["ids", "forward"] += time.perf_counter() - start
                self._agreed()
                return coming.front.rest, (*args, *given)
        return self.gm, args

    def _agreed(self) -> None:
        """Every rank runs this program now."""
        assert self.world is not None
        for buffer in self.buffers if self._calls != self._broadcast_in else ():
            self.world.broadcast(buffer.data, "buffers outside the graph")
        self._broadcast_in = self._calls


def fingerprint(gm: fx.GraphModule) -> int:
    """Return a 62-bit hash of what a program computes and exchanges; equal on ranks that may run together."""
    numbers: dict[fx.Node, int] = {}
    digest = hashlib.sha256()
    for node in gm.graph.nodes:
        index = numbers[node] = len(numbers)
        target = node.target if isinstance(node.target, str) and node.op != "placeholder" else ""
        if node.op == "call_function":
            target = getattr(node.target, "__name__", type(node.target).__name__)
        kwargs = {name: value for name, value in node.kwargs.items() if name != "kernel"}  # each rank chooses its own
        text = _text((node.args, kwargs), numbers)
        shape = _static_shape(node.meta.get("val")) if node.op == "placeholder" else ""
        digest.update(f"{index} {node.op} {target} {text} {shape}\n".encode())
        region = attrgetter(str(node.target))(gm) if node.op in ("call_module", "get_attr") else None
        if isinstance(region, DenseRegion):
            digest.update(str(fingerprint(region.graph_module)).encode())
    return int.from_bytes(digest.digest()[:8], "big") >> 2


def _static_shape(value: Any) -> str:
    """Return a tensor's type and shape, without the sizes that differ between steps."""
    if not isinstance(value, torch.Tensor):
        return ""
    return f"{value.dtype} {[size if isinstance(size, int) else -1 for size in value.shape]}"


def _text(value: Any, numbers: dict[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    if isinstance(value, tuple | list):
        return "(" + ",".join(_text(item, numbers) for item in value) + ")"
    if isinstance(value, dict):
        return _text(sorted(value.items()), numbers)
    return repr(value) if isinstance(value, str | int | float | bool | None) else str(value)


_observers: list[Callable[[Program, tuple[Any, ...]], None]] = []


@contextmanager
def observing(observer: Callable[[Program, tuple[Any, ...]], None]) -> Iterator[None]:
    """Tell ``observer`` of every call of a program of several ranks."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
