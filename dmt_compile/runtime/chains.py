"""Collectives that follow upon each other, run beside the thread that computes gradients."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from dmt_compile.errors import CollectiveError


class Chains:
    """Runs chains of collectives one after another, in the order in which they are handed over.

    On a CPU one thread runs them, since each collective takes what the one before gave. Its order is that of handing
    over and thus the same on every rank, whatever the main thread does meanwhile: so the groups that chains use must be
    used by nothing else. On a GPU the order of a stream does the same without a thread; and there all collectives are
    issued by one thread, as NCCL wants it of communicators that run side by side.

    Args:
        device: where collectives take their tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._thread = None if self._on_gpu else ThreadPoolExecutor(1, "dmt_compile collectives")
        self._failure: CollectiveError | None = None

    def start(self, chain: Callable[[], None], filled: torch.Tensor) -> Callable[[], None]:
        """Start a chain that fills a tensor; return what waits for it.

        What is returned raises the chain's ``CollectiveError``. After one no chain runs any more: the ranks would not
        be at the same collective.
        """
        if self._stream is not None:
            return self._start_on_stream(self._stream, chain, filled)
        assert self._thread is not None
        return self._thread.submit(self._run, chain).result

    def _run(self, chain: Callable[[], None]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            with torch.no_grad():
                chain()
        except CollectiveError as error:
            self._failure = error
            raise

    def _start_on_stream(
        self, stream: torch.cuda.Stream, chain: Callable[[], None], filled: torch.Tensor
    ) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            chain()
            done = stream.record_event()
        filled.record_stream(stream)
        return lambda: torch.cuda.current_stream().wait_event(done)
