import ast
import importlib
import inspect
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

import elips_torch

ROOT = pathlib.Path(elips_torch.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
EXAMPLES = sorted((ROOT.parent / "examples").rglob("*.py"))
LAYERS = {
    "core": 0,
    "reference": 1,
    "kernels": 1,
    "engines": 1,
    "ops": 2,
    "quantizers": 3,
    "indexes": 4,
    "training": 5,
    "evaluation": 5,
    "distributed": 5,
    "runtime": 5,
    "lightning": 6,
    "cli": 6,
    "testing": 6,
}
# Folders of one layer that may not import each other.
APART = {"training", "evaluation", "distributed", "runtime"}
OWNERS = {
    "faiss": "engines/faiss",
    "cuvs": "engines/cuvs",
    "triton": "kernels",
    "lightning": "lightning",
    "matplotlib": "evaluation",
    "tqdm": "core",
    "pyarrow": "cli",
    "jsonargparse": "cli",
}
LAZY = ("faiss", "cuvs", "lightning", "torchmetrics", "triton", "matplotlib", "torch._dynamo")


def imports(path: pathlib.Path):
    """Yield the full names of the modules that a file imports, anywhere in it."""
    package = list(path.relative_to(ROOT.parent).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            # `from elips_torch import ops` names a folder too.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_by_name(path: pathlib.Path):
    """Yield the names that a file imports by a call, as far as they stand there."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in ("import_module", "__import__"):
                yield str(node.args[0].value)


def folder_of(path: pathlib.Path) -> str | None:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else None


def upward(folder: str, imported: str) -> bool:
    parts = imported.split(".")
    if parts[0] != "elips_torch" or len(parts) < 2:
        return False
    other = parts[1]
    if other not in LAYERS:
        # A name of the package itself, whose __init__ imports everything.
        return True
    if other == folder:
        return False
    return LAYERS[other] > LAYERS[folder] or {folder, other} <= APART


def test_every_folder_has_a_layer():
    folders = {folder_of(path) for path in FILES} - {None}
    assert folders <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    folder = folder_of(path)
    if folder is None or LAYERS[folder] == 6:
        # These may import all.
        return
    assert not [name for name in imports(path) if upward(folder, name)]


def test_an_upward_import_is_noticed():
    assert upward("core", "elips_torch.ops.knn")
    assert upward("evaluation", "elips_torch.training.memory")
    assert upward("ops", "elips_torch.knn")
    assert not upward("ops", "elips_torch.core.metric")
    assert not upward("kernels", "elips_torch.reference.knn")


@pytest.mark.parametrize("package", OWNERS)
def test_an_optional_package_is_imported_by_its_folder_only(package):
    owner = ROOT / OWNERS[package]
    strangers = [
        str(path.relative_to(ROOT))
        for path in FILES
        if owner not in path.parents and any(name.split(".")[0] == package for name in imports(path))
    ]
    assert not strangers


def test_faiss_is_imported_by_its_folder_only_by_whatever_way():
    owner = ROOT / OWNERS["faiss"]

    def importers(paths):
        return [
            path
            for path in paths
            if any(
                name.split(".")[0] == "faiss" for found in (imports, imports_by_name) for name in found(path)
            )
        ]

    assert EXAMPLES
    inside = [path for path in FILES if owner in path.parents]
    # Here they are by a call, which the other test does not see.
    assert importers(inside)
    assert not importers([path for path in (*FILES, *EXAMPLES) if path not in inside])


def run(program: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_importing_the_library_leaves_the_heavy_packages_alone():
    # Some versions of torch import a few of them by themselves.
    program = f"""
import sys, torch
before = set(sys.modules)
import elips_torch
print([name for name in {LAZY!r} if name in set(sys.modules) - before])
"""
    assert run(program).strip() == "[]"


def test_importing_the_library_costs_little(tmp_path):
    program = """
import time, torch
start = time.process_time()
import elips_torch
print(time.process_time() - start)
"""
    # What is installed is compiled once: by the first run here, whatever the settings around say.
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    run(program, **bytecode)
    # Seconds of work, which other processes lengthen at times.
    assert min(float(run(program, **bytecode)) for _ in range(3)) <= 0.15


@pytest.mark.parametrize("name", elips_torch.__all__)
def test_public_names_are_documented(name):
    public = getattr(elips_torch, name)
    if inspect.isclass(public) or inspect.isfunction(public):
        assert public.__doc__
        assert not public.__doc__.startswith(f"{name}(")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 450


def test_wheels_hold_every_file_that_is_no_python():
    """Most of all the C++ code, which is compiled from what was installed."""
    settings = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["elips_torch"]
    shipped = {path for pattern in patterns for path in ROOT.glob(pattern)}
    others = {path for path in ROOT.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert ROOT / "kernels" / "native" / "search.cpp" in others
    assert others <= shipped
    assert all(list(ROOT.glob(pattern)) for pattern in patterns)


def test_every_index_is_known_without_being_imported():
    program = """
from elips_torch.indexes.base import known_indexes
print(sorted(known_indexes()))
"""
    assert "'SQIndex'" in run(program)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="'elips_torch' has no attribute 'Faiss'"):
        elips_torch.Faiss  # noqa: B018
    assert set(elips_torch.__all__) <= set(dir(elips_torch))


@pytest.mark.parametrize("package", ["elips_torch", "elips_torch.evaluation"])
def test_no_module_hides_a_lazy_name(package):
    # The import of `package.name` would set `package.name` to the module.
    package = importlib.import_module(package)
    folder = pathlib.Path(package.__file__).parent
    assert package._LAZY
    assert not {path.stem for path in folder.iterdir()} & set(package._LAZY)
