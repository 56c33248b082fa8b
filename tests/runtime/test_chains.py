"""Chains of collectives: one after another in the order of handing over, errors where they are waited for."""

from __future__ import annotations

import threading

import pytest
import torch

from dmt_compile.errors import CollectiveError
from dmt_compile.runtime.chains import Chains


def test_chains_run_in_order_while_the_caller_goes_on() -> None:
    chains, go_on, seen = Chains(torch.device("cpu")), threading.Event(), []
    filled = torch.zeros(2)

    def fill(value: float) -> None:
        go_on.wait(10)
        seen.append(float(filled[0]))
        filled.fill_(value)

    waits = [chains.start(lambda value=value: fill(value), filled) for value in (1.0, 2.0)]
    assert seen == []  # starting waits for nothing
    go_on.set()
    for wait in reversed(waits):
        wait()
    assert seen == [0.0, 1.0]
    assert filled.tolist() == [2.0, 2.0]


def test_after_a_rank_did_not_come_no_chain_runs() -> None:
    chains, seen = Chains(torch.device("cpu")), []

    def fail() -> None:
        raise CollectiveError("rank 3 did not arrive")

    waits = [chains.start(chain, torch.empty(0)) for chain in (fail, lambda: seen.append("ran"))]
    for wait in (*waits, chains.start(lambda: seen.append("ran"), torch.empty(0))):
        with pytest.raises(CollectiveError, match="rank 3 did not arrive"):
            wait()
    assert seen == []
