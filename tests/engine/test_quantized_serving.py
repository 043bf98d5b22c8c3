"""Questions to a quantised checkpoint, through the whole pipeline: exact in float32, sensible in the form it is stored in."""

import pytest

from sparsevila_cluster import VideoQA
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.media.clips import write_clip
from tests.models.quantized_files import VISION, as_awq, as_w8a8, config_of, plain_twin

QUESTIONS = ("what is it?", "and then?", "where?")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", seed=0, frames=12)


@pytest.fixture(scope="module")
def awq(tmp_path_factory):
    root = tmp_path_factory.mktemp("awq")
    return as_awq(make_qwen2_5_vl(root / "fp"), root / "awq", modules_to_not_convert=["visual"])


def answers(directory, clip, **fields):
    with VideoQA(directory, prune_keep=0.5, retrieve_keep=0.3, max_frames=8, **fields) as qa:
        talk = qa.conversation(qa.prepare(clip))
        return [talk.ask(question, max_tokens=12).token_ids for question in QUESTIONS]


@pytest.mark.parametrize("text_backend", ["lean", "hf"])
def test_float32_answers_are_those_of_the_plain_twin(awq, clip, tmp_path, text_backend):
    twin = plain_twin(awq, tmp_path / "twin")
    assert answers(awq, clip, dtype="float32", text_backend=text_backend) == answers(twin, clip, text_backend=text_backend)


def test_text_in_four_bits_and_tower_in_eight_answer_again_and_again(awq, clip, tmp_path):
    both = as_w8a8(awq, tmp_path / "both", config_of(awq))
    assert config_of(both)["vision"] == VISION
    first = answers(both, clip)
    assert first == answers(both, clip) and all(len(ids) > 0 for ids in first)
