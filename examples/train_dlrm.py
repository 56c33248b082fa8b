"""Train a flat DLRM, on one process or on many: the whole script, to copy from.

    python train_dlrm.py                                                   # eager PyTorch
    python train_dlrm.py --backend dmt                                     # the same, compiled
    torchrun --nproc-per-node 4 train_dlrm.py --backend dmt --topology 2x2 # four ranks as two hosts of two
    ... --tower-module dlrm --tower-dim 8                                  # each host compresses what it sends
    ... --ahead                                                            # steps overlap; the numbers stay the same

Nothing in the training loop is about towers: the model is flat, the tensors and optimizers are PyTorch's own. Only
``--tower-module``, which gives the model new parameters, needs a line before the optimizer is built, and ``--ahead``
one behind it and one around the batches.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from criteo import CRITEO_HASHES, CRITEO_INTEGERS, CriteoTsv
from data import Batch, load_nycflights
from dlrm import DLRM
from metrics import auc, gather_rows
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

Ready = tuple[Batch, tuple[Any, ...]]  # a batch, and what the model is called with
LEARNING_RATES = {"adam": 2e-3, "adagrad": 2e-2, "sgd": 1.0}
SHOW_EVERY = 10  # steps; reading the loss makes a GPU wait


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("nycflights", "criteo"), default="nycflights")
    parser.add_argument("--path", type=Path, help="the Criteo file, plain or .gz")
    parser.add_argument("--hash-rows", type=int, default=100_000, help="rows of each Criteo table")
    parser.add_argument("--limit-rows", type=int, help="use only so many rows of the data")
    parser.add_argument("--backend", choices=("eager", "inductor", "dmt"), default="eager")
    parser.add_argument("--topology", help="<hosts>x<ranks per host>; default: as torchrun was started")
    parser.add_argument("--tower-module", choices=("dlrm", "dcn", "dot"), help="compress towers; changes the model")
    parser.add_argument("--tower-dim", type=int, help="width of a vector that a tower sends; default: --dim")
    parser.add_argument("--ahead", action="store_true", help="let a step overlap with the ones before and after it")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2048, help="rows per step over all ranks")
    parser.add_argument("--dim", type=int, default=16, help="embedding width")
    parser.add_argument("--optimizer", choices=tuple(LEARNING_RATES), default="adam")
    parser.add_argument("--lr", type=float, help="learning rate; the default depends on the optimizer")
    parser.add_argument("--sparse", action="store_true", help="tables with sparse gradients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args(argv)
    if args.data == "criteo" and args.path is None:
        parser.error("--data criteo: expected --path with a file in Criteo's format, found none")
    for option, asked in (("--tower-module", args.tower_module is not None), ("--ahead", args.ahead)):
        if asked and args.backend != "dmt":
            parser.error(f"{option}: expected --backend dmt, found {args.backend}")
    return args


def open_data(
    args: argparse.Namespace, rank: int, world: int
) -> tuple[Callable[[int], Iterable[Batch]], Iterable[Batch], tuple[int, ...], int, int | None]:
    """Open the data set for this rank.

    Returns:
        Training batches of an epoch, test batches, rows of each table, number of dense features, and steps per epoch
        where they are known.
    """
    share = {"rank": rank, "world": world}
    if args.data == "criteo":
        table_rows = (args.hash_rows,) * CRITEO_HASHES
        train, test = (
            CriteoTsv(args.path, args.batch_size, table_rows, part, limit_rows=args.limit_rows, **share)
            for part in ("train", "test")
        )
        return lambda epoch: train, test, table_rows, CRITEO_INTEGERS, None
    data = load_nycflights(args.seed, args.limit_rows)
    return (
        lambda epoch: data.batches(data.train, args.batch_size, **share, shuffle_seed=args.seed + epoch),
        data.batches(data.test, args.batch_size, **share),
        data.table_rows,
        len(data.dense_names),
        -(-len(data.train) // args.batch_size),
    )


def make_optimizers(model: nn.Module, name: str, lr: float, sparse: bool) -> list[torch.optim.Optimizer]:
    """Make PyTorch's own optimizers; Adam takes dense gradients only, so sparse tables get SparseAdam beside it."""
    if name == "adam" and sparse:
        tables = [p for key, p in model.named_parameters() if key.startswith("emb.")]
        others = [p for key, p in model.named_parameters() if not key.startswith("emb.")]
        return [torch.optim.SparseAdam(tables, lr=lr), torch.optim.Adam(others, lr=lr)]
    kind = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}[name]
    return [kind(model.parameters(), lr=lr)]


def look_ahead(
    model: nn.Module, batch: Batch, device: torch.device, options: dict[str, Any], quiet: bool
) -> dict[str, dict[str, int]]:
    """Print, unless ``quiet``, how the tables will be spread.

    Returns:
        Bytes per step over links inside and across hosts, of the flat model, of the towers, and with Tower Modules.
    """
    import dmt_compile  # the model, the loop and the eager backend do without it

    inputs = batch.inputs(device)
    if not quiet:
        print(dmt_compile.plan(model, inputs, **options), flush=True)
    bytes_per_link: dict[str, dict[str, int]] = dmt_compile.explain(model, inputs, **options).bytes_per_link
    return bytes_per_link


