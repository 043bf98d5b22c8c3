"""A turn as a person reads it: the question, the answer as it grows, where it looked, how long it took.

Knows: what is printed of a turn. Does not know: who answers; a local conversation and one on a server are the same to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Unpack

from sparsevila_cluster.core.call_options import AskOptions
from sparsevila_cluster.core.requests import Answer


class Talk(Protocol):
    """A conversation, as `VideoQA` and `Client` hold them."""

    turns: list[tuple[str, Answer]]

    def ask(self, question: str, **options: Unpack[AskOptions]) -> Answer: ...

    def stream(self, question: str, **options: Unpack[AskOptions]) -> Iterator[str]: ...


def hold_turns(chat: Talk, questions: Sequence[str], options: AskOptions, names: Sequence[str], silent: bool) -> None:
    """Ask all questions, and print each turn unless `silent`. names: how the media are called."""
    for question in questions:
        if silent:
            chat.ask(question, **options)
        else:
            _show_turn(chat, question, options, names)


def _show_turn(chat: Talk, question: str, options: AskOptions, names: Sequence[str]) -> None:
    lead = f"Q: {' '.join(question.split())}\nA: "  # shown with the first piece: a refused question prints nothing
    for piece in chat.stream(question, **options):
        print(lead + piece, end="", flush=True)
        lead = ""
    print(lead, end="")
    answer = chat.turns[-1][1]
    seen = answer.evidence.places(names=names)
    num = len(answer.token_ids)
    looked = f"looked at {seen}; " if seen else ""
    print(f"\n   {looked}{num} token{'s'[: num != 1]} in {answer.timeline['total']:.0f} ms\n", flush=True)
