"""`sparsevila client`: what is printed where, one document each, exit codes, keys from the environment; without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsevila_cluster.cli import main as cli
from sparsevila_cluster.cli.client_command import KEY_VARIABLE
from sparsevila_cluster.client import call_errors
from sparsevila_cluster.core.errors import Internal, NotFound, QueueFull, Unauthenticated, Unavailable
from tests.cli.test_main import SUMMARY_MS
from tests.client.scripted_server import MEDIA_ID, TEXT, TOKENS

ROOT = Path(__file__).parents[2]

DETAILS = {
    "uptime_s": 12.34567,
    "pools": {
        "prefill": [{"worker": "prefill-0", "load": {"num_running": 1, "prefix_bytes": 12_345_678}}],
        "decode": [{"worker": "decode-0", "healthy": True, "lanes": ["prefill-0"]}, {"worker": "decode-1", "healthy": False}],
    },
    "media": [{"media_id": MEDIA_ID, "holders": ["decode-0", "decode-1"], "kv_bytes": 2_500_000}],
    "lanes": [],
    "newer": [1, "[red]", None],
    "odd": None,
}


@pytest.fixture
def run(served, monkeypatch, capsys, tmp_path):
    """Run `sparsevila client` against the scripted server. Returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    (tmp_path / "clip.mp4").write_bytes(b"clip" * 1000)
    (tmp_path / "cup.png").write_bytes(b"cup")
    target = f"127.0.0.1:{served[1]}"

    def call(*words):
        capsys.readouterr()
        return cli.main(["client", *words, *(() if "--target" in words else ("--target", target))]), *capsys.readouterr()

    return call


def test_asking_prints_the_same_document_as_a_local_engine(run, served):
    options = "--json --seed 7 --max-frames 8 --retrieve-keep 0.2".split()
    code, out, err = run("ask", "clip.mp4", "What?", "And then?", *options)
    assert (code, err) == (0, "") and out.count("\n") == 1
    document = json.loads(out)
    assert set(document) == {"answers", "trip", "model", "sparsity"}
    assert [one["question"] for one in document["answers"]] == ["What?", "And then?"]
    for one in document["answers"]:
        assert set(one) == {"question", "answer", "num_tokens", "finish_reason", "evidence", "ms"}
        assert (one["answer"], one["num_tokens"], one["finish_reason"]) == (TEXT, len(TOKENS), "stop")
        assert one["evidence"] == [{"frame": 2, "time_s": 1.5, "share": 1.0}]
    assert set(document["trip"]["ms"]) == SUMMARY_MS and document["trip"]["visual_tokens_retrieved"] == 16
    assert document["model"] == "tiny" and document["sparsity"] == {"prune_keep": 0.25, "retrieve_keep": 0.1}
    first, second = served[0].of("Ask")
    assert first.sampling.seed == 7 and first.retrieval.keep == 0.2 and second.conversation_id == "c1"
    assert served[0].of("PrepareMedia")[0].max_frames == 8 and served[0].of("CloseConversation")


def test_asking_prints_turns_and_the_trip(run):
    code, out, err = run("ask", "clip.mp4", "What?", "And then?")
    assert (code, err) == (0, "")
    assert out.count(f"A: {TEXT}\n   looked at 1.5 s (100%); 9 tokens in 2 ms") == 2
    line = f'10 frames -> 640 visual tokens -> 160 kept -> 0.001 MB KV -> 2 ms wire -> 16 packed -> "{TEXT}"'
    assert out.splitlines()[-1] == line


def test_prepared_media_are_asked_about_by_their_id(run, served):
    code, out, _ = run("ask", MEDIA_ID, "What?", "--json")
    assert code == 0 and json.loads(out)["trip"]["num_frames"] == 10
    assert served[0].of("GetMedia")[0].media_id == served[0].of("Ask")[0].media_id == MEDIA_ID
    assert not served[0].of("PrepareMedia") and not served[0].uploads
    code, _, err = run("ask", MEDIA_ID, "What?", "--fps", "1")
    assert code == 2 and "fps cannot be chosen any more" in err


def test_preparing_prints_ids_and_trips(run, served):
    code, out, err = run("prepare", "clip.mp4", "cup.png", "--prune-keep", "0.5")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == lines[2] == MEDIA_ID
    assert lines[1] == "   clip.mp4: 10 frames -> 640 visual tokens -> 160 kept -> 0.001 MB KV -> 2 ms wire"
    assert [len(request.sources) for request in served[0].of("PrepareMedia")] == [1, 1]
    code, out, _ = run("prepare", "clip.mp4", "cup.png", "--together", "--json")
    (media,) = json.loads(out)["media"]
    assert code == 0 and media["files"] == ["clip.mp4", "cup.png"] and media["media_id"] == MEDIA_ID
    assert media["reused"] is False and set(media["trip"]["ms"]) == SUMMARY_MS
    assert len(served[0].of("PrepareMedia")[-1].sources) == 2


