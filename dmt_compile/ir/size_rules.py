"""Which dimensions of an operator's operands and result must agree, operator by operator.

What an operator does with a dimension that this file does not know keeps its size: if it would have to change, that is
the reason why the graph cannot be resized, and it is reported with the user's line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dmt_compile.ir.pass_base import JOINS, name_of
from dmt_compile.ir.resizing import Axis, Resizing, axes_of, size_of


def follow_sizes(nodes: Sequence[fx.Node], sources: set[fx.Node]) -> Resizing:
    """Return the dimensions of a graph in classes.

    Args:
        nodes: those to follow, in graph order; others neither change nor count.
        sources: nodes whose own sizes are free, whatever made them.
    """
    sizes = Resizing(nodes, sources)
    for node in nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                sizes.freeze_all(source, source, "the model's output would change")
        elif node.op in ("call_function", "call_method") and node not in sources:
            _connect(sizes, node)
    sizes.match_products()
    return sizes


def _connect(sizes: Resizing, node: fx.Node) -> None:
    name = name_of(node)
    value = node.meta.get("val")
    if not any(True for operand in node.all_input_nodes for _ in axes_of(operand)):
        return sizes.freeze_all(node, node, "a constant has a fixed size")
    rule = _RULES.get(name)
    if rule is not None:
        rule(sizes, node)
    elif name in _ELEMENTWISE and isinstance(value, torch.Tensor):
        _broadcast(sizes, node, [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)])
    else:
        for operand in node.all_input_nodes:
            sizes.freeze_all(operand, node)
        sizes.freeze_all(node, node)


def _broadcast(sizes: Resizing, node: fx.Node, operands: Sequence[fx.Node]) -> None:
    out = node.meta["val"].shape
    for operand in operands:
        shape = operand.meta["val"].shape
        for back in range(1, len(shape) + 1):
            axis = (operand, len(shape) - back)
            if back > len(out):
                sizes.freeze(axis, node, f"{name_of(node)} has a fixed size")
            elif size_of(shape[-back]) == size_of(out[-back]):
                sizes.same(axis, (node, len(out) - back))
            else:  # one column for all, which must stay one
                sizes.freeze(axis, node, f"{name_of(node)} has a fixed size")


def _like(sizes: Resizing, node: fx.Node) -> None:
    _broadcast(sizes, node, [_operand(node)])


def _linear(sizes: Resizing, node: fx.Node) -> None:
    x, weight, *bias = [n for n in (*node.args, node.kwargs.get("bias")) if isinstance(n, fx.Node)]
    last = node.meta["val"].ndim - 1
    for dim in range(last):
        sizes.same((x, dim), (node, dim))
    sizes.same((x, last), (weight, 1))
    sizes.same((node, last), (weight, 0))
    for b in bias:
        sizes.same((b, 0), (weight, 0))


def _matmul(sizes: Resizing, node: fx.Node) -> None:
    a, b = (n for n in node.args[:2] if isinstance(n, fx.Node))
    rank_a, rank_b, rank = a.meta["val"].ndim, b.meta["val"].ndim, node.meta["val"].ndim
    sizes.same((a, rank_a - 1), (b, max(rank_b - 2, 0)))
    if rank_a > 1:
        sizes.same((a, rank_a - 2), (node, rank - (2 if rank_b > 1 else 1)))
    if rank_b > 1:
        sizes.same((b, rank_b - 1), (node, rank - 1))
    for operand, rank_of in ((a, rank_a), (b, rank_b)):
        for back in range(3, rank_of + 1):
            if size_of(operand.meta["val"].shape[-back]) == size_of(node.meta["val"].shape[-back]):
                sizes.same((operand, rank_of - back), (node, rank - back))


def _addmm(sizes: Resizing, node: fx.Node) -> None:
    bias, x, weight = (n for n in node.args[:3] if isinstance(n, fx.Node))
    sizes.same((x, 0), (node, 0))
    sizes.same((x, 1), (weight, 0))
    sizes.same((weight, 1), (node, 1))
    _broadcast(sizes, node, [bias])


def _einsum(sizes: Resizing, node: fx.Node) -> None:
    equation, *operands = node.args
    operands = list(operands[0]) if isinstance(operands[0], tuple | list) else operands
    left, _, right = str(equation).replace(" ", "").partition("->")
    if not right or "." in left:
        return _opaque(sizes, node)
    letters: dict[str, Axis] = {}
    for term, operand in zip((*left.split(","), right), (*operands, node), strict=True):
        for dim, letter in enumerate(term):
            sizes.same(letters.setdefault(letter, (operand, dim)), (operand, dim))


def _opaque(sizes: Resizing, node: fx.Node) -> None:
    for operand in node.all_input_nodes:
        sizes.freeze_all(operand, node)
    sizes.freeze_all(node, node)


def _cat(sizes: Resizing, node: fx.Node) -> None:
    parts = [n for n in node.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
    rank = node.meta["val"].ndim
    dim = _given_dim(node, 0) % rank
    for part in parts:
        for other in range(rank):
            if other != dim:
                sizes.same((part, other), (node, other))
    sizes.relate((node, dim), tuple((part, dim) for part in parts), product=False)


def _hstack(sizes: Resizing, node: fx.Node) -> None:
    parts = [n for n in node.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
    sizes.relate((node, 1), tuple((part, 1) for part in parts), product=False)


def _stack(sizes: Resizing, node: fx.Node) -> None:
    rank = node.meta["val"].ndim
    dim = _given_dim(node, 0) % rank
    for part in (n for n in node.args[0] if isinstance(n, fx.Node)):  # type: ignore[union-attr]
        for other in range(rank - 1):
            sizes.same((part, other), (node, other + (other >= dim)))
    sizes.freeze((node, dim), node, "stack joins a fixed number")


def _permute(sizes: Resizing, node: fx.Node) -> None:
    x, rank, name = _operand(node), node.meta["val"].ndim, name_of(node)
    if name == "permute":
        given = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        order = [int(dim) % rank for dim in given]  # type: ignore[arg-type]
    else:
        given = node.args[1:3] if name in ("transpose", "swapaxes") else (-2, -1)
        a, b = (int(dim) % rank for dim in given)  # type: ignore[arg-type]
        order = list(range(rank))
        order[a], order[b] = order[b], order[a]
    for dim, source in enumerate(order):
        sizes.same((x, source), (node, dim))


def _getattr(sizes: Resizing, node: fx.Node) -> None:
    _permute(sizes, node) if node.args[1] in ("T", "mT") else _opaque(sizes, node)


def _unsqueeze(sizes: Resizing, node: fx.Node) -> None:
    x, rank = _operand(node), node.meta["val"].ndim
    at = _given_dim(node, 0) % rank
    for dim in range(rank - 1):
        sizes.same((x, dim), (node, dim + (dim >= at)))


def _squeeze(sizes: Resizing, node: fx.Node) -> None:
    x = _operand(node)
    rank = x.meta["val"].ndim
    given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if given is None:
        return _squeeze_all(sizes, node)
    if not isinstance(given, int) or node.meta["val"].ndim == rank:
        return _opaque(sizes, node)
    sizes.freeze((x, given % rank), node, "squeeze drops one column")
    for dim in range(rank):
        if dim != given % rank:
            sizes.same((x, dim), (node, dim - (dim > given % rank)))


def _squeeze_all(sizes: Resizing, node: fx.Node) -> None:
    x, target = _operand(node), 0
    for dim, size in enumerate(x.meta["val"].shape):
        if size_of(size) == 1:
            sizes.freeze((x, dim), node, "squeeze drops one column")
        else:
            sizes.same((x, dim), (node, target))
            target += 1


def _reduce(sizes: Resizing, node: fx.Node) -> None:
    x, value = _operand(node), node.meta["val"]
    rank = x.meta["val"].ndim
    position = 2 if name_of(node) in ("norm", "vector_norm") else 1
    given = node.kwargs.get("dim", node.args[position] if len(node.args) > position else None)
    if not isinstance(value, torch.Tensor) or (given is not None and not isinstance(given, int | tuple | list)):
        return _opaque(sizes, node)
    listed: Any = [given] if isinstance(given, int) else list(range(rank)) if given is None else given
    reduced = {dim % rank for dim in listed}
    kept = value.ndim == rank
    target = 0
    for dim in range(rank):
        if dim not in reduced:
            sizes.same((x, dim), (node, target))
        target += dim not in reduced or kept
    return None


def _view(sizes: Resizing, node: fx.Node) -> None:
    x = _operand(node)
    for one in (x, node):
        for dim, size in enumerate(one.meta["val"].shape):
            if size_of(size) == 1:
                sizes.freeze((one, dim), node, f"{name_of(node)} lays out one column")
    for before, after in _groups(x.meta["val"].shape, node.meta["val"].shape):
        if len(before) == len(after) == 1:
            sizes.same((x, before[0]), (node, after[0]))
        elif len(after) == 1:
            sizes.relate((node, after[0]), tuple((x, dim) for dim in before), product=True)
        elif len(before) == 1:
            sizes.relate((x, before[0]), tuple((node, dim) for dim in after), product=True)
        else:
            for axis in (*((x, dim) for dim in before), *((node, dim) for dim in after)):
                sizes.freeze(axis, node, f"{name_of(node)} lays out several dimensions anew")


def _expand(sizes: Resizing, node: fx.Node) -> None:
    _broadcast(sizes, node, [_operand(node)])


def _getitem(sizes: Resizing, node: fx.Node) -> None:
    x = _operand(node)
    value, index = x.meta.get("val"), node.args[1]
    if isinstance(value, tuple | list):
        if isinstance(index, int) and isinstance(node.meta.get("val"), torch.Tensor):
            for dim in range(node.meta["val"].ndim):
                sizes.same((x, index % len(value), dim), (node, dim))
        return
    entries = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(value, torch.Tensor) or any(isinstance(e, fx.Node) for e in entries):
        return _opaque(sizes, node)
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        missing = value.ndim - sum(e is not None for e in entries) + 1
        entries[at : at + 1] = [slice(None)] * missing
    entries += [slice(None)] * (value.ndim - sum(e is not None for e in entries))
    source = target = 0
    for entry in entries:
        if entry is None:
            target += 1
            continue
        if entry == slice(None):
            sizes.same((x, source), (node, target))
        else:
            sizes.freeze((x, source), node, "a slice of fixed columns is read")
            if isinstance(entry, slice):
                sizes.freeze((node, target), node, "a slice of fixed columns is read")
        target += isinstance(entry, slice)
        source += 1


def _layer_norm(sizes: Resizing, node: fx.Node) -> None:
    x = _operand(node)
    _broadcast(sizes, node, [x])
    for parameter in (n for n in (*node.args[1:], *node.kwargs.values()) if isinstance(n, fx.Node)):
        _broadcast(sizes, node, [parameter])


def _batch_norm(sizes: Resizing, node: fx.Node) -> None:
    x = _operand(node)
    _broadcast(sizes, node, [x])
    for parameter in (n for n in (*node.args[1:], *node.kwargs.values()) if isinstance(n, fx.Node)):
        if isinstance(parameter.meta.get("val"), torch.Tensor) and parameter.meta["val"].ndim:
            sizes.same((parameter, 0), (x, 1))


def _conv(sizes: Resizing, node: fx.Node) -> None:
    x, weight, *bias = [n for n in (*node.args, node.kwargs.get("bias")) if isinstance(n, fx.Node)]
    places = weight.meta["val"].ndim - 2
    stride, padding, dilation, groups = _filled(
        node, 3, (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
    )
    if groups != 1 or x.meta["val"].ndim != places + 2:
        return _opaque(sizes, node)
    sizes.same((x, 0), (node, 0))
    sizes.same((x, 1), (weight, 1))
    for axis in ((node, 1), *((b, 0) for b in bias)):
        sizes.same(axis, (weight, 0))
    for place in range(places):
        sizes.freeze((weight, place + 2), node, "a kernel has a fixed size")
        kernel = int(weight.meta["val"].shape[place + 2])
        _slide(sizes, node, place, (kernel, *(_at(option, place) for option in (stride, padding, dilation))))


def _pool(sizes: Resizing, node: fx.Node) -> None:
    x = _operand(node)
    places = int(name_of(node).removesuffix("d")[-1])
    if x.meta["val"].ndim != places + 2:
        return _opaque(sizes, node)
    kernel, stride, padding = _filled(node, 1, (("kernel_size", None), ("stride", None), ("padding", 0)))
    for dim in (0, 1):
        sizes.same((x, dim), (node, dim))
    for place in range(places):
        window = _at(kernel, place)
        _slide(
            sizes, node, place, (window, window if stride in (None, ()) else _at(stride, place), _at(padding, place), 1)
        )


def _slide(sizes: Resizing, node: fx.Node, place: int, window: tuple[Any, ...]) -> None:
    """Follow one dimension that a window slides along; one column wide, it leaves it as long as it is."""
    if window[:3] == (1, 1, 0):
        sizes.same((_operand(node), place + 2), (node, place + 2))
    else:
        for axis in ((_operand(node), place + 2), (node, place + 2)):
            sizes.freeze(axis, node, f"{name_of(node)} slides over a fixed number")


def _split(sizes: Resizing, node: fx.Node) -> None:
    x, value = _operand(node), node.meta["val"]
    rank = x.meta["val"].ndim
    position = 1 if name_of(node) == "unbind" else 2
    given = node.kwargs.get("dim", node.args[position] if len(node.args) > position else 0)
    assert isinstance(given, int)
    for dim in range(rank):
        for index in range(len(value)):
            if dim != given % rank:
                target = dim - (dim > given % rank and value[index].ndim < rank)
                sizes.same((node, index, target), (x, dim))
            elif value[index].ndim == rank:
                sizes.freeze((node, index, dim), node, f"{name_of(node)} takes fixed columns apart")
    sizes.freeze((x, given % rank), node, f"{name_of(node)} takes fixed columns apart")


def _tensordot(sizes: Resizing, node: fx.Node) -> None:
    a, b = (n for n in node.args[:2] if isinstance(n, fx.Node))
    given: Any = node.kwargs.get("dims", node.args[2] if len(node.args) > 2 else 2)
    rank_a, rank_b = a.meta["val"].ndim, b.meta["val"].ndim
    if isinstance(given, int):
        given = (list(range(rank_a - given, rank_a)), list(range(given)))
    left, right = ([int(dim) for dim in ([dims] if isinstance(dims, int) else dims)] for dims in given)
    left, right = [dim % rank_a for dim in left], [dim % rank_b for dim in right]
    for one, other in zip(left, right, strict=True):
        sizes.same((a, one), (b, other))
    free = [(a, d) for d in range(rank_a) if d not in left] + [(b, d) for d in range(rank_b) if d not in right]
    for target, axis in enumerate(free):
        sizes.same(axis, (node, target))


def _attention(sizes: Resizing, node: fx.Node) -> None:
    """(L, B, E) attention with one projection of query, key and value: all widths are E, or 3 E side by side."""
    query, *others = (n for n in node.args[:3] if isinstance(n, fx.Node))
    heads, weight, bias, out, out_bias = (node.args[i] for i in (4, 5, 6, 11, 12))
    whole = isinstance(weight, fx.Node) and isinstance(out, fx.Node) and query.meta["val"].ndim == 3
    if not whole or node.args[7] is not None or node.kwargs.get("use_separate_proj_weight"):
        return _opaque(sizes, node)
    width = (query, 2)
    for dim in range(3):
        sizes.same((query, dim), (node, 0, dim))
    for other in others:
        sizes.same((other, 0), (query, 0))
        sizes.same((other, 1), (query, 1))
    for axis in (*((other, 2) for other in others), (weight, 1), (out, 0), (out, 1)):
        sizes.same(axis, width)
    for parameter in (weight, bias):
        if isinstance(parameter, fx.Node):
            sizes.relate((parameter, 0), (width, width, width), product=False)
    if isinstance(out_bias, fx.Node):
        sizes.same((out_bias, 0), width)
    sizes.keep_multiple(width, int(heads), node)  # type: ignore[arg-type]


def _scaled_dot_product(sizes: Resizing, node: fx.Node) -> None:
    query, key, value = (n for n in node.args[:3] if isinstance(n, fx.Node))
    rank = query.meta["val"].ndim
    for dim in range(rank - 1):
        sizes.same((query, dim), (node, dim))
    sizes.same((query, rank - 1), (key, rank - 1))
    sizes.same((key, rank - 2), (value, rank - 2))
    sizes.same((value, rank - 1), (node, rank - 1))
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    if isinstance(mask, fx.Node):
        sizes.freeze_all(mask, node)
        sizes.freeze((query, rank - 2), node, "a mask has a fixed size")
        sizes.freeze((key, rank - 2), node, "a mask has a fixed size")


def _filled(node: fx.Node, start: int, defaults: tuple[tuple[str, Any], ...]) -> list[Any]:
    """Return arguments from position ``start`` on, by position, by name or by default."""
    given = node.args[start:]
    return [
        given[i] if i < len(given) else node.kwargs.get(name, default) for i, (name, default) in enumerate(defaults)
    ]


def _at(option: Any, place: int) -> Any:
    """Return an option of one dimension, given for all or for each."""
    if isinstance(option, tuple | list):
        return option[place] if len(option) > place else option[0]
    return option


def _given_dim(node: fx.Node, default: int) -> int:
    return int(node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else default))  # type: ignore[arg-type]


def _operand(node: fx.Node) -> fx.Node:
    first = node.args[0] if node.args else node.kwargs.get("input")
    assert isinstance(first, fx.Node)
    return first


def _groups(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions of a view's input make which of its output, dimensions of size 1 left out."""
    left = [(dim, size_of(size)) for dim, size in enumerate(before) if size_of(size) != 1]
    right = [(dim, size_of(size)) for dim, size in enumerate(after) if size_of(size) != 1]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        dims_in, dims_out = [left[i][0]], [right[j][0]]
        product_in, product_out = left[i][1], right[j][1]
        i, j = i + 1, j + 1
        while product_in != product_out and (i < len(left) or j < len(right)):
            more_in = j >= len(right) or (i < len(left) and not _larger(product_in, product_out))
            if more_in and i < len(left):
                product_in, i = product_in * left[i][1], i + 1
                dims_in.append(left[i - 1][0])
            elif j < len(right):
                product_out, j = product_out * right[j][1], j + 1
                dims_out.append(right[j - 1][0])
        groups.append((dims_in, dims_out))
    return groups


