"""What engines, routers and doors promise each other: `Pipeline` is what every door speaks to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest, Turn, TurnEvent

# Called with the stage's name, how much is done and of how much. It may raise, which ends the preparation.
Progress = Callable[[str, int, int], None]


class Pipeline(Protocol):
    """What doors speak to."""

    async def prepare(self, request: PrepareRequest, progress: Progress | None = None) -> MediaHandle:
        """Make a media prefix resident, or find it; its `media_id` is its content key."""
        ...

    def ask(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn. Leaving the iteration early aborts the turn.

        An empty `conversation_id` begins a conversation; `accepted` and `done` say under which id it goes on.
        """
        ...

    async def abort(self, turn_id: str) -> bool: ...

    async def close_conversation(self, conversation_id: str) -> bool: ...

    async def media(self, media_id: str, tenant: str = "") -> MediaHandle:
        """What is known of a prefix that is resident. Raises NotFound, also where it is another tenant's."""
        ...

    async def delete_media(self, media_id: str, tenant: str = "") -> bool: ...

    async def ready(self) -> bool:
        """Whether media can be prepared and questions answered now. Never raises."""
        ...

    async def set_brownout(self, level: float) -> None: ...

    async def info(self) -> dict[str, Any]: ...

    async def close(self) -> None: ...
