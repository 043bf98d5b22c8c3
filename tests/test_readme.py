"""The README is true: its commands exist, its tree is the tree, its code runs, and CI runs its test command."""

import re
import shlex
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import cache

import pytest
import yaml

from tests import structure
from tests.client.conftest import in_thread

ROOT, OURS = structure.ROOT, structure.OURS
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SHELL = [
    shlex.split(line, comments=True)
    for language, text in BLOCKS
    if language == "bash"
    for line in text.splitlines()
    if line.strip()
]
PYTHON = [text for language, text in BLOCKS if language == "python"]
TREE = next(text for _, text in BLOCKS if text.startswith(f"{OURS}/"))
BESIDE = -2  # rooms of `structure.SIDE`
CHECKPOINT = ROOT / OURS / "demo" / "checkpoint"


def calls(program: str) -> list[list[str]]:
    return [words[1:] for words in SHELL if words[0] == program]


def read_tree(tree: str) -> tuple[dict[str, int], set[str]]:
    """(floor of each room of the package, other paths named)."""
    rooms: dict[str, int] = {}
    others: set[str] = set()
    stack: list[str] = []
    floor = -1
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        if name == "floor":
            floor = int(line.split()[1].rstrip(","))
            continue
        if name == "beside":
            floor = BESIDE
            continue
        top = stack[0] if stack and depth else name
        stack = [*stack[:depth], name] if depth else [name]
        if top == f"{OURS}/" and depth:
            rooms[name] = floor
        else:
            others.add("".join(stack))
    return rooms, others


def rooms_that_exist() -> set[str]:
    files = [path.removeprefix(f"{OURS}/") for path in structure.our_files() if path.startswith(f"{OURS}/")]
    return {path.split("/")[0] + "/" * ("/" in path) for path in files} - {"__init__.py"}


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {words[0] for words in calls("make")} | set(re.findall(r"`make (\w+)", TEXT))
    assert {"demo", "test"} <= named <= targets


def test_ci_runs_the_readme_test_command():
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test", "make matrix ONLY=other"] and ["test"] in calls("make")
    assert script.stat().st_mode & 0o111


def test_tree_is_the_tree():
    rooms, others = read_tree(TREE)
    assert rooms_that_exist() <= set(rooms)
    assert {room for room in rooms if room.endswith("/")} <= rooms_that_exist()
    assert {room: structure.FLOOR.get(room.removesuffix(".py").rstrip("/"), BESIDE) for room in rooms} == rooms
    assert all((ROOT / path).is_dir() for path in others)
    holding_code = {path.split("/")[0] + "/" for path in structure.our_files()}
    assert holding_code <= others | {f"{OURS}/"}


def test_every_file_of_the_tree_exists():
    assert set(read_tree(TREE)[0]) <= rooms_that_exist()


def test_tree_reader_sees_what_is_there():
    tree = f"{OURS}/\n  floor 1, x\n    kv.py  a\n    models/  b\nkernels/\n  inner/  c\ntests/  d\n"
    rooms, others = read_tree(tree)
    assert rooms == {"kv.py": 1, "models/": 1} and others == {f"{OURS}/", "kernels/", "kernels/inner/", "tests/"}


def test_paths_in_the_text_exist():
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    paths = [p for p in re.findall(r"`([\w./]+(?:\.py|/))`", prose) if not p.startswith((".venv", "__init__"))]
    assert paths
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / OURS / path).exists() or path in read_tree(TREE)[0], path
    assert all((ROOT / path).exists() for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT))


def test_benchmarks_exist():
    named = {words[1] for words in calls("python") if words[0] == "-m"}
    assert named and all(name.startswith("benchmarks.") for name in named)
    for name in named:
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name


@cache
def help_of(*command: str) -> subprocess.CompletedProcess:
    code = f"import sys; sys.argv = ['sparsevila', *sys.argv[1:]]; from {OURS}.cli import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, *command, "--help"]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", calls("sparsevila"), ids=" ".join)
def test_commands_and_options_exist(words):
    command = words[:2] if words[0] in ("config", "client") else words[:1]
    shown = help_of(*command)
    assert shown.returncode == 0, shown.stderr
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", shown.stdout), f"sparsevila {command[0]} has no {option}"


def test_an_unknown_command_is_noticed():
    assert help_of("no-such-command").returncode == 2


def test_configuration_is_legal():
    from sparsevila_cluster.core.config import SparsityConfig, build_config

    shown = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
    assert shown
    for fields in shown:
        build_config(**fields)
    documented = set().union(*(fields["sparsity"] for fields in shown))
    assert documented | {"seed"} == set(SparsityConfig.model_fields)


@asynccontextmanager
async def local_door():
    """The target of a door over the bundled model."""
    from sparsevila_cluster.core.cluster_config import DoorConfig
    from sparsevila_cluster.core.config import EngineConfig
    from sparsevila_cluster.engine.local_pipeline import LocalPipeline
    from sparsevila_cluster.gateway import GrpcServer

    config = EngineConfig()
    pipeline = LocalPipeline(config)
    door = GrpcServer(pipeline, DoorConfig(port=0), config)
    try:
        await door.start()
        yield f"localhost:{door.port}"
    finally:
        await door.stop(0.0)
        await pipeline.close()


def test_python_runs(tmp_path, monkeypatch, capsys):
    """The blocks in their order, in one namespace: later ones go on with what earlier ones made."""
    from sparsevila_cluster.demo.world import make_video, write_mp4

    write_mp4(make_video(1)[1], tmp_path / "clip.mp4")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "checkpoint").symlink_to(CHECKPOINT, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    with in_thread(local_door) as target:
        try:
            for code in PYTHON:
                exec(compile(code.replace("localhost:8600", target), "README.md", "exec"), names)
                assert capsys.readouterr().out.strip(), code
        finally:
            names["qa"].close()
    assert (tmp_path / "looked_at.png").stat().st_size > 10_000
