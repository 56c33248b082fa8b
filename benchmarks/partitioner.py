"""The Tower Partitioner: seconds and balance by size, and how well planted blocks of features are recovered.

    python benchmarks/partitioner.py                # both parts, about three minutes
    python benchmarks/partitioner.py --part sizes

Sizes: random tables whose weights, widths and bags differ, interactions in blocks under noise; every plan is checked to
hold each table once before a figure is printed. Recovery: small flat DLRMs are trained on synthetic clicks whose
interacting features are known; the adjusted Rand index (1: the planted blocks; 0: chance) of the towers is compared with
strided ones, with the paper's plane and k-means, with spectral clustering and with networkx's greedy communities on
the same matrix. Spectral clustering and communities know of no balance.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from scipy.cluster.vq import kmeans2

from dmt_compile import InteractionMatrix, TableSpec, Topology, TowerPlan
from dmt_compile.partition.assign import make_plan
from dmt_compile.partition.balance import imbalance
from dmt_compile.partition.interaction import inside_share
from dmt_compile.partition.kmeans import constrained_kmeans
from dmt_compile.partition.planar import distances, planar_embedding

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from metrics import adjusted_rand_index
from partition_towers import measure, towers_of, train_probe
from synthetic import planted_blocks

SIZES = ((26, 8), (200, 16), (1000, 64))
# Features, blocks, rows of training data: plenty, and less and less of it.
SETTINGS = ((16, 4, 60_000), (26, 8, 60_000), (26, 8, 20_000), (48, 8, 60_000))
SIGNALS = {"cosine": 4, "nid": 4, "archdetect": 1}  # batches of 1,024 samples


def random_problem(number: int, blocks: int, seed: int) -> tuple[list[TableSpec], InteractionMatrix]:
    """Draw tables, and interactions in blocks under noise."""
    rng = np.random.default_rng(seed)
    tables = [
        TableSpec(
            f"emb.{i}",
            rows=int(np.exp(rng.normal(9, 1))) + 1,
            dim=int(rng.choice([32, 64, 128])),
            pooling=float(rng.choice([1, 1, 1, 5, 20])),
        )
        for i in range(number)
    ]
    block = rng.permutation(np.arange(number) % blocks)
    noise = rng.random((number, number)) * 0.5
    matrix = (noise + noise.T) / 2 + 0.3 * (block[:, None] == block)
    names = tuple(table.name for table in tables)
    return tables, InteractionMatrix(names, names, matrix)


def peaks_of(plan: TowerPlan) -> tuple[float, ...]:
    """Return the largest tower's bytes moved, weights and rows read, relative to the mean tower's."""
    needs = [
        [table.output_bytes_per_sample + table.id_bytes_per_sample for table in plan.tables],
        [float(table.memory_bytes) for table in plan.tables],
        [table.features * table.bags * table.pooling for table in plan.tables],
    ]
    return imbalance(needs, towers_of(plan), len(plan.towers))


def sizes() -> None:
    """Print seconds and imbalance of each partition at each size."""
    print(
        f"{'tables':>6} {'towers':>6} {'partition':>9} {'seconds':>8} {'load':>6} {'weights':>8} {'rows':>6} {'inside':>7}"
    )
    for number, towers in SIZES:
        tables, matrix = random_problem(number, towers, seed=0)
        flat = matrix.of_tables([table.name for table in tables])
        for partition in ("strided", "balanced", "coherent", "diverse"):
            start = time.perf_counter()
            given = matrix if partition in ("coherent", "diverse") else None
            plan = make_plan(tables, Topology(towers, 8), partition=partition, interactions=given)
            seconds = time.perf_counter() - start
            assert sorted(n for tower in plan.towers for n in tower.tables) == sorted(t.name for t in tables)
            load, weights, rows = peaks_of(plan)
            share = inside_share(flat, towers_of(plan))
            print(
                f"{number:>6} {towers:>6} {partition:>9} {seconds:>8.2f} {load:>6.2f} {weights:>8.2f} {rows:>6.2f} "
                f"{share:>7.1%}"
            )


def spectral(matrix: np.ndarray, groups: int, seed: int) -> list[int]:
    """Return spectral clusters of any size: k-means on the leading eigenvectors of the normalised affinities."""
    scale = 1 / np.sqrt(np.maximum(matrix.sum(axis=1), 1e-12))
    _, vectors = np.linalg.eigh(scale[:, None] * matrix * scale)
    leading = vectors[:, -groups:]
    leading /= np.maximum(np.linalg.norm(leading, axis=1, keepdims=True), 1e-12)
    return kmeans2(leading, groups, seed=seed, minit="++", iter=100)[1].tolist()


def communities(interactions: InteractionMatrix, groups: int) -> list[int]:
    """Return networkx's greedy modularity communities, as many as asked for."""
    graph = interactions.graph()
    found = nx.community.greedy_modularity_communities(graph, weight="weight", cutoff=groups, best_n=groups)
    community = {name: k for k, members in enumerate(found) for name in members}
    return [community[name] for name in interactions.features]


def recovery(seeds: int) -> None:
    """Print the mean adjusted Rand index of each method on each signal."""
    methods = ("ours", "paper", "spectral", "networkx", "strided")
    head = " ".join(f"{name:>9}" for name in methods)
    print(f"{'features':>8} {'blocks':>6} {'rows':>7} {'signal':>10} {'s/model':>8} {head}")
    for features, blocks, rows in SETTINGS:
        scores: dict[str, list[list[float]]] = {signal: [] for signal in SIGNALS}
        seconds: dict[str, list[float]] = {signal: [] for signal in SIGNALS}
        for seed in range(seeds):
            torch._dynamo.reset()
            data, truth = planted_blocks(features, blocks, rows, seed=seed)
            model = train_probe(data, seed=seed)
            for signal, batches in SIGNALS.items():
                start = time.perf_counter()
                interactions = measure(model, data, signal, batches)
                seconds[signal].append(time.perf_counter() - start)
                tables = [TableSpec(name, 30, 8) for name in interactions.tables]
                plan = make_plan(tables, Topology(blocks, 1), partition="coherent", interactions=interactions)
                plane = planar_embedding(distances(interactions.matrix, "coherent"), seed=seed)
                found = (
                    towers_of(plan),
                    constrained_kmeans(plane, blocks, seed=seed),
                    spectral(interactions.matrix, blocks, seed),
                    communities(interactions, blocks),
                    [k % blocks for k in range(features)],
                )
                scores[signal].append([adjusted_rand_index(truth, groups) for groups in found])
        for signal in SIGNALS:
            means = " ".join(f"{mean:>9.2f}" for mean in np.mean(scores[signal], axis=0))
            took = statistics.median(seconds[signal])
            print(f"{features:>8} {blocks:>6} {rows:>7} {signal:>10} {took:>8.1f} {means}", flush=True)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "sizes", "recovery"), default="all")
    parser.add_argument("--seeds", type=int, default=3, help="data sets and models for each setting")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part != "recovery":
        sizes()
    if args.part != "sizes":
        recovery(args.seeds)


if __name__ == "__main__":
    main()
