"""What ranks do in the tests of dense gradients; each function runs in every rank."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any, cast
from unittest import mock

import torch

from dmt_compile import SimulatedWorld, Topology, pipeline
from dmt_compile.ir import gradient_ops
from dmt_compile.passes.sync_dense_gradients import SyncDenseGradients
from dmt_compile.runtime import averaging
from dmt_compile.runtime.averaging import Averaging, Reduction
from dmt_compile.runtime.regions import DenseRegion
from dmt_compile.runtime.simulated_gradients import average as average_bucket
from dmt_compile.runtime.world import Execution, Pending, ProcessWorld, executing
from tests.distributed.scenarios import compiled
from tests.models import DLRM, make_batch, with_two_top_buckets

# Elements of the parameters of each bucket, and the buckets' types: nothing divides by 4 ranks, one bucket is empty.
BUCKETS = ([(3, 5), (7,)], [(0,)], [(1,)], [(2, 9), (), (6,)])
TYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
Leaves = list[list[torch.Tensor]]  # by bucket


def average(by_rank: Sequence[Leaves], topology: Topology, reduction: Reduction) -> Leaves:
    """Return what all ranks must get."""
    return [average_bucket(bucket, topology, reduction) for bucket in zip(*by_rank, strict=True)]


def parameters() -> Leaves:
    return [
        [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        for shapes, dtype in zip(BUCKETS, TYPES, strict=True)
    ]


def gradients(rank: int, scale: float = 1.0) -> Leaves:
    generator = torch.Generator().manual_seed(rank)
    return [
        [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
        for shapes, dtype in zip(BUCKETS, TYPES, strict=True)
    ]


def read(world: ProcessWorld, leaves: Leaves, reduction: Reduction, order: Sequence[int]) -> list[Sequence[Any]]:
    """Return the buckets of parameters as a program gives them to its regions, first read in ``order``."""
    with executing(Execution(world)):
        way = gradient_ops.averaging(reduction)
        waited = gradient_ops.wait_gradients([leaf for bucket in leaves for leaf in bucket], way)
        started = {bucket: gradient_ops.start_gradients(waited, way, bucket) for bucket in order}
    return [started[bucket] for bucket in range(len(leaves))]


def loss(buckets: Sequence[Sequence[torch.Tensor]], weights: Leaves, without: Sequence[int] = ()) -> torch.Tensor:
    """Return a loss whose gradients are ``weights``."""
    pairs = [zip(*both, strict=True) for i, both in enumerate(zip(buckets, weights, strict=True)) if i not in without]
    return torch.stack([(leaf * weight).double().sum() for leaf, weight in itertools.chain(*pairs)]).sum()


def wire_of(wire_dtype: str | None, hosts: int = 2, tower: int = -1, hierarchical: bool = True) -> Reduction:
    return Reduction(tower, hosts, hierarchical, wire_dtype, tuple(map(len, BUCKETS)))


def sums(rank: int, topology: str, reduction: Reduction) -> dict[str, Any]:
    """Average gradients; return whether they are those of the simulated ranks, the first of them and the bytes sent."""
    shape = Topology.parse(topology)
    towers = 1 if reduction.tower < 0 else shape.hosts // reduction.hosts
    world = ProcessWorld(shape, shape.grouped(shape.hosts // towers), 30.0)
    if reduction.tower >= 0:
        reduction = reduction._replace(tower=shape.host_of(rank) // reduction.hosts)
    leaves = parameters()
    buckets = read(world, leaves, reduction, range(len(leaves)))
    loss(buckets, gradients(rank)).backward()
    expected = average([gradients(r) for r in reduction.members(shape)], shape, reduction)
    pairs = list(zip(itertools.chain(*leaves), itertools.chain(*expected), strict=True))
    same = all(torch.equal(cast(torch.Tensor, leaf.grad), theirs) for leaf, theirs in pairs)
    return {"same": same, "first": cast(torch.Tensor, leaves[0][0].grad).tolist(), "sent": dict(world.ledger.records)}


def broken(rank: int) -> dict[str, bool]:
    """Break the reduction in each of its steps, and tell whether the sums are right still."""
    add_up, gather = averaging.add_up, ProcessWorld.start_gather

    def turned(self: ProcessWorld, part: torch.Tensor, label: str, group: str) -> Pending:
        gathered = gather(self, part, label, group).wait()
        return Pending(torch.cat(gathered.chunk(2)[::-1]))

    breaks: dict[str, tuple[Any, str, Any]] = {
        "one part of each sum": (averaging, "add_up", lambda parts: add_up(parts[:1])),
        "sums in their own type": (averaging, "add_up", lambda parts: add_up([p.bfloat16() for p in parts])),
        "parts gathered in another order": (ProcessWorld, "start_gather", turned),
        "nothing leaves": (Averaging, "_leave", lambda self, world, flat: Pending(flat)),
        "nothing rounded between hosts": (Reduction, "wire", lambda self, dtype: dtype),
    }
    said = {"nothing": sums(rank, "2x2", wire_of("bfloat16"))["same"]}
    for what, (owner, name, wrong) in breaks.items():
        with mock.patch.object(owner, name, wrong):
            world = ProcessWorld(Topology(2, 2), Topology(2, 2), 30.0)
            leaves = parameters()
            loss(read(world, leaves, wire_of("bfloat16"), range(len(leaves))), gradients(rank)).backward()
        expected = average([gradients(r) for r in range(4)], world.topology, wire_of("bfloat16"))
        pairs = zip(itertools.chain(*leaves), itertools.chain(*expected), strict=True)
        said[what] = all(torch.equal(cast(torch.Tensor, leaf.grad), theirs) for leaf, theirs in pairs)
    return said


def passes(rank: int, hierarchical: bool) -> dict[str, bool]:
    """Go backward in every way that users do, and tell for each whether the gradients are the averages."""
    world = ProcessWorld(Topology(2, 2), Topology(2, 2), 30.0)
    reduction = wire_of(None, hierarchical=hierarchical)
    said = {}

    def equal(leaves: Leaves, *given: list[Leaves]) -> bool:
        """Tell whether each gradient is the sum of what passes gave, each averaged over its ranks."""
        expected = [average(ranks, world.topology, reduction) for ranks in given]
        for b, bucket in enumerate(leaves):
            for p, leaf in enumerate(bucket):
                total = sum(e[b][p].double() for e in expected)
                assert leaf.grad is not None
                limit = 4 * torch.finfo(leaf.dtype).eps * (1 + float(total.abs().max()) if total.numel() else 1)
                if not torch.allclose(leaf.grad.double(), total, rtol=0, atol=limit):
                    return False
        return True

    one, two = ([gradients(r, scale) for r in range(4)] for scale in (1.0, -3.0))
    order = range(len(BUCKETS))

    leaves = parameters()
    output = loss(read(world, leaves, reduction, order), one[rank])
    output.backward(retain_graph=True)
    output.backward()
    said["a retained graph twice"] = equal(leaves, one, one)

    leaves = parameters()
    for given in (one, two):
        loss(read(world, leaves, reduction, order), given[rank]).backward()
    said["accumulation over two forward passes"] = equal(leaves, one, two)

    leaves = parameters()
    losses = [loss(read(world, leaves, reduction, order), given[rank]) for given in (one, two)]
    sum(losses).backward()
    said["two forward passes, one backward"] = equal(leaves, one, two)

    leaves = parameters()
    turned = order if rank % 2 else order[::-1]
    loss(read(world, leaves, reduction, turned), one[rank]).backward()
    said["ready in another order on other ranks"] = equal(leaves, one)

    leaves = parameters()
    zeros = [[torch.zeros_like(g) for g in bucket] for bucket in one[0]]
    without = [[0, 2], [], [3], []][rank]
    loss(read(world, leaves, reduction, order), one[rank], without).backward()
    partly = [[zeros[b] if b in [[0, 2], [], [3], []][r] else one[r][b] for b in order] for r in range(4)]
    said["no gradient of some buckets on some ranks"] = equal(leaves, partly)

    leaves = parameters()
    buckets = read(world, leaves, reduction, order)
    (buckets[0][0] * one[rank][0][0]).sum().backward()
    single = [[[zeros[0][0] + one[r][0][0], zeros[0][1]], *zeros[1:]] for r in range(4)]
    said["one parameter of a bucket"] = equal(leaves, single)

    leaves = parameters()
    output = loss(read(world, leaves, reduction, order), one[rank])
    (alone,) = torch.autograd.grad(output, [leaves[3][0]])
    leaves[3][0].grad = alone
    for leaf in itertools.chain(*leaves):
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    of_one = [[*zeros[:3], [one[r][3][0], *zeros[3][1:]]] for r in range(4)]
    said["torch.autograd.grad of one parameter"] = equal(leaves, of_one)

    leaves = parameters()
    output = loss(read(world, leaves, reduction, order), one[rank])

    def refuse(gradient: torch.Tensor) -> None:
        raise ValueError("a hook of the user's own")

    hook = leaves[0][0].register_hook(refuse)
    try:
        output.backward(retain_graph=True)
    except ValueError:
        hook.remove()
        for leaf in itertools.chain(*leaves):
            leaf.grad = None
        output.backward()
        said["again after a pass that broke off on all ranks"] = equal(leaves, one)
    return said


def absent(rank: int, hierarchical: bool) -> str:
    """Rank 3 stays away from a backward pass; the others hear of it, and again when they try on."""
    world = ProcessWorld(Topology(2, 2), Topology(2, 2), 2.0)
    leaves = parameters()
    output = loss(read(world, leaves, wire_of(None, hierarchical=hierarchical), range(len(leaves))), gradients(rank))
    if rank != 3:
        output.backward()
    time.sleep(6)
    return "stayed away"


def low_precision(rank: int, wire_dtype: str) -> dict[str, Any]:
    """Train with gradients of low precision between hosts; return dense gradients and weights, real and simulated."""
    with mock.patch.object(
        pipeline, "SyncDenseGradients", functools.partial(SyncDenseGradients, wire_dtype=wire_dtype)
    ):
        torch.manual_seed(0)
        model, other = DLRM(), DLRM()
        other.load_state_dict(model.state_dict())
        step_model = compiled(model, topology="2x2")
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, other)]
        simulated = SimulatedWorld("2x2")
        generator = torch.Generator().manual_seed(5)
        same = True
        worst = 0.0
        for sizes in ([4, 3, 2, 5], [0, 3, 1, 1], [2, 0, 0, 1]):
            batches = [make_batch(model, size, generator) for size in sizes]
            step_model(*batches[rank]).square().sum().backward()
            sum(o.square().sum() for o in simulated.run(other, batches, dense_compiler="eager")).backward()
            for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
                if not name.startswith("emb."):
                    assert mine.grad is not None
                    same = same and torch.equal(mine.grad, theirs.grad)
                    worst = max(worst, float((mine.grad - theirs.grad).abs().max()) / float(theirs.grad.abs().max()))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    weights = [p.detach().numpy().tobytes() for name, p in model.named_parameters() if not name.startswith("emb.")]
    return {"same": same, "worst": worst, "weights": weights}


def order_of_a_backward_pass(rank: int, dense_compiler: str) -> list[str]:
    """Return what a training step starts and waits for in its backward pass, and when regions go back, in order."""
    events: list[str] = []
    exchange, start, finish = ProcessWorld.start_all_to_all, Averaging.start, Averaging.finish
    run = DenseRegion.forward

    def exchanging(self: Any, *args: Any) -> Any:
        events.append(f"{args[4]} {args[5]}")
        return exchange(self, *args)

    def starting(self: Any, bucket: int, given: Any) -> None:
        events.append(f"bucket {bucket} leaves")
        start(self, bucket, given)

    def finishing(self: Any, nodes: Any) -> Any:
        events.append("all are waited for")
        return finish(self, nodes)

    def running(self: Any, *args: Any) -> Any:
        outputs = run(self, *args)
        region = type(self.graph_module).__name__
        activations = [value for value in outputs if isinstance(value, torch.Tensor)]
        activations[-1].register_hook(lambda _: events.append(f"{region} goes back"))
        return outputs

    torch.manual_seed(0)
    model = with_two_top_buckets(DLRM())
    step_model = compiled(model, topology="2x2", dense_compiler=dense_compiler)
    with mock.patch.object(DenseRegion, "forward", running):
        output = step_model(*make_batch(model, 3, torch.Generator().manual_seed(rank)))
    with (
        mock.patch.object(ProcessWorld, "start_all_to_all", exchanging),
        mock.patch.object(Averaging, "start", starting),
        mock.patch.object(Averaging, "finish", finishing),
    ):
        output.sum().backward()
    return events
