"""The sending end of a lane: all that one worker sends to one receiver by one kind of link, over one connection after the other.

owner thread    dials, sends, and takes every event from one queue; it never waits for the peer but while it dials
reader thread   one per connection: receives messages and queues them
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import Cancelled, Internal, LaneLost, SparseVilaError, TooLarge, from_failure
from sparsevila_cluster.transport.channel import Channel, Message
from sparsevila_cluster.transport.link import MAX_MESSAGE_BYTES, Link
from sparsevila_cluster.transport.manifest import VERSION
from sparsevila_cluster.transport.outgoing_transfer import OutgoingTransfer
from sparsevila_cluster.transport.transfer_attempt import TransferAttempt

log = logging.getLogger(__name__)
DEVICE_POLL_S = 0.001
JOIN_S = 1.0
BYE_S = 0.25
MAX_MANIFEST_BYTES = MAX_MESSAGE_BYTES - 64 * 1024  # an offer says a little more

Dial = Callable[[str], Link]  # lane id -> link; raises LaneLost


class SendLaneListener(Protocol):
    """Who is told what becomes of transfers. Called in the lane's owner thread."""

    def broken(self, lane: SendLane, transfer: OutgoingTransfer, error: SparseVilaError) -> None:
        """No connection, or the one that it was on is lost: send it another way, or fail it."""

    def refused(self, transfer: OutgoingTransfer, error: SparseVilaError) -> bool:
        """Whether to offer it again once the receiver has ended it; else it has failed."""

    def acked(self, transfer: OutgoingTransfer, num_bytes: int, transfer_s: float, kind: str, epoch: int) -> None:
        """It is resident over there."""

    def ended(self, transfer: OutgoingTransfer, error: SparseVilaError) -> None:
        """It has failed."""

    def sent(self, num_bytes: int, kind: str) -> None:
        """Bytes of KV left."""

    def connections_changed(self, by: int) -> None:
        """A connection was built (+1) or closed (-1)."""

    def expired(self) -> None:
        """A transfer was given up because the receiver fell silent."""


class LaneConnection:
    """One epoch of a lane."""

    def __init__(self, link: Link, lane_id: str, epoch: int):
        self.link, self.lane_id, self.epoch = link, lane_id, epoch
        self.channel = Channel(link)
        self.attempts: dict[str, TransferAttempt] = {}
        self.reader: threading.Thread | None = None


