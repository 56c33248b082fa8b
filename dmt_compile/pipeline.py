"""The driver: runs the passes in their one order, verifies after each, times, dumps and reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from dmt_compile.config import Options
from dmt_compile.inspection.dumps import GraphDump
from dmt_compile.ir.pass_base import Pass, PassContext, PassReport
from dmt_compile.ir.stages import Effect, Stage
from dmt_compile.ir.verifier import verify
from dmt_compile.passes.batch_lookups import BatchLookups
from dmt_compile.passes.check_lookups import CheckLookups
from dmt_compile.passes.compile_dense_regions import CompileDenseRegions
from dmt_compile.passes.compress_collectives import CompressCollectives
from dmt_compile.passes.find_interaction import FindInteraction
from dmt_compile.passes.find_tables import FindTables
from dmt_compile.passes.fold_blocks import FoldBlocks
from dmt_compile.passes.fold_casts import FoldCasts
from dmt_compile.passes.fold_joins import FoldJoins
from dmt_compile.passes.fold_permutes import FoldPermutes
from dmt_compile.passes.fuse_cross import FuseCross
from dmt_compile.passes.fuse_interaction import FuseInteraction
from dmt_compile.passes.fuse_optimizers import FuseOptimizers
from dmt_compile.passes.insert_tower_modules import InsertTowerModules
from dmt_compile.passes.lower_to_sptt import LowerToSptt
from dmt_compile.passes.normalize_graph import NormalizeGraph
from dmt_compile.passes.overlap_collectives import OverlapCollectives
from dmt_compile.passes.partition_towers import PartitionTowers
from dmt_compile.passes.place_tables import PlaceTables
from dmt_compile.passes.pool_sequences import PoolSequences
from dmt_compile.passes.select_kernels import SelectKernels
from dmt_compile.passes.split_field_tables import SplitFieldTables
from dmt_compile.passes.split_tables import SplitTables
from dmt_compile.passes.sync_dense_gradients import SyncDenseGradients

logger = logging.getLogger(__name__)


def passes_in_order(options: Options) -> tuple[Pass, ...]:
    """Return the one order of passes; a test asserts it."""
    return (
        NormalizeGraph(),  # before anything matches: one form for sizes and views
        FindTables(),  # one form for all lookups
        SplitFieldTables(),  # before sequences: a matrix of fields looks like one
        PoolSequences(),  # before groups: a pooled sequence has one bag a sample
        CheckLookups(),  # names what all later passes speak of
        FindInteraction(),  # needs the features
        PartitionTowers(),  # needs the tables, and the interaction once towers are chosen by affinity
        InsertTowerModules(),  # needs the towers; before exchanges, which it makes narrower
        SplitTables(),  # after towers were made of whole features; before anything asks for a table's owner
        PlaceTables(),  # needs the towers
        LowerToSptt(),  # needs the placements
        CompressCollectives(),  # needs the exchanges
        SyncDenseGradients(
            wire_dtype=options.wire_forms("dense")[0]
        ),  # after the exchanges: whatever is still a trained input is dense
        BatchLookups(),  # after the exchanges: fuses what is left on a rank
        FuseOptimizers(),  # after batching: a step needs all lookups of a table in one operator
        FoldJoins(),  # after batching: the joined features are there to be read at once
        FoldBlocks(),  # after joins are folded: what reads several features as one slice needs them side by side
        FuseInteraction(options.kernels),  # after joins are folded, which gives the vectors their final form
        FuseCross(options.kernels),  # after joins are folded, so that it sees what regions will hold
        SelectKernels(options.kernels),  # after lookups and exchanges have their final arguments
        FoldPermutes(),  # after kernels are chosen: only some write rows in any order
        FoldCasts(),  # after permutes are folded: what an exchange reads may then be a lookup
        CompileDenseRegions(options.dense_compiler),  # after all that rewrites the graph
        OverlapCollectives(),  # last: orders regions and exchanges
    )


@dataclass(frozen=True)
class PassRecord:
    """One pass of one pipeline run."""

    name: str
    effect: Effect
    seconds: float
    report: PassReport

    def add(self, other: PassRecord) -> PassRecord:
        """Return the record of the same pass on both graphs."""
        a, b = self.report, other.report
        report = PassReport(
            a.changed or b.changed, a.matched + b.matched, a.skipped + b.skipped, notes=(*a.notes, *b.notes)
        )
        return PassRecord(self.name, max(self.effect, other.effect), self.seconds + other.seconds, report)


@dataclass(frozen=True)
class PipelineReport:
    """What ran; ``effect`` is the strongest effect among the passes that changed the graph."""

    records: tuple[PassRecord, ...]

    @property
    def effect(self) -> Effect:
        """The strongest effect that ran."""
        return max((record.effect for record in self.records if record.report.changed), default=Effect.EXACT)

    @staticmethod
    def merge(reports: Sequence[PipelineReport]) -> PipelineReport:
        """Return one report for a model of several graphs: each pass once, with all that it matched and left."""
        merged: dict[str, PassRecord] = {}
        for record in (record for report in reports for record in report.records):
            before = merged.get(record.name)
            merged[record.name] = record if before is None else before.add(record)
        return PipelineReport(tuple(merged.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "effect": self.effect.name,
            "passes": [
                {"name": r.name, **asdict(r.report), "effect": r.effect.name, "seconds": round(r.seconds, 4)}
                for r in self.records
            ],
        }


def run_pipeline(
    gm: fx.GraphModule, ctx: PassContext, until: Stage = Stage.LOWERED, dump: GraphDump | None = None
) -> PipelineReport:
    """Run the passes on ``gm`` in place, up to those that lead beyond stage ``until``.

    Raises:
        DmtError: from a pass or the verifier.
    """
    records: list[PassRecord] = []
    ctx.begin(gm)
    if ctx.options.verify:
        verify(gm, ctx, Stage.CAPTURED, "capture")
    for number, step in enumerate(passes_in_order(ctx.options)):
        if step.gives > until:
            break
        if dump is not None:
            dump.before(number, step.name, gm)
        start = time.perf_counter()
        report = step.run(gm, ctx)
        seconds = time.perf_counter() - start
        effect = step.effect if report.effect is None else report.effect
        records.append(PassRecord(step.name, effect, seconds, report))
        logger.debug("%s: matched %d, skipped %s, %.3f s", step.name, report.matched, report.skipped, seconds)
        if report.changed:
            gm.recompile()
        if dump is not None:
            dump.after(number, step.name, gm)
        if ctx.options.verify:
            verify(gm, ctx, step.gives, step.name)
    result = PipelineReport(tuple(records))
    if dump is not None:
        dump.report(result.as_dict())
    return result
