"""One all-to-all of a step: what is sent where, in which form on the wire, forward and then backward.

Shape suffixes: R ranks of the group; the blocks of a tensor are R groups of rows, each with a width of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dmt_compile.kernels.choice import REFERENCE
from dmt_compile.kernels.pack_rows.op import CASTS, FORMATS, pack_rows, packed_dtype, packed_width, unpack_rows
from dmt_compile.runtime.world import Pending, World

Block = tuple[int, int]  # rows, columns


def wire_sizes(blocks: Sequence[Block], form: str) -> list[int]:
    """Return the elements that each block has on the wire."""
    return [rows * (packed_width(width, form) if form in FORMATS else width) for rows, width in blocks]


def encode(tensor: torch.Tensor, blocks: Sequence[Block], form: str, kernel: str = REFERENCE) -> torch.Tensor:
    """Return a tensor's blocks as they travel, 1-D; ``form``: of ``pack_rows``, or the tensor's own type."""
    flat = tensor.reshape(-1)
    if form not in FORMATS:
        return flat
    if form in CASTS:  # element by element: the blocks need not be told apart
        return pack_rows(flat[None], form, kernel)[0]
    parts = flat.split([rows * width for rows, width in blocks])
    packed = [
        pack_rows(part.view(rows, width), form, kernel).view(-1)
        for part, (rows, width) in zip(parts, blocks, strict=True)
    ]
    return torch.cat(packed)


def decode(
    wire: torch.Tensor, blocks: Sequence[Block], form: str, dtype: torch.dtype, kernel: str = REFERENCE
) -> torch.Tensor:
    """Return what ``encode`` was given, 1-D, of type ``dtype``."""
    if form not in FORMATS:
        return wire
    if form in CASTS:
        return unpack_rows(wire[None], form, len(wire), dtype, kernel)[0]
    parts = wire.split(wire_sizes(blocks, form))
    rows_of = [
        unpack_rows(part.view(rows, packed_width(width, form)), form, width, dtype, kernel).reshape(-1)
        for part, (rows, width) in zip(parts, blocks, strict=True)
    ]
    return torch.cat(rows_of)


@dataclass
class Transfer:
    """One all-to-all among the ranks of a group, and its way back.

    Args:
        send: blocks that go to each rank of the group.
        receive: blocks that come from each.
        hop: its name in errors and in the ledger.
        group: whose ranks take part.
        forms: on the wire, forward and backward; see :func:`encode`.
        dtypes: of what arrives, forward and backward.
        kernel: what packs and unpacks rows.
    """

    world: World
    send: list[Block]
    receive: list[Block]
    hop: str
    group: str
    forms: tuple[str, str]
    dtypes: tuple[torch.dtype, torch.dtype]
    kernel: str = REFERENCE
    _pending: list[tuple[Pending, list[Block], str, torch.dtype]] = field(default_factory=list)

    def start(self, tensor: torch.Tensor, backward: bool = False) -> torch.Tensor:
        """Start to send; return a stand-in for what will be received, of its shape and type, that takes no memory."""
        send, receive = (self.receive, self.send) if backward else (self.send, self.receive)
        form, direction = self.forms[backward], "backward" if backward else "forward"
        wire = encode(tensor, send, form, self.kernel)
        if form in FORMATS:
            # As bytes: not every transport knows every type.
            size, wire = packed_dtype(form).itemsize, wire.view(torch.uint8)
        else:
            size = 1
        outgoing, incoming = ([size * n for n in wire_sizes(blocks, form)] for blocks in (send, receive))
        pending = self.world.start_all_to_all(wire, outgoing, incoming, self.group, self.hop, direction)
        dtype = self.dtypes[backward]
        self._pending.append((pending, receive, form, dtype))
        return tensor.new_empty((), dtype=dtype).expand(sum(rows * width for rows, width in receive))

    def finish(self) -> torch.Tensor:
        """Wait for what was started last, and return what was received, 1-D."""
        pending, receive, form, dtype = self._pending.pop()
        wire = pending.wait()
        packed = wire.view(packed_dtype(form)) if form in FORMATS else wire
        return decode(packed, receive, form, dtype, self.kernel)
