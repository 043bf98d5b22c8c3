"""The house rules as functions over source text: floors, doors to the outside, words, the shape of files, errors.

Knows: which room stands on which floor. Does not know: pytest; test_house.py applies the rules and shows that each
one bites. To add a module, give it a floor here. To cross a wall, move the wall here and say why.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS, KERNELS = "sparsevila_cluster", "sparsevila_kernels"

FLOORS = {
    0: "errors config cluster_config display sight request calls metrics patience blocking logs docks pb",
    1: "media models pruning retrieval kv awq sampling attention",
    2: "wire transport",
    3: "scheduler step_batch running_turn turn_retrieval turn_answer evidence prompt_rows prefill_engine decode_engine detokenize "
    "conversation content_key media_handle engine_thread sharing turn_events pipeline footage page heatmap progress ask_many "
    "async_qa video_qa quantizing decode_graph kernel_batch text_pass",
    4: "cluster gateway",
    5: "app serving cli commands demo trip __main__",
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
SIDE = {"client"}  # floor 0 only; the command line may use it
# Floors where neighbours do not see each other, except so. Elsewhere files side by side are one folder.
NEIGHBOURS = {
    1: {"pruning": {"kv"}, "retrieval": {"kv"}, "models": {"media", "kv", "awq"}},
    2: {"transport": {"wire"}},
    4: {},
    5: {
        "cli": {"commands"},
        "commands": {"app", "serving", "demo", "trip"},
        "serving": {"app"},
        "demo": {"trip"},
        "__main__": {"cli"},
    },
}
MAY_USE_KERNELS = {"pruning", "retrieval", "awq", "models", "attention"} | {
    room for room, floor in FLOOR.items() if floor in (2, 3)
}
# Who may import what from outside.
DOORS = {
    "ray": {"cluster", "app", "serving"},
    "grpc": {"gateway", "client"},
    "grpc_health": {"gateway", "client"},
    "grpc_reflection": {"gateway"},
    "fastapi": {"gateway"},
    "torch.distributed": {"transport"},
    "transformers": {"models", "demo"},
    "tokenizers": {"models", "demo"},
    "jinja2": {"models", "demo"},
    "av": {"media", "demo"},
    "torchvision": set(),
    "pickle": set(),
    "cloudpickle": set(),
}
NO_TENSORS = set("errors config cluster_config display sight request calls metrics patience blocking scheduler client".split())
MAX_LINES = 330
LONG_FILES: dict[str, str] = {}  # path -> why it is better in one piece
FOLDERS = {"pb", "models", "awq", "pruning", "retrieval", "transport", "cluster", "gateway", "demo"}  # others earn it
TOP_LEVEL = set(
    "README.md LICENSE Makefile pyproject.toml .gitignore .ci "
    "constraints protos kernels deploy benchmarks tests sparsevila_cluster".split()
)
GRPC_STATUS = set(
    "CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED "
    "RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE "
    "DATA_LOSS UNAUTHENTICATED".split()
)
BUILTIN_ERRORS = {n for n, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, BaseException)}
# Names that others read (functions, classes, parameters, fields, constants) and the house's word instead.
NEVER_SAY = {
    r"mm_.+|multi_?modal_(data|inputs?)": "media",
    r"(image|video|vision|visual)_(features?|patches)": "visual tokens",
    r"(prompt|prefix)_cache|PromptCache|PrefixCache": "media prefix",
    r"(kv_)?transfer_params|.*_connector|.*Connector": "manifest, lane",
    r"Request": "Turn",
    r"tick|num_(ticks|iterations)": "step",
    r"(prune|pruning|retrieve|retrieval|keep|sparsity|compression|drop)_ratio": "*_keep, the fraction kept",
    r"n_[a-z]+(_[a-z]+)*|nb_.+": "num_*",
    r"timeout|latency|elapsed|duration|.+_(timeout|latency|duration)": "a name with its unit: _s, _ms",
}


def room_of(path: str) -> str:
    """'sparsevila_cluster/models/text/lean.py' -> 'models'; the package's own __init__ -> ''."""
    return path.split("/")[1].removesuffix(".py") if path.count("/") > 1 or not path.endswith("__init__.py") else ""


def imports_of(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, wherever it stands in the file."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + node.module.split(".") if node.module else base
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def check_imports(path: str, tree: ast.AST) -> Iterator[str]:
    """Floors, walls between neighbours, doors to the outside."""
    if path.startswith("kernels/"):
        ours = [(line, name) for line, name in imports_of(path, tree) if under(name, OURS)]
        yield from (f"{line}: kernels import nothing of ours: {name}" for line, name in ours)
    if not path.startswith(OURS):
        return
    room = room_of(path)
    if not room:
        return  # the package's face, checked by check_init
    if room not in FLOOR and room not in SIDE:
        yield f"1: {room!r} has no floor: add it to FLOORS in tests/structure.py"
        return
    floor = FLOOR.get(room)
    for line, name in imports_of(path, tree):
        if under(name, KERNELS) and room not in MAY_USE_KERNELS:
            yield f"{line}: {room} may not use the kernels"
        for door, allowed in DOORS.items():
            if under(name, door) and room not in allowed:
                yield f"{line}: {room} may not import {door}; only {sorted(allowed) or 'nobody'} may"
        if room in NO_TENSORS and name.split(".")[0] in ("torch", "numpy"):
            yield f"{line}: {room} is plain Python, without {name}"
        if not under(name, OURS):
            continue
        target = (name.split(".") + [""])[1]
        if target == room:
            continue
        if target in SIDE:
            legal = room in ("commands", "demo")
        elif target not in FLOOR:
            yield f"{line}: {name}: import the module that holds it; a module needs a floor"
            continue
        elif room in SIDE:
            legal = FLOOR[target] == 0
        elif floor == FLOOR[target]:
            legal = target in NEIGHBOURS[floor].get(room, ()) if floor in NEIGHBOURS else True
        else:
            legal = FLOOR[target] < floor
        if not legal:
            where = "the side" if room in SIDE else f"floor {floor}"
            yield f"{line}: {room} ({where}) may not import {target} (floor {FLOOR.get(target, 'side')})"


def check_init(path: str, tree: ast.Module) -> Iterator[str]:
    """An __init__ re-exports; the package's own may do it lazily."""
    if not path.endswith("/__init__.py"):
        return
    for i, node in enumerate(tree.body):
        names = {t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)}
        legal = isinstance(node, ast.Import | ast.ImportFrom) or names == {"__all__"}
        legal |= i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if path == f"{OURS}/__init__.py":
            legal |= isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
            legal |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            legal |= bool(names) and all(n.startswith("_") for n in names) and not has_call(node)
        if not legal:
            yield f"{node.lineno}: an __init__ only re-exports"


