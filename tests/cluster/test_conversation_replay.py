"""Conversations that a decode worker makes again from their text: the same tokens, the same order, nothing left behind."""

import asyncio
from dataclasses import replace

import pytest

from sparsevila_cluster.core.errors import BadRequest, Cancelled, DeadlineExceeded, NotFound
from sparsevila_cluster.core.requests import Replay
from tests.cluster import worker_fixtures
from tests.cluster.worker_fixtures import QUESTIONS, answer, events_of, prepared, request_of, tokens_of, turn_of, until


def test_a_lost_conversation_is_made_again_and_goes_on_alike(checkpoint, clips, endless):
    """On a fresh worker, on one that is behind, and on one that is ahead; a cut answer goes on at its next token."""

    async def main():
        config = worker_fixtures.config_of(checkpoint)
        async with worker_fixtures.workers(config, model=endless, decode=2) as ([prefill], [one, two]):
            handle, _ = await prepared(prefill, one, request_of(clips[0]))
            key = handle.media_id
            await prefill.ship(key, await worker_fixtures.ticket_for(two, key))
            wanted = [await answer(one, turn_of(key, question, max_tokens=12)) for question in QUESTIONS]
            (journal,) = one.report(full=True).records
            records = journal.records
            assert [record.token_ids for record in records] == wanted and journal.media_id == key

            whole = turn_of(key, QUESTIONS[2], max_tokens=12, after=2)
            with pytest.raises(NotFound, match="0 turns"):
                await answer(two, whole)
            assert await answer(two, whole, records[:2]) == wanted[2]
            assert two.sink.counts[("conversations_replayed_total",)] == 1
            told = two.report(full=True).records[0].records
            assert [(r.turn.question, r.token_ids) for r in told] == [(r.turn.question, r.token_ids) for r in records]
            # Ahead by a turn, and in the middle of an answer: the rest of it is told, from the next index on.
            cut = replace(turn_of(key, QUESTIONS[2], max_tokens=12, after=2), replay=Replay(wanted[2][:5]))
            events, _ = await events_of(two.ask(cut, records[:2]))
            assert tokens_of(events) == wanted[2][5:]
            assert [event.index for event in events if event.kind == "token"][0] == 5
            assert two.sink.counts[("conversations_replayed_total",)] == 2
            told = two.report(full=True).records[0].records
            assert [r.token_ids for r in told] == wanted
            # As it should be: nothing is made again. Nor is it for a conversation that begins.
            assert await answer(two, turn_of(key, max_tokens=3, after=3), told)
            assert await answer(two, turn_of(key, "?", "new"), ())
            assert two.sink.counts[("conversations_replayed_total",)] == 2
            assert two.sink.counts[("tokens_total", "answer")] == 12 + 7 + 3 + 6

    asyncio.run(main())


def test_turns_of_one_conversation_are_served_in_the_order_in_which_they_were_asked(checkpoint, clips, endless):
    async def main():
        config = worker_fixtures.config_of(checkpoint)
        async with worker_fixtures.workers(config, model=endless, decode=2) as ([prefill], [one, two]):
            handle, _ = await prepared(prefill, one, request_of(clips[0]))
            key = handle.media_id
            await prefill.ship(key, await worker_fixtures.ticket_for(two, key))
            lengths = 6, 60, 6  # the second is not over when the third arrives
            asked = list(zip(QUESTIONS, lengths, strict=True))
            wanted = [await answer(one, turn_of(key, question, max_tokens=most)) for question, most in asked]
            records = one.report(full=True).records[0].records
            # Both bring the history: the second must neither make it again nor overtake the first.
            turns = [turn_of(key, question, max_tokens=most) for question, most in asked[1:]]
            got = await asyncio.gather(*(answer(two, turn, records[:1]) for turn in turns))
            assert len(got[0]) == 60
            assert got == wanted[1:]
            assert two.sink.counts[("conversations_replayed_total",)] == 1

    asyncio.run(main())


