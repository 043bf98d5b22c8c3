"""Streaming detokenisation: pieces add up to the whole, characters stay whole, stop strings never leak."""

import random

import pytest

from sparsevila_cluster.engine.detokenizer import Detokenizer


def utf8(ids):
    """One token per byte: the hardest case of a byte-level tokenizer."""
    return bytes(ids).decode("utf-8", errors="replace")


def stream(text, stop=()):
    detokenizer, pieces = Detokenizer(utf8, stop), []
    for byte in text.encode():
        pieces.append(detokenizer.add(byte))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()], detokenizer.stopped


@pytest.mark.parametrize("text", ["plain words", "naïve café", "漢字かな交じり", "🙂🙃 👩‍👩‍👧 mixed ü", "a\n\n b\t"])
def test_pieces_are_whole_characters_and_add_up(text):
    pieces, stopped = stream(text)
    assert "".join(pieces) == text and not stopped
    assert all("�" not in piece for piece in pieces)


def test_invalid_bytes_do_not_block_the_stream():
    detokenizer = Detokenizer(utf8)
    shown = "".join(detokenizer.add(b) for b in b"ok \xff\xfe\xff\xfe\xff and on")
    assert shown.startswith("ok ") and shown.endswith(" and on")


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_against_find(seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("abü") for _ in range(60))
    stop = tuple("".join(rng.choice("abü") for _ in range(rng.randint(1, 5))) for _ in range(3))
    pieces, stopped = stream(text, stop)
    ends = [end for s in stop if (end := text.find(s)) >= 0]
    if not ends:
        assert not stopped and "".join(pieces) == text
        return
    # The stop string that completes first ends the answer; of those completing together, the one that begins first.
    first_complete = min(text.find(s) + len(s) for s in stop if s in text)
    want = min(text.find(s) for s in stop if 0 <= text.find(s) <= first_complete - len(s))
    assert stopped and "".join(pieces) == text[:want]


def test_text_that_only_looked_like_a_stop_is_shown_at_the_end():
    pieces, stopped = stream("value: <en", ("<end>",))
    assert "".join(pieces) == "value: <en" and not stopped
    assert pieces[-1] == "<en"


def test_tokens_without_text_cost_no_more_the_more_there_are():
    """Control tokens decode to nothing: the window that is decoded with every token must not grow with them."""
    longest, silent = 0, 300

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return utf8([i for i in ids if i < 256])

    text = "before ü🙂 and after"
    for num_silent in (1, 5, 2000):
        detokenizer = Detokenizer(decode)
        pieces = []
        for byte in text.encode():
            pieces += [detokenizer.add(byte), *(detokenizer.add(silent) for _ in range(num_silent if byte == ord(" ") else 0))]
        assert "".join(pieces) + detokenizer.finish() == text
    assert longest < 100
