"""README and docs are true: commands and code run, paths and links exist, figures are those of the results."""

import re
import shlex
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import pytest
import yaml

from benchmarks import write_docs
from sparsevila_cluster.cli.main import main as sparsevila
from sparsevila_cluster.core.api_keys import ApiKeyEntry, add_api_key
from tests import structure
from tests.client.conftest import in_thread

ROOT, OURS = structure.ROOT, structure.OURS
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [
    (name, language, text)
    for name, page in TEXTS.items()
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
]
COMMANDS = sorted(
    {
        tuple(words)
        for _, language, text in BLOCKS
        if language == "bash"
        for line in text.splitlines()
        if (words := shlex.split(line, comments=True))
    }
)
CHECKPOINT = ROOT / OURS / "demo" / "checkpoint"

# Commands that no test here runs as they stand, and who runs them instead.
RUN_ELSEWHERE = {
    ("make",): "the targets exist; .ci/run runs `make test`, which runs everything that they consist of",
    ("sparsevila", "serve"): "tests/cluster/test_serve.py starts it as a process",
    ("sparsevila", "demo"): "tests/demo, and `make matrix` on every interpreter",
    ("sparsevila", "quantize"): "tests/cli/test_quantize_command.py, on checkpoints that take a second",
    ("sparsevila", "compare"): "tests/cli/test_quantize_command.py, on checkpoints that take a second",
    ("python", "-m"): "tests/benchmarks, at toy sizes",
}


def elsewhere(words):
    return any(words[: len(start)] == start for start in RUN_ELSEWHERE)


# ---- shape and links ---------------------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9216


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXTS[name]):
        assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", TEXTS)
def test_paths_in_the_text_exist(name):
    prose = re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(r"`((?:\.?[\w-]+/)+[\w.-]*)`", prose):
        known = path.startswith((".venv", "path/to", "sparsevila-demo"))
        assert known or (ROOT / path).exists() or (ROOT / OURS / path).exists(), path


def test_the_tree_is_the_tree():
    page = TEXTS["docs/architecture.md"]
    named = set(re.findall(r"^  ([a-z]+)/", page, re.MULTILINE))
    packages = {path.parent.name for path in (ROOT / OURS).glob("*/__init__.py")} | {"pb"}
    assert named == packages


def test_files_on_the_way_exist():
    """The ways of a media and of a turn name files below the package."""
    ways = [text for name, language, text in BLOCKS if name == "docs/architecture.md" and not language]
    paths = {path for text in ways for path in re.findall(r"[\w/]+\.py|[\w/]+/\*\.py", text)}
    assert len(paths) > 15
    for path in paths:
        assert list((ROOT / OURS).glob(path)), path


def test_every_page_is_listed():
    for name in TEXTS:
        if name.startswith("docs/adr/") and not name.endswith("README.md"):
            assert f"({Path(name).name})" in TEXTS["docs/adr/README.md"]
        elif name.startswith("docs/"):
            assert f"({name})" in TEXTS["README.md"], name


# ---- figures -----------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_results():
    results = write_docs.read_results()
    for name in write_docs.PAGES:
        assert write_docs.filled(TEXTS[name], results) == TEXTS[name], f"make figures would change {name}"
    assert set(re.findall(r"figures: (\w+)", TEXTS["docs/benchmarks.md"])) == set(results)


def test_a_figure_that_nobody_explains_is_noticed():
    with pytest.raises(KeyError, match="news"):
        write_docs.meaning("engine", "news")
    assert write_docs.meaning("kernels", "kv_pack_vs_peer")[0].startswith("`kv_pack`")


# ---- commands ----------------------------------------------------------------------------------------------------------------


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[1] for words in COMMANDS if words[0] == "make"}
    named |= {target for text in TEXTS.values() for target in re.findall(r"`make ([a-z-]+)", text)}
    assert {"demo", "test"} <= named <= targets


def test_ci_runs_the_readme_test_command():
    script = ROOT / ".ci" / "run"
    assert "make test" in script.read_text().splitlines() and ("make", "test") in COMMANDS
    assert script.stat().st_mode & 0o111


@cache
def help_of(*command):
    code = f"import sys; from {OURS}.cli.main import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, *command, "--help"]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [words[1:] for words in COMMANDS if words[0] == "sparsevila"], ids=" ".join)
def test_commands_and_options_exist(words):
    command = words[:2] if words[0] in ("config", "client", "keys") else words[:1]
    shown = help_of(*command)
    assert shown.returncode == 0, shown.stderr
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", shown.stdout), f"sparsevila {command[0]} has no {option}"


def test_an_unknown_command_is_noticed():
    assert help_of("no-such-command").returncode == 2


def test_benchmarks_exist():
    named = {words[2] for words in COMMANDS if words[:2] == ("python", "-m")}
    assert named
    for name in named:
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), name


