"""Which hops travel in which form, and what that costs in bytes and in precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dmt_compile
from dmt_compile import SimulatedWorld
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir.pass_base import calls
from dmt_compile.ir.stages import Effect
from tests.models import DLRM, make_batch
from tests.passes._harness import dlrm

NAME = "compress_collectives"


def forms(comm_dtype: dict[str, Any]) -> tuple[dict[Any, Any], Any]:
    graph = dlrm("2x2", comm_dtype=comm_dtype)
    report = graph.advance(NAME)
    return {node.args[2]: node.args[4:] for node in calls(graph.gm, ex.start_all_to_all)}, report


def test_nothing_is_compressed_unasked() -> None:
    found, report = forms({})
    assert (report.changed, report.matched, report.skipped) == (False, 0, ())
    assert found == {"ids": ("int32", "int32"), "intra": ("float32",) * 2, "peer": ("float32",) * 2}


def test_each_hop_and_direction_has_a_form_of_its_own() -> None:
    found, report = forms({"peer": ("float8", "bfloat16"), "intra": "float32"})
    assert (report.changed, report.matched) == (True, 1)
    assert report.notes == ("peer: float8 forward, bfloat16 backward, in place of float32",)
    assert found["intra"] == ("float32", "float32")
    assert found["peer"] == ("float8", "bfloat16")


def test_a_hop_that_is_not_there_is_reported() -> None:
    graph = dlrm("1x4", comm_dtype={"peer": "bfloat16"})
    assert graph.advance(NAME).skipped == (("peer", "no exchange of embeddings on this hop"),)


def bytes_and_outputs(comm_dtype: dict[str, Any]) -> tuple[dict[tuple[str, str, str], int], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = DLRM()
    generator = torch.Generator().manual_seed(0)
    world = SimulatedWorld("2x2")
    batches = [make_batch(model, size, generator) for size in (3, 0, 2, 5)]
    outputs = world.run(model, batches, dense_compiler="eager", comm_dtype=comm_dtype)
    torch.cat(outputs).sum().backward()
    return dict(world.ledger.records), [*outputs, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("form", "share"), [("bfloat16", 0.5), ("float16", 0.5), ("float8", 0.25), ("int8", 0.25)])
def test_bytes_across_hosts_and_errors(form: str, share: float) -> None:
    exact_bytes, exact = bytes_and_outputs({})
    found_bytes, found = bytes_and_outputs({"peer": form})
    for direction in ("forward", "backward"):
        key = ("peer", direction, "cross")
        scales = 0 if share == 0.5 else 4 * 2 * 10 // 2  # one float32 for each sample and tower group that is sent
        assert found_bytes[key] == exact_bytes[key] * share + scales
    rest = {key: n for key, n in exact_bytes.items() if key[0] != "peer"}
    assert {key: n for key, n in found_bytes.items() if key[0] != "peer"} == rest
    assert any(not torch.equal(a, b) for a, b in zip(found, exact, strict=True))  # or nothing was packed


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16", "float8", "int8", ("int8", "bfloat16")])
def test_a_certificate_states_the_loss(form: Any) -> None:
    torch.manual_seed(0)
    model = DLRM()
    batch = make_batch(model, 16, torch.Generator().manual_seed(0))
    certificate = dmt_compile.certify(model, batch, "2x2", dense_compiler="eager", comm_dtype={"peer": form})
    assert certificate.holds, str(certificate)
    lossy = form != "float32"
    assert certificate.effect is (Effect.LOSSY if lossy else Effect.REORDERED)
    assert (max(q.max_relative_error for q in certificate.quantities) > 1e-6) == lossy
