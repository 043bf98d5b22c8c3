"""Evidence as heat maps, and that what a client leaves out means the default."""

import pytest

from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.evidence import Evidence, FrameEvidence
from sparsevila_cluster.core.requests import Replay, SamplingParams, Turn
from sparsevila_cluster.gateway.grpc.translate import to_evidence, to_reference, to_turn
from sparsevila_cluster.gateway.media_sources import MediaReference
from sparsevila_cluster.pb import video_qa_pb2 as pb


def test_heat_is_row_by_row_and_relative_to_the_turns_hottest_cell():
    wide = FrameEvidence(3, 1.5, 0.7, (2, 3), ((0, 2, 0.5), (1, 0, 0.2)), ((0, 2), (1, 0), (1, 1)), media=1)
    tall = FrameEvidence(4, 2.0, 0.3, (3, 1), ((2, 0, 0.3), (0, 0, 1e-9)), ((2, 0), (0, 0)))
    unseen = FrameEvidence(5, 2.5, 0.0, (1, 1), (), ((0, 0),))
    told = to_evidence(Evidence((wide, tall, unseen))).frames
    assert [(f.media, f.frame, f.time_s, f.share, f.rows, f.cols) for f in told] == [(1, 3, 1.5, 0.7, 2, 3), (0, 4, 2.0, 0.3, 3, 1)]
    assert [list(f.heat) for f in told] == [[0, 0, 255, 102, 0, 0], [1, 0, 153]]
    assert not to_evidence(Evidence()).frames
    nothing = FrameEvidence(0, 0.0, 0.0, (1, 2), ((0, 1, 0.0),), ((0, 1),))
    assert list(to_evidence(Evidence((nothing,))).frames[0].heat) == [0, 1]


def test_views_of_one_frame_are_one_map():
    whole = FrameEvidence(0, 0.0, 0.5, (1, 1), ((0, 0, 0.5),), ((0, 0),))
    tiles = FrameEvidence(0, 0.0, 0.5, (1, 2), ((0, 1, 0.5),), ((0, 1),))
    (frame,) = to_evidence(Evidence((whole, tiles))).frames
    assert frame.share == 1.0 and (frame.rows, frame.cols) == (1, 2) and list(frame.heat) == [85, 255]


def test_what_is_left_out_is_the_default_and_what_is_sent_arrives():
    assert to_turn(pb.AskRequest(media_id="m", question="q?"), 100) == Turn("", "", "m", "q?")
    sampling = {"max_tokens": 7, "temperature": 0.0, "top_p": 0.5, "top_k": 3, "seed": -1}
    request = pb.AskRequest(
        turn_id="t",
        conversation_id="c",
        media_id="m",
        question="q?",
        sampling=pb.Sampling(**sampling, stop=["a", "b"]),
        retrieval=pb.Retrieval(keep=0.5, mass=0.9, refresh_every=0),
        want_evidence=True,
        said_token_ids=[5, 6],
        said_brownout=0.25,
    )
    with pytest.raises(BadRequest, match="at most 1 tokens, got 2"):
        to_turn(request, 1)
    assert to_turn(request, 2) == Turn(
        "t", "c", "m", "q?", SamplingParams(**sampling, stop=("a", "b")), 0.5, 0.9, 0, True, replay=Replay((5, 6), 0.25)
    )
    assert to_reference(pb.MediaSource(upload_id="", kind="video")) == MediaReference(upload_id="", kind="video")
    assert to_reference(pb.MediaSource(inline=b"x")) == MediaReference(inline=b"x")
    assert to_reference(pb.MediaSource()) == MediaReference()
