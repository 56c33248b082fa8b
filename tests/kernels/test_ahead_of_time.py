"""Every Triton kernel compiles for GPUs that are not here, and needs no more registers than they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dmt_compile.kernels.compile_ahead import TARGETS
from dmt_compile.kernels.triton_support import operators


# Every use is compiled for one target, and every kernel for each.
@pytest.mark.parametrize(
    "arguments", [["--target", "sm_90"], ["--first", "--target", *sorted(TARGETS.keys() - {"sm_90"})]], ids=" ".join
)
@pytest.mark.parametrize("operator", operators())
def test_no_spills(operator: str, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "dmt_compile.kernels.compile_ahead", "--operator", operator, *arguments, "--json"]
    # Interpreted kernels cannot be compiled, so another process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert {case["target"] for case in found} == set(arguments) & TARGETS.keys()
    assert [case for case in found if case["spills_bytes"]] == []
    assert all(0 < case["registers"] <= 512 for case in found)
