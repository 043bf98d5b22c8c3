"""Opening media in a sandbox, and in a thread."""

from __future__ import annotations

import threading

from PIL import Image

from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.media import DecoderSandbox, Media, open_media
from tests.media.media_files import picture_bytes

PICTURE = picture_bytes(Image.new("RGB", (8, 6), (1, 2, 3)))


def show(sandbox: DecoderSandbox, data=PICTURE, **limits) -> Media:
    return open_media(MediaSource(data), fps=2.0, max_frames=64, limits=MediaLimits(**limits), sandbox=sandbox)


def in_thread(call) -> tuple[threading.Thread, list]:
    """The thread, and a list that will hold what the call returned or raised."""
    outcome: list = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome
