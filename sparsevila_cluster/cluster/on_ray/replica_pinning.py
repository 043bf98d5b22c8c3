"""Which replica gets a request: the one that its session names, or the less busy of two.

Serve imports the class by name in every process that holds a handle.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import RequestRouter

PIN = "pin:"


# Not FIFOMixin: it may hand the replica that was chosen for one request to another one.
class PinRouter(RequestRouter):
    """Session `pin:<replica id>` means that replica; anything else takes the less busy of two at random.

    When the named replica is gone, another one gets the request and finds that it is not the one meant: an empty choice would make
    Serve look for the replica for ever.
    """

    def initialize_state(self, **given: Any) -> None:
        """Serve's constructor of a router."""
        self._suspects: set[Any] = set()

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """One rank of replicas to try, the named one alone if it is there."""
        session = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            session = pending_request.metadata.session_id or ""
        named = [replica for replica in candidate_replicas if PIN + replica.replica_id.unique_id == session]
        chosen = named or random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        for replica in chosen:
            self._assume_idle(replica.replica_id)
        return [chosen] if chosen else []

    def on_replica_actor_unavailable(self, replica_id: Any) -> None:
        """Serve could not reach a replica. It is asked whether it lives before it gets anything else."""
        self._suspects.add(replica_id)
        super().on_replica_actor_unavailable(replica_id)

    def _assume_idle(self, replica_id: Any) -> None:
        """Serve asks a replica for its queue when it has not heard of it for 10 s, and gives up after 0.1 s on a busy machine.

        Our replicas take every call, so one that was not heard of is taken for idle.
        """
        if self.replica_queue_len_cache.get(replica_id) is not None:
            self._suspects.discard(replica_id)
        elif replica_id not in self._suspects:
            self.replica_queue_len_cache.update(replica_id, 0)
