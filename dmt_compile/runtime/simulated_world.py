"""Every rank of a topology in one process, in lock-step: the same program, a ledger of what crossed each link."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from dmt_compile import torch_internals
from dmt_compile.backend import compile_graph
from dmt_compile.capture import Capture
from dmt_compile.config import Options
from dmt_compile.errors import CollectiveError, ConfigError
from dmt_compile.inspection.dumps import GraphDump
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, id_ops
from dmt_compile.ir.ops import OPERATORS
from dmt_compile.ir.stages import Stage
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.runtime import simulated_gradients
from dmt_compile.runtime.ledger import Ledger
from dmt_compile.runtime.program import fingerprint
from dmt_compile.runtime.route import Route
from dmt_compile.runtime.session import Passes, Session, attach_towers, guard_towers, next_dump, plan_for
from dmt_compile.runtime.transfer import decode, encode, wire_sizes
from dmt_compile.runtime.world import Execution, executing
from dmt_compile.topology import Topology


class SimulatedWorld:
    """A cluster in this process.

    Args:
        topology: ``"<hosts>x<local ranks>"`` or a :class:`Topology`.

    Attributes:
        ledger: bytes that crossed each link since it was made or cleared, by collective.

    Example:
        >>> world = SimulatedWorld("2x2")
        >>> outputs = world.run(model, [batch0, batch1, batch2, batch3])
        >>> sum(loss(o, y) for o, y in zip(outputs, labels)).backward()  # the program applies 1 / ranks
        >>> world.ledger.bytes_per_link()

    Dense parameters that no compiled graph holds (code under ``torch._dynamo.disable``) get the sum of the ranks'
    gradients here, not their mean: real ranks average those by hooks, which here would also change eager steps.
    """

    def __init__(self, topology: str | Topology) -> None:
        self.topology = Topology.parse(topology)
        self.ledger = Ledger()
        self._compiled: weakref.WeakKeyDictionary[nn.Module, dict[str, Callable[..., Any]]] = (
            weakref.WeakKeyDictionary()
        )
        self._replay: _Replay | None = None

    def run(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        kwargs: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[Any]:
        """Run the model once on every rank and return the outputs, one a rank.

        Args:
            model: flat; its tables stay whole, each rank reads those the plan gives it.
            batches: one local batch a rank: a tuple is positional arguments, anything else the one argument.
            kwargs: keyword arguments, one mapping a rank.
            options: as for ``torch.compile(..., options=...)``.

        Raises:
            ConfigError: another number of batches than ranks, or a bad option.
            DmtError: what a real rank would raise.
        """
        ranks = self.topology.world_size
        keywords = [{}] * ranks if kwargs is None else list(kwargs)
        if len(batches) != ranks or len(keywords) != ranks:
            raise ConfigError(
                f"simulated world: expected one batch for each of {ranks} ranks, found {len(batches)}; pass an empty "
                "batch for a rank without data"
            )
        positional = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
        compiled = self._compile(model, {"topology": self.topology, **options})
        finished: list[list[Any]] = []
        with torch_internals.unlimited_recompiles():
            while True:
                calls: list[_ProgramCall] = []
                outputs: list[Any] = []
                for rank in range(ranks):
                    self._replay = _Replay([outs[rank] for outs in finished])
                    try:
                        outputs.append(compiled(*positional[rank], **keywords[rank]))
                    except _ProgramCall as call:
                        calls.append(call)
                if not calls:
                    return outputs
                if len(calls) != ranks or len({call.program.fingerprint for call in calls}) > 1:
                    raise CollectiveError(
                        "simulated world: expected the same program on every rank, found several; give every rank the "
                        "same kind of batch"
                    )
                finished.append(calls[0].program.run([call.args_ for call in calls]))

    def _compile(self, model: nn.Module, options: Mapping[str, Any]) -> Callable[..., Any]:
        by_options = self._compiled.setdefault(model, {})
        key = repr(sorted((name, repr(value)) for name, value in options.items()))
        if key not in by_options:
            session = _SimulatedSession(self, Options.from_mapping(options))
            by_options[key] = torch.compile(model, backend=session.backend)
        return by_options[key]

    def take(self, program: _LockstepProgram, args: tuple[Any, ...]) -> Any:
        """Answer a rank's call of a program: with its outputs, or by stopping the rank until all have come."""
        assert self._replay is not None
        if self._replay.outputs:
            return self._replay.outputs.pop(0)
        raise _ProgramCall(program, args)


