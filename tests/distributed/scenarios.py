"""What ranks do in the distributed tests; each function runs in every rank."""

from __future__ import annotations

import copy
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

import dmt_compile
from dmt_compile import backend
from dmt_compile.optim import RowWiseAdagrad
from dmt_compile.runtime import in_backward
from dmt_compile.runtime.tables import ShardedTable
from tests.in_backward import attach
from tests.models import DLRM, MatrixAndWeights, Mixture, Projected, concatenate, dense_of, make_batch

# Simulated ranks verify the same programs after each pass; here four processes would.
OPTIONS = {"dense_compiler": "eager", "first_timeout_s": 60.0, "timeout_s": 10.0, "verify": False}
SIZES = ([4, 3, 2, 5], [1, 2, 3, 4], [0, 3, 1, 1], [5, 5, 5, 5], [2, 0, 0, 1])  # local batches of five steps


def compiled(model: nn.Module, **options: Any) -> Any:
    """Compile with the tests' options."""
    topology = f"2x{dist.get_world_size() // 2}" if dist.is_initialized() else "auto"
    return torch.compile(model, backend="dmt", options={**OPTIONS, "topology": topology, **options})


def optimizers(kind: str, model: DLRM) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a kind for all parameters."""
    everything = list(model.parameters())
    if kind == "sparse_adam":
        tables = list(model.emb.parameters())
        dense = [p for name, p in model.named_parameters() if not name.startswith("emb.")]
        return [torch.optim.SparseAdam(tables, lr=0.01), torch.optim.Adam(dense, lr=0.01)]
    makers = {
        "sgd": lambda: torch.optim.SGD(everything, 0.1),
        "momentum": lambda: torch.optim.SGD(everything, 0.1, momentum=0.9, weight_decay=0.01),
        "adagrad": lambda: torch.optim.Adagrad(everything, 0.1),
        "adam": lambda: torch.optim.Adam(everything, 0.01),
    }
    return [makers[kind]()]


def train(
    rank: int, kind: str, sparse: bool, topology: str, built_after: bool, clip: float | None, **options: Any
) -> dict[str, Any]:
    """Train five steps beside the flat model on the concatenated batch; return errors and memory on rank 0."""
    world = dist.get_world_size()
    torch.manual_seed(rank)  # rank 0's initial values must win
    model = DLRM(sparse=sparse)
    torch.manual_seed(0)
    flat = DLRM(sparse=sparse)
    step_model = compiled(model, topology=topology, **options)
    flat_optimizers = optimizers(kind, flat)
    own = [] if built_after else optimizers(kind, model)
    generator = torch.Generator().manual_seed(5)
    worst: dict[str, float] = {"output": 0.0, "gradient": 0.0, "norm": 0.0}
    for sizes in SIZES:
        batches = [make_batch(model, size, generator) for size in sizes[:world]]
        output = step_model(*batches[rank])
        own = own or optimizers(kind, model)
        expected = flat(*concatenate(batches))
        first = sum(sizes[:rank])
        worst["output"] = max(worst["output"], difference(output, expected[first : first + sizes[rank]]))
        (output.sum() / 4).backward()
        (expected.sum() / 4 / world).backward()
        for mine, theirs in zip(model.parameters(), flat.parameters(), strict=True):
            worst["gradient"] = max(worst["gradient"], gradient_difference(mine, theirs))
        if clip is not None:
            norm = dmt_compile.clip_grad_norm_(model.parameters(), clip)
            worst["norm"] = max(worst["norm"], difference(norm, clip_flat(flat, clip)))
        for optimizer in (*own, *flat_optimizers):
            optimizer.step()
            optimizer.zero_grad()
    state = dmt_compile.full_state_dict(step_model)
    assert (state == {}) == (rank != 0)
    result: dict[str, Any] = {**worst, "weights": 0.0}
    if rank == 0:
        expected_state = flat.state_dict()
        assert list(state) == list(expected_state)
        result["weights"] = max(difference(state[name], value) for name, value in expected_state.items())
        DLRM(sparse=sparse).load_state_dict(state)
    result["owned"] = [p.local.numel() for p in model.emb.parameters()]
    result["state"] = sum(
        value.local.numel()
        for optimizer in own
        for p in model.emb.parameters()
        for value in optimizer.state[p].values()
        if isinstance(value, ShardedTable)
    )
    return result


IN_BACKWARD: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "row_wise_adagrad": (RowWiseAdagrad, {"lr": 0.1}),
}


def train_in_backward(rank: int, kind: str, sparse: bool, attached_after: bool) -> dict[str, Any]:
    """Train with the tables' optimizers in the backward pass, where lookups step them; the flat model's are hooked."""
    world, done = dist.get_world_size(), 0
    step = in_backward.Reading.step

    def counted(reading: in_backward.Reading, *args: Any) -> None:
        nonlocal done
        done += 1
        step(reading, *args)

    in_backward.Reading.step = counted  # type: ignore[method-assign]
    torch.manual_seed(rank)  # rank 0's initial values must win
    model = DLRM(sparse=sparse)
    torch.manual_seed(0)
    flat = DLRM(sparse=sparse)
    optimizer, options = IN_BACKWARD[kind]
    attach(optimizer, flat.emb.parameters(), options)
    generator = torch.Generator().manual_seed(5)
    step_model = compiled(model)
    if attached_after:
        with torch.no_grad():
            step_model(*make_batch(model, 2, generator))
    attach(optimizer, model.emb.parameters(), options)
    worst = 0.0
    for sizes in SIZES:
        batches = [make_batch(model, size, generator) for size in sizes[:world]]
        output = step_model(*batches[rank])
        expected = flat(*concatenate(batches))
        first = sum(sizes[:rank])
        worst = max(worst, difference(output, expected[first : first + sizes[rank]]))
        output.sum().backward()
        (expected.sum() / world).backward()
        assert all(table.grad is None for table in model.emb.parameters())
    state = dmt_compile.full_state_dict(step_model)
    tables = {name: value for name, value in flat.state_dict().items() if name.startswith("emb.")}
    weights = max(difference(state[name], value) for name, value in tables.items()) if rank == 0 else 0.0
    owned = [table for table in model.emb.parameters() if table.local.numel()]
    kept = [value for table in owned for value in table._in_backward_optimizers[0].state[table].values()]
    elements = sum(value.local.numel() for value in kept if isinstance(value, ShardedTable))
    return {"output": worst, "weights": weights, "steps": done, "owned": len(owned), "state": elements}


def train_every_lookup(rank: int, topology: str, built_after: bool, **options: Any) -> dict[str, Any]:
    """Train a model of lookups of every kind beside the flat one, each rank's loss weighing 1 / ranks."""
    world = dist.get_world_size()
    torch.manual_seed(rank)  # rank 0's initial values must win
    model = Mixture()
    torch.manual_seed(0)
    flat = Mixture()
    step_model = compiled(model, topology=topology, **options)
    theirs = torch.optim.Adagrad(flat.parameters(), 0.1)
    mine = None if built_after else torch.optim.Adagrad(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(5)
    worst = {"output": 0.0, "gradient": 0.0}
    for step in range(4):
        batches = [flat.batch(3 + (rank + step) % 3, generator) for rank in range(world)]
        output = step_model(*batches[rank])
        mine = mine or torch.optim.Adagrad(model.parameters(), 0.1)
        expected = [flat(*batch) for batch in batches]
        worst["output"] = max(worst["output"], difference(output, expected[rank]))
        output.square().sum().backward()
        (sum(out.square().sum() for out in expected) / world).backward()
        for own, other in zip(model.parameters(), flat.parameters(), strict=True):
            if own.requires_grad:
                worst["gradient"] = max(worst["gradient"], gradient_difference(own, other))
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        batches = [flat.batch(2 + rank, generator) for rank in range(world)]
        worst["evaluation"] = difference(step_model(*batches[rank]), flat(*batches[rank]))
    state = dmt_compile.full_state_dict(step_model)
    if rank == 0:
        worst["weights"] = max(difference(state[name], value) for name, value in flat.state_dict().items())
        Mixture().load_state_dict(state)
    return {**worst, "graphs": counters["stats"]["unique_graphs"]}


def train_towers(rank: int, shared: bool, topology: str, clip: float | None, **options: Any) -> dict[str, Any]:
    """Train with Tower Modules beside the towered model of one process, each rank's loss weighing 1 / ranks."""
    world = dist.get_world_size()
    build = Projected if shared else DLRM
    torch.manual_seed(rank)  # rank 0's initial values must win
    model = build()
    torch.manual_seed(0)
    flat = build()
    generator = torch.Generator().manual_seed(5)
    first = make_batch(model, 3, generator)
    towered = dmt_compile.transform(flat, first, dmt_compile.plan(flat, first, topology, **options))
    step_model = compiled(model, topology=topology, **options)
    dmt_compile.warmup(step_model, first)
    own, theirs = (torch.optim.Adagrad(m.parameters(), 0.1) for m in (model, towered))
    of_reference = dict(towered.named_parameters())
    worst = {"output": 0.0, "gradient": 0.0, "norm": 0.0, "weights": 0.0}
    trained = set()
    for sizes in SIZES:
        batches = [make_batch(model, size, generator) for size in sizes[:world]]
        output = step_model(*batches[rank])
        expected = [towered(*batch) for batch in batches]
        worst["output"] = max(worst["output"], difference(output, expected[rank]))
        output.square().sum().backward()
        (sum(out.square().sum() for out in expected) / world).backward()
        for name, parameter in model.named_parameters():
            reference = of_reference[name.removeprefix("dmt_towers.replaced.")]
            if parameter.grad is not None and parameter.shape == reference.shape:
                trained.add(name)
                worst["gradient"] = max(worst["gradient"], gradient_difference(parameter, reference))
        if clip is not None:
            norm = dmt_compile.clip_grad_norm_(model.parameters(), clip)
            worst["norm"] = max(worst["norm"], difference(norm, clip_flat(towered, clip)))
        for optimizer in (own, theirs):
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        step_model.eval()
        towered.eval()
        batches = [make_batch(model, 2 + rank, generator) for rank in range(world)]
        worst["output"] = max(worst["output"], difference(step_model(*batches[rank]), towered(*batches[rank])))
    state = dmt_compile.full_state_dict(step_model)
    for name, value in towered.state_dict().items() if rank == 0 else ():
        mine = state.get(f"dmt_towers.replaced.{name}", state[name])
        worst["weights"] = max(worst["weights"], difference(mine, value))
    towers = {name.split(".")[1] for name in trained if name.startswith("dmt_towers.tower")}
    return {**worst, "towers": sorted(towers), "graphs": counters["stats"]["unique_graphs"]}


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference relative to the largest expected magnitude."""
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return 0.0
    return float((actual.double() - expected.double()).abs().max()) / max(float(expected.abs().max()), 1e-12)


def gradient_difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the difference of two gradients where this rank holds the parameter."""
    expected = dense_of(theirs.grad, theirs)
    if not isinstance(mine, ShardedTable):
        return difference(dense_of(mine.grad, mine), expected)
    block = mine.block
    if mine.grad is None:
        return 0.0
    if isinstance(mine.grad, ShardedTable):
        return difference(mine.grad.local, block.cut(expected))
    return difference(block.cut(mine.grad.to_dense()), block.cut(expected))


def clip_flat(model: nn.Module, clip: float) -> torch.Tensor:
    """Clip the flat model's gradients, coalescing sparse ones."""
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    values = [p.grad._values() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([value.norm() for value in values]).norm()
    for value in values:
        value.mul_(torch.clamp(clip / (norm + 1e-6), max=1.0))
    return norm


def evaluate_and_train(rank: int) -> tuple[int, int]:
    """Alternate training and evaluation, with batches of every size; return the number of graphs and of analyses."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model)
    generator = torch.Generator().manual_seed(rank)
    with mock.patch.object(backend, "read_capture", wraps=backend.read_capture) as analysed:
        for step in range(12):
            step_model(*make_batch(model, (step + rank) % 4 + (step == 0), generator)).sum().backward()
            with torch.no_grad():
                step_model(*make_batch(model, (2 * step + rank) % 5, generator))
    return counters["stats"]["unique_graphs"], analysed.call_count


def empty_first_batch(rank: int, empty: int) -> list[bool]:
    """Begin with an empty batch on one rank; tell of each step whether the output is the flat model's."""
    torch.manual_seed(0)
    model = MatrixAndWeights()
    flat = copy.deepcopy(model)
    step_model = compiled(model)
    generator = torch.Generator().manual_seed(rank)
    equal = []
    for step in range(3):
        batch = model.batch(0 if (rank, step) == (empty, 0) else 2 + rank + step, generator)
        output = step_model(*batch)
        equal.append(torch.equal(output, flat(*batch)))
        output.square().sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    return equal


# ------------------------------------------------------------------------------------------------ bad input


def two_of_a_class(rank: int) -> list[int]:
    """Call two models of one class in turn; return how many calls of each its report knows."""
    torch.manual_seed(0)
    models = [DLRM(), DLRM()]
    batch = make_batch(models[0], 2, torch.Generator().manual_seed(rank))
    step_models = [compiled(model) for model in models]
    for step_model in (*step_models, step_models[1]):
        step_model(*batch).sum().backward()
    reports = [dmt_compile.communication_report(model) for model in models]
    assert all(report.bytes_sent and report.exposed_s for report in reports)
    return [report.calls for report in reports]


def compressed(rank: int, topology: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one step of real ranks, and on rank 0 the same step of simulated ranks; return both."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    model, twin = DLRM(), DLRM()
    twin.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(3)
    batches = [make_batch(model, size, generator) for size in (3, 0, 2, 5)[:world]]
    step_model = compiled(model, topology=topology, **options)
    output = step_model(*batches[rank])
    output.sum().backward()
    report = dmt_compile.communication_report(step_model)
    assert report.calls == 1
    assert report.total_exposed_s > 0
    assert "bytes across hosts" in str(report)
    assert dmt_compile.communication_report(step_model).bytes_sent == {}
    simulated = dmt_compile.SimulatedWorld(topology)
    outputs = simulated.run(twin, batches, dense_compiler="eager", **options)
    torch.cat(outputs).sum().backward()
    tables = [p.grad.local for p in model.emb.parameters() if p.grad is not None and p.grad.local.numel()]
    owned = [p.local.numel() > 0 for p in model.emb.parameters()]
    theirs = [p.grad for p, mine in zip(twin.emb.parameters(), owned, strict=True) if mine]
    return {
        "output": torch.equal(output, outputs[rank]),
        "gradients": [torch.equal(a, b) for a, b in zip(tables, theirs, strict=True)],
        "bytes": report.bytes_sent,
        "simulated": dict(simulated.ledger.records),
    }


def differing_heads(rank: int) -> Any:
    """Rank 1 trains a part without tables while the others evaluate it; buffers make its evaluation collective too."""
    torch.manual_seed(0)
    tables, head = DLRM(), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    compiled(tables)(*make_batch(tables, 2, torch.Generator().manual_seed(0))).sum().backward()
    step_head = compiled(head)
    step_head(torch.ones(3, 4)).sum().backward()
    if rank == 1:
        head = head.double()
    step_head(torch.ones(3, 4, dtype=head[0].weight.dtype))


def bad_batches(rank: int, faults: list[str]) -> list[str]:
    """Give rank 1 one faulty batch after another, good steps between; every rank must raise, and nothing may change."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(rank)
    messages: list[str] = []
    for fault in faults:
        step_model(*make_batch(model, 3, generator)).sum().backward()
        optimizer.step()
        before = [p.local.clone() if isinstance(p, ShardedTable) else p.detach().clone() for p in model.parameters()]
        dense, ids, offsets = make_batch(model, 3, generator)
        if rank == 1:
            if fault == "id":
                ids[2] = torch.cat([ids[2], torch.tensor([99])])
            elif fault == "negative":
                ids[1] = torch.cat([torch.tensor([-1]), ids[1]])
            elif fault == "offsets":
                offsets[3] = offsets[3].flip(0) + torch.tensor([0, 9, 0])
            elif fault == "samples":
                dense = dense[:2]
        try:
            step_model(dense, ids, offsets)
        except dmt_compile.BatchError as error:
            messages.append(str(error))
        after = [p.local if isinstance(p, ShardedTable) else p.detach() for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert step_model(*make_batch(model, 2, generator)).shape == (2,)  # the world goes on
    return messages


def absent_rank(rank: int, phase: str) -> str:
    """Rank 0 alone evaluates (or trains on); it must hear who is missing."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model, timeout_s=2.0, first_timeout_s=20.0)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(4):
        step_model(*make_batch(model, 2, generator)).sum().backward()
    if rank == 0:
        if phase == "evaluation":
            with torch.no_grad():
                step_model(*make_batch(model, 2, generator))
        else:
            step_model(*make_batch(model, 2, generator)).sum().backward()
    time.sleep(8)
    return "did not call"


def raising_rank(rank: int) -> str:
    """Rank 2 raises between forward and backward and ends; the others must hear of it."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model, timeout_s=5.0, first_timeout_s=20.0)
    generator = torch.Generator().manual_seed(rank)
    for step in range(4):
        output = step_model(*make_batch(model, 2, generator))
        if rank == 2 and step == 3:
            raise ValueError("a fault of the user's own")
        output.sum().backward()
    return "finished"


def first_call_missing(rank: int) -> str:
    """Rank 3 never makes its first call."""
    model = DLRM()
    if rank != 3:
        compiled(model, first_timeout_s=3.0)(*make_batch(model, 2, torch.Generator().manual_seed(0)))
    time.sleep(10)
    return "did not call"


def differing_models(rank: int, what: str) -> Any:
    """Rank 1 has another model, other options or another plan."""
    torch.manual_seed(0)
    dense = 6 if rank == 1 and what == "dense" else 5
    model = DLRM(rows=(50, 20, 7, 33, 12 if rank == 1 and what == "rows" else 11), dense=dense)
    options: dict[str, Any] = {}
    if what == "options" and rank == 1:
        options["partition"] = "strided"
    if what == "unknown option" and rank == 1:
        options["topologie"] = "2x2"
    if what == "topology":
        options["topology"] = "2x3"
    if what == "plan of another model":
        other = DLRM(rows=(50, 20, 7, 33, 12))
        options["plan"] = dmt_compile.plan(other, make_batch(other, 2, torch.Generator().manual_seed(0)), "2x1")
    if what == "plan for another topology":
        options["plan"] = dmt_compile.plan(model, make_batch(model, 2, torch.Generator().manual_seed(0)), "1x2")
    compiled(model, **options)(*make_batch(model, 2, torch.Generator().manual_seed(0)))


def differing_programs(rank: int) -> Any:
    """Rank 1 evaluates while the others train."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model)
    batch = make_batch(model, 2, torch.Generator().manual_seed(0))
    step_model(*batch).sum().backward()
    with torch.set_grad_enabled(rank != 1):
        step_model(*batch)


def data_parallel_wrapper(rank: int) -> Any:
    """Compile a DDP-wrapped model."""
    model = nn.parallel.DistributedDataParallel(DLRM())
    compiled(model)(*make_batch(model.module, 2, torch.Generator().manual_seed(0)))


def without_process_group(rank: int) -> Any:
    """Start as torchrun does and forget the process group."""
    model = DLRM()
    compiled(model)(*make_batch(model, 2, torch.Generator().manual_seed(0)))


def drifting_replicas(rank: int) -> Any:
    """Change a dense parameter on one rank; the checksum must report it within its period."""
    torch.manual_seed(0)
    model = DLRM()
    step_model = compiled(model)
    batch = make_batch(model, 2, torch.Generator().manual_seed(0))
    for step in range(70):
        step_model(*batch).sum().backward()
        if step == 3 and rank == 1:
            with torch.no_grad():
                model.top[0].bias.add_(1e-3)


def warmup_without_dynamo(rank: int) -> None:
    """Warm a model up where Dynamo compiles nothing."""
    model = DLRM()
    with torch.compiler.set_stance("force_eager"):
        dmt_compile.warmup(compiled(model), make_batch(model, 2, torch.Generator().manual_seed(0)))


def recompile_limit(rank: int) -> Any:
    """Make Dynamo give up at the second graph."""
    torch._dynamo.config.recompile_limit = 1
    model = DLRM()
    step_model = compiled(model)
    batch = make_batch(model, 2, torch.Generator().manual_seed(0))
    step_model(*batch).sum().backward()
    with torch.no_grad():
        step_model(*batch)


# ------------------------------------------------------------------------------------- models that are partly compiled


def without_tables(rank: int) -> dict[str, float]:
    """Train a model without a table: plain data parallelism."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    inputs = torch.randn(dist.get_world_size(), 3, 4)
    compiled(model)(inputs[rank]).sum().backward()
    (flat(inputs.reshape(-1, 4)).sum() / dist.get_world_size()).backward()
    pairs = zip(model.parameters(), flat.parameters(), strict=True)
    return {"gradient": max(gradient_difference(mine, theirs) for mine, theirs in pairs)}


class Head(nn.Module):
    """A DLRM that is compiled, under a dense head that is not, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.dlrm = DLRM()
        self.norm = nn.BatchNorm1d(1)
        self.head = nn.Linear(1, 1)

    def forward(self, *batch: Any) -> torch.Tensor:
        return self.head(self.norm(self.dlrm(*batch).unsqueeze(1))).squeeze(1)


def partly_compiled(rank: int, how: str) -> dict[str, float]:
    """Dense parameters outside the graph: after the compiled part, or behind a graph break."""
    world = dist.get_world_size()
    torch.manual_seed(rank)
    model = Broken() if how == "graph break" else Head()
    torch.manual_seed(0)
    flat = Broken() if how == "graph break" else Head()
    flat.eval(), model.eval()  # batch norm by its running statistics: the local batch is not the global one
    generator = torch.Generator().manual_seed(3)
    dlrm = model.dlrm
    if how == "graph break":
        call = compiled(model)
    else:
        model.dlrm = compiled(dlrm)
        call = model
    worst = 0.0
    for _ in range(2):
        batches = [make_batch(dlrm, 3, generator) for _ in range(world)]
        call(*batches[rank]).sum().backward()
        (flat(*concatenate(batches)).sum() / world).backward()
    names = dict(flat.named_parameters())
    for name, parameter in model.named_parameters():
        worst = max(worst, gradient_difference(parameter, names[name.replace("_orig_mod.", "")]))
    return {"gradient": worst}


class Broken(nn.Module):
    """A model with a graph break between its embeddings and its head."""

    def __init__(self) -> None:
        super().__init__()
        self.dlrm = DLRM()
        self.head = nn.Linear(1, 1)

    def forward(self, *batch: Any) -> torch.Tensor:
        out = self.dlrm(*batch).unsqueeze(1)
        torch._dynamo.graph_break()
        return self.head(out).squeeze(1)


def buffers(rank: int) -> tuple[list[float], list[float]]:
    """Return the running mean of a batch norm inside the graph after a step of one's own and after one in common."""
    torch.manual_seed(rank)
    model = Normalised()
    with torch.no_grad():
        model.norm.running_mean.fill_(float(rank))
    step_model = compiled(model)
    step_model(*make_batch(model.dlrm, 4, torch.Generator().manual_seed(rank))).sum().backward()
    own = model.norm.running_mean.tolist()
    step_model(*make_batch(model.dlrm, 4, torch.Generator().manual_seed(9))).sum().backward()
    return own, model.norm.running_mean.tolist()


class Normalised(nn.Module):
    """A DLRM with a batch norm on its dense input."""

    def __init__(self) -> None:
        super().__init__()
        self.dlrm = DLRM()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, dense: torch.Tensor, ids: Any, offsets: Any) -> torch.Tensor:
        return self.dlrm(self.norm(dense), ids, offsets)


# ------------------------------------------------------------------------------------- a sharded model by hand


def handling(rank: int) -> dict[str, str]:
    """Do to a sharded model what users do to models; return what each attempt said."""
    torch.manual_seed(0)
    model = DLRM()
    flat = copy.deepcopy(model)
    step_model = compiled(model)
    batch = make_batch(model, 3, torch.Generator().manual_seed(0))
    step_model(*batch).sum().backward()
    said: dict[str, str] = {}

    def attempt(name: str, action: Any) -> None:
        try:
            said[name] = f"ok {action()}"
        except dmt_compile.DmtError as error:
            said[name] = f"{type(error).__name__} {error}"

    attempt("eager", lambda: model(*batch))
    attempt("state_dict", model.state_dict)
    attempt("clip", lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    attempt("deepcopy", lambda: type(copy.deepcopy(model).emb[0].weight).__name__)
    attempt("adagrad", lambda: len(torch.optim.Adagrad(model.parameters()).state))
    flat.emb[1].weight.data.fill_(2.0)
    attempt("load_state_dict", lambda: model.load_state_dict(flat.state_dict()))
    gathered = dmt_compile.full_state_dict(model)
    said["loaded"] = str(rank != 0 or bool((gathered["emb.1.weight"] == 2.0).all()))
    attempt("double", lambda: model.double().emb[0].weight.dtype)
    return said
