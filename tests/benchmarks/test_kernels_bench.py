"""The kernel benchmark: what it counts, that wrong numbers have no speed, its table, and tiny cells interpreted."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import cell_list
import gpu_timing
import pytest
import torch
from cell_list import CELLS, select
from dense_cells import Cross, Dot, cross_cost, dot_cost
from fbgemm_tables import installed
from gpu_timing import Ceilings, Timing
from kernel_cells import Contestant, Cost, NotHere, Work, largest_error
from kernel_report import Measured, header, row
from lookup_cells import LookupBackward, LookupForward, backward_cost, forward_cost
from lookup_data import Data, Lookups, draw, most_frequent, pooled, summed_gradient
from pack_cells import Pack, pack_cost
from step_cells import TableStep, UpdateRows, step_cost, update_cost

from benchmarks import kernels as bench
from dmt_compile.kernels.triton_support import operators

CPU = torch.device("cpu")
OPERATORS = {
    LookupForward: "batched_lookup",
    LookupBackward: "batched_lookup",
    UpdateRows: "update_rows",
    Dot: "dot_interaction",
    Cross: "cross_layer",
    Pack: "pack_rows",
}


# ------------------------------------------------------------------------------------------ what is counted


def data_by_hand() -> Data:
    """Return two tables of 4 rows x 2; bags [0, 1, 1], [3] and [2], [2, 2]: 7 ids, of 3 + 1 distinct rows."""
    tables = [torch.arange(8.0).view(4, 2), torch.arange(8.0, 16.0).view(4, 2)]
    ids = [torch.tensor([0, 1, 1, 3]), torch.tensor([2, 2, 2])]
    return Data(tables, ids, [torch.tensor([0, 3]), torch.tensor([0, 1])])


def test_lookups_are_counted_and_computed_as_by_hand() -> None:
    data = data_by_hand()
    assert (data.id_count, data.distinct_count(), most_frequent(data.ids)) == (7, 4, 3)
    ids, offsets = data.joined()
    assert ids.tolist() == [0, 1, 1, 3, 2, 2, 2]
    assert offsets.tolist() == [0, 3, 4, 5, 7]
    assert pooled(data.tables[0], data.ids[0], data.offsets[0]).tolist() == [[4, 7], [6, 7]]
    rows, summed = summed_gradient(torch.tensor([[1.0, 2.0], [10.0, 20.0]]), data.ids[0], data.offsets[0])
    assert rows.tolist() == [0, 1, 3]
    assert summed.tolist() == [[1, 2], [2, 4], [10, 20]]


def test_costs_of_lookups_are_those_counted_by_hand() -> None:
    size = Lookups(tables=2, rows=4, width=2, bags=2)  # a row has 8 bytes, ids and offsets have 8 each
    # 7 ids, 4 offsets, 4 distinct rows, 4 pooled rows
    assert forward_cost(size, 7, 4) == Cost(56 + 32 + 32 + 32, 14, None, 56 + 32 + 56 + 32)
    # 7 ids, 4 offsets, 4 rows of the gradient, 4 sums with their row numbers; one read an id where nothing is cached
    assert backward_cost(size, 7, 4) == Cost(56 + 32 + 32 + 64, 14, None, 56 + 32 + 56 + 64)
    # ids and offsets twice, pooled rows and their gradient, 4 rows read, read again and written, 4 states in and out
    assert step_cost(size, 7, 4) == Cost(112 + 64 + 64 + 96 + 32, 28, None, 112 + 64 + 64 + 2 * 56 + 64 + 32)
    assert update_cost(3, 2, 4) == Cost(3 * (8 + 8 + 8 + 8 + 4 + 4), 36)
    half = replace(size, dtype="bf16")
    assert forward_cost(half, 7, 4).moved_bytes == 56 + 32 + 16 + 16


def test_costs_of_dense_operators_are_those_counted_by_hand() -> None:
    # 5 samples of 3 vectors x 2 and a leading one: 3 pairs; 6 + 2 read and 2 + 3 written
    assert dot_cost(5, 3, 2, "tf32", False) == Cost(5 * 13 * 4, 5 * 3 * 4, "tf32")
    # 6 vectors' elements and 3 gradients read, 6 written; twice the products
    assert dot_cost(5, 3, 2, "bf16", True) == Cost(5 * 15 * 2, 5 * 3 * 8, "bf16")
    assert cross_cost(5, 3, 4, False) == Cost((3 * 15 + 3 + 15) * 4, 45)
    assert cross_cost(5, 3, 2, True) == Cost((3 * 15 + 3 + 2 * 15 + 3) * 2, 75)
    assert pack_cost(5, 6, "int8", 4) == Cost(5 * (24 + 6 + 4), 30)
    assert pack_cost(5, 6, "bfloat16", 4) == Cost(5 * (24 + 12), 30)


def test_ids_are_rows_and_a_power_law_names_few_of_them_often() -> None:
    size = Lookups(tables=2, rows=1000, width=2, bags=300)
    uniform, power = (draw(replace(size, law=law), CPU) for law in ("uniform", "power"))
    for data in (uniform, power):
        for ids, offsets in zip(data.ids, data.offsets, strict=True):
            assert 0 <= int(ids.min()) <= int(ids.max()) < 1000
            lengths = torch.diff(offsets, append=torch.tensor([len(ids)]))
            assert int(lengths.min()) >= 1
            assert int(lengths.max()) <= 19
    assert most_frequent(power.ids) > 5 * most_frequent(uniform.ids)
    assert not torch.equal(power.tables[0], power.tables[1])


# ------------------------------------------------------------------------------------------ gate and timing


@dataclass(frozen=True)
class Made:
    """A cell of given contestants; the right outcome is 1."""

    makers: Mapping[str, Callable[[], Contestant]]
    name: str = "made"
    unit: None = None

    def tiny(self) -> Made:
        return self

    def make(self, device: torch.device) -> Work:
        right = torch.ones(3)
        return Work(Cost(3000, 7), self.makers, lambda found: largest_error([found], [right], 1e-3))


def not_here() -> Contestant:
    raise NotHere("not here")


def broken() -> Contestant:
    raise ValueError("a|b\nc")


def test_what_is_wrong_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(runs: Mapping[str, Any], device: torch.device, seconds: float) -> dict[str, Timing]:
        measured.extend(runs)
        return {name: Timing(0.002, 0.01, 0.001, 10) for name in runs}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "poison", lambda device: None)
    makers = {
        "eager": lambda: Contestant(lambda: torch.ones(3)),
        "inductor": lambda: Contestant(lambda: torch.tensor([1, 1, torch.nan])),
        "fbgemm": not_here,
        "dmt": lambda: Contestant(lambda: torch.tensor([1, 1, 1.002])),
    }
    found = bench.run_cell(Made(makers), list(makers), torch.device("cuda"), 0.1)
    assert measured == ["eager"]
    assert found.failed
    assert found.notes["dmt"] == "FAILED: error 2 times what is allowed"
    assert found.notes["inductor"].startswith("FAILED: error inf")
    assert found.notes["fbgemm"] == "not here"
    cells = row(found, list(makers), Ceilings(3e6, {})).split(" | ")
    assert cells[5:9] == ["2.000", "-", "-", "-"]
    assert cells[9:-2] == ["-"] * (len(cells) - 11)


def test_what_breaks_is_told_and_the_others_go_on() -> None:
    makers = {"eager": broken, "dmt": lambda: Contestant(lambda: torch.ones(3))}
    found = bench.run_cell(Made(makers), ["eager", "fbgemm", "dmt"], CPU, 0.1)
    assert found.errors == {"dmt": 0.0}
    assert found.notes == {"eager": "FAILED: ValueError: a|b c"}
    assert row(found, ["eager", "fbgemm", "dmt"], None).count("|") == header(["eager", "fbgemm", "dmt"])[0].count("|")
    unmade = bench.run_cell(Made(None), ["dmt"], CPU, 0.1)  # type: ignore[arg-type]
    assert unmade.failed
    assert set(unmade.notes) == {"cell"}


def test_a_row_holds_times_shares_and_ratios() -> None:
    timings = {"eager": Timing(0.006, 0.5, 0.1, 9), "dmt": Timing(0.002, 0.0125, 0.0005, 9)}
    measured = Measured("lookup-x", Cost(3_000_000, 4_000_000_000, "bf16", 9_000_000), {"dmt": 0.25}, timings)
    assert header(["eager", "dmt"])[0] == (
        "| cell | MB | GFLOP | bound | floor ms | eager ms | dmt ms | dmt spread | dmt host ms | floor / dmt "
        "| same, uncached | eager / dmt | error / allowed | notes |"
    )
    assert row(measured, ["eager", "dmt"], Ceilings(3e9, {"bf16": 1e13})) == (
        "| lookup-x | 3.0 | 4.00 | memory | 1.000 | 6.000 | 2.000 | 1.2% | 0.500 | 0.50 | 1.50 | 3.00 | 0.25 |  |"
    )
    bound = row(measured, ["eager", "dmt"], Ceilings(3e9, {"bf16": 2e12})).split(" | ")
    assert bound[3:5] == ["bf16", "2.000"]


class FakeEvent:
    """An event on a clock that every run moves by its own number of milliseconds."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = FakeEvent.clock

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_contestants_take_turns_each_after_the_cache_was_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    slow = count(1)  # 1, 2, 3, ... ms

    def run(name: str, ms: Callable[[], float]) -> Callable[[], None]:
        def running() -> None:
            calls.append(name)
            FakeEvent.clock += ms()

        return running

    def read(source: torch.Tensor, dim: int, out: torch.Tensor) -> None:
        calls.append(f"{source.numel() * 4 >> 20} MiB")

    properties = type("Properties", (), {"L2_cache_size": 100 << 20})
    monkeypatch.setattr(torch, "amax", read)
    for name, fake in {
        "Event": FakeEvent, "synchronize": lambda: None, "_sleep": lambda cycles: None,
        "get_device_properties": lambda device: properties,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    timings = gpu_timing.measure({"a": run("a", lambda: 4.0), "b": run("b", lambda: next(slow))}, CPU, 0.0, least=5)
    assert calls == ["a"] * 3 + ["b"] * 3 + ["400 MiB", "a", "400 MiB", "b"] * 5
    assert timings["a"].median_s == 0.004
    assert timings["a"].spread == 0
    assert timings["b"].median_s == 0.006  # 4 to 8 ms after three warm-ups
    assert timings["b"].spread == pytest.approx(0.5)
    assert {timing.count for timing in timings.values()} == {5}


def test_a_gpu_that_no_longer_answers_is_left_by_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(program: str, arguments: list[str]) -> None:
        started.append(arguments[2:])
        raise SystemExit(3)

    monkeypatch.setattr(bench, "usable", lambda device: False)
    monkeypatch.setattr(bench.os, "execv", start)
    arguments = ["--device", "cpu", "--tiny", "--contestants", "eager", "--cells", "pack-*"]
    with pytest.raises(SystemExit, match="3"):
        bench.main(arguments)
    assert started[0][: len(arguments) + 2] == [*arguments, "--after", Pack("int8").tiny().name]
    assert started[0][-2] == "--limit-s"


def test_a_new_process_begins_behind_the_cell_and_fails_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    names = [cell.tiny().name for cell in select(["pack-*"], False)]
    arguments = ["--device", "cpu", "--tiny", "--contestants", "eager", "--cells", "pack-*", "--after", names[0]]
    assert bench.main(arguments) == 1
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()] == [f"| {n}" for n in names[1:]]