class _Replay:
    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs


class _ProgramCall(BaseException):
    """Unwinds a rank's model at its next program; caught by :meth:`SimulatedWorld.run` alone."""

    def __init__(self, program: _LockstepProgram, args: tuple[Any, ...]) -> None:
        super().__init__("a simulated rank waits for the others")
        self.program = program
        self.args_ = args


class _SimulatedSession(Session):
    """Plans for the simulated topology; shards nothing."""

    def __init__(self, world: SimulatedWorld, options: Options) -> None:
        self.world = world
        self.options = options
        self.topology = world.topology
        self._plans: dict[tuple[str, ...], TowerPlan] = {}

    def backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph for all ranks."""
        return compile_graph(gm, self.options, self)

    def prepare(self, capture: Capture, run: Passes) -> None:
        """Attach Tower Modules."""
        attach_towers(self.options, capture, run)

    def choose_plan(self, tables: tuple[TableSpec, ...], capture: Capture) -> TowerPlan:
        """Plan once for each set of tables."""
        key = tuple(table.name for table in tables)
        if key not in self._plans:
            self._plans[key] = plan_for(self.options, self.topology, tables, capture)
        return self._plans[key]

    def program(self, capture: Capture, run: Passes) -> Callable[..., Any]:
        """Lower the graph; the result runs when all ranks have called it."""
        guard_towers(run(Stage.LOWERED)[0])
        program = _LockstepProgram(capture.gm, self.world)
        return lambda *args: self.world.take(program, args)

    def dump(self) -> GraphDump | None:
        """Dump into the user's folder."""
        return next_dump(self.options.dump_dir)


class _SimulatedRank:
    """What an operator may ask of its rank; collectives are done for all ranks at once."""

    def __init__(self, topology: Topology, rank: int, ledger: Ledger) -> None:
        self.topology = topology
        self.rank = rank
        self.ledger = ledger
        self.device = torch.device("cpu")


