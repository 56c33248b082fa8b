"""The verifier finds each fault that a rule speaks of, and names pass, rule and node."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from dmt_compile.config import Options
from dmt_compile.errors import VerifyError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import gradient_ops, id_ops, ops, verifier
from dmt_compile.ir.pass_base import Pass, calls, placeholders
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.tower_regions import behind_averaging
from dmt_compile.ir.verifier import RULES, verify
from dmt_compile.kernels.batched_lookup.reference import Pooling
from dmt_compile.partition.assign import make_plan
from dmt_compile.pipeline import passes_in_order
from dmt_compile.plan import Shard
from tests.passes._harness import Captured, capture, dlrm

README = Path(__file__).parents[2] / "passes" / "README.md"
Plant = Callable[[Captured], str]  # plants a fault and returns what the error must name
SINCE = {rule.id: rule.since for rule in RULES}
TOWERS = {"tower_module": "dlrm", "tower_module_options": {"dim": 4}}


@dataclass(frozen=True)
class Fault:
    """A rule, a graph and the last pass before a fault that breaks the rule is planted into it."""

    rule: str
    topology: str
    after: str
    options: dict[str, Any]
    plant: Plant

    def graph(self) -> tuple[Captured, Stage]:
        """Return the graph, still valid, and the stage that it is held to."""
        graph = dlrm(self.topology, **self.options)
        graph.advance(self.after)
        gives = next(step.gives for step in passes_in_order(graph.ctx.options) if step.name == self.after)
        return graph, max(gives, SINCE[self.rule])


FAULTS: list[Fault] = []


def fault(rule: str, topology: str, after: str, **options: Any) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        FAULTS.append(Fault(rule, topology, after, options, plant))
        return plant

    return register


def insert(graph: Captured, before: fx.Node, target: Callable[..., object], *args: object) -> fx.Node:
    with graph.gm.graph.inserting_before(before):
        return graph.ctx.call(graph.gm, target, *args)


def again(graph: Captured) -> None:
    """Derive the metadata of all nodes anew."""
    for node in graph.gm.graph.nodes:
        node.meta.pop("example_value", None)
    with torch.set_grad_enabled(graph.ctx.training):
        graph.ctx.environment.annotate(graph.gm)


def average_again(graph: Captured, parameter: fx.Node) -> fx.Node:
    wait = graph.node(gradient_ops.wait_gradients)
    averaging = insert(graph, wait, gradient_ops.averaging, wait.args[1].args[0]._replace(buckets=(1,)))
    again = insert(graph, wait, gradient_ops.wait_gradients, [parameter], averaging)
    insert(graph, output(graph), gradient_ops.start_gradients, again, averaging, 0)
    return again


def output(graph: Captured) -> fx.Node:
    return next(node for node in graph.gm.graph.nodes if node.op == "output")


def hop(graph: Captured, name: str) -> fx.Node:
    return next(node for node in calls(graph.gm, ex.start_all_to_all) if node.args[2] == name)


@fault("lint", "1x1", "check_lookups")
def used_before_it_is_defined(graph: Captured) -> str:
    lookup = graph.node(ops.lookup)
    graph.node(ops.check_batch).prepend(lookup)
    return "Node 'lookup' was used before it has been defined"


@fault("lint", "2x2", "lower_to_sptt")
def attribute_that_is_missing(graph: Captured) -> str:
    with graph.gm.graph.inserting_before(output(graph)), pytest.warns(UserWarning, match="no underlying reference"):
        graph.gm.graph.get_attr("lost").meta["val"] = 0
    return "lost"


@fault("metadata", "1x1", "find_tables")
def another_shape(graph: Captured) -> str:
    lookup = graph.node(ops.lookup)
    lookup.meta["val"] = lookup.meta["val"].new_empty(3, 9)
    return r"lookup is recorded as float32\[3, 9\] but gives float32\[u\d+, 8\]"


@fault("metadata", "1x1", "find_tables")
def another_element_type(graph: Captured) -> str:
    lookup = graph.node(ops.lookup)
    lookup.meta["val"] = lookup.meta["val"].double()
    return r"lookup is recorded as float64\[u\d+, 8\] but gives float32\[u\d+, 8\]"


@fault("metadata", "1x1", "find_tables")
def no_metadata(graph: Captured) -> str:
    del graph.node(ops.lookup, 1).meta["val"]
    return "lookup_1 has no metadata"


@fault("metadata", "2x2", "sync_dense_gradients")
def arguments_that_do_not_fit(graph: Captured) -> str:
    linear = graph.node(torch._C._nn.linear)
    linear.args = (linear.args[0], linear.args[2])
    return "input_1 does not accept its arguments: "


@fault("parameters", "1x1", "normalize_graph")
def a_parameter_that_lost_its_input(graph: Captured) -> str:
    bias = graph.input("top.2.bias")
    (linear,) = bias.users
    linear.args = linear.args[:2]
    graph.gm.graph.erase_node(bias)
    return f"parameter top.2.bias lost its graph input {bias.name}"


@fault("parameters", "1x1", "normalize_graph")
def two_parameters_of_one_name(graph: Captured) -> str:
    graph.ctx.flat_names = {**graph.ctx.flat_names, graph.input("top.0.bias").name: "top.2.bias"}
    return "flat name top.2.bias belongs to several graph inputs"


@fault("inputs", "1x1", "normalize_graph")
def inputs_in_another_order(graph: Captured) -> str:
    first, *_, last = placeholders(graph.gm)
    last.append(first)
    return rf"the inputs are \[.*'{last.name}', '{first.name}'\], expected \['{first.name}', .*'{last.name}'\]"


@fault("outputs", "1x1", "normalize_graph")
def an_output_of_another_type(graph: Captured) -> str:
    end = output(graph)
    end.args = ((insert(graph, end, torch.Tensor.double, end.args[0][0]),),)
    return r"the outputs are .*float64.*, expected .*float32"


@fault("unshared", "1x1", "check_lookups")
def ids_that_change_in_place(graph: Captured) -> str:
    lookup = graph.node(ops.lookup)
    changed = insert(graph, lookup, operator.iadd, lookup.args[1], 1)
    return f"{changed.name} writes in place to what it shares with other features"


@fault("tables", "1x1", "check_lookups")
def a_table_read_by_something_else(graph: Captured) -> str:
    insert(graph, output(graph), torch.neg, graph.input("emb.1.weight"))
    return "table emb.1 is read by neg, which is no lookup"


@fault("tables", "2x2", "sync_dense_gradients")
def a_table_s_gradient_that_is_averaged(graph: Captured) -> str:
    averaged = average_again(graph, graph.input("emb.2.weight"))
    return f"table emb.2 is read by {averaged.name}, which is no lookup"


@fault("checked", "1x1", "check_lookups")
def ids_that_nothing_checked(graph: Captured) -> str:
    graph.node(ops.lookup, 2).update_arg(1, graph.node(ops.check_batch).args[0][2])
    return "lookup_2 reads l_ids_2_, which nothing has checked"


@fault("checked", "1x1", "check_lookups")
def offsets_that_nothing_checked(graph: Captured) -> str:
    graph.node(ops.lookup).update_arg(2, graph.node(ops.check_batch).args[1][0])
    return "lookup reads l_offsets_0_, which nothing has checked"


@fault("checked", "2x2", "batch_lookups")
def ids_that_no_header_vouches_for(graph: Captured) -> str:
    fused = graph.node(ops.batched_lookup)
    copied = insert(graph, fused, torch.clone, fused.args[1][0])
    fused.update_arg(1, [copied, *fused.args[1][1:]])
    return f"batched_lookup reads {copied.name}, which nothing has checked"


@fault("features", "1x1", "check_lookups")
def a_feature_that_is_looked_up_twice(graph: Captured) -> str:
    lookup = graph.node(ops.lookup, 1)
    insert(graph, output(graph), ops.lookup, *lookup.args)
    return "table emb.1.weight is looked up 2 times, expected 1"


@fault("features", "2x2", "batch_lookups")
def a_feature_of_another_table(graph: Captured) -> str:
    fused = graph.node(ops.batched_lookup)
    fused.update_arg(0, [fused.args[0][0], fused.args[0][0], fused.args[0][2]])
    return "table emb.0.weight is looked up 2 times, expected 1; table emb.1.weight is looked up 0 times"


@fault("groups", "1x1", "check_lookups")
def a_lookup_of_other_bags(graph: Captured) -> str:
    lookup, other = graph.node(ops.lookup), graph.node(ops.lookup, 1)
    first_use = next(iter(lookup.users))
    first_use.prepend(lookup)
    first_use.prepend(other)
    lookup.replace_all_uses_with(other)
    lookup.update_arg(2, None)
    lookup.update_arg(4, Pooling("none", False))
    lookup.meta["val"] = graph.ctx.environment.derive(lookup, graph.gm)
    return r"lookup has u\d+ bags in a group of u\d+"


@fault("one-tower", "2x2", "partition_towers")
def a_table_without_tower(graph: Captured) -> str:
    graph.ctx.plan = make_plan(graph.ctx.embedding_graph.table_specs()[:2], graph.ctx.topology)
    return "table emb.2 is in 0 towers"


@fault("one-tower", "2x2", "partition_towers")
def a_table_in_two_towers(graph: Captured) -> str:
    plan = copy.copy(graph.ctx.plan)
    assert plan is not None
    object.__setattr__(plan, "towers", (plan.tower_of("emb.0"), *plan.towers))  # a plan refuses to be made this way
    graph.ctx.plan = plan
    return "table emb.0 is in 2 towers"


@fault("towers", "2x2", "insert_tower_modules", **TOWERS)
def a_tower_that_reads_another_towers_feature(graph: Captured) -> str:
    plan = graph.ctx.plan
    assert plan is not None
    first, second = calls(graph.gm, ops.tower_input)
    mine, theirs = first.args[0], second.args[0]
    first.update_arg(0, [theirs[0], *mine[1:]])  # type: ignore[index]
    return f"{first.name} of tower0 reads {theirs[0].name}, whose table is in another tower"  # type: ignore[index, union-attr]


@fault("towers", "2x2", "insert_tower_modules", **TOWERS)
def a_tower_without_output(graph: Captured) -> str:
    out = graph.node(ops.tower_output)
    out.replace_all_uses_with(out.args[0])  # type: ignore[arg-type]
    graph.gm.graph.erase_node(out)
    return "tower0 has 0 outputs"


@fault("towers-apart", "2x2", "lower_to_sptt", **TOWERS)
def a_tower_that_runs_in_another_group(graph: Captured) -> str:
    run = graph.node(ex.run_towers)
    first, second = run.args[2]  # type: ignore[misc]
    run.update_arg(2, (first._replace(features=second.features), second._replace(features=first.features)))
    return f"{run.name} takes features {re.escape(str(list(second.features)))} in group 0, which does not hold them"


@fault("towers-apart", "2x2", "lower_to_sptt", **TOWERS)
def a_tower_that_sends_other_columns(graph: Captured) -> str:
    run = graph.node(ex.run_towers)
    first, *others = run.args[2]  # type: ignore[misc]
    run.update_arg(2, (first._replace(width=first.width + 1), *others))
    return f"{run.name} gives .* columns by group, but .* are exchanged"


@fault("towers-apart", "2x2", "lower_to_sptt", **TOWERS)
def a_tower_that_passes_no_gradient_on(graph: Captured) -> str:
    region: Any = graph.node(ex.run_towers).args[3][0]  # type: ignore[index]
    start = next(iter(region.meta["val"].graph_module.graph.nodes))
    start.meta["val"] = start.meta["val"].detach()
    return f"{region.name} and the features that it reads disagree on gradients"


@fault("towers-apart", "2x2", "sync_dense_gradients", **TOWERS)
def a_tower_summed_over_another_group(graph: Captured) -> str:
    averaging = next(n for n in calls(graph.gm, gradient_ops.averaging) if n.args[0].tower == 0)
    averaging.update_arg(0, averaging.args[0]._replace(tower=1))
    return "is summed over group 1, expected 0"


@fault("placed", "2x2", "lower_to_sptt")
def a_table_without_placement(graph: Captured) -> str:
    del graph.input("emb.1.weight").meta["shards"]
    return "table emb.1 has no placement"


@fault("placed", "2x2", "lower_to_sptt")
def a_table_placed_elsewhere(graph: Captured) -> str:
    assert graph.ctx.plan is not None
    elsewhere = (graph.ctx.plan.owner("emb.0") + 1) % 4
    graph.input("emb.0.weight").meta["shards"]["emb.0"] = (Shard(elsewhere, (0, 6), (0, 8)),)
    return "table emb.0 is placed otherwise than the plan says"


@fault("exchanged", "2x2", "lower_to_sptt")
def a_check_of_local_samples(graph: Captured) -> str:
    packed = graph.node(id_ops.pack_ids)
    *read, check_ids = packed.args[1:]
    labels = ("emb.0", "emb.1", "emb.2", "dense")
    check = insert(graph, packed, ops.check_batch, *read, labels, check_ids)
    return f"{check.name} reads this rank's samples only"


@fault("collectives", "2x2", "lower_to_sptt")
def a_hop_in_another_group(graph: Captured) -> str:
    node = hop(graph, "peer")
    node.update_arg(3, "world")
    return f"{node.name} sends hop peer in group world, expected peer"


@fault("collectives", "2x2", "lower_to_sptt")
def another_type_on_the_wire(graph: Captured) -> str:
    node = hop(graph, "intra")
    node.update_arg(4, "bfloat16")
    return f"{node.name} declares bfloat16 on the wire for a tensor of float32"


@fault("steps", "2x2", "lower_to_sptt")
def steps_out_of_order(graph: Captured) -> str:
    first, second = hop(graph, "intra"), hop(graph, "peer")
    for node, name in ((first, "peer"), (second, "intra")):
        node.update_arg(2, name)
        node.update_arg(3, name)
    found, expected = (
        rf"\['peer_permute', '{one}', 'join_blocks', '{other}', 'join_blocks', 'scale_gradient'\]"
        for one, other in (("peer", "intra"), ("intra", "peer"))
    )
    return f"split_features comes from the steps {found}, expected {expected}"


@fault("steps", "2x2", "lower_to_sptt")
def another_group_s_route(graph: Captured) -> str:
    route = graph.node(id_ops.route)
    other = insert(graph, route.next, id_ops.route, *route.args)
    other.meta["val"] = route.meta["val"]
    permute = graph.node(ex.peer_permute)
    permute.update_arg(1, other)
    return f"{permute.name} follows another route than the rest of split_features"


@fault("steps", "2x2", "lower_to_sptt", id_exchange="hierarchical")
def rows_permuted_that_are_in_peer_order(graph: Captured) -> str:
    moved = hop(graph, "intra")
    moved.update_arg(0, insert(graph, moved, ex.peer_permute, *moved.args[:2]))
    return r"split_features comes from the steps \['peer_permute', 'intra', .* expected \['intra',"


@fault("delivered", "2x2", "lower_to_sptt", id_exchange="hierarchical")
def ids_that_their_forwarder_does_not_regroup(graph: Captured) -> str:
    regrouped = graph.node(id_ops.regroup_by_owner)
    regrouped.replace_all_uses_with(regrouped.args[0])
    return r"unpack_ids comes from the steps \['ids_across', 'ids_host'\], expected .*'regroup_by_owner', 'ids_host'\]"


@fault("delivered", "2x2", "lower_to_sptt", id_exchange="hierarchical")
def ids_that_nobody_forwards(graph: Captured) -> str:
    graph.node(id_ops.unpack_ids).update_arg(0, next(iter(hop(graph, "ids_across").users)))
    return r"unpack_ids comes from the steps \['ids_across'\], expected"


@fault("delivered", "2x2", "lower_to_sptt", id_exchange="hierarchical")
def ids_regrouped_by_another_groups_route(graph: Captured) -> str:
    route = graph.node(id_ops.route)
    other = insert(graph, route.next, id_ops.route, *route.args)
    other.meta["val"] = route.meta["val"]
    graph.node(id_ops.regroup_by_owner).update_arg(1, other)
    return "regroup_by_owner follows another route than unpack_ids"


@fault("delivered", "2x3", "lower_to_sptt", id_exchange="hierarchical")
def ids_sent_by_way_of_other_hosts(graph: Captured) -> str:
    node = graph.node(id_ops.layout)
    node.update_arg(7, node.args[7]._replace(hosts=3))  # type: ignore[union-attr]
    again(graph)
    return "pack_ids sends ids by way of 3 hosts, expected 2"


@fault("delivered", "2x2", "lower_to_sptt")
def ids_that_int32_cannot_count(graph: Captured) -> str:
    graph.node(id_ops.pack_ids).update_arg(6, ((0, 6), (0, 2**31), (0, 4)))
    return "pack_ids sends ids below 2147483648 as int32, expected int64"


@fault("delivered", "2x2", "lower_to_sptt")
def lengths_that_stay_at_home(graph: Captured) -> str:
    node = graph.node(id_ops.layout)
    node.update_arg(4, (True, False, True))
    node.update_arg(7, node.args[7]._replace(even=(False, True, False)))  # type: ignore[union-attr]
    again(graph)
    return "pack_ids and .* disagree on the bag lengths of feature 1 that travel"


@fault("collectives", "2x2", "lower_to_sptt", id_exchange="hierarchical")
def ids_forwarded_among_all_ranks(graph: Captured) -> str:
    node = hop(graph, "ids_host")
    node.update_arg(3, "world")
    return f"{node.name} sends hop ids_host in group world, expected host"


@fault("collectives", "2x2", "lower_to_sptt")
def ids_declared_wider_than_they_are(graph: Captured) -> str:
    node = hop(graph, "ids")
    node.update_arg(4, "int64")
    return f"{node.name} declares int64 on the wire for a tensor of int32"


@fault("scaled", "2x2", "lower_to_sptt")
def a_gradient_that_is_not_scaled(graph: Captured) -> str:
    node = graph.node(gradient_ops.scale_gradient)
    node.update_arg(1, 1.0)
    return f"{node.name} scales its gradient by 1.0, expected 0.25"


@fault("averaged-once", "2x2", "sync_dense_gradients")
def a_gradient_that_is_averaged_twice(graph: Captured) -> str:
    once = graph.node(gradient_ops.wait_gradients)
    average_again(graph, once.args[0][0])
    return f"the gradient of {graph.ctx.flat_names[once.args[0][0].name]} is averaged 2 times"


@fault("started-and-waited", "2x2", "sync_dense_gradients")
def a_gradient_that_is_waited_for_but_never_starts(graph: Captured) -> str:
    start = graph.node(gradient_ops.start_gradients)
    for item in list(start.users):
        item.replace_all_uses_with(behind_averaging(item))
        graph.gm.graph.erase_node(item)
    graph.gm.graph.erase_node(start)
    return f"bucket {start.args[2]} of averaging is started 0 times, expected 1"


@fault("started-and-waited", "2x2", "sync_dense_gradients")
def a_gradient_that_starts_twice(graph: Captured) -> str:
    start = graph.node(gradient_ops.start_gradients)
    insert(graph, start, gradient_ops.start_gradients, *start.args)
    return f"bucket {start.args[2]} of averaging is started 2 times, expected 1"


@fault("started-and-waited", "2x2", "sync_dense_gradients")
def a_gradient_that_starts_and_is_not_waited_for(graph: Captured) -> str:
    wait = graph.node(gradient_ops.wait_gradients)
    averaging = insert(graph, wait, gradient_ops.averaging, wait.args[1].args[0])
    start = graph.node(gradient_ops.start_gradients)
    start.update_arg(1, averaging)
    return "averaging_1 is waited for 0 times, expected 1"


@fault("started-and-waited", "2x2", "sync_dense_gradients")
def gradients_that_are_waited_for_twice(graph: Captured) -> str:
    wait = graph.node(gradient_ops.wait_gradients)
    insert(graph, wait, gradient_ops.wait_gradients, [], wait.args[1])
    return "averaging is waited for 2 times, expected 1"


@fault("started-and-waited", "2x2", "sync_dense_gradients")
def gradients_that_are_waited_for_and_read_before_they_start(graph: Captured) -> str:
    wait = graph.node(gradient_ops.wait_gradients)
    item = insert(graph, wait.next, operator.getitem, wait, 0)
    return f"{item.name} reads what waits for gradients that it does not start"


@fault("started-and-waited", "2x2", "sync_dense_gradients")
def gradients_that_start_without_passing_a_wait(graph: Captured) -> str:
    start = graph.node(gradient_ops.start_gradients)
    waited = start.args[0]
    direct = insert(graph, waited, gradient_ops.broadcast_buffers, list(waited.args[0]), "world")
    start.update_arg(0, direct)
    return f"{start.name} reads {direct.name}, which does not wait for gradients"


@fault("started-and-waited", "2x2", "sync_dense_gradients")
def buckets_that_leave_a_parameter_out(graph: Captured) -> str:
    wait = graph.node(gradient_ops.wait_gradients)
    wait.update_arg(0, [*wait.args[0], insert(graph, wait, operator.getitem, graph.input("top.0.bias"), 0)])
    wait.meta["val"] = graph.ctx.environment.derive(wait, graph.gm)
    return "wait_gradients holds 9 parameters, its buckets 8"


@fault("started-and-waited", "2x2", "sync_dense_gradients")
def a_bucket_of_two_element_types(graph: Captured) -> str:
    wait = graph.node(gradient_ops.wait_gradients)
    averaging = wait.args[1]
    averaging.update_arg(0, averaging.args[0]._replace(buckets=(4, 5)))
    averaging.meta["val"] = graph.ctx.environment.derive(averaging, graph.gm)
    offset = insert(graph, wait, operator.getitem, graph.node(id_ops.pack_ids).args[1][0], 0)
    wait.update_arg(0, [*wait.args[0], offset])
    for node in (wait, *wait.users):
        node.meta["val"] = graph.ctx.environment.derive(node, graph.gm)
    return r"bucket 1 of wait_gradients holds torch\.float32 and torch\.int64"


@fault("waited-last", "2x2", "sync_dense_gradients")
def gradients_that_are_waited_for_before_others_are_computed(graph: Captured) -> str:
    wait = graph.node(gradient_ops.wait_gradients)
    earlier = insert(graph, wait, torch.neg, graph.input("top.0.bias"))
    return f"wait_gradients stands behind {earlier.name}, so that its backward waits before that of {earlier.name}"


@fault("collectives", "2x2", "lower_to_sptt")
def hops_out_of_order(graph: Captured) -> str:
    ids = hop(graph, "ids")
    insert(graph, output(graph), ex.start_all_to_all, ids.args[0], ids.args[1], "weights", "world", "int32", "int32")
    return (
        r"hops of route are in the order \['ids', 'intra', 'peer', 'weights'\], expected parts of "
        r"\(\('ids', 'ids_across', 'ids_host', 'intra', 'peer'\), \('weights', .*, 'intra', 'peer'\)\), each once"
    )


@fault("collectives", "2x2", "lower_to_sptt")
def a_hop_that_runs_twice(graph: Captured) -> str:
    node = hop(graph, "peer")
    insert(graph, node, ex.start_all_to_all, *node.args)
    return r"hops of route are in the order \['ids', 'intra', 'peer', 'peer'\]"


@fault("collectives", "2x2", "lower_to_sptt")
def weights_sent_among_peers(graph: Captured) -> str:
    ids = hop(graph, "ids")
    place = hop(graph, "intra")
    insert(graph, place, ex.start_all_to_all, ids.args[0], ids.args[1], "weights", "peer", "int32", "int32")
    return "sends hop weights in group peer, expected world"


@fault("collectives", "2x2", "lower_to_sptt")
def an_exchange_that_is_waited_for_twice(graph: Captured) -> str:
    node = hop(graph, "peer")
    insert(graph, node.next, ex.wait_all_to_all, node)
    return f"{node.name} is waited for 2 times and has 2 users, expected one wait"


@fault("collectives", "2x2", "lower_to_sptt")
def a_form_that_nobody_asked_for(graph: Captured) -> str:
    node = hop(graph, "peer")
    node.update_arg(5, "bfloat16")
    return f"{node.name} declares bfloat16 on the wire for a tensor of float32, backward"


@fault("widths", "2x2", "lower_to_sptt")
def columns_of_other_widths(graph: Captured) -> str:
    graph.node(id_ops.layout).update_arg(3, (8, 4, 12))
    return r"layout splits the columns into \(8, 4, 12\), expected the widths of the features"


@fault("widths", "2x2", "lower_to_sptt")
def ids_sent_to_others_than_the_owners(graph: Captured) -> str:
    graph.node(id_ops.layout).update_arg(2, (3, 3, 3))
    return r"layout sends ids to \(3, 3, 3\), expected the owners of the plan"


@fault("summed", "2x2", "lower_to_sptt")
def features_added_up_that_are_no_pieces(graph: Captured) -> str:
    graph.node(id_ops.layout).update_arg(8, ((0, 1),))
    return r"layout adds up features \(\(0, 1\),\), expected those of row pieces, \(\)"


@fault("synchronized", "2x2", "compile_dense_regions")
def a_gradient_that_is_not_averaged(graph: Captured) -> str:
    start = graph.node(gradient_ops.start_gradients)
    item = next(iter(start.users))
    (region,) = item.users
    parameter = behind_averaging(item)
    region.replace_input_with(item, parameter)
    return f"parameter {graph.ctx.flat_names[parameter.name]} reaches {region.name} without averaging its gradient"


@fault("fused", "2x2", "compile_dense_regions")
def a_join_left_alone(graph: Captured) -> str:
    fused = graph.node(ops.batched_lookup)
    with graph.gm.graph.inserting_before(output(graph)):
        join = graph.gm.graph.call_function(ex.join_features, ([fused] * 3, fused.args[5]))
    join.meta["val"] = graph.ctx.environment.derive(join, graph.gm)
    return f"{join.name} was not fused"


@fault("regions", "1x1", "compile_dense_regions")
def a_dense_node_outside_every_region(graph: Captured) -> str:
    bias = graph.input("top.0.bias")
    insert(graph, output(graph), torch.mul, bias, 2)
    return rf"mul computes on \['{bias.name}'\] outside every dense region"


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.rule}-{f.plant.__name__}" for f in FAULTS])
def test_a_planted_fault_is_found(fault: Fault) -> None:
    graph, stage = fault.graph()
    verify(graph.gm, graph.ctx, stage, fault.after)  # valid until now
    named = fault.plant(graph)
    text = f"^{fault.after}: expected stage {stage.name.lower()}, found rule '{fault.rule}' broken: .*{named}"
    with pytest.raises(VerifyError, match=f"{text}.*Rule: .* bug of dmt"):
        verify(graph.gm, graph.ctx, stage, fault.after)


# Faults that break another rule as well: which, and why.
SEEN_AGAIN = {
    "attribute_that_is_missing": ("metadata", "its value cannot be derived anew"),
    "a_parameter_that_lost_its_input": ("inputs", "the graph has an input less than Dynamo passes"),
    "steps_out_of_order": ("collectives", "hops are out of order too"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.rule}-{f.plant.__name__}" for f in FAULTS])
def test_without_its_rule_a_planted_fault_goes_unnoticed(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "RULES", tuple(r for r in RULES if r.id != fault.rule))
    graph, stage = fault.graph()
    fault.plant(graph)
    if fault.plant.__name__ in SEEN_AGAIN:
        other, _ = SEEN_AGAIN[fault.plant.__name__]
        with pytest.raises(VerifyError, match=f"found rule '{other}' broken"):
            verify(graph.gm, graph.ctx, stage, fault.after)
    else:
        verify(graph.gm, graph.ctx, stage, fault.after)


def test_every_rule_has_a_planted_fault() -> None:
    assert {fault.rule for fault in FAULTS} == {rule.id for rule in RULES}
    assert len({rule.id for rule in RULES}) == len(RULES)


def test_a_rule_holds_from_its_stage_on() -> None:
    graph = dlrm("2x2")
    graph.advance("lower_to_sptt")
    verify(graph.gm, graph.ctx, Stage.DISTRIBUTED, "lower_to_sptt")
    with pytest.raises(VerifyError, match="found rule 'synchronized' broken"):
        verify(graph.gm, graph.ctx, Stage.LOWERED, "lower_to_sptt")


def test_many_breaches_are_counted() -> None:
    graph = dlrm()
    graph.advance("check_lookups")
    for node in calls(graph.gm, operator.getitem)[:5]:
        del node.meta["val"]
    with pytest.raises(VerifyError, match=r"getitem has no metadata; .* \(and 2 more\)\. Rule: Each node's recorded"):
        verify(graph.gm, graph.ctx, Stage.FLAT, "check_lookups")


def test_every_group_s_layout_is_compared_with_its_own_features() -> None:
    class Two(nn.Module):
        """A table of the samples, and one of the positions of a sequence."""

        def __init__(self) -> None:
            super().__init__()
            self.user = nn.Embedding(5, 3)
            self.item = nn.Embedding(7, 2)

        def forward(self, user: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
            return self.user(user).sum(1) + torch.tanh(self.item(items)).sum((1, 2))

    graph = capture(Two(), (torch.tensor([1, 2, 0]), torch.tensor([[1, 2], [3, 4], [5, 6]]))).on("2x2")
    graph.advance("lower_to_sptt")
    first, second = calls(graph.gm, id_ops.layout)
    assert (first.args[3], second.args[3]) == ((3,), (2,))
    [widths] = [rule for rule in RULES if rule.id == "widths"]
    assert list(widths.check(graph.gm, graph.ctx)) == []
    second.update_arg(3, (3,))
    breach = f"{second.name} splits the columns into (3,), expected the widths of the features"
    assert list(widths.check(graph.gm, graph.ctx)) == [breach]


def table_of(heading: str) -> list[list[str]]:
    """Return the cells of the README's table under a heading, without its head."""
    section = README.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_the_readme_lists_exactly_the_rules() -> None:
    documented = [(cells[0].strip("`"), cells[1], cells[2]) for cells in table_of("Rules of the verifier")]
    assert documented == [(rule.id, rule.since.name.lower(), rule.text) for rule in RULES]


def test_the_readme_has_one_row_for_each_pass_in_order() -> None:
    def row(step: Pass) -> tuple[str, str, str]:
        return step.name, step.effect.name, f"{step.needs.name.lower()} -> {step.gives.name.lower()}"

    documented = [(cells[0].strip("`"), cells[1], cells[2]) for cells in table_of("Passes, in order")]
    assert documented == [row(step) for step in passes_in_order(Options())]
    assert all(cells[3] for cells in table_of("Passes, in order"))


def test_effects_are_explained() -> None:
    assert [effect.explain() for effect in Effect] == [
        "bitwise the flat model's numbers",
        "the same mathematics in another summation order or dense compiler",
        "lower precision on the wire",
        "changes the model",
    ]
