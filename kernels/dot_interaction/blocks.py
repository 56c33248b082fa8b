"""Of what size the blocks of the dot interaction's Triton kernels are.

Shape suffixes: B samples, F vectors of a sample, D width of a vector.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dmt_compile.kernels.dot_interaction.reference import pair_count
from dmt_compile.kernels.triton_support import interpreted

_MOST_WHOLE = 64  # vectors whose products are one tile
_LEADING = 128  # columns of the leading vector at a time


def _power_of_2(number: int) -> int:
    """Return the least power of 2 that is no less than ``number``."""
    return 1 << (number - 1).bit_length()


def _parts(number: int, size: int) -> int:
    """Return how many parts of a size hold ``number``."""
    return -(-number // size)


class Use(NamedTuple):
    """One use of the kernels: what is constant in them."""

    vectors: int
    columns: int
    diagonal: bool
    upper: bool
    element_bytes: int
    precision: str

    @classmethod
    def of(cls, vectors_BFD: torch.Tensor, diagonal: bool, upper: bool, tf32: bool) -> Use:
        """Return the use that these arguments are."""
        precision = "interpreted" if interpreted() else "tf32" if tf32 else "ieee"
        _, vectors, columns = vectors_BFD.shape
        return cls(vectors, columns, diagonal, upper, vectors_BFD.element_size(), precision)

    @property
    def whole(self) -> bool:
        """All products of a sample are one tile."""
        return self.vectors <= _MOST_WHOLE

    @property
    def narrow(self) -> bool:
        """Elements have 16 bits."""
        return self.element_bytes == 2

    @property
    def exact(self) -> bool:
        """Factors are float32: tensor cores do not take them, and each thread holds its own."""
        return not self.narrow and self.precision != "tf32"

    @property
    def samples(self) -> int:
        """Samples of a program: 64 rows, padding included."""
        return max(1, 64 // self.rows(False)) if self.whole else 1

    def rows(self, backward: bool) -> int:
        """Rows of a tile: all vectors where they are few; a product of tiles takes no fewer than 16."""
        if self.whole:
            return max(16, _power_of_2(self.vectors))
        return 128 if self.narrow and self.vectors > 128 and not backward else 64

    def warps(self, backward: bool) -> int:
        """Warps of a program: more where a thread would have more than its registers hold."""
        return 8 if self.rows(backward) == 128 or (backward and self.exact and not self.whole) else 4

    def constants(self, backward: bool, columns_at_once: int) -> dict[str, Any]:
        """Return what all kernels take."""
        return {
            "F": self.vectors, "COLUMNS": self.columns, "DIAGONAL": self.diagonal, "UPPER": self.upper,
            "R": self.rows(backward), "D": min(columns_at_once, max(16, _power_of_2(self.columns))),
            "PRECISION": self.precision, **({"S": self.samples} if self.whole else {}),
        }  # fmt: skip

    def forward(self, leading: int) -> dict[str, Any]:
        """Return the constants of a forward kernel."""
        at_once = 64 if self.narrow or (self.whole and not self.exact) else 32
        pairs = pair_count(self.vectors, self.diagonal)
        return {**self.constants(False, at_once), "LEADING": leading, "PAIRS": pairs, "E": _LEADING}

    def backward(self) -> dict[str, Any]:
        """Return the constants of a backward kernel."""
        return self.constants(True, 128 if self.narrow else 32 if self.exact else 64)

    def forward_programs(self, samples: int) -> int:
        """Return how many programs a forward kernel has."""
        if self.whole:
            return _parts(samples, self.samples)
        tiles = _parts(self.vectors, self.rows(False))
        return samples * (tiles * (tiles + 1) // 2)

    def backward_programs(self, samples: int) -> int:
        """Return how many programs a backward kernel has."""
        chunks = _parts(self.columns, self.backward()["D"])
        if self.whole:
            return _parts(samples, self.samples) * chunks
        return samples * _parts(self.vectors, self.rows(True)) * chunks
