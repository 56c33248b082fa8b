"""The batched lookup on a CPU: FBGEMM in one call beside PyTorch's operator table by table.

    python benchmarks/cpu_lookup.py [--repeats 31]

Sums of float32 rows, forward, one thread. Both take turns on the same tables and ever new ids; their outputs must be
equal bit for bit before a speed is printed. The ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from dmt_compile.kernels.batched_lookup import fbgemm
from dmt_compile.kernels.batched_lookup.op import Pooling, batched_lookup

# tables, rows, width, bags, ids a bag
CELLS = (
    (1, 1_000_000, 64, 2048, 10),
    (7, 50_000, 64, 2048, 1),
    (8, 10_000, 16, 512, 1),
    (16, 10_000, 16, 512, 1),
    (16, 50_000, 64, 2048, 1),
    (26, 50_000, 16, 2048, 1),
    (26, 100_000, 64, 512, 1),
    (26, 100_000, 64, 2048, 5),
    (100, 1_000, 16, 512, 1),
    (400, 1_000, 16, 256, 1),
)
SETS = 4  # of ids, in turn


def measure(cell: tuple[int, int, int, int, int], repeats: int) -> tuple[float, float, float]:
    """Return the median seconds by PyTorch and by FBGEMM, and the median ratio."""
    tables, rows, width, bags, length = cell
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, width, generator=generator) for _ in range(tables)]
    ids = [torch.randint(rows, (tables, bags * length), generator=generator) for _ in range(SETS)]
    offsets = [torch.arange(0, bags * length, length)] * tables
    pooling = (Pooling("sum", True),) * tables
    reason = fbgemm.supports(weights, list(ids[0]), offsets, pooling, [None] * tables)
    if reason is not None:
        raise SystemExit(f"cpu_lookup: expected FBGEMM, found that {reason}")

    def run(kernel: str, turn: int) -> tuple[float, torch.Tensor]:
        given = list(ids[turn % SETS])
        start = time.perf_counter()
        out = batched_lookup(weights, given, offsets, pooling, bags, kernel=kernel)
        return time.perf_counter() - start, out

    for turn in range(SETS):
        if not torch.equal(run("reference", turn)[1], run("fbgemm", turn)[1]):
            raise SystemExit(f"cpu_lookup: expected equal outputs for {cell}, found different ones")
    pairs = [(run("reference", 2 * turn)[0], run("fbgemm", 2 * turn + 1)[0]) for turn in range(repeats)]
    theirs, ours = zip(*pairs, strict=True)
    return statistics.median(theirs), statistics.median(ours), statistics.median(a / b for a, b in pairs)


def main(argv: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=31, help="pairs a cell")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| tables x rows x width, bags x ids | PyTorch, ms | FBGEMM, ms | ratio |\n|---|---|---|---|")
    with torch.no_grad():
        for cell in CELLS:
            theirs, ours, ratio = measure(cell, args.repeats)
            tables, rows, width, bags, length = cell
            name = f"{tables} x {rows:,} x {width}, {bags:,} x {length}"
            print(f"| {name} | {1e3 * theirs:.3f} | {1e3 * ours:.3f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
