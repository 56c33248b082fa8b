"""A compiler for recommendation models: flat PyTorch in, towers and hierarchical collectives out.

``torch.compile(model, backend="dmt")`` needs no import of this package; what is exported here looks at plans, runs
simulated clusters and gathers state.
"""

from dmt_compile.api import Explanation, explain, plan
from dmt_compile.certification import certify
from dmt_compile.errors import (
    BatchError,
    CheckpointError,
    CollectiveError,
    ConfigError,
    DmtError,
    PlanError,
    UnsupportedGraphError,
    VerifyError,
)
from dmt_compile.inspection.certificate import Certificate, Quantity
from dmt_compile.inspection.communication import CommunicationReport, communication_report
from dmt_compile.partition.interaction import InteractionMatrix
from dmt_compile.partition.measure import interactions
from dmt_compile.partition.picture import save_picture
from dmt_compile.plan import Shard, TableSpec, Tower, TowerPlan
from dmt_compile.runtime.clipping import clip_grad_norm_
from dmt_compile.runtime.deferred_step import defer_step
from dmt_compile.runtime.prefetch import prefetch
from dmt_compile.runtime.simulated_world import SimulatedWorld
from dmt_compile.runtime.state import full_state_dict
from dmt_compile.runtime.warmup import warmup
from dmt_compile.topology import Topology
from dmt_compile.tower_modules import TowerSpec
from dmt_compile.transformation import TransformedModel, transform

__version__ = "0.1.0"

__all__ = [
    "BatchError",
    "Certificate",
    "CheckpointError",
    "CollectiveError",
    "CommunicationReport",
    "ConfigError",
    "DmtError",
    "Explanation",
    "InteractionMatrix",
    "PlanError",
    "Quantity",
    "Shard",
    "SimulatedWorld",
    "TableSpec",
    "Topology",
    "Tower",
    "TowerPlan",
    "TowerSpec",
    "TransformedModel",
    "UnsupportedGraphError",
    "VerifyError",
    "certify",
    "clip_grad_norm_",
    "communication_report",
    "defer_step",
    "explain",
    "full_state_dict",
    "interactions",
    "plan",
    "prefetch",
    "save_picture",
    "transform",
    "warmup",
]
