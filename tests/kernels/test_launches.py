"""Kernels compile for a GPU as they are launched, and every kernel that there is was launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dmt_compile.kernels.triton_support import cases_of, operators


def test_what_is_launched_compiles(run_compiling: Callable[..., Any]) -> None:
    launched = {operator: set(names) for operator, names in run_compiling("tests.kernels.launches").items()}
    assert {
        "sum_bags",
        "sum_segments",
        "forward_whole",
        "backward_whole",
        "_pack_kernel",
        "_cast_kernel",
    } <= launched.pop("programs")
    assert launched == {operator: {case.kernel.fn.__name__ for case in cases_of(operator)} for operator in operators()}
