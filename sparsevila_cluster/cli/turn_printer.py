"""A turn as a person reads it: the question, the answer as it grows, where it looked, how long it took."""

from __future__ import annotations

from collections.abc import Sequence

from sparsevila_cluster.core.call_options import AskOptions
from sparsevila_cluster.core.conversation import Chat, M


def print_turns(chat: Chat[M], questions: Sequence[str], options: AskOptions, names: Sequence[str], silent: bool) -> None:
    """Ask all questions, and print each turn unless `silent`. names: how the media are called."""
    for question in questions:
        if silent:
            chat.ask(question, **options)
        else:
            _print_turn(chat, question, options, names)


def _print_turn(chat: Chat[M], question: str, options: AskOptions, names: Sequence[str]) -> None:
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
