"""Checks of one rank's batch before anything of it is used or sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmt_compile.errors import BatchError

ID_RANGE, OFFSETS, BATCH_SIZE, RAISED = 1, 2, 3, 4


@dataclass(frozen=True)
class Fault:
    """What is wrong with a batch, in numbers that fit a header: kind, feature or input, position, value."""

    kind: int
    feature: int = 0
    position: int = 0
    value: int = 0

    def error(self, labels: Sequence[str], rows: Sequence[int], where: str = "") -> BatchError:
        """Return the error that names the table, the position and the bound."""
        name = labels[self.feature]
        if self.kind == ID_RANGE:
            return BatchError(
                f"check_batch: expected ids of table {name} in [0, {rows[self.feature]}), found {self.value} at "
                f"position {self.position}{where}; nothing was updated, map unknown ids to a row of the table"
            )
        if self.kind == OFFSETS:
            return BatchError(
                f"check_batch: expected offsets of table {name} that start at 0 and grow to at most the number of ids, "
                f"found a bag of {self.value} ids at position {self.position}{where}; nothing was updated"
            )
        if self.kind == RAISED:
            return BatchError(f"check_batch: expected every rank to reach its lookups, found an exception{where}")
        return BatchError(
            f"check_batch: expected {self.position} samples in every input, found {self.value} in {name}{where}; "
            "nothing was updated"
        )


def find_fault(
    ids: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    rows: Sequence[int],
    check_ids: bool,
) -> Fault | None:
    """Return the first fault of a batch, or ``None``.

    Args:
        ids: per feature (N_f,) integer ids.
        offsets: per feature (B,) integer starts of the bags.
        others: the model's other inputs of B samples.
        rows: rows of each feature's table.
        check_ids: look at the ids and offsets too, not at sizes alone.

    Cost: one pass over ids and offsets, one synchronisation with the device.
    """
    sizes = [len(tensor) for tensor in (*offsets, *others)]
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            return Fault(BATCH_SIZE, index, sizes[0], size)
    if not ids or not check_ids:
        return None
    if sizes[0] == 0:
        return next((Fault(OFFSETS, index, 0, len(found)) for index, found in enumerate(ids) if len(found)), None)
    lengths_FB = bag_lengths(ids, offsets)
    starts_F = torch.stack([feature_offsets[0] for feature_offsets in offsets])
    filled = [index for index, feature_ids in enumerate(ids) if len(feature_ids)]
    ranges = [torch.stack(torch.aminmax(ids[index])) for index in filled]
    extremes_F2 = torch.stack(ranges) if ranges else starts_F.new_zeros(0, 2)
    bad_offsets = (lengths_FB < 0).any() | (starts_F != 0).any()
    report = torch.cat([extremes_F2.long().reshape(-1), bad_offsets.long().reshape(1)]).tolist()
    if report[-1]:
        return _offsets_fault(lengths_FB, starts_F)
    for position, index in enumerate(filled):
        lowest, highest = report[2 * position : 2 * position + 2]
        if lowest < 0 or highest >= rows[index]:
            outside_N = (ids[index] < 0) | (ids[index] >= rows[index])
            first = int(outside_N.nonzero()[0])
            return Fault(ID_RANGE, index, first, int(ids[index][first]))
    return None


def _offsets_fault(lengths_FB: torch.Tensor, starts_F: torch.Tensor) -> Fault:
    if bool((starts_F != 0).any()):
        feature = int((starts_F != 0).nonzero()[0])
        return Fault(OFFSETS, feature, 0, int(lengths_FB[feature, 0]))
    feature, position = (int(index) for index in (lengths_FB < 0).nonzero()[0])
    return Fault(OFFSETS, feature, position, int(lengths_FB[feature, position]))


def bag_lengths(ids: Sequence[torch.Tensor], offsets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the number of ids in each bag, (F, B) int64."""
    starts_FB = torch.stack([feature_offsets.long() for feature_offsets in offsets])
    ends_F1 = torch.tensor([[len(feature_ids)] for feature_ids in ids], device=starts_FB.device)
    return torch.cat([starts_FB[:, 1:], ends_F1], dim=1) - starts_FB
