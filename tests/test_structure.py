"""The tree obeys the house rules of structure.py, and every rule bites: each is fed a source that breaks it."""

import importlib
import subprocess
import sys

import pytest

from tests import structure

OURS = structure.OURS
KNOWS = '"""A thing. Knows: this. Does not know: that."""\n'


@pytest.mark.parametrize("path", structure.our_files())
def test_every_file_obeys(path):
    found = structure.complaints(path, (structure.ROOT / path).read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        # floors: up, across, from the side, without a floor
        ("errors", "from sparsevila_cluster.kvcache.arena import Arena"),
        ("kv", "from sparsevila_cluster.engine.scheduler import Scheduler"),
        ("pipeline", "import sparsevila_cluster.cli.main"),
        ("pipeline", "from sparsevila_cluster import cluster"),
        ("pipeline", "from . import cli"),
        ("pipeline", "def f():\n    from sparsevila_cluster.gateway.doors import door"),
        ("pipeline", "import importlib\nx = importlib.import_module('sparsevila_cluster.demo.world')"),
        ("models/lean", "from ..pipeline import Pipeline"),
        ("cluster/routing/router", "from sparsevila_cluster.gateway.doors import door"),
        ("gateway/doors", "from sparsevila_cluster.cluster.routing.router import Router"),
        ("client", "from sparsevila_cluster.kvcache.arena import Arena"),
        ("pipeline", "from sparsevila_cluster.client import Client"),
        ("demo/show", "from sparsevila_cluster.cli.main import main"),
        ("pipeline", "from sparsevila_cluster import VideoQA"),
        ("attic", "import os"),
        # floor 1: who sees whom
        ("pruning/policies", "from sparsevila_cluster.retrieval.policies import num_retrieved"),
        ("retrieval/policies", "from sparsevila_cluster.pruning.policies import num_kept"),
        ("pruning/policies", "from sparsevila_cluster.models.adapter import Family"),
        ("models/hf", "from sparsevila_cluster.engine.sampling import Sampler"),
        ("kv", "from sparsevila_cluster.media import Media"),
        ("media", "import sparsevila_kernels"),
        ("wire", "from sparsevila_cluster.transport import gloo"),
        # doors to the outside
        ("pipeline", "import ray"),
        ("gateway/doors", "from ray import serve"),
        ("cluster/routing/router", "import grpc.aio"),
        ("cluster/routing/router", "from fastapi import FastAPI"),
        ("prefill_engine", "import torch.distributed as dist"),
        ("prefill_engine", "from torch import distributed"),
        ("prefill_engine", "import torch\ndef f():\n    torch.distributed.barrier()"),
        ("pipeline", "from transformers import AutoModel"),
        ("detokenize", "import tokenizers"),
        ("conversation", "import jinja2"),
        ("models/hf", "import av"),
        ("models/hf", "import torchvision"),
        ("wire", "import pickle"),
        ("config", "import torch"),
        ("scheduler", "import torch"),
        ("client", "import numpy as np"),
        # importing does nothing
        ("pruning/__init__", "TABLE = {}"),
        ("pruning/__init__", "def f(): ..."),
        ("__init__", "import torch\n_x = torch.zeros(1)"),
        ("__init__", "class A: ..."),
        ("kv", "import logging\nlogging.basicConfig()"),
        ("kv", "import torch\ntorch.backends.x = 1"),
        ("kv", "for x in range(3): ..."),
        # errors at home
        ("kv", "class Full(Exception): ..."),
        ("kv", "class Full(RuntimeError): ..."),
        # words
        ("media", "def load(mm_data): ..."),
        ("pipeline", "class Request: ..."),
        ("kv", "class PromptCache: ..."),
        ("models/hf", "class A:\n    image_features: int = 0"),
        ("transport/gloo", "class A:\n    def f(self):\n        self.transfer_params = 1"),
        ("transport/gloo", "class KVConnector: ..."),
        ("decode_engine", "def tick(): ..."),
        ("pruning/policies", "def f(prune_ratio): ..."),
        ("kv", "def f(n_slots): ..."),
        ("kv", "N_SLOTS = 1"),
        ("kv", "class A:\n    n_slots: int"),
        ("pipeline", "def f(*, timeout=1): ..."),
        # the shape of files
        ("kv", "x = 1\n" * 400),
    ],
)
def test_a_bad_line_is_found(room, line):
    path = f"{OURS}/{room}.py"
    assert not structure.complaints(path, KNOWS) or room == "attic"
    assert len(structure.complaints(path, KNOWS + line)) == 1