class _LockstepProgram:
    """Runs a lowered graph node by node, each on every rank."""

    def __init__(self, gm: fx.GraphModule, world: SimulatedWorld) -> None:
        self.gm = gm
        self.topology = world.topology
        self.ledger = world.ledger
        self.fingerprint = fingerprint(gm)
        self._executions = [
            Execution(_SimulatedRank(self.topology, rank, self.ledger), self.fingerprint)  # type: ignore[arg-type]
            for rank in range(self.topology.world_size)
        ]

    def run(self, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return the outputs of every rank for the arguments of every rank."""
        values: list[dict[fx.Node, Any]] = [{} for _ in args]
        inputs = [iter(rank_args) for rank_args in args]
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                results = [next(rank_inputs) for rank_inputs in inputs]
            else:
                given = [fx.map_arg((node.args, node.kwargs), v.__getitem__) for v in values]
                if node.op == "output":
                    return [rank_args[0] for rank_args, _ in given]
                operator = OPERATORS.get(node.target) if node.op == "call_function" else None
                if operator is not None and operator.collective:
                    results = self._collective(node.target, [rank_args for rank_args, _ in given], node.kwargs)
                else:
                    results = [self._call(node, *g, e) for g, e in zip(given, self._executions, strict=True)]
            for rank_values, result in zip(values, results, strict=True):
                rank_values[node] = result
        raise AssertionError("a graph ends in its output")

    def _call(self, node: fx.Node, args: Any, kwargs: Any, execution: Execution) -> Any:
        if node.op == "get_attr":
            return attrgetter(str(node.target))(self.gm)
        if node.op == "call_module":
            return self.gm.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        with executing(execution):
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _collective(self, target: Any, args: list[tuple[Any, ...]], how: Mapping[str, Any]) -> list[Any]:
        if target is id_ops.exchange_headers:
            return self._headers(args)
        if target is ex.start_all_to_all:
            tensors, routes = zip(*(rank_args[:2] for rank_args in args), strict=True)
            _, _, hop, group, *forms = args[0]
            sent = tensors[0].dtype
            dtypes = how.get("dtype") or sent, sent
            transfer = _Transfer(self.topology, routes, group, hop, forms, dtypes, self.ledger)
            received = _AllToAll.apply(transfer, *(tensor.reshape(-1) for tensor in tensors))  # type: ignore[no-untyped-call]
            return [ex.InFlight(tensor, None) for tensor in received]
        if target is ex.wait_all_to_all:
            return [rank_args[0].stand_in for rank_args in args]
        if target is gradient_ops.wait_gradients:
            return [simulated_gradients.wait_gradients(*rank_args) for rank_args in args]
        if target is gradient_ops.start_gradients:
            return list(simulated_gradients.start_gradients(args, self.topology, self.ledger))
        return [rank_args[0] for rank_args in args]  # broadcast_buffers: the ranks share one model

    def _headers(self, args: list[tuple[Any, ...]]) -> list[torch.Tensor]:
        sent = [rank_args[0] for rank_args in args]
        received = [torch.stack([header[rank] for header in sent]) for rank in range(len(sent))]
        for source in range(len(sent)):
            for target, row in enumerate(sent[source]):
                self.ledger.add("exchange_headers", "forward", self.topology, source, target, row.nbytes)
        id_ops.check_headers(received[0], *args[0][1:])
        return received


class _Transfer:
    """One all-to-all of all groups: which blocks each rank sends to each member of its group, in which form."""

    def __init__(
        self, topology: Topology, routes: Sequence[Route], group: str, hop: str, forms: Sequence[str],
        dtypes: tuple[torch.dtype, torch.dtype], ledger: Ledger,
    ) -> None:  # fmt: skip
        ranks = range(topology.world_size)
        grouped = routes[0].layout.topology
        members = {
            "world": lambda r: tuple(ranks),
            "intra": grouped.intra_ranks,
            "peer": grouped.peer_ranks,
            "host": topology.intra_ranks,
            "across": topology.peer_ranks,
        }[group]
        self.members = [members(rank) for rank in ranks]
        self.blocks = [route.blocks(hop) for route in routes]
        self.topology, self.hop, self.forms, self.dtypes, self.ledger = topology, hop, forms, dtypes, ledger

    def move(self, tensors: Sequence[torch.Tensor], backward: bool = False) -> list[torch.Tensor]:
        """Return what each rank receives, in the order of its group."""
        form, direction = self.forms[backward], "backward" if backward else "forward"
        sent = [blocks[backward] for blocks in self.blocks]
        wires = [encode(tensor, blocks, form) for tensor, blocks in zip(tensors, sent, strict=True)]
        parts = [wire.split(wire_sizes(blocks, form)) for wire, blocks in zip(wires, sent, strict=True)]
        for source, members in enumerate(self.members):
            for target, part in zip(members, parts[source], strict=True):
                self.ledger.add(self.hop, direction, self.topology, source, target, part.nbytes)
        out = []
        for rank, members in enumerate(self.members):
            wire = torch.cat([parts[source][self.members[source].index(rank)] for source in members])
            out.append(decode(wire, self.blocks[rank][not backward], form, self.dtypes[backward]))
        return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: _Transfer, *tensors: torch.Tensor) -> Any:
        ctx.transfer = transfer
        return tuple(transfer.move(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *ctx.transfer.move([grad.contiguous() for grad in grads], backward=True)
