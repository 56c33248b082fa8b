"""Compile time of ``backend="dmt"`` against ``backend="inductor"`` on the same model, and the number of graphs.

    python benchmarks/compile_time.py --tables 26 100 400
    python benchmarks/compile_time.py --tables 26 100 400 --ranks 2        # and dmt on two ranks of this machine

Each measurement is a process of its own with empty caches: seconds until the first forward and backward are done, and
CPU seconds, compilers included, which other work on the machine disturbs less. The output is compared with eager
before anything is printed. Then the graphs that Dynamo makes for six batch sizes in training, and for 50 random ones in
training and evaluation. Of several ranks, which share the machine's cores, rank 0's seconds are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from models import make_batch, make_model
from torch._dynamo.utils import counters

BACKENDS = ("dmt", "inductor")


def cpu_s() -> float:
    """Return the CPU seconds of this process and of the compilers that it started."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def measure(backend: str, tables: int) -> dict[str, float]:
    """Compile in this process and return seconds and graph counts."""
    torch.set_num_threads(1)
    model = make_model(tables)
    batch = make_batch(model, 128, seed=1)
    expected = model(*batch).detach()  # before there are ranks that hold a part of the tables each
    compiled = torch.compile(model, backend=backend)
    start, cpu_start = time.perf_counter(), cpu_s()
    output = compiled(*batch)
    output.sum().backward()
    seconds = {"seconds": time.perf_counter() - start, "cpu": cpu_s() - cpu_start}
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    if tables > 26:  # inductor alone takes minutes for its second graph
        return seconds
    for size in (96, 80, 64, 48, 32):
        compiled(*make_batch(model, size, seed=size)).sum().backward()
    six = counters["stats"]["unique_graphs"]
    if backend != "dmt":
        return {**seconds, "six": six}
    draw = random.Random(0)
    for step in range(50):
        with torch.set_grad_enabled(step % 2 == 0):
            compiled(*make_batch(model, draw.choice((0, 1, draw.randrange(200))), seed=step))
    return {**seconds, "six": six, "fifty": counters["stats"]["unique_graphs"]}


def measure_here(backend: str, tables: int) -> None:
    """Print what :func:`measure` finds, where torchrun started several ranks on rank 0 alone."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    found = measure(backend, tables)
    if ranks == 1 or dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)  # gloo's threads may abort at the interpreter's own exit


def run(backend: str, tables: int, ranks: int) -> dict[str, float]:
    """Measure in fresh processes, with empty caches."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as cache:
        environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, *launch, __file__, "--measure", backend, "--tables", str(tables)]
        out = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    """Run each measurement in a fresh process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, nargs="+", default=[26, 100, 400])
    parser.add_argument("--ranks", type=int, default=1, help="measure dmt on so many ranks too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure_here(args.measure, args.tables[0])
        return
    print(
        "tables  backend  ranks  seconds  CPU seconds  graphs over 6 sizes  over 50 random batches, training and "
        "evaluation"
    )
    cells = [(backend, 1) for backend in BACKENDS] + [("dmt", args.ranks)] * (args.ranks > 1)
    for tables in args.tables:
        for backend, ranks in cells:
            found = run(backend, tables, ranks)
            seconds = f"{found['seconds']:7.1f}  {found['cpu']:11.1f}"
            counts = f"{found.get('six', '-'):>19}  {found.get('fifty', '-'):>3}"
            print(f"{tables:6}  {backend:8} {ranks:5}  {seconds}  {counts}", flush=True)


if __name__ == "__main__":
    main()
