"""Serve vision-language models over long video: prune before the question, retrieve for the question.

Knows: the names that users import. Does not know how they are made; importing this package imports no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsevila_cluster.ask_many import Ask, Asked
    from sparsevila_cluster.async_qa import AsyncChat, AsyncVideoQA
    from sparsevila_cluster.config import EngineConfig
    from sparsevila_cluster.request import Answer, MediaHandle, SamplingParams
    from sparsevila_cluster.sight import Evidence
    from sparsevila_cluster.video_qa import Chat, VideoQA

_HOME = {
    "Answer": "request",
    "Ask": "ask_many",
    "Asked": "ask_many",
    "AsyncChat": "async_qa",
    "AsyncVideoQA": "async_qa",
    "Chat": "video_qa",
    "EngineConfig": "config",
    "Evidence": "sight",
    "MediaHandle": "request",
    "SamplingParams": "request",
    "VideoQA": "video_qa",
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
