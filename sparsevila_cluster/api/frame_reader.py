"""The frames of prepared media, decoded once more from their sources: for pictures, after the engine has dropped them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.errors import BadMedia
from sparsevila_cluster.core.requests import MediaOrigin, MediaSource, PrepareRequest
from sparsevila_cluster.media import DecoderSandbox, Media, open_media


def record_origin(request: PrepareRequest, config: EngineConfig) -> MediaOrigin:
    """What an engine with this configuration decodes for `request`. Call it before preparing: a later change then shows."""
    sources = tuple(_absolute(source) for source in request.sources)
    return MediaOrigin(
        sources=sources,
        fps=config.fps if request.fps is None else request.fps,
        max_frames=config.max_frames if request.max_frames is None else request.max_frames,
        limits=config.limits,
        stamps=tuple(_stamp(source) for source in sources),
    )


def read_frames_again(origin: MediaOrigin) -> list[Media]:
    """The same media as when they were prepared, in their order.

    Raises:
        BadMedia: a source is gone, has changed since, or does not decode. TooLarge, DeadlineExceeded: as `open_media`.
    """
    for source, stamp in zip(origin.sources, origin.stamps, strict=True):
        now = _stamp(source)
        if now is not None and now != stamp:
            raise BadMedia(f"{source.data!r} has changed since it was prepared; prepare it and ask again")
    with DecoderSandbox() as sandbox:  # one process for all of them
        sampled = partial(open_media, fps=origin.fps, max_frames=origin.max_frames, limits=origin.limits, sandbox=sandbox)
        return [sampled(source) for source in origin.sources]


def source_names(origin: MediaOrigin) -> list[str]:
    """A short name for each source: its file's, or `media` for what has none."""
    return [Path(path).name if (path := _path(source)) else "media" for source in origin.sources]


def _path(source: MediaSource) -> str | None:
    is_path = isinstance(source.data, str) and source.data[:5].lower() != "data:"
    return str(source.data) if is_path else None


def _absolute(source: MediaSource) -> MediaSource:
    """The working directory may be another one when the frames are wanted again."""
    path = _path(source)
    return source if path is None else MediaSource(os.path.abspath(path), source.kind)


def _stamp(source: MediaSource) -> tuple[int, int] | None:
    path = _path(source)
    try:
        found = os.stat(path) if path else None
    except (OSError, ValueError):  # gone, or no path at all: decoding will say so
        return None
    return (found.st_size, found.st_mtime_ns) if found else None
