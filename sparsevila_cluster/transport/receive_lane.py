"""The receiving end of one lane: offers, grants, chunks, verification.

    reader thread    receives messages, posts the targets of bulk at once
    worker thread    waits for chunks in order, verifies, publishes

    RESERVED -> GRANTED -> SENDING -> RECEIVED -> VERIFIED -> ACKED
                   '-> FAILED | ABORTED | EXPIRED

An extent is given back only once nothing can write to it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import Cancelled, DataLoss, DeadlineExceeded, Internal, LaneLost, SparseVilaError
from sparsevila_cluster.kvcache.arena import Extent, KVSpec
from sparsevila_cluster.transport.channel import Channel, Message, failure_of
from sparsevila_cluster.transport.chunks import ChunkBuffers
from sparsevila_cluster.transport.incoming_transfer import IncomingTransfer, IncomingTransfers, TransferState
from sparsevila_cluster.transport.link import Link, PendingBulk
from sparsevila_cluster.transport.manifest import Manifest

log = logging.getLogger(__name__)


class PrefixSink(Protocol):
    """The worker behind a receiver.

    Called from the lanes' threads, one call at a time per lane; must return within its deadline.
    """

    def allocate(self, manifest: Manifest, deadline_s: float) -> Extent:
        """An extent of `manifest.metadata.length` rows. Raises QueueFull, TooLarge, Incompatible, or any other error of ours."""

    def publish(self, manifest: Manifest, extent: Extent) -> None:
        """Take over an extent whose every row has been verified. If it raises, the extent is cancelled."""

    def cancel(self, extent: Extent) -> None:
        """Take back an extent that will not be published and that nothing writes to any more."""


class TransferRegistry(Protocol):
    """The transfers that a receiver expects, and its lanes. All of it may be called from any thread."""

    def open_lane(self, lane: ReceiveLane, hello: dict[str, Any]) -> None:
        """Let a lane in, and set what it is called. Raises PermissionDenied, Incompatible, QueueFull."""

    def open_transfer(self, lane: ReceiveLane, transfer_id: str, key: str, attempt: int) -> float | None:
        """Seconds within which the transfer must have begun; None if it was acknowledged before.

        Raises NotFound. LaneLost: a later attempt has come before this one.
        """

    def state_changed(self, lane: ReceiveLane, transfer_id: str, state: TransferState) -> None:
        """A transfer of this lane is in another state now."""

    def received(self, num_bytes: int, kind: str) -> None:
        """Bytes of KV arrived and were verified."""

    def lane_closed(self, lane: ReceiveLane) -> None:
        """The lane is closed and holds nothing any more."""


class ReceiveLane:
    """Owns the link, two threads, and the extents of transfers that are neither published nor cancelled."""

    def __init__(self, link: Link, registry: TransferRegistry, prefix_sink: PrefixSink, spec: KVSpec, config: TransportConfig):
        """spec: of this worker's KV."""
        self.link = link
        self.channel = Channel(link)
        self.lane_id = self.worker = ""
        self.epoch = 0
        self.used_s = time.monotonic()
        self._registry, self._prefix_sink, self._spec, self._config = registry, prefix_sink, spec, config
        self._transfers = IncomingTransfers()
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._dead = False
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._work)]

    def start(self) -> None:
        """Begin to receive."""
        for thread in self._threads:
            thread.start()

    @property
    def has_threads(self) -> bool:
        """Whether one of its threads still runs."""
        return any(thread.is_alive() for thread in self._threads)

    def join(self, within_s: float) -> None:
        """Wait for the threads of a lane that failed."""
        until_s = time.monotonic() + within_s
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, until_s - time.monotonic()))

    @property
    def idle(self) -> bool:
        """Whether nothing is being received."""
        return not self._transfers

    def transfers(self) -> list[str]:
        """Ids of those that are being received."""
        return [incoming.transfer_id for incoming in self._transfers.all()]

    def info(self) -> dict[str, Any]:
        """Plain data."""
        return {"worker": self.worker, "kind": self.link.kind, "epoch": self.epoch, "transfers": self.transfers()}

    @property
    def bytes_in_flight(self) -> int:
        """KV bytes of extents that this lane holds."""
        return self._transfers.kv_bytes

    def beat(self) -> None:
        """Send a heartbeat, and end transfers that the other side stopped working on."""
        try:
            # In the thread that beats for all lanes: a peer that does not read must not keep it.
            self.channel.send_now("beat", transfers=self.transfers())
        except LaneLost as error:
            self.fail(error)
        now_s = time.monotonic()
        for incoming in self._transfers.all():
            if now_s - incoming.heard_s <= self._config.lease_s:
                continue
            if incoming.refused:  # the other side was told and never said that it stopped
                self.fail(LaneLost(f"transfer {incoming.transfer_id} was never ended by {self.worker}", self.worker))
            else:
                text = f"nothing was heard of transfer {incoming.transfer_id} for {self._config.lease_s:g} s"
                incoming.heard_s = now_s
                self._refuse(incoming, DeadlineExceeded(text), TransferState.EXPIRED)

    def drop(self, transfer_id: str, reason: str) -> None:
        """End a transfer that nobody waits for. Its extent is free once everything on its way has arrived."""
        incoming = self._transfers.get(transfer_id)
        if incoming is not None:
            self._refuse(incoming, Cancelled(reason), TransferState.ABORTED)

    def fail(self, error: SparseVilaError, quiet: bool = False) -> None:
        """Close the link, give every extent back, leave the transfers to another lane. Idempotent, from any thread."""
        with self._lock:
            if self._dead:
                return
            self._dead = True
        if not quiet:
            facts = {"lane": self.lane_id, "worker": self.worker, "transfers": self.transfers()}
            log.log(logging.WARNING if facts["transfers"] else logging.INFO, "lane lost: %s", error, extra=facts)
        try:
            self.channel.send("bye", failure=failure_of(error))
        except LaneLost:
            pass
        self.link.close()
        for incoming in self._transfers.take_all():
            incoming.fail_checksums()
            self._cancel(incoming)
            # What is being published is verified: its worker thread decides how it ends.
            if not incoming.state.terminal and not incoming.publishing:
                self._registry.state_changed(self, incoming.transfer_id, TransferState.RESERVED)
        self._jobs.put(None)
        self._registry.lane_closed(self)

    # ---- the reader thread -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        actions: dict[str, Callable[..., None]] = {
            "offer": self._on_offer,
            "chunk": self._on_chunk,
            "sum": self._on_sum,
            "commit": self._on_commit,
            "abort": self._on_abort,
            "beat": self._on_beat,
        }
        try:
            hello = self.channel.receive(self._config.dial_timeout_s)
            if hello.name != "hello":
                raise LaneLost(f"received {hello.name!r}, expected 'hello'")
            self._registry.open_lane(self, hello.body)
            self.channel.send("welcome")
            while True:
                message = self.channel.receive(self._config.silence_s)
                if message.name == "bye":
                    return self.fail(LaneLost("closed by the sender", self.worker), quiet=True)
                self._act(message, actions)
        except SparseVilaError as error:
            self.fail(error)
        except Exception as error:
            log.exception("reader of a lane failed", extra={"lane": self.lane_id})
            self.fail(Internal(f"{type(error).__name__}: {error}"))

    def _act(self, message: Message, actions: dict[str, Callable[..., None]]) -> None:
        action = actions.get(message.name)
        if action is None:
            raise LaneLost(f"a sender does not send {message.name!r}", self.worker)
        action(**message.body)

    def _on_offer(self, transfer: str, key: str, attempt: int, manifest: bytes) -> None:
        self.used_s = time.monotonic()
        try:
            begin_within_s = self._registry.open_transfer(self, transfer, key, attempt)
            if begin_within_s is None:
                return self.channel.send("acked", transfer=transfer)
        except SparseVilaError as error:
            return self.channel.send("refused", transfer=transfer, failure=failure_of(error))
        try:
            offered = Manifest.unpack(manifest)
            offered.check(self._spec)
            if (offered.transfer_id, offered.metadata.key) != (transfer, key):
                raise DataLoss(f"the manifest of {offered.transfer_id} came with the offer of {transfer}")
        except SparseVilaError as error:
            self._registry.state_changed(self, transfer, TransferState.FAILED)
            return self.channel.send("refused", transfer=transfer, failure=failure_of(error))
        incoming = IncomingTransfer(offered, begin_within_s)
        try:
            self._transfers.add(incoming)
        except LaneLost:
            self._registry.state_changed(self, transfer, TransferState.RESERVED)  # nobody else would let go of it
            raise
        self._jobs.put(lambda: self._allocate(incoming))

    def _on_chunk(self, transfer: str, index: int) -> None:
        incoming = self._transfers.get(transfer)
        # Bulk follows this message. Where it is not what was granted, the order of the lane is lost, and the lane with it.
        # Behind an abort it would be written to an extent that is not its own any more.
        expected = incoming is not None and not incoming.aborted and index == incoming.announced and index < incoming.granted
        if incoming is None or incoming.buffers is None or not expected:
            raise LaneLost(f"chunk {index} of transfer {transfer} was not granted", self.worker)
        self.used_s = incoming.heard_s = time.monotonic()
        incoming.announced += 1
        parts = incoming.buffers.targets(incoming.manifest.chunks[index])
        pending = self.link.receive_bulk(parts)
        if index == 0:
            self._set_state(incoming, TransferState.SENDING)
        incoming.expect_checksum(index)
        self._jobs.put(lambda: self._take_chunk(incoming, index, pending, parts))

    def _on_sum(self, transfer: str, index: int, checksum: int) -> None:
        incoming = self._transfers.get(transfer)
        if incoming is None or not incoming.set_checksum(index, checksum):
            raise LaneLost(f"the checksum of chunk {index} of transfer {transfer} was not expected", self.worker)

    def _on_commit(self, transfer: str) -> None:
        incoming = self._transfers.get(transfer)
        if incoming is not None:
            self._jobs.put(lambda: self._commit(incoming))

    def _on_abort(self, transfer: str, reason: str) -> None:
        incoming = self._transfers.get(transfer)
        if incoming is None:
            return self.channel.send("ended", transfer=transfer)
        incoming.aborted = True
        self._jobs.put(lambda: self._end(incoming, reason))

    def _on_beat(self, transfers: list[str]) -> None:
        now_s = time.monotonic()
        for transfer_id in transfers:
            incoming = self._transfers.get(transfer_id)
            if incoming is not None:
                incoming.heard_s = now_s

    # ---- the worker thread -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            except SparseVilaError as error:
                self.fail(error)
            except Exception as error:
                log.exception("worker of a lane failed", extra={"lane": self.lane_id})
                self.fail(Internal(f"{type(error).__name__}: {error}"))

    def _allocate(self, incoming: IncomingTransfer) -> None:
        if incoming.refused:
            return
        try:
            extent = self._prefix_sink.allocate(incoming.manifest, incoming.begin_within_s)
        except SparseVilaError as error:
            return self._refuse(incoming, error)
        with incoming.lock:
            if not incoming.ended:
                incoming.extent = extent
                device = self.link.device_for(extent.arena.k[0].device)
                incoming.buffers = ChunkBuffers(incoming.manifest, extent, device)
        if incoming.buffers is None:
            return self._prefix_sink.cancel(extent)
        if not incoming.refused:
            incoming.granted = min(self._config.credits, len(incoming.manifest.chunks))
            self._set_state(incoming, TransferState.GRANTED)
            self.channel.send("grant", transfer=incoming.transfer_id, upto=incoming.granted, landed=0)

    def _take_chunk(self, incoming: IncomingTransfer, index: int, pending: PendingBulk, parts: list[Tensor]) -> None:
        chunks, buffers = incoming.manifest.chunks, incoming.buffers
        is_right = incoming.wait_for_chunk(index, pending, parts, self._config.op_timeout_s)
        if incoming.refused:
            return
        assert buffers is not None
        if not is_right:
            return self._refuse(incoming, DataLoss(f"checksum mismatch in chunk {index} of transfer {incoming.transfer_id}"))
        try:
            with incoming.lock:
                if incoming.ended:
                    return
                buffers.scatter(chunks[index], parts)
        except DataLoss as error:
            return self._refuse(incoming, error)
        incoming.received = index + 1
        self._registry.received(sum(part.numel() for part in parts), self.link.kind)
        if incoming.received == len(chunks):
            self._set_state(incoming, TransferState.RECEIVED)
        incoming.granted = max(incoming.granted, min(incoming.received + self._config.credits, len(chunks)))
        self.channel.send("grant", transfer=incoming.transfer_id, upto=incoming.granted, landed=incoming.received)

    def _commit(self, incoming: IncomingTransfer) -> None:
        if incoming.refused:
            return
        num_chunks = len(incoming.manifest.chunks)
        if incoming.received != num_chunks:
            text = f"{incoming.received} of {num_chunks} chunks of transfer {incoming.transfer_id} came before its commit"
            return self._refuse(incoming, DataLoss(text))
        self._set_state(incoming, TransferState.VERIFIED)
        with incoming.lock:
            extent, incoming.extent = incoming.extent, None
            if incoming.ended or extent is None:
                return
            incoming.ended = incoming.publishing = True
        try:
            self._prefix_sink.publish(incoming.manifest, extent)
        except SparseVilaError as error:
            self._prefix_sink.cancel(extent)
            incoming.ended = incoming.publishing = False
            return self._refuse(incoming, error)
        self._set_state(incoming, TransferState.ACKED)
        self._transfers.remove(incoming)
        self.channel.send("acked", transfer=incoming.transfer_id)

    def _end(self, incoming: IncomingTransfer, reason: str) -> None:
        """The sender sends no more chunks of it, and what was on its way has arrived."""
        self._transfers.remove(incoming)
        self._cancel(incoming)
        if not incoming.refused:
            self._set_state(incoming, TransferState.ABORTED)
            log.info("transfer aborted: %s", reason, extra={"lane": self.lane_id, "transfer": incoming.transfer_id})
        self.channel.send("ended", transfer=incoming.transfer_id)

    # ---- both threads ----------------------------------------------------------------------------------------------------------

    def _refuse(self, incoming: IncomingTransfer, error: SparseVilaError, state: TransferState = TransferState.FAILED) -> None:
        with incoming.lock:
            if incoming.refused or incoming.ended:
                return
            incoming.refused = True
        # A damaged transfer may be offered again; everything else ends it.
        self._set_state(incoming, TransferState.RESERVED if isinstance(error, DataLoss) else state)
        try:
            self.channel.send("refused", transfer=incoming.transfer_id, failure=failure_of(error))
        except LaneLost as lost:
            self.fail(lost)

    def _cancel(self, incoming: IncomingTransfer) -> None:
        with incoming.lock:
            incoming.ended = True
            extent, incoming.extent = incoming.extent, None
        if extent is not None:
            self._prefix_sink.cancel(extent)

    def _set_state(self, incoming: IncomingTransfer, state: TransferState) -> None:
        incoming.state = state
        self._registry.state_changed(self, incoming.transfer_id, state)
