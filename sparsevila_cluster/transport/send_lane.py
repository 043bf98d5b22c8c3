"""The sending end: a route is all the sending of one worker to one dock by one kind, over one lane after the other.

Knows: dialing, grants, which chunk goes next, what to do with replies. Does not know: which rung of the ladder comes after a lane
that broke (the shipper's decision), or how links work.

    owner thread    dials, sends, and takes every event from one queue; it never waits for the peer but while it dials
    reader thread   one per lane: hears messages and queues them
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import Cancelled, Internal, LaneLost, SparseVilaError, from_failure
from sparsevila_cluster.transport.link import Link, ReceiverAddress
from sparsevila_cluster.transport.manifest import VERSION
from sparsevila_cluster.transport.messages import Message
from sparsevila_cluster.transport.outgoing_transfer import OutgoingTransfer
from sparsevila_cluster.transport.transfer_attempt import AttemptListener, Lane, TransferAttempt

log = logging.getLogger(__name__)
DEVICE_POLL_S = 0.001
JOIN_S = 1.0
BYE_S = 0.25

Dial = Callable[[str], Link]  # lane id -> link; raises LaneLost


class SendRoute:
    """Owns its thread, its lane, and the attempts on it. `submit`, `wake` and `close` may be called from any thread."""

    def __init__(
        self, worker: str, address: ReceiverAddress, kind: str, config: TransportConfig, dial: Dial, told: AttemptListener
    ):
        self.worker, self.address, self.kind = worker, address, kind
        self.used_s = time.monotonic()
        self.epoch = 0
        self._config, self._dial_link, self._told = config, dial, told
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._awake = threading.Event()
        self._lane: Lane | None = None
        self._waiting: list[OutgoingTransfer] = []
        self._closed = False
        self._beat_at_s = 0.0
        self._thread = threading.Thread(target=self._run, name=f"route-{address.worker}", daemon=True)
        self._thread.start()

    def submit(self, shipment: OutgoingTransfer) -> None:
        self.used_s = time.monotonic()
        shipment.wake = self.wake
        self._events.put(lambda: self._waiting.append(shipment))

    def warm(self) -> threading.Event:
        """Have a lane ready; the event is set once there is one, or none to be had."""
        tried = threading.Event()

        def build() -> None:
            try:
                self._stand()
            except SparseVilaError as error:
                log.info("no lane: %s", error, extra={"dock": self.address.worker})
            tried.set()

        self._events.put(build)
        return tried

    def wake(self) -> None:
        """Look again at what may be sent."""
        if not self._awake.is_set():
            self._awake.set()
            self._events.put(None)

    @property
    def stands(self) -> bool:
        return self._lane is not None

    @property
    def idle(self) -> bool:
        lane = self._lane
        return not self._waiting and not (lane and lane.attempts) and self._events.empty()

    def close(self) -> None:
        """Fail what is under way, say goodbye. Idempotent."""
        self._closed = True
        self._events.put(None)
        self._thread.join(self._config.op_timeout_s)

    def info(self) -> dict[str, Any]:
        lane = self._lane
        transfers = list(lane.attempts) if lane else []
        return {"dock": self.address.worker, "kind": self.kind, "epoch": self.epoch, "up": lane is not None, "transfers": transfers}

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
                self._lose(self._lane, error)
            except Exception as error:
                log.exception("a route", extra={"dock": self.address.worker})
                self._lose(self._lane, Internal(f"{type(error).__name__}: {error}"))
        self._take_events()
        for shipment in [*self._waiting, *(a.shipment for a in (self._lane.attempts.values() if self._lane else ()))]:
            self._told.ended(shipment, Cancelled(f"{self.worker} is closing"))
        self._part(self._lane)

    def _wait_for_event(self) -> None:
        lane = self._lane
        wait_s = max(0.0, self._beat_at_s - time.monotonic()) if lane else self._config.beat_s
        if lane and any(a.shipment.waits_for_device and a.sent < a.granted for a in lane.attempts.values()):
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

    def _stand(self) -> Lane:
        """The lane, dialed if there is none. Raises LaneLost, or what the dock refused it with."""
        if self._lane is not None:
            return self._lane
        self.epoch += 1
        lane_id = secrets.token_hex(8)
        link = self._dial_link(lane_id)
        lane = Lane(link, lane_id, self.epoch)
        try:
            hello = {"lane": lane_id, "worker": self.worker, "epoch": self.epoch, "token": self.address.token, "version": VERSION}
            lane.channel.say("hello", **hello)
            reply = lane.channel.hear(self._config.dial_timeout_s)
            while reply.name == "beat":
                reply = lane.channel.hear(self._config.dial_timeout_s)
            if reply.name != "welcome":
                raise _parting(reply)
        except SparseVilaError:
            link.close()
            raise
        self._lane = lane
        self._beat_at_s = time.monotonic() + self._config.beat_s
        self._told.lanes(+1)
        lane.reader = threading.Thread(target=self._read, args=(lane,), name=f"lane-{self.address.worker}", daemon=True)
        lane.reader.start()
        return lane

    def _offer_waiting(self) -> None:
        while self._waiting:
            shipment = self._waiting[0]
            if shipment.done:
                self._waiting.pop(0)
                continue
            try:
                lane = self._stand()
            except SparseVilaError as error:
                waiting, self._waiting = self._waiting, []
                for one in waiting:
                    self._told.broken(self, one, error)
                return
            self._waiting.pop(0)
            self._offer(lane, shipment)

    def _offer(self, lane: Lane, shipment: OutgoingTransfer) -> None:
        manifest = shipment.manifest if lane.link.straight else shipment.manifest.packed_whole()
        home = shipment.prefix.extent.arena.k[0].device
        shipment.num_attempts += 1
        attempt = lane.attempts[shipment.transfer_id] = TransferAttempt(shipment, manifest, lane.link.device_for(home))
        number, packed = shipment.num_attempts, manifest.pack()
        lane.channel.say("offer", transfer=shipment.transfer_id, key=manifest.metadata.key, attempt=number, manifest=packed)
        attempt.offered_s = time.monotonic()

    def _pump(self) -> bool:
        """Send at most one chunk of every transfer, so that none waits for another one's last. True if one was sent."""
        lane, sent = self._lane, False
        for attempt in list(lane.attempts.values()) if lane else ():
            assert lane is not None
            if attempt.shipment.done and not attempt.ending:
                self._end(lane, attempt, "no longer wanted")
            elif attempt.next_is_ready:
                self._send(lane, attempt)
                sent = True
            elif attempt.sent == len(attempt.manifest.chunks) and not attempt.committed and not attempt.ending:
                attempt.committed = True
                lane.channel.say("commit", transfer=attempt.shipment.transfer_id)
        return sent

    def _send(self, lane: Lane, attempt: TransferAttempt) -> None:
        index, chunk = attempt.sent, attempt.manifest.chunks[attempt.sent]
        parts = attempt.cargo.gather(chunk)
        sizes = [part.numel() for part in parts]
        # What the other side will have posted; more would abort its process.
        assert sizes == attempt.cargo.sizes(chunk), (sizes, chunk)
        transfer = attempt.shipment.transfer_id
        lane.channel.say("chunk", transfer=transfer, index=index)
        with attempt.cargo.aside():
            attempt.under_way.append((lane.link.ship(parts), parts))
            if attempt.manifest.checksum:  # reckoned while the chunk is on its way
                lane.channel.say("sum", transfer=transfer, index=index, checksum=attempt.sum_of(chunk, parts))
        attempt.sent += 1
        attempt.num_bytes += sum(sizes)
        self._told.sent(sum(sizes), self.kind)

    def _look_after(self) -> None:
        """Beats, leases."""
        now_s = time.monotonic()
        lane = self._lane
        if lane is None or now_s < self._beat_at_s:
            return
        self._beat_at_s = now_s + self._config.beat_s
        lane.channel.say("beat", transfers=[key for key, one in lane.attempts.items() if not one.ending])
        for attempt in list(lane.attempts.values()):
            if now_s - attempt.heard_s > self._config.lease_s:
                self._told.expired()
                raise LaneLost(f"nothing was heard of transfer {attempt.shipment.transfer_id} for {self._config.lease_s:g} s")
            if now_s > attempt.shipment.until_s:
                attempt.shipment.overdue()

    # ---- replies ----------------------------------------------------------------------------------------------------------------

    def _read(self, lane: Lane) -> None:
        try:
            while True:
                message = lane.channel.hear(self._config.silence_s)
                self._events.put(lambda message=message: self._hear(lane, message))  # type: ignore[misc]
                if message.name == "bye":
                    return
        except SparseVilaError as error:
            lost = error
            self._events.put(lambda: self._lose(lane, lost))

    def _hear(self, lane: Lane, message: Message) -> None:
        if lane is not self._lane:
            return  # of an older epoch
        if message.name == "bye":
            return self._lose(lane, _parting(message))
        if message.name == "beat":
            for transfer in message.body["transfers"]:
                if transfer in lane.attempts:
                    lane.attempts[transfer].heard_s = time.monotonic()
            return
        attempt = lane.attempts.get(message.body.get("transfer", ""))
        if attempt is None:
            return  # it ended meanwhile
        attempt.heard_s = time.monotonic()
        if message.name == "grant":
            attempt.release(message.body["landed"])
            attempt.granted = max(attempt.granted, message.body["upto"])
        elif message.name == "refused":
            self._refused(lane, attempt, from_failure(message.body["failure"]))
        elif message.name == "acked":
            del lane.attempts[attempt.shipment.transfer_id]
            seconds = time.monotonic() - attempt.offered_s
            self._told.acked(attempt.shipment, attempt.num_bytes, seconds, self.kind, lane.epoch)
        elif message.name == "ended":
            del lane.attempts[attempt.shipment.transfer_id]
            if attempt.again:
                self._waiting.append(attempt.shipment)
        else:
            raise LaneLost(f"a dock does not say {message.name!r}")

    def _refused(self, lane: Lane, attempt: TransferAttempt, error: SparseVilaError) -> None:
        if not attempt.ending:
            attempt.again = self._told.refused(attempt.shipment, error)
            self._end(lane, attempt, "refused")

    def _end(self, lane: Lane, attempt: TransferAttempt, reason: str) -> None:
        attempt.ending = True
        lane.channel.say("abort", transfer=attempt.shipment.transfer_id, reason=attempt.shipment.aborted or reason)

    def _lose(self, lane: Lane | None, error: SparseVilaError) -> None:
        """The lane is gone: what was on it goes on elsewhere, or fails."""
        if lane is None or lane is not self._lane:
            return
        self._part(lane, error)
        for attempt in lane.attempts.values():
            if not attempt.shipment.done:
                self._told.broken(self, attempt.shipment, error)

    def _part(self, lane: Lane | None, error: SparseVilaError | None = None) -> None:
        if lane is None:
            return
        self._lane = None
        try:
            lane.channel.say("bye", failure=None)
            if error is None and lane.reader is not None:
                lane.reader.join(BYE_S)  # until the dock has said goodbye as well: it has read everything then
        except LaneLost:
            pass
        lane.link.close()
        if lane.reader is not None:
            lane.reader.join(JOIN_S)
        self._told.lanes(-1)
        if error is not None:
            facts = {"lane": lane.lane_id, "dock": self.address.worker, "epoch": lane.epoch, "transfers": list(lane.attempts)}
            log.log(logging.WARNING if lane.attempts else logging.INFO, "lane lost: %s", error, extra=facts)


def _parting(message: Message) -> SparseVilaError:
    """Why the dock closed a lane."""
    failure = message.body.get("failure")
    error = from_failure(failure) if failure else LaneLost("closed by the dock")
    return error if not isinstance(error, Internal) else LaneLost(str(error))
