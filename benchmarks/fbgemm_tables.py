"""FBGEMM's table-batched embedding as a contestant, where it is installed."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from kernel_cells import NotHere
from lookup_data import Data


def installed() -> bool:
    """Tell whether FBGEMM can be imported beside this PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names what its build left out
        try:
            import fbgemm_gpu.split_table_batched_embeddings_ops_training  # noqa: F401
        except (ImportError, OSError):
            return False
    return True


def table_batched(data: Data, optimizer: str = "EXACT_SGD", lr: float = 0.0, eps: float = 1e-8) -> Any:
    """Return FBGEMM's module with copies of the tables; a step of ``optimizer`` is part of its backward pass.

    Raises:
        NotHere: FBGEMM is not installed, or takes no such tables.
    """
    if not installed():
        raise NotHere("not installed")
    if data.tables[0].dtype != torch.float32 or data.tables[0].shape[1] % 4:
        raise NotHere("takes float32 tables of widths divisible by 4 here")
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        BoundsCheckMode,
        ComputeDevice,
        EmbeddingLocation,
        PoolingMode,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    on_gpu = data.tables[0].device.type == "cuda"
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if on_gpu else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(*table.shape, *place) for table in data.tables],
        optimizer=getattr(EmbOptimType, optimizer),
        learning_rate=lr,
        eps=eps,
        pooling_mode=PoolingMode.SUM,
        bounds_check_mode=BoundsCheckMode.NONE,
        device=data.tables[0].device,
    )
    for mine, table in zip(module.split_embedding_weights(), data.tables, strict=True):
        mine.detach().copy_(table)
    return module
