"""Which features are joined, in what order, and which pairs of them are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import fx

from dmt_compile.ir.joins import Family, NoFamily, find_family, find_vectors
from tests.passes._harness import Captured, capture
from tests.passes.test_insert_tower_modules import Head, Model, batch

Join = Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
NAMES = tuple(f"tables.{index}" for index in range(4))


def of(join: Join) -> tuple[Captured, Family]:
    torch.manual_seed(0)
    case = capture(Model(Head(join)), batch()).on("1x1")
    case.advance("partition_towers")
    return case, find_family(case.gm, case.ctx)


def only(family: Family) -> tuple[fx.Node, tuple[str | None, ...]]:
    (node, parts), *more = family.operands.items()
    assert more == []
    return node, tuple(part.feature for part in parts)


@pytest.mark.parametrize(
    ("join", "parts"),
    [
        (lambda b, v: torch.cat([b, *v], 1).relu(), (None, *NAMES)),
        (lambda b, v: torch.hstack([*v[::-1], b]).relu(), (*NAMES[::-1], None)),
        (lambda b, v: torch.stack([*v, b], 1).relu(), (*NAMES, None)),
        (lambda b, v: torch.cat([x.unsqueeze(1) for x in v], 1).relu(), NAMES),
        (lambda b, v: torch.cat([torch.cat([v[0], v[1]], 1), b, v[2], v[3]], 1).relu(), (*NAMES[:2], None, *NAMES[2:])),
        (lambda b, v: torch.cat([b, *v], 1).view(b.shape[0], -1, b.shape[1]).relu(), (None, *NAMES)),
        (lambda b, v: torch.cat([x.unsqueeze(1) for x in v], -1).flatten(1).relu(), NAMES),
        (lambda b, v: torch.cat([v[0] * 2, v[1].tanh(), v[2], v[3]], 1).relu(), NAMES),
    ],
    ids=["cat", "hstack", "stack", "cat of vectors", "nested", "view", "one row", "own operators"],
)
def test_a_join_is_found_with_its_parts_in_order(join: Join, parts: tuple[str | None, ...]) -> None:
    _, family = of(join)
    assert only(family)[1] == parts
    assert family.features == tuple(name for name in parts if name is not None)
    assert family.left == ()


def test_all_joins_of_the_same_features_are_found() -> None:
    _, family = of(lambda b, v: torch.stack(list(v), 1).sum(1) + torch.cat(list(v), 1)[:, :4])
    assert sorted(node.meta["val"].ndim for node in family.operands) == [2, 3]


def test_what_a_feature_passes_through_on_its_own_is_its_chain() -> None:
    _, family = of(lambda b, v: torch.cat([v[0].tanh() * 2, *v[1:]], 1).relu())
    assert len(family.local["tables.0"]) == 2
    assert family.local["tables.1"] == []


def test_what_the_batch_went_into_is_joined_as_it_is() -> None:
    _, family = of(lambda b, v: torch.cat([v[0] * b, *v[1:]], 1).relu())
    assert only(family)[1] == (None, *NAMES[1:])


def lower(t: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.tril_indices(t.shape[1], t.shape[1], -1)
    return torch.bmm(t, t.transpose(1, 2))[:, rows, columns]


def upper(t: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.triu_indices(t.shape[1], t.shape[1], 1)
    return torch.einsum("bfd,bgd->bfg", t, t)[:, rows, columns]


def with_squares(t: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.tril_indices(t.shape[1], t.shape[1], 0)
    return (t @ t.mT)[:, rows, columns]


def lists(t: torch.Tensor) -> torch.Tensor:
    pairs = [(i, j) for i in range(4) for j in range(i)][::-1]
    return torch.matmul(t, t.permute(0, 2, 1))[:, [i for i, _ in pairs], [j for _, j in pairs]]


@pytest.mark.parametrize(
    ("select", "kind", "pairs"),
    [
        (lower, "distinct", 6),
        (upper, "distinct", 6),
        (lists, "distinct", 6),
        (with_squares, "with itself", 10),
        (lambda t: torch.bmm(t, t.transpose(1, 2)).flatten(1), "all", 16),
    ],
    ids=["lower", "upper", "lists in another order", "with squares", "all"],
)
def test_products_of_all_pairs_are_known_by_what_is_selected(
    select: Callable[[torch.Tensor], torch.Tensor], kind: str, pairs: int
) -> None:
    _, family = of(lambda b, v: select(torch.stack(list(v), 1)).relu())
    (found,) = family.pairs.values()
    assert found.kind == kind
    assert found.count(4) == found.selected.meta["val"].shape[1] == pairs
    assert found.product not in family.inside
    assert found.product in found.inside


@pytest.mark.parametrize(
    "select",
    [
        lambda t: torch.bmm(t, t.transpose(1, 2))[:, [1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2]],
        lambda t: torch.bmm(t, t.transpose(1, 2)).tril(-1).flatten(1),
        lambda t: torch.bmm(t, t.transpose(1, 2)).softmax(-1).flatten(1),
    ],
    ids=["pairs twice", "half of them zero", "something else"],
)
def test_what_selects_otherwise_is_no_choice_of_pairs(select: Callable[[torch.Tensor], torch.Tensor]) -> None:
    _, family = of(lambda b, v: select(torch.stack(list(v), 1)).relu())
    assert family.pairs == {}


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        (lambda b, v: v[0] + v[1] + v[2] + v[3], "no cat or stack joins"),
        (lambda b, v: torch.stack(list(v)).sum(0), "stack joins 3 dimensions along dimension 0"),
        (lambda b, v: torch.cat([x * b for x in v], 1).relu(), "cat joins 0 of them as they are, without the batch"),
        (lambda b, v: torch.cat([*v, *v], 1).relu(), "feature tables.0 is joined twice"),
        (lambda b, v: torch.cat(v[:3], 1)[:, :4] + torch.cat([v[0], b], 1)[:, :4], "it joins 1 of the 3 features"),
    ],
    ids=["sums", "samples", "batch", "twice", "alone"],
)
def test_what_is_no_join_has_a_reason(join: Join, reason: str) -> None:
    with pytest.raises(NoFamily, match=reason):
        of(join)


def test_vectors_of_one_width_can_be_exchanged_anywhere() -> None:
    torch.manual_seed(0)
    case = capture(Model(Head(lambda b, v: v[0] * v[1] + v[2] * v[3])), batch()).on("1x1")
    case.advance("partition_towers")
    family = find_vectors(case.gm, case.ctx)
    assert family.features == NAMES
    assert family.operands == {}


def test_what_is_written_to_in_place_cannot_be_exchanged() -> None:
    torch.manual_seed(0)
    case = capture(Model(Head(lambda b, v: sum(x.mul_(2) for x in v))), batch()).on("1x1")
    case.advance("partition_towers")
    with pytest.raises(NoFamily, match="fewer than two features of one width"):
        find_vectors(case.gm, case.ctx)
