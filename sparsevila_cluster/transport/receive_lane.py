"""The receiving end of one lane: offers, grants, landing chunks, verification.

Knows: the life of a transfer on this lane, and when an extent may be given back: only once nothing can write to it. Does not know:
which transfers are expected (the dock's `TransferRegistry`), how links work, or what a worker does with an extent.

    reader thread   hears messages, posts landings at once            RESERVED -> GRANTED -> SENDING -> LANDED -> VERIFIED -> ACKED
    lander thread   waits for them in order, verifies, publishes                        '-> FAILED | ABORTED | EXPIRED
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import Cancelled, DataLoss, DeadlineExceeded, Internal, LaneLost, SparseVilaError, to_failure
from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.transport.chunks import ChunkBuffers
from sparsevila_cluster.transport.incoming_transfer import IncomingTransfer, IncomingTransfers, TransferRegistry
from sparsevila_cluster.transport.link import Handle, Link, PrefixSink, TransferState
from sparsevila_cluster.transport.manifest import Manifest
from sparsevila_cluster.transport.messages import Channel, Message

log = logging.getLogger(__name__)


class ReceiveLane:
    """Owns the link, two threads, and the extents of transfers that are neither published nor cancelled."""

    def __init__(self, link: Link, desk: TransferRegistry, landing: PrefixSink, spec: KVSpec, config: TransportConfig):
        self.link = link
        self.channel = Channel(link)
        self.lane_id = self.worker = ""
        self.epoch = 0
        self.used_s = time.monotonic()
        self._desk, self._landing, self._spec, self._config = desk, landing, spec, config
        self._incoming = IncomingTransfers()
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._dead = False
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._land)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def has_threads(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self, within_s: float) -> None:
        """Wait for the threads of a lane that failed."""
        until_s = time.monotonic() + within_s
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, until_s - time.monotonic()))

    @property
    def idle(self) -> bool:
        return not self._incoming

    def transfers(self) -> list[str]:
        return [one.transfer_id for one in self._incoming.all()]

    def info(self) -> dict[str, Any]:
        return {"worker": self.worker, "kind": self.link.kind, "epoch": self.epoch, "transfers": self.transfers()}

    @property
    def bytes_in_flight(self) -> int:
        """KV bytes of extents that this lane holds."""
        return self._incoming.kv_bytes

    def beat(self) -> None:
        """Say that this side lives, and end transfers that the other side stopped working on."""
        try:
            self.channel.say("beat", transfers=self.transfers())
        except LaneLost as error:
            self.fail(error)
        now_s = time.monotonic()
        for one in self._incoming.all():
            if now_s - one.heard_s <= self._config.lease_s:
                continue
            if one.refused:  # the other side was told and never said that it stopped
                self.fail(LaneLost(f"transfer {one.transfer_id} was never ended by {self.worker}"))
            else:
                text = f"nothing was heard of transfer {one.transfer_id} for {self._config.lease_s:g} s"
                one.heard_s = now_s
                self._refuse(one, DeadlineExceeded(text), TransferState.EXPIRED)

    def drop(self, transfer_id: str, reason: str) -> None:
        """End a transfer that nobody waits for. Its extent is free once everything on its way has landed."""
        one = self._incoming.get(transfer_id)
        if one is not None:
            self._refuse(one, Cancelled(reason), TransferState.ABORTED)

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
            self.channel.say("bye", failure=to_failure(error))
        except LaneLost:
            pass
        self.link.close()
        for one in self._incoming.take_all():
            one.forget_sums()
            self._give_back(one)
            # What is being published is verified: its lander has the last word.
            if not one.state.terminal and not one.publishing:
                self._desk.moved(self, one.transfer_id, TransferState.RESERVED)
        self._jobs.put(None)
        self._desk.gone(self)

    # ---- the reader ------------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        acts: dict[str, Callable[..., None]] = {
            "offer": self._on_offer,
            "chunk": self._on_chunk,
            "sum": self._on_sum,
            "commit": self._on_commit,
            "abort": self._on_abort,
            "beat": self._on_beat,
        }
        try:
            hello = self.channel.hear(self._config.dial_timeout_s)
            if hello.name != "hello":
                raise LaneLost(f"{hello.name!r} came where a hello was due")
            self._desk.welcome(self, hello.body)
            self.channel.say("welcome")
            while True:
                message = self.channel.hear(self._config.silence_s)
                if message.name == "bye":
                    return self.fail(LaneLost("closed by the sender"), quiet=True)
                self._obey(message, acts)
        except SparseVilaError as error:
            self.fail(error)
        except Exception as error:
            log.exception("a lane's reader", extra={"lane": self.lane_id})
            self.fail(Internal(f"{type(error).__name__}: {error}"))

    def _obey(self, message: Message, acts: dict[str, Callable[..., None]]) -> None:
        act = acts.get(message.name)
        if act is None:
            raise LaneLost(f"a sender does not say {message.name!r}")
        try:
            act(**message.body)
        except TypeError as error:
            raise LaneLost(f"a malformed {message.name!r}: {error}") from error

    def _on_offer(self, transfer: str, key: str, attempt: int, manifest: bytes) -> None:
        self.used_s = time.monotonic()
        try:
            begin_within_s = self._desk.admit(self, transfer, key, attempt)
            if begin_within_s is None:
                return self.channel.say("acked", transfer=transfer)
        except SparseVilaError as error:
            return self.channel.say("refused", transfer=transfer, failure=to_failure(error))
        try:
            read = Manifest.unpack(manifest)
            read.check(self._spec)
            if (read.transfer_id, read.metadata.key) != (transfer, key):
                raise DataLoss(f"the manifest of {read.transfer_id} came with the offer of {transfer}")
        except SparseVilaError as error:
            self._desk.moved(self, transfer, TransferState.FAILED)
            return self.channel.say("refused", transfer=transfer, failure=to_failure(error))
        one = IncomingTransfer(read, begin_within_s)
        try:
            self._incoming.add(one)
        except LaneLost:
            self._desk.moved(self, transfer, TransferState.RESERVED)  # nobody else would let go of it
            raise
        self._jobs.put(lambda: self._allocate(one))

    def _on_chunk(self, transfer: str, index: int) -> None:
        one = self._incoming.get(transfer)
        # Bulk follows this message. Where it is not what was granted, the order of the lane is lost, and the lane with it.
        if one is None or one.cargo is None or index != one.announced or index >= one.granted:
            raise LaneLost(f"chunk {index} of transfer {transfer} was not due")
        self.used_s = one.heard_s = time.monotonic()
        one.announced += 1
        chunk = one.manifest.chunks[index]
        berths = one.cargo.berths(chunk)
        handle = self.link.land(berths)
        if index == 0:
            self._move(one, TransferState.SENDING)
        one.announce_sum(index)
        self._jobs.put(lambda: self._landed(one, index, handle, berths))

    def _on_sum(self, transfer: str, index: int, checksum: int) -> None:
        one = self._incoming.get(transfer)
        if one is None or not one.take_sum(index, checksum):
            raise LaneLost(f"the checksum of chunk {index} of transfer {transfer} was not due")

    def _on_commit(self, transfer: str) -> None:
        one = self._incoming.get(transfer)
        if one is not None:
            self._jobs.put(lambda: self._commit(one))

    def _on_abort(self, transfer: str, reason: str) -> None:
        one = self._incoming.get(transfer)
        if one is None:
            return self.channel.say("ended", transfer=transfer)
        self._jobs.put(lambda: self._ended(one, reason))

    def _on_beat(self, transfers: list[str]) -> None:
        now_s = time.monotonic()
        for transfer in transfers:
            one = self._incoming.get(transfer)
            if one is not None:
                one.heard_s = now_s

    # ---- the lander ------------------------------------------------------------------------------------------------------------

    def _land(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            except SparseVilaError as error:
                self.fail(error)
            except Exception as error:
                log.exception("a lane's lander", extra={"lane": self.lane_id})
                self.fail(Internal(f"{type(error).__name__}: {error}"))

    def _allocate(self, one: IncomingTransfer) -> None:
        if one.refused:
            return
        try:
            extent = self._landing.allocate(one.manifest, one.begin_within_s)
        except SparseVilaError as error:
            return self._refuse(one, error)
        with one.lock:
            if not one.ended:
                one.extent = extent
                arena = extent.arena.k[0].device
                one.cargo = ChunkBuffers(one.manifest, extent, self.link.device_for(arena))
        if one.cargo is None:
            return self._landing.cancel(extent)
        if not one.refused:
            one.granted = min(self._config.credits, len(one.manifest.chunks))
            self._move(one, TransferState.GRANTED)
            self.channel.say("grant", transfer=one.transfer_id, upto=one.granted, landed=0)

    def _landed(self, one: IncomingTransfer, index: int, handle: Handle, berths: list[Tensor]) -> None:
        manifest, cargo = one.manifest, one.cargo
        is_right = one.arrived(index, handle, berths, self._config.op_timeout_s)
        if one.refused:
            return
        assert cargo is not None
        if not is_right:
            return self._refuse(one, DataLoss(f"chunk {index} of transfer {one.transfer_id} is not what was sent"))
        with one.lock:
            if one.ended:
                return
            cargo.settle(manifest.chunks[index], berths)
        one.landed = index + 1
        self._desk.landed(sum(berth.numel() for berth in berths), self.link.kind)
        if one.landed == len(manifest.chunks):
            self._move(one, TransferState.LANDED)
        one.granted = max(one.granted, min(one.landed + self._config.credits, len(manifest.chunks)))
        self.channel.say("grant", transfer=one.transfer_id, upto=one.granted, landed=one.landed)

    def _commit(self, one: IncomingTransfer) -> None:
        if one.refused:
            return
        if one.landed != len(one.manifest.chunks):
            return self._refuse(one, DataLoss(f"{one.landed} chunks of transfer {one.transfer_id} came, and not all"))
        self._move(one, TransferState.VERIFIED)
        with one.lock:
            extent, one.extent = one.extent, None
            if one.ended or extent is None:
                return
            one.ended = one.publishing = True
        try:
            self._landing.publish(one.manifest, extent)
        except SparseVilaError as error:
            self._landing.cancel(extent)
            one.ended = one.publishing = False
            return self._refuse(one, error)
        self._move(one, TransferState.ACKED)
        self._incoming.remove(one)
        self.channel.say("acked", transfer=one.transfer_id)

    def _ended(self, one: IncomingTransfer, reason: str) -> None:
        """The sender sends no more chunks of it, and what was on its way has landed."""
        self._incoming.remove(one)
        self._give_back(one)
        if not one.refused:
            self._move(one, TransferState.ABORTED)
            log.info("transfer aborted: %s", reason, extra={"lane": self.lane_id, "transfer": one.transfer_id})
        self.channel.say("ended", transfer=one.transfer_id)

    # ---- both ------------------------------------------------------------------------------------------------------------------

    def _refuse(self, one: IncomingTransfer, error: SparseVilaError, state: TransferState = TransferState.FAILED) -> None:
        with one.lock:
            if one.refused or one.ended:
                return
            one.refused = True
        # A damaged transfer may be offered again; everything else is the last word on it.
        self._move(one, TransferState.RESERVED if isinstance(error, DataLoss) else state)
        try:
            self.channel.say("refused", transfer=one.transfer_id, failure=to_failure(error))
        except LaneLost as lost:
            self.fail(lost)

    def _give_back(self, one: IncomingTransfer) -> None:
        with one.lock:
            one.ended = True
            extent, one.extent = one.extent, None
        if extent is not None:
            self._landing.cancel(extent)

    def _move(self, one: IncomingTransfer, state: TransferState) -> None:
        one.state = state
        self._desk.moved(self, one.transfer_id, state)
