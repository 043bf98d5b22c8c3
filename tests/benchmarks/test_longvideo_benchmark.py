"""The memory of a long video: that the benchmark sees it, and that frames and patches are let go. At toy sizes."""

import gc
import mmap
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from benchmarks import engine, longvideo
from benchmarks.lib import machine, stopwatch
from benchmarks.lib.engine_comparison import Plan
from benchmarks.lib.midsize_checkpoint import make_checkpoint
from benchmarks.longvideo import Case
from sparsevila_cluster import VideoQA
from sparsevila_cluster.core.config import EngineConfig, MediaLimits
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.engine.prefill_engine import PrefillEngine
from sparsevila_cluster.media import open_media
from sparsevila_cluster.models import load_model
from tests.benchmarks.test_engine_benchmark import last_line
from tests.benchmarks.toy_checkpoint import TOY

MIB = 2**20


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def toy(cache):
    return make_checkpoint(cache, TOY)


@pytest.fixture(scope="module")
def video(cache):
    path = cache / "long.mp4"
    longvideo.write_video(path, 12, 80, 80)
    return path


def test_the_video_shows_something_new_in_every_frame(video):
    media = open_media(MediaSource(str(video)), fps=2.0, max_frames=64, limits=MediaLimits())
    assert media.frames.shape == (12, 80, 80, 3) and media.duration_s == 6.0
    assert all(np.abs(a.astype(int) - b).mean() > 5 for a, b in zip(media.frames, media.frames[1:], strict=False))


def test_a_case_in_a_process_of_its_own(toy):
    told = []
    todo = [Case("dense", 80, 80, 12, chunk=longvideo.WHOLE), Case("sparse", 160, 80, 12)]
    rows = longvideo.measure(toy, todo, 1, lambda text: None, told.append)
    assert not told and [row["kept"] for row in rows] == [150, 78]
    assert [row["visual_tokens"] for row in rows] == [150, 300], "the larger picture was shrunk"
    assert [row["chunk"] for row in rows] == [longvideo.WHOLE, EngineConfig().prefill_chunk]
    for row in rows:
        assert set(row["peaks_gib"]) == {"load", "decode", "encode", "prune", "prefill"}
        assert 0.1 < row["peak_gib"] == pytest.approx(max(row["peaks_gib"].values()) + row["children_gib"], abs=0.002)
        assert row["peak_gib"] < 2
        assert row["ms_by_stage"]["prefill"] > 0 and row["prepare_s"] > 0
    assert longvideo.figure(rows) == {}, "a figure of other frames than it says"
    assert len(longvideo.table(rows)[0]) == len(longvideo.HEAD) and longvideo.table(rows)[0][3] == "all"


@pytest.mark.parametrize("script, word", [("echo Bad: news >&2; exit 3", "news"), ("exit 9", "with 9"), ("exec sleep 9", "within")])
def test_a_case_that_fails_is_told_and_left_out(toy, tmp_path, monkeypatch, script, word):
    told, python = [], tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(longvideo, "_LONG_S", 0.1 if "sleep" in script else 60.0)
    assert longvideo.measure(toy, [Case("sparse", 16, 16, 2)], 1, lambda text: None, told.append) == []
    assert len(told) == 1 and word in told[0]


def test_the_figure_is_the_worse_of_sparse_and_dense_in_chunks():
    def row(variant, peak_gib, chunk=2048, **changes):
        return {"stage": longvideo.STAGE, "frames": 512, "width": 252, "height": 252, "variant": variant, "chunk": chunk,
                "peak_gib": peak_gib, **changes}  # fmt: skip

    sparse, dense = row("sparse", 2.0), row("dense", 2.5)
    others = [row("dense", 9.0, longvideo.WHOLE), row("sparse", 9.0, width=640, height=360), row("dense", 9.0, frames=64)]
    assert longvideo.figure([sparse, dense, *others]) == {"prefill_512f_peak_gib": 2.5}
    assert longvideo.figure([sparse, *others]) == longvideo.figure([]) == {}
    assert {longvideo.figure(cases_as_rows(row)).get("prefill_512f_peak_gib")} == {1.0}


def cases_as_rows(row):
    """What a full run measures yields the figure."""
    for case in longvideo.cases():
        yield row(case.variant, 1.0, case.chunk or 2048, width=case.width, height=case.height, frames=case.frames)


