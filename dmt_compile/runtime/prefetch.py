"""Distributes the ids of the next batch while a step computes on this one.

A thread of its own runs the program's front (``front.py``); tags tell its messages from those of the step. The step
then runs the rest of its program, with what the front returned.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn

from dmt_compile.runtime.front import Coming, Front, cut_front, version_of
from dmt_compile.runtime.program import Program, observing
from dmt_compile.runtime.session import compiled_model, world_size
from dmt_compile.runtime.world import Execution, ProcessWorld, executing

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
IN_FLIGHT = 2  # batches sent off: the one of the step that begins, and the one after


def prefetch(
    loader: Iterable[Item], compiled: nn.Module, *, batch_of: Callable[[Item], Any] = lambda item: item
) -> Iterator[Item]:
    """Yield what a loader yields, and bring each batch's ids to the tables' owners before its step.

    Args:
        loader: this rank's; those of all ranks yield as many batches.
        compiled: what ``torch.compile(model, backend="dmt")`` returned; call it with each batch as it was yielded.
        batch_of: returns what ``compiled`` is called with, of what the loader yields: a tuple is positional arguments,
            anything else the one argument.

    The numbers are those without it. A faulty batch raises when it is used, on every rank. Where ids cannot be
    distributed ahead, batches pass through and a line in the log says why.

    Raises:
        ConfigError: ``compiled`` is no compiled module.

    Cost: one batch more in memory. The first two steps show which program runs.
    """
    model = compiled_model(compiled, "prefetch")
    return iter(loader) if world_size() == 1 else _ahead(loader, _Ahead(model), batch_of)


def _ahead(loader: Iterable[Item], ahead: _Ahead, batch_of: Callable[[Item], Any]) -> Iterator[Item]:
    waiting: list[Item] = []
    with observing(ahead.note):
        for item in loader:
            ahead.distribute(batch_of(item))
            if waiting:
                yield waiting.pop()
            waiting.append(item)
        yield from waiting


class RanksAhead:
    """The ranks of a model as a program's front sees them, and the thread that runs it."""

    def __init__(self, world: ProcessWorld) -> None:
        self.world = world.ahead()
        self.thread = ThreadPoolExecutor(1, "dmt_prefetch")


@dataclass(frozen=True)
class Ahead:
    """What a program tells of its inputs, so that its ids can be distributed before its call.

    Args:
        sources: input of the batch -> where Dynamo found it among the arguments of ``forward``, as an expression of L.
        ranks: of the model, made at the first use.
        checksum: as of :class:`Program`.
    """

    sources: dict[str, str]
    ranks: Callable[[], RanksAhead]
    checksum: Callable[[], int]


@functools.cache
def _compiled(source: str) -> CodeType:
    return compile(source, "<graph input>", "eval")


class _Ahead:
    """Sends off the batches of one loader."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._signature = inspect.signature(model.forward)
        self._ran: list[tuple[Program, tuple[Any, ...]]] = []  # since the last batch
        self._said: set[str] = set()

    def note(self, program: Program, args: tuple[Any, ...]) -> None:
        """Remember a call of a program of this model."""
        if program.ahead is not None and self._of_this_model(args):
            self._ran.append((program, args))

    def _of_this_model(self, args: tuple[Any, ...]) -> bool:
        """Tell whether a program was given parameters of this model: others run too."""
        given = set(map(id, args))
        return any(id(parameter) in given for parameter in self.model.parameters())  # as a rule the first one

    def distribute(self, batch: Any) -> None:
        """Send off a batch's ids, in the way of the program that ran last."""
        ran, self._ran = self._ran, []
        if not ran:
            return
        reason = f"{len(ran)} programs run in a step" if len(ran) > 1 else self._send(*ran[0], batch)
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            logger.warning("prefetch: batches pass through as they are, since %s", reason)

    def _send(self, program: Program, last: tuple[Any, ...], batch: Any) -> str | None:
        """Return why a batch cannot be sent off."""
        ahead, world = program.ahead, program.world
        assert ahead is not None
        assert world is not None
        if world.device.type != "cpu":
            return "its collectives would share the device with those of the step"
        front = program.front
        if front is None:
            front = program.front = cut_front(program.gm, frozenset(ahead.sources))
        if isinstance(front, str):
            return front
        try:
            values = self._values(program, ahead, front, last, batch)
        except Exception as error:  # an expression of Dynamo's that forward's arguments do not answer
            return f"the batch does not hold an input of the graph ({error!r})"
        given = [(value, version_of(value)) for value in values]
        coming = Coming(front, given, self._beginning(program, ahead, front, values))
        program.coming = [*program.coming, coming][-IN_FLIGHT:]
        world.later(coming.begin)  # until this rank waits for others anyway, the step needs the processor
        return None

    def _values(self, program: Program, ahead: Ahead, front: Front, last: tuple[Any, ...], batch: Any) -> list[Any]:
        """Return the inputs of the front: those of the batch, and what the last call was given of others."""
        positional = batch if isinstance(batch, tuple) else (batch,)
        bound = self._signature.bind(*positional)
        bound.apply_defaults()
        found = []
        for position, name in zip(front.positions, front.names, strict=True):
            source = ahead.sources.get(name)
            found.append(last[position] if source is None else eval(_compiled(source), {}, {"L": bound.arguments}))
        return found

    def _beginning(
        self, program: Program, ahead: Ahead, front: Front, values: list[Any]
    ) -> Callable[[], Future[tuple[Any, ...]]]:
        """Return what has the front run, once."""
        checksum = ahead.checksum()  # here, between two steps: all ranks' replicas have seen as many
        ranks = ahead.ranks()
        ranks.world.limit_s = program.next_limit_s()
        execution = Execution(ranks.world, program.fingerprint, lambda: checksum)

        def run() -> tuple[Any, ...]:
            ranks.world.step += 1
            with torch.no_grad(), executing(execution):
                result: tuple[Any, ...] = front.first(*values)
                return result

        return functools.cache(lambda: ranks.thread.submit(run))
