"""Checks of one rank's batch before anything of it is used or sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmt_compile.errors import BatchError
from dmt_compile.kernels.batched_lookup.reference import Pooling

ID_RANGE, OFFSETS, BATCH_SIZE, WEIGHTS, NUMBER = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Fault:
    """What is wrong with a batch, in numbers that fit a header: kind, feature or input, position, value."""

    kind: int
    feature: int = 0
    position: int = 0
    value: int = 0

    def error(self, labels: Sequence[str], rows: Sequence[tuple[int, int]], where: str = "") -> BatchError:
        """Return the error that names the table, the position and the bound."""
        name = labels[self.feature]
        if self.kind == ID_RANGE:
            first, end = rows[self.feature]
            return BatchError(
                f"check_batch: expected ids of table {name} in [{first}, {end}), found {self.value} at "
                f"position {self.position}{where}; nothing was updated, map unknown ids to a row of the table"
            )
        if self.kind == OFFSETS:
            return BatchError(
                f"check_batch: expected offsets of table {name} that start at 0 and grow to at most the number of ids, "
                f"found a bag of {self.value} ids at position {self.position}{where}; nothing was updated"
            )
        if self.kind == WEIGHTS:
            return BatchError(
                f"check_batch: expected one weight for each of {self.position} ids of table {name}, found "
                f"{self.value}{where}; nothing was updated"
            )
        if self.kind == NUMBER:
            return BatchError(
                f"check_batch: expected at most {self.position} ids of table {name} in one batch, found {self.value}"
                f"{where}; nothing was updated, split the batch"
            )
        return BatchError(
            f"check_batch: expected {self.position} samples in every input, found {self.value} in {name}{where}; "
            "nothing was updated"
        )


def find_fault(
    ids: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor | None],
    how: Sequence[Pooling],
    weights: Sequence[torch.Tensor | None],
    others: Sequence[torch.Tensor],
    rows: Sequence[tuple[int, int]],
    check_ids: bool,
) -> Fault | None:
    """Return the first fault of a batch, or ``None``.

    Args:
        ids: per feature (N_f,) integer ids.
        offsets: per feature (B,) integer starts of the bags, (B + 1,) with the last one's end, or ``None`` for one id a
            bag.
        how: per feature.
        weights: per feature (N_f,) or ``None``.
        others: the model's other inputs of B samples.
        rows: per feature the first and the end of the rows it may read.
        check_ids: look at the ids and offsets too, not at sizes alone.

    Cost: one pass over ids and offsets, one synchronisation with the device.
    """
    sizes = [*map(number_of_bags, ids, offsets, how), *map(len, others)]
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            return Fault(BATCH_SIZE, index, sizes[0], size)
    for index, (found, factors) in enumerate(zip(ids, weights, strict=True)):
        if factors is not None and len(factors) != len(found):
            return Fault(WEIGHTS, index, len(found), len(factors))
    if not ids or not check_ids:
        return None
    jagged = [index for index, starts in enumerate(offsets) if starts is not None]
    if sizes[0] == 0:
        read = trim(ids, offsets, how)
        return next((Fault(OFFSETS, index, 0, len(read[index])) for index in jagged if len(read[index])), None)
    bags = bag_bounds(ids, offsets, how, jagged)
    filled = [index for index, feature_ids in enumerate(ids) if feature_ids.numel()]
    words = _lowest_and_highest([ids[index] for index in filled])
    if bags:
        bounds = torch.stack(bags)
        ends_F = torch.tensor([ids[index].numel() for index in jagged], device=bounds.device)
        bad_offsets = (bounds.diff(dim=1) < 0).any() | (bounds[:, 0] != 0).any() | (bounds[:, -1] > ends_F).any()
        words.append(bad_offsets.long().reshape(1))
    report = torch.cat(words).tolist() if words else []
    if bags and report[-1]:
        return _offsets_fault(jagged, bags, [len(ids[index]) for index in jagged])
    for position, index in enumerate(filled):
        (lowest, highest), (first, end) = report[2 * position : 2 * position + 2], rows[index]
        if lowest < first or highest >= end:
            outside_N = (ids[index] < first) | (ids[index] >= end)
            where = int(outside_N.nonzero()[0])
            return Fault(ID_RANGE, index, where, int(ids[index][where]))
    return None


def _lowest_and_highest(ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the lowest and the highest id of each feature, int64, side by side in one or more tensors."""
    if len({(feature_ids.shape, feature_ids.dtype) for feature_ids in ids}) == 1:  # at once
        return [torch.stack(torch.aminmax(torch.stack(list(ids)), dim=1), dim=1).long().reshape(-1)]
    return [torch.stack(torch.aminmax(feature_ids)).long() for feature_ids in ids]


def _offsets_fault(jagged: Sequence[int], bags: Sequence[torch.Tensor], numbers_of_ids: Sequence[int]) -> Fault:
    for index, bounds, number in zip(jagged, bags, numbers_of_ids, strict=True):
        lengths = bounds.diff()
        if bounds[0] != 0:
            return Fault(OFFSETS, index, 0, int(lengths[0]))
        if bool((lengths < 0).any()):
            position = int((lengths < 0).nonzero()[0])
            return Fault(OFFSETS, index, position, int(lengths[position]))
        if bounds[-1] > number:
            return Fault(OFFSETS, index, len(lengths) - 1, int(lengths[-1]))
    raise AssertionError("some offsets are faulty")


def number_of_bags(ids: torch.Tensor, offsets: torch.Tensor | None, how: Pooling) -> int:
    """Return B of one feature."""
    return ids.numel() if offsets is None else offsets.numel() - how.last_offset


def bag_bounds(
    ids: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor | None], how: Sequence[Pooling], jagged: Sequence[int]
) -> list[torch.Tensor]:
    """Return where the bags of each jagged feature start, and where its last one ends: (B + 1,) int64 each.

    Features that share their offsets, and have as many ids, share the result.
    """
    made: dict[tuple[int, int, bool], torch.Tensor] = {}
    out = []
    for index in jagged:
        starts, number, last = offsets[index], ids[index].numel(), how[index].last_offset
        assert starts is not None
        key = id(starts), number, last
        if key not in made:
            made[key] = starts.long() if last else torch.nn.functional.pad(starts.long(), (0, 1), value=number)
        out.append(made[key])
    return out


def trim(
    ids: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor | None], how: Sequence[Pooling]
) -> list[torch.Tensor]:
    """Return each feature's ids without those behind the end of its last bag."""
    out = list(ids)
    for index, (starts, pooling) in enumerate(zip(offsets, how, strict=True)):
        if pooling.last_offset and starts is not None:
            out[index] = ids[index][: max(int(starts[-1]), 0)]
    return out
