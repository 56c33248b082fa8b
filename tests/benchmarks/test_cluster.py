"""The emulated cluster: what it runs, resumes, predicts and prints; real namespaces where they can be made."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cluster_bench
import pytest
from cluster import network as net
from cluster.launch import rank_environ, ranks, signals_as_exceptions
from cluster.network import ClusterError, network, rate_commands, remove_left_over, setup_commands
from cluster.prediction import predict, ring_bytes
from cluster.programs import PROGRAMS, select
from cluster.rank import Rank
from cluster.report import predicted_bytes, print_report, references
from cluster.results import Cell, Measurement, Results, cells, speedup, typical_s
from cluster.session import check
from cluster.waits import Waits
from cluster.workload import Workload, dense_bytes, make_batches
from rich.console import Console

from dmt_compile.topology import Topology
from tests.ranks import run_ranks, values

WHY_NOT = net.missing()
needs_root = pytest.mark.skipif(WHY_NOT is not None, reason=f"emulated hosts: this machine or user {WHY_NOT}")
TINY = ("--tables", "4", "--rows", "50", "--dim", "8", "--samples", "16")


def measured(program: str, alternation: int, seconds: float, **more: Any) -> Measurement:
    """Return a measurement of three steps around ``seconds``."""
    steps = [seconds, seconds * 3, seconds / 3]
    return Measurement(
        Cell("2x2", "200mbit", program, alternation), steps, 0.1, {"all_reduce": 0.2}, [5e6, 7e6], **more
    )


# ------------------------------------------------------------------------------------------------------------- commands


def test_both_directions_of_a_link_are_limited_and_unlimited_removes_the_limit() -> None:
    (limit,) = rate_commands("h0", "eth0", "200mbit")
    assert " ".join(limit) == "tc -n h0 qdisc replace dev eth0 root tbf rate 200mbit burst 32kb limit 32mb"
    assert rate_commands("h0", "eth0", "unlimited")[0][-1] == "noqueue"
    devices: list[tuple[str, ...]] = []
    built = net.Network(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net, "run", lambda command: devices.append((command[2], command[6])))
        built.set_rate("1gbit")
    assert devices == [
        (built.hosts[0], "eth0"), (built.switch, "p0"), (built.hosts[1], "eth0"), (built.switch, "p1")
    ]  # fmt: skip


def test_every_host_gets_an_address_and_a_port_of_the_bridge() -> None:
    commands = [" ".join(command) for command in setup_commands("s", ["h0", "h1"])]
    assert [c.split()[-1] for c in commands if c.startswith("ip netns add")] == ["s", "h0", "h1"]
    for index in range(2):
        assert f"ip -n h{index} addr add 10.77.0.{index + 1}/24 dev eth0" in commands
        assert f"ip -n s link set p{index} gso_max_size 16384 master br0 up" in commands


def test_ranks_get_torchruns_environment() -> None:
    environ = rank_environ(5, hosts=4, local_ranks=2)
    numbers = {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")}
    assert list(numbers.values()) == ["5", "8", "1", "2", "2"]
    assert environ["MASTER_ADDR"] == "10.77.0.1"


def test_without_root_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with (
        pytest.raises(ClusterError, match=r"expected a Linux machine .* found that it needs root; run as root"),
        network(2),
    ):
        pass


def test_a_failing_command_is_named() -> None:
    with pytest.raises(ClusterError, match="expected 'false' to succeed, found exit status 1"):
        net.run(("false",))


def test_signals_and_the_alarm_end_in_exceptions() -> None:
    @signals_as_exceptions()
    def send(number: int) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    with pytest.raises(SystemExit, match="143"):
        send(signal.SIGTERM)
    with pytest.raises(ClusterError, match="the time given for it is over"):
        send(signal.SIGALRM)


# ------------------------------------------------------------------------------------------------ programs, predictions


def build_and_compare(rank: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Build programs as a rank of the cluster does, and compare each with the one that it must equal."""
    worker = Rank()
    worker.workload = Workload(tables=4, rows=50, dim=8, samples=16, bottom=(8,), top=(8,))
    worker.defaults = {"ours": {"dense_compiler": "eager"}}
    worker.batches = make_batches(worker.workload, rank)
    found: dict[str, Any] = {}
    for name in names:
        built = worker.build(name)
        if "unavailable" not in built:
            worker.observe(name, 3)
            same = PROGRAMS[name].same_as is not None
            found[name] = (worker.compare(name) if same else {}) | worker.measure(name, 1)
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_programs_train_the_flat_model() -> None:
    names = ("flat", "sptt", "torchrec-twrw-pipeline-fp16")
    outcomes = run_ranks(build_and_compare, 2, names, environ={"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"})
    for found in values(outcomes):
        assert tuple(found) == names
        for name in names:
            assert found[name].get("error", 0.0) <= found[name].get("limit", 0.0), name
            assert len(found[name]["step_s"]) == 1
        assert set(found["sptt"]["ledger_bytes"]) >= {"ids", "peer"}


