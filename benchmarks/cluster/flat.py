"""Flat model parallelism written by hand: two all-to-alls over all ranks, the dense part under DistributedDataParallel.

Ids travel alone, since a bag holds one; pooled embeddings of a rank's tables go back in one message a rank, and their
gradients take the same way.

Shape suffixes: B samples of a rank, F tables, R ranks, O tables of this rank, D embedding width.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from models import DLRM
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.programs import Step
from cluster.workload import Batch, Workload, loss_of, take_tables


def owned_tables(tables: int, rank: int, world: int) -> range:
    """Return the tables of a rank: as even as can be, neighbours together."""
    return range(tables * rank // world, tables * (rank + 1) // world)


class _Exchange(torch.autograd.Function):
    """All-to-all of equal-batch blocks; its gradient is the all-to-all the other way."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, send: list[int], receive: list[int]) -> Tensor:
        ctx.splits = send, receive
        received = sent.new_empty(sum(receive))
        dist.all_to_all_single(received, sent, receive, send)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        send, receive = ctx.splits
        back = gradient.new_empty(sum(send))
        dist.all_to_all_single(back, gradient.contiguous(), send, receive)
        return back, None, None


def build(flat: DLRM, workload: Workload, batches: list[Batch]) -> Step:
    """Return the training step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    owned = [owned_tables(workload.tables, r, world) for r in range(world)]
    weights = take_tables(flat)
    table_weights = [weights[index] for index in owned[rank]]
    # In a group of its own: the gradients' all-reduce runs beside the exchange of the embeddings' gradients.
    dense = DistributedDataParallel(flat, process_group=dist.new_group(list(range(world))))
    optimizer = torch.optim.SGD([*dense.parameters(), *table_weights], lr=workload.lr)
    id_send = [len(tables_of) * workload.samples for tables_of in owned]
    id_receive = [len(table_weights) * workload.samples] * world
    send = [count * workload.dim for count in id_receive]
    receive = [count * workload.dim for count in id_send]

    upcoming = cycle(batches)

    def step() -> tuple[Tensor, Tensor]:
        batch = next(upcoming)
        optimizer.zero_grad()
        ids = batch.ids_FB.new_empty(sum(id_receive))
        dist.all_to_all_single(ids, batch.ids_FB.reshape(-1), id_receive, id_send)
        ids_ORB = ids.view(world, len(table_weights), -1).transpose(0, 1)
        pooled_ORBD = torch.stack(
            [nn.functional.embedding(i, w, sparse=True) for i, w in zip(ids_ORB, table_weights, strict=True)]
        )
        received: Tensor = _Exchange.apply(pooled_ORBD.transpose(0, 1).reshape(-1), send, receive)
        pooled_FBD = received.view(workload.tables, workload.samples, workload.dim)
        logits_B = dense(batch.dense_BI, list(pooled_FBD), [()] * workload.tables)
        loss = loss_of(logits_B, batch.labels_B)
        loss.backward()
        for weight in table_weights:
            assert weight.grad is not None
            weight.grad.div_(world)  # the mean over ranks, as the dense part's
        optimizer.step()
        return loss.detach(), logits_B.detach()

    return Step(step)
