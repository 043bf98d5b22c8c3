"""The whole cluster, as `sparsevila serve` starts it with nothing given but ports: asked over gRPC, hurt, ended by a signal."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest

from sparsevila_cluster.api.video_qa import VideoQA
from sparsevila_cluster.client import Client
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.demo.drawing import write_mp4
from sparsevila_cluster.demo.questions import make_questions
from sparsevila_cluster.demo.scene_drawing import make_video
from sparsevila_cluster.pb import video_qa_pb2 as pb
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAStub
from tests.cluster.serve_process import START_S, ServeProcess
from tests.structure import ROOT

pytestmark = pytest.mark.slow
NUM_TURNS = 3


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """[(path, questions)] of two videos."""
    folder, films = tmp_path_factory.mktemp("films"), []
    for seed in (1, 2):
        scene, frames = make_video(seed)
        path = folder / f"{seed}.mp4"
        write_mp4(frames, path)
        films.append((path, [question.text for question in make_questions(scene, np.random.default_rng(seed), NUM_TURNS)]))
    return films


@pytest.fixture(scope="module")
def right(films):
    """What one process answers."""
    with VideoQA(config=EngineConfig(device="cpu")) as qa:
        answers = []
        for path, questions in films:
            chat = qa.conversation(qa.prepare(path))
            answers.append([chat.ask(question).token_ids for question in questions])
    return answers


@pytest.fixture(scope="module")
def metrics_port():
    """Below those that the system gives to whoever asks for any: other tests do so meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@pytest.fixture(scope="module")
def served(tmp_path_factory, metrics_port):
    folder = tmp_path_factory.mktemp("served")
    (folder / "cluster.yaml").write_text(f"metrics_port: {metrics_port}\n")
    served = ServeProcess(folder, "--config", "cluster.yaml", "--port", "0")
    try:
        served.wait()
        yield served
    finally:
        served.kill()


@pytest.fixture
def client(served):
    with Client.connect(served.target) as client:
        yield client


def num_prefills(client):
    return sum(worker["info"]["prefills"] for worker in client.info()["details"]["pools"]["prefill"])


def test_answers_are_those_of_one_process_and_later_turns_prefill_nothing(client, films, right):
    before = num_prefills(client)
    told, errors = {}, []

    def converse(i):
        try:
            path, questions = films[i]
            chat = client.conversation(client.prepare(path))
            told[i] = [chat.ask(question).token_ids for question in questions]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=converse, args=(i,)) for i in range(len(films))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and [told[i] for i in range(len(films))] == right
    assert num_prefills(client) - before == len(films)


def test_a_second_client_of_the_same_video_costs_no_prefill(served, client, films):
    path, questions = films[0]
    client.prepare(path)
    before = num_prefills(client)
    with Client.connect(served.target) as other:
        media = other.prepare(path)
        assert media.reused
        chat = other.conversation(media)
        told = ["".join(chat.stream(question)) for question in questions]
        assert told == [other_chat_text(client, path, questions, i) for i in range(NUM_TURNS)]
    assert num_prefills(client) == before


def test_unary_answers_are_the_same(served, client, films, right):
    (path, questions), answers = films[1], right[1]
    media_id, conversation_id, told = client.prepare(path).media_id, "", []
    with grpc.insecure_channel(served.target) as channel:
        for question in questions:
            request = pb.AskRequest(media_id=media_id, conversation_id=conversation_id, question=question)
            reply = VideoQAStub(channel).Answer(request, timeout=60)
            conversation_id = reply.conversation_id
            told.append(tuple(reply.token_ids))
    assert told == [tuple(answer) for answer in answers]


def other_chat_text(client, path, questions, turn):
    chat = client.conversation(client.prepare(path))
    return [chat.ask(question).text for question in questions[: turn + 1]][-1]


