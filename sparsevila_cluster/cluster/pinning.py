"""Which replica gets a request: the one that its session names, or the less busy of two.

Knows: Serve's replicas by id. Does not know: what they do. Serve imports the class by name in every process that holds a handle.
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

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        session = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            session = pending_request.metadata.session_id or ""
        if session.startswith(PIN):
            named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == session[len(PIN) :]]
            if named:
                return [named]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))] if candidate_replicas else []
