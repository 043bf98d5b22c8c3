"""Workers without models that keep the workers' promises, for tests of the router, and a cluster made of them.

An answer is a pure function of the media, of everything said before, and of the pressure under which it began, so a turn that goes
on elsewhere with the wrong history, the wrong beginning or the wrong pressure gives other tokens. Every byte reserved has an owner.
"""

import asyncio
import hashlib
from collections import Counter
from dataclasses import replace

from sparsevila_cluster.cluster.messages import ConversationJournal, Load, WorkerReport, turn_identities
from sparsevila_cluster.core.errors import BadMedia, BadRequest, Cancelled, LaneLost, NotFound, QueueFull
from sparsevila_cluster.core.requests import FinishReason, MediaHandle, TurnEvent, TurnRecord, Usage

KV_BYTES = 100


def answer_tokens(media_id, records, question, brownout, num):
    """The right answer: `num` token ids."""
    past = [(record.turn.question, record.token_ids) for record in records]
    seed = repr((media_id, past, question, brownout)).encode()
    return tuple(hashlib.blake2b(seed + bytes([i])).digest()[0] for i in range(num))


def conversation(media_id, questions, num, brownout=0.0):
    """The right answers to questions that are asked one after the other."""
    records = []
    for question in questions:
        turn = type("Asked", (), {"question": question})
        records.append(TurnRecord(turn, answer_tokens(media_id, records, question, brownout, num), brownout))
    return [record.token_ids for record in records]


class Breakpoints:
    """Holds what passes a named point until it is let through, or makes it fail: `errors[point]` are raised one by one.

    pace_s: what it takes to pass any point.
    """

    pace_s = 0.0

    def __init__(self):
        self.errors, self._held, self._reached = {}, {}, {}

    def hold(self, point):
        self._held[point] = asyncio.Event()
        self._reached[point] = asyncio.Event()

    def free(self, point):
        self._held.pop(point).set()

    async def reached(self, point):
        await asyncio.wait_for(self._reached[point].wait(), 5)

    async def passes(self, point):
        await asyncio.sleep(self.pace_s)
        if self.errors.get(point):
            raise self.errors[point].pop(0)
        if point in self._held:
            self._reached[point].set()
            await self._held[point].wait()


class ScriptedPrefill:
    """Makes media whose bytes say anything but "bad". Keeps a copy of each; sends to workers that it reaches in `lanes`."""

    def __init__(self, name, lanes):
        self.name, self._lanes = name, lanes
        self.copies, self.breakpoints = {}, Breakpoints()
        self.num_encoded = self.num_making = self.num_cancelled = 0

    async def key_of(self, request):
        await self.breakpoints.passes("key_of")
        keep = 0.25 if request.prune_keep is None else request.prune_keep
        return hashlib.blake2b(repr((request.sources, keep, request.tenant)).encode(), digest_size=32).hexdigest()

    async def make(self, request, key, ticket):
        self.num_making += 1
        try:
            await self.breakpoints.passes("make")
            if key in self.copies:
                await self._send(self.copies[key], ticket)
                yield "made", replace(self.copies[key], reused=True, ms={}), {"bytes": KV_BYTES}
                return
            if any(source.data == b"bad" for source in request.sources):
                raise BadMedia("no frame in it")
            yield "progress", "decode", 0, 1
            await self.breakpoints.passes("encode")
            self.num_encoded += 1
            yield "progress", "prefill", 0, 1
            facts = {"tenant": request.tenant, "ms": {"encode": 1.0}}
            handle = MediaHandle(key, "video", 8, 4.0, 100, 25, 30, KV_BYTES, 4 * KV_BYTES, **facts)
            self.copies[key] = handle
            yield "progress", "prefill", 1, 1
            await self._send(handle, ticket)
            yield "made", handle, {"bytes": KV_BYTES}
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_making -= 1

    async def ship(self, key, ticket):
        await self.breakpoints.passes("ship")
        if key not in self.copies:
            raise NotFound(f"no copy of {key}")
        await self._send(self.copies[key], ticket)
        return {"bytes": KV_BYTES}

    async def _send(self, handle, ticket):
        await self.breakpoints.passes("send")
        if ticket.receiver not in self._lanes:
            raise LaneLost(f"the lane to {ticket.receiver} broke")
        await self._lanes[ticket.receiver].land(handle, ticket.transfer_id)

    def drop(self, key):
        return self.copies.pop(key, None) is not None

    def info(self):
        lanes = [{"to": name} for name in self._lanes]
        return {"prefills": self.num_encoded, "copies": list(self.copies), "lanes": lanes}

    def report(self, full):
        return WorkerReport(self.name, "prefill", load=Load(num_running=self.num_making), residents=tuple(self.copies.values()))


