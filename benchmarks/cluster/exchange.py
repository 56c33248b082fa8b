"""One rank of ``exchange_bench.py``: exchanges with its peer on the other host, which begins later."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cluster.rank import run
from dmt_compile.runtime.messages import Messages
from dmt_compile.topology import Topology

LIMIT = timedelta(seconds=60)


class Rank:
    """What this rank has made."""

    def start(self, layout: str, megabytes: float) -> dict[str, Any]:
        """Join the process group and make the messages."""
        dist.init_process_group("gloo", timeout=LIMIT)
        self.rank, self.topology = dist.get_rank(), Topology.parse(layout)
        for local in range(self.topology.local_ranks):
            members = self.topology.peer_ranks(local)
            group = dist.new_group(list(members))
            if self.rank in members:
                self.group, self.members = group, members
        elements = int(megabytes * 1e6 / 4)
        self.sent = torch.full((len(self.members) * elements,), float(self.rank))
        self.received = torch.empty_like(self.sent)
        return {}

    def exchange(self, how: str, late_ms: float, times: int) -> dict[str, Any]:
        """Exchange some times; one host is late, the hosts in turn.

        Returns:
            Seconds on the clock that all ranks share: begin and end of each exchange.
        """
        spans = []
        for turn in range(times):
            self.received.fill_(-1)
            dist.barrier()
            if self.topology.host_of(self.rank) == turn % self.topology.hosts:
                time.sleep(late_ms / 1e3)
            begin = time.monotonic()
            if how == "all_to_all_single":
                dist.all_to_all_single(self.received, self.sent, group=self.group)
            else:
                parts = (tensor.chunk(len(self.members)) for tensor in (self.received, self.sent))
                Messages(*parts, self.group, self.members, self.rank, tag=0, inside_host=False).wait(LIMIT)
            spans.append((begin, time.monotonic()))
            for member, part in zip(self.members, self.received.chunk(len(self.members)), strict=True):
                assert bool((part == member).all()), "an exchange brought something else"
        return {"spans": spans}


if __name__ == "__main__":
    rank = Rank()
    run({"start": rank.start, "exchange": rank.exchange})