def test_a_program_brings_the_one_that_it_must_equal() -> None:
    assert [program.name for program in select(["sptt", "towers-16-bf16"])] == [
        "flat",
        "sptt",
        "towers-16",
        "towers-16-bf16",
    ]
    assert [program.name for program in select(["torchrec-tw*"])][:2] == ["flat", "torchrec-tw"]
    assert len(select(["*"])) == len(PROGRAMS)
    with pytest.raises(ValueError, match=r"expected some of flat, .* found 'horovod'"):
        select(["horovod"])


def test_predictions_are_the_bytes_of_the_papers_cost_analysis() -> None:
    workload = Workload(tables=4, rows=50, dim=8, samples=16)
    topology = Topology.parse("2x2")
    # Each of 4 ranks has 16 samples of 4 tables; two of the four owners are on the other host; both ways; by host.
    embeddings = 4 * 16 * 4 * 8 * 4 // 2 * 2 / 2
    ids = 4 * 16 * 4 * 8 // 2 / 2  # int64 ones, or int32 ones with their bags' lengths
    dense = 2 * dense_bytes(workload) * 3 / 4
    assert predict(PROGRAMS["flat"], workload, "2x2") == {"embeddings": embeddings + ids, "dense": dense}
    assert predict(PROGRAMS["torchrec-tw-fp16"], workload, "2x2") == {
        "embeddings": embeddings / 2 + 1.5 * ids,
        "dense": dense,
    }
    assert predict(PROGRAMS["sptt"], workload, "2x2") == {"embeddings": embeddings + ids}
    assert predict(PROGRAMS["torchrec-planner"], workload, "2x2") is None
    assert ring_bytes(100, topology) == 150
    assert ring_bytes(100, Topology(1, 4)) == 0
    ours = measured(
        "sptt", 0, 1.0, ledger_bytes={"peer": 3.0, "dense_gradients": 4.0}, predicted_bytes={"embeddings": 2.0}
    )
    assert predicted_bytes(ours) == 6.0


def test_a_wrong_program_is_not_measured() -> None:
    right, wrong = {"error": 1e-7, "limit": 1e-4}, {"error": float("inf"), "limit": 1e-4}
    assert check(PROGRAMS["sptt"], [right, right]) == right
    with pytest.raises(
        ClusterError, match=r"expected the outputs and losses of flat within 1.0e-04 .* difference of inf"
    ):
        check(PROGRAMS["sptt"], [right, wrong])


def test_waits_are_counted_when_a_collective_is_waited_for() -> None:
    class Work:
        def wait(self) -> str:
            time.sleep(0.02)
            return "done"

    waits = Waits()
    assert waits.timed("all_reduce", lambda tensor, async_op: Work())([], async_op=True).wait() == "done"
    assert waits.timed("broadcast", lambda: None)() is None
    assert waits.seconds["all_reduce"] >= 0.02 > waits.seconds["broadcast"]


# -------------------------------------------------------------------------------------------------------------- results


def test_programs_take_turns() -> None:
    order = [cell.program for cell in cells("2x2", ["100mbit"], ["a", "b"], alternations=2)]
    assert order == ["a", "b", "a", "b"]


