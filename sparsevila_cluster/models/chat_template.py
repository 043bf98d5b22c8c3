"""The checkpoint's chat template and tokenizer, cut where media prefixes, questions and answers meet.

    <system> <user> <media> | question <end of user> <assistant> | answer ... | <end of turn> <user> question <assistant> | ...
    |<---- prefix_ids ----->|<------- question_ids(first) ------>|<- model -->|<------------- question_ids ------------->|

Every cut stands at a control token, so that tokenizing the pieces equals tokenizing the whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest
from sparsevila_cluster.models.adapter import Between, Piece, Slot
from sparsevila_cluster.models.checkpoint import Checkpoint, one_line

# Sentinels: letters only, so that no template or trimming rule can touch them.
_QUESTION, _ANSWER, _NEXT = "QxSentinelOneQx", "QxSentinelTwoQx", "QxSentinelThreeQx"


class TemplateChat:
    """ChatFormat over a Hugging Face tokenizer and its Jinja template."""

    def __init__(self, files: Checkpoint, slots: Mapping[str, Slot], visual_ids: Sequence[int], default_eos: Any = None):
        """slots: how the template writes each kind of media; visual_ids: placeholders of visual tokens; default_eos: the model
        config's eos_token_id.

        Raises:
            BadCheckpoint: no tokenizer, no chat template, no end-of-turn token, or a template that cannot be cut.
        """
        self._tokenizer = load_tokenizer(files)
        self._template = _load_template(files, self._tokenizer)
        # The Rust tokenizer itself: no per-call padding state, so threads may share it.
        self._core = self._tokenizer.backend_tokenizer
        self._core.no_padding()
        self._core.no_truncation()
        self._visual_ids = frozenset(visual_ids)
        self._control = {
            token.content: i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special or i in self._visual_ids
        }
        self._slots = dict(slots)
        self._slot_text = {kind: self._spelled(slot.pieces) for kind, slot in slots.items()}
        self.vocab_size = len(self._tokenizer)
        self.eos_ids = self._find_eos(files, default_eos)
        self._anchor = next(iter(self._control))
        self._opening_ids = self._core.encode("", add_special_tokens=True).ids
        self._learn_cuts()
        self.max_id = self._largest_id()

    def prefix_ids(
        self, kinds: Sequence[str], system_prompt: str | None, spellings: Sequence[Sequence[Piece]] | None = None
    ) -> list[int]:
        """Everything before the question: system message (the template's own if None), the media in order, each as the template
        writes it or as its spelling says.

        Raises:
            BadRequest: the system prompt contains a control token, there is no media, or the model takes none of a kind.
        """
        if not kinds:
            raise BadRequest("a media prefix needs at least one media")
        for kind in kinds:
            if kind not in self._slots:
                raise BadRequest(f"this model takes no {kind}; it takes: {', '.join(self._slots)}")
        if system_prompt is not None:
            self._refuse_control(system_prompt, "system prompt")
        text, _ = self._cut_at_media(self._render_first(kinds, system_prompt).split(_QUESTION)[0], kinds, spellings)
        return self._encode_start(text)

    def question_ids(self, question: str, first: bool, pending: int | None) -> tuple[list[int], int, int]:
        """(ids, start, stop): tokens from the end of the KV to the opening of the answer; [start, stop) are the question's own.

        `pending` is the previous answer's last token, which has no KV yet. An end-of-turn token is written as the template
        writes it; any other token is followed by the template's closing.

        Raises:
            BadRequest: the question contains a control token.
        """
        self._refuse_control(question, "question")
        if self._trims:
            question = question.strip()
        before = self._opening if first else self._closing
        # All cuts stand behind a control token; some tokenizers would write a text that follows none as the start of a document.
        encoding = self._core.encode(self._anchor + before + question + self._answer_opening, add_special_tokens=False)
        ids, offsets = encoding.ids[1:], encoding.offsets[1:]
        start = len(self._anchor) + len(before)
        stop = start + len(question)
        own = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and a < b]
        head = [] if first or pending is None or pending in self.eos_ids else [pending]
        if not own:
            at = sum(b <= start for _, b in offsets)
            return head + ids, len(head) + at, len(head) + at
        return head + ids, len(head) + own[0], len(head) + own[-1] + 1

    def decode(self, ids: Sequence[int]) -> str:
        """Text of answer tokens, control tokens left out. An unfinished UTF-8 character at the end reads as U+FFFD."""
        return self._core.decode(list(ids), skip_special_tokens=True)

    def _encode_start(self, text: str) -> list[int]:
        """Ids of the beginning of a conversation. What the tokenizer puts before every text, the template may have written."""
        ids = self._core.encode(text, add_special_tokens=False).ids
        num = len(self._opening_ids)
        return ids if ids[:num] == self._opening_ids else self._opening_ids + ids

    def _spelled(self, pieces: Sequence[Piece]) -> str:
        parts = []
        for piece in pieces:
            if piece is Between.MEDIA:
                text = self._between_media
            else:
                text = piece if isinstance(piece, str) else self._tokenizer.convert_ids_to_tokens(piece)
            if text is None:
                raise BadCheckpoint(f"config.json names token {piece}, which the tokenizer does not have")
            parts.append(text)
        return "".join(parts)

    @cached_property
    def _between_media(self) -> str:
        """What the template writes between two media of the first kind."""
        kind = next(iter(self._slots))
        parts = self._render_first([kind, kind], None).split(self._slot_text[kind])
        if len(parts) != 3:
            raise BadCheckpoint(f"the chat template does not place {self._slot_text[kind]!r} for each of two media")
        return parts[1]

    def _refuse_control(self, text: str, what: str) -> None:
        for token in self._control:
            if token in text:
                raise BadRequest(f"the {what} contains the control token {token!r}; control tokens are not allowed in text")

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise whatever Jinja and their own macros raise
            if messages[0]["role"] == "system":
                raise BadRequest(f"this model's chat template takes no system prompt: {one_line(error)}") from error
            raise BadCheckpoint(f"the chat template cannot be rendered: {one_line(error)}") from error

    def _render_first(self, kinds: Sequence[str], system_prompt: str | None, more: Sequence[tuple[str, str]] = ()) -> str:
        messages = [] if system_prompt is None else [_message("system", system_prompt)]
        media = [{"type": self._slots[kind].content} for kind in kinds]
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": _QUESTION}]})
        return self._render(messages + [_message(role, text) for role, text in more])

    def _cut_at_media(self, text: str, kinds: Sequence[str], spellings: Sequence[Sequence[Piece]] | None = None) -> tuple[str, str]:
        """`text` up to and including its last control token, with the media's slots filled, and the rest: it is tokenized with
        the question.
        """
        wanted, done = [self._slot_text[kind] for kind in kinds], ""
        placed = re.findall("|".join(map(re.escape, sorted(set(wanted), key=len, reverse=True))), text)
        if placed != wanted and sorted(placed) == sorted(wanted):
            raise BadRequest(f"this model's chat template writes media in the order {', '.join(placed)}; give them in this order")
        for i, kind in enumerate(kinds):
            before, slot, text = text.partition(self._slot_text[kind])
            if not slot:
                raise BadCheckpoint(f"the chat template does not place {self._slot_text[kind]!r} for each of: {', '.join(kinds)}")
            done += before + (slot if spellings is None else self._spelled(spellings[i]))
        if any(slot in text for slot in self._slot_text.values()):
            raise BadCheckpoint(f"the chat template places more media than: {', '.join(kinds)}")
        end = max((text.rfind(token) + len(token) for token in self._control if token in text), default=0)
        done, rest = done + text[:end], text[end:]
        if not any(done.endswith(token) for token in self._control):
            raise BadCheckpoint("the chat template puts no control token before the question")
        return done, rest

    def _learn_cuts(self) -> None:
        openings, endings = set(), set()
        for kind in self._slots:
            parts = self._render_first([kind], None).split(_QUESTION)
            if len(parts) != 2:
                raise BadCheckpoint("the chat template does not repeat the user's text exactly once")
            openings.add(self._cut_at_media(parts[0], [kind])[1])
            endings.add(parts[1])
        if len(openings) != 1 or len(endings) != 1:
            raise BadCheckpoint("the chat template surrounds a question differently after a video and after an image")
        self._opening, self._answer_opening = openings.pop(), endings.pop()
        kind = next(iter(self._slots))
        whole = self._render_first([kind], None, [("assistant", _ANSWER), ("user", f" {_NEXT} ")])
        self._trims = f" {_NEXT} " not in whole
        after = whole.partition(_ANSWER)[2]
        self._closing, found, ending = after.partition(_NEXT if self._trims else f" {_NEXT} ")
        if not found or ending != self._answer_opening:
            raise BadCheckpoint("the chat template does not repeat answers and later questions as it writes the first")

    def _largest_id(self) -> int:
        """The largest id that a prompt can hold. A control token that the template does not write is not counted, as nobody can say
        it: published tokenizers have some without an embedding.
        """
        ids = [i for token, i in self._core.get_vocab(with_added_tokens=True).items() if token not in self._control]
        ids += [piece for slot in self._slots.values() for piece in slot.pieces if isinstance(piece, int)]
        for kind, slot in self._slot_text.items():
            ids += self._core.encode(self._render_first([kind], None).replace(slot, "")).ids
        return max(ids)

    def _find_eos(self, files: Checkpoint, default: Any) -> frozenset[int]:
        generation = files.json("generation_config.json") or {}
        found = {self._tokenizer.eos_token_id}
        for value in (generation.get("eos_token_id"), default):
            found.update(value if isinstance(value, list) else [value])
        found.discard(None)
        if not found or not all(isinstance(i, int) for i in found):
            values = ", ".join(sorted(map(str, found))) or "none"
            raise BadCheckpoint(f"no usable eos_token_id in generation_config.json, tokenizer or config.json: {values}")
        return frozenset(found)


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def load_tokenizer(files: Checkpoint) -> Any:
    """The checkpoint's transformers tokenizer. Raises BadCheckpoint: there is none, or it is broken or of the slow kind."""
    from transformers import AutoTokenizer

    directory = files.directory
    if not (directory / "tokenizer.json").is_file() and not (directory / "vocab.json").is_file():
        raise BadCheckpoint(f"{str(directory)!r} has no tokenizer: neither tokenizer.json nor vocab.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for broken files
        raise BadCheckpoint(f"{str(directory)!r}: tokenizer cannot be loaded: {one_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise BadCheckpoint(f"{str(directory)!r}: tokenizer {type(tokenizer).__name__} has no fast (tokenizer.json) form")
    return tokenizer


def _load_template(files: Checkpoint, tokenizer: Any) -> str:
    """The processor's template comes before the tokenizer's: only it is sure to know media."""
    path = files.directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        template = (files.json(name) or {}).get("chat_template")
        if isinstance(template, str):
            return template
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise BadCheckpoint(
        f"{str(files.directory)!r} has no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json)"
    )
