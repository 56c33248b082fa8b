"""Hosts as network namespaces, joined by a bridge, with rate-limited links and the kernel's byte counters.

The network needs no program of its own to run and leaves nothing behind: it is taken down on the way out, also after
an exception or a signal. What a killed run left carries its process id and start time in its name, and the next run
removes it, with the processes in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PREFIX = "dmtbench"
UNLIMITED = "unlimited"
SUBNET = "10.77.0"
BURST = "32kb"  # what may pass at once after an idle spell
QUEUE = "32mb"  # longer than the messages that wait in it, so that nothing is dropped
SEGMENT_BYTES = 16384  # a larger one would not pass a bucket of 32 kB
Command = tuple[str, ...]
_NAME = re.compile(rf"{PREFIX}-(\d+)-(\d+)-\w+")


class ClusterError(RuntimeError):
    """The emulated cluster could not be set up, or a rank did not do what it was asked."""


def run(command: Sequence[str], check: bool = True) -> str:
    """Run a command to its end and return what it printed.

    Raises:
        ClusterError: it failed, with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if check and done.returncode:
        raise ClusterError(
            f"network: expected '{' '.join(command)}' to succeed, found exit status {done.returncode}: "
            f"{done.stderr.strip()}; check that this machine allows network namespaces and tbf"
        )
    return done.stdout


def missing() -> str | None:
    """Return what keeps this process from building a network; ``None`` where nothing does."""
    if os.geteuid() != 0:
        return "needs root"
    tools = [tool for tool in ("ip", "tc", "sysctl") if shutil.which(tool) is None]
    if tools:
        return f"needs {', '.join(tools)} (packages iproute2 and procps)"
    if subprocess.run(("unshare", "--net", "true"), capture_output=True).returncode:
        return "needs permission to make network namespaces"
    return None


def address(host: int) -> str:
    """Return the address of a host's ``eth0``."""
    return f"{SUBNET}.{host + 1}"


def setup_commands(switch: str, hosts: Sequence[str]) -> list[Command]:
    """Return what builds the namespaces, the bridge and a link to each host."""
    commands: list[Command] = []
    for name in (switch, *hosts):
        commands += [("ip", "netns", "add", name), ("ip", "-n", name, "link", "set", "lo", "up")]
    commands += [
        ("ip", "-n", switch, "link", "add", "br0", "type", "bridge"),
        ("ip", "-n", switch, "link", "set", "br0", "up"),
    ]
    segment = ("gso_max_size", str(SEGMENT_BYTES))
    for index, name in enumerate(hosts):
        peer = ("type", "veth", "peer", "name", "eth0", "netns", name)
        commands += [
            ("ip", "-n", switch, "link", "add", f"p{index}", *peer),
            ("ip", "-n", switch, "link", "set", f"p{index}", *segment, "master", "br0", "up"),
            ("ip", "-n", name, "addr", "add", f"{address(index)}/24", "dev", "eth0"),
            ("ip", "-n", name, "link", "set", "eth0", *segment, "up"),
            # After a pause between steps a connection goes on as fast as it was; reno shares a slow link evenly.
            ("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.tcp_slow_start_after_idle=0",
             "net.ipv4.tcp_congestion_control=reno"),
        ]  # fmt: skip
    return commands


def rate_commands(namespace: str, device: str, rate: str) -> list[Command]:
    """Return what limits the rate at which a device sends: ``tc``'s notation, or ``unlimited``."""
    change = ("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root")
    if rate == UNLIMITED:
        return [(*change, "noqueue")]
    return [(*change, "tbf", "rate", rate, "burst", BURST, "limit", QUEUE)]


class Network:
    """Hosts of one run; made by ``network``."""

    def __init__(self, hosts: int) -> None:
        mark = f"{PREFIX}-{os.getpid()}-{_start_time(os.getpid())}"
        self.switch = f"{mark}-switch"
        self.hosts = [f"{mark}-h{host}" for host in range(hosts)]

    def set_rate(self, rate: str) -> None:
        """Limit every host's uplink and downlink."""
        for index, name in enumerate(self.hosts):
            for command in rate_commands(name, "eth0", rate) + rate_commands(self.switch, f"p{index}", rate):
                run(command)

    def sent_bytes(self) -> list[int]:
        """Return what each host has sent over its uplink so far, by the kernel's counter, headers included."""
        links = [json.loads(run(("ip", "-n", name, "-j", "-s", "link", "show", "eth0"))) for name in self.hosts]
        return [int(link[0]["stats64"]["tx"]["bytes"]) for link in links]


@contextmanager
def network(hosts: int) -> Iterator[Network]:
    """Build the network of ``hosts`` hosts, and take it down on the way out.

    Raises:
        ClusterError: the machine or the user cannot build one.
    """
    reason = missing()
    if reason is not None:
        raise ClusterError(
            f"network: expected a Linux machine that lets this user make network namespaces, found that it {reason}; "
            "run as root (sudo make cluster-bench), in a container with --privileged"
        )
    remove_left_over()
    built = Network(hosts)
    try:
        for command in setup_commands(built.switch, built.hosts):
            run(command)
        yield built
    finally:
        for name in (*built.hosts, built.switch):
            _remove(name)


def remove_left_over() -> list[str]:
    """Remove the namespaces of runs that were killed, and end the processes in them; return their names."""
    removed = []
    for line in run(("ip", "netns", "list")).splitlines():
        name = line.split()[0] if line.strip() else ""
        found = _NAME.fullmatch(name)
        if found is not None and _start_time(int(found[1])) != found[2]:
            _remove(name)
            removed.append(name)
    return removed


def _remove(name: str) -> None:
    """End what still runs in a namespace, by id, and delete it."""
    for _ in range(20):
        pids = run(("ip", "netns", "pids", name), check=False).split()
        for pid in map(int, pids):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not pids:
            break
        time.sleep(0.1)
    run(("ip", "netns", "del", name), check=False)


def _start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; ``None`` where there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return status.rpartition(")")[2].split()[19]  # its name, in brackets, may hold spaces
