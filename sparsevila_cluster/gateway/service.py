"""The service behind every protocol: who may do what with a `Pipeline`, within which limits, measured, undone when clients leave.

    async with service.call("Ask", authorization, client_left_s) as call:      errors leave this block as SparseVilaError
        async for event in service.ask(call, turn): ...

A protocol translates its messages to these methods' arguments, and their results and errors back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.config import KIB, EngineConfig
from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.errors import (
    BadMedia,
    BadRequest,
    Internal,
    NotFound,
    QueueFull,
    SparseVilaError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UserError,
)
from sparsevila_cluster.core.fair_sharing import RECENT_S
from sparsevila_cluster.core.lru_dict import LRUDict
from sparsevila_cluster.core.metrics import MetricsSink, Tally
from sparsevila_cluster.core.protocols import Pipeline
from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest, Turn, TurnEvent, check_size
from sparsevila_cluster.gateway.arrival_pace import ArrivalPace
from sparsevila_cluster.gateway.audit_log import AuditLog, host_of
from sparsevila_cluster.gateway.authenticator import Authenticator, check_id
from sparsevila_cluster.gateway.call import Call
from sparsevila_cluster.gateway.loop_lag import LoopLag
from sparsevila_cluster.gateway.media_sources import MediaChunk, MediaReference, MediaSources
from sparsevila_cluster.gateway.owner_shares import OwnerShares
from sparsevila_cluster.gateway.progress_queue import ProgressQueue, StageProgress
from sparsevila_cluster.gateway.refusal_pace import RefusalPace
from sparsevila_cluster.gateway.spool import Spool, StoredUpload
from sparsevila_cluster.gateway.url_fetcher import UrlFetcher

log = logging.getLogger(__name__)

# Media that was made here and not asked about yet, so that a first question counts as cold.
MAX_FRESH = 4096
# What a token and all options of a turn take when they are written down.
MAX_TOKEN_BYTES, MAX_OPTION_BYTES = 10, 64 * KIB


@dataclass(frozen=True)
class ServerInfo:
    """What the server is and accepts. details: what the pipeline tells of itself, of the caller's own where that is no admin."""

    version: str
    model: str
    fingerprint: str
    max_message_bytes: int
    max_inline_bytes: int
    max_upload_bytes: int
    details: dict[str, Any]