def test_a_turn_never_starts_behind_one_that_its_asker_gave_up(checkpoint, clips, endless):
    """A turn is asked while the one before it, which nobody wants any more, is still under way, and comes to its end."""

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), model=endless) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            key = handle.media_id
            wanted = await answer(decode, turn_of(key, QUESTIONS[1], "d"))
            given_up = asyncio.ensure_future(answer(decode, turn_of(key, max_tokens=60)))
            await until(lambda: decode.engine.turns)
            next_one = turn_of(key, QUESTIONS[1], after=0)
            with pytest.raises(NotFound, match="1 turns behind it, not 0"):
                await answer(decode, next_one)
            await given_up
            assert await answer(decode, next_one, ()) == wanted

    asyncio.run(main())


def test_a_conversation_with_as_many_turns_but_others_is_made_again(checkpoint, clips, endless):
    """A worker that was out of reach has finished a turn that nobody heard; another one took its place elsewhere."""

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), decode=2, model=endless) as (
            [prefill],
            [one, two],
        ):
            handle, _ = await prepared(prefill, one, request_of(clips[0]))
            key = handle.media_id
            await prefill.ship(key, await worker_fixtures.ticket_for(two, key))
            wanted = [await answer(one, turn_of(key, question)) for question in QUESTIONS[:2]]
            (journal,) = one.report(full=True).records
            await answer(two, turn_of(key, QUESTIONS[2]))
            assert await answer(two, turn_of(key, QUESTIONS[1], after=1), journal.records[:1]) == wanted[1]
            told = two.report(full=True).records[0].records
            assert told[0] == journal.records[0], "it is known by another name than elsewhere"

    asyncio.run(main())


def test_a_replay_that_is_cut_leaves_nothing_behind(checkpoint, clips, endless):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), model=endless) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            key = handle.media_id
            wanted = [await answer(decode, turn_of(key, question)) for question in QUESTIONS[:2]]
            records = decode.report(full=True).records[0].records
            bad = (records[0], replace(records[1], turn=replace(records[1].turn, question="<|im_end|>")))
            with pytest.raises(BadRequest, match="im_end"):
                await answer(decode, turn_of(key, conversation="d"), bad)
            late = turn_of(key, conversation="d", deadline_s=1e-3)
            with pytest.raises(DeadlineExceeded):
                await answer(decode, late, records * 50)
            leaver = asyncio.ensure_future(answer(decode, turn_of(key, conversation="d"), records * 50))
            await until(lambda: decode.engine.conversations.get("d") is not None)
            leaver.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaver
            await until(lambda: decode.engine.conversations.get("d") is None and not decode.engine.turns)
            assert [journal.conversation_id for journal in decode.report(full=True).records] == ["c"]
            assert await answer(decode, turn_of(key, QUESTIONS[1], "d"), records[:1]) == wanted[1]

    asyncio.run(main())


def test_a_turn_that_is_asked_again_takes_the_place_of_the_one_before(checkpoint, clips, endless):
    """Its reader went away unnoticed, and comes back for the rest."""

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), model=endless) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            turn = turn_of(handle.media_id, max_tokens=40)
            wanted = await answer(decode, replace(turn, conversation_id="d"))
            stream = decode.ask(turn)
            first = await anext(stream)
            got = tokens_of(first)
            rest = await answer(decode, replace(turn, replay=Replay(got), after=0), ())
            assert got + rest == wanted
            with pytest.raises(Cancelled):
                await events_of(stream)

    asyncio.run(main())


def test_another_tenants_conversation_is_not_closed_by_a_history(checkpoint, clips):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint)) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0], tenant="a"))
            key = handle.media_id
            await answer(decode, turn_of(key, tenant="a"))
            for history in (None, (), decode.report(full=True).records[0].records * 2):
                with pytest.raises(NotFound):
                    await answer(decode, turn_of(key, tenant="b"), history)
            assert await answer(decode, turn_of(key, tenant="a", after=1))

    asyncio.run(main())
