"""Compile every Triton kernel for GPUs that need not be here, and tell what each takes of them.

python -m dmt_compile.kernels.compile_ahead                # every kernel for every target
python -m dmt_compile.kernels.compile_ahead --target sm_90 --first --json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmt_compile.kernels.triton_support import AheadCase, cases_of, interpreted, operators

# Name on the command line -> backend, architecture, threads of a warp.
TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Resources:
    """What one case takes of a GPU.

    Args:
        operator, case, target: which.
        registers: of a thread.
        spills_bytes: of a thread, that its registers do not hold.
        shared_bytes: of a block.
    """

    operator: str
    case: str
    target: str
    registers: int
    spills_bytes: int
    shared_bytes: int


def compile_ahead(operator: str, case: AheadCase, target: str) -> Resources:
    """Compile a case for a target, which need not be here.

    Raises:
        Exception: of Triton, whatever keeps the kernel from compiling.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, signature, constants, aligned)
    compiled = triton.compile(
        source, target=GPUTarget(*TARGETS[target]), options={"num_warps": case.num_warps, **case.options}
    )
    registers, spills = (_of_ptx if "ptx" in compiled.asm else _of_amdgcn)(compiled.asm, target)
    return Resources(operator, case.name, target, registers, spills, compiled.metadata.shared)


def _of_ptx(asm: Mapping[str, Any], target: str) -> tuple[int, int]:
    """Return registers and spilled bytes as ptxas reports them."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(asm["ptx"])
        architecture = re.search(r"\.target (\S+)", asm["ptx"])
        assert architecture is not None
        tool = knobs.nvidia.ptxas_blackwell if target == "sm_100" else knobs.nvidia.ptxas
        command = [tool.path, "-v", f"--gpu-name={architecture[1].split(',')[0]}", str(path), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(found) for found in re.findall(r"Used (\d+) registers", said))
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))


def _of_amdgcn(asm: Mapping[str, Any], target: str) -> tuple[int, int]:
    """Return vector registers and spilled bytes as the assembly states them."""
    text = asm["amdgcn"]
    registers = re.findall(r"\.vgpr_count:\s+(\d+)", text)
    spilled = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
    return int(registers[0]), 4 * int(spilled[0])


def _first(cases: Sequence[AheadCase]) -> list[AheadCase]:
    """Return the first case of each kernel."""
    return list({id(case.kernel): case for case in reversed(cases)}.values())


def main(argv: list[str] | None = None) -> int:
    """Compile and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--operator", choices=operators(), nargs="+", default=list(operators()))
    parser.add_argument("--first", action="store_true", help="compile only the first case of each kernel")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if interpreted():
        parser.error("expected TRITON_INTERPRET to be unset, found 1: interpreted kernels are not compiled")
    found = [
        compile_ahead(operator, case, target)
        for operator in args.operator
        for case in (_first(cases_of(operator)) if args.first else cases_of(operator))
        for target in args.target
    ]
    if args.json:
        print(json.dumps([asdict(resources) for resources in found]))
        return 0
    for resources in found:
        print(
            f"{resources.operator:<16} {resources.case:<44} {resources.target:<8} {resources.registers:>4} registers "
            f"{resources.spills_bytes:>6} B spilled {resources.shared_bytes:>8} B shared"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
