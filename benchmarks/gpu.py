"""Everything that needs a GPU, in 8 minutes: the tests marked ``gpu``, the kernel benchmark, whole train steps.

    python benchmarks/gpu.py                            # appends a dated block to benchmarks/RESULTS.md
    python benchmarks/gpu.py --out "$OUT" --results "$OUT/block.md"   # where only $OUT comes back
    python benchmarks/gpu.py --parts kernels --minutes 4

Each part is a process with a time limit of its own, a share of ``--minutes``; one that fails or is stopped keeps what
it printed, and the next one runs. ``--out`` gets the whole logs and the benchmarks' JSON. Needs nothing but this
checkout and the packages of the Python that runs it: no network, no installed dmt_compile, no virtual environment.

Exits with 1 if a part failed, and on a machine without a GPU or without the packages, which it says in one line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "scipy", "networkx", "rich", "pytest", "pytest_timeout", "hypothesis")
SHARES = {"tests": 0.3, "kernels": 0.33, "train_step": 0.37}
LAST_LINES = 20  # of the log of a part that failed


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Args:
        name: a key of ``SHARES``.
        command: that ran.
        status: exit status; ``None`` where it was stopped.
        limit_s: after which it is stopped.
        out, log: what it printed, and what it said besides.
    """

    name: str
    command: Sequence[str]
    status: int | None
    limit_s: float
    out: str
    log: str

    def markdown(self) -> str:
        """Return the part's section: its command, what it printed, and how it ended where that was not well."""
        shown = shlex.join(["python", *self.command[1:]]).replace(str(ROOT) + "/", "")
        printed = self.out.strip()
        if self.name == "tests":
            printed = (printed.splitlines() or ["Nothing was printed."])[-1].strip("= ")
        lines = [f"### {self.name}", "", f"`{shown}`", "", printed]
        if self.status == 0:
            return "\n".join(lines)
        ended = f"Stopped after {self.limit_s:.0f} s." if self.status is None else f"Exit status {self.status}."
        last = [line for line in (self.out if self.name == "tests" else self.log).splitlines() if line][-LAST_LINES:]
        return "\n".join([*lines, "", f"**{ended}**", *(["", "```", *last, "```"] if last else [])])


def missing() -> str | None:
    """Return why nothing can run here; ``None`` where it can."""
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        return f"gpu: expected {', '.join(PACKAGES)} beside {sys.executable}, found no {', '.join(lacking)}"
    import torch

    if not torch.cuda.is_available():
        return f"gpu: expected a GPU, found none; torch {torch.__version__} is what looked for it"
    return None


def gpu_tests() -> list[str]:
    """Return the test files with tests for a GPU: others may need packages that are not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f) for f in files if f.parent.name == "kernels" or "mark.gpu" in f.read_text()]


def commands(out: Path, minutes: float) -> dict[str, list[str]]:
    """Return the command of each part, which ends by itself before it is stopped."""
    # Compiling kernels takes cores; some tests take 9 GB of the GPU.
    parallel = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    benchmarks = {
        name: [
            *(sys.executable, str(ROOT / "benchmarks" / f"{name}.py")),
            *("--limit-s", f"{0.7 * 60 * minutes * SHARES[name]:.0f}", "--json", str(out / "gpu.jsonl")),
        ]
        for name in ("kernels", "train_step")
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *parallel, *gpu_tests()]
    return {"tests": pytest, **benchmarks}


def run(name: str, command: Sequence[str], limit_s: float, out: Path) -> Outcome:
    """Run a part, and end it with all that it started once its time is over."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("TRITON_INTERPRET", None)
    printed, said = out / f"{name}.out", out / f"{name}.log"
    with printed.open("w") as stdout, said.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, process_group=0)
        status: int | None = None
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(name, command, status, limit_s, printed.read_text(), said.read_text())


def machine() -> tuple[str, str]:
    """Return the card, and the versions that a result has to be read with."""
    import torch

    versions = [f"torch {torch.__version__}", f"Triton {importlib.metadata.version('triton')}"]
    versions.append(f"Python {platform.python_version()}")
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    for what, command in (("driver", asked), ("commit", ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])):
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            continue  # not every machine has them, and no figure needs them
        versions.append(f"{what} {said[0]}")
    return torch.cuda.get_device_name(), ", ".join(versions)


def block(outcomes: Sequence[Outcome], card: str, versions: str, when: datetime) -> str:
    """Return what is appended to the results."""
    parts = "\n\n".join(outcome.markdown() for outcome in outcomes)
    return f"\n## GPU, {when:%Y-%m-%d %H:%M} UTC: {card}\n\n{versions}; `make gpu`.\n\n{parts}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and write the block; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--minutes", type=float, default=7.8, help="for all parts together")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "RESULTS.md", help="file to append to")
    parser.add_argument("--out", type=Path, help="folder for logs and JSON; by default they are not kept")
    args = parser.parse_args(argv)
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    when, (card, versions) = datetime.now(UTC), machine()
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        outcomes = []
        for name, command in commands(out, args.minutes).items():
            if name in args.parts:
                outcomes.append(run(name, command, 60 * args.minutes * SHARES[name], out))
                print(outcomes[-1].markdown(), "", sep="\n", flush=True)
    with args.results.open("a") as file:
        file.write(block(outcomes, card, versions, when))
    return int(any(outcome.status != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
