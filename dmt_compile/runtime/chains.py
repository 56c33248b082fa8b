"""Collectives that follow upon each other, run beside the thread that computes gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from dmt_compile.errors import CollectiveError


class Chains:
    """Runs chains of collectives, each stage of them in the order in which the chains were handed over.

    On a CPU a thread runs the first stages of all chains, another the second stages, and so on: while one chain sends
    to other hosts the next one's sums are made inside the host. On a GPU the order of a stream does without threads;
    and there all collectives are issued by one thread, as NCCL wants it of communicators that run side by side.

    Args:
        device: where collectives take their tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._threads: list[ThreadPoolExecutor] = []
        self._failure: CollectiveError | None = None

    def start(self, chain: Iterator[None], filled: torch.Tensor) -> Callable[[], None]:
        """Start a chain that yields between its stages and fills a tensor; return what waits for it.

        What is returned raises the chain's ``CollectiveError``. After one no chain runs any more: the ranks would not
        be at the same collective.
        """
        if self._stream is not None:
            return self._start_on_stream(self._stream, chain, filled)
        done: Future[None] = Future()
        self._hand_on(chain, 0, done)
        return done.result

    def _hand_on(self, chain: Iterator[None], stage: int, done: Future[None]) -> None:
        if stage == len(self._threads):  # only the thread of the stage before comes here
            self._threads.append(ThreadPoolExecutor(1, f"dmt_compile collectives {stage}"))
        self._threads[stage].submit(self._run, chain, stage, done)

    def _run(self, chain: Iterator[None], stage: int, done: Future[None]) -> None:
        try:
            if self._failure is not None:
                raise self._failure
            with torch.no_grad():
                next(chain)
        except StopIteration:
            done.set_result(None)
        except BaseException as error:
            if isinstance(error, CollectiveError):
                self._failure = error
            done.set_exception(error)
        else:
            self._hand_on(chain, stage + 1, done)

    def _start_on_stream(
        self, stream: torch.cuda.Stream, chain: Iterator[None], filled: torch.Tensor
    ) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in chain:
                pass
            done = stream.record_event()
        filled.record_stream(stream)
        return lambda: torch.cuda.current_stream().wait_event(done)