def test_information_is_tables_or_one_document(run, served):
    served[0].details = json.dumps(DETAILS)
    code, out, err = run("info", "--json")
    assert (code, err) == (0, "") and json.loads(out)["details"] == DETAILS
    code, out, err = run("info")
    assert (code, err) == (0, "")
    told = ("model tiny", "prefill workers (1)", "decode workers (2)", "12.3 MB", "prefill-0", "lanes (0): none", "12.35")
    for text in (*told, MEDIA_ID, "decode-0, decode-1", "yes", "no", "[red]"):
        assert text in out, text


@pytest.mark.parametrize("details", ["", "{}", "[1, 2]", "null", '{"pools": [1]}', '{"pools": {"decode": "none"}}', '{"a": [{}]}'])
def test_information_of_any_shape_is_shown(run, served, details):
    served[0].details = details
    code, out, err = run("info")
    assert (code, err) == (0, "") and "model tiny" in out


def test_the_key_comes_from_the_environment_unless_it_is_typed(run, served, monkeypatch):
    run("info")
    assert "authorization" not in served[0].metadata
    monkeypatch.setenv(KEY_VARIABLE, "from-outside")
    run("info")
    assert served[0].metadata["authorization"] == "Bearer from-outside"
    run("info", "--api-key", "typed")
    assert served[0].metadata["authorization"] == "Bearer typed"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("ask", "clip.mp4"), "QUESTION"),
        (("ask", "missing.mp4", "q"), "'missing.mp4'"),
        (("ask", "clip.mp4", " "), "non-empty"),
        (("ask", "clip.mp4", "\udcff"), "UTF-8"),
        (("ask", "clip.mp4", "q", "--top-p", "2"), "top_p must be in (0, 1], got 2.0"),
        (("ask", "clip.mp4", "q", "--retrieve-keep", "2"), "--retrieve-keep: must be in (0, 1], got '2'"),
        (("ask", "clip.mp4", "q", "--model", "demo"), "--model"),
        (("prepare", "clip.mp4", "--prune-keep", "0"), "prune_keep must be in (0, 1], got 0.0"),
        (("prepare", "clip.mp4", "--fps", "-1"), "fps"),
        (("info", "--target", "nowhere"), "target must be host:port, got 'nowhere'"),
        (("info", "--target", "a:1,,b:2"), "target 2 of 'a:1,,b:2' must be host:port, got ''"),
        (("info", "--timeout-s", "0"), "deadline_s must be a number > 0"),
        (("info", "--tls", "missing.pem"), "'missing.pem'"),
        (("info", "--tls-key", "key.pem"), "need --tls"),
        (("info", "--tls", "--tls-key", "key.pem"), "go together"),
        ((), "ACTION"),
    ],
)
def test_a_mistake_is_told_in_one_line(run, served, words, told):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and told in err
    assert not served[0].of("Ask") and not served[0].of("PrepareMedia")


@pytest.mark.parametrize(
    ("error", "code", "lead"),
    [
        (NotFound("media is unknown"), 2, "error"),
        (Unauthenticated("who are you"), 2, "error"),
        (QueueFull("full"), 1, "error"),
        (Unavailable("no decode worker"), 1, "error"),
        (Internal("KeyError"), 1, "internal error"),
    ],
    ids=repr,
)
def test_the_servers_errors_are_told_with_their_exit_code(run, served, monkeypatch, error, code, lead):
    monkeypatch.setattr(call_errors, "RETRY_FOR_S", 0)
    monkeypatch.setattr(call_errors, "MAX_REFUSALS", 0)
    served[0].script["Ask"] = [error]
    found, out, err = run("ask", "clip.mp4", "q", "--json")
    assert (found, out) == (code, "") and err.startswith(f"{lead}: 127.0.0.1:{served[1]}: {error}") and err.count("\n") == 1


def test_no_client_command_imports_a_tensor_library(served, tmp_path):
    served[0].details = json.dumps(DETAILS)
    (tmp_path / "clip.mp4").write_bytes(b"clip")
    code = (
        "import sys; from sparsevila_cluster.cli.main import main\n"
        "for words in ('ask clip.mp4 q', 'ask clip.mp4 q --json', 'prepare clip.mp4', 'info', 'info --json', '--help'):\n"
        "    assert main(['client', *words.split(), *(sys.argv[1:] if words != '--help' else ())]) == 0, words\n"
        "heavy = {'torch', 'numpy', 'ray', 'av', 'transformers', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}", "--target", f"127.0.0.1:{served[1]}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
