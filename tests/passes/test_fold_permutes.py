"""Lookups that write their rows in the order of the next exchange, and permutes that stay."""

from __future__ import annotations

import pytest
import torch

from dmt_compile import SimulatedWorld
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.runtime.route import _places
from dmt_compile.topology import Topology
from tests._tolerances import assert_reordered
from tests.passes._harness import dlrm, ragged

NAME = "fold_permutes"


def test_a_lookup_on_triton_writes_rows_in_peer_order() -> None:
    graph = dlrm("2x2", kernels="triton", id_exchange="global")
    report = graph.advance(NAME)
    assert (report.changed, report.matched, report.skipped) == (True, 1, ())
    assert graph.count(ex.peer_permute) == 0
    assert graph.node(ops.batched_lookup).kwargs == {"kernel": "triton", "peer_order": True}


def test_other_lookups_keep_their_permute() -> None:
    graph = dlrm("2x2", id_exchange="global")
    report = graph.advance(NAME)
    assert not report.changed
    assert [why for _, why in report.skipped] == ["its lookup writes rows in their own order"]
    assert graph.count(ex.peer_permute) == 1


def test_without_a_permute_nothing_happens() -> None:
    graph = dlrm("2x2", kernels="triton", id_exchange="hierarchical")
    report = graph.advance(NAME)
    assert (report.changed, report.skipped) == (False, ())


def test_places_are_those_of_the_permute() -> None:
    sizes, topology = (3, 0, 2, 5, 1, 4), Topology(3, 2)
    blocks = torch.arange(15).split(list(sizes))
    permuted = torch.cat([blocks[rank] for rank in topology.peer_order()])
    places = _places(topology, sizes, torch.device("cpu"))
    assert torch.equal(torch.empty(15, dtype=torch.int64).index_copy(0, places, torch.arange(15)), permuted)


@pytest.mark.parametrize("topology", ["2x2", "3x2"])
def test_ranks_compute_the_flat_model(topology: str) -> None:
    model, batches = ragged(topology)
    found = []
    for kernel in ("reference", "triton"):
        model.zero_grad()
        outputs = SimulatedWorld(topology).run(
            model, batches, dense_compiler="eager", id_exchange="global", kernels=kernel
        )
        torch.cat(outputs).square().sum().backward()
        found.append([torch.cat(outputs).detach(), *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert_reordered(mine, theirs, 16, gradient=True)
