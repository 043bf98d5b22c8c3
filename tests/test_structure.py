"""The tree keeps its walls: import contracts, no work on import, one name for each thing, a status for every error."""

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import structure

OURS = structure.OURS
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")


def lint_imports(folder):
    command = [LINT_IMPORTS, "--no-cache", folder / "pyproject.toml"]
    env = {"PYTHONPATH": f"{folder}:{folder / 'kernels'}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A copy of the product in which the engine imports the API's pictures."""
    folder = tmp_path_factory.mktemp("planted")
    for name in (OURS, "kernels"):
        shutil.copytree(structure.ROOT / name, folder / name, ignore=shutil.ignore_patterns("checkpoint*", "__pycache__"))
    shutil.copy(structure.ROOT / "pyproject.toml", folder)
    scheduler = folder / OURS / "engine" / "scheduler.py"
    scheduler.write_text(f"{scheduler.read_text()}\nfrom {OURS}.api import heatmap\n")
    return folder


def test_imports_keep_the_contracts():
    done = lint_imports(structure.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_planted_import_is_found(planted):
    done = lint_imports(planted)
    assert done.returncode == 1
    assert f"{OURS}.engine is not allowed to import {OURS}.api" in " ".join(done.stdout.split())
    assert "No cycles are allowed in sparsevila_cluster." in done.stdout


def test_every_package_has_a_contract():
    config = (structure.ROOT / "pyproject.toml").read_text()
    packages = [path.parent.name for path in (structure.ROOT / OURS).glob("*/__init__.py")]
    missing = [name for name in packages if f'source_modules = ["{OURS}.{name}"]' not in config]
    assert packages and not missing


def test_three_files_lie_at_the_top():
    assert {path.name for path in (structure.ROOT / OURS).glob("*.py")} == structure.TOP_FILES


def test_the_tree_keeps_the_rules():
    files = {path.relative_to(structure.ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in structure.our_files()}
    found = list(structure.doubles(files))
    for path, tree in files.items():
        found += [*structure.work_on_import(path, tree), *structure.errors_elsewhere(path, tree)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (structure.work_on_import, "import logging\nlogging.basicConfig()"),
        (structure.work_on_import, "import torch\ntorch.backends.x = 1"),
        (structure.work_on_import, "for x in range(3): ..."),
        (structure.errors_elsewhere, "class Full(Exception): ..."),
        (structure.errors_elsewhere, "class Full(RuntimeError): ..."),
    ],
)
def test_a_bad_line_is_found(rule, source):
    assert len(list(rule(Path(f"{OURS}/engine/x.py"), ast.parse(source)))) == 1


def test_doubles_are_found():
    files = {Path("a/x.py"): ast.parse("class A: ..."), Path("b/x.py"): ast.parse("class A: ..."), Path("c/y.py"): ast.parse("")}
    assert list(structure.doubles(files)) == ["class A: a/x.py, b/x.py", "file x.py: a/x.py, b/x.py"]


def test_every_error_has_a_status():
    errors = importlib.import_module(f"{OURS}.core.errors")
    assert not list(structure.check_status(errors.SparseVilaError))

    bad_grpc = type("BadGrpc", (Exception,), {"grpc_status": "OOPS", "http_status": 500})
    bad_http = type("BadHttp", (Exception,), {"grpc_status": "INTERNAL", "http_status": 200})
    good = type("Good", (Exception,), {"grpc_status": "INTERNAL", "http_status": 500})
    child = type("Child", (good,), {"http_status": None})
    assert all(list(structure.check_status(error)) for error in (bad_grpc, bad_http, Exception))
    assert list(structure.check_status(good)) == ["Child: http_status None is no HTTP error"] and child


IMPORT_ALONE = """
import importlib, logging, sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numpy", "transformers", "tokenizers", "av", "ray"}:
            raise ImportError(f"{name} is behind the wall")
sys.meta_path.insert(0, Wall())
for module in sys.argv[1:]:
    importlib.import_module(module)
assert not logging.root.handlers, "importing set up logging"
"""


def import_behind_wall(*modules):
    command = [sys.executable, "-W", "error", "-c", IMPORT_ALONE, *modules]
    return subprocess.run(command, cwd=structure.ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("package", ["core", "client"])
def test_core_and_client_import_without_torch(package):
    done = import_behind_wall(*structure.modules_below(package))
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stderr


def test_the_wall_stands():
    assert "behind the wall" in import_behind_wall(f"{OURS}.kvcache.arena").stderr


def test_top_level_holds_only_what_the_layout_names():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=structure.ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert {line.strip('"').split("/")[0] for line in done.stdout.splitlines()} <= structure.TOP_LEVEL
