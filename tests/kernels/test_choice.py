"""Which kernel is chosen, and what is said of those that are not."""

from __future__ import annotations

import logging

import pytest
import torch

from dmt_compile.kernels import triton_support
from dmt_compile.kernels.choice import REFERENCE, Choice, choose, fails

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support.importlib, "import_module", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def can() -> str | None:
    return None


def test_the_first_that_can_is_chosen() -> None:
    assert choose("auto", CUDA, {"triton": can, "fbgemm": can}) == Choice("triton")
    found = choose("auto", CUDA, {"triton": lambda: "rows of int", "fbgemm": can})
    assert found == Choice("fbgemm", (("triton", "rows of int"),))
    assert str(found) == "fbgemm; not triton: rows of int"


def test_none_that_can_is_the_reference_with_every_reason() -> None:
    found = choose("auto", CUDA, {"triton": lambda: "this", "fbgemm": lambda: "that"})
    assert found == Choice(REFERENCE, (("triton", "this"), ("fbgemm", "that")))


def test_a_kernel_that_is_asked_for_is_the_only_one() -> None:
    assert choose("fbgemm", CUDA, {"triton": can, "fbgemm": can}).kernel == "fbgemm"
    found = choose("fbgemm", CUDA, {"triton": can, "fbgemm": lambda: "that"})
    assert found == Choice(REFERENCE, (("triton", "options ask for fbgemm"), ("fbgemm", "that")))
    assert choose(REFERENCE, CUDA, {"triton": can}).rejected == (("triton", "options ask for reference"),)
    assert choose("fbgemm", CUDA, {"triton": can}).rejected[1] == ("fbgemm", "this operator has no such kernel")


def test_triton_has_no_kernels_for_cpus_and_its_interpreter_is_used_on_request_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "Triton has no kernels for cpu" in choose("triton", CPU, {"triton": can}).rejected[0][1]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", CPU, {"triton": can}).kernel == "triton"
    assert "interpreter is for tests" in choose("auto", CPU, {"triton": can}).rejected[0][1]
    assert choose("auto", CUDA, {"triton": can}).kernel == "triton"


def test_a_kernel_that_does_not_compile_is_a_reason_and_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise RuntimeError("no such instruction\nand more")

    with caplog.at_level(logging.WARNING):
        reason = fails("triton", broken)
    assert reason == "it failed to compile: RuntimeError: no such instruction"
    assert "kernels: expected triton to compile, found that it failed to compile" in caplog.text
    assert fails("triton", lambda: None) is None