# ------------------------------------------------------------------------------------------ whole runs


def test_names_are_unique_and_every_kind_of_cell_is_there() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert {type(cell) for cell in CELLS} == {*OPERATORS, TableStep}
    assert len(select(["*"], True)) > 500
    assert select(["table-step-*power"], False) == [TableStep(cell_list.POWER)]
    with pytest.raises(ValueError, match=r"expected cells that match 'lookup-none', found none"):
        select(["lookup-none"], False)


def test_bad_command_lines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--device", "cpu"], "--device cpu: expected --tiny, found none"),
        (["--cells", "nothing"], "--cells: expected cells that match 'nothing'"),
        *([] if torch.cuda.is_available() else [([], "--device cuda: expected a GPU, found none")]),
    ):
        with pytest.raises(SystemExit, match="2"):
            bench.main(arguments)
        assert said in capsys.readouterr().err


def test_a_run_prints_a_table_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cells, out = ["dot-f27*tf32", "pack-int8*"], tmp_path / "kernels.jsonl"
    arguments = ["--device", "cpu", "--tiny", "--contestants", "eager", "--json", str(out), "--cells", *cells]
    assert bench.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("CPU, kernels interpreted: no speeds; torch ")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    names = [Dot().tiny().name, Pack("int8").tiny().name]
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in names]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in written] == names
    assert all(line["errors"]["eager"] <= 1 and line["timings"] == {} for line in written)
    assert bench.main(["--list", "--cells", *cells]) == 0
    assert capsys.readouterr().out.split() == [Dot().name, Pack("int8").name]
    assert bench.main([*arguments, "--limit-s", "-1"]) == 0
    assert capsys.readouterr().out.count("not run: no time left") == 2


@pytest.mark.parametrize("cell", {c.tiny().name: c.tiny() for c in CELLS}.values(), ids=lambda cell: cell.name)
def test_a_tiny_cell_has_the_right_numbers(cell: Any) -> None:
    found = bench.run_cell(cell, ["eager", "fbgemm", "dmt"], CPU, 0.1)
    assert not found.failed, found.notes
    takes_fbgemm = isinstance(cell, LookupForward | TableStep) and cell.size.dtype == "fp32"
    assert ("fbgemm" in found.errors) == (takes_fbgemm and installed()), found.notes
    if isinstance(cell, TableStep):
        ours = {"eager", "dmt"} & set(found.errors)
        assert len(ours) == (2 if importlib.util.find_spec("dmt_compile.optim") else 0), found.notes
        return
    assert ("dmt" in found.errors) == (OPERATORS[type(cell)] in operators()), found.notes
    assert "eager" in found.errors or isinstance(cell, UpdateRows)
