"""A dense region: a part of the graph that a dense compiler takes as one piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from dmt_compile import torch_internals
from dmt_compile.torch_internals import FakeTensorMode


class DenseRegion(nn.Module):
    """Runs a graph of dense operators through ``compiler``; the graph itself where that fails."""

    def __init__(self, graph_module: fx.GraphModule, compiler: str) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.compiler = compiler
        self._compiled: list[Callable[..., Any]] = []  # in a list: nn.Module would adopt a module as its child

    def forward(self, *args: Any) -> Any:
        """Return the region's outputs as a tuple.

        An empty batch runs uncompiled: some operators that compilers call directly, such as PyTorch's attention for
        CPUs, divide by the number of samples and end the process.
        """
        empty = any(isinstance(value, torch.Tensor) and not value.numel() for value in args)
        run = self._compiled[0] if self._compiled and not empty else self.graph_module
        return run(*args)

    def compile_for(self, inputs: Sequence[Any], mode: FakeTensorMode) -> str | None:
        """Compile for inputs like these fakes; return why not, where it failed.

        Sizes that are symbols stay dynamic, 0 and 1 included.
        """
        if self.compiler == "eager":
            return None
        compile_with = {"inductor": torch_internals.compile_with_inductor, "aot_eager": torch_internals.aot_module}
        with mode:
            fresh = [self._fresh(value) if isinstance(value, torch.Tensor) else value for value in inputs]
        try:
            self._compiled = [compile_with[self.compiler](self.graph_module, fresh, mode)]
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return None

    def _fresh(self, value: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(
            value.size(), value.stride(), dtype=value.dtype, device=value.device, requires_grad=value.requires_grad
        )

    def fake_call(self, environment: Any, *args: Any) -> Any:
        """Return the region's outputs on fake values; what is trusted for the very same values is not derived anew."""
        values: dict[fx.Node, Any] = {}
        remaining = iter(args)
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(remaining)
                continue
            same = all(values[source] is source.meta.get("val") for source in node.all_input_nodes)
            if node.op != "output" and same and environment.trusted(node):
                values[node] = node.meta["val"]
                continue
            node_args = fx.map_arg(node.args, lambda n: values[n])
            if node.op == "output":
                return node_args[0]
            node_kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
            values[node] = environment.call(node.op, node.target, node_args, node_kwargs, self.graph_module)
        raise AssertionError("a graph ends in its output")
