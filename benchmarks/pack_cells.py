"""Cells of packed rows: into a narrower form, and back.

Shape suffixes: N rows, W columns, P elements of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from kernel_cells import TYPES, Contestant, Cost, Work, inductors, kernel_of, normal

from dmt_compile.kernels.pack_rows import reference


def pack_cost(rows: int, width: int, form: str, element_bytes: int) -> Cost:
    """Return the cost of packing rows, which is that of unpacking them: both forms once."""
    packed = reference.packed_width(width, form) * reference.packed_dtype(form).itemsize
    return Cost(rows * (width * element_bytes + packed), rows * width)


@dataclass(frozen=True)
class Pack:
    """Rows packed or, with ``back``, unpacked; the reference gives the same bits."""

    form: str = "int8"
    rows: int = 425_984
    width: int = 128
    dtype: str = "fp32"
    back: bool = False
    unit: None = None

    @property
    def name(self) -> str:
        """Form, rows x columns and the type of the rows."""
        return f"{'unpack' if self.back else 'pack'}-{self.form}-{self.rows}x{self.width}-{self.dtype}"

    def tiny(self) -> Pack:
        """Return the same for Triton's interpreter."""
        return replace(self, rows=9, width=24)

    def make(self, device: torch.device) -> Work:
        """Draw rows."""
        dtype = TYPES[self.dtype]
        rows_NW = normal(device, self.rows, self.width, dtype=dtype)
        packed_NP = reference.pack_rows(rows_NW, self.form)
        expected = reference.unpack_rows(packed_NP, self.form, self.width, dtype) if self.back else packed_NP

        def of(pack: Callable[..., torch.Tensor], unpack: Callable[..., torch.Tensor], *how: str) -> Contestant:
            if self.back:
                return Contestant(lambda: unpack(packed_NP, self.form, self.width, dtype, *how))
            return Contestant(lambda: pack(rows_NW, self.form, *how))

        makers = {
            "eager": lambda: of(reference.pack_rows, reference.unpack_rows),
            **inductors(lambda compile_: of(compile_(reference.pack_rows), compile_(reference.unpack_rows))),
            "dmt": lambda: of(kernel_of("pack_rows"), kernel_of("pack_rows", "unpack_rows"), "triton"),
        }
        return Work(
            pack_cost(self.rows, self.width, self.form, dtype.itemsize),
            makers,
            lambda found: 0.0 if torch.equal(found.view(torch.uint8), expected.view(torch.uint8)) else float("inf"),
        )
