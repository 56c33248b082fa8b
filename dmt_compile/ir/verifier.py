"""Holds a graph to the rules of its stage, after every pass.

A rule is an id, the stage from which it holds, one sentence, and a function that yields what breaks it.
``passes/README.md`` lists them; each has a test that plants the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from dmt_compile.errors import VerifyError
from dmt_compile.ir import exchange_rules as exchange
from dmt_compile.ir import gradient_rules as gradient
from dmt_compile.ir import graph_rules as graph
from dmt_compile.ir.pass_base import PassContext
from dmt_compile.ir.stages import Stage


@dataclass(frozen=True)
class Rule:
    """A rule of the verifier: ``check`` yields one sentence for each breach."""

    id: str
    since: Stage
    text: str
    check: Callable[[fx.GraphModule, PassContext], Iterator[str]]


RULES: tuple[Rule, ...] = (
    Rule(
        "lint",
        Stage.CAPTURED,
        "The graph is well formed: nodes stand after their inputs, attributes exist.",
        graph.lint,
    ),
    Rule(
        "metadata",
        Stage.CAPTURED,
        "Each node's recorded shape, dtype and device are those that its target gives for its arguments.",
        graph.metadata,
    ),
    Rule("parameters", Stage.CAPTURED, "Graph inputs and flat parameter names are one to one.", graph.parameters),
    Rule(
        "inputs",
        Stage.CAPTURED,
        "The graph's inputs are those that Dynamo calls it with, in their order.",
        graph.inputs,
    ),
    Rule(
        "outputs",
        Stage.CAPTURED,
        "The graph's outputs have the shapes and types they were captured with.",
        graph.outputs,
    ),
    Rule("unshared", Stage.CAPTURED, "Nothing writes in place to what an operator of ours gives.", graph.unshared),
    Rule("tables", Stage.FLAT, "A table is read by lookups only.", graph.tables),
    Rule("checked", Stage.FLAT, "Lookups read ids and offsets that were checked.", graph.checked),
    Rule("features", Stage.FLAT, "Each feature is looked up once, in its own table.", graph.features),
    Rule("groups", Stage.FLAT, "Lookups that are checked together have as many bags as each other.", graph.groups),
    Rule(
        "one-tower",
        Stage.TOWERED,
        "Every table, or else each of its pieces, belongs to exactly one tower.",
        graph.one_tower,
    ),
    Rule("towers", Stage.TOWERED, "A Tower Module reads features of its own tower, and has one output.", graph.towers),
    Rule("placed", Stage.DISTRIBUTED, "Every table has the placement of the plan.", exchange.placed),
    Rule(
        "exchanged",
        Stage.DISTRIBUTED,
        "With several ranks, lookups read the samples of all of them.",
        exchange.exchanged,
    ),
    Rule(
        "delivered",
        Stage.DISTRIBUTED,
        "Ids and weights reach the owners in the layout's exchanges, wide enough, with the lengths that travel.",
        exchange.delivered,
    ),
    Rule("steps", Stage.DISTRIBUTED, "Features come through SPTT's steps in order, on one route.", exchange.steps),
    Rule(
        "scaled",
        Stage.DISTRIBUTED,
        "Gradients carry 1 / ranks to tables, and lose it on the way to weights.",
        gradient.scaled,
    ),
    Rule(
        "averaged-once",
        Stage.DISTRIBUTED,
        "No dense gradient is averaged twice.",
        gradient.averaged_once,
    ),
    Rule(
        "started-and-waited",
        Stage.DISTRIBUTED,
        "Gradients start once, bucket by bucket of one type, and are waited for once, together.",
        gradient.started_and_waited,
    ),
    Rule(
        "waited-last",
        Stage.DISTRIBUTED,
        "What waits for gradients is the first to run, so that its backward is the last.",
        gradient.waited_last,
    ),
    Rule(
        "collectives",
        Stage.DISTRIBUTED,
        "Hops run in order, each once, in their own group and form, and are waited for once.",
        exchange.collectives,
    ),
    Rule(
        "widths",
        Stage.DISTRIBUTED,
        "Exchanges are laid out by the features' widths and the plan's owners.",
        exchange.widths,
    ),
    Rule(
        "summed",
        Stage.DISTRIBUTED,
        "The row pieces of a table are added up, each once and nothing else.",
        exchange.summed,
    ),
    Rule(
        "towers-apart",
        Stage.DISTRIBUTED,
        "Tower Modules run where their features are, send what is exchanged, pass gradients on, and are summed there.",
        exchange.towers_apart,
    ),
    Rule("synchronized", Stage.LOWERED, "Every trained dense parameter's gradient is averaged.", gradient.synchronized),
    Rule("fused", Stage.LOWERED, "No lookup is left alone.", graph.fused),
    Rule("regions", Stage.LOWERED, "Dense computation is inside dense regions.", graph.regions),
)


def verify(gm: fx.GraphModule, ctx: PassContext, stage: Stage, after: str) -> None:
    """Hold a graph to the rules of ``stage`` and all stages before.

    Raises:
        VerifyError: names the pass, the rule and the first nodes that break it.
    """
    for rule in RULES:
        if stage >= rule.since:
            breaches = list(rule.check(gm, ctx))
            if breaches:
                more = f" (and {len(breaches) - 3} more)" if len(breaches) > 3 else ""
                raise VerifyError(
                    f"{after}: expected stage {stage.name.lower()}, found rule '{rule.id}' broken: "
                    f"{'; '.join(breaches[:3])}{more}. Rule: {rule.text} This is a bug of dmt_compile; dump_dir keeps "
                    "the graph, verify=False goes on without the check"
                )
