"""The verifier finds each fault that a rule speaks of, and names pass, rule and node."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

from dmt_compile.config import Options
from dmt_compile.errors import VerifyError
from dmt_compile.ir import exchange_ops as ex
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import Pass, calls
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.verifier import RULES, verify
from dmt_compile.partition.assign import make_plan
from dmt_compile.pipeline import passes_in_order
from dmt_compile.plan import Shard
from tests.passes._harness import Captured, dlrm

README = Path(__file__).parents[2] / "passes" / "README.md"
Plant = Callable[[Captured], str]  # plants a fault and returns what the error must name
FAULTS: list[tuple[str, str, str, Plant]] = []  # (rule, topology, last pass before the fault, plant)


def fault(rule: str, topology: str, after: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        FAULTS.append((rule, topology, after, plant))
        return plant

    return register


def insert(graph: Captured, before: fx.Node, target: Callable[..., object], *args: object) -> fx.Node:
    with graph.gm.graph.inserting_before(before):
        return graph.ctx.call(graph.gm, target, *args)


def output(graph: Captured) -> fx.Node:
    return next(node for node in graph.gm.graph.nodes if node.op == "output")


def hop(graph: Captured, name: str) -> fx.Node:
    return next(node for node in calls(graph.gm, ex.all_to_all) if node.args[2] == name)


@fault("lint", "1x1", "find_tables")
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


@fault("tables", "1x1", "find_tables")
def a_table_read_by_something_else(graph: Captured) -> str:
    insert(graph, output(graph), torch.neg, graph.input("emb.1.weight"))
    return "table emb.1 is read by neg, which is no lookup"


@fault("checked", "1x1", "find_tables")
def ids_that_nothing_checked(graph: Captured) -> str:
    graph.node(ops.lookup, 2).update_arg(1, graph.node(ops.check_batch).args[0][2])
    return "lookup_2 reads l_ids_2_, which nothing has checked"


@fault("checked", "2x2", "batch_lookups")
def ids_that_no_header_vouches_for(graph: Captured) -> str:
    fused = graph.node(ops.batched_lookup)
    copied = insert(graph, fused, torch.clone, fused.args[1][0])
    fused.update_arg(1, [copied, *fused.args[1][1:]])
    return f"batched_lookup reads {copied.name}, which nothing has checked"


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


@fault("placed", "2x2", "lower_to_sptt")
def a_table_without_placement(graph: Captured) -> str:
    del graph.input("emb.1.weight").meta["shards"]
    return "table emb.1 has no placement"


@fault("placed", "2x2", "lower_to_sptt")
def a_table_placed_elsewhere(graph: Captured) -> str:
    assert graph.ctx.plan is not None
    elsewhere = (graph.ctx.plan.owner("emb.0") + 1) % 4
    graph.input("emb.0.weight").meta["shards"] = (Shard(elsewhere, (0, 6), (0, 8)),)
    return "table emb.0 is placed otherwise than the plan says"


@fault("exchanged", "2x2", "lower_to_sptt")
def a_check_of_local_samples(graph: Captured) -> str:
    packed = graph.node(ex.pack_ids)
    _, ids, offsets, others, rows, check_ids = packed.args
    labels = ("emb.0", "emb.1", "emb.2", "dense")
    check = insert(graph, packed, ops.check_batch, ids, offsets, others, rows, labels, check_ids)
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


@fault("collectives", "2x2", "lower_to_sptt")
def hops_out_of_order(graph: Captured) -> str:
    first, second = hop(graph, "intra"), hop(graph, "peer")
    for node, name in ((first, "peer"), (second, "intra")):
        node.update_arg(2, name)
        node.update_arg(3, name)
    return r"hops are in the order \['ids', 'peer', 'intra'\], expected a part of \['ids', 'intra', 'peer'\]"


@fault("collectives", "2x2", "lower_to_sptt")
def a_hop_that_runs_twice(graph: Captured) -> str:
    node = hop(graph, "peer")
    insert(graph, node, ex.all_to_all, *node.args)
    return r"hops are in the order \['ids', 'intra', 'peer', 'peer'\]"


@fault("widths", "2x2", "lower_to_sptt")
def columns_of_other_widths(graph: Captured) -> str:
    graph.node(ex.layout).update_arg(3, (8, 4, 12))
    return r"layout splits the columns into \(8, 4, 12\), expected the widths of the features"


@fault("widths", "2x2", "lower_to_sptt")
def ids_sent_to_others_than_the_owners(graph: Captured) -> str:
    graph.node(ex.layout).update_arg(2, (3, 3, 3))
    return r"layout sends ids to \(3, 3, 3\), expected the owners of the plan"


@fault("synchronized", "2x2", "compile_dense_regions")
def a_gradient_that_is_not_averaged(graph: Captured) -> str:
    synchronize = graph.node(ex.synchronize)
    item = next(iter(synchronize.users))
    (region,) = item.users
    parameter = synchronize.args[0][item.args[1]]
    region.replace_input_with(item, parameter)
    return f"parameter {graph.ctx.flat_names[parameter.name]} reaches {region.name} without averaging its gradient"


@fault("fused", "1x1", "compile_dense_regions")
def a_lookup_left_alone(graph: Captured) -> str:
    fused = graph.node(ops.batched_lookup)
    tables, ids, offsets, _, _ = fused.args
    lookup = insert(graph, fused, ops.lookup, tables[0], ids[0], offsets[0], None, "sum", False, None)
    return f"{lookup.name} was not fused"


@fault("regions", "1x1", "compile_dense_regions")
def a_dense_node_outside_every_region(graph: Captured) -> str:
    bias = graph.input("top.0.bias")
    insert(graph, output(graph), torch.mul, bias, 2)
    return rf"mul computes on \['{bias.name}'\] outside every dense region"


@pytest.mark.parametrize(
    ("rule", "topology", "after", "plant"), FAULTS, ids=[f"{f[0]}-{f[3].__name__}" for f in FAULTS]
)
def test_a_planted_fault_is_found(rule: str, topology: str, after: str, plant: Plant) -> None:
    graph = dlrm(topology)
    graph.advance(after)
    stage = next(step.gives for step in passes_in_order(graph.ctx.options) if step.name == after)
    stage = max(stage, next(r.since for r in RULES if r.id == rule))
    verify(graph.gm, graph.ctx, stage, after)  # valid until now
    named = plant(graph)
    text = f"^{after}: expected stage {stage.name.lower()}, found rule '{rule}' broken: .*{named}.*Rule: .* bug of dmt"
    with pytest.raises(VerifyError, match=text):
        verify(graph.gm, graph.ctx, stage, after)


def test_every_rule_has_a_planted_fault() -> None:
    assert {name for name, *_ in FAULTS} == {rule.id for rule in RULES}
    assert len({rule.id for rule in RULES}) == len(RULES)


def test_a_rule_holds_from_its_stage_on() -> None:
    graph = dlrm("2x2")
    graph.advance("lower_to_sptt")
    verify(graph.gm, graph.ctx, Stage.DISTRIBUTED, "lower_to_sptt")
    with pytest.raises(VerifyError, match="found rule 'synchronized' broken"):
        verify(graph.gm, graph.ctx, Stage.LOWERED, "lower_to_sptt")


def test_many_breaches_are_counted() -> None:
    graph = dlrm()
    graph.advance("find_tables")
    for node in calls(graph.gm, operator.getitem)[:5]:
        del node.meta["val"]
    with pytest.raises(VerifyError, match=r"getitem has no metadata; .* \(and 2 more\)\. Rule: Each node's recorded"):
        verify(graph.gm, graph.ctx, Stage.FLAT, "find_tables")


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
