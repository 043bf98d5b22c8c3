"""What no library checks about the source tree, as functions over files; test_structure.py applies them."""

from __future__ import annotations

import ast
import builtins
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = "sparsevila_cluster"
TOP_FILES = {"__init__.py", "__main__.py", "app.py"}
TOP_LEVEL = set(
    "README.md CHANGELOG.md CONTRIBUTING.md LICENSE Makefile pyproject.toml .gitignore .ci .pre-commit-config.yaml "
    "constraints protos kernels deploy benchmarks docs examples tests sparsevila_cluster".split()
)
GRPC_STATUS = set(
    "CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED "
    "RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE "
    "DATA_LOSS UNAUTHENTICATED".split()
)
BUILTIN_ERRORS = {n for n, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, BaseException)}


def our_files() -> list[Path]:
    """Every module of the package, without generated code."""
    return [path for path in sorted((ROOT / OURS).rglob("*.py")) if "pb" not in path.relative_to(ROOT).parts]


def modules_below(package: str) -> list[str]:
    """Dotted names of the modules of `package`, itself included."""
    folder = ROOT / OURS / package
    names = (path.relative_to(ROOT).with_suffix("").parts for path in sorted(folder.rglob("*.py")))
    return [".".join(part for part in parts if part != "__init__") for parts in names]


def work_on_import(path: Path, tree: ast.Module) -> Iterator[str]:
    """Statements that run for their effect when a module is imported."""
    for node in tree.body:
        effect = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if effect or isinstance(node, ast.For | ast.While | ast.With):
            yield f"{path}:{node.lineno}: runs on import: {ast.unparse(node)[:60]}"
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = getattr(node, "targets", None) or [node.target]
            if any(not isinstance(target, ast.Name | ast.Tuple) for target in targets):
                yield f"{path}:{node.lineno}: patches something on import: {ast.unparse(node)[:60]}"


def errors_elsewhere(path: Path, tree: ast.Module) -> Iterator[str]:
    """Exception classes outside core/errors.py, which alone has a status for each."""
    if path.as_posix().endswith("core/errors.py"):
        return
    for node in ast.walk(tree):
        bases = {ast.unparse(base).split(".")[-1] for base in getattr(node, "bases", ())}
        if isinstance(node, ast.ClassDef) and bases & BUILTIN_ERRORS:
            yield f"{path}:{node.lineno}: {node.name}: errors live in core/errors.py"


def doubles(files: dict[Path, ast.Module]) -> Iterator[str]:
    """Classes of one name, and files that only their folders tell apart."""
    classes, names = defaultdict(list), defaultdict(list)
    for path, tree in files.items():
        if path.name not in ("__init__.py", "__main__.py"):
            names[path.name].append(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(path)
    for kind, table in (("class", classes), ("file", names)):
        yield from (f"{kind} {name}: {', '.join(map(str, paths))}" for name, paths in table.items() if len(paths) > 1)


def check_status(error: type) -> Iterator[str]:
    """The gRPC and HTTP status of an error class and of all below it."""
    if getattr(error, "grpc_status", None) not in GRPC_STATUS:
        yield f"{error.__name__}: grpc_status {getattr(error, 'grpc_status', None)!r} is no gRPC code"
    if not (isinstance(getattr(error, "http_status", None), int) and 400 <= error.http_status <= 599):
        yield f"{error.__name__}: http_status {getattr(error, 'http_status', None)!r} is no HTTP error"
    for child in error.__subclasses__():
        yield from check_status(child)
