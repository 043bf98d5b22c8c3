"""A receiver or a sender in a process of its own, told what to do through a pipe.

A receiver holds allocations up when told so; a sender writes as many rows as it is told.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import SparseVilaError
from sparsevila_cluster.transport import KVReceiver, KVSender, TransferTicket, handshake
from tests.processes import stop
from tests.transport.transport_fixtures import SPEC, StoreSink, make_prefix, rows_equal

SHORT = {"beat_s": 0.1, "silence_s": 2.0, "op_timeout_s": 3.0, "dial_timeout_s": 3.0, "lease_s": 30.0}
# torch is imported once, by a server that forks every peer: they begin at once, and each can be killed alone.
PROCESSES = multiprocessing.get_context("forkserver")


class Peer:
    """The other process, from outside."""

    def __init__(self, role: str, port: int = 0):
        PROCESSES.set_forkserver_preload(["tests.transport.peer_process"])
        self._pipe, theirs = PROCESSES.Pipe()
        work = {"receiver": run_receiver, "sender": run_sender}[role]
        self.process = PROCESSES.Process(target=work, args=(theirs, port), daemon=True)
        self.process.start()
        theirs.close()
        self.hello = self.read()

    def tell(self, **order: Any) -> None:
        self._pipe.send(order)

    def read(self) -> Any:
        assert self._pipe.poll(30), "the peer says nothing"
        return self._pipe.recv()

    def ask(self, **order: Any) -> Any:
        self.tell(**order)
        return self.read()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        if number == signal.SIGSTOP:
            stop(self.process.pid)
        else:
            os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.join(10)
        self._pipe.close()


def run_receiver(pipe: Connection, port: int) -> None:
    if port:  # the address of one that died
        create = handshake.socket.create_server
        handshake.socket.create_server = lambda address, **more: create((address[0], port), **more)
    prefix_sink = StoreSink(100_000)
    receiver = KVReceiver("decode-0", prefix_sink, SPEC, TransportConfig(kind="gloo", **SHORT))
    pipe.send({"address": receiver.address})
    while True:
        order = pipe.recv()
        what = order.pop("what")
        if what == "expect":
            receiver.expect(order["transfer_id"], order["key"], 30.0)
            pipe.send(True)
        elif what == "hold":
            prefix_sink.gate.clear()
            pipe.send(True)
        elif what == "used_bytes":
            pipe.send(prefix_sink.used_bytes)
        elif what == "compare":
            came = prefix_sink.store.get(order["key"])
            pipe.send(came is not None and rows_equal(make_prefix(order["key"], order["length"], order["seed"]), came))


def run_sender(pipe: Connection, port: int) -> None:
    sender = KVSender("prefill-0", TransportConfig(kind="gloo", **SHORT))
    pipe.send("ready")

    def finish(transfer: Any) -> None:
        try:
            pipe.send(transfer.finish(20.0))
        except SparseVilaError as error:
            pipe.send(type(error).__name__)

    while True:
        order = pipe.recv()
        prefix = make_prefix(order["key"], order["length"], order["seed"])
        transfer = sender.begin(prefix, order["bounds"], TransferTicket(order["transfer_id"], order["address"], 20.0))
        for layer in range(SPEC.num_layers):
            transfer.wrote(layer, 0, order["rows"])
        threading.Thread(target=partial(finish, transfer), daemon=True).start()
