"""Which features belong into one tower? Train a small flat model, measure how its features interact, plan, and look.

python examples/partition_towers.py                             # flights: no truth is known, so look at the towers
python examples/partition_towers.py --data synthetic            # planted blocks: are they found?
python examples/partition_towers.py --signal archdetect --towers 4 --picture towers.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from data import TableData, load_nycflights
from dlrm import DLRM
from metrics import adjusted_rand_index
from synthetic import planted_blocks
from torch.nn.functional import binary_cross_entropy_with_logits

import dmt_compile

BATCH = 1024


def train_probe(data: TableData, dim: int = 8, epochs: int = 2, lr: float = 5e-3, seed: int = 0) -> DLRM:
    """Train a small flat DLRM, long enough for its embeddings to mean something."""
    torch.manual_seed(seed)
    model = DLRM(data.table_rows, dim, len(data.dense_names), bottom=(32,), top=(64, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch in range(epochs):
        for batch in data.batches(data.train, BATCH, shuffle_seed=seed + epoch):
            loss = binary_cross_entropy_with_logits(model(*batch.inputs()), batch.labels_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def measure(model: DLRM, data: TableData, signal: str, batches: int = 4) -> dmt_compile.InteractionMatrix:
    """Measure the interaction of the model's features on validation rows."""
    shares = islice(data.batches(data.valid, BATCH), batches)
    return dmt_compile.interactions(model, (batch.inputs() for batch in shares), signal)


def towers_of(plan: dmt_compile.TowerPlan) -> list[int]:
    """Return the tower of each table, in the order of the model."""
    tower = {name: k for k, tower in enumerate(plan.towers) for name in tower.tables}
    return [tower[table.name] for table in plan.tables]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, plan, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("nycflights", "synthetic"), default="nycflights")
    parser.add_argument("--signal", choices=("cosine", "nid", "archdetect"), default="cosine")
    parser.add_argument("--partition", choices=("coherent", "diverse"), default="coherent")
    parser.add_argument("--towers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=60_000, help="rows of the data to use")
    parser.add_argument("--save", type=Path, help="write the interactions here, for dmt plan --interactions")
    parser.add_argument("--picture", type=Path, help="draw the towers into this .svg or .png")
    args = parser.parse_args(argv)
    truth: list[int] | None = None
    if args.data == "synthetic":
        data, truth = planted_blocks(blocks=args.towers, rows=args.rows)
    else:
        data = load_nycflights(limit_rows=args.rows)

    model = train_probe(data)
    interactions = measure(model, data, args.signal)
    batch = next(data.batches(data.valid, 64)).inputs()
    plan, strided = (
        dmt_compile.plan(model, batch, f"{args.towers}x2", **options)
        for options in ({"partition": args.partition, "interactions": interactions}, {"partition": "strided"})
    )
    print("\n".join(plan.notes))
    for tower in plan.towers:
        columns = [data.categorical_names[int(name.removeprefix("emb."))] for name in tower.tables]
        print(f"{tower.name}: {', '.join(columns)}")
    if truth is not None:
        found, naive = (adjusted_rand_index(truth, towers_of(made)) for made in (plan, strided))
        print(f"agreement with the planted blocks (adjusted Rand index): {found:.2f}, strided {naive:.2f}")
    if args.save is not None:
        interactions.save(args.save)
    if args.picture is not None:
        labels = {f"emb.{k}": name for k, name in enumerate(data.categorical_names)}
        dmt_compile.save_picture(plan, interactions, args.picture, labels)


if __name__ == "__main__":
    main()
