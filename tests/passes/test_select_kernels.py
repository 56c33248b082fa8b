"""Which kernels a graph's operators get, by options, types and device."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from dmt_compile.errors import ConfigError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import calls
from dmt_compile.ir.stages import Effect
from dmt_compile.kernels.batched_lookup import op as batched_lookup
from dmt_compile.kernels.batched_lookup.fbgemm import FEWEST
from dmt_compile.runtime.program import fingerprint
from tests.models import DLRM, make_batch
from tests.passes._harness import Captured, assert_compiled_is_eager, bags, capture, dlrm

NAME = "select_kernels"


def kernels_of(graph: Captured, target: Any) -> list[Any]:
    return [node.kwargs.get("kernel") for node in calls(graph.gm, target)]


@lru_cache
def _many() -> Captured:
    torch.manual_seed(0)
    model = DLRM(rows=(3,) * FEWEST)
    return capture(model, make_batch(model, 3, torch.Generator().manual_seed(0)))


def test_fbgemm_looks_up_sums_of_float32_on_a_cpu_where_there_are_many() -> None:
    graph = _many().on("1x1")
    report = graph.advance(NAME)
    assert (report.changed, report.matched, report.effect) == (True, 1, Effect.EXACT)
    assert kernels_of(graph, ops.batched_lookup) == ["fbgemm"]
    (note,) = report.notes
    assert note.startswith("batched_lookup: fbgemm; not triton: ")


@pytest.mark.parametrize("topology", ["1x1", "2x1"])
def test_few_tables_of_a_rank_are_left_to_pytorch(topology: str) -> None:
    graph = dlrm() if topology == "1x1" else _many().on(topology)
    report = graph.advance(NAME)
    assert kernels_of(graph, ops.batched_lookup) == [None]
    few = 3 if topology == "1x1" else FEWEST // 2
    assert f"not fbgemm: {few} features a rank, it is faster from {FEWEST} on" in report.notes[0]


def test_the_reference_where_fbgemm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", None)
    graph = dlrm(kernels="fbgemm")
    report = graph.advance(NAME)
    assert (report.changed, report.matched, report.effect) == (False, 1, Effect.EXACT)
    assert kernels_of(graph, ops.batched_lookup) == [None]
    assert "not fbgemm: fbgemm_gpu cannot be imported" in report.notes[0]


def test_the_reference_on_request() -> None:
    graph = dlrm(kernels="reference")
    assert not graph.advance(NAME).changed
    assert kernels_of(graph, ops.batched_lookup) == [None]


def test_exchanges_that_pack_rows_get_a_kernel_and_others_none() -> None:
    graph = dlrm("2x2", comm_dtype={"peer": "int8"}, kernels="triton")
    report = graph.advance(NAME)
    assert kernels_of(graph, ops.batched_lookup) == ["triton"]
    packed = {node.args[2]: node.kwargs.get("kernel") for node in calls(graph.gm, ex.start_all_to_all)}
    assert packed == {"ids": None, "intra": None, "peer": "triton"}
    assert (report.matched, report.effect) == (2, Effect.REORDERED)


def test_ranks_with_other_kernels_run_the_same_program() -> None:
    graphs = [dlrm("2x2", kernels=kernel) for kernel in ("reference", "fbgemm")]
    for graph in graphs:
        graph.advance(NAME)
    assert len({fingerprint(graph.gm) for graph in graphs}) == 1
    assert len({tuple(kernels_of(graph, ops.batched_lookup)) for graph in graphs}) == 2


def test_a_mean_is_not_fbgemms() -> None:
    torch.manual_seed(0)
    graph = capture(nn.EmbeddingBag(6, 4, mode="mean"), bags()).on("1x1", kernels="fbgemm")
    report = graph.advance(NAME)
    assert "not fbgemm: pooling by mean would differ in the last bits" in report.notes[0]


@pytest.mark.parametrize("kernel", ["fbgemm", "triton", "reference"])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_kernel_gives_the_flat_model(kernel: str, sparse: bool) -> None:
    torch.manual_seed(0)
    model = DLRM(rows=(6, 5, 4), sparse=sparse)
    generator = torch.Generator().manual_seed(0)
    batches = [make_batch(model, samples, generator) for samples in (7, 2, 1)]
    longest = 7 if kernel == "triton" else None
    assert_compiled_is_eager(model, *batches, longest_sum=longest, kernels=kernel)


@pytest.mark.parametrize("kernel", ["fbgemm", "triton"])
def test_a_kernel_that_does_not_run_gives_way_with_its_reason(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kernel: str, *lookups: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(batched_lookup, "try_out", broken)
    graph = dlrm(kernels=kernel)
    report = graph.advance(NAME)
    assert f"not {kernel}: it failed to compile: RuntimeError: no such instruction" in report.notes[0]
    assert kernels_of(graph, ops.batched_lookup) == [None]


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ConfigError, match="expected a known 'kernels', found 'tritn'; did you mean 'triton'"):
        dlrm(kernels="tritn")
