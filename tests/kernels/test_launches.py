"""Kernels compile for a GPU as they are launched, and every kernel that there is was launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from dmt_compile.kernels.triton_support import cases_of, operators


def test_what_is_launched_compiles() -> None:
    # Interpreted kernels cannot be compiled, so another process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.launches"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    launched = {operator: set(names) for operator, names in json.loads(ran.stdout).items()}
    assert {
        "sum_bags",
        "sum_segments",
        "forward_whole",
        "backward_whole",
        "_pack_kernel",
        "_cast_kernel",
    } <= launched.pop("programs")
    assert launched == {operator: {case.kernel.fn.__name__ for case in cases_of(operator)} for operator in operators()}
