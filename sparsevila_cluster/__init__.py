"""Serve vision-language models over long video: prune before the question, retrieve for the question.

Importing this package imports no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsevila_cluster.api.ask_many import Ask, Asked
    from sparsevila_cluster.api.async_video_qa import AsyncVideoQA
    from sparsevila_cluster.api.video_qa import VideoQA
    from sparsevila_cluster.core.config import EngineConfig
    from sparsevila_cluster.core.conversation import AsyncChat, Chat
    from sparsevila_cluster.core.evidence import Evidence
    from sparsevila_cluster.core.requests import Answer, MediaHandle, SamplingParams

_HOME = {
    "Answer": "core.requests",
    "Ask": "api.ask_many",
    "Asked": "api.ask_many",
    "AsyncChat": "core.conversation",
    "AsyncVideoQA": "api.async_video_qa",
    "Chat": "core.conversation",
    "EngineConfig": "core.config",
    "Evidence": "core.evidence",
    "MediaHandle": "core.requests",
    "SamplingParams": "core.requests",
    "VideoQA": "api.video_qa",
}
__all__ = [
    "Answer",
    "Ask",
    "Asked",
    "AsyncChat",
    "AsyncVideoQA",
    "Chat",
    "EngineConfig",
    "Evidence",
    "MediaHandle",
    "SamplingParams",
    "VideoQA",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