def _larger(a: Any, b: Any) -> bool:
    """Tell whether a product is a multiple of another one."""
    ratio = a / b
    return bool(ratio > 1) if isinstance(ratio, float) or ratio.is_number else not (b / a).free_symbols


_ELEMENTWISE = {
    *("add", "iadd", "sub", "isub", "rsub", "mul", "imul", "multiply", "truediv", "itruediv", "div", "pow", "neg"),
    *("add_", "mul_", "sub_", "div_", "maximum", "minimum", "where", "abs", "square", "sqrt", "rsqrt", "exp", "log"),
    *("relu", "relu_", "relu6", "sigmoid", "tanh", "gelu", "silu", "elu", "selu", "leaky_relu", "softplus", "mish"),
    *("hardtanh", "hardsigmoid", "hardswish", "softmax", "log_softmax", "dropout", "clamp", "normalize", "lerp"),
    *("clone", "contiguous", "to", "float", "half", "bfloat16", "double", "detach", "type_as", "logsigmoid"),
    *("zeros_like", "ones_like", "scale_gradient", "reciprocal", "log1p", "sign", "prelu", "alpha_dropout"),
}

_RULES: dict[str, Callable[[Resizing, fx.Node], Any]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "addmm": _addmm,
    "einsum": _einsum,
    **dict.fromkeys(JOINS - {"stack", "hstack"}, _cat),
    "hstack": _hstack,
    "stack": _stack,
    **dict.fromkeys(("transpose", "swapaxes", "permute", "t"), _permute),
    "getattr": _getattr,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(("sum", "mean", "norm", "vector_norm", "prod", "logsumexp", "std", "var"), _reduce),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten"), _view),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    "getitem": _getitem,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"), _pool),
    **dict.fromkeys(("split", "chunk", "unbind"), _split),
    "tensordot": _tensordot,
    "scaled_dot_product_attention": _scaled_dot_product,
    "multi_head_attention_forward": _attention,
}


def rewrite_sizes(node: fx.Node, sizes: Resizing) -> None:
    """Write a node's new sizes into the numbers that it states, such as those of a view."""
    name, args = name_of(node), list(node.args)
    if name in ("view", "reshape", "expand"):
        listed = isinstance(args[1], tuple | list)
        stated: Any = list(args[1] if listed else args[1:])  # type: ignore[arg-type]
        stated = [new if isinstance(old, int) and old > 0 and isinstance(new, int) else old
                  for old, new in zip(stated, sizes.shape(node)[-len(stated) :], strict=True)]  # fmt: skip
        node.args = (args[0], stated) if listed else (args[0], *stated)
    elif name == "unflatten":
        dim = int(args[1]) % (node.meta["val"].ndim - len(args[2]) + 1)  # type: ignore[arg-type]
        node.args = (*args[:2], tuple(sizes.shape(node)[dim : dim + len(args[2])]))  # type: ignore[arg-type]
    elif name == "layer_norm":
        node.args = (args[0], tuple(sizes.shape(node)[-len(args[1]) :]), *args[2:])  # type: ignore[arg-type]
    elif name == "multi_head_attention_forward":
        node.args = (*args[:3], sizes.size(_operand(node), 2), *args[4:])
