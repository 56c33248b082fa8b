"""The flat model: shapes, bags, gradients, and an input of no rows."""

from __future__ import annotations

import pytest
import torch
from data import to_bags
from dlrm import DLRM
from torch import Tensor

TABLE_ROWS = (11, 3, 7)


def random_inputs(rows: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    categorical_BF = torch.stack([torch.randint(table, (rows,)) for table in TABLE_ROWS], dim=1)
    return torch.randn(rows, 5), *to_bags(categorical_BF)


@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_one_logit_per_sample_and_a_gradient_for_every_parameter(rows: int) -> None:
    model = DLRM(TABLE_ROWS, dim=4, dense_features=5)
    logits_B = model(*random_inputs(rows))
    assert logits_B.shape == (rows,)
    logits_B.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_bags_are_summed() -> None:
    torch.manual_seed(0)
    model = DLRM(TABLE_ROWS, dim=4, dense_features=5)
    dense_BI, ids, offsets = random_inputs(2)
    twice = [i.repeat_interleave(2) for i in ids]
    doubled = DLRM(TABLE_ROWS, dim=4, dense_features=5)
    doubled.load_state_dict(model.state_dict())
    for table in doubled.emb:
        table.weight.data *= 2
    torch.testing.assert_close(model(dense_BI, twice, [o * 2 for o in offsets]), doubled(dense_BI, ids, offsets))


def test_the_interaction_is_every_pair_of_vectors_once() -> None:
    model = DLRM(TABLE_ROWS, dim=4, dense_features=5, top=(6,))
    pairs = set(zip(model.row_index_P.tolist(), model.column_index_P.tolist(), strict=True))
    assert pairs == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)}
    assert model.top[0].in_features == 4 + len(pairs)


def test_sparse_tables_have_sparse_gradients() -> None:
    model = DLRM(TABLE_ROWS, dim=4, dense_features=5, sparse=True)
    model(*random_inputs(4)).sum().backward()
    assert all(table.weight.grad.is_sparse for table in model.emb)


def test_bags_hold_one_id_per_sample() -> None:
    ids, offsets = to_bags(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    assert [i.tolist() for i in ids] == [[1, 3, 5], [2, 4, 6]]
    assert [o.tolist() for o in offsets] == [[0, 1, 2], [0, 1, 2]]
