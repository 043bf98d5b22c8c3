"""Uploads as files: quota, expiry, owners, threads, several spools in one folder, and that nothing stays behind."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import BadConfig, NotFound, QueueFull, TooLarge, Unavailable
from sparsevila_cluster.core.metrics import Tally
from sparsevila_cluster.gateway import spool as spools
from sparsevila_cluster.gateway.spool import Spool
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests import structure as rules
from tests.gateway.running_servers import blocking_upload, prepare, refused, run, until, upload


def spool(max_bytes=1000, sink=None, **fields):
    return Spool(GatewayConfig(**{"spool_bytes": 1000} | fields), max_bytes, sink or Tally())


def put(into, data, owner="ann", kind="video"):
    part = into.begin(owner)
    try:
        for start in range(0, len(data), 7):
            part.write(data[start : start + 7])
        return part.keep(kind)
    except BaseException:
        part.discard()
        raise


def test_what_is_kept_is_what_was_written():
    sink = Tally()
    held = spool(sink=sink)
    upload = put(held, bytes(range(200)))
    assert upload.num_bytes == 200 and upload.digest == hashlib.blake2b(bytes(range(200)), digest_size=32).hexdigest()
    with held.hold("ann", upload.upload_id) as (path, kind):
        assert path.read_bytes() == bytes(range(200)) and kind == "video"
        assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
        folder = path.parent.parent
    assert held.num_bytes == 200 == sink.values["spool_bytes",]
    known = upload.upload_id
    for owner, upload_id in (("bob", known), ("ann", "0" * 32), ("ann", "../x"), ("ann", known + "x"), ("ann", "")):
        with pytest.raises(NotFound), held.hold(owner, upload_id):
            pass
    held.close()
    held.close()
    assert not folder.exists() and held.num_bytes == 0 == sink.values["spool_bytes",]
    for act in (lambda: held.begin("ann"), lambda: put(held, b"x")):
        with pytest.raises(Unavailable):
            act()


def test_the_quota_holds_to_the_byte():
    held = spool()
    first = put(held, bytes(600))
    with pytest.raises(QueueFull, match="spool_bytes = 1000") as full:
        put(held, bytes(401))
    assert full.value.retry_after_s > 0 and held.num_bytes == 600
    put(held, bytes(400))
    assert held.num_bytes == 1000
    with pytest.raises(QueueFull):
        put(held, b"x")
    held.close()
    assert first.num_bytes == 600
    for max_bytes, size, limit in ((50, 51, "max_bytes = 50"), (5000, 1001, "spool_bytes = 1000")):
        held = spool(max_bytes=max_bytes)
        with pytest.raises(TooLarge, match=limit):
            put(held, bytes(size))
        assert held.num_bytes == 0
        held.close()


def age(*paths):
    """As if nobody had touched them for an hour."""
    for path in paths:
        os.utime(path, (time.time() - 3600, time.time() - 3600))


def test_uploads_expire_unless_they_are_read():
    held = spool(upload_ttl_s=60)
    read, idle = put(held, bytes(500)), put(held, bytes(500))
    partial = spool(upload_ttl_s=60)
    slow = partial.begin("ann")
    slow.write(b"x")
    with held.hold("ann", read.upload_id) as (path, _):
        age(*path.parent.iterdir())
        with pytest.raises(NotFound, match="expired"), held.hold("ann", idle.upload_id):
            pass
        put(held, bytes(500))  # makes room by itself
        held.sweep()
        assert path.read_bytes() == bytes(500)
        with held.hold("ann", read.upload_id):
            pass
    assert held.num_bytes == 1000
    age(*path.parent.iterdir())
    held.sweep()
    assert held.num_bytes == 0 and not path.exists()
    age(slow.path)
    partial.sweep()
    slow.write(b"y")  # what still arrives is in use
    with partial.hold("ann", slow.keep("auto").upload_id) as (path, _):
        assert path.read_bytes() == b"xy"
    for one in (held, partial):
        one.close()


def test_a_shared_folder_has_one_quota_and_is_cleaned_of_the_dead(tmp_path):
    folder = tmp_path / "deep" / "spool"
    one, two = (spool(spool_dir=str(folder), upload_ttl_s=5) for _ in range(2))
    sent = put(one, bytes(700))
    with two.hold("ann", sent.upload_id) as (path, kind):
        assert kind == "video" and path.stat().st_size == 700
    with pytest.raises(QueueFull):
        put(two, bytes(301))
    put(two, bytes(300))
    (folder / "README").write_text("not ours")
    dead = path.parent / f"{'0' * 32}.part"
    dead.write_bytes(b"left by a router that is gone")
    os.utime(dead, (time.time() - 10, time.time() - 10))
    two.sweep()
    assert not dead.exists() and path.exists()
    one.close()
    assert not path.exists() and two.num_bytes == 300
    two.close()
    assert folder.exists() and [p.name for p in folder.rglob("*") if p.is_file()] == ["README"]
    with pytest.raises(BadConfig, match="spool_dir"):
        spool(spool_dir="/proc/no such folder")


def test_routers_of_one_folder_neither_take_from_each_other_what_is_in_use_nor_count_what_is_gone(tmp_path):
    one, two = (spool(spool_dir=str(tmp_path / "spool"), upload_ttl_s=60) for _ in range(2))
    used, idle = put(one, bytes(300)), put(one, bytes(200))
    with one.hold("ann", used.upload_id) as (path, _):
        age(*path.parent.iterdir())
        written_ns = path.stat().st_mtime_ns
        one.sweep()
        two.sweep()
        with two.hold("ann", used.upload_id):  # as long as it lives it may be used by several
            assert path.exists() and path.stat().st_mtime_ns == written_ns, "whoever reads it would think that it has changed"
    age(path)
    two.sweep()
    assert not path.exists()
    one.sweep()
    assert one.num_bytes == two.num_bytes == 0
    with pytest.raises(NotFound), one.hold("ann", idle.upload_id):
        pass
    one.close()
    two.close()


KILLED = """
import os, signal
from tests.gateway.test_spool import put, spool
held = spool()
put(held, bytes(100))
print(held._folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_deleted_by_the_next_and_what_is_in_use_is_not(tmp_path, monkeypatch):
    path = os.pathsep.join((str(rules.ROOT), str(rules.ROOT / "kernels")))
    environ = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environ, cwd=rules.ROOT, capture_output=True, text=True, timeout=60)
    left = Path(done.stdout.strip())
    assert done.returncode == -signal.SIGKILL and left.exists(), done.stderr
    (tmp_path / "sparsevila-spool-other").mkdir()  # no lock yet: it may be about to be used, or another program's
    (tmp_path / "sparsevila-spool-other" / "lock").touch()
    (tmp_path / "sparsevila-spool-link").symlink_to(left)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = spool()
    sent = put(one, bytes(10))
    two = spool()
    assert not left.exists() and (tmp_path / "sparsevila-spool-other").exists()
    with one.hold("ann", sent.upload_id) as (file, _):
        assert file.exists()
    for held in (one, two):
        held.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparsevila-spool-link", "sparsevila-spool-other"]


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o701])
def test_a_folder_that_others_may_look_into_is_refused(tmp_path, mode):
    folder = tmp_path / "spool"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(BadConfig, match=f"0700, but is {mode:04o}"):
        spool(spool_dir=str(folder))


