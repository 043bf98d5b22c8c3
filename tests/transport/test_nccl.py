"""The NCCL kind without two GPUs: its link over a stand-in group that behaves like NCCL's, and honest refusals without one."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport import OutgoingTransfer, ReceiverAddress, TransferTicket
from sparsevila_cluster.transport.backends import nccl
from sparsevila_cluster.transport.backends.gloo import build_group
from sparsevila_cluster.transport.chunks import ChunkBuffers
from sparsevila_cluster.transport.handshake import Line
from sparsevila_cluster.transport.manifest import Manifest
from tests.transport.transport_fixtures import BOUNDS, KINDS, Harbour, make_prefix, rows_equal, until

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

    def build(store, rank, config, device):
        made.append(Group(build_group(store, rank, HOST, config.dial_timeout_s)))
        return nccl.NcclLink(Line(store.connection, config.op_timeout_s), made[-1], rank)

    monkeypatch.setattr(nccl, "build_nccl_link", build)
    monkeypatch.setattr("sparsevila_cluster.transport.transports.resolve", lambda *_: "nccl")
    monkeypatch.setattr("sparsevila_cluster.transport.kv_receiver.resolve", lambda *_: "nccl")
    monkeypatch.setattr("sparsevila_cluster.transport.transports.kind_towards", lambda *_: "nccl")
    return made


def test_the_same_lane_over_another_group(groups):
    harbour = Harbour("nccl", chunk_bytes=65536)
    try:
        sent = make_prefix()
        assert harbour.send(sent, BOUNDS).kind == "nccl"
        assert rows_equal(sent, harbour.resident(sent.key))
        shipment = harbour.begin(make_prefix("b"), BOUNDS)
        shipment.wrote(0, 0, 1500)
        until(lambda: shipment.landed_bytes > 0, "some of it has landed")
        shipment.abort("enough")
        harbour.settle(sent.kv_bytes)
    finally:
        harbour.close()
    assert len(groups) == 2 and all(group.aborted for group in groups)


def test_bulk_leaves_beside_what_a_gpu_still_has_to_do(groups, monkeypatch):
    """NCCL sends after all that the stream holds at which it was told to: not that of the prefill."""
    within, sent = threading.local(), []

    @contextmanager
    def aside(cargo):
        within.now = True
        yield
        within.now = False

    def ship(link, parts):
        sent.append(getattr(within, "now", False))
        return post(link, parts)

    post = nccl.NcclLink.ship
    monkeypatch.setattr(ChunkBuffers, "aside", aside)
    monkeypatch.setattr(nccl.NcclLink, "ship", ship)
    harbour = Harbour("nccl", chunk_bytes=65536)
    try:
        harbour.send(make_prefix(), BOUNDS)
    finally:
        harbour.close()
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
        nccl.Polled(link, [Never()], []).wait(0.1)
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
    from tests.transport.transport_fixtures import SPEC, Quay

    config = TransportConfig(kind="nccl")
    quay = Quay()
    quay.store.arena = Arena(SPEC, 6000, "cuda:1")
    dock = KVReceiver("decode-0", quay, SPEC, config, device="cuda:1")
    shipper = KVSender("prefill-0", SPEC, config, device="cuda:0")
    try:
        sent = make_prefix()
        arena = sent.extent.arena
        arena.k_all, arena.v_all = arena.k_all.to("cuda:0"), arena.v_all.to("cuda:0")
        arena.k, arena.v = list(arena.k_all), list(arena.v_all)
        dock.expect("t", sent.key, 5.0)
        shipment = shipper.begin(sent, BOUNDS, TransferTicket("t", dock.address, 30.0))
        shipment.wrote_all()
        assert shipment.finish(30.0).kind == "nccl"
        came = quay.store.get(sent.key)
        for layer in range(SPEC.num_layers):
            for one, other in zip(sent.extent.rows(layer), came.extent.rows(layer), strict=True):
                assert torch.equal(one.cpu(), other.cpu())
    finally:
        shipper.close()
        dock.close()


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
    shipment = OutgoingTransfer(prefix, manifest, ticket, lambda: None)
    shipment.wrote(0, 0, 8)
    assert recorded == [("stream of", device)]
    assert not any(map(shipment.is_final, manifest.chunks)), "the device has not come to it"
    for layer in (0, 1, 2):
        shipment.wrote(layer, 0, 8)
    assert all(map(shipment.is_final, manifest.chunks))
