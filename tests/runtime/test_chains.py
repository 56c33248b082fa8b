"""Chains of collectives: stages in the order of handing over, chains side by side, errors where they are waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from dmt_compile.errors import CollectiveError
from dmt_compile.runtime.chains import Chains


def test_every_stage_runs_in_order_while_the_caller_goes_on() -> None:
    chains, go_on, seen = Chains(torch.device("cpu")), threading.Event(), []

    def chain(name: str) -> Iterator[None]:
        go_on.wait(10)
        seen.append(f"{name} 0")
        yield
        seen.append(f"{name} 1")

    waits = [chains.start(chain(name), torch.zeros(2)) for name in "abc"]
    assert seen == []  # starting waits for nothing
    go_on.set()
    for wait in reversed(waits):
        wait()
    assert [what for what in seen if what.endswith("0")] == ["a 0", "b 0", "c 0"]
    assert [what for what in seen if what.endswith("1")] == ["a 1", "b 1", "c 1"]


def test_a_chain_begins_while_another_waits_in_a_later_stage() -> None:
    chains, second_began = Chains(torch.device("cpu")), threading.Event()

    def first() -> Iterator[None]:
        yield
        assert second_began.wait(10)

    def second() -> Iterator[None]:
        second_began.set()
        yield

    for wait in [chains.start(chain(), torch.zeros(2)) for chain in (first, second)]:
        wait()


@pytest.mark.parametrize("stage", [0, 1])
def test_after_a_rank_did_not_come_no_chain_goes_on(stage: int) -> None:
    chains, seen = Chains(torch.device("cpu")), []

    def fail() -> Iterator[None]:
        if stage == 1:
            yield
        raise CollectiveError("rank 3 did not arrive")

    def other() -> Iterator[None]:
        yield
        seen.append("ran")

    waits = [chains.start(chain, torch.empty(0)) for chain in (fail(), other())]
    for wait in (*waits, chains.start(other(), torch.empty(0))):
        with pytest.raises(CollectiveError, match="rank 3 did not arrive"):
            wait()
    assert seen == []
