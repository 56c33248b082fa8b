"""What kernels are told of the lookups of a launch: one row of whole numbers each, addresses among them.

Tables, ids and offsets are tensors of their own, and most addresses change from step to step. All that a launch has to
know goes to the device in one copy from pinned memory, 128 bytes a lookup: less than one bag's rows, so nothing of it
is kept from step to step, and nothing can become stale when a table moves.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# The columns of the numbers, in order; ``triton_fields`` has the same as constants for kernels.
FIELDS = (
    "table", "rows", "stride", "width", "column", "ids", "offsets", "number", "weights", "mean", "skipped", "shift",
    "pieces", "first", "base", "winners",
)  # fmt: skip
# Elements of a program, of 128 threads, by what it does with rows. A sum has two rows of each bag on their way, and
# one that is scaled counts or weighs them: more elements would need more registers than leave room for 8 programs.
_ELEMENTS = {"none": 2048, "sum": 1024, "scaled": 512, "max": 1024}
LONGEST_TILE = 32  # bags; more would leave a GPU with too few programs
WIDEST_BLOCK = 512
MOST_IN_32_BITS = 2**31 - 2**13  # positions, with the longest piece above


@dataclass(frozen=True)
class Feature:
    """One lookup of this rank.

    Args:
        table: (rows, D) of this rank, columns next to each other.
        ids: (N,) contiguous int32 or int64; less ``shift`` they are rows of ``table``.
        offsets: (B,) of the ids' dtype, contiguous; ``None`` for one id a bag.
        weights: (N,) contiguous, of the table's dtype, or ``None``.
        mode: ``"sum"``, ``"mean"`` or ``"max"``; ``"none"`` is the sum of one row.
        skipped: row that is left out of its bag; -1 for none.
        padding: row without a gradient; -1 for none.
        shift: see ``ids``.
        column: first of its columns in the joined output.
    """

    table: torch.Tensor
    ids: torch.Tensor
    offsets: torch.Tensor | None
    weights: torch.Tensor | None
    mode: str
    skipped: int
    padding: int
    shift: int
    column: int

    @property
    def width(self) -> int:
        """D."""
        return self.table.shape[1]


def describe(features: Sequence[Feature], device: torch.device, **columns: Sequence[int]) -> torch.Tensor:
    """Return (F, 16) int64 on the device: the fields of each feature.

    Args:
        features: of one launch.
        device: where the kernels run.
        columns: field -> its number for each feature, for the fields that only one kernel needs.
    """
    rows = []
    for index, f in enumerate(features):
        found = {name: numbers[index] for name, numbers in columns.items()}
        found |= {
            "table": f.table.data_ptr(), "rows": f.table.shape[0], "stride": f.table.stride(0), "width": f.width,
            "column": f.column, "ids": f.ids.data_ptr(), "offsets": 0 if f.offsets is None else f.offsets.data_ptr(),
            "number": len(f.ids), "weights": 0 if f.weights is None else f.weights.data_ptr(), "shift": f.shift,
        }  # fmt: skip
        rows.append([found.get(name, -1) for name in FIELDS])
    described = torch.tensor(rows, dtype=torch.int64)
    return described.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else described


def block_of(width: int) -> int:
    """Return the columns that a program takes at once: the size class of a width."""
    return min(max(1 << (width - 1).bit_length(), 16), WIDEST_BLOCK)


def tile_of(block: int, kind: str = "sum") -> int:
    """Return the bags of a program, or the rows of a long one that it loads at once; means and weights are scaled."""
    return max(min(_ELEMENTS[kind] // block, LONGEST_TILE), 2)


def segment_tile_of(block: int) -> int:
    """Return the segments of a program; Triton 3.6 cannot lay out 32 of them."""
    return min(tile_of(block, "scaled"), 16)


def vector_of(element_bytes: int, addresses: Sequence[int], elements: Sequence[int]) -> int:
    """Return how many elements a thread may load at once: as many as all addresses and distances are multiples of."""
    most = 16 // element_bytes
    return math.gcd(most, *elements, *(math.gcd(address, 16) // element_bytes for address in addresses))


def position_type(positions: int) -> torch.dtype:
    """Return the type in which positions are counted: 32 bits take half the registers."""
    return torch.int32 if positions < MOST_IN_32_BITS else torch.int64


def piece_of(positions: int) -> int:
    """Return the length of the pieces in which long bags are summed: as long as there are pieces, within limits."""
    return min(max(1 << (math.isqrt(positions).bit_length()), 256), 4096)


def classes(features: Sequence[Feature]) -> list[list[Feature]]:
    """Return the features of each launch: of one row type, id type and size class; single ids and maxima apart."""
    found: dict[object, list[Feature]] = defaultdict(list)
    for f in features:
        kind = f.mode if f.mode in ("none", "max") else "sum"
        found[f.table.dtype, f.ids.dtype, block_of(f.width), kind].append(f)
    return list(found.values())
