"""Lookups that write rows as they travel, and casts that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dmt_compile import SimulatedWorld
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from tests.models import DLRM, make_batch
from tests.passes._harness import dlrm

NAME = "fold_casts"


@pytest.mark.parametrize(("topology", "hop"), [("2x2", "intra"), ("2x1", "peer"), ("1x2", "intra")])
def test_a_lookup_on_triton_writes_the_type_of_the_wire(topology: str, hop: str) -> None:
    graph = dlrm(topology, kernels="triton", comm_dtype={hop: "bfloat16"})
    report = graph.advance(NAME)
    assert (report.changed, report.matched, report.skipped) == (True, 1, ())
    lookup = graph.node(ops.batched_lookup)
    assert lookup.kwargs["out_dtype"] is torch.bfloat16
    assert lookup.meta["val"].dtype is torch.bfloat16
    exchange = next(user for user in lookup.users if user.target is ex.start_all_to_all)
    assert exchange.kwargs["dtype"] is torch.float32
    assert next(iter(exchange.users)).meta["val"].dtype is torch.float32


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kernels": "reference", "comm_dtype": {"peer": "bfloat16"}}, "its lookup writes rows in the tables' type"),
        (
            {"kernels": "triton", "comm_dtype": {"peer": ("float16", "bfloat16")}},
            "rows travel as float16, gradients as bfloat16; a tensor's gradient has its type",
        ),
    ],
)
def test_other_casts_stay_with_their_reason(options: dict[str, Any], why: str) -> None:
    graph = dlrm("2x1", **options)
    report = graph.advance(NAME)
    assert not report.changed
    assert [reason for _, reason in report.skipped] == [why]


@pytest.mark.parametrize("options", [{}, {"comm_dtype": {"intra": "int8"}}, {"comm_dtype": {"peer": "bfloat16"}}])
def test_without_a_cast_of_a_lookup_nothing_happens(options: dict[str, Any]) -> None:
    report = dlrm("2x2", kernels="triton", **options).advance(NAME)
    assert (report.changed, report.skipped) == (False, ())


@pytest.mark.parametrize("form", ["bfloat16", "float16"])
@pytest.mark.parametrize("topology", ["2x2", "2x1"])
def test_ranks_compute_what_a_cast_in_the_exchange_gives(topology: str, form: str) -> None:
    torch.manual_seed(0)
    model = DLRM(rows=(6, 5, 4, 3, 7))
    with torch.no_grad():
        model.emb[0].weight[2, 1] = 1e5  # type: ignore[union-attr, index]  # too large for float16, which then keeps its largest number
    world = SimulatedWorld(topology)
    generator = torch.Generator().manual_seed(0)
    batches = [make_batch(model, samples, generator) for samples in (3, 0, 2, 5)[: world.topology.world_size]]
    found = []
    for kernel in ("reference", "triton"):
        model.zero_grad()
        world.ledger.records.clear()
        outputs = world.run(
            model, batches, dense_compiler="eager", kernels=kernel, comm_dtype={"intra": form, "peer": form}
        )
        (torch.cat(outputs) / 1e5).square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        found.append((torch.cat(outputs).detach(), gradients, dict(world.ledger.records)))
    (out, gradients, sent), (triton_out, triton_gradients, triton_sent) = found
    assert triton_sent == sent
    # A sum that another order of additions rounds elsewhere may be rounded to the next number of the form.
    step = torch.finfo(getattr(torch, form)).eps
    torch.testing.assert_close(triton_out, out, rtol=4 * step, atol=4 * step)
    for mine, theirs in zip(triton_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=8 * step, atol=8 * step * theirs.abs().max().item())
