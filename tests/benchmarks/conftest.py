"""Kernels are interpreted where there is no GPU; asked for before any test of the benchmarks imports Triton."""

from __future__ import annotations

import warnings

import interpret_without_gpu  # noqa: F401

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it compiles what nobody asked for with torch.jit
    import torch.distributed.optim  # noqa: F401
