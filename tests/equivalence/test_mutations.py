"""Mutations: every step that makes the compiled model right is broken in turn, and the comparison must notice."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._guards import TracingContext

from dmt_compile import SimulatedWorld, Topology, torch_internals
from dmt_compile.errors import DmtError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, id_ops, ops, weight_ops
from dmt_compile.ir.pass_base import PassContext
from dmt_compile.kernels.batched_lookup import op as kernel
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.passes import batch_lookups, check_lookups, lower_to_sptt, normalize_graph, pool_sequences
from dmt_compile.passes.batch_lookups import BatchLookups
from dmt_compile.passes.check_lookups import CheckLookups
from dmt_compile.passes.compile_dense_regions import CompileDenseRegions
from dmt_compile.passes.find_tables import FindTables
from dmt_compile.passes.fold_joins import FoldJoins
from dmt_compile.passes.lower_to_sptt import LowerToSptt
from dmt_compile.passes.place_tables import PlaceTables
from dmt_compile.passes.pool_sequences import PoolSequences
from dmt_compile.passes.split_field_tables import SplitFieldTables
from dmt_compile.passes.sync_dense_gradients import SyncDenseGradients
from dmt_compile.plan import TowerPlan
from dmt_compile.runtime import route, simulated_gradients
from dmt_compile.runtime.averaging import Reduction
from dmt_compile.runtime.regions import DenseRegion
from dmt_compile.runtime.tables import Block, ShardedTable
from dmt_compile.tolerances import absolute_error, magnitude, reordered_limit
from tests.equivalence.models import Feature, Spec, Table, make_batch
from tests.models import dense_of

LONGEST_SUM = 64  # ids of one row in a global batch
Steps = list[list[tuple[Any, ...]]]  # of each step, every rank's positional arguments


@dataclass
class Case:
    """A model, the batches of each step, and what the comparison says of it while nothing is broken."""

    model: nn.Module
    steps: Steps
    verdict: str = "equal"
    topology: str = "2x2"
    options: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def of_spec(tables: Sequence[Table], features: Sequence[Feature]) -> Case:
    spec = Spec(tuple(tables), tuple(features))
    return Case(spec.build(), [[(make_batch(spec, size, 1 + rank),) for rank, size in enumerate((3, 5, 2, 4))]])


def drawn(seed: int, rows: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(seed))


@case
def bags() -> Case:
    tables = Table(7, 4), Table(9, 4, padding=2), Table(11, 4, sparse=True), Table(5, 4), Table(3, 4, frozen=True)
    modes = "sum", "mean", "sum", "max", "sum"
    return of_spec(tables, [Feature(i, mode=mode, last_offset=i == 1) for i, mode in enumerate(modes)])


@case
def bags_by_way_of_hosts() -> Case:
    return replace(bags(), options={"id_exchange": "hierarchical"})


@case
def weighted_bags_by_way_of_hosts() -> Case:
    return replace(weighted_bags(), options={"id_exchange": "hierarchical"})


@case
def one_rank() -> Case:
    found = of_spec([Table(9, 3)] * 3, [Feature(i) for i in range(3)])
    return replace(found, steps=[found.steps[0][:1]], topology="1x1")


@case
def fixed_bags() -> Case:
    return of_spec([Table(7, 3), Table(9, 3)], [Feature(0, "fixed bag", length=3), Feature(1, "fixed bag")])


@case
def fixed_bags_of_one_rank() -> Case:
    return replace(fixed_bags(), steps=[fixed_bags().steps[0][:1]], topology="1x1")


@case
def weighted_bags() -> Case:
    tables = Table(7, 3), Table(9, 3), Table(5, 3, padding=1)
    return of_spec(tables, [Feature(0, weights="learned"), Feature(1, weights="batch"), Feature(2, weights="learned")])


@case
def ids_behind_the_last_bag() -> Case:
    # frozen: PyTorch's own gradient of such ids is whatever was in memory
    frozen = Table(7, 3, frozen=True), Table(9, 3, frozen=True)
    found = of_spec(frozen, [Feature(0, last_offset=True), Feature(1, last_offset=True)])
    for (batch,) in found.steps[0]:
        batch["ids0"] = torch.cat([batch["ids0"], torch.tensor([6, 0])])
    return found


@case
def sequences() -> Case:
    tables = Table(7, 3, padding=0), Table(9, 3, padding=2), Table(11, 3, padding=1), Table(5, 3, padding=3)
    kinds = "masked mean", "sequence", "masked sum", "single"
    return of_spec(tables, [Feature(i, kind, length=3) for i, kind in enumerate(kinds)])


@case
def fields() -> Case:
    return of_spec([Table(12, 4), Table(9, 4)], [Feature(0, "fields", length=3), Feature(1)])


@case
def a_field_that_reads_the_next_one() -> Case:
    found = fields()
    found.steps[0][1][0]["ids0"][0, 0] = 5
    return replace(found, verdict=r"BatchError: .*expected ids of table emb\.0\[0:4\] in \[0, 4\), found 5")


@case
def offsets_that_fall() -> Case:
    found = of_spec([Table(7, 3), Table(9, 3)], [Feature(0), Feature(1)])
    found.steps[0][1][0]["offsets0"][0] = 1
    return replace(found, verdict="BatchError: .*expected offsets of table emb.0 that start at 0")


@case
def two_features_on_a_rank() -> Case:
    features = [Feature(i) for i in range(6)]
    return of_spec([Table(9, 3)] * 6, features)


@case
def rows_in_pieces() -> Case:
    found = of_spec([Table(rows, 4) for rows in (7, 9, 5, 8, 6)], [Feature(i) for i in range(5)])
    partition = [["emb.1[0:4]", "emb.0", "emb.1[4:9]", "emb.2", "emb.3", "emb.4"]]
    return replace(found, steps=[found.steps[0][:2]], topology="1x2", options={"partition": partition})


@case
def sequences_beside_a_bag() -> Case:
    return of_spec([Table(7, 3), Table(9, 3)], [Feature(0), Feature(1, "sequence", length=3)])


class Pooled(nn.Module):
    """Sequences whose mean and maximum are used, and their ids' frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.max = nn.Embedding(9, 3, sparse=True), nn.Embedding(7, 3)
        self.often = nn.Embedding(4, 3, scale_grad_by_freq=True)
        self.top = nn.Linear(9, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        parts = self.mean(ids % 9).mean(1), self.max(ids % 7).max(1)[0], self.often(ids[:, 0] % 4)
        return self.top(torch.cat(parts, dim=1))


@case
def pooled() -> Case:
    torch.manual_seed(0)
    return Case(Pooled(), [[(drawn(rank, 50, 2 + rank, 3),) for rank in range(4)]])


class InPlace(nn.Module):
    """A lookup that is changed in place, and a layer whose change in place gives a result that is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(9, 3), nn.Embedding(7, 3)
        self.layer = nn.Linear(3, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        user, item = self.user(ids), self.item(ids % 7)
        user = torch.nn.functional.relu(user, inplace=True)
        hidden = self.layer(item)
        hidden.add_(1)
        return hidden * user


@case
def in_place() -> Case:
    torch.manual_seed(0)
    return Case(InPlace(), [[(drawn(rank, 9, 2 + rank),) for rank in range(4)]])


class Tied(nn.Module):
    """A table that is also the last layer, beside one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(9, 3), nn.Embedding(7, 3)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return (self.user(user) + self.item(item)) @ self.item.weight.t()


@case
def tied() -> Case:
    torch.manual_seed(0)
    return Case(Tied(), [[(drawn(rank, 9, 2 + rank), drawn(9 + rank, 7, 2 + rank)) for rank in range(4)]])


class Branch(nn.Module):
    """Computes something else for batches of an even size."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.top = nn.Embedding(9, 3), nn.Linear(3, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.top(self.emb(ids))
        return hidden * 2 if ids.shape[0] % 2 == 0 else torch.tanh(hidden)


@case
def branch() -> Case:
    torch.manual_seed(0)
    return Case(Branch(), [[(drawn(rank, 9, size),) for rank in range(4)] for size in (3, 6)])


class JoinedTwice(nn.Module):
    """Features joined in another order than that of their lookups, and some of them in a third order."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.ModuleList(nn.Embedding(9, 3) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first, second, third = (table(ids[:, i]) for i, table in enumerate(self.emb))
        return torch.cat([torch.cat([third, first, second], dim=1), torch.cat([first, third], dim=1) * 2], dim=1)


@case
def joined_twice() -> Case:
    torch.manual_seed(0)
    return Case(JoinedTwice(), [[(drawn(0, 9, 4, 3),)]], topology="1x1")


# ------------------------------------------------------------------------------------------------------ the comparison


def verdict(name: str) -> str:
    """Compare a case's compiled model with the flat one: ``equal``, what differs, or the error."""
    torch._dynamo.reset()
    it = CASES[name]()
    model, flat, world = it.model, copy.deepcopy(it.model), SimulatedWorld(it.topology)
    for batches in it.steps:
        try:
            options = {"dense_compiler": "eager", "partition": "strided", **it.options}
            outputs = world.run(model, copy.deepcopy(batches), **options)
        except (DmtError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        try:
            expected = [flat(*batch) for batch in batches]
        except RuntimeError:
            return "taken, although the flat model refuses it"
        pairs = [
            (f"output {position}", new, old)
            for mine, theirs in zip(outputs, expected, strict=True)
            for position, (new, old) in enumerate(zip(listed(mine), listed(theirs), strict=True))
        ]
        loss([new for _, new, _ in pairs]).backward()
        (loss([old for *_, old in pairs]) / world.topology.world_size).backward()
        for (parameter, mine), theirs in zip(model.named_parameters(), flat.parameters(), strict=True):
            layouts = [p.grad if p.grad is None else p.grad.layout for p in (mine, theirs)]
            if layouts[0] != layouts[1]:
                return f"gradient of {parameter} is {layouts[0]}, expected {layouts[1]}"
            pairs.append((f"gradient of {parameter}", dense_of(mine.grad, mine), dense_of(theirs.grad, theirs)))
        for what, new, old in pairs:
            limit = reordered_limit(old.dtype, LONGEST_SUM, gradient=True) * magnitude(old)
            if absolute_error(new, old) > limit:
                return f"{what} differs"
    return "equal"


def listed(output: Any) -> list[torch.Tensor]:
    return list(output) if isinstance(output, tuple) else [output]


def loss(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.stack([(out * torch.randn(out.shape, generator=generator)).sum() for out in outputs]).sum()


@lru_cache
def healthy(name: str) -> str:
    """Tell whether a case's verdict is as it should be while nothing is broken, or what it is."""
    found = verdict(name)
    return "as it should be" if re.match(CASES[name]().verdict, found) else found


# --------------------------------------------------------------------------------------------------------- mutations

Patch = pytest.MonkeyPatch
MUTATIONS: list[tuple[str, str, Callable[[Patch], None]]] = []  # (case, verdict, what breaks something)


def mutation(case: str, found: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def register(change: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTATIONS.append((case, found, change))
        return change

    return register


def swap(patch: Patch, module: Any, name: str, new: Callable[..., Any]) -> None:
    """Let ``new`` be an operator in the place of another, with the shape rule of that one."""
    old = getattr(module, name)
    patch.setitem(ops.OPERATORS, new, ops.OPERATORS[old])
    fx.node.has_side_effect(new)
    new.__name__ = name
    patch.setattr(module, name, new)


def with_list(function: Callable[..., Any], change: Callable[[list[Any]], Sequence[Any]]) -> Callable[..., Any]:
    """Return a function whose result, a sequence, is changed."""
    return lambda *args, **kwargs: tuple(change(list(function(*args, **kwargs))))


# ------ operators of several ranks


@mutation("bags", "output 0 differs")
def rows_are_left_in_rank_order(patch: Patch) -> None:
    swap(patch, ex, "peer_permute", lambda joined, route: joined.clone())


@mutation("bags", "output 0 differs")
def blocks_are_joined_in_reverse(patch: Patch) -> None:
    def reverse(received: torch.Tensor, route: Any, hop: str) -> torch.Tensor:
        blocks = route.blocks(hop)[1]
        parts = received.split([rows * width for rows, width in blocks])
        pairs = list(zip(parts, blocks, strict=True))
        return torch.cat([part.view(block) for part, block in reversed(pairs)], dim=1)

    swap(patch, ex, "join_blocks", reverse)


@mutation("rows_in_pieces", "output 0 differs")
def features_are_split_in_reverse(patch: Patch) -> None:
    split = ops.split_features

    def reverse(joined: torch.Tensor, layout: Any, widths: Any = None) -> tuple[torch.Tensor | None, ...]:
        columns = iter([column for column in split(joined, layout, widths) if column is not None][::-1])
        return tuple(None if column is None else next(columns) for column in split(joined, layout, widths))

    swap(patch, ops, "split_features", reverse)


@mutation("bags", "output 0 differs")
def features_are_read_in_the_order_of_their_blocks(patch: Patch) -> None:
    split = ex.split_blocks

    def by_block(received: torch.Tensor, route: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        columns = split(received, route, *args)
        return tuple(columns[index] for index in route.layout.column_order)

    swap(patch, ex, "split_blocks", by_block)


@mutation("bags", "output 0 differs")
def bags_are_one_id_longer_than_they_are(patch: Patch) -> None:
    def late(lists: list[Any]) -> list[Any]:
        return [x if x is None or i % 2 == 0 or len(x) < 2 else torch.cat([x[:1], x[1:] - 1]).clamp(min=0)
                for i, x in enumerate(lists)]  # fmt: skip

    swap(patch, id_ops, "unpack_ids", with_list(id_ops.unpack_ids, late))


@mutation("fixed_bags", "output 0 differs")
def even_bags_that_arrive_are_one_id_long(patch: Patch) -> None:
    patch.setattr(id_ops, "_even_offsets", lambda route, position, ids: torch.arange(
        route.global_batch_size, dtype=ids.dtype))  # fmt: skip


@mutation("bags_by_way_of_hosts", "RuntimeError: |output 0 differs")
def forwarded_ids_stay_in_the_order_they_came(patch: Patch) -> None:
    swap(patch, id_ops, "regroup_by_owner", lambda received, route, what: received.clone())


@mutation("bags_by_way_of_hosts", "output 0 differs")
def samples_are_looked_up_in_the_order_of_ranks(patch: Patch) -> None:
    patch.setattr(route.Layout, "sample_order", property(lambda self: tuple(range(self.topology.world_size))))


@mutation("bags_by_way_of_hosts", "RuntimeError: |output 0 differs")
def ids_are_taken_in_the_order_of_ranks(patch: Patch) -> None:
    patch.setattr(route.Layout, "arrival_order", property(lambda self: tuple(range(self.topology.world_size))))


@mutation("weighted_bags_by_way_of_hosts", "output 0 differs")
def forwarded_weights_are_split_like_ids(patch: Patch) -> None:
    regroup = id_ops.regroup_by_owner

    def mixed(received: torch.Tensor, route: Any, what: str) -> torch.Tensor:
        return regroup(received, route, what) if what == "ids" else received.flip(0)

    swap(patch, id_ops, "regroup_by_owner", mixed)


@mutation("two_features_on_a_rank", "output 0 differs")
def two_features_get_each_others_ids(patch: Patch) -> None:
    def exchange(lists: list[Any]) -> list[Any]:
        owned = [i for i, ids in enumerate(lists) if ids is not None]
        found = list(lists)
        for i, other in zip(owned, owned[2:] + owned[:2], strict=True):  # ids and offsets of the next one
            found[i] = lists[other]
        return found

    swap(patch, id_ops, "unpack_ids", with_list(id_ops.unpack_ids, exchange))


@mutation("bags", r"gradient of emb\.0\.weight differs")
def gradients_of_tables_are_summed(patch: Patch) -> None:
    split = ex.split_blocks
    swap(patch, ex, "split_blocks", lambda received, route, hop, factor, *args: split(received, route, hop, 1.0, *args))


@mutation("rows_in_pieces", r"gradient of emb\.0\.weight differs")
def gradients_of_tables_with_row_pieces_are_summed(patch: Patch) -> None:
    swap(patch, gradient_ops, "scale_gradient", lambda tensor, factor: tensor.view_as(tensor))


@mutation("weighted_bags", r"gradient of gates\.0 differs")
def gradients_of_weights_keep_the_mean(patch: Patch) -> None:
    scale = gradient_ops.scale_gradient
    swap(patch, gradient_ops, "scale_gradient", lambda tensor, factor: scale(tensor, min(factor, 1.0)))


@mutation("bags", r"gradient of bottom\.0\.weight differs")
def gradients_of_dense_parameters_are_summed(patch: Patch) -> None:
    patch.setattr(Reduction, "divisor", lambda self, topology: 1)


@mutation("bags", r"gradient of bottom\.0\.weight differs")
def dense_gradients_of_one_host_count(patch: Patch) -> None:
    add_up = simulated_gradients.add_up
    patch.setattr(simulated_gradients, "add_up", lambda parts: add_up(parts[:1]))


@mutation("bags", r"gradient of bottom\.0\.weight differs")
def dense_gradients_are_taken_from_other_places(patch: Patch) -> None:
    unflatten = simulated_gradients.unflatten
    patch.setattr(simulated_gradients, "unflatten", lambda flat, shapes: unflatten(flat.roll(1), shapes))


@mutation("bags", "VerifyError: .*found rule 'started-and-waited' broken")
def a_bucket_starts_in_place_of_another(patch: Patch) -> None:
    call = PassContext.call

    def first_bucket(self: PassContext, gm: fx.GraphModule, target: Any, *args: Any, **named: Any) -> fx.Node:
        if target is gradient_ops.start_gradients:
            args = (*args[:2], 0)
        return call(self, gm, target, *args, **named)

    patch.setattr(PassContext, "call", first_bucket)
    patch.setattr(SyncDenseGradients, "_replace", lambda self, *args: None)


@mutation("pooled", r"gradient of often\.weight differs")
def frequencies_of_ids_are_ignored(patch: Patch) -> None:
    swap(patch, gradient_ops, "scale_by_frequency", lambda rows, ids: rows.view_as(rows))


@mutation("weighted_bags", "output 0 differs")
def weights_arrive_in_another_order(patch: Patch) -> None:
    pack = weight_ops.pack_weights
    swap(patch, weight_ops, "pack_weights", lambda *args: pack(*args).flip(0))


@mutation("ids_behind_the_last_bag", "output 0 differs")
def ids_behind_the_last_bag_are_sent(patch: Patch) -> None:
    patch.setattr(id_ops, "trim", lambda ids, offsets, how: list(ids))


@mutation("a_field_that_reads_the_next_one", "equal")
def no_fault_is_ever_found(patch: Patch) -> None:
    patch.setattr(id_ops, "find_fault", lambda *args: None)


@mutation("offsets_that_fall", "taken, although the flat model refuses it")
def offsets_are_taken_as_they_are(patch: Patch) -> None:
    patch.setattr(id_ops, "find_fault", lambda *args: None)


@mutation("a_field_that_reads_the_next_one", "RuntimeError: split_with_sizes")
def headers_are_not_read(patch: Patch) -> None:
    patch.setattr(id_ops, "check_headers", lambda *args: None)


@mutation("bags", "output 0 differs")
def features_are_listed_by_rank_from_the_back(patch: Patch) -> None:
    by_rank = route.Layout.features_by_rank.func
    patch.setattr(route.Layout, "column_order", property(lambda self: [i for f in by_rank(self)[::-1] for i in f]))


# ------ operators and kernels of one rank


@mutation("fixed_bags_of_one_rank", "output 0 differs")
def even_bags_are_one_id_long(patch: Patch) -> None:
    def short(ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(ids.shape[0], dtype=ids.dtype, device=ids.device)

    swap(patch, ops, "even_offsets", short)


@mutation("bags", "output 0 differs")
def means_are_taken_as_sums(patch: Patch) -> None:
    look_up = kernel._forward
    modes = {"mean": "sum"}
    patch.setattr(kernel, "_forward", lambda *a: look_up(*a[:5], a[5]._replace(mode=modes.get(a[5].mode, a[5].mode))))


@mutation("weighted_bags", "output 0 differs")
def weights_are_dropped(patch: Patch) -> None:
    look_up = kernel._forward
    patch.setattr(kernel, "_forward", lambda *a: look_up(*a[:4], None if a[4] is None else a[4] * 0 + 1, a[5]))


@mutation("weighted_bags", r"gradient of gates\.\d differs")
def weights_get_no_gradient(patch: Patch) -> None:
    gradient = kernel._weights_gradient
    patch.setattr(kernel, "_weights_gradient", lambda *args: gradient(*args) * 0)


@mutation("sequences", "output 0 differs")
def padding_rows_are_left_out_of_pooled_sequences(patch: Patch) -> None:
    look_up = kernel._forward
    patch.setattr(kernel, "_forward", lambda *a: look_up(*a[:5], a[5]._replace(padding_counts=False)))


@mutation("bags", "output 0 differs")
def padding_rows_count_in_bags(patch: Patch) -> None:
    look_up = kernel._forward
    patch.setattr(kernel, "_forward", lambda *a: look_up(*a[:5], a[5]._replace(padding_counts=True)))


@mutation("sequences", r"gradient of emb\.0\.weight differs")
def padding_rows_are_trained(patch: Patch) -> None:
    patch.setattr(kernel, "_padding_row", lambda block, how: -1)


@mutation("fields", r"gradient of emb\.0\.weight differs")
def fields_of_a_table_share_the_first_ones_gradient(patch: Patch) -> None:
    gradient = kernel._table_gradient
    patch.setattr(kernel, "_table_gradient", lambda grad, lookup, saved, alone=False: gradient(
        grad[: len(grad) // 3], lookup, [saved[0][: len(saved[0]) // 3]]) if len(saved) == 1
        else gradient(grad, lookup, saved))  # fmt: skip


# ------ passes


def change_arguments(patch: Patch, key: str, value: Any) -> None:
    arguments = FindTables._arguments
    patch.setattr(FindTables, "_arguments", lambda self, node: {**arguments(self, node), key: value})


@mutation("bags", r"gradient of emb\.2\.weight is torch\.strided, expected torch\.sparse_coo")
def sparse_tables_become_dense(patch: Patch) -> None:
    change_arguments(patch, "sparse", False)


@mutation("bags", "output 0 differs")
def padding_is_forgotten(patch: Patch) -> None:
    change_arguments(patch, "padding_idx", None)


@mutation("weighted_bags", "output 0 differs")
def weights_are_forgotten(patch: Patch) -> None:
    change_arguments(patch, "per_sample_weights", None)


@mutation("pooled", r"gradient of often\.weight differs")
def frequencies_are_forgotten(patch: Patch) -> None:
    change_arguments(patch, "scale_grad_by_freq", False)


@mutation("bags", "output 0 differs")
def every_bag_is_summed(patch: Patch) -> None:
    change_arguments(patch, "mode", "sum")


@mutation("tied", "VerifyError: .*found rule 'tables' broken")
def a_table_that_the_model_reads_itself_is_matched(patch: Patch) -> None:
    patch.setattr(FindTables, "_reason", lambda self, *args: None)


@mutation("fields", "BatchError: .*ids of table emb")
def fields_start_one_row_late(patch: Patch) -> None:
    starts = SplitFieldTables._starts

    def shifted(self: SplitFieldTables, *args: Any) -> Any:
        found = starts(self, *args)
        return None if found is None else (0, *(first + 1 for first in found[1:-1]), found[-1])

    patch.setattr(SplitFieldTables, "_starts", shifted)


@mutation("pooled", "output 0 differs")
def means_of_sequences_become_sums(patch: Patch) -> None:
    reduction = pool_sequences._reduction

    def sums(node: fx.Node) -> tuple[Any, bool]:
        mode, keep = reduction(node)
        return "sum" if mode == "mean" else mode, keep

    patch.setattr(pool_sequences, "_reduction", sums)


@mutation("sequences", "output 0 differs")
def masks_of_sequences_are_dropped(patch: Patch) -> None:
    rewrite = PoolSequences._rewrite
    patch.setattr(PoolSequences, "_rewrite", lambda self, *args: rewrite(self, *args[:5], None, *args[6:]))


@mutation("sequences_beside_a_bag", "VerifyError: .*found rule 'groups' broken")
def all_lookups_are_checked_together(patch: Patch) -> None:
    class Together(dict[Any, list[Any]]):
        """Has one group, whatever it is asked for."""

        def __missing__(self, key: Any) -> list[Any]:
            return self.setdefault(next(iter(self), key), [])

    patch.setattr(check_lookups, "defaultdict", lambda make: Together())


@mutation("in_place", "output 0 differs")
def what_is_changed_in_place_is_dropped(patch: Patch) -> None:
    patch.setattr(normalize_graph, "mutates", lambda node: False)


@mutation("in_place", "VerifyError: .*found rule 'unshared' broken")
def features_share_memory(patch: Patch) -> None:
    for module in (lower_to_sptt, batch_lookups):
        patch.setattr(module, "only_joined", lambda node: True)


@mutation("bags", "VerifyError: .*found rule 'placed' broken")
def tables_are_placed_on_the_next_rank(patch: Patch) -> None:
    run = PlaceTables.run

    def elsewhere(self: PlaceTables, gm: fx.GraphModule, ctx: PassContext) -> Any:
        report = run(self, gm, ctx)
        for node in gm.graph.nodes:
            for name, (shard,) in node.meta.get("shards", {}).items():
                node.meta["shards"][name] = (replace(shard, rank=(shard.rank + 1) % 4),)
        return report

    patch.setattr(PlaceTables, "run", elsewhere)


@mutation("bags", "VerifyError: .*found rule 'widths' broken: .*sends ids to")
def ids_are_sent_to_the_next_rank(patch: Patch) -> None:
    lower, owner = LowerToSptt.run, TowerPlan.owner

    def run(self: LowerToSptt, gm: fx.GraphModule, ctx: PassContext) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(TowerPlan, "owner", lambda self, table: (owner(self, table) + 1) % 4)
            return lower(self, gm, ctx)

    patch.setattr(LowerToSptt, "run", run)


@mutation("bags", "output 0 differs")
def peers_are_ordered_by_rank(patch: Patch) -> None:
    patch.setattr(Topology, "peer_order", lambda self: tuple(range(self.world_size)))


@mutation("bags", "VerifyError: .*found rule 'synchronized' broken")
def dense_gradients_are_not_averaged(patch: Patch) -> None:
    patch.setattr(SyncDenseGradients, "_average", lambda self, *args: "nothing")


@mutation("two_features_on_a_rank", "output 0 differs")
def features_are_batched_in_another_order(patch: Patch) -> None:
    fuse = BatchLookups._fuse
    patch.setattr(BatchLookups, "_fuse", lambda self, gm, ctx, lookups, route: fuse(
        self, gm, ctx, list(reversed(lookups)), route))  # fmt: skip


@mutation("branch", "output 0 differs")
def guards_of_the_model_are_dropped(patch: Patch) -> None:
    drop = torch_internals.drop_needless_guards

    def all_of_them(checked: Any) -> None:
        drop(checked)
        context = TracingContext.try_get()
        assert context is not None
        context.fake_mode.shape_env.guards = []

    patch.setattr(torch_internals, "drop_needless_guards", all_of_them)


@mutation("one_rank", "VerifyError: .*found rule 'regions' broken")
def a_region_is_left_out(patch: Patch) -> None:
    regions = CompileDenseRegions._regions
    patch.setattr(CompileDenseRegions, "_regions", lambda self, *args: regions(self, *args)[1:])


@mutation("bags", "VerifyError: .*found rule 'regions' broken")
def a_region_behind_averaging_is_left_out(patch: Patch) -> None:
    a_region_is_left_out(patch)


@mutation("bags", "output 0 differs")
def outputs_of_a_region_change_places(patch: Patch) -> None:
    forward = DenseRegion.forward
    patch.setattr(DenseRegion, "forward", lambda self, *args: forward(self, *args)[::-1])


@mutation("one_rank", "output 0 differs")
def features_of_one_rank_are_batched_in_another_order(patch: Patch) -> None:
    fuse = BatchLookups._fuse
    patch.setattr(BatchLookups, "_fuse", lambda self, gm, ctx, lookups, route: fuse(
        self, gm, ctx, list(reversed(lookups)), route))  # fmt: skip


@mutation("joined_twice", "output 0 differs")
def features_that_lie_apart_are_read_at_once(patch: Patch) -> None:
    def one_run(self: FoldJoins, join: Any, ctx: PassContext) -> list[list[int]]:
        return [list(range(len(join.parts)))]

    patch.setattr(FoldJoins, "_runs", one_run)


@mutation("joined_twice", "output 0 differs")
def lookups_change_places_and_their_columns_do_not(patch: Patch) -> None:
    reorder = FoldJoins._reorder

    def lookups_alone(self: FoldJoins, split: fx.Node, *args: Any) -> bool:
        before = {item: item.args for item in split.users}
        changed = reorder(self, split, *args)
        for item, old in before.items():
            item.args = old
        return changed

    patch.setattr(FoldJoins, "_reorder", lookups_alone)


@mutation("bags", "VerifyError: .*found rule 'checked' broken")
def nothing_is_checked(patch: Patch) -> None:
    patch.setattr(CheckLookups, "_check", lambda *args: None)


@pytest.mark.parametrize(("name", "found", "change"), MUTATIONS, ids=[change.__name__ for *_, change in MUTATIONS])
def test_a_mutation_is_detected(name: str, found: str, change: Callable[[Patch], None], monkeypatch: Patch) -> None:
    assert healthy(name) == "as it should be"
    change(monkeypatch)
    broken = verdict(name)
    assert re.match(CASES[name]().verdict, broken) is None
    assert re.match(found, broken), broken


def test_every_case_serves_a_mutation() -> None:
    assert {name for name, *_ in MUTATIONS} == CASES.keys()
    assert all(not re.match(CASES[name]().verdict, found) for name, found, _ in MUTATIONS)


# ------ sharded tables, which a simulated world has not


def sharded_verdict() -> str:
    """Compare lookups of a field in a block of rows with those of the whole table: ``equal``, or what differs."""
    torch.manual_seed(0)
    block = Block("emb", ((2, 5), (9, 12)), (0, 3))
    values, ids = torch.randn(12, 3), torch.tensor([9, 11, 10, 9])
    for sparse in (False, True):
        flat = nn.Parameter(values.clone())
        mine = nn.Parameter(ShardedTable(block.cut(values).clone(), values.shape, block))
        how = Pooling("none", sparse, padding_idx=10, padding_counts=True, field_rows=(9, 12))
        try:
            outputs = kernel.batched_lookup([mine], [ids], [None], (how,), 4)
            expected = nn.functional.embedding(ids, flat, 10, sparse=sparse)
            for out in (outputs, expected):
                loss([out]).backward()
        except (RuntimeError, IndexError) as error:
            return f"{type(error).__name__}: {error}"
        if not torch.equal(outputs, expected):
            return "output differs"
        assert mine.grad is not None
        gradient = mine.grad.to_dense()[2:] if sparse else mine.grad.local
        whole = dense_of(flat.grad, flat)
        if not torch.equal(gradient, whole[2:] if sparse else block.cut(whole)):
            return f"{'sparse' if sparse else 'dense'} gradient differs"
    return "equal"


@pytest.mark.parametrize(
    ("owner", "name", "broken", "found"),
    [
        (kernel, "_shift", lambda block, how: 0, "IndexError: index out of range"),
        (kernel, "_shift", lambda block, how: block.rows[0][0], "IndexError: index out of range"),
        (kernel, "_padding_row", lambda block, how: -1, "dense gradient differs"),
        (kernel, "_padding_row", lambda block, how: 0, "dense gradient differs"),
        (Block, "to_flat", lambda self, rows: rows + self.rows[0][0], "sparse gradient differs"),
    ],
    ids=["no shift", "the first field's shift", "no padding", "another row is padding", "rows of the first field"],
)
def test_a_mutation_of_sharded_lookups_is_detected(
    owner: Any, name: str, broken: Callable[..., Any], found: str, monkeypatch: Patch
) -> None:
    assert sharded_verdict() == "equal"
    monkeypatch.setattr(owner, name, broken)
    assert re.match(found, sharded_verdict()), sharded_verdict()
