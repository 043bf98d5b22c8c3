"""How much memory a long video takes, from a file on disk to its media prefix. `python -m benchmarks.longvideo`.

    parent: writes the video, starts one fresh process per case        child: VideoQA.prepare(file), and what it took at most

A case is measured in a process of its own, because memory that one case returns the next one would not need to ask for. The mark
counts everything resident: weights, interpreter, libraries, and pages of files that are mapped. Processes that do the decoding are
added with the most that they ever held, although they hold it at another time, and share the frames.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib import machine
from benchmarks.lib.midsize_checkpoint import FPS, Recipe, default_cache, make_checkpoint
from benchmarks.lib.report import Report, progress

FRAMES = 512
WHOLE = 10**9  # a chunk that takes any prefix in one pass
STAGE = "long video"
TITLE = "A long video, from its file to a media prefix: the most memory ever resident, GiB"
HEAD = ("frames", "pixels", "variant", "chunk", "visual tokens", "kept", "KV MB", "peak GiB", "loading", "decode", "encode",
        "prefill", "other processes", "encode s", "prefill s")  # fmt: skip
_LONG_S = 3600.0
_GIB = 2**30


@dataclass(frozen=True)
class Case:
    """chunk: rows per pass through the text model; None is the engine's default."""

    variant: str
    width: int
    height: int
    frames: int = FRAMES
    chunk: int | None = None


def cases(frames: int = FRAMES, side: int = Recipe.frame_px) -> tuple[Case, ...]:
    """At the size that the checkpoint takes as it is, in chunks and at once; and a larger picture, four times the tokens."""
    usual = [Case(variant, side, side, frames, chunk) for variant, chunk in (("sparse", None), ("dense", None), ("dense", WHOLE))]
    return (*usual, Case("sparse", 640, 360, frames))