def test_info_tells_pools_residents_and_lanes(client, films):
    media = client.prepare(films[0][0])
    info = client.info()["details"]
    assert (len(info["pools"]["prefill"]), len(info["pools"]["decode"])) == (1, 2)
    (entry,) = [entry for entry in info["media"] if entry["media_id"] == media.media_id]
    assert entry["holders"] and entry["copies"] == [info["pools"]["prefill"][0]["worker"]]
    assert info["lanes"]


def test_a_killed_decode_worker_is_made_up_for_without_another_prefill(served, client, films, right):
    media = [client.prepare(path) for path, _ in films]
    chats = [client.conversation(one) for one in media]
    assert [chat.ask(questions[0]).token_ids for chat, (_, questions) in zip(chats, films, strict=True)] == [a[0] for a in right]
    before, replicas = num_prefills(client), served.replicas()["Decode"]
    os.kill(replicas[0], signal.SIGKILL)
    start_s = time.monotonic()
    for turn in range(1, NUM_TURNS):
        for chat, (_, questions), answers in zip(chats, films, right, strict=True):
            assert chat.ask(questions[turn], timeout_s=60).token_ids == answers[turn]
    print(f"both conversations went on; their next turns were over {time.monotonic() - start_s:.2f} s after the kill")
    assert num_prefills(client) == before
    until_s = time.monotonic() + 120
    while len([process for process in served.replicas()["Decode"] if process != replicas[0]]) < 2:
        assert time.monotonic() < until_s, served.replicas()
        time.sleep(0.2)


