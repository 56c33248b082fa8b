"""Every Triton kernel compiles for each target and spills nothing; ``launches`` has its uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from dmt_compile.kernels.compile_ahead import TARGETS
from dmt_compile.kernels.triton_support import operators


def test_no_spills() -> None:
    command = [sys.executable, "-m", "dmt_compile.kernels.compile_ahead", "--first", "--json"]
    # Interpreted kernels cannot be compiled, so another process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    wanted = {(operator, target) for operator in operators() for target in TARGETS}
    assert {(case["operator"], case["target"]) for case in found} == wanted
    assert [case for case in found if case["spills_bytes"]] == []
    assert all(0 < case["registers"] <= 512 for case in found)
