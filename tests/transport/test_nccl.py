"""The NCCL kind without two GPUs: its link over a stand-in group that behaves like NCCL's, and honest refusals without one."""

import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport import TRANSPORTS, OutgoingTransfer, ReceiverAddress, TransferTicket
from sparsevila_cluster.transport.backends import nccl
from sparsevila_cluster.transport.backends.gloo import build_group
from sparsevila_cluster.transport.chunks import ChunkBuffers
from sparsevila_cluster.transport.handshake import MessageSocket
from sparsevila_cluster.transport.link import lacks_nothing
from sparsevila_cluster.transport.manifest import Manifest
from tests.transport.transport_fixtures import BOUNDS, KINDS, Pair, make_prefix, rows_equal, until

HOST = "127.0.0.1"


class Work:
    """Done when a thread has waited for it, or never; like NCCL's, it is only ever asked."""

    def __init__(self, work):
        self._done = False
        threading.Thread(target=self._wait, args=(work,), daemon=True).start()

    def _wait(self, work):
        try:
            work.wait()
            self._done = True
        except RuntimeError:
            pass

    def is_completed(self):
        return self._done


class Group:
    """Bulk in the order in which it was posted; tags are ignored; `abort` ends it."""

    def __init__(self, gloo):
        self._gloo, self._number, self.aborted = gloo, 0, False

    def _post(self, op, tensors, peer):
        self._number += 1
        return Work(op(tensors, peer, self._number))

    def send(self, tensors, peer, tag):
        return self._post(self._gloo.send, tensors, peer)

    def recv(self, tensors, peer, tag):
        return self._post(self._gloo.recv, tensors, peer)

    def abort(self):
        self.aborted = True


@pytest.fixture
def groups(monkeypatch):
    made = []

    def build(store, rank, endpoint, host):
        made.append(Group(build_group(store, rank, HOST, endpoint.config.dial_timeout_s)))
        return nccl.NcclLink(MessageSocket(store.connection, endpoint.config.op_timeout_s), made[-1], rank)

    monkeypatch.setattr(nccl, "build_nccl_link", build)
    monkeypatch.setitem(TRANSPORTS, "nccl", replace(TRANSPORTS["nccl"], lacks=lacks_nothing))
    return made


def test_the_same_lane_over_another_group(groups):
    pair = Pair("nccl", chunk_bytes=65536)
    try:
        sent = make_prefix()
        assert pair.send(sent, BOUNDS).kind == "nccl"
        assert rows_equal(sent, pair.resident(sent.key))
        transfer = pair.begin(make_prefix("b"), BOUNDS)
        transfer.wrote(0, 0, 1500)
        until(lambda: transfer.received_bytes > 0, "some of it has landed")
        transfer.abort("enough")
        pair.settle(sent.kv_bytes)
    finally:
        pair.close()
    assert len(groups) == 2 and all(group.aborted for group in groups)


def test_bulk_leaves_beside_what_a_gpu_still_has_to_do(groups, monkeypatch):
    """NCCL sends after all that the stream holds at which it was told to: not that of the prefill."""
    within, sent = threading.local(), []

    @contextmanager
    def own_stream(buffers):
        within.now = True
        yield
        within.now = False

    def send_bulk(link, parts):
        sent.append(getattr(within, "now", False))
        return post(link, parts)

    post = nccl.NcclLink.send_bulk
    monkeypatch.setattr(ChunkBuffers, "own_stream", own_stream)
    monkeypatch.setattr(nccl.NcclLink, "send_bulk", send_bulk)
    pair = Pair("nccl", chunk_bytes=65536)
    try:
        pair.send(make_prefix(), BOUNDS)
    finally:
        pair.close()
    assert len(sent) > 3 and all(sent)


def test_bulk_that_never_comes_ends_the_link_at_its_deadline(groups):
    class Never:
        def is_completed(self):
            return False

    class Link:
        closed = False

        def close(self):
            self.closed = True

    link = Link()
    start_s = time.monotonic()
    with pytest.raises(LaneLost, match="within 0.1 s"):
        nccl.PolledWorks(link, [Never()], []).wait(0.1)
    assert link.closed and time.monotonic() - start_s < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_there_is_none():
    assert not nccl.nccl_is_here() and "nccl" not in KINDS


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_between_two_gpus():
    """NCCL refuses two ranks on one GPU."""
    from sparsevila_cluster.core.cluster_config import TransportConfig
    from sparsevila_cluster.kvcache.arena import Arena
    from sparsevila_cluster.transport import KVReceiver, KVSender, TransferTicket
    from tests.transport.transport_fixtures import SPEC, StoreSink

    config = TransportConfig(kind="nccl")
    prefix_sink = StoreSink()
    prefix_sink.store.arena = Arena(SPEC, 6000, "cuda:1")
    receiver = KVReceiver("decode-0", prefix_sink, SPEC, config, device="cuda:1")
    sender = KVSender("prefill-0", config, device="cuda:0")
    try:
        sent = make_prefix()
        arena = sent.extent.arena
        arena.k_all, arena.v_all = arena.k_all.to("cuda:0"), arena.v_all.to("cuda:0")
        arena.k, arena.v = list(arena.k_all), list(arena.v_all)
        receiver.expect("t", sent.key, 5.0)
        transfer = sender.begin(sent, BOUNDS, TransferTicket("t", receiver.address, 30.0))
        transfer.wrote_all()
        assert transfer.finish(30.0).kind == "nccl"
        came = prefix_sink.store.get(sent.key)
        for layer in range(SPEC.num_layers):
            for one, other in zip(sent.extent.rows(layer), came.extent.rows(layer), strict=True):
                assert torch.equal(one.cpu(), other.cpu())
    finally:
        sender.close()
        receiver.close()


def test_rows_are_final_when_the_stream_that_writes_them_has_come_to_them(monkeypatch):
    """That of the arena's device, whichever device the thread that tells of them is at."""
    device = torch.device("cuda", 1)
    prefix = make_prefix(length=8)
    manifest = Manifest.of(prefix, "t", (0, 8), TransportConfig())
    prefix.extent.arena.k[0] = SimpleNamespace(device=device)
    recorded = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where=None: ("stream of", where))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=recorded.append, query=lambda: bool(recorded[3:])))
    ticket = TransferTicket("t", ReceiverAddress("d", "nccl", "", 0, ""), 9.0)
    transfer = OutgoingTransfer(prefix, manifest, ticket, lambda: None)
    transfer.wrote(0, 0, 8)
    assert recorded == [("stream of", device)]
    assert not any(map(transfer.is_final, manifest.chunks)), "the device has not come to it"
    for layer in (0, 1, 2):
        transfer.wrote(layer, 0, 8)
    assert all(map(transfer.is_final, manifest.chunks))