def test_results_are_taken_up_again_in_the_same_setup_only(tmp_path: Path) -> None:
    path, setup = tmp_path / "results.jsonl", {"workload": {"bottom": (4, 2)}, "steps": 3}
    first = measured("flat", 0, 1.0, predicted_bytes={"embeddings": 1.0})
    Results(path, setup).add(first)
    again = Results(path, setup)
    assert again.of("2x2", "200mbit") == {"flat": [first]}
    wanted = cells("2x2", ["200mbit"], ["flat"], alternations=2)
    assert again.missing(wanted) == wanted[1:]
    assert Results(path, setup | {"steps": 4}).missing(wanted) == wanted


def test_speeds_are_compared_within_an_alternation() -> None:
    slow = [measured("flat", k, seconds) for k, seconds in enumerate((2.0, 20.0, 2.0))]
    fast = [measured("sptt", k, seconds) for k, seconds in enumerate((1.0, 10.0, 4.0))]
    assert typical_s(slow) == 2.0
    assert speedup(fast, slow) == 2.0
    assert speedup(fast, []) is None


def test_the_report_compares_with_torchrecs_best(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl", {})
    for name, seconds in (("torchrec-tw", 1.0), ("torchrec-twrw", 2.0), ("torchrec-tw-fp16", 0.8), ("towers-16", 0.5)):
        results.add(measured(name, 0, seconds, ledger_bytes={"peer": 3e6} if name == "towers-16" else {}))
    assert references(results.of("2x2", "200mbit")) == ("torchrec-tw", "torchrec-tw-fp16")
    console = Console(width=200, record=True, file=io.StringIO())
    print_report(results, ["2x2", "4x2"], ["200mbit"], console)
    row = next(line for line in console.export_text().splitlines() if "towers-16" in line)
    assert [part.strip() for part in row.split("│")[2:6]] == ["500.0", "500 - 500", "2.00", "1.60"]


# ---------------------------------------------------------------------------------------------------------- real hosts


@needs_root
def test_a_program_on_real_namespaces_sends_what_was_predicted(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    arguments = ["--topologies", "2x1", "--rates", "400mbit", "unlimited", "--programs", "flat", *TINY]
    assert cluster_bench.main([*arguments, "--steps", "3", "--alternations", "1", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["cell"]["rate"], line["cell"]["program"]) for line in lines] == [
        ("400mbit", "flat"),
        ("unlimited", "flat"),
    ]
    for line in lines:
        predicted = predicted_bytes(Measurement(**{k: v for k, v in line.items() if k != "setup"}))
        assert predicted is not None
        sent = sum(line["sent_bytes"]) / 2
        assert predicted < sent < predicted * 1.2, line["cell"]
    assert not [name for name in net.run(("ip", "netns", "list")).split() if name in net.Network(2).hosts]


@needs_root
def test_a_rank_that_ends_or_hangs_is_an_error_with_its_log() -> None:
    answer = (
        "import sys\nfor line in sys.stdin:\n    print('{}', flush=True)\n    print('bye', file=sys.stderr)\n    break"
    )
    hang = "import sys, time\nsys.stdin.readline()\ntime.sleep(60)"
    with network(1) as hosts:
        with ranks(hosts, 2, (sys.executable, "-c", answer)) as group:
            assert group.ask({"do": "greet"}, 20) == [{}, {}]
            with pytest.raises(
                ClusterError, match=r"(?s)rank [01] to .* found an end of the process; its log ends:\nbye"
            ):
                group.ask({"do": "greet"}, 20)
        with ranks(hosts, 1, (sys.executable, "-c", hang)) as group:
            with pytest.raises(ClusterError, match=r"rank 0 to .* found none after 0.2 s"):
                group.ask({"do": "greet"}, 0.2)
            process = group.processes[0]
        assert process.poll() is not None


@needs_root
def test_what_a_killed_run_left_is_removed() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    name = f"{net.PREFIX}-{ended.pid}-1-h0"
    net.run(("ip", "netns", "add", name))
    left = subprocess.Popen(["ip", "netns", "exec", name, "sleep", "60"])
    deadline = time.monotonic() + 10
    while not net.run(("ip", "netns", "pids", name)) and time.monotonic() < deadline:
        time.sleep(0.05)
    with network(1) as running:  # its own are not touched
        assert name not in net.run(("ip", "netns", "list"))
        assert remove_left_over() == []
        assert running.hosts[0] in net.run(("ip", "netns", "list"))
    assert left.wait(10) == -signal.SIGKILL
