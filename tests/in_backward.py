"""PyTorch's optimizers in the backward pass, for tests, where warnings are errors."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it compiles what nobody asked for with torch.jit
    from torch.distributed.optim import _apply_optimizer_in_backward as attach

__all__ = ["attach"]
