"""Which implementation of an operator runs: chosen once, when a graph is compiled, with the reasons."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dmt_compile.kernels.triton_support import interpreted, why_not

logger = logging.getLogger(__name__)

REFERENCE = "reference"
KERNELS = ("auto", REFERENCE, "triton", "fbgemm")


@dataclass(frozen=True)
class Choice:
    """The kernel that runs, and what spoke against each that was looked at before it."""

    kernel: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.kernel, *(f"not {kernel}: {reason}" for kernel, reason in self.rejected)])


def choose(wanted: str, device: torch.device, offered: Mapping[str, Callable[[], str | None]]) -> Choice:
    """Return the first kernel that nothing speaks against; the reference where something does for all.

    Args:
        wanted: one of ``KERNELS``: ``"auto"`` takes any, another only that one.
        device: where the operator runs.
        offered: kernel -> returns why it cannot take this use, or ``None``; the fastest first.
    """
    rejected: list[tuple[str, str]] = []
    for kernel, refuse in offered.items():
        reason = against(kernel, wanted, device) or refuse()
        if reason is None:
            return Choice(kernel, tuple(rejected))
        rejected.append((kernel, reason))
    if wanted not in ("auto", REFERENCE, *offered):
        rejected.append((wanted, "this operator has no such kernel"))
    return Choice(REFERENCE, tuple(rejected))


def against(kernel: str, wanted: str, device: torch.device) -> str | None:
    """Return what speaks against a kernel whatever the operator; ``None`` where nothing does."""
    if wanted not in ("auto", kernel):
        return f"options ask for {wanted}"
    if kernel == "triton":
        if wanted == "auto" and device.type == "cpu" and interpreted():
            return "Triton's interpreter is for tests; ask for it with kernels='triton'"
        return why_not(device)
    return None


def fails(kernel: str, attempt: Callable[[], object]) -> str | None:
    """Return how a kernel fails on a small example, which compiles what a step will need; ``None`` where it runs.

    A failure here is one of the compiler or the driver: it costs speed, not the run, and is logged.
    """
    try:
        attempt()
    except Exception as error:
        reason = f"it failed to compile: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        logger.warning("kernels: expected %s to compile, found that %s; another kernel takes its place", kernel, reason)
        return reason
    return None