@asynccontextmanager
async def local_server():
    """The target of a server over the bundled model, in this process."""
    from sparsevila_cluster.core.cluster_config import GatewayConfig
    from sparsevila_cluster.core.config import EngineConfig
    from sparsevila_cluster.engine.local_pipeline import LocalPipeline
    from sparsevila_cluster.gateway.grpc import GrpcServer
    from sparsevila_cluster.gateway.service import VideoQAService

    config, gateway = EngineConfig(), GatewayConfig(port=0)
    pipeline = LocalPipeline(config)
    service = VideoQAService(pipeline, gateway, config)
    server = GrpcServer(service, gateway)
    try:
        await server.start()
        yield f"localhost:{server.port}"
    finally:
        await server.stop(0.0)
        await service.close()
        await pipeline.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with everything that the pages name, and the target of a server."""
    from sparsevila_cluster.demo.drawing import write_mp4
    from sparsevila_cluster.demo.scene_drawing import make_video

    folder = tmp_path_factory.mktemp("docs")
    (folder / "sparsevila-demo").mkdir()
    write_mp4(make_video(1)[1], folder / "clip.mp4")
    for name in ("sparsevila-demo/video-1.mp4", "first.mp4", "second.mp4"):
        (folder / name).write_bytes((folder / "clip.mp4").read_bytes())
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "checkpoint").symlink_to(CHECKPOINT, target_is_directory=True)
    (folder / "engine.yaml").write_text(next(text for _, language, text in BLOCKS if language == "yaml"))
    add_api_key(folder / "keys.yaml", ApiKeyEntry(name="acme-phone", hash="0" * 64, tenant="acme"))
    (folder / "deploy").symlink_to(ROOT / "deploy", target_is_directory=True)
    picture = folder / "plan.png"
    from PIL import Image

    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture)
    with in_thread(local_server, 900) as target:
        yield folder, target


@pytest.mark.parametrize("words", [words for words in COMMANDS if not elsewhere(words)], ids=" ".join)
def test_commands_run(words, place, monkeypatch, capsys):
    assert words[0] == "sparsevila", f"{shlex.join(words)}: run it here, or say in RUN_ELSEWHERE who does"
    folder, target = place
    monkeypatch.chdir(folder)
    arguments = [word if word != "127.0.0.1:8600" else target for word in words[1:]]
    if arguments[0] == "client" and "--target" not in arguments:
        arguments += ["--target", target]
    assert sparsevila(arguments) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def test_the_first_answer_answers(place, monkeypatch, capsys):
    """README's first command says what README says that it says."""
    monkeypatch.chdir(place[0])
    words = next(words for words in COMMANDS if words[:2] == ("sparsevila", "ask") and "sparsevila-demo/video-1.mp4" in words)
    assert sparsevila(list(words[1:])) == 0
    out = capsys.readouterr().out
    answers = re.search(r"The answers are `(.+?)` and `(.+?)`", TEXTS["README.md"])
    assert answers and all(answer in out for answer in answers.groups()), out


# ---- code --------------------------------------------------------------------------------------------------------------------


def test_configuration_is_legal():
    from sparsevila_cluster.core.config import SparsityConfig, build_config

    shown = [yaml.safe_load(text) for _, language, text in BLOCKS if language == "yaml"]
    assert shown
    for fields in shown:
        build_config(**fields)
    documented = set().union(*(fields["sparsity"] for fields in shown))
    assert documented | {"seed"} == set(SparsityConfig.model_fields)


@pytest.mark.parametrize("name", [name for name in TEXTS if any(b[:2] == (name, "python") for b in BLOCKS)])
def test_python_runs(name, place, monkeypatch, capsys):
    """The blocks of a page in their order, in one namespace: later ones go on with what earlier ones made."""
    folder, target = place
    monkeypatch.chdir(folder)
    names = {"__name__": "docs"}
    try:
        for page, language, code in BLOCKS:
            if (page, language) == (name, "python"):
                exec(compile(code.replace("localhost:8600", target), name, "exec"), names)
                assert capsys.readouterr().out.strip(), code
    finally:
        if "qa" in names:
            names["qa"].close()
    assert (folder / "looked_at.png").stat().st_size > 10_000


# ---- examples ----------------------------------------------------------------------------------------------------------------


EXAMPLES = {
    "python_api.py": ([], "cyan"),
    "many_questions.py": ([], "answers about 3 videos are right"),
    "grpc_client.py": (["TARGET", "clip.mp4", "What colour is the heart at step 5?", "When does the red diamond appear?"], "cyan"),
    "new_policy.py": (["clip.mp4", "Describe step 5."], "distinct: "),
}


def test_every_example_is_run():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, place):
    folder, target = place
    arguments, expected = EXAMPLES[name]
    command = [sys.executable, ROOT / "examples" / name, *(target if word == "TARGET" else word for word in arguments)]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert expected in done.stdout
