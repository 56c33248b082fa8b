"""One process a rank in the hosts' namespaces, asked to work through its standard input, each time with a deadline.

A request and its answer are one line of JSON each. Only processes started here are ended, by their ids.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.network import ClusterError, Network, address

PORT = 29500
LOG_TAIL = 3000  # characters of a failed rank's log that an error repeats
Answer = dict[str, Any]


def rank_environ(rank: int, hosts: int, local_ranks: int) -> dict[str, str]:
    """Return the environment of a rank: torchrun's variables, gloo on the host's link, one thread."""
    host, local_rank = divmod(rank, local_ranks)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(hosts * local_ranks),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_ranks),
        "GROUP_RANK": str(host),
        "GROUP_WORLD_SIZE": str(hosts),
        "MASTER_ADDR": address(0),
        "MASTER_PORT": str(PORT),
        # An address of eth0 is what ranks of other hosts can reach; the kernel takes its own addresses over loopback.
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


class Ranks:
    """The processes of a run; made by ``ranks``."""

    def __init__(self, network: Network, local_ranks: int, logs: Path, command: Sequence[str], cwd: Path) -> None:
        hosts = len(network.hosts)
        self.logs = logs
        self.processes: list[subprocess.Popen[bytes]] = []
        self._buffers: list[bytes] = []
        try:
            for rank in range(hosts * local_ranks):
                with self._log(rank).open("wb") as log:
                    process = subprocess.Popen(
                        ["ip", "netns", "exec", network.hosts[rank // local_ranks], *command],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        cwd=cwd,
                        env=os.environ | rank_environ(rank, hosts, local_ranks),
                        start_new_session=True,  # Ctrl-C reaches this process, which then ends them in order
                    )
                self.processes.append(process)
                self._buffers.append(b"")
        except BaseException:
            self.end()
            raise

    def ask(self, request: dict[str, Any], timeout_s: float) -> list[Answer]:
        """Send a request to every rank and return their answers.

        Raises:
            ClusterError: a rank ended, failed, or did not answer in time; with the end of its log.
        """
        for rank, process in enumerate(self.processes):
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._error(rank, request, "an end of the process") from None
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Answer] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self.processes):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    late = min(set(range(len(self.processes))) - set(answers))
                    raise self._error(late, request, f"none after {timeout_s:g} s")
                for key, _ in ready:
                    self._read(key.data, request, answers)
                    if key.data in answers:  # it may end now; its next request would say so
                        selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self.processes))]

    def _read(self, rank: int, request: dict[str, Any], answers: dict[int, Answer]) -> None:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        part = os.read(stdout.fileno(), 1 << 16)
        if not part:
            raise self._error(rank, request, "an end of the process")
        line, found, rest = (self._buffers[rank] + part).partition(b"\n")
        if not found:
            self._buffers[rank] = line
            return
        self._buffers[rank] = rest
        answer = json.loads(line)
        if "failed" in answer:
            raise self._error(rank, request, answer["failed"])
        answers[rank] = answer

    def end(self) -> None:
        """End all processes and their children: asked first, then by force."""
        for sign, wait_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, sign)  # a session of its own, so its id is its group's
            deadline = time.monotonic() + wait_s
            while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
                time.sleep(0.05)
        for process in self.processes:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):  # a request that an ended process never read
                        stream.close()

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank{rank}.log"

    def _error(self, rank: int, request: dict[str, Any], found: str) -> ClusterError:
        log = self._log(rank).read_text(errors="replace")[-LOG_TAIL:]
        return ClusterError(
            f"cluster: expected an answer of rank {rank} to {request}, found {found}; its log ends:\n{log}"
        )


@contextmanager
def ranks(
    network: Network, local_ranks: int, command: Sequence[str] | None = None, cwd: Path | None = None
) -> Iterator[Ranks]:
    """Start the ranks of a network, and end them on the way out.

    Args:
        network: the hosts.
        local_ranks: ranks a host.
        command: what a rank runs, by default ``cluster.rank``; it answers each line of its standard input.
        cwd: where it runs.
    """
    with TemporaryDirectory(prefix="cluster-logs-") as logs:
        benchmarks = Path(__file__).resolve().parents[1]
        started = Ranks(
            network, local_ranks, Path(logs), command or (sys.executable, "-m", "cluster.rank"), cwd or benchmarks
        )
        try:
            yield started
        finally:
            started.end()


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Turn the signals that end a program into exceptions, so that what was started is ended on the way out.

    Raises:
        SystemExit: the user or the machine ends the program.
        ClusterError: the alarm that was set with ``signal.alarm`` rang.
    """

    def leave(number: int, frame: Any) -> None:
        for each in ends:
            signal.signal(each, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the clearing up
        if number == signal.SIGALRM:
            raise ClusterError(
                "cluster: expected everything to be measured by now, found that the time given for it is over; what "
                "was measured is kept: start the same command again, or raise --timeout-s"
            )
        raise SystemExit(128 + number)

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = {each: signal.signal(each, leave) for each in ends}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