def summed_over_ranks(value: Tensor) -> float:
    """Add a scalar up over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return float(value)


def train_epoch(
    model: Callable[..., Tensor],
    optimizers: list[torch.optim.Optimizer],
    batches: Iterable[Batch],
    device: torch.device,
    world: int,
    show: Callable[[int, float, float], None],
    prefetch: Callable[[Iterable[Ready]], Iterable[Ready]] = iter,
) -> tuple[float, float]:
    """Go through the training rows once.

    Args:
        model: compiled or not.
        optimizers: of its parameters.
        batches: this rank's.
        device: where the model is.
        world: number of ranks.
        show: called now and then with step, loss and samples per second.
        prefetch: passes on batches whose tensors are on the device, and may do something with the next one already.

    Returns:
        The mean loss and the samples per second, both over all ranks.
    """
    loss_sum, rows, start = torch.zeros((), dtype=torch.float64, device=device), 0, time.perf_counter()
    ready = ((batch, batch.inputs(device)) for batch in batches)
    for step, (batch, inputs) in enumerate(prefetch(ready), start=1):
        labels_B = batch.labels_B.to(device)
        logits_B = model(*inputs)
        local_sum = binary_cross_entropy_with_logits(logits_B, labels_B, reduction="sum")
        # Gradients are averaged over ranks, as under DDP: each rank weighs 1 / world however many rows it has. For the
        # mean over the rows of the global batch a rank's loss is therefore its sum x world / global rows. A rank
        # without rows has a sum of 0 and takes part in the backward pass all the same: the others wait for it.
        loss = local_sum * world / batch.global_rows
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        loss_sum += local_sum.detach()
        rows += batch.global_rows
        if step % SHOW_EVERY == 0:
            show(step, float(loss.detach()), rows / (time.perf_counter() - start))
    if rows == 0:
        raise SystemExit("train_dlrm: expected at least one batch of training rows, found none; lower --batch-size")
    mean_loss = summed_over_ranks(loss_sum) / rows
    return mean_loss, rows / (time.perf_counter() - start)


@torch.no_grad()
def evaluate(model: Callable[..., Tensor], batches: Iterable[Batch], device: torch.device) -> float:
    """Compute the AUC over the test rows of all ranks."""
    scores, labels = [], []
    for batch in batches:
        scores.append(model(*batch.inputs(device)))
        labels.append(batch.labels_B.to(device))
    return auc(gather_rows(torch.cat(scores)).cpu(), gather_rows(torch.cat(labels)).cpu())


def main() -> None:
    """Train, evaluate, report."""
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world > 1 and args.backend != "dmt":
        raise SystemExit(
            f"train_dlrm: expected --backend dmt for {world} ranks, found {args.backend}, with which every rank would "
            "train a model of its own; pass --backend dmt, or start one process"
        )
    device = torch.device("cpu")
    if torch.cuda.device_count() >= local_world:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    topology = args.topology or f"{world // local_world}x{local_world}"

    train_batches, test_batches, table_rows, dense_features, steps = open_data(args, rank, world)
    torch.manual_seed(args.seed)
    model = DLRM(table_rows, args.dim, dense_features, sparse=args.sparse).to(device)
    options: dict[str, Any] = {"topology": topology} if args.backend == "dmt" else {}
    if args.tower_module is not None:
        options |= {"tower_module": args.tower_module, "tower_module_options": {"dim": args.tower_dim or args.dim}}
    bytes_per_link = None
    if args.backend == "dmt" and world > 1 and rank == 0:
        bytes_per_link = look_ahead(model, next(iter(train_batches(0))), device, options, args.quiet)
    compiled: Callable[..., Tensor] = model
    if args.backend != "eager":
        compiled = torch.compile(model, backend=args.backend, options=options)
    if args.tower_module is not None:
        import dmt_compile

        dmt_compile.warmup(compiled, next(iter(train_batches(0))).inputs(device))  # the optimizer needs the towers
    optimizers = make_optimizers(model, args.optimizer, args.lr or LEARNING_RATES[args.optimizer], args.sparse)
    prefetch: Callable[[Iterable[Ready]], Iterable[Ready]] = iter
    if args.ahead:
        import dmt_compile

        prefetch = partial(dmt_compile.prefetch, compiled=compiled, batch_of=itemgetter(1))  # ids of the next batch
        dmt_compile.defer_step(optimizers[-1], compiled)  # what has the dense parameters: their averages arrive later

    name = args.backend + (f" x{world} as {topology}" if world > 1 else "")
    name += f", {args.tower_module} towers" if args.tower_module is not None else ""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} samples/s"),
        console=Console(), disable=args.quiet or rank != 0,
    )  # fmt: skip
    model.train()
    with bar:
        for epoch in range(args.epochs):
            compiles = ", compiles first" if epoch == 0 and args.backend != "eager" else ""
            task = bar.add_task(f"epoch {epoch + 1}/{args.epochs}{compiles}", total=steps, loss=0.0, speed=0.0)

            def show(step: int, loss: float, speed: float, task: TaskID = task) -> None:
                bar.update(task, completed=step, loss=loss, speed=speed)

            loss, samples_per_s = train_epoch(compiled, optimizers, train_batches(epoch), device, world, show, prefetch)
            bar.update(task, completed=steps, loss=loss, speed=samples_per_s)

    model.eval()
    test_auc = evaluate(compiled, test_batches, device)
    if rank == 0:
        # The speed is the last epoch's: the first one also compiles.
        print(f"{name}: loss {loss:.4f}  test AUC {test_auc:.4f}  {samples_per_s:,.0f} samples/s", flush=True)
        if args.json is not None:
            result = {"name": name, "loss": loss, "auc": test_auc, "samples_per_s": samples_per_s, "world": world}
            args.json.write_text(json.dumps(result | {"bytes_per_link": bytes_per_link}) + "\n")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
        if device.type == "cpu":
            # gloo's threads can outlive the group and abort the process while the interpreter shuts down: all is
            # written, so leave before that.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


if __name__ == "__main__":
    main()
