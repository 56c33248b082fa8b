"""The programs that are compared: their names, what each must equal, and how a rank builds one.

This module is read without loading PyTorch's distributed parts or TorchRec; a rank loads what its program needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Step:
    """A training program on one rank.

    Args:
        run: does one step and returns the local loss and the local logits, detached.
        state: what ``torch.compile(backend="dmt")`` agreed on for the model; ``None`` for other programs.
        finish: ends what a step has left to the next one.
    """

    run: Callable[[], tuple[Any, Any]]
    state: Any = None
    finish: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Program:
    """One line of the comparison.

    Args:
        name: on the command line and in results.
        module: of this package; its ``build`` makes the step.
        options: of ``build``.
        same_as: the program whose outputs and losses it must have; ``None`` for a program that is held to nothing.
        precision: the narrowest type on the wire; decides how near it must come.
        family: ``"torchrec"`` for what others are compared with.
    """

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    same_as: str | None = "flat"
    precision: str = "float32"
    family: str = ""

    @property
    def lossless(self) -> bool:
        """Whether everything travels in full precision."""
        return self.precision == "float32"

    def build(self, flat: Any, workload: Any, batches: list[Any], defaults: dict[str, Any]) -> Step:
        """Build the step on this rank: a collective call.

        Args:
            flat: the flat model; consumed.
            workload: its sizes.
            batches: this rank's, taken in turn without end.
            defaults: options from the command line, for the modules that know them.
        """
        module = importlib.import_module(f"cluster.{self.module}")
        step: Step = module.build(flat, workload, batches, **self.options, **defaults.get(self.module, {}))
        return step


def _torchrec() -> list[Program]:
    found = []
    for sharding in ("tw", "twrw", "planner"):
        for pipeline in (False, True):
            for fp16 in (False, True):
                name = f"torchrec-{sharding}" + "-pipeline" * pipeline + "-fp16" * fp16
                options = {"sharding": sharding, "pipeline": pipeline, "fp16": fp16}
                precision = "float16" if fp16 else "float32"
                found.append(Program(name, "torchrec_programs", options, precision=precision, family="torchrec"))
    return found


def _towers(dim: int) -> dict[str, Any]:
    return {"tower_module": "dlrm", "tower_module_options": {"c": 1, "p": 0, "dim": dim}}


AHEAD = {"prefetch": True, "defer": True}  # what the steps before and after can overlap with
HALF_WIRE = {"peer": "bfloat16", "dense": "bfloat16"}
PROGRAMS = {
    program.name: program
    for program in (
        Program("flat", "flat", same_as=None),
        *_torchrec(),
        Program("one-host", "ours", {"one_host": True}),
        Program("sptt", "ours"),
        Program("sptt-prefetch", "ours", {"prefetch": True}),
        Program("sptt-ahead", "ours", AHEAD),
        Program("sptt-bf16", "ours", {"options": {"comm_dtype": HALF_WIRE}}, precision="bfloat16"),
        Program("towers-32", "ours", {"options": _towers(32)}, same_as=None),
        Program("towers-16", "ours", {"options": _towers(16)}, same_as=None),
        Program("towers-16-prefetch", "ours", {"options": _towers(16), "prefetch": True}, same_as="towers-16"),
        Program("towers-16-ahead", "ours", {"options": _towers(16)} | AHEAD, same_as="towers-16"),
        Program(
            "towers-16-bf16", "ours", {"options": _towers(16) | {"comm_dtype": HALF_WIRE}},
            same_as="towers-16", precision="bfloat16",
        ),
        Program(
            "towers-16-bf16-prefetch", "ours",
            {"options": _towers(16) | {"comm_dtype": HALF_WIRE}, "prefetch": True},
            same_as="towers-16", precision="bfloat16",
        ),
        Program(
            "towers-16-bf16-ahead", "ours",
            {"options": _towers(16) | {"comm_dtype": HALF_WIRE}} | AHEAD,
            same_as="towers-16", precision="bfloat16",
        ),
    )
}  # fmt: skip
DEFAULT_PROGRAMS = (
    *(name for name in PROGRAMS if name.startswith("torchrec-tw-") or name == "torchrec-tw"),
    "torchrec-twrw", "torchrec-planner", "flat", "sptt", "sptt-prefetch", "sptt-ahead", "towers-32",
    "towers-16", "towers-16-prefetch", "towers-16-ahead", "towers-16-bf16", "towers-16-bf16-prefetch",
    "towers-16-bf16-ahead",
)  # fmt: skip


def select(names: list[str]) -> list[Program]:
    """Return programs by name, and before each the one that it must equal.

    A trailing ``*`` takes every name that begins so.

    Raises:
        ValueError: no program has the name.
    """
    wanted: list[str] = []
    for name in names:
        found = [known for known in PROGRAMS if known == name or (name[-1:] == "*" and known.startswith(name[:-1]))]
        if not found:
            raise ValueError(
                f"programs: expected some of {', '.join(PROGRAMS)}, found {name!r}; a trailing * is a prefix"
            )
        for each in found:
            reference = PROGRAMS[each].same_as
            wanted += [each] if reference is None else [reference, each]
    return [PROGRAMS[name] for name in dict.fromkeys(wanted)]