def test_the_engine_benchmark_measures_it_too(cache, toy, tmp_path, capsys, monkeypatch):
    asked = []
    row = {"stage": longvideo.STAGE, "model": "mid-size", "frames": 512, "width": 80, "height": 80, "visual_tokens": 9, "kept": 3,
           "prefix_bytes": 10, "peak_gib": 1.5, "peaks_gib": dict.fromkeys(("load", "decode", "encode", "prefill"), 1.0),
           "children_gib": 0.5, "chunk": 2048, "ms_by_stage": {"encode": 1.0, "prefill": 2.0}}  # fmt: skip
    monkeypatch.setattr(machine, "measure_ceilings", lambda: machine.Ceilings(10.0, 10.0, 10.0))
    rows = [row | {"variant": variant} for variant in ("sparse", "dense")]
    monkeypatch.setattr(longvideo, "measure", lambda directory, cases, *_: asked.extend(cases) or rows)
    once = stopwatch.Repeats(1, 1)
    plan = Plan((4,), (1,), num_tokens=2, sessions=once, encodes=once, rounds=1, block=1, long_frames=512)
    engine.main(["--cache", str(cache), "--model", str(tmp_path / "none"), "--threads", "1"], (TOY, plan))
    shown = capsys.readouterr().out
    document = last_line(shown)
    assert document["figures"]["prefill_512f_peak_gib"] == 1.5 and longvideo.TITLE in shown
    assert [row["variant"] for row in document["rows"] if row["stage"] == longvideo.STAGE] == ["sparse", "dense"]
    assert tuple(asked) == longvideo.cases(512, TOY.frame_px)
    assert engine.QUICK.long_frames == 0 and Plan().long_frames == longvideo.FRAMES


@pytest.mark.skipif(not machine.reset_peak_rss(), reason="this system keeps no mark that can be reset")
def test_peaks_are_those_of_their_stage():
    peaks = longvideo.StagePeaks()
    peaks("decode", 0, 1)
    with mmap.mmap(-1, 64 * MIB) as block:  # malloc may have such a block left from an earlier test, resident all the time
        for _ in range(64):
            block.write(b"x" * MIB)
    peaks("encode", 0, 1)
    peaks.end()
    assert peaks.bytes["decode"] - peaks.bytes["encode"] > 48 * MIB


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list what is mapped")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_in_memory_once(toy, dtype):
    """A file that stays mapped counts as much as the copies that the decoder made of it."""
    model = load_model(toy, device="cpu", dtype=dtype)
    assert model.weight_bytes and str(toy) not in Path("/proc/self/maps").read_text()


def test_frames_and_patches_are_let_go(toy, video, monkeypatch):
    """When the tower runs, nobody holds the frames; when the text model runs, nobody holds the patches."""
    with VideoQA(toy) as qa:
        family, held, seen = qa.pipeline.model.family, {}, {}
        patchify, encode, load = family.patchify, family.encode, PrefillEngine.load

        def watched_load(self, request):
            medias = load(self, request)
            held["frames"] = [weakref.ref(media.frames) for media in medias]
            return medias

        def watched_patchify(media, alone=True):
            inputs = patchify(media)
            held.setdefault("patches", []).append(weakref.ref(inputs.pixels))
            return inputs

        def alive(name):
            gc.collect()
            return [ref() is not None for ref in held[name]]

        def watched_encode(inputs, **options):
            seen["frames while encoding"] = alive("frames")
            return encode(inputs, **options)

        def progress(stage, done, total):
            if stage == "prefill" and done:
                seen["patches while prefilling"] = alive("patches")

        monkeypatch.setattr(PrefillEngine, "load", watched_load)
        monkeypatch.setattr(family, "patchify", watched_patchify)
        monkeypatch.setattr(family, "encode", watched_encode)
        handle = qa.prepare([video, video], progress=progress)
        assert handle.num_frames == 24
    assert seen == {"frames while encoding": [False, False], "patches while prefilling": [False, False]}


@pytest.mark.skipif(not list(Path("/proc/self/task").glob("*/children")), reason="this system does not list children")
def test_processes_that_were_started_count():
    before = machine.peak_rss_of_children_bytes()
    code = "block = b'x' * (48 << 20); print(len(block), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert machine.peak_rss_of_children_bytes() - before > 48 * MIB
        child.communicate(b"\n", timeout=60)
    assert machine.peak_rss_of_children_bytes() <= before
