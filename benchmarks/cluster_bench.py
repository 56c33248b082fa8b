"""TorchRec, flat PyTorch and dmt on an emulated cluster: step times, waits, and bytes across hosts.

    sudo make cluster-bench                                          # 2 hosts x 2 ranks, links of 200 Mbit/s
    sudo make cluster-bench ARGS="--topologies 2x2 4x2 --rates 100mbit 200mbit 400mbit unlimited --programs '*'"
    sudo make cluster-bench ARGS="--programs torchrec-tw* sptt towers-16 --dense-compiler eager"
    make cluster-bench ARGS="--report"                               # prints what --out already holds

Hosts are network namespaces on this machine, so ranks share its cores: differences in what is sent show, differences in
computing do not carry over to other machines. All programs train one flat DLRM from the same weights on the same
batches, and take turns. A program that is meant to be the flat model must have its outputs and losses, within the
tolerances of the package, before anything is measured. Bytes are the kernel's counts on each host's uplink.

Every rank compiles for itself, all on this machine's cores: minutes with cold caches. ``--dense-compiler eager`` takes
a fraction of that, and leaves the dense parts as the other programs have them.

Every measurement is a line of JSON in ``--out``; the same command goes on where a broken run was. ``waiting`` holds the
waits that a program makes through ``torch.distributed``; DistributedDataParallel's own are outside it and outside
``working``.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import fields
from pathlib import Path

from cluster.launch import signals_as_exceptions
from cluster.network import ClusterError
from cluster.programs import DEFAULT_PROGRAMS, PROGRAMS, select
from cluster.report import print_report
from cluster.results import Results
from cluster.session import Settings, measure_topology
from cluster.workload import Workload
from rich.console import Console

SIZES = ("tables", "rows", "dim", "samples")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=["2x2"], help="hosts x ranks a host")
    parser.add_argument("--rates", nargs="+", default=["200mbit"], help="of a host's link, as tc has it, or unlimited")
    parser.add_argument(
        "--programs", nargs="+", default=list(DEFAULT_PROGRAMS), help=f"a trailing * is a prefix: {', '.join(PROGRAMS)}"
    )
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps dropped before them")
    parser.add_argument("--alternations", type=int, default=3, help="turns of each program")
    parser.add_argument("--checked-steps", type=int, default=3, help="steps whose outputs and losses are compared")
    parser.add_argument("--dense-compiler", choices=("inductor", "aot_eager", "eager"), default="inductor")
    for size in SIZES:
        default = next(field.default for field in fields(Workload) if field.name == size)
        parser.add_argument(f"--{size}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("cluster.jsonl"))
    parser.add_argument("--timeout-s", type=int, default=7200, help="for everything; what was measured is kept")
    parser.add_argument("--report", action="store_true", help="only print what --out holds for these settings")
    args = parser.parse_args(argv)
    try:
        select(args.programs)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, print everything; return the exit status."""
    args = parse_args(argv)
    workload = Workload(**{size: getattr(args, size) for size in SIZES})
    settings = Settings(
        workload, args.rates, args.programs, args.steps, args.warmup, args.alternations, args.checked_steps,
        {"ours": {"dense_compiler": args.dense_compiler}},
    )  # fmt: skip
    results, status = Results(args.out, settings.setup()), 0
    if not args.report:
        with signals_as_exceptions():
            signal.alarm(args.timeout_s)
            try:
                for layout in args.topologies:
                    measure_topology(layout, settings, results, lambda text: print(text, flush=True))
            except ClusterError as error:
                print(error, file=sys.stderr)
                status = 1
            finally:
                signal.alarm(0)
    if status == 0:
        print_report(results, args.topologies, args.rates, Console(width=200))
    return status


if __name__ == "__main__":
    sys.exit(main())
