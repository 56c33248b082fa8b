"""The operator that holds buffers to the values that a graph was rewritten for."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dmt_compile import torch_internals
from dmt_compile.errors import UnsupportedGraphError
from dmt_compile.ir.ops import operator

_checked: Any = WeakIdKeyDictionary()  # buffer -> its state and digest when it was looked at last


def digest_of(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's type, shape and numbers."""
    content = tensor.detach().cpu().contiguous()
    described = f"{content.dtype} {tuple(content.shape)} ".encode()
    return hashlib.sha256(described + content.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


@operator(lambda sizes, buffer, digest, name: None)
def check_constant(buffer: torch.Tensor, digest: str, name: str) -> None:
    """Check that a buffer still has the numbers that ``digest`` is of.

    Raises:
        UnsupportedGraphError: it has others.

    Cost: nothing while the buffer is not written to; then, and the first time, it is copied to the CPU.
    """
    now = (torch_internals.written(buffer), buffer.data_ptr(), digest)
    if now[0] is not None and _checked.get(buffer) == now:
        return
    if digest_of(buffer) != digest:
        raise UnsupportedGraphError(
            f"fuse_interaction: expected the values in {name} that the model was compiled for, found others; call "
            "torch._dynamo.reset() after changing them"
        )
    _checked[buffer] = now
