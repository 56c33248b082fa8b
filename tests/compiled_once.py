"""Compiles a model when imported: processes forked from one that has imported it compile theirs in less time."""

from __future__ import annotations

import gc

import torch

import dmt_compile
from tests.models import DLRM, make_batch

with torch.random.fork_rng():
    _model = DLRM()
    _batch = make_batch(_model, 2, torch.Generator().manual_seed(0))
    dmt_compile.SimulatedWorld("2x2").run(_model, [_batch] * 4, dense_compiler="eager")
torch._dynamo.reset()
torch._dynamo.utils.counters.clear()
gc.collect()
gc.freeze()
