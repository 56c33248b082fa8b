"""The same model under TorchRec: DistributedModelParallel on CPU and gloo, fused SGD in the tables.

Shape suffixes: B samples of a rank, F tables, D embedding width.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from models import DLRM
from torch import Tensor, nn

from cluster.programs import Step
from cluster.workload import Batch, Workload, loss_of, take_tables

with warnings.catch_warnings():
    # fbgemm-gpu announces the end of its module paths, which torchrec imports
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"fbgemm_gpu\.|torchrec\.")
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed.embedding_types import EmbeddingComputeKernel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_row_wise, table_wise
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
    from torchrec.distributed.types import ShardingPlan
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
    from torchrec.streamable import Pipelineable

CPU = torch.device("cpu")
FUSED = EmbeddingComputeKernel.FUSED.value  # the gradient's update of the table in the operator's backward


@dataclass
class _Sample(Pipelineable):
    """A batch in TorchRec's form, with what its pipeline asks of one."""

    dense_BI: Tensor
    features: KeyedJaggedTensor
    labels_B: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> _Sample:
        return self

    def record_stream(self, stream: Any) -> None:
        """Nothing to do: there are no streams on a CPU."""

    def pin_memory(self) -> _Sample:
        return self


class _Model(nn.Module):
    """The flat model, without its tables, after an EmbeddingBagCollection."""

    def __init__(self, flat: DLRM, workload: Workload) -> None:
        super().__init__()
        self.keys = [f"f{index}" for index in range(workload.tables)]
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"t_{key}", embedding_dim=workload.dim, num_embeddings=workload.rows, feature_names=[key]
                )
                for key in self.keys
            ],
            device=torch.device("meta"),
        )
        self.dense = flat

    def forward(self, batch: _Sample) -> tuple[Tensor, Tensor]:
        pooled = self.tables(batch.features)
        logits_B = self.dense(batch.dense_BI, [pooled[key] for key in self.keys], [()] * len(self.keys))
        return loss_of(logits_B, batch.labels_B), logits_B


def build(flat: DLRM, workload: Workload, batches: list[Batch], sharding: str, pipeline: bool, fp16: bool) -> Step:
    """Return the training step.

    Args:
        flat: the flat model.
        workload: its sizes.
        batches: local batches.
        sharding: ``"tw"``, whole tables in turn over all ranks; ``"twrw"``, each split by rows in one host, the hosts
            in turn; ``"planner"``, what TorchRec's planner chooses.
        pipeline: whether TrainPipelineSparseDist exchanges the next batch's ids meanwhile.
        fp16: whether embeddings and their gradients travel as fp16.
    """
    logging.getLogger("torchrec").setLevel(logging.WARNING)
    weights = take_tables(flat)
    model = _Model(flat, workload)
    fused = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": workload.lr}
    half = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.FP16)
    codecs = get_qcomm_codecs_registry(half, device=CPU) if fp16 else None
    sharder = EmbeddingBagCollectionSharder(fused_params=fused, qcomm_codecs_registry=codecs)
    plan = _plan(model, sharder, sharding, workload)
    sharded = DistributedModelParallel(module=model, device=CPU, plan=plan, sharders=[sharder])
    _load(sharded, weights)
    dense = [parameter for name, parameter in sharded.named_parameters() if ".tables." not in f".{name}"]
    optimizer = torch.optim.SGD(dense, lr=workload.lr)
    samples = cycle(_samples(batches, model.keys))
    return Step(_pipelined(sharded, optimizer, samples) if pipeline else _plain(sharded, optimizer, samples))


def _samples(batches: list[Batch], keys: list[str]) -> list[_Sample]:
    """Return the batches in TorchRec's form."""
    return [
        _Sample(
            batch.dense_BI,
            KeyedJaggedTensor.from_lengths_sync(
                keys, batch.ids_FB.reshape(-1), torch.ones(batch.ids_FB.numel(), dtype=torch.int32)
            ),
            batch.labels_B,
        )
        for batch in batches
    ]


def _plan(model: _Model, sharder: Any, sharding: str, workload: Workload) -> ShardingPlan:
    world, local_ranks = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    if sharding == "planner":
        topology = Topology(world_size=world, local_world_size=local_ranks, compute_device="cpu")
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=workload.samples)
        return planner.collective_plan(model, [sharder], dist.group.WORLD)
    names = [config.name for config in model.tables.embedding_bag_configs()]
    if sharding == "tw":
        placed = {name: table_wise(rank=index % world) for index, name in enumerate(names)}
    else:
        hosts = world // local_ranks
        placed = {name: table_row_wise(host_index=index % hosts) for index, name in enumerate(names)}
    module_plan = construct_module_sharding_plan(
        model.tables, placed, sharder=sharder, local_size=local_ranks, world_size=world, device_type="cpu"
    )
    for placement in module_plan.values():
        placement.compute_kernel = FUSED
    return ShardingPlan(plan={"tables": module_plan})


def _load(sharded: nn.Module, weights: list[Tensor]) -> None:
    """Put the flat model's rows and columns into this rank's shards."""
    found = {name: value for name, value in sharded.state_dict().items() if ".tables." in f".{name}"}
    for index, weight in enumerate(weights):
        (name,) = [name for name in found if f".t_f{index}." in name]
        for shard in found[name].local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.detach().copy_(weight.detach()[row : row + rows, column : column + columns])


def _plain(sharded: nn.Module, optimizer: torch.optim.Optimizer, samples: Iterator[_Sample]) -> Any:
    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        loss, logits_B = sharded(next(samples))
        loss.backward()
        optimizer.step()
        return loss.detach(), logits_B.detach()

    return step


def _pipelined(sharded: nn.Module, optimizer: torch.optim.Optimizer, samples: Iterator[_Sample]) -> Any:
    def with_loss(sample: _Sample) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        loss, logits_B = sharded(sample)
        return loss, (loss.detach(), logits_B.detach())

    pipeline = TrainPipelineSparseDist(sharded, optimizer, CPU, custom_model_fwd=with_loss)
    return lambda: pipeline.progress(samples)
