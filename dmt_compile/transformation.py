"""The ahead-of-time way in: a flat model made into a module with Tower Modules, which stands by itself."""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import fx, nn

from dmt_compile import torch_internals
from dmt_compile.backend import compile_graph, copy_graph
from dmt_compile.capture import Capture
from dmt_compile.config import Options
from dmt_compile.errors import ConfigError, UnsupportedGraphError
from dmt_compile.inspection.dumps import GraphDump
from dmt_compile.ir import ops
from dmt_compile.ir.pass_base import PassContext, calls, erase_unused, placeholders, sort_graph
from dmt_compile.ir.stages import Stage
from dmt_compile.passes.insert_tower_modules import REFUSED
from dmt_compile.plan import TableSpec, TowerPlan
from dmt_compile.runtime.session import Passes, Session, plan_for
from dmt_compile.topology import Topology
from dmt_compile.tower_modules import modes_kept
from dmt_compile.towers import NAME, Towers

Forward = Callable[..., Any]


class TransformedModel(nn.Module):
    """A flat model's modules, with some layers replaced, its Tower Modules as ``dmt_towers``, and a forward of its own.

    The forward in training and that in evaluation are two graphs; ``code`` shows both. Nothing is sharded and no
    process group is needed; ``torch.compile(..., backend="dmt")`` distributes it like any flat model.
    """

    dmt_plan: TowerPlan

    def __init__(self) -> None:
        super().__init__()
        self._forwards: dict[bool, Forward] = {}
        self._sources: dict[bool, str] = {}
        self.register_load_state_dict_pre_hook(_in_place_of_flat)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the transformed graph of the present mode gives; arguments as for the flat model."""
        return self._forwards[self.training](self, *args, **kwargs)

    @property
    def code(self) -> str:
        """The forward in training and in evaluation, as Python."""
        return "\n".join(f"# {'training' if mode else 'evaluation'}\n{self._sources[mode]}" for mode in (True, False))


def _in_place_of_flat(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a state dict of the compiled flat model fit, which holds a layer of another size beside the flat one."""
    beside = f"{prefix}{NAME}.replaced."
    for name in [name for name in state_dict if name.startswith(beside)]:
        state_dict[prefix + name.removeprefix(beside)] = state_dict.pop(name)


def transform(
    model: nn.Module,
    batch: Any,
    plan: TowerPlan,
    *,
    kwargs: Mapping[str, Any] | None = None,
    tower_module: Callable[..., nn.Module] | None = None,
) -> TransformedModel:
    """Return a new module that computes the model with the plan's Tower Modules, in one process.

    Args:
        model: flat; it is not changed. Parameters that survive are shared with it, under their flat names.
        batch: one batch: a tuple is positional arguments, anything else the one argument.
        plan: with Tower Modules, such as ``dmt_compile.plan(model, batch, "4x8", tower_module="dlrm")`` makes.
        kwargs: keyword arguments of the model.
        tower_module: the callable that the plan names, if it does: a plan cannot hold it.

    Returns:
        A module with the same arguments and outputs. New are ``dmt_towers`` and the layers that got another size.

    Raises:
        ConfigError: the plan has no Tower Modules, or its callable is missing; the model has Tower Modules already.
        PlanError: the plan belongs to another model.
        UnsupportedGraphError: the interaction is not one that Tower Modules fit, or the model is not one graph.

    Cost: two traces of the model, and two forward passes of it on the batch.
    """
    if plan.tower_modules is None:
        raise ConfigError(
            "transform: expected a plan with Tower Modules, found one without; make it with "
            "dmt_compile.plan(model, batch, topology, tower_module='dlrm')"
            + "".join(f"; {note}" for note in plan.notes if note.startswith("no Tower Modules"))
        )
    bare = getattr(model, "_orig_mod", model)
    if hasattr(bare, NAME):
        raise ConfigError(
            "transform: expected a flat model, found one that has its Tower Modules; torch.compile(..., backend='dmt') "
            "takes it as it is"
        )
    options = Options(plan=plan, tower_module=tower_module, topology=plan.topology, dense_compiler="eager")
    options.recipe(plan)
    positional = batch if isinstance(batch, tuple) else (batch,)
    result = _clone_root(bare)
    result.dmt_plan = plan
    towers: Towers | None = None
    for mode in (True, False):
        captured = _capture(bare, positional, dict(kwargs or {}), options, towers, mode)
        towers = captured.ctx.towers or _refused(captured.ctx)
        source, function = _write(bare, captured, mode)
        result._sources[mode], result._forwards[mode] = source, function
    assert towers is not None
    _move_in(result, towers)
    result.train(bare.training)
    for name, module in bare.named_modules():
        if name:
            result.get_submodule(name).training = module.training
    return result


