"""The summary line and its JSON, from data alone."""

from dataclasses import replace

import pytest

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.evidence import Evidence, FrameEvidence
from sparsevila_cluster.core.requests import Answer, FinishReason, MediaHandle, Usage
from sparsevila_cluster.core.summary import answer_document, ask_document, media_summary, megabytes, summary_line

MEDIA = MediaHandle("key", "video", 64, 32.0, 4096, 1024, 1040, 12_600_000, 50_000_000, ms={"decode": 10.0, "encode": 20.0})


def answer(text="a red star", tokens=4, **ms):
    return Answer(
        text, tuple(range(tokens)), FinishReason.STOP, evidence=Evidence((seen(0, 0.0), seen(2, 0.3), seen(4, 0.7))),
        usage=Usage(4096, 1024, 102, 1050, tokens, 0.1, ms={"question": 4.0, "retrieve": 1.0, "total": 9.0, **ms}),
    )  # fmt: skip


def seen(frame, share, media=0):
    return FrameEvidence(frame, frame / 2, share, (2, 2), (), (), media)


def test_the_summary_is_one_line():
    summary = media_summary(MEDIA, [answer()])
    line = '64 frames -> 4096 visual tokens -> 1024 kept -> 12.6 MB KV -> 102 packed -> "a red star"'
    assert summary_line(summary, "a red\nstar") == line
    summary["ms"]["transfer"] = 8.2
    assert summary_line(summary, "a red star") == line.replace("KV -> ", "KV -> 8 ms wire -> ")
    single = {**summary, "num_frames": 1, "visual_tokens": 1}
    assert summary_line(single, "").startswith("1 frame -> 1 visual token -> ")


def test_turns_are_averaged_and_steps_are_weighted():
    ms = media_summary(MEDIA, [answer(step=2.0, tokens=4), answer(step=5.0, tokens=2, question=8.0), answer(tokens=1)])["ms"]
    assert ms["step"] == pytest.approx((3 * 2 + 1 * 5) / 4)
    assert ms["question"] == pytest.approx((4 + 8 + 4) / 3, abs=1e-3)
    assert (ms["decode"], ms["prune"], ms["transfer"]) == (10.0, 0.0, 0.0)
    assert media_summary(MEDIA, [answer(tokens=1)])["ms"]["step"] == 0


def test_evidence_is_what_was_looked_at_most_first():
    document = answer_document("What?", answer())
    assert document["evidence"] == [
        {"frame": 4, "time_s": 2.0, "share": 0.7},
        {"frame": 2, "time_s": 1.0, "share": 0.3},
    ]
    assert (document["num_tokens"], document["finish_reason"]) == (4, "stop")


def test_views_of_a_frame_count_as_one_and_several_media_are_told_apart():
    views = Evidence((seen(0, 0.1), seen(0, 0.2), seen(2, 0.3), seen(0, 0.4, media=1)))
    told = answer_document("What?", replace(answer(), evidence=views))["evidence"]
    assert [(one["media"], one["frame"], one["share"]) for one in told] == [(1, 0, 0.4), (0, 0, 0.3), (0, 2, 0.3)]


def test_sparsity_is_told_with_its_defaults():
    config = build_config(retrieve="retrieve_all", model="somewhere")
    document = ask_document(config, MEDIA, [("What?", answer())])
    assert document["model"] == "somewhere"
    assert document["sparsity"]["prune_keep"] == 0.25 and document["sparsity"]["retrieve_keep"] == 1.0


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(263_400_000, "263 MB"), (12_600_000, "12.6 MB"), (263_000, "0.26 MB"), (5_000, "0.005 MB")]
)
def test_megabytes(num_bytes, text):
    assert megabytes(num_bytes) == text