def figure(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The highest peak of sparse and dense, in chunks, with frames of the checkpoint's size; absent if one is missing."""
    usual = [row for row in rows if row.get("stage") == STAGE and row["frames"] == FRAMES and row["width"] == row["height"]]
    found = {row["variant"]: row["peak_gib"] for row in usual if row["chunk"] < WHOLE}
    return {"prefill_512f_peak_gib": max(found.values())} if {"sparse", "dense"} <= set(found) else {}


def measure(
    directory: Path, todo: Sequence[Case], threads: int, say: Callable[[str], None], tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row per case that came to an end. `tell` hears why another did not."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in todo:
            say(f"{STAGE}: {case.frames} frames of {case.width} x {case.height}, {case.variant}")
            video = Path(folder) / f"{case.width}x{case.height}x{case.frames}.mp4"
            if not video.exists():
                write_video(video, case.frames, case.width, case.height)
            checkpoint = taking_pixels(directory, Path(folder), case.width * case.height)
            command = [sys.executable, "-m", "benchmarks.longvideo", "--case", json.dumps(asdict(case)), "--video", str(video)]
            command += ["--model", str(checkpoint), "--threads", str(threads)]
            try:
                done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=_LONG_S)
            except subprocess.TimeoutExpired:
                tell(f"{STAGE}, {case}: not done within {_LONG_S:g} s")
                continue
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
                tell(f"{STAGE}, {case}: {last}")
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Lines under HEAD."""
    body = []
    for row in rows:
        peaks, ms = row["peaks_gib"], row["ms_by_stage"]
        body.append(
            [row["frames"], f"{row['width']} x {row['height']}", row["variant"], "all" if row["chunk"] == WHOLE else row["chunk"]]
            + [row["visual_tokens"], row["kept"], row["prefix_bytes"] / 1e6, row["peak_gib"]]
            + [*(peaks[stage] for stage in ("load", "decode", "encode", "prefill")), row["children_gib"]]
            + [ms["encode"] / 1e3, ms["prefill"] / 1e3]
        )
    return body


def write_video(path: Path, frames: int, width: int, height: int) -> None:
    """A texture that drifts and changes its light, two frames per second: something to see in every frame."""
    import av
    import numpy as np

    texture = np.random.default_rng(0).integers(0, 160, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    texture = texture.repeat(4, 0).repeat(4, 1)[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(FPS), options={"preset": "ultrafast", "crf": "28"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            picture = np.roll(texture, 6 * i, 1) + np.uint8(i % 90)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def taking_pixels(directory: Path, folder: Path, num_pixels: int) -> Path:
    """The checkpoint, or one of the same weights that does not shrink frames of so many pixels."""
    name = "processor_config.json"
    processor = json.loads((directory / name).read_text())
    if processor["video_processor"]["size"]["longest_edge"] >= num_pixels:
        return directory
    larger = folder / f"model-{num_pixels}"
    if not larger.exists():
        larger.mkdir()
        for path in directory.iterdir():
            if path.name != name:
                (larger / path.name).symlink_to(path.resolve())
        processor["video_processor"]["size"]["longest_edge"] = num_pixels
        (larger / name).write_text(json.dumps(processor))
    return larger


# ---- in the child --------------------------------------------------------------------------------------------------------------


class StagePeaks:
    """The most memory resident during each stage. Where a process may not reset its own mark: during all up to it."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.children_bytes = 0
        self._stage = "load"

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A progress callback."""
        if stage != self._stage:
            self.end()
            self._stage = stage

    def end(self) -> None:
        self.bytes[self._stage] = max(self.bytes.get(self._stage, 0), machine.peak_rss_bytes())
        self.children_bytes = max(self.children_bytes, machine.peak_rss_of_children_bytes())
        machine.reset_peak_rss()

    @property
    def gib(self) -> dict[str, float]:
        return {stage: round(num / _GIB, 3) for stage, num in self.bytes.items()}


def prepare(case: Case, directory: Path, video: Path) -> dict[str, Any]:
    """The row of one case, measured in this process."""
    from benchmarks.lib.engine_pair import VARIANTS
    from sparsevila_cluster.api.video_qa import VideoQA

    peaks = StagePeaks()
    fields: dict[str, Any] = {} if case.chunk is None else {"prefill_chunk": case.chunk}
    with VideoQA(directory, max_frames=case.frames, prepare_timeout_s=_LONG_S, **VARIANTS[case.variant], **fields) as qa:
        start_s = time.perf_counter()
        handle = qa.prepare(video, progress=peaks)
        seconds = time.perf_counter() - start_s
        peaks.end()
        return {
            **asdict(case),
            "model": "mid-size",
            "stage": STAGE,
            "chunk": qa.config.prefill_chunk,
            "visual_tokens": handle.visual_tokens,
            "kept": handle.visual_tokens_kept,
            "prefix_bytes": handle.kv_bytes,
            "peak_gib": round((max(peaks.bytes.values()) + peaks.children_bytes) / _GIB, 3),
            "peaks_gib": peaks.gib,
            "children_gib": round(peaks.children_bytes / _GIB, 3),
            "prepare_s": round(seconds, 2),
            "ms_by_stage": handle.ms,
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.longvideo", description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"of each video (default {FRAMES})")
    parser.add_argument("--threads", type=int, default=machine.physical_cores(), help="of torch (default: physical cores)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the mid-size checkpoint is kept (630 MB)")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--video", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.case:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(prepare(Case(**json.loads(options.case)), options.model, options.video)))
        return
    report = Report("longvideo", {**machine.card(), "threads": options.threads}, quiet=options.json)
    report.show_card()
    with progress() as say:
        directory = make_checkpoint(options.cache)
        report.rows = measure(directory, cases(options.frames), options.threads, say, report.say)
    report.show_table(TITLE, HEAD, table(report.rows))
    report.figures = figure(report.rows)
    report.finish(options.save)


if __name__ == "__main__":
    main()
