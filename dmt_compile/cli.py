"""The command line ``dmt``: look at plans and explanations, and certify, without a cluster.

A model is named by a callable that returns it, ``package.module:callable`` or ``path/to/file.py:callable``; a batch by
one that returns one local batch. A callable may return (model, batch) at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from dmt_compile.api import Explanation, explain, plan
from dmt_compile.certification import certify
from dmt_compile.errors import ConfigError, DmtError
from dmt_compile.partition.interaction import InteractionMatrix
from dmt_compile.partition.picture import save_picture


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 where a certificate does not hold; 2 for an error, told in one line on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        model, batch = _load(args.model, args.batch)
        options = {"topology": args.topology, **dict(map(_option, args.option))}
        return int(args.run(args, model, batch, options))
    except DmtError as error:
        print(f"dmt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dmt", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", required=True, metavar="WHERE:CALLABLE", help="returns the model, or (model, batch)")
    common.add_argument("--batch", metavar="WHERE:CALLABLE", help="returns one local batch")
    common.add_argument("--topology", default="1x1", help="<hosts>x<local ranks>, such as 2x4 (default 1x1)")
    common.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the compiler; VALUE in JSON"
    )
    common.add_argument("--json", type=Path, metavar="PATH", help="also write the result as JSON")
    for name, run, text in (
        (
            "plan",
            _plan,
            "print the towers and who owns which table; --json writes a plan that options={'plan': PATH} reads",
        ),
        ("explain", _explain, "print what was found, what stays flat and why, the plan, bytes per link, the passes"),
        ("certify", _certify, "run the compiled model beside the flat one on every rank of the topology and compare"),
    ):
        command = commands.add_parser(name, parents=[common], help=text, description=text)
        command.set_defaults(run=run)
        if name == "plan":
            command.add_argument("--partition", metavar="NAME", help="balanced, strided, coherent or diverse")
            command.add_argument(
                "--interactions",
                type=Path,
                metavar="PATH",
                help="what InteractionMatrix.save() wrote, for the last two",
            )
            command.add_argument(
                "--picture", type=Path, metavar="PATH", help="draw the towers of --interactions into this .svg or .png"
            )
        if name == "explain":
            command.add_argument("--certify", action="store_true", help="certify too")
        if name != "plan":
            command.add_argument("--seed", type=int, default=0, help="of the certificate's batches (default 0)")
    return parser


def _plan(args: argparse.Namespace, model: nn.Module, batch: Any, options: dict[str, Any]) -> int:
    given = {"partition": args.partition, "interactions": args.interactions}
    options |= {name: value for name, value in given.items() if value is not None}
    if args.picture is not None and "interactions" not in options:
        raise ConfigError("cli: expected --interactions beside --picture, found none; they are what it shows")
    made = plan(model, batch, **options)
    print(made)
    if args.picture is not None:
        save_picture(made, InteractionMatrix.load(options["interactions"]), args.picture)
    if args.json is not None:
        made.save(args.json)
    return 0


def _explain(args: argparse.Namespace, model: nn.Module, batch: Any, options: dict[str, Any]) -> int:
    explanation = explain(model, batch, **options)
    print(explanation)
    content = _as_json(explanation)
    holds = True
    if args.certify:
        certificate = certify(model, batch, seed=args.seed, **options)
        print(certificate)
        content["certificate"] = json.loads(certificate.to_json())
        holds = certificate.holds
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0 if holds else 1


def _certify(args: argparse.Namespace, model: nn.Module, batch: Any, options: dict[str, Any]) -> int:
    certificate = certify(model, batch, seed=args.seed, **options)
    print(certificate)
    if args.json is not None:
        certificate.save(args.json)
    return 0 if certificate.holds else 1


def _as_json(explanation: Explanation) -> dict[str, Any]:
    passes = [
        {"name": r.name, "effect": r.effect.name, "changed": r.report.changed, "matched": r.report.matched}
        | {"left_alone": [list(item) for item in r.report.skipped], "notes": list(r.report.notes)}
        for r in explanation.passes
    ]
    return {
        "effect": explanation.effect.name,
        "batch_size": explanation.batch_size,
        "plan": json.loads(explanation.plan.to_json()),
        "interaction": None if explanation.interaction is None else asdict(explanation.interaction),
        "unmatched": [asdict(item) for item in explanation.unmatched],
        "bytes_per_link": explanation.bytes_per_link,
        "passes": passes,
    }


# -------------------------------------------------------------------------------------------------------------- loading


def _option(text: str) -> tuple[str, Any]:
    """Read ``key=value``; a value that is no JSON is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"cli: expected --option KEY=VALUE, found {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _load(model: str, batch: str | None) -> tuple[nn.Module, Any]:
    made = _call(model, "--model")
    both = isinstance(made, tuple) and len(made) == 2
    if both == (batch is not None):
        raise ConfigError(
            "cli: expected either a --model callable that returns (model, batch) or --batch as well, found "
            + ("both; drop --batch" if both else "a model alone; name what returns one local batch with --batch")
        )
    built, local = made if both else (made, _call(str(batch), "--batch"))
    if not isinstance(built, nn.Module):
        raise ConfigError(f"cli: expected an nn.Module from --model {model}, found {type(built).__name__}")
    return built, local


def _call(text: str, flag: str) -> Any:
    """Import ``where:callable`` and call it without arguments; a module or a value is taken as it is."""
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise ConfigError(f"cli: expected {flag} as package.module:callable or path.py:callable, found {text!r}")
    value: Any = _import(where, flag)
    for part in name.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"cli: expected {part!r} in {where} for {flag}, found no such name")
        value = getattr(value, part)
    return value() if callable(value) and not isinstance(value, nn.Module) else value


def _import(where: str, flag: str) -> ModuleType:
    path = Path(where)
    folder = str(path.resolve().parent if path.suffix == ".py" else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as Python does for a script: neighbours can be imported
    try:
        if path.suffix != ".py":
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    except (ImportError, OSError) as error:
        raise ConfigError(f"cli: expected an importable module or file for {flag}, found {error}") from error
