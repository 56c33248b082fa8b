"""The paper's Tables 3, 4 and 5 from our compiler: every row at full size on the meta device, within 0.2%."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import paper_tables
from benchmarks.paper_tables import DIM, ROWS, Flops, Row, count, faults

# Those of one pattern with another are further cases: `python benchmarks/paper_tables.py` counts all rows as well.
ALWAYS = {"DLRM", "DCN", "SPTT-DLRM", "DMT 8T-DLRM", "DMT 16T-DCN", "DMT 26T-DCN", "DMT 8T-DLRM, compression 4"}
every_row = pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[] if row.name in ALWAYS else pytest.mark.slow) for row in ROWS],
    ids=[f"{row.table}-{row.name}" for row in ROWS],
)


@every_row
def test_a_row_has_the_printed_figures(row: Row) -> None:
    assert faults(row, count(row)) == []


def test_sixteen_towers_are_ten_of_two_features_and_six_of_one() -> None:
    sizes = count(next(row for row in ROWS if row.name == "DMT 16T-DCN")).tower_sizes
    assert sorted(sizes) == [1] * 6 + [2] * 10


def test_tower_modules_alone_do_not_save_what_the_thinner_over_arch_saves() -> None:
    flat, row = ROWS[0], next(row for row in ROWS if row.name == "DMT 8T-DLRM")
    whole = paper_tables.untouched(row)
    assert whole is not None
    assert whole.mflops == pytest.approx(15.24, rel=paper_tables.LIMIT)
    assert whole.mflops > count(flat).mflops
    assert whole.mflops - count(row).mflops == pytest.approx(3 * 2 * 1024 * 1024 / 1e6, rel=1e-3)


def test_a_row_that_is_off_is_named() -> None:
    row = replace(ROWS[0], mflops=14.0, params=22.0)
    assert [fault.split(", found")[0] for fault in faults(row, count(ROWS[0]))] == [
        "Table 3, DLRM: expected 14.0 MFlops within 0.2%",
        "Table 3, DLRM: expected 22.0 G parameters within 0.2%",
    ]


def test_flops_are_those_of_matrix_products_and_of_what_the_batch_meets() -> None:
    x = torch.zeros(paper_tables.SAMPLES, DIM, requires_grad=True)
    weight = torch.zeros(DIM, 3)
    with Flops() as counted:
        y = x @ weight * 2 + 1
        weight * weight  # not of the batch
    samples = paper_tables.SAMPLES
    assert counted.total == 2 * samples * DIM * 3 + 2 * samples * 3
    forward = counted.total
    with counted:
        y.sum().backward()
    assert counted.total - forward == 2 * samples * DIM * 3 + samples * 3  # of x alone, and the factor
