"""A transfer that nobody waits for any more is aborted, and its rows are released once."""

import asyncio

import pytest

from sparsevila_cluster.cluster.workers.transfer_tasks import TransferTasks
from sparsevila_cluster.core.errors import DeadlineExceeded
from sparsevila_cluster.transport import TransferState
from tests.transport.transport_fixtures import Pair, make_prefix, until


@pytest.fixture
def pair():
    one = Pair("inproc")
    yield one
    one.close()


@pytest.mark.parametrize("how", ["cancelled", "overdue", "late thread"])
def test_a_transfer_that_nobody_waits_for_is_aborted(pair, how, monkeypatch):
    """Half of its rows are never written; its ticket would let it go on for a minute."""
    released = []
    if how == "late thread":  # the one that waits does not get to its deadline
        monkeypatch.setattr("sparsevila_cluster.cluster.workers.transfer_tasks.GRACE_S", -0.1)

    async def main():
        tasks = TransferTasks("prefill-0", pair.sender, 1.0)
        prefix = make_prefix()
        ticket = pair.ticket("a", deadline_s=60.0)
        transfer = pair.sender.begin(prefix, (0, 700, 1500), ticket)
        await asyncio.to_thread(until, lambda: pair.receiver.state(ticket.transfer_id) is TransferState.GRANTED, "it is under way")
        within_s = {"cancelled": 30.0, "overdue": 0.2, "late thread": 0.2}[how]
        task = asyncio.ensure_future(tasks.finish(transfer, ticket, within_s, lambda: released.append(1)))
        await asyncio.sleep(0.05)  # until a thread waits for it
        if how == "cancelled":
            task.cancel()
        with pytest.raises((asyncio.CancelledError, DeadlineExceeded)):
            await task
        await asyncio.to_thread(
            until, lambda: pair.receiver.state(ticket.transfer_id) is TransferState.ABORTED, "it is aborted", 5.0
        )
        await asyncio.to_thread(until, lambda: released == [1], "its rows are released", 5.0)
        pair.settle()
        assert tasks.close(5.0) and released == [1]

    asyncio.run(main())
