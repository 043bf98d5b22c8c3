"""Serve vision-language models over long video: prune before the question, retrieve for the question.

Knows: the names that users import. Does not know how they are made; importing this package imports no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsevila_cluster.config import EngineConfig
    from sparsevila_cluster.request import Answer, MediaHandle, SamplingParams
    from sparsevila_cluster.video_qa import Chat, VideoQA

_HOME = {
    "Answer": "request",
    "Chat": "video_qa",
    "EngineConfig": "config",
    "MediaHandle": "request",
    "SamplingParams": "request",
    "VideoQA": "video_qa",
}
__all__ = ["Answer", "Chat", "EngineConfig", "MediaHandle", "SamplingParams", "VideoQA"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
