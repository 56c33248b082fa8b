"""Messages between ranks: a rank is ready before it sends, tags keep exchanges apart, and each has a deadline."""

from __future__ import annotations

import time
from datetime import timedelta

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


class _Group:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int, int, int]] = []
        self.limits: list[float] = []

    def send(self, parts: list[torch.Tensor], place: int, tag: int) -> _Work:
        self.done.append(("send", place, parts[0].numel(), tag))
        return _Work(0.05, self.limits)

    def recv(self, parts: list[torch.Tensor], place: int, tag: int) -> _Work:
        self.done.append(("receive", place, parts[0].numel(), tag))
        return _Work(0.05, self.limits)


@pytest.mark.parametrize("inside_host", [False, True])
def test_between_hosts_a_rank_is_ready_for_all_it_receives_before_it_sends(inside_host: bool) -> None:
    group = _Group()
    received, sent = torch.zeros(7).split([2, 1, 0, 4]), torch.ones(6).split([0, 1, 3, 2])
    messages = Messages(received, sent, group, (4, 5, 6, 7), rank=5, tag=9, inside_host=inside_host)  # type: ignore[arg-type]
    ready, sending = [("receive", 0, 2, 9), ("receive", 3, 4, 9)], [("send", 2, 3, 9), ("send", 3, 2, 9)]
    assert group.done == ([*sending, *ready] if inside_host else [*ready, *sending])
    assert torch.cat(received).tolist() == [0, 0, 1, 0, 0, 0, 0]  # what it sends to itself is there
    messages.wait(timedelta(seconds=0.12))
    assert len(group.limits) == 4
    assert group.limits == sorted(group.limits, reverse=True)
    assert 0 < group.limits[-1] < 0.01  # one deadline for all of them, and never none


def exchange_in_two_orders(rank: int, inside_host: bool) -> bool:
    """Exchange under two tags at once, which rank 1 begins in the other order."""
    group, ranks = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    made = {}
    for tag in (1, 0) if rank == 1 else (0, 1):
        time.sleep(0.05 * (rank == tag))  # each is late once
        sent = [torch.full((100 * tag + source + rank,), float(10 * rank + tag)) for source in range(ranks)]
        received = [torch.empty(100 * tag + source + rank) for source in range(ranks)]
        made[tag] = Messages(received, sent, group, range(ranks), rank, tag, inside_host), received, sent
    for messages, _, _ in made.values():
        messages.wait(timedelta(seconds=20))
    return all(
        bool((part == 10 * source + tag).all())
        for tag, (_, received, _) in made.items()
        for source, part in enumerate(received)
    )


@pytest.mark.parametrize("inside_host", [False, True])
def test_exchanges_under_two_tags_begin_in_any_order(inside_host: bool) -> None:
    assert values(run_ranks(exchange_in_two_orders, 3, inside_host)) == [True] * 3
