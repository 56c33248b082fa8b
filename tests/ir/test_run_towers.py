"""run_towers: what a tower's module reads of the group's features, and what is sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dmt_compile.ir.exchange_ops import TowerRun, run_towers

WIDTHS, ORDER = (2, 3, 4), (1, 0, 2)  # of features 0 to 2; the order of their columns
ROUTE: Any = SimpleNamespace(group=0, layout=SimpleNamespace(widths=WIDTHS, group_features=lambda group: ORDER))
JOINED = torch.arange(18.0).view(2, 9)
COLUMNS = {1: JOINED[:, :3], 0: JOINED[:, 3:5], 2: JOINED[:, 5:]}


def run(*towers: TowerRun) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what is sent, and what each module read."""
    read: list[torch.Tensor] = []

    def module(embs_PW: torch.Tensor) -> tuple[torch.Tensor]:
        read.append(embs_PW)
        return ((embs_PW * 2).t().contiguous().t(),)

    regions = [module for tower in towers if tower.region >= 0]
    return run_towers(JOINED, ROUTE, towers, regions, [() for _ in regions]), read


def test_features_in_the_order_of_the_exchange_are_read_where_they_are() -> None:
    sent, [read] = run(TowerRun(0, ORDER, 0, "float32", 9))
    assert read.data_ptr() == JOINED.data_ptr()
    assert torch.equal(sent, JOINED * 2)
    assert sent.is_contiguous()


@pytest.mark.parametrize(
    ("towers", "expected"),
    [
        ([TowerRun(0, (0, 1, 2), 0, "float32", 9)], [(0, 2), (1, 2), (2, 2)]),
        ([TowerRun(0, (1, 0), 0, "float32", 5), TowerRun(0, (2,), -1, "", 4)], [(1, 2), (0, 2), (2, 1)]),
        ([TowerRun(0, ORDER, 0, "float32", 9), TowerRun(0, (2,), -1, "", 4)], [(1, 2), (0, 2), (2, 2), (2, 1)]),
        ([TowerRun(0, (2,), -1, "", 4), TowerRun(1, (0,), 0, "float32", 2)], [(2, 1)]),
    ],
    ids=["another order", "some of them", "read by others too", "as they are"],
)
def test_other_features_are_copied(towers: list[TowerRun], expected: list[tuple[int, int]]) -> None:
    sent, read = run(*towers)
    assert all(embs.data_ptr() != JOINED.data_ptr() for embs in read)
    assert torch.equal(sent, torch.cat([COLUMNS[feature] * times for feature, times in expected], dim=1))
    assert sent.is_contiguous()


def test_a_module_of_another_type_reads_a_copy() -> None:
    sent, [read] = run(TowerRun(0, ORDER, 0, "float64", 9))
    assert read.dtype == torch.float64
    assert sent.dtype == torch.float32
    assert torch.equal(sent, JOINED * 2)
