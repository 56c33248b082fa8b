"""Memory of each rank of a sharded model, with Adagrad built before and after the first call.

    torchrun --standalone --nproc-per-node 4 benchmarks/table_memory.py
    torchrun --standalone --nproc-per-node 4 benchmarks/table_memory.py --built-before

Prints, per rank, the bytes that its tables and their optimizer state should take, and the growth of the process's
resident memory from before the model was built to after two steps. The peak is higher: the flat model is built first.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys

import torch
import torch.distributed as dist
from models import make_batch, make_model

PAGE_BYTES = resource.getpagesize()


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE_BYTES


def local_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes that a tensor holds on this rank."""
    local = getattr(tensor, "local", tensor)
    return local.numel() * local.element_size()


def main() -> None:
    """Train two steps and compare the memory with what the plan promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built-before", action="store_true", help="build the optimizer before the first call")
    parser.add_argument("--rows", type=int, default=400_000)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    start = resident_bytes()
    model = make_model(8, dim=32, rows=args.rows, sparse=True)
    tables = list(model.emb.parameters())
    flat_bytes = sum(table.numel() * table.element_size() for table in tables)
    options = {"topology": f"2x{world // 2}", "dense_compiler": "eager"}
    compiled = torch.compile(model, backend="dmt", options=options)
    batch = make_batch(model, 256, seed=rank)
    optimizer = torch.optim.Adagrad(model.parameters()) if args.built_before else None
    for _ in range(2):
        loss = compiled(*batch).sum()
        optimizer = optimizer or torch.optim.Adagrad(model.parameters())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    del loss
    gc.collect()
    grown = resident_bytes() - start
    weights = sum(local_bytes(table) for table in tables)
    state = sum(local_bytes(optimizer.state[table]["sum"]) for table in tables)
    total = torch.tensor([weights, state])
    dist.all_reduce(total)
    assert total.tolist() == [flat_bytes, flat_bytes], "every row, and its state, must be on exactly one rank"
    lines: list[str | None] = [None] * world
    line = f"{rank:4}  {weights / 2**20:12.1f}  {state / 2**20:10.1f}  {grown / 2**20:16.1f}"
    dist.all_gather_object(lines, line)
    if rank == 0:
        when = "before" if args.built_before else "after"
        print(f"flat model: {flat_bytes / 2**20:.1f} MiB of tables; Adagrad built {when} the first call")
        print("rank  tables MiB    state MiB  process grew MiB")
        print("\n".join(str(text) for text in lines))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort at the interpreter's own exit


if __name__ == "__main__":
    main()
