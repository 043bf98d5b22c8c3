"""`Pipeline`: what answers requests, a local engine or a router; the gateway, the API and the benchmarks call it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest, Turn, TurnEvent

# Called with the stage's name, how much is done and of how much. It may raise, which ends the preparation.
Progress = Callable[[str, int, int], None]


class Pipeline(Protocol):
    """Prepares media and answers turns."""

    async def prepare(self, request: PrepareRequest, progress: Progress | None = None) -> MediaHandle:
        """Make a media prefix resident, or find it; its `media_id` is its content key."""
        ...

    def ask(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn. Leaving the iteration early aborts the turn.

        An empty `conversation_id` begins a conversation; `accepted` and `done` say under which id it goes on.
        """
        ...

    async def abort(self, turn_id: str) -> bool:
        """End a turn that is under way. False: there is none of this id."""
        ...

    async def close_conversation(self, conversation_id: str, tenant: str = "") -> bool:
        """Free the KV of a conversation. False: there is none of this id, or it is another tenant's."""
        ...

    async def media(self, media_id: str, tenant: str = "") -> MediaHandle:
        """What is known of a prefix that is resident. Raises NotFound, also where it is another tenant's."""
        ...

    async def find_media(self, request: PrepareRequest) -> MediaHandle | None:
        """What `prepare` would find resident, None where it would have to make it."""
        ...

    async def delete_media(self, media_id: str, tenant: str = "") -> bool:
        """Forget a media prefix. False: there is none of this id that `tenant` may use."""
        ...

    async def ready(self) -> bool:
        """Whether media can be prepared and questions answered now. Never raises."""
        ...

    async def exchange_owners(self, owners: frozenset[str]) -> frozenset[str]:
        """These owners of keys have calls at this door. Who has calls at other doors, or turns. Raises Unavailable."""
        ...

    async def set_brownout(self, level: float) -> None:
        """Set the pressure, 0 (none) to 1 (most), under which turns that start from now on retrieve less."""
        ...

    async def info(self) -> dict[str, Any]:
        """What is resident and running, as JSON can hold it."""
        ...

    async def tenant_info(self, tenant: str) -> dict[str, Any]:
        """What one tenant may know: the model, and how much of what is resident is its own; no names, nothing of others.

        {"model", "fingerprint", "media", "media_bytes", "conversations"}
        """
        ...

    async def close(self) -> None:
        """Abort what runs and free everything. Idempotent."""
        ...