def has_call(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Call) for n in ast.walk(node))


def check_import_does_nothing(path: str, tree: ast.Module) -> Iterator[str]:
    """No statement runs for its effect when a module of ours is imported."""
    if not path.startswith((OURS, "kernels/")):
        return
    for node in tree.body:
        effect = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        if effect or isinstance(node, ast.For | ast.While | ast.With):
            yield f"{node.lineno}: runs on import: {ast.unparse(node)[:60]}"
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = getattr(node, "targets", None) or [node.target]
            if any(not isinstance(t, ast.Name | ast.Tuple) for t in targets):
                yield f"{node.lineno}: patches something on import: {ast.unparse(node)[:60]}"


def check_opening(path: str, tree: ast.Module) -> Iterator[str]:
    """A file opens with what it knows and what it does not know."""
    text = ast.get_docstring(tree) or ""
    if path.endswith("/__init__.py") or path.endswith("/__main__.py"):
        return
    if not text:
        yield "1: no docstring"
    elif path.startswith((OURS, "kernels/")):
        if len(re.findall(r"[.?!](?:\s|$)", text)) < 2 or not re.search(r"\bknows?\b", text, re.IGNORECASE):
            yield "1: the docstring says in two sentences or more what the file knows and does not know"


def check_length(path: str, tree: ast.Module, source: str) -> Iterator[str]:
    length = source.count("\n")
    if length > MAX_LINES and path not in LONG_FILES:
        yield f"{length}: longer than {MAX_LINES} lines: split it, or give the reason in LONG_FILES"


def public_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of what a file defines for others: functions, classes, parameters, fields, constants."""
    scopes = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.lineno, node.attr
    for scope in scopes:
        for node in scope.body:
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    yield node.lineno, target.id


def check_words(path: str, tree: ast.AST) -> Iterator[str]:
    if not path.startswith((OURS, "kernels/")):
        return
    for line, name in public_names(tree):
        word = name.lower() if name.isupper() else name
        for pattern, better in NEVER_SAY.items():
            if re.fullmatch(pattern, word.lstrip("_")):
                yield f"{line}: {name}: say {better}"


def check_errors_at_home(path: str, tree: ast.AST) -> Iterator[str]:
    """Exceptions live in one tree, in errors.py."""
    if not path.startswith(OURS) or path == f"{OURS}/errors.py":
        return
    for node in ast.walk(tree):
        bases = {ast.unparse(base).split(".")[-1] for base in getattr(node, "bases", ())}
        if isinstance(node, ast.ClassDef) and bases & BUILTIN_ERRORS:
            yield f"{node.lineno}: {node.name}: errors live in errors.py"


def check_status(error: type) -> Iterator[str]:
    """The gRPC and HTTP status of an error class and of all below it."""
    if getattr(error, "grpc_status", None) not in GRPC_STATUS:
        yield f"{error.__name__}: grpc_status {getattr(error, 'grpc_status', None)!r} is no gRPC code"
    if not (isinstance(getattr(error, "http_status", None), int) and 400 <= error.http_status <= 599):
        yield f"{error.__name__}: http_status {getattr(error, 'http_status', None)!r} is no HTTP error"
    for child in error.__subclasses__():
        yield from check_status(child)


def check_folders(paths: list[str]) -> Iterator[str]:
    """A folder is earned by the third sibling, unless the layout has it."""
    members: dict[str, int] = {}
    for path in paths:
        if path.startswith(OURS) and not path.endswith("/__init__.py"):
            folder = path.rpartition("/")[0]
            members[folder] = members.get(folder, 0) + 1
    for folder, num in members.items():
        if num < 3 and folder not in {OURS, *(f"{OURS}/{name}" for name in FOLDERS)}:
            yield f"{folder}: {num} file(s) earn no folder"


def check_top_level(paths: list[str]) -> Iterator[str]:
    strangers = {path.split("/")[0] for path in paths} - TOP_LEVEL
    yield from (f"{name}: the layout has no such name at the top" for name in sorted(strangers))


FILE_RULES = (check_imports, check_init, check_import_does_nothing, check_opening, check_words, check_errors_at_home)


def complaints(path: str, source: str) -> list[str]:
    tree = ast.parse(source, path)
    found = [f"{path}:{text}" for rule in FILE_RULES for text in rule(path, tree)]
    return found + [f"{path}:{text}" for text in check_length(path, tree, source)]


def our_files() -> list[str]:
    folders = (OURS, "kernels", "benchmarks", "tests")
    paths = (p.relative_to(ROOT).as_posix() for folder in folders for p in sorted((ROOT / folder).rglob("*.py")))
    return [p for p in paths if not p.startswith(f"{OURS}/pb/")]