class ScriptedDecode:
    def __init__(self, name, lanes, budget_bytes=10 * KV_BYTES):
        self.name, self._lanes, self.budget_bytes = name, lanes, budget_bytes
        self.residents, self.reserved, self.chats, self.running = {}, {}, {}, {}
        self.breakpoints, self.brownout, self.num_answered, self.num_replayed = Breakpoints(), 0.0, 0, 0
        self.num_tokens_sent = Counter()
        self.owners = Counter()

    async def reserve(self, transfer_id, key, num_bytes, lease_s):
        await self.breakpoints.passes("reserve")
        if len(self.reserved) * KV_BYTES >= self.budget_bytes:
            raise QueueFull("no room", 0.5)
        assert lease_s > 0
        self.reserved[transfer_id] = key
        return self.name

    def release(self, transfer_id):
        return self.reserved.pop(transfer_id, None) is not None

    async def land(self, handle, transfer_id):
        await self.breakpoints.passes("land")
        if self.reserved.get(transfer_id) != handle.media_id:
            raise NotFound(f"transfer {transfer_id} is not expected")
        del self.reserved[transfer_id]
        self.residents[handle.media_id] = replace(handle, reused=False, ms={})

    def media(self, key):
        return self.residents.get(key)

    async def ship(self, key, ticket):
        if key not in self.residents:
            raise NotFound(f"no prefix {key}")
        await self._lanes[ticket.receiver].land(self.residents[key], ticket.transfer_id)
        return {"bytes": KV_BYTES}

    async def ask(self, turn, history):
        await self.breakpoints.passes("ask")
        if turn.turn_id in self.running:
            raise BadRequest(f"turn_id {turn.turn_id!r} is already in use")
        if turn.media_id not in self.residents:
            raise NotFound(f"media {turn.media_id!r} is not resident; prepare it first")
        chat = self.chats.get(turn.conversation_id, [])
        if chat and chat[0].turn.tenant not in ("", turn.tenant):
            raise NotFound(f"conversation {turn.conversation_id!r} is unknown")
        if chat and chat[0].turn.media_id != turn.media_id:
            raise BadRequest(f"conversation {turn.conversation_id!r} is about another media")
        if history is not None and (len(chat) != turn.after or turn_identities(chat) != turn_identities(history)):
            chat = self.chats[turn.conversation_id] = list(history)
            self.num_replayed += bool(history)
        if turn.after is not None and len(chat) != turn.after:
            raise NotFound(f"conversation {turn.conversation_id!r} has {len(chat)} turns, not {turn.after}")
        ended = self.running[turn.turn_id] = asyncio.get_running_loop().create_future()
        self.owners[turn.owner] += 1
        try:
            yield [TurnEvent("accepted", turn.turn_id, conversation_id=turn.conversation_id)]
            known = turn.replay.token_ids if turn.replay is not None else ()
            brownout = turn.replay.brownout if turn.replay is not None else self.brownout
            answer = answer_tokens(turn.media_id, chat, turn.question, brownout, turn.sampling.max_tokens)
            assert answer[: len(known)] == known, "a replay of tokens that were never sent"
            if turn.want_evidence:
                yield [TurnEvent("evidence", turn.turn_id)]
            for index in range(len(known), len(answer)):
                await _either(self.breakpoints.passes(f"token {index}"), ended)
                self.num_tokens_sent[turn.turn_id] += 1
                text = f"{answer[index]} "
                yield [TurnEvent("token", turn.turn_id, index, (answer[index],), text, brownout=brownout)]
            await _either(self.breakpoints.passes("done"), ended)
            asked = replace(turn, replay=None, after=None, deadline_s=None)
            self.chats[turn.conversation_id] = [*chat, TurnRecord(asked, answer, brownout)]
            self.num_answered += 1
            usage = Usage(100, 25, 5, 30, len(answer), 0.2, brownout=brownout)
            yield [TurnEvent("done", turn.turn_id, len(answer), finish_reason=FinishReason.LENGTH, usage=usage)]
        finally:
            if self.running.get(turn.turn_id) is ended:
                del self.running[turn.turn_id]
            ended.cancel()

    def abort(self, turn_id):
        ended = self.running.pop(turn_id, None)  # at once, whether anybody reads its stream or not
        if ended is not None:
            ended.set_exception(Cancelled(f"turn {turn_id} was aborted"))
            ended.exception()  # nobody may be listening
        return ended is not None

    def close_conversation(self, conversation_id, tenant=None):
        chat = self.chats.get(conversation_id, [])
        if chat and tenant is not None and chat[0].turn.tenant not in ("", tenant):
            return False
        return self.chats.pop(conversation_id, None) is not None

    def drop(self, key):
        return self.residents.pop(key, None) is not None

    def set_brownout(self, level):
        self.brownout = level

    def info(self):
        return {"brownout": self.brownout, "residents": list(self.residents), "lanes": []}

    def report(self, full):
        used = (len(self.residents) + len(self.reserved)) * KV_BYTES
        load = Load(len(self.running), prefix_bytes=used, prefix_budget_bytes=self.budget_bytes)
        records = None
        if full:
            records = tuple(
                ConversationJournal(name, chat[0].turn.media_id, tuple(chat)) for name, chat in self.chats.items() if chat
            )
        residents = tuple(self.residents.values())
        owners = frozenset(self.owners)
        return WorkerReport(self.name, "decode", address=self.name, load=load, residents=residents, records=records, owners=owners)


async def _either(work, ended):
    """`work`, unless the turn is ended from outside before."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        await task
    finally:
        task.cancel()
