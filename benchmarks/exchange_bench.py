"""An exchange between hosts of which one is late: gloo's all-to-all beside the messages that dmt sends.

    sudo python benchmarks/exchange_bench.py
    sudo python benchmarks/exchange_bench.py --rate 100mbit --late-ms 0 1 10

2 hosts x 2 ranks of the emulated cluster (``cluster_bench.py``); every rank exchanges with its peer. Printed is the
time from when the last rank begins until the last has everything, the median of all turns, beside the time that the
bytes alone take on a host's link, in both directions at once. What arrives is checked.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys

from cluster.launch import ranks, signals_as_exceptions
from cluster.network import ClusterError, network
from rich.console import Console
from rich.table import Table

LAYOUT = "2x2"
LOCAL_RANKS = 2
WAYS = ("all_to_all_single", "messages")
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
TIMEOUT_S = 300.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="200mbit", help="of a host's link: a number and kbit, mbit or gbit")
    parser.add_argument("--megabytes", type=float, default=1.7, help="that each rank sends to its peer")
    parser.add_argument("--late-ms", type=float, nargs="+", default=[0, 5, 20], help="by how much one host is late")
    parser.add_argument("--times", type=int, default=20, help="exchanges of each kind")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"\d+(kbit|mbit|gbit)", args.rate):
        parser.error(f"--rate: expected a number and kbit, mbit or gbit, found {args.rate!r}")
    return args


def wire_ms(rate: str, megabytes: float) -> float:
    """Return how long a host's bytes take on its link."""
    number, unit = re.fullmatch(r"(\d+)(\w+)", rate).groups()  # type: ignore[union-attr]
    return 1e3 * LOCAL_RANKS * megabytes * 8e6 / (float(number) * UNITS[unit])


def main(argv: list[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    args = parse_args(argv)
    table = Table("late by, ms", *(f"{way}, ms" for way in WAYS), "bytes alone, ms")
    try:
        with (
            signals_as_exceptions(),
            network(2) as net,
            ranks(net, LOCAL_RANKS, (sys.executable, "-m", "cluster.exchange")) as group,
        ):
            group.ask({"do": "start", "layout": LAYOUT, "megabytes": args.megabytes}, TIMEOUT_S)
            net.set_rate(args.rate)
            for late_ms in args.late_ms:
                medians = []
                for way in WAYS:
                    request = {"do": "exchange", "how": way, "late_ms": late_ms, "times": args.times}
                    spans = [answer["spans"] for answer in group.ask(request, TIMEOUT_S)]
                    turns = zip(*spans, strict=True)
                    took = [max(end for _, end in turn) - max(begin for begin, _ in turn) for turn in turns]
                    medians.append(1e3 * statistics.median(took))
                cells = (*medians, wire_ms(args.rate, args.megabytes))
                table.add_row(f"{late_ms:g}", *(f"{cell:.0f}" for cell in cells))
            group.ask({"do": "stop"}, TIMEOUT_S)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
