"""What the fork server of the tests' ranks does once: it compiles and steps, so that no rank pays for a first time.

Importing PyTorch leaves much to the first compilation: decompositions, fake tensors' and sympy's caches. What is there
by then is left out of every later garbage collection.
"""

from __future__ import annotations

import gc

import torch
from torch._dynamo.utils import counters

import dmt_compile
from tests.models import DLRM, make_batch

torch.set_num_threads(1)  # threads would not be there after a fork
_model = DLRM()
_generator = torch.Generator().manual_seed(0)
_batches = [make_batch(_model, size, _generator) for size in (3, 0, 2, 5)]
_world = dmt_compile.SimulatedWorld("2x2")
torch.cat(_world.run(_model, _batches, dense_compiler="eager")).sum().backward()
torch._dynamo.reset()
counters.clear()
del _model, _generator, _batches, _world
gc.collect()
gc.freeze()