class SendLane:
    """Owns its thread, its connection, and the attempts on it. `submit`, `wake` and `close` may be called from any thread."""

    def __init__(
        self, worker: str, address: ReceiverAddress, kind: str, config: TransportConfig, dial: Dial, listener: SendLaneListener
    ):
        """worker: whose lane this is; address: of the receiver."""
        self.worker, self.address, self.kind = worker, address, kind
        self.used_s = time.monotonic()
        self.epoch = 0
        self._config, self._dial, self._listener = config, dial, listener
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._awake = threading.Event()
        self._connection: LaneConnection | None = None
        self._waiting: list[OutgoingTransfer] = []
        self._closed = False
        self._beat_at_s = 0.0
        self._thread = threading.Thread(target=self._run, name=f"send-lane-{address.worker}", daemon=True)
        self._thread.start()

    def submit(self, transfer: OutgoingTransfer) -> None:
        """Send it as its rows become final."""
        self.used_s = time.monotonic()
        transfer.wake = self.wake
        self._events.put(lambda: self._waiting.append(transfer))

    def connect(self) -> threading.Event:
        """Have a connection ready; the event is set once there is one, or none to be had."""
        tried = threading.Event()

        def build() -> None:
            try:
                self._connected()
            except SparseVilaError as error:
                log.info("no lane: %s", error, extra={"receiver": self.address.worker})
            tried.set()

        self._events.put(build)
        return tried

    def wake(self) -> None:
        """Look again at what may be sent."""
        if not self._awake.is_set():
            self._awake.set()
            self._events.put(None)

    @property
    def is_up(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    @property
    def idle(self) -> bool:
        """Whether nothing is being sent or waits to be."""
        connection = self._connection
        return not self._waiting and not (connection and connection.attempts) and self._events.empty()

    def close(self) -> None:
        """Fail what is under way and close the connection. Idempotent."""
        self._closed = True
        self._events.put(None)
        self._thread.join(self._config.op_timeout_s)

    def info(self) -> dict[str, Any]:
        """Plain data."""
        connection = self._connection
        transfers = list(connection.attempts) if connection else []
        facts = {"epoch": self.epoch, "up": connection is not None, "transfers": transfers}
        return {"receiver": self.address.worker, "kind": self.kind, **facts}

    # ---- the owner thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            try:
                self._wait_for_event()
                self._offer_waiting()
                while self._pump():
                    self._take_events()
                self._look_after()
            except SparseVilaError as error:
                self._lose(self._connection, error)
            except Exception as error:
                log.exception("send lane failed", extra={"receiver": self.address.worker})
                self._lose(self._connection, Internal(f"{type(error).__name__}: {error}"))
        self._take_events()
        attempts = self._connection.attempts.values() if self._connection else ()
        for transfer in [*self._waiting, *(attempt.transfer for attempt in attempts)]:
            self._listener.ended(transfer, Cancelled(f"{self.worker} is closing"))
        self._disconnect(self._connection)

    def _wait_for_event(self) -> None:
        connection = self._connection
        wait_s = max(0.0, self._beat_at_s - time.monotonic()) if connection else self._config.beat_s
        if connection and any(a.transfer.waits_for_device and a.sent < a.granted for a in connection.attempts.values()):
            wait_s = min(wait_s, DEVICE_POLL_S)
        try:
            event = self._events.get(timeout=wait_s)
        except queue.Empty:
            return
        self._act(event)
        self._take_events()

    def _take_events(self) -> None:
        while True:
            try:
                self._act(self._events.get_nowait())
            except queue.Empty:
                return

    def _act(self, event: Callable[[], None] | None) -> None:
        if event is None:
            self._awake.clear()
        else:
            event()

    def _connected(self) -> LaneConnection:
        """The connection, dialed if there is none. Raises LaneLost, or what the receiver refused it with."""
        if self._connection is not None:
            return self._connection
        self.epoch += 1
        lane_id = secrets.token_hex(8)
        try:
            link = self._dial(lane_id)
        except SparseVilaError:
            raise
        except Exception as error:
            log.exception("dialing failed", extra={"receiver": self.address.worker})
            raise Internal(f"{type(error).__name__}: {error}") from error
        connection = LaneConnection(link, lane_id, self.epoch)
        channel = connection.channel
        try:
            hello = {"lane": lane_id, "worker": self.worker, "epoch": self.epoch, "token": self.address.token, "version": VERSION}
            channel.send("hello", **hello)
            reply = channel.receive(self._config.dial_timeout_s)
            while reply.name == "beat":
                reply = channel.receive(self._config.dial_timeout_s)
            if reply.name != "welcome":
                raise _closed_because(reply)
        except SparseVilaError:
            link.close()
            raise
        self._connection = connection
        self._beat_at_s = time.monotonic() + self._config.beat_s
        self._listener.connections_changed(+1)
        connection.reader = threading.Thread(
            target=self._read, args=(connection,), name=f"send-lane-reader-{self.address.worker}", daemon=True
        )
        connection.reader.start()
        return connection

    def _offer_waiting(self) -> None:
        while self._waiting:
            transfer = self._waiting[0]
            if transfer.done:
                self._waiting.pop(0)
                continue
            try:
                connection = self._connected()
            except SparseVilaError as error:
                waiting, self._waiting = self._waiting, []
                for one in waiting:
                    self._listener.broken(self, one, error)
                return
            self._waiting.pop(0)
            self._offer(connection, transfer)

    def _offer(self, connection: LaneConnection, transfer: OutgoingTransfer) -> None:
        link, transfer_id = connection.link, transfer.transfer_id
        manifest = transfer.manifest if link.straight else transfer.manifest.packed_whole()
        packed = manifest.pack()
        if len(packed) > MAX_MANIFEST_BYTES:
            text = f"the manifest of {transfer_id} has {len(packed)} bytes; {MAX_MANIFEST_BYTES} may cross a lane"
            return self._listener.ended(transfer, TooLarge(text))
        home = transfer.prefix.extent.arena.k[0].device
        transfer.num_attempts += 1
        attempt = connection.attempts[transfer_id] = TransferAttempt(transfer, manifest, link.device_for(home))
        number = transfer.num_attempts
        connection.channel.send("offer", transfer=transfer_id, key=transfer.prefix.key, attempt=number, manifest=packed)
        attempt.offered_s = time.monotonic()

    def _pump(self) -> bool:
        """Send at most one chunk of every transfer, so that none waits for another one's last. True if one was sent."""
        connection, sent = self._connection, False
        for attempt in list(connection.attempts.values()) if connection else ():
            assert connection is not None
            if attempt.transfer.done and not attempt.ending:
                self._end(connection, attempt, "no longer wanted")
            elif attempt.next_is_ready:
                self._send(connection, attempt)
                sent = True
            elif attempt.sent == len(attempt.manifest.chunks) and not attempt.committed and not attempt.ending:
                attempt.committed = True
                connection.channel.send("commit", transfer=attempt.transfer.transfer_id)
        return sent

    def _send(self, connection: LaneConnection, attempt: TransferAttempt) -> None:
        index, chunk = attempt.sent, attempt.manifest.chunks[attempt.sent]
        parts = attempt.buffers.gather(chunk)
        sizes = [part.numel() for part in parts]
        # What the other side will have posted; more would abort its process.
        assert sizes == attempt.buffers.sizes(chunk), (sizes, chunk)
        transfer_id = attempt.transfer.transfer_id
        connection.channel.send("chunk", transfer=transfer_id, index=index)
        with attempt.buffers.own_stream():
            attempt.under_way.append((connection.link.send_bulk(parts), parts))
            if attempt.manifest.checksum:  # computed while the chunk is on its way
                checksum = attempt.checksum_of(chunk, parts)
                connection.channel.send("sum", transfer=transfer_id, index=index, checksum=checksum)
        attempt.sent += 1
        attempt.num_bytes += sum(sizes)
        self._listener.sent(sum(sizes), self.kind)

    def _look_after(self) -> None:
        """Heartbeats, leases."""
        now_s = time.monotonic()
        connection = self._connection
        if connection is None or now_s < self._beat_at_s:
            return
        self._beat_at_s = now_s + self._config.beat_s
        connection.channel.send("beat", transfers=[key for key, one in connection.attempts.items() if not one.ending])
        for attempt in list(connection.attempts.values()):
            if now_s - attempt.heard_s > self._config.lease_s:
                self._listener.expired()
                raise LaneLost(
                    f"nothing was heard of transfer {attempt.transfer.transfer_id} for {self._config.lease_s:g} s",
                    self.address.worker,
                )
            if now_s > attempt.transfer.until_s:
                attempt.transfer.overdue()

    # ---- replies ----------------------------------------------------------------------------------------------------------------

    def _read(self, connection: LaneConnection) -> None:
        try:
            while True:
                message = connection.channel.receive(self._config.silence_s)
                self._events.put(lambda message=message: self._receive(connection, message))  # type: ignore[misc]
                if message.name == "bye":
                    return
        except SparseVilaError as error:
            lost = error
            self._events.put(lambda: self._lose(connection, lost))

    def _receive(self, connection: LaneConnection, message: Message) -> None:
        if connection is not self._connection:
            return  # of an older epoch
        if message.name == "bye":
            return self._lose(connection, _closed_because(message))
        if message.name == "beat":
            for transfer_id in message.body["transfers"]:
                if transfer_id in connection.attempts:
                    connection.attempts[transfer_id].heard_s = time.monotonic()
            return
        attempt = connection.attempts.get(message.body.get("transfer", ""))
        if attempt is None:
            return  # it ended meanwhile
        attempt.heard_s = time.monotonic()
        if message.name == "grant":
            attempt.grant(message.body["upto"], message.body["landed"])
        elif message.name == "refused":
            self._refused(connection, attempt, from_failure(message.body["failure"]))
        elif message.name == "acked":
            if attempt.sent and not attempt.committed:  # before anything was sent: it is resident since an earlier attempt
                raise LaneLost(f"transfer {attempt.transfer.transfer_id} was acknowledged in mid-transfer", self.address.worker)
            del connection.attempts[attempt.transfer.transfer_id]
            seconds = time.monotonic() - attempt.offered_s
            self._listener.acked(attempt.transfer, attempt.num_bytes, seconds, self.kind, connection.epoch)
        elif message.name == "ended":
            if not attempt.ending:
                raise LaneLost(f"transfer {attempt.transfer.transfer_id} was ended by nobody here", self.address.worker)
            del connection.attempts[attempt.transfer.transfer_id]
            if attempt.again:
                self._waiting.append(attempt.transfer)
        else:
            raise LaneLost(f"a receiver does not send {message.name!r}", self.address.worker)

    def _refused(self, connection: LaneConnection, attempt: TransferAttempt, error: SparseVilaError) -> None:
        if not attempt.ending:
            attempt.again = self._listener.refused(attempt.transfer, error)
            self._end(connection, attempt, "refused")

    def _end(self, connection: LaneConnection, attempt: TransferAttempt, reason: str) -> None:
        attempt.ending = True
        reason = attempt.transfer.aborted or reason
        connection.channel.send("abort", transfer=attempt.transfer.transfer_id, reason=reason)

    def _lose(self, connection: LaneConnection | None, error: SparseVilaError) -> None:
        """The connection is gone: what was on it goes on elsewhere, or fails."""
        if connection is None or connection is not self._connection:
            return
        self._disconnect(connection, error)
        for attempt in connection.attempts.values():
            if not attempt.transfer.done:
                self._listener.broken(self, attempt.transfer, error)

    def _disconnect(self, connection: LaneConnection | None, error: SparseVilaError | None = None) -> None:
        if connection is None:
            return
        self._connection = None
        try:
            connection.channel.send("bye", failure=None)
            if error is None and connection.reader is not None:
                connection.reader.join(BYE_S)  # until the receiver has said bye as well: it has read everything then
        except LaneLost:
            pass
        connection.link.close()
        if connection.reader is not None:
            connection.reader.join(JOIN_S)
        self._listener.connections_changed(-1)
        if error is not None:
            transfers = list(connection.attempts)
            facts = {"receiver": self.address.worker, "epoch": connection.epoch, "transfers": transfers}
            level = logging.WARNING if transfers else logging.INFO
            log.log(level, "lane lost: %s", error, extra={"lane": connection.lane_id, **facts})


def _closed_because(message: Message) -> SparseVilaError:
    """Why the receiver closed a connection."""
    failure = message.body.get("failure")
    error = from_failure(failure) if failure else LaneLost("closed by the receiver")
    return error if not isinstance(error, Internal) else LaneLost(str(error))