def _refused(ctx: PassContext) -> NoReturn:
    """Say why a model has no Tower Modules.

    Raises:
        UnsupportedGraphError: always.
    """
    left = [item for item in ctx.embedding_graph.unmatched if item.reason.startswith(REFUSED)]
    reason = f"{left[0].reason} ({left[0].source_line})" if left else "that it has no embedding table"
    raise UnsupportedGraphError(
        f"transform: expected features that meet in an interaction, found {reason}; without Tower Modules "
        "torch.compile(..., backend='dmt') takes the model as it is"
    )


# ------------------------------------------------------------------------------------------------------------- capture


@dataclass
class _Captured:
    """A model's graph with its towers, and what its output is made of."""

    gm: fx.GraphModule
    ctx: PassContext
    sources: dict[str, str]
    structure: Any = None


@dataclass
class _Session(Session):
    """Rewrites the one graph of a model, and lets the flat one run to see what becomes of its outputs."""

    options: Options
    topology: Topology
    towers: Towers | None
    inline_towers: bool = False
    captured: list[_Captured] = field(default_factory=list)
    outputs: tuple[Any, ...] = ()

    def backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Capture a graph."""
        return compile_graph(gm, self.options, self)

    def prepare(self, capture: Capture, run: Passes) -> None:
        """Change nothing."""

    def choose_plan(self, tables: tuple[TableSpec, ...], capture: Capture) -> TowerPlan:
        """Return the plan that was given, with whole tables: this process has them all."""
        return plan_for(self.options, self.topology, tables, capture).unsplit(tables)

    def program(self, capture: Capture, run: Passes) -> Callable[..., Any]:
        """Rewrite the graph; run the flat one."""
        if torch_internals.ends_in_graph_break() or self.captured:
            raise UnsupportedGraphError(
                "transform: expected a model that is one graph, found a graph break; TORCH_LOGS=graph_breaks shows "
                "where, torch.compile with options={'tower_module': ...} handles each graph by itself"
            )
        flat = copy_graph(capture.gm)
        sources = {
            node.name: torch_internals.variable_name(source)
            for node in placeholders(capture.gm)
            if (source := torch_internals.source_of(node)) is not None
        }
        ctx, _ = run(Stage.TOWERED)
        self.captured.append(_Captured(capture.gm, ctx, sources))

        def record(*args: Any) -> Any:
            self.outputs = flat(*args)
            return self.outputs

        return record

    def dump(self) -> GraphDump | None:
        """Write nothing."""
        return None


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    towers: Towers | None,
    mode: bool,
) -> _Captured:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    assert isinstance(options.plan, TowerPlan)
    session = _Session(options, options.plan.topology, towers)
    try:
        with (
            modes_kept(model),
            torch_internals.unlimited_recompiles(),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
        ):
            if model.training != mode:
                model.train(mode)
            output = torch.compile(model, backend=session.backend)(*args, **kwargs)
    finally:
        for buffer, before in buffers:
            buffer.data.copy_(before)
    if not session.captured:
        raise UnsupportedGraphError("transform: expected a model that torch.compile can trace, found no graph")
    captured = session.captured[0]
    captured.structure = _structure(output, session.outputs, args, kwargs)
    return captured


def _structure(output: Any, graph_outputs: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an output with numbers of graph outputs in place of tensors.

    Raises:
        UnsupportedGraphError: it holds something that a graph cannot give, or the graph gives more than that.
    """
    places = {id(value): index for index, value in enumerate(graph_outputs)}
    used: set[int] = set()

    def visit(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in places:
                raise UnsupportedGraphError(
                    "transform: expected outputs that the model computes, found an input or a parameter among them; "
                    "return a result alone"
                )
            used.add(places[id(value)])
            return _Output(places[id(value)])
        if isinstance(value, tuple | list) and type(value) in (tuple, list):
            return type(value)(visit(item) for item in value)
        if type(value) is dict:
            return {key: visit(item) for key, item in value.items()}
        if value is None or isinstance(value, str | int | float | bool):
            return value
        raise UnsupportedGraphError(
            f"transform: expected tensors in tuples, lists and dicts as output, found {type(value).__name__}; return "
            "one of these"
        )

    found = visit(output)
    if len(used) < len(places):
        raise UnsupportedGraphError(
            "transform: expected a model whose forward changes nothing but its output and buffers in place, found that "
            "it keeps a tensor as an attribute; keep it in a buffer, changed in place"
        )
    return found


@dataclass(frozen=True)
class _Output:
    """The place of a tensor among a graph's outputs; ``repr`` is its variable in the written forward."""

    index: int

    def __repr__(self) -> str:
        return f"_out[{self.index}]"


# ------------------------------------------------------------------------------------------------------------- writing


_numbers = itertools.count()


def _write(model: nn.Module, captured: _Captured, mode: bool) -> tuple[str, Forward]:
    """Write a graph as a function of the module and the flat model's arguments; return its text and it."""
    gm, ctx = captured.gm, captured.ctx
    _drop_checks(gm)
    reads: list[str] = []
    for node in placeholders(gm):
        if not node.users:
            gm.graph.erase_node(node)
        elif node.name in ctx.parameters:
            with gm.graph.inserting_before(node):
                path = ctx.flat_names[node.name]
                attribute = gm.graph.create_node("get_attr", _own_path(model, path, captured.sources[node.name]))
            node.replace_all_uses_with(attribute)
            gm.graph.erase_node(node)
        else:
            reads.append(f"    {node.name} = {captured.sources[node.name]}")
            node.target = node.name
    for node in gm.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith(f"{NAME}.replaced."):
            node.target = str(node.target).removeprefix(f"{NAME}.replaced.")
            node._rename(node.target.replace(".", "_"))
    written = gm.graph.python_code("self")
    body = written.src.split("\n", written.src.count("\n"))
    start = next(index for index, line in enumerate(body) if line.startswith("def "))
    lines = [line for line in body[start + 1 :] if line.strip()]
    lines = [
        f"    _out = {line.strip().removeprefix('return ')}" if line.startswith("    return ") else line
        for line in lines
    ]
    source = "\n".join([f"def forward{_signature(model)}:", *reads, *lines, f"    return {captured.structure!r}", ""])
    file = f"<dmt_compile.transform {next(_numbers)} {'training' if mode else 'evaluation'}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = dict(written.globals)
    scope["_defaults"] = _defaults(model)
    exec(compile(source, file, "exec"), scope)
    return source, scope["forward"]


def _drop_checks(gm: fx.GraphModule) -> None:
    """Let lookups read the model's own ids and offsets; the compiler checks them again."""
    for check in calls(gm, ops.check_batch):
        ids, offsets, how = check.args[:3]
        lookups = [n for n in calls(gm, ops.lookup) if isinstance(n.args[1], fx.Node) and n.args[1] in check.users]
        for lookup, own_ids, starts, pooling in zip(lookups, ids, offsets, how, strict=True):  # type: ignore[arg-type]
            lookup.update_arg(1, own_ids)
            lookup.update_arg(2, starts)
            lookup.update_arg(4, pooling)
        for node in list(check.users):
            gm.graph.erase_node(node)
        erase_unused(gm, check)
    sort_graph(gm)


def _own_path(model: nn.Module, flat_name: str, source: str) -> str:
    """Return where a parameter, buffer or plain tensor of a model is, as a dotted path."""
    try:
        attrgetter(flat_name)(model)
    except AttributeError:
        return source.removeprefix("self.")
    return flat_name


def _signature(model: nn.Module) -> str:
    """Return the parameters of a model's forward, without annotations; defaults by name."""
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for name, parameter in inspect.signature(model.forward).parameters.items():
        default = parameter.default
        if default is not inspect.Parameter.empty:
            default = _Name(f"_defaults[{name!r}]")
        parameters.append(parameter.replace(annotation=inspect.Parameter.empty, default=default))
    return str(inspect.Signature(parameters))


def _defaults(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


@dataclass(frozen=True)
class _Name:
    text: str

    def __repr__(self) -> str:
        return self.text


# ------------------------------------------------------------------------------------------------------------- modules


def _clone_root(model: nn.Module) -> TransformedModel:
    """Return a tree of the model's modules under a new root, all parameters and buffers shared."""
    root = TransformedModel()
    clones: dict[nn.Module, nn.Module] = {model: root}
    for name, value in vars(model).items():
        if name not in vars(root) and not hasattr(TransformedModel, name):
            root.__dict__[name] = value
    _share(model, root, clones)
    return root


def _share(module: nn.Module, clone: nn.Module, clones: dict[nn.Module, nn.Module]) -> None:
    clone._parameters = dict(module._parameters)
    clone._buffers = dict(module._buffers)
    clone._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    clone._modules = {}
    for name, child in module._modules.items():
        if child is not None and child not in clones:
            clones[child] = copy.copy(child)
            _share(child, clones[child], clones)
        clone._modules[name] = None if child is None else clones[child]


def _move_in(root: TransformedModel, towers: Towers) -> None:
    """Put replaced parameters where the flat ones are, and the towers beside them."""
    for flat_name, tensor in towers.replacements().items():
        path, _, leaf = flat_name.rpartition(".")
        owner = root.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            owner._parameters[leaf] = tensor
        else:
            owner._buffers[leaf] = tensor
        _restate(owner)
    towers.replaced = nn.Module()
    root.add_module(NAME, towers)


def _restate(module: nn.Module) -> None:
    """Let a layer's own description follow its parameters."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.BatchNorm1d):
        module.num_features = len(module.weight)
