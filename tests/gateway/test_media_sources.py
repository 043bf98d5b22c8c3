"""Media as clients name them: what errors tell of the server's files, and what is answered when the spool has no room."""

import asyncio
import builtins
import errno
import os
from contextlib import aclosing

import pytest

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.config import MediaLimits, build_config
from sparsevila_cluster.core.errors import QueueFull, SparseVilaError
from sparsevila_cluster.core.metrics import Tally
from sparsevila_cluster.core.requests import MediaHandle
from sparsevila_cluster.gateway import spool
from sparsevila_cluster.gateway.media_sources import MediaReference, MediaSources
from sparsevila_cluster.gateway.service import VideoQAService
from sparsevila_cluster.gateway.spool import Spool
from sparsevila_cluster.media import identify
from tests.media.clips import write_clip

LONG = "n" * 210
NAMES = [
    "missing.mp4", "text.mp4", "folder", f"{LONG}.mp4", f"{LONG}-is-not-there", "a" * 255, "a" * 300, "a/" * 3000, "loop", "loop/x",
    "text.mp4/x", "/".join(["x" * 100] * 3), "nul\0", "\ud800", "~", "../x", f"{'x' * 100}/../{LONG}", "quote'\"\n",
]  # fmt: skip


class Principal:
    owner = tenant = ""


class Call:
    principal = Principal()

    def left_s(self, most_s):
        return most_s


async def told_of(sources, limits, name):
    with pytest.raises(SparseVilaError) as told:
        async with sources.opened(Call(), [MediaReference(file=name, kind="image")]) as opened:
            identify(opened.sources[0], fps=1.0, max_frames=4, limits=limits)
    return str(told.value)


def test_errors_about_files_tell_the_clients_names_and_not_the_root(tmp_path):
    root = tmp_path / ("secret" * 12)
    (root / "folder").mkdir(parents=True)
    for name in ("text.mp4", f"{LONG}.mp4"):
        (root / name).write_text("no video")
    (root / "loop").symlink_to("loop")
    config, limits = GatewayConfig(file_root=str(root)), MediaLimits()
    held = Spool(config, 10**6, Tally())
    sources = MediaSources(config, limits, held, None)

    async def main():
        for name in NAMES:
            message = await told_of(sources, limits, name)
            assert "secret" not in message and str(tmp_path) not in message, name
        # A client that names the whole path knows it: it is quoted once, as it was given.
        whole = f"{root}/missing.mp4"
        assert (await told_of(sources, limits, whole)).count("'") == 2

    try:
        asyncio.run(main())
    finally:
        sources.close()
        held.close()


class Resident:
    """A pipeline where the bytes of one file are resident, and which makes nothing."""

    def __init__(self, data):
        self.media_hash = None
        self.data, self.num_prepared = data, 0

    async def find_media(self, request):
        (source,) = request.sources
        return MediaHandle("m" * 64, "video", 8, 2.0, 64, 32, 40, 1000, 2000) if bytes(source.data) == self.data else None

    async def prepare(self, request, progress=None):
        self.num_prepared += 1
        raise AssertionError("it is looked up")


class Fetcher:
    def __init__(self, blocks):
        self.blocks = blocks

    async def fetch(self, url, write, max_bytes, within_s):
        for block in self.blocks:
            await write(block)


def prepare(pipeline, named, fetcher=None, **fields):
    """What the service answers."""

    async def main():
        service = VideoQAService(pipeline, GatewayConfig(**fields), build_config(), Tally(), fetcher=fetcher)
        try:
            async with service.call("PrepareMedia", [], lambda: None) as call, aclosing(service.prepare(call, [named])) as updates:
                return [update async for update in updates][-1]
        finally:
            await service.close()

    return asyncio.run(main())


@pytest.fixture
def full_disk(monkeypatch):
    """Files of the spool that take no byte."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    monkeypatch.setattr(spool, "open", lambda path, mode, **how: builtins.open("/dev/full", "wb", buffering=0), raising=False)


def data_of(tmp_path):
    return write_clip(tmp_path / "clip.mp4", seed=1).read_bytes()


@pytest.mark.parametrize("how", ["inline", "data URL", "URL"])
def test_a_full_disk_does_not_stand_before_media_that_are_resident(tmp_path, full_disk, how):
    import base64

    data = data_of(tmp_path)
    fetcher = Fetcher([data[:100], data[100:]])
    named = {
        "inline": MediaReference(inline=data),
        "data URL": MediaReference(url="data:video/mp4;base64," + base64.b64encode(data).decode()),
        "URL": MediaReference(url="https://example.com/clip.mp4"),
    }[how]
    pipeline = Resident(data)
    assert prepare(pipeline, named, fetcher).reused is False and pipeline.num_prepared == 0
    with pytest.raises(QueueFull, match="disk of the spool is full") as told:
        prepare(Resident(b"another"), named, fetcher)
    assert told.value.retry_after_s > 0


def test_nor_does_a_quota_that_is_used_up_and_a_folder_that_takes_no_file(tmp_path, monkeypatch):
    data = data_of(tmp_path)
    fetcher = Fetcher([data[:1000], data[1000:]])
    held = Spool.make_room

    def make_room(self, path, more_bytes):
        if self.num_bytes + more_bytes > 1000:
            raise QueueFull("uploads use all of spool_bytes", 1.0)
        held(self, path, more_bytes)

    monkeypatch.setattr(Spool, "make_room", make_room)
    url = MediaReference(url="https://example.com/clip.mp4")
    assert prepare(Resident(data), url, fetcher).media_id == "m" * 64
    with pytest.raises(QueueFull):  # more than is kept in memory
        prepare(Resident(data), url, fetcher, max_inline_bytes=1100)

    def refuses(path, mode, **how):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(spool, "open", refuses, raising=False)
    assert prepare(Resident(data), url, fetcher).media_id == "m" * 64