def test_links_and_folders_of_others_are_refused(tmp_path, monkeypatch):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="no link"):
        spool(spool_dir=str(tmp_path / "link"))
    with pytest.raises(BadConfig):
        spool(spool_dir=str(tmp_path / "file"))
    spool(spool_dir=str(real)).close()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(BadConfig, match="belong to user 12345"):
        spool(spool_dir=str(real))


def test_nobody_else_may_read_what_is_kept(tmp_path):
    before = os.umask(0)
    try:
        held = spool(spool_dir=str(tmp_path / "a" / "spool"))
        sent = put(held, bytes(10))
        part = held.begin("bob")
    finally:
        os.umask(before)
    with held.hold("ann", sent.upload_id) as (file, _):
        for path, mode in ((file, 0o600), (part.path, 0o600), (file.parent, 0o700), (held._folder, 0o700)):
            assert path.stat().st_mode & 0o777 == mode, path
    part.discard()
    held.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_a_full_queue():
    held = spool()
    part = held.begin("ann")
    with open("/dev/full", "wb", buffering=0) as full:
        os.dup2(full.fileno(), part._file.fileno())
        with pytest.raises(QueueFull, match="disk"):
            part.write(b"x")
    part.discard()
    held.close()


def test_discarding_while_another_thread_writes_leaves_nothing():
    held = spool(max_bytes=10**9, spool_bytes=10**9)
    for _ in range(20):
        part, failed = held.begin("ann"), []

        def write(part=part, failed=failed):
            try:
                while True:
                    part.write(bytes(1000))
            except Unavailable as error:
                failed.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.002)
        part.discard()
        thread.join(10)
        assert failed and held.num_bytes == 0 and not part.path.exists()
    held.close()


