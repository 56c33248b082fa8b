"""Every Triton kernel compiles for each target and spills nothing; ``launches`` has its uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dmt_compile.kernels.compile_ahead import TARGETS
from dmt_compile.kernels.triton_support import operators


def test_no_spills(run_compiling: Callable[..., Any]) -> None:
    found = run_compiling("dmt_compile.kernels.compile_ahead", "--first", "--json")
    wanted = {(operator, target) for operator in operators() for target in TARGETS}
    assert {(case["operator"], case["target"]) for case in found} == wanted
    assert [case for case in found if case["spills_bytes"]] == []
    assert all(0 < case["registers"] <= 512 for case in found)
