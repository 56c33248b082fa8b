"""Messages between ranks: a rank is ready before it sends, tags keep exchanges apart, and each has a deadline."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dmt_compile.runtime.messages import Messages
from tests.ranks import run_ranks, values


class _Work:
    def __init__(self, seconds: float, limits: list[float]) -> None:
        self.seconds, self.limits = seconds, limits

    def wait(self, timeout: timedelta) -> None:
        self.limits.append(timeout.total_seconds())
        time.sleep(self.seconds)


def test_a_rank_is_ready_for_all_it_receives_before_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int, int, int]] = []
    limits: list[float] = []

    def note(what: str) -> Any:
        def call(part: torch.Tensor, other: int, group: Any, tag: int) -> _Work:
            done.append((what, other, part.numel(), tag))
            return _Work(0.05, limits)

        return call

    monkeypatch.setattr(dist, "irecv", note("receive"))
    monkeypatch.setattr(dist, "isend", note("send"))
    received, sent = torch.zeros(7).split([2, 1, 0, 4]), torch.ones(6).split([0, 1, 3, 2])
    messages = Messages(received, sent, None, (4, 5, 6, 7), rank=5, tag=9)  # type: ignore[arg-type]
    assert done == [("receive", 4, 2, 9), ("receive", 7, 4, 9), ("send", 6, 3, 9), ("send", 7, 2, 9)]
    assert torch.cat(received).tolist() == [0, 0, 1, 0, 0, 0, 0]  # what it sends to itself is there
    messages.wait(timedelta(seconds=0.12))
    assert limits == sorted(limits, reverse=True)
    assert 0 < limits[-1] < 0.01  # one deadline for all of them, and never none


def exchange_in_two_orders(rank: int) -> bool:
    """Exchange under two tags at once, which rank 1 begins in the other order."""
    group, ranks = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    made = {}
    for tag in (1, 0) if rank == 1 else (0, 1):
        time.sleep(0.05 * (rank == tag))  # each is late once
        sent = [torch.full((100 * tag + source + rank,), float(10 * rank + tag)) for source in range(ranks)]
        received = [torch.empty(100 * tag + source + rank) for source in range(ranks)]
        made[tag] = Messages(received, sent, group, range(ranks), rank, tag), received, sent
    for messages, _, _ in made.values():
        messages.wait(timedelta(seconds=20))
    return all(
        bool((part == 10 * source + tag).all())
        for tag, (_, received, _) in made.items()
        for source, part in enumerate(received)
    )


def test_exchanges_under_two_tags_begin_in_any_order() -> None:
    assert values(run_ranks(exchange_in_two_orders, 3)) == [True] * 3
