"""Without a GPU, kernels run in Triton's interpreter: asked for here, before ``dmt_compile`` imports Triton."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