# ---- over gRPC --------------------------------------------------------------------------------------------------------------


def test_uploads_over_grpc_have_quota_size_and_expiry(checkpoint, clips, monkeypatch):
    size = len(clips[0])
    monkeypatch.setattr(spools, "SWEEP_S", 0.1)

    def pieces(data):
        return [pb.MediaChunk(data=data[start : start + 1000]) for start in range(0, len(data), 1000)]

    async def work(served):
        code, error = await refused(blocking_upload(served.address, pieces(bytes(size * 3))))
        assert (code, type(error)) == ("RESOURCE_EXHAUSTED", TooLarge) and "spool_bytes" in str(error)
        sent = await upload(served.stub, clips[0], step=1000, kind="video")
        assert sent.digest == hashlib.blake2b(clips[0], digest_size=32).hexdigest() and sent.num_bytes == size
        code, error = await refused(blocking_upload(served.address, pieces(clips[0])))
        assert (code, type(error)) == ("RESOURCE_EXHAUSTED", QueueFull) and "spool_bytes" in str(error)
        source = pb.MediaSource(upload_id=sent.upload_id)
        assert (await prepare(served.stub, source)).kind == "video"
        assert (await prepare(served.stub, source)).reused  # an upload may be used again

        age(*served.service._spool._folder.glob("*/*"))

        async def expired():
            return served.service._spool.num_bytes == 0

        await until(expired, "an upload stays for ever")
        request = pb.PrepareMediaRequest(sources=[source])
        code, error = await refused(served.stub.PrepareMedia(request))
        assert code == "NOT_FOUND" and "expired" in str(error)
        assert (await upload(served.stub, clips[0])).upload_id != sent.upload_id

    run(checkpoint, work, spool_bytes=size + size // 2, upload_ttl_s=60)


def test_an_upload_that_is_no_media_is_called_by_its_name(checkpoint):
    async def work(served):
        sent = await upload(served.stub, b"no video at all")
        code, error = await refused(
            served.stub.PrepareMedia(pb.PrepareMediaRequest(sources=[pb.MediaSource(upload_id=sent.upload_id)]))
        )
        assert code == "INVALID_ARGUMENT" and f"upload '{sent.upload_id}'" in str(error) and "spool" not in str(error)

    run(checkpoint, work)


def test_an_upload_that_pauses_too_long_is_given_up(checkpoint, monkeypatch):
    from sparsevila_cluster.gateway import media_sources

    monkeypatch.setattr(media_sources, "CHUNK_WAIT_S", 0.2)

    async def work(served):
        async def chunks():
            yield pb.MediaChunk(data=b"x")
            await asyncio.sleep(20)

        code, error = await refused(served.stub.UploadMedia(chunks()))
        assert code == "DEADLINE_EXCEEDED" and "chunk" in str(error) and served.service._spool.num_bytes == 0

    run(checkpoint, work)


def test_an_evicted_prefix_whose_bytes_are_gone_is_not_found(checkpoint, clips):
    async def work(served):
        media = [await prepare(served.stub, data) for data in clips]
        from tests.gateway.running_servers import ask

        code, error = await refused(served.stub.Answer(ask(media[0].media_id)))
        assert code == "NOT_FOUND" and "prepare it again" in str(error)
        assert (await served.stub.Answer(ask(media[2].media_id))).text is not None

    room = []
    run(checkpoint, lambda served: _room(served, clips[0], room))
    run(checkpoint, work, engine={"prefix_bytes": int(room[0] * 1.5)})


async def _room(served, clip, room):
    room.append((await prepare(served.stub, clip)).kv_bytes)
