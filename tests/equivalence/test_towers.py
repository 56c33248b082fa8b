"""Random models with Tower Modules: on every rank of random worlds equal to the towered model of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import dmt_compile
from dmt_compile import Topology
from dmt_compile.ir.stages import Effect

EXAMPLES = max(1, settings().max_examples // 20)
DENSE = 3


class Joined(nn.Module):
    """Bags of equal width that meet in dot products, in a cross layer, or side by side under an MLP."""

    def __init__(self, rows: list[int], dim: int, join: str, shared: bool) -> None:
        super().__init__()
        self.join, self.shared = join, shared
        self.emb = nn.ModuleList(nn.EmbeddingBag(n, dim, mode="sum", sparse=i % 2 == 1) for i, n in enumerate(rows))
        self.bottom = nn.Linear(DENSE, dim)
        self.project = nn.Linear(dim, dim)
        vectors = len(rows) + 1
        width = vectors * dim
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, -1))
        self.cross = nn.Linear(width, width)
        self.top = nn.Linear(dim + vectors * (vectors - 1) // 2 if join == "dot" else width, 2)

    def forward(self, dense: torch.Tensor, ids: list[torch.Tensor], offsets: list[torch.Tensor]) -> torch.Tensor:
        bottom = self.bottom(dense)
        pooled = [table(i, o) for table, i, o in zip(self.emb, ids, offsets, strict=True)]
        if self.shared:
            pooled = [torch.tanh(self.project(vector)) for vector in pooled]
        if self.join == "dot":
            vectors = torch.stack([bottom, *pooled], dim=1)
            products = torch.bmm(vectors, vectors.mT)
            return self.top(torch.cat([bottom, products[:, self.pairs[0], self.pairs[1]]], dim=1))
        joined = torch.cat([*pooled, bottom], dim=1)
        return self.top(joined * self.cross(joined) + joined if self.join == "cross" else torch.relu(joined))


@st.composite
def towered(draw: st.DrawFn) -> tuple[Joined, list[Any], str, dict[str, Any]]:
    """A model, a batch for each rank, a topology and options."""
    rows = draw(st.lists(st.integers(1, 12), min_size=2, max_size=7))
    dim, seed = draw(st.sampled_from([2, 3, 4, 6])), draw(st.integers(0, 2**16))
    join = draw(st.sampled_from(["dot", "cross", "side by side"]))
    topology = Topology(draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    towers = draw(st.sampled_from([n for n in range(1, 7) if n % topology.hosts == 0 or topology.hosts % n == 0]))
    kind = draw(st.sampled_from(["dlrm", "dcn", "dot"] if join == "dot" else ["dlrm", "dcn"]))
    choices: dict[str, Any] = {"dim": draw(st.integers(1, dim + 1))}
    if kind == "dcn":
        choices |= {"rank": draw(st.none() | st.integers(1, 3)), "layers": draw(st.integers(1, 2))}
        choices["output"] = draw(st.sampled_from(["per_tower", "per_feature"]))
    else:
        choices |= draw(st.sampled_from([{}, {"c": 0, "p": 1}, {"c": 2}, {"c": 1, "p": 1}]))
    torch.manual_seed(seed)
    model = Joined(rows, dim, join, draw(st.booleans()))
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rank in range(topology.world_size):
        samples = 0 if rank == 1 and draw(st.booleans()) else draw(st.integers(1, 4))
        lengths = [torch.randint(0, 3, (samples,), generator=generator) for _ in rows]
        ids = [torch.randint(0, n, (int(k.sum()),), generator=generator) for n, k in zip(rows, lengths, strict=True)]
        batches.append((torch.randn(samples, DENSE, generator=generator), ids, [k.cumsum(0) - k for k in lengths]))
    options = {"towers": towers, "partition": draw(st.sampled_from(["balanced", "strided"])), "seed": seed % 7}
    return model, batches, str(topology), {**options, "tower_module": kind, "tower_module_options": choices}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@given(case=towered())
@settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.generate])  # shrinking would take minutes
def test_random_towers_equal_those_of_one_process(case: tuple[Joined, list[Any], str, dict[str, Any]]) -> None:
    torch._dynamo.reset()
    model, batches, topology, options = case
    plan = dmt_compile.plan(model, batches[0], topology, **{k: v for k, v in options.items() if k != "seed"})
    certificate = dmt_compile.certify(model, batches, topology, dense_compiler="eager", plan=plan)
    assert certificate.holds, f"{topology} {options}\n{certificate}"
    assert certificate.effect is Effect.MODEL