def connections(served):
    """{process: connections of clients} of the routers."""
    port = served.target.rpartition(":")[2]
    command = ["ss", "-Htnp", "state", "established", f"sport = :{port}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {process: done.stdout.count(f"pid={process},") for process in served.replicas()["Router"]}


def test_a_killed_router_is_no_error_to_anybody(served, films, right):
    stop, told, errors, num_uploads = threading.Event(), [], [], []
    port = served.target.rpartition(":")[2]

    def until_stopped(work, target):
        try:
            with Client.connect(target, timeout_s=60) as client:
                while not stop.is_set():
                    work(client)
        except Exception as error:
            errors.append(error)

    def converse(client):
        for (path, questions), answers in zip(films, right, strict=True):
            chat = client.conversation(client.prepare(path))
            for turn, question in enumerate(questions):
                "".join(chat.stream(question))
                told.append((chat.turns[turn][1].token_ids, answers[turn]))
            chat.close()

    def send(client):
        assert client.prepare(client.upload(films[0][0])).reused
        num_uploads.append(1)

    # The second target is the first one by another name: a connection of its own, maybe to another router.
    jobs = [(converse, served.target), (converse, f"{served.target},localhost:{port}"), (send, served.target)]
    threads = [threading.Thread(target=until_stopped, args=job) for job in [*jobs, *jobs[:2]]]
    for thread in threads:
        thread.start()
    try:
        until_s = time.monotonic() + 60
        while len(told) < 4 or not num_uploads or sum(connections(served).values()) < 5:
            assert time.monotonic() < until_s and not errors, (errors, connections(served))
            time.sleep(0.05)
        busy = connections(served)
        killed = max(busy, key=busy.get)
        assert len(busy) == 2 and busy[killed] >= 2
        os.kill(killed, signal.SIGKILL)
        killed_s, enough = time.monotonic(), (len(told) + 12, len(num_uploads) + 3)
        with Client.connect(served.target) as client:
            client.info()
        outage_s = time.monotonic() - killed_s
        assert outage_s < 5
        while len(told) < enough[0] or len(num_uploads) < enough[1]:
            assert time.monotonic() < killed_s + 60 and not errors, errors
            time.sleep(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not errors and all(got == wanted for got, wanted in told)
    while killed in (now := served.replicas()["Router"]) or len(now) < 2:
        assert time.monotonic() < killed_s + 120, now
        time.sleep(0.2)
    seconds = time.monotonic() - killed_s
    print(f"{len(told)} answers; a new client was answered after {outage_s:.2f} s, two routers were there after {seconds:.1f} s")


def test_prometheus_finds_our_families(served, client, films, metrics_port):
    for path, questions in films:
        client.ask(client.prepare(path), questions[0])
    wanted = {
        "requests_total": "Router",
        "request_ttft_seconds": "Router",
        "prefills_total": "Prefill",
        "kv_transfer_bytes_total": "Prefill",
        "tokens_total": "Decode",
        "kv_bytes": "Decode",
        "turns_running": "Decode",
    }
    until_s = time.monotonic() + 60  # Ray hands numbers on every few seconds
    while wanted:
        assert time.monotonic() < until_s, f"missing: {wanted}"
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_sparsevila_")]
        found = {name for name, who in wanted.items() for line in lines if f"sparsevila_{name}" in line and f'"{who}"' in line}
        wanted = {name: who for name, who in wanted.items() if name not in found}
        time.sleep(0.5)


def test_what_clients_send_is_nobody_elses_to_read(served, films):
    """Ray opens the folder that it is given to everybody."""
    before = set(Path("/tmp").glob("sv-*/spool/*/*"))
    with grpc.insecure_channel(served.target) as channel:
        VideoQAStub(channel).UploadMedia(iter([pb.MediaChunk(data=films[0][0].read_bytes(), kind="video")]), timeout=60)
    kept = set(Path("/tmp").glob("sv-*/spool/*/*")) - before
    assert kept
    for path in kept:
        modes = [one.lstat().st_mode & 0o777 for one in (path, path.parent, path.parents[1], path.parents[2])]
        assert modes == [0o600, 0o700, 0o700, 0o700], path


def test_nothing_listens_on_other_interfaces(served):
    done = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True)
    processes = [process for kind in served.replicas().values() for process in kind]
    ours = [line.split()[3] for line in done.stdout.splitlines() if any(f"pid={process}," in line for process in processes)]
    assert len(ours) > len(processes)
    assert not [address for address in ours if not address.startswith(("127.0.0.1:", "[::ffff:127.0.0.1]:"))]


def test_a_taken_port_and_a_bad_configuration_are_one_line(served, tmp_path):
    (tmp_path / "bad.yaml").write_text("decode: {replica: 2}\n")
    (tmp_path / "gone.yaml").write_text("engine: {model: /nowhere}\n")
    port = served.target.rpartition(":")[2]
    for options, code, told in (
        (["--port", port], 1, f"error: cannot listen on 127.0.0.1:{port}"),
        (["--config", str(tmp_path / "bad.yaml")], 2, "error: unknown config key 'decode.replica'"),
        (["--config", str(tmp_path / "gone.yaml"), "--port", "0"], 2, "error: "),
        (["--port", "70000"], 2, "error: door.port"),
    ):
        command = [sys.executable, "-m", "sparsevila_cluster", "serve", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done
        assert done.stdout == "" and done.stderr.startswith(told) and done.stderr.count("\n") == 1


def test_a_signal_ends_it_and_leaves_nothing(served, films, right):
    with Client.connect(served.target) as client:
        chat = client.conversation(client.prepare(films[0][0]))
        assert chat.ask(films[0][1][0]).token_ids == right[0][0]
    start_s = time.monotonic()
    assert served.stop(signal.SIGTERM) == 0, served.log.read_text()
    print(f"ended {time.monotonic() - start_s:.1f} s after SIGTERM")
    told = [line for line in served.log.read_text().splitlines() if "network_util.cc" not in line]  # Ray without a network
    assert told == []
    deadline_s = time.monotonic() + 10
    while served.left() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert served.left() == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(served.target.rpartition(":")[2]))) != 0


def test_what_a_worker_cannot_start_from_is_told_at_once(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "cluster.yaml").write_text(f"engine: {{model: {model}}}\n")
    command = [sys.executable, "-m", "sparsevila_cluster", "serve", "--config", "cluster.yaml", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=START_S)
    told = [line for line in done.stderr.splitlines() if "network_util.cc" not in line]
    assert done.returncode == 2 and done.stdout == "", done
    assert len(told) == 1 and told[0].startswith(f"error: '{model}' has no model.safetensors"), told