class VideoQAService:
    """The endpoints over one pipeline, which stays the caller's. Made in the event loop that it serves in; `close` ends it."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: GatewayConfig,
        engine: EngineConfig,
        sink: MetricsSink | None = None,
        *,
        fetcher: UrlFetcher | None = None,
    ):
        """engine: whose limits and deadlines hold where a client names none. fetcher: how https URLs are read.

        Raises:
            BadConfig: a spool folder or a keys file that cannot be used.
        """
        self._pipeline, self._config, self._engine = pipeline, config, engine
        self._sink: MetricsSink = Tally() if sink is None else sink
        self._audit = AuditLog()
        self._authenticator = Authenticator(config, self._audit)
        self._shares = OwnerShares(config, lambda: self._authenticator.has_several_owners)
        self._refusals = RefusalPace(lambda: self._authenticator.has_several_owners)
        self._arrivals = ArrivalPace(config.paced_calls_per_s)
        self._spool = Spool(config, engine.limits.max_bytes, self._sink, self._shares.share_of)
        self._sources = MediaSources(config, engine.limits, self._spool, fetcher or UrlFetcher())
        self._fresh: LRUDict[None] = LRUDict(MAX_FRESH)
        self._lag = LoopLag(config.max_loop_lag_s)
        chores = (self._sweep(), self._authenticator.watch(), self._exchange_owners())
        self._chores = tuple(map(asyncio.create_task, chores))

    async def close(self) -> None:
        """Delete what clients sent. To be called once no call is in progress. Idempotent."""
        self._refusals.close()
        self._lag.close()
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        self._audit.close()
        await asyncio.to_thread(self._sources.close)
        await asyncio.to_thread(self._spool.close)

    @property
    def refusals(self) -> RefusalPace:
        """How soon those who are refused may be told."""
        return self._refusals

    async def ready(self) -> bool:
        """Whether media can be prepared and questions answered now."""
        return await self._pipeline.ready()

    def read_in_vain(self, call: Call, num_bytes: int) -> None:
        """A message of this call is longer than any of its method; its owner's next calls wait for that."""
        self._arrivals.charge(call.principal.owner, num_bytes)

    @asynccontextmanager
    async def call(
        self, method: str, authorization: Sequence[str | bytes], client_left_s: Callable[[], float | None], peer: str = ""
    ) -> AsyncIterator[Call]:
        """One call from arrival to end: authenticated, counted, measured; what goes wrong inside is logged once where it is a bug.

        Args:
            method: the endpoint's name in metrics and logs.
            authorization: every header of this name that was sent.
            client_left_s: seconds until the client's deadline, None without one.
            peer: where the call comes from, for the audit log.

        Raises:
            Unauthenticated. QueueFull: more than `max_streams` calls, more than the owner's share, rate or pace, or the event loop
            is late. Unavailable: what it waited for was cancelled, though nobody cancelled the call. Whatever SparseVilaError is
            raised inside; Internal for any other exception. What the caller can help is raised later and later where it comes
            again and again: see `RefusalPace`.
        """
        code, call = "OK", None
        try:
            self._lag.check()
            principal = self._authenticator.authenticate(authorization)
            call = Call(principal, client_left_s, self._config.max_deadline_s, method, peer)
            if principal.owner:
                await self._arrivals.turn(principal.owner)
            with self._shares.call(principal.owner), self._arrivals.call(principal.owner):
                yield call
        except asyncio.CancelledError as error:
            if not _is_cancelled():
                code = Unavailable.grpc_status
                raise Unavailable(f"{method} ended early: what it waited for was cancelled; try again") from error
            code = "DEADLINE_EXCEEDED" if call is not None and call.is_late else "CANCELLED"
            raise
        except SparseVilaError as error:
            code = error.grpc_status
            self._audit_refusal(error, call, method, peer)
            if isinstance(error, UserError | QueueFull):
                left_s = client_left_s()
                most_s = math.inf if left_s is None else left_s / 2  # so that the client hears of it
                await self._refusals.hold(call.principal.owner if call is not None else host_of(peer), most_s)
            raise
        except Exception as error:
            code = Internal.grpc_status
            log.error("%s failed", method, exc_info=error)
            raise Internal(f"{method} failed: {type(error).__name__}; the server's log has the cause") from error
        finally:
            self._sink.count("requests_total", method=method, code=code)

    def _audit_refusal(self, error: SparseVilaError, call: Call | None, method: str, peer: str) -> None:
        if call is None and isinstance(error, Unauthenticated):
            self._audit.refusal("authentication_failed", str(error), host_of(peer), method=method, peer=peer)
        elif call is not None and isinstance(error, QueueFull | TooLarge):
            owner, key = call.principal.owner, call.principal.key
            self._audit.refusal("limit", str(error), key or host_of(peer), owner=owner, key=key, method=method, peer=peer)

    def _audit_deletion(self, event: str, what: str, call: Call) -> None:
        who = call.principal
        self._audit.note(event, what, owner=who.owner, key=who.key, method=call.method, peer=call.peer)

    # ---- media -------------------------------------------------------------------------------------------------------------

    async def upload(self, call: Call, chunks: AsyncIterator[MediaChunk]) -> StoredUpload:
        """Keep a file for later preparations. `chunks` ends only behind the whole file, and raises Cancelled where it breaks.

        Raises:
            BadRequest: an empty file, a chunk too large, an unknown kind. TooLarge. QueueFull: over the quota. DeadlineExceeded.
        """
        return await self._sources.receive(call, chunks)

    async def prepare(
        self,
        call: Call,
        media: Sequence[MediaReference],
        *,
        fps: float | None = None,
        max_frames: int | None = None,
        prune_keep: float | None = None,
    ) -> AsyncGenerator[StageProgress | MediaHandle, None]:
        """Make a media prefix or find it: how far it is, and the handle at the end. Leaving early cancels it.

        Raises:
            BadRequest, BadMedia, TooLarge, QueueFull, DeadlineExceeded. NotFound: an upload. PermissionDenied: a file or URL.
            Whatever the pipeline raises.
        """
        self._shares.check_visual_tokens(call.principal.owner)
        async with self._sources.opened(call, media) as opened:
            request = PrepareRequest(
                sources=opened.sources,
                fps=fps,
                max_frames=max_frames,
                prune_keep=prune_keep,
                deadline_s=call.left_s(self._engine.prepare_timeout_s),
                tenant=call.principal.tenant,
                owner=self._shares.charged(call.principal.owner),
            )
            if opened.full is not None:
                known = await self._pipeline.find_media(request)
                if known is None:
                    raise opened.full
                yield known
                return
            reports = ProgressQueue()
            preparing = asyncio.ensure_future(self._pipeline.prepare(request, reports.put))
            preparing.add_done_callback(lambda _: reports.close())
            try:
                async for report in reports:
                    yield report
                handle = await preparing
            finally:
                await _end(preparing)  # what it reads stays until then
        if not handle.reused:
            self._shares.count_visual_tokens(call.principal.owner, handle.visual_tokens)
            self._fresh.put(handle.media_id, None)
        yield handle

    async def media(self, call: Call, media_id: str) -> MediaHandle:
        """What is known of a media prefix. Raises BadRequest, DeadlineExceeded. NotFound: also where it is another tenant's."""
        check_id("media_id", media_id, required=True)
        return await call.wait_shortly(self._pipeline.media(media_id, call.principal.tenant), "looking for media")

    async def delete_media(self, call: Call, media_id: str) -> bool:
        """Whether there was such media of this tenant. Raises BadRequest, DeadlineExceeded."""
        check_id("media_id", media_id, required=True)
        deleted = await call.wait_shortly(self._pipeline.delete_media(media_id, call.principal.tenant), "deleting media")
        if deleted:
            self._audit_deletion("media_deleted", media_id, call)
        return deleted

    # ---- turns -------------------------------------------------------------------------------------------------------------

    @property
    def max_answer_tokens(self) -> int:
        """Most tokens of an answer, and of the part of it that a client resumes behind."""
        return self._engine.max_answer_tokens

    @property
    def max_turn_bytes(self) -> int:
        """Most bytes of a question with all that belongs to it, in any protocol."""
        return self._engine.max_question_bytes + MAX_TOKEN_BYTES * self._engine.max_answer_tokens + MAX_OPTION_BYTES

    async def ask(self, call: Call, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn, measured, `done` last. Leaving early aborts it.

        turn: as the client names it; a turn id is made where it is empty; tenant, owner and deadline are the call's.

        Raises:
            BadRequest: an id or a token that cannot be one, a size over the engine's bounds. NotFound: media that is unknown, or
            evicted without its source.
            DeadlineExceeded. Whatever the pipeline raises. Internal: the pipeline ends without `done`.
        """
        check_id("turn_id", turn.turn_id)
        check_id("conversation_id", turn.conversation_id)
        check_id("media_id", turn.media_id, required=True)
        check_size(turn, self._engine)
        if turn.replay is not None and any(token < 0 for token in turn.replay.token_ids):
            raise BadRequest(f"said_token_ids must be >= 0, got {min(turn.replay.token_ids)}")
        turn_id = turn.turn_id or uuid.uuid4().hex
        inner = replace(
            turn,
            turn_id=call.principal.pipeline_turn_id(turn_id),
            deadline_s=call.left_s(self._engine.turn_timeout_s),
            tenant=call.principal.tenant,
            owner=self._shares.charged(call.principal.owner),
        )
        labels = {"turn": "later" if turn.conversation_id else "first"}
        media = "cold" if turn.media_id in self._fresh else "warm"
        first_s = last_s = None
        num_tokens = 0
        try:
            async with aclosing(self._pipeline.ask(inner)) as events:
                async for event in events:
                    if event.kind == "token":
                        num_tokens, last_s = num_tokens + len(event.token_ids), time.perf_counter()
                        if first_s is None:
                            first_s = last_s
                            self._fresh.pop(turn.media_id, None)
                            self._sink.observe("request_ttft_seconds", first_s - call.arrived_s, media=media, **labels)
                    if event.kind == "done":
                        if first_s is not None and last_s is not None and num_tokens > 1:
                            self._sink.observe("request_tpot_seconds", (last_s - first_s) / (num_tokens - 1))
                        self._sink.observe("request_e2e_seconds", time.perf_counter() - call.arrived_s, **labels)
                    yield event if event.turn_id == turn_id else replace(event, turn_id=turn_id)
                    if event.kind == "done":
                        return
        except BadMedia as error:  # from making an evicted prefix again: the bytes that it was made of are gone
            raise NotFound(f"media {turn.media_id!r} was evicted, and its source is gone; prepare it again") from error
        raise Internal(f"turn {turn_id} ended without an answer")

    async def abort(self, call: Call, turn_id: str) -> bool:
        """Whether a turn of this client was under way, which ends now. Raises BadRequest, DeadlineExceeded."""
        check_id("turn_id", turn_id, required=True)
        return await call.wait_shortly(self._pipeline.abort(call.principal.pipeline_turn_id(turn_id)), "aborting a turn")

    async def close_conversation(self, call: Call, conversation_id: str) -> bool:
        """Whether there was such a conversation of this tenant. Raises BadRequest, DeadlineExceeded."""
        check_id("conversation_id", conversation_id, required=True)
        closing = self._pipeline.close_conversation(conversation_id, call.principal.tenant)
        closed = await call.wait_shortly(closing, "closing a conversation")
        if closed:
            self._audit_deletion("conversation_closed", conversation_id, call)
        return closed

    # ---- the server --------------------------------------------------------------------------------------------------------

    async def server_info(self, call: Call) -> ServerInfo:
        """Limits, and what the server does: all of it for an admin, the caller's own for others. Raises DeadlineExceeded."""
        who, share_of, what = call.principal, self._shares.share_of, "asking for info"
        if who.role == "admin":
            info = await call.wait_shortly(self._pipeline.info(), what)
            door = {"calls": self._shares.num_calls, "spool_bytes": self._spool.num_bytes}
        else:
            info = await call.wait_shortly(self._pipeline.tenant_info(who.tenant), what)
            spool_bytes = await call.wait_shortly(asyncio.to_thread(self._spool.num_bytes_of, who.owner), what)
            door = {"calls": self._shares.num_calls_of(who.owner), "spool_bytes": spool_bytes}
        max_spool_bytes = share_of(self._config.spool_bytes)
        limits = {
            "calls": share_of(self._config.max_streams),
            "spool_bytes": max_spool_bytes,
            "requests_per_s": self._config.requests_per_s,
            "visual_tokens_per_minute": self._config.visual_tokens_per_minute,
        }
        return ServerInfo(
            version=_version(),
            model=str(info.get("model", "")),
            fingerprint=str(info.get("fingerprint", "")),
            max_message_bytes=self._config.max_message_bytes,
            max_inline_bytes=self._config.max_inline_bytes,
            max_upload_bytes=min(self._engine.limits.max_bytes, max_spool_bytes),
            details={**info, "door": door, "limits": limits},
        )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._spool.sweep_s)
            try:
                await asyncio.to_thread(self._spool.sweep)
            except Exception:
                log.exception("deleting expired uploads failed")

    async def _exchange_owners(self) -> None:
        while True:
            await asyncio.sleep(RECENT_S / 2)
            owners = self._arrivals.owners
            if not owners:
                continue
            try:
                self._arrivals.note_elsewhere(await self._pipeline.exchange_owners(owners))
            except SparseVilaError as error:
                log.debug("who has calls elsewhere is not known: %s", error)
            except Exception:
                log.exception("asking who has calls elsewhere failed")


def _version() -> str:
    try:
        return metadata.version("sparsevila-cluster")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _is_cancelled() -> bool:
    """Whether somebody asked the running task itself to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _end(work: asyncio.Future[MediaHandle]) -> None:
    """Cancel `work` unless it is done, and wait for its end, for which it has GRACE_S."""
    work.cancel()
    await asyncio.wait((work,), timeout=GRACE_S)
    if work.done() and not work.cancelled():
        work.exception()  # whoever awaited it was told; nobody else has to be
