"""AutoAWQ 0.2.9 as a second engine, in an environment of its own: created on request, run as a process with a deadline.

AutoAWQ is archived and names no upper bounds: beside the transformers of this package it installs and then fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from sparsevila_cluster.core.errors import BadRequest, DeadlineExceeded, Unavailable
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.loading.originals import LINEARS, Vocabulary
from sparsevila_cluster.quantization.calibration import Report, token_ids
from sparsevila_cluster.quantization.checkpoint_writer import copy_other_files
from sparsevila_cluster.quantization.job import Outcome
from sparsevila_cluster.quantization.layer_quantizer import choose_group_size
from sparsevila_cluster.quantization.materials import Material
from sparsevila_cluster.quantization.work_dir import check_target, open_scratch

PINS = (("torch==2.13.0",), ("transformers==4.51.3", "datasets>=4,<5", "accelerate==1.15.0", "autoawq==0.2.9"))
"""What is installed, in this order: torch on its own, as anything that asks for it may bring another one."""

READY = "sparsevila-ready.json"
INSTALL_TIMEOUT_S = 3600.0
_KILL_AFTER_S = 5.0
_SHOWN_LINES = 8
# A line of its progress bar: "AWQ:  50%|#####     | 1/2 [00:03<00:03,  3.2s/it]".
_BAR = re.compile(r"AWQ:.*?(\d+)/(\d+)")
_LAYER = re.compile(r"(^|\.)layers\.\d+\.(" + "|".join(map(re.escape, LINEARS)) + r")\.weight$")


def default_env() -> Path:
    """In the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sparsevila" / "autoawq-0.2.9"


def find_env(directory: str | None, create: bool, report: Report = lambda *_: None) -> Path:
    """The environment's directory; `create`: made first, if it is not there.

    Raises:
        BadRequest: it is not there, or `directory` holds something else. Unavailable: it cannot be installed.
    """
    env = Path(directory) if directory else default_env()
    if (env / READY).is_file():
        return env
    if not create:
        told = f" --env {directory}" if directory else ""
        raise BadRequest(
            f"AutoAWQ's environment is not at {str(env)!r}; --create-env{told} installs it (torch, transformers, autoawq)"
        )
    if env.exists() and any(env.iterdir()) and not (env / "pyvenv.cfg").is_file():
        raise BadRequest(f"{str(env)!r} holds something that is no environment of Python; name another directory with --env")
    if env.exists():
        shutil.rmtree(env)
    env.parent.mkdir(parents=True, exist_ok=True)
    steps = [[sys.executable, "-m", "venv", str(env)]]
    steps += [[str(python_of(env)), "-m", "pip", "install", "--no-input", *pins] for pins in PINS]
    deadline_s = time.monotonic() + INSTALL_TIMEOUT_S
    for number, step in enumerate(steps):
        report("install AutoAWQ", number, len(steps))
        run_process(step, deadline_s - time.monotonic(), "the installation of AutoAWQ")
    report("install AutoAWQ", len(steps), len(steps))
    (env / READY).write_text(json.dumps({"pins": [pin for pins in PINS for pin in pins]}))
    return env


def python_of(env: Path) -> Path:
    """Its interpreter."""
    return env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run_autoawq(
    env: Path,
    source: Path,
    target: Path,
    vocabulary: Vocabulary,
    materials: Sequence[Material],
    *,
    group_size: int | None,
    clip: bool,
    text_tokens: int,
    deadline_s: float,
    restart: bool = False,
    report: Report = lambda *_: None,
) -> Outcome:
    """Let AutoAWQ quantize `source` to the new directory `target`, on the text of `materials`. It cannot be gone on with.

    Raises:
        BadCheckpoint, BadRequest: as for our own engine. DeadlineExceeded: it took longer than `deadline_s` seconds. Unavailable:
            it failed; the message holds its last lines.
    """
    start_s = time.monotonic()
    check_target(target)
    files = Checkpoint.open(source)
    shapes = {name: shard.shapes[name] for shard in files.shards.values() for name in shard.shapes if _LAYER.search(name)}
    group_size = choose_group_size(shapes, group_size)
    pieces = _pieces([token_ids(vocabulary, material) for material in materials], text_tokens)
    request = {
        "source": str(source.absolute()),
        "ids": pieces,
        "group_size": group_size,
        "clip": clip,
        # It joins all samples and cuts them into blocks of this length.
        "length": max(map(len, pieces)),
    }
    with open_scratch(target, {"engine": "autoawq", **request}, restart) as scratch:
        shutil.rmtree(scratch.whole, ignore_errors=True)
        path = scratch.directory / "request.json"
        path.write_text(json.dumps({**request, "target": str(scratch.whole)}))
        script = Path(__file__).with_name("autoawq_script.py")
        run_process([str(python_of(env)), str(script), str(path)], deadline_s, "AutoAWQ", report)
        copy_other_files(files, scratch.whole)
        made = Checkpoint.open(scratch.whole)
        sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (source, scratch.whole)]
        check_target(target)
        scratch.publish(target)
    num_linears, num_tokens = sum(name.endswith(".qweight") for name in made.file_of), sum(map(len, pieces))
    return Outcome(group_size, num_linears, 0, len(pieces), num_tokens, sizes[0], sizes[1], 0, time.monotonic() - start_s)


def run_process(command: Sequence[str], within_s: float, what: str, report: Report = lambda *_: None) -> None:
    """Run a program to its end, told of its progress bar; it does not outlive this call.

    Raises:
        DeadlineExceeded, Unavailable.
    """
    # Our own packages must not be found by another environment's interpreter.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    said: deque[str] = deque(maxlen=_SHOWN_LINES)
    reader = threading.Thread(target=_follow, args=(process, said, report), daemon=True)
    reader.start()
    try:
        code = process.wait(max(0.0, within_s))
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"{what} took longer than {within_s:.0f} s") from None
    finally:
        _end(process)
        reader.join(_KILL_AFTER_S)
    if code:
        raise Unavailable(f"{what} failed (exit code {code}): {' | '.join(said) or 'it said nothing'}")


def _follow(process: subprocess.Popen[bytes], said: deque[str], report: Report) -> None:
    """Lines end with a newline, or a carriage return where a progress bar is drawn anew."""
    assert process.stdout is not None
    line = b""
    while byte := process.stdout.read(1):
        if byte not in b"\r\n":
            line += byte
            continue
        text, line = line.decode(errors="replace").strip(), b""
        if bar := _BAR.search(text):
            report("layer", int(bar[1]), int(bar[2]))
        elif text:
            said.append(text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process, and what it started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait(_KILL_AFTER_S)


def _pieces(samples: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Samples cut to at most so many tokens."""
    cut = [list(ids[start : start + most]) for ids in samples for start in range(0, len(ids), most)]
    if not cut:
        raise BadRequest("there is no text to calibrate on; AutoAWQ sees only text")
    return cut
