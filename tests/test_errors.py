"""Errors keep their class and text through Dynamo and pickling, and all have one form."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest
import torch
from torch import fx

import dmt_compile
from dmt_compile import errors
from dmt_compile.errors import BatchError, DmtError

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DmtError)]
PACKAGE = Path(dmt_compile.__file__).parent


def test_every_class_is_exported() -> None:
    assert {c.__name__ for c in CLASSES} == {
        "DmtError", "ConfigError", "UnsupportedGraphError", "PlanError", "VerifyError", "CollectiveError",
        "CheckpointError", "BatchError",
    }  # fmt: skip
    for error_class in CLASSES:
        assert error_class.__name__ in dmt_compile.__all__
        assert getattr(dmt_compile, error_class.__name__) is error_class


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_keeps_its_text(error_class: type[DmtError]) -> None:
    error = error_class("part: expected one, found two")
    assert str(error) == error.message == "part: expected one, found two"
    copied = pickle.loads(pickle.dumps(error))  # as it travels between processes
    assert type(copied) is error_class
    assert str(copied) == str(error)


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_of_a_backend_reaches_the_user_as_it_is(error_class: type[DmtError]) -> None:
    def backend(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise error_class("part: expected one, found two")

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    torch._dynamo.reset()
    with pytest.raises(DmtError) as raised:
        torch.compile(double, backend=backend)(torch.ones(2))
    assert type(raised.value) is error_class
    assert str(raised.value) == "part: expected one, found two"


def test_a_bad_batch_is_a_value_error_too() -> None:
    assert issubclass(BatchError, ValueError)


def _texts() -> list[tuple[str, str]]:
    """Return where each error of ours is made, and the constant parts of its text."""
    names = {error_class.__name__ for error_class in CLASSES}
    found = []
    for path in sorted(
        [*PACKAGE.glob("**/*.py"), *(PACKAGE / "passes").glob("*.py"), *(PACKAGE / "kernels").glob("**/*.py")]
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
                parts = [
                    n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", " ".join(parts)))
    return found


def test_every_message_says_what_was_expected_and_what_was_found() -> None:
    texts = _texts()
    assert len(texts) > 40
    helpers = [where for where, text in texts if not text]  # the text is made elsewhere
    unlike = [(where, text) for where, text in texts if text and not ("expected " in text and "found" in text)]
    assert unlike == []
    assert len(helpers) < 5
