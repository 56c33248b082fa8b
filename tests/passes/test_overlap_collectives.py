"""The order of exchanges and regions, in the forward pass and in autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile import SimulatedWorld
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops
from dmt_compile.runtime import simulated_world
from dmt_compile.runtime.regions import DenseRegion
from tests.models import DLRM, make_batch
from tests.passes._harness import dlrm

NAME = "overlap_collectives"


def events(graph: Any) -> list[str]:
    """Return the graph's exchanges and regions in order."""
    found = []
    for node in graph.gm.graph.nodes:
        if node.target is ex.start_all_to_all:
            found.append(f"start {node.args[2]}")
        elif node.target is ex.wait_all_to_all:
            found.append(f"wait {node.args[0].args[2]}")
        elif node.op == "call_module":
            found.append("region")
    return found


@pytest.mark.parametrize(
    ("topology", "hops"), [("2x2", ["ids", "intra", "peer"]), ("4x1", ["ids", "peer"]), ("1x4", ["ids", "intra"])]
)
@pytest.mark.parametrize("training", [True, False])
def test_the_bottom_layers_run_while_the_last_exchange_is_under_way(
    topology: str, hops: list[str], training: bool
) -> None:
    graph = dlrm(topology, training)
    report = graph.advance(NAME)
    assert (report.changed, report.matched) == (True, len(hops) + graph.count(gradient_ops.start_gradients))
    chain = [event for hop in hops[:-1] for event in (f"start {hop}", f"wait {hop}")]
    assert events(graph) == [*chain, f"start {hops[-1]}", "region", f"wait {hops[-1]}", "region"]
    assert report.notes[-1] == f"{hops[-1]}: dense_0 meanwhile"
    assert report.notes[0] == "ids: waited for at once"


def test_one_rank_has_nothing_to_overlap() -> None:
    graph = dlrm("1x1")
    report = graph.advance(NAME)
    assert (report.changed, report.skipped) == (False, (("graph", "no exchange"),))


def test_what_writes_in_place_keeps_its_place() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.EmbeddingBag(10, 4, mode="sum")

        def forward(self, ids: torch.Tensor, offsets: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            before = scale * 2
            scale.add_(1)
            return (self.emb(ids, offsets) * scale[:, None]).sum(1) + before

    def batches() -> list[Any]:
        return [(torch.tensor([r, 1, 2]), torch.tensor([0, 2]), torch.tensor([1.0, 2.0 + r])) for r in range(4)]

    torch.manual_seed(0)
    model = Counts()
    mine, flat = batches(), batches()
    outputs = SimulatedWorld("2x2").run(model, mine, dense_compiler="eager")
    for output, given, batch in zip(outputs, mine, flat, strict=True):
        assert torch.equal(output, model(*batch))
        assert torch.equal(given[2], batch[2])


def test_gradients_travel_while_the_bottom_layers_run_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd takes what was made last: the way back starts before, and is waited for after, the bottom layers."""
    order: list[str] = []
    call = DenseRegion.forward

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
            ctx.name = name
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            order.append(ctx.name)
            return None, *grads

    def watched(self: DenseRegion, *args: Any) -> Any:
        outputs = call(self, *args)
        return tuple(
            Marked.apply(f"region {len(outputs)}", out) if isinstance(out, torch.Tensor) and out.requires_grad else out
            for out in outputs
        )

    class Start(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            order.append("waits")
            return grads

    class Wait(Start):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            order.append("starts")
            return grads

    collective = simulated_world._LockstepProgram._collective

    def exchanged(self: Any, target: Any, args: Any, how: Any) -> Any:
        results = collective(self, target, args, how)
        if target is ex.start_all_to_all and args[0][2] == "peer":
            return [ex.InFlight(Start.apply(flight.stand_in), None) for flight in results]
        if target is ex.wait_all_to_all and results[0].requires_grad:
            return [Wait.apply(result) for result in results]
        return results

    monkeypatch.setattr(DenseRegion, "forward", watched)
    monkeypatch.setattr(simulated_world._LockstepProgram, "_collective", exchanged)
    torch.manual_seed(0)
    model = DLRM()
    batches = [make_batch(model, 3, torch.Generator().manual_seed(rank)) for rank in range(2)]
    torch.cat(SimulatedWorld("2x1").run(model, batches, dense_compiler="eager")).sum().backward()
    regions = [index for index, event in enumerate(order) if event.startswith("region")]
    top, bottom = regions[:2], regions[2:]
    assert len(bottom) == 2
    assert max(top) < order.index("starts") < min(bottom)
    assert max(bottom) < len(order) - 1 - order[::-1].index("waits")
    assert max(bottom) < order.index("waits")
