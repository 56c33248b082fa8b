"""Every Triton kernel beside eager PyTorch, Inductor and FBGEMM, and beside what the card can do.

    python benchmarks/kernels.py                                   # about 30 cells, on a GPU
    python benchmarks/kernels.py --cells 'lookup-*' 'dot-bwd-*' --autotune --json kernels.jsonl
    python benchmarks/kernels.py --sweep --seconds 0.5             # hundreds of cells, an hour or more
    python benchmarks/kernels.py --list [--sweep]
    python benchmarks/kernels.py --device cpu --tiny               # kernels interpreted, numbers checked, no speeds

First the card's ceilings are measured: a copy inside its memory (4 GiB, read and written bytes counted) and products of
8192 x 8192 random matrices in bf16, TF32 and fp32. A cell's floor is the larger of its bytes over the one and its
operations over the other, both counted by formula from the sizes and, for tables, the distinct rows that ids name.

In each cell every contestant has to give the right numbers, against float64 and within the package's tolerances (packed
rows: bit by bit), from memory filled with NaN, before any is timed; one that does not has no speed. Then they take
turns; each turn begins with an overwritten L2 cache and a filled launch queue, is timed by events on the GPU, and the
median counts. What a call costs the host is told apart. Float32 products are TF32 where the cell's name says so.

Exits with 1 if something failed, and with 2 for a bad command line or where there is no GPU. After an error that makes
the GPU unusable for the process, it begins again behind the cell that caused it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from cell_list import select
from failures import failure
from fbgemm_tables import installed
from gpu_timing import Ceilings, Timing, ceilings, device_line, measure, poison, set_precision
from kernel_cells import Cell, Contestant, Cost, NotHere
from kernel_report import Measured, header, row

from dmt_compile.kernels.triton_support import interpreted


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["*"], help="names or patterns; see --list")
    parser.add_argument("--contestants", nargs="+", choices=("eager", "inductor", "fbgemm"), help="beside dmt; all")
    parser.add_argument("--sweep", action="store_true", help="the cells of the long sweep too")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--autotune", action="store_true", help="Inductor with max-autotune as well")
    parser.add_argument("--seconds", type=float, default=1.5, help="of timing for each cell")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--json", type=Path, help="append a line for each cell to this file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="cells small enough for Triton's interpreter")
    parser.add_argument("--after", help="begin behind this cell: what a run does that takes up a broken one")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu: expected --tiny, found none; interpreted kernels take hours for real sizes")
    if args.device == "cpu" and not interpreted():
        parser.error("--device cpu: expected TRITON_INTERPRET=1 in the environment, found it unset beside a GPU")
    try:
        args.selected = select(args.cells, args.sweep)
    except ValueError as error:
        parser.error(f"--cells: {error}")
    if not args.list and args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU, found none; --device cpu --tiny checks numbers alone")
    args.contestants = args.contestants or ["eager", "inductor", *(["fbgemm"] if installed() else [])]
    args.contestants += ["inductor-max"] * args.autotune + ["dmt"]
    return args


def run_cell(cell: Cell, contestants: Sequence[str], device: torch.device, seconds: float) -> Measured:
    """Check and time a cell; what goes wrong becomes a note."""
    torch.compiler.reset()  # what the cell before compiled holds its tables
    gc.collect()
    set_precision(cell.unit or "fp32")
    notes: dict[str, str] = {}
    errors: dict[str, float] = {}
    ready: dict[str, Contestant] = {}
    cost: Cost | None = None
    timings: Mapping[str, Timing] = {}
    try:
        work = cell.make(device)
        cost = work.cost
        for name in (name for name in contestants if name in work.makers):
            try:
                ready[name] = work.makers[name]()
                poison(device)
                errors[name] = work.error(ready[name].result())
                if not errors[name] <= 1:
                    notes[name] = f"FAILED: error {errors[name]:.3g} times what is allowed"
                    del ready[name]
                elif told := ready[name].told():
                    notes[name] = told
            except NotHere as reason:
                notes[name] = str(reason)
            except torch.OutOfMemoryError:
                ready.pop(name, None)
                notes[name] = f"{'FAILED: ' if name == 'dmt' else ''}out of memory"
            except Exception as error:
                ready.pop(name, None)
                notes[name] = failure(error)
        if device.type == "cuda" and ready:
            timings = measure({name: contestant.run for name, contestant in ready.items()}, device, seconds)
    except Exception as error:
        notes["cell"] = failure(error)
    return Measured(cell.name, cost, errors, timings, notes)


def usable(device: torch.device) -> bool:
    """Tell whether the GPU still answers this process; an illegal access ends that for good."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    args = parse_args(argv)
    if args.list:
        print("\n".join(cell.name for cell in args.selected))
        return 0
    began, device = time.monotonic(), torch.device(args.device)
    card: Ceilings | None = ceilings(device) if args.device == "cuda" else None
    cells = [*{cell.name: cell for cell in (c.tiny() if args.tiny else c for c in args.selected)}.values()]
    if args.after is None:
        print(
            device_line(device), "", *([str(card), ""] if card else []), *header(args.contestants), sep="\n", flush=True
        )
    else:
        cells = cells[[cell.name for cell in cells].index(args.after) + 1 :]
    failed = args.after is not None
    for cell in cells:
        if time.monotonic() - began > args.limit_s:
            print(row(Measured(cell.name, None, notes={"cell": "not run: no time left"}), args.contestants, card))
            continue
        measured = run_cell(cell, args.contestants, device, args.seconds)
        print(row(measured, args.contestants, card), flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(measured.as_json(card)) + "\n")
        failed = failed or measured.failed
        if not usable(device):
            begin_again(
                list(sys.argv[1:] if argv is None else argv), cell.name, args.limit_s - (time.monotonic() - began)
            )
    return int(failed)


def begin_again(argv: list[str], behind: str, limit_s: float) -> None:
    """Become a new process that runs the cells behind one, with what is left of the time."""
    rest = ["--after", behind, "--limit-s", str(limit_s)]
    os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), *argv, *rest])


if __name__ == "__main__":
    sys.exit(main())