@pytest.mark.parametrize("text", ["", '"""Knows everything."""', '"""Two sentences. About nothing."""'])
def test_a_bad_opening_is_found(text):
    assert structure.complaints(f"{OURS}/kv.py", text)


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("config", "from sparsevila_cluster.core.errors import BadConfig"),
        ("retrieval/policies", "from sparsevila_cluster.kvcache.arena import PackedKV\nimport sparsevila_kernels"),
        ("models/hf", "import transformers\nfrom sparsevila_cluster.media import Media\nfrom . import adapter"),
        ("pipeline", "import torch\nfrom sparsevila_cluster.engine.decode_engine import DecodeEngine"),
        ("commands", "from sparsevila_cluster import app, client, demo, errors, heatmap"),
        ("client", "import grpc\nfrom sparsevila_cluster.pb import video_qa_pb2"),
        ("gateway/doors", "import fastapi, grpc\nfrom sparsevila_cluster.engine.local_pipeline import Pipeline"),
        ("__init__", "_LAZY = {'VideoQA': 'video_qa'}\n__all__ = list(_LAZY)\ndef __getattr__(name): ..."),
        ("kv", "def f():\n    timeout = n_rows = 1\n    x.get(timeout=timeout)\n    x.duration = 1"),
        ("cli", "if __name__ == '__main__':\n    main()"),
    ],
)
def test_a_good_line_passes(room, line):
    assert not structure.complaints(f"{OURS}/{room}.py", KNOWS + line)


def test_kernels_import_nothing_of_ours():
    assert structure.complaints("kernels/sparsevila_kernels/pack.py", KNOWS + "from sparsevila_cluster import kv")
    assert not (structure.ROOT / "kernels" / "__init__.py").exists()  # a top-level `kernels` would hide Hugging Face's


def test_every_room_has_one_floor():
    rooms = [room for rooms in structure.FLOORS.values() for room in rooms.split()]
    assert len(rooms) == len(set(rooms))
    assert {*structure.SIDE} | {r for table in structure.NEIGHBOURS.values() for r in table} <= {*rooms, *structure.SIDE}
    assert all(reason.strip() and (structure.ROOT / path).exists() for path, reason in structure.LONG_FILES.items())


def test_a_folder_is_earned():
    assert not list(structure.check_folders(structure.our_files()))
    assert list(structure.check_folders([f"{OURS}/cluster/leases/lease.py"]))


def test_every_error_has_a_status():
    errors = importlib.import_module(f"{OURS}.errors")
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
        if name.split(".")[0] in {"torch", "transformers", "tokenizers", "av", "ray"}:
            raise ImportError(f"{name} is behind the wall")
sys.meta_path.insert(0, Wall())
importlib.import_module(sys.argv[1])
assert not logging.root.handlers, "importing set up logging"
"""


def import_behind_wall(module):
    command = [sys.executable, "-W", "error", "-c", IMPORT_ALONE, module]
    return subprocess.run(command, cwd=structure.ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("room", sorted({*structure.FLOORS[0].split(), *structure.SIDE}))
def test_words_and_client_import_without_torch(room):
    folder = structure.ROOT / OURS
    if not (folder / f"{room}.py").exists() and not (folder / room / "__init__.py").exists():
        pytest.skip(f"{room} is not written")
    done = import_behind_wall(f"{OURS}.{room}")
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stderr


def test_the_wall_stands():
    assert "behind the wall" in import_behind_wall(f"{OURS}.kv").stderr


def test_top_level_holds_only_what_the_layout_names():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=structure.ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert not list(structure.check_top_level([line.strip('"') for line in done.stdout.splitlines()]))
    assert list(structure.check_top_level(["README.md", "notes/todo.md"]))
