"""What a step should send over each host's uplink, computed before anything runs.

Ids, embeddings and their gradients: ``dmt_compile.cost.traffic``, for ours as ``dmt_compile.explain`` gives it. Dense
gradients: a ring over all ranks in order, in which one rank of each host sends to the next host.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from models import DENSE_FEATURES, DLRM

import dmt_compile
from cluster.programs import Program
from cluster.workload import Batch, Workload, dense_bytes, flat_model
from dmt_compile.cost.traffic import Hop, embedding_traffic
from dmt_compile.errors import ConfigError
from dmt_compile.topology import Topology

# Hops count 8 bytes for an id and its bag's length, both int32: by hand int64 ids travel alone, under TorchRec with
# lengths, which are int32.
ID_SHARE = {"flat": 8 / 8, "torchrec_programs": 12 / 8}


def ring_bytes(tensor_bytes: int, topology: Topology) -> float:
    """Return what each host sends to the next in a ring all-reduce over all ranks."""
    return 2 * tensor_bytes * (topology.world_size - 1) / topology.world_size if topology.hosts > 1 else 0.0


def flat_bytes(hops: tuple[Hop, ...], topology: Topology, id_share: float, embedding_share: float) -> float:
    """Return what a host sends in the flat exchange, where ids and embeddings take a share of what hops count."""
    shares = (id_share if hop.name == "ids" else embedding_share for hop in hops)
    return sum(hop.cross_bytes * share for hop, share in zip(hops, shares, strict=True)) / topology.hosts


def predict(program: Program, workload: Workload, layout: str) -> dict[str, float] | None:
    """Return the bytes that each host sends in a step, the mean over hosts.

    Args:
        program: one of the comparison.
        workload: its sizes.
        layout: ``"<hosts>x<local ranks>"``.

    Returns:
        ``embeddings`` (with ids and gradients), and ``dense`` where this module knows how dense gradients travel;
        ``None`` for a program that it does not know.
    """
    topology = Topology.parse(layout)
    if program.options.get("one_host"):
        return None
    if program.module == "ours":
        options: dict[str, Any] = program.options.get("options", {})
        try:
            found = dmt_compile.explain(*_example(workload), layout, **options).bytes_per_link
        except ConfigError:  # an option that this version does not have; building the program says so
            return None
        links = found.get("sptt+tm", found["sptt"])
        return {"embeddings": links["cross"] / topology.hosts}
    if program.name != "flat" and program.options["sharding"] != "tw":
        return None
    return {
        "embeddings": flat_bytes(
            _flat_hops(workload, layout), topology, ID_SHARE[program.module], 1.0 if program.lossless else 0.5
        ),
        "dense": ring_bytes(dense_bytes(workload), topology),
    }


@functools.cache
def _flat_hops(workload: Workload, layout: str) -> tuple[Hop, ...]:
    """Return the flat exchange; across hosts it sends the same wherever whole tables lie."""
    plan = dmt_compile.plan(*_example(workload), layout)
    return embedding_traffic(plan, [workload.samples] * plan.topology.world_size).flat


def _example(workload: Workload) -> tuple[DLRM, Any]:
    """Return the flat model and its arguments, without memory behind them."""
    with torch.device("meta"):
        ids_FB = torch.zeros(workload.tables, workload.samples).long()
        batch = Batch(torch.zeros(workload.samples, DENSE_FEATURES), ids_FB, torch.zeros(workload.samples))
        return flat_model(workload), batch.inputs()
