"""Writes the graph before and after every pass as runnable Python, with a diff and a report."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from torch import fx

from dmt_compile.ir.metadata import describe


def graph_text(gm: fx.GraphModule) -> str:
    """Return a graph as Python: imports, then ``forward`` with each node's shape as a comment."""
    code = gm.graph.python_code("self")
    imports = []
    for name, value in sorted(code.globals.items()):
        module, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if value is type(None):
            module = "types"  # where it can be imported from
        if isinstance(module, str) and isinstance(qualified, str) and "." not in qualified:
            imports.append(f"from {module} import {qualified} as {name}")
        elif hasattr(value, "__name__") and not isinstance(qualified, str):
            imports.append(f"import {value.__name__} as {name}")
    shapes = {node.name: describe(node.meta["val"]) for node in gm.graph.nodes if "val" in node.meta}
    lines = []
    for line in code.src.strip("\n").splitlines():
        target = line.strip().split(" = ")[0].split(":")[0]
        lines.append(f"{line}  # {shapes[target]}" if " = " in line and target in shapes else line)
    body = "\n".join(lines)
    for name, child in gm.named_children():
        inner = getattr(child, "graph_module", None)
        if isinstance(inner, fx.GraphModule):
            body += f"\n\n\n# {name}\n" + "\n".join(f"# {line}" for line in inner.code.strip().splitlines())
    return "\n".join(imports) + "\n\n\n" + body + "\n"


class GraphDump:
    """One folder of numbered dumps for one graph.

    Args:
        folder: created if missing; a dump of an earlier run with the same names is overwritten.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._before = ""

    def before(self, number: int, name: str, gm: fx.GraphModule) -> None:
        """Write ``NN_<pass>.before.py``."""
        self._before = graph_text(gm)
        (self.folder / f"{number:02d}_{name}.before.py").write_text(self._before)

    def after(self, number: int, name: str, gm: fx.GraphModule) -> None:
        """Write ``NN_<pass>.after.py`` and ``NN_<pass>.diff``."""
        after = graph_text(gm)
        (self.folder / f"{number:02d}_{name}.after.py").write_text(after)
        lines = difflib.unified_diff(
            self._before.splitlines(True), after.splitlines(True), f"{name} before", f"{name} after"
        )
        (self.folder / f"{number:02d}_{name}.diff").write_text("".join(lines))

    def report(self, report: dict[str, Any]) -> None:
        """Write ``report.json``."""
        (self.folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
