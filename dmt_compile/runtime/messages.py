"""An all-to-all on a CPU, as messages from rank to rank.

A gloo rank begins to send once the receiver has said, on the same connection, that it is ready. ``all_to_all_single``
sends before it says so: of two ranks of which one is late, the late one sends at once, and its "ready" waits behind all
that it sends. Then each direction of the link has its turn, and the exchange takes twice its time. Here a rank says
that it is ready before it sends anything, and both directions are in use from the start
(``tests/distributed/test_messages.py``).

Inside a host it is the other way round, as in ``all_to_all_single``. Who sends to a rank that is ready writes all of it
at once, under the connection's lock, and gloo's own thread, to which something arrives on the same connection in the
meantime, asks for that lock again and again until it gets it. What was sent before the other was ready, that thread
writes itself, in turn with what it reads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


class Messages:
    """Messages under way between this rank and others: memory that they fill or read, and what is waited for.

    Args:
        received: what each member of the group sends is written here; its parts have the sizes of what they send.
        sent: to each member.
        group: a process group of gloo.
        members: its ranks, ascending, as a group numbers them.
        rank: this one, a member; what it sends to itself is copied.
        tag: messages of one tag arrive in the order in which they are sent.
        inside_host: all members are on one host.
    """

    def __init__(
        self,
        received: Sequence[torch.Tensor],
        sent: Sequence[torch.Tensor],
        group: dist.ProcessGroup,
        members: Sequence[int],
        rank: int,
        tag: int,
        inside_host: bool,
    ) -> None:
        self._memory = received, sent
        mine = members.index(rank)
        # The group's own methods: ``irecv`` and ``isend`` look up the group and this rank's place in it each time.
        into = [(part, place) for place, part in enumerate(received) if place != mine and part.numel()]
        out_of = [(part, place) for place, part in enumerate(sent) if place != mine and part.numel()]
        sending = [group.send([part], place, tag) for part, place in out_of] if inside_host else []
        self._works = [group.recv([part], place, tag) for part, place in into]
        self._works += sending or [group.send([part], place, tag) for part, place in out_of]
        received[mine].copy_(sent[mine])

    def wait(self, timeout: timedelta) -> None:
        """Wait until all is received and the memory of what was sent is free.

        Raises:
            RuntimeError: of the transport, where another rank does not come within ``timeout`` or broke off.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        for work in self._works:
            left = timedelta(seconds=max(deadline - time.monotonic(), 0.001))  # 0 would mean no limit
            work.wait(left)
