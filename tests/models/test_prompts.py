"""Prompts of every family, with their real spellings: the pieces that we tokenize must be the whole that transformers would."""

import numpy as np
import pytest

from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.models import load_model
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.families import FAMILIES

MEDIA = [["video"], ["image"], ["image", "image"], ["image", "video"]]
QUESTIONS = ["what colour is the star?", "  spaces and\nnew lines ", "ünïcode 😀 ok", "a", "."]


@pytest.fixture(scope="module", params=[(f, layout) for f in sorted(FAMILIES) for layout in ("hub", "modern")], ids="-".join)
def model(request, tmp_path_factory):
    family, layout = request.param
    return load_model(FAMILIES[family].make(tmp_path_factory.mktemp(family), layout=layout))


def patchify(model, kinds):
    return [model.family.patchify(tiny_qwen2_5_vl.media(kind, frames=3 + i, seed=i)) for i, kind in enumerate(kinds)]


def whole(model, inputs, messages):
    """What transformers' own tokenizer makes of the rendered conversation, every visual run as one placeholder."""
    chat = model.chat
    text = chat._tokenizer.apply_chat_template(messages, chat_template=chat._template, tokenize=False, add_generation_prompt=True)
    done = ""
    for media in inputs:
        before, _, text = text.partition(chat._slot_text[media.kind])
        done += before + chat._spelled(media.spelling)
    text = done + text
    # As transformers' processors do it: what a tokenizer puts before every text, unless the template wrote it.
    bos = chat._tokenizer.bos_token
    return chat._tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]


def user(model, kinds, question):
    media = [{"type": model.chat._slots[kind].content} for kind in kinds]
    return {"role": "user", "content": [*media, {"type": "text", "text": question}]}


@pytest.mark.parametrize("kinds", MEDIA, ids="+".join)
@pytest.mark.parametrize("question", QUESTIONS)
def test_prefix_and_question_are_the_whole(model, kinds, question):
    inputs = patchify(model, kinds)
    prefix = model.chat.prefix_ids(kinds, None, [media.spelling for media in inputs])
    ids, start, stop = model.chat.question_ids(question, True, None)
    assert prefix + ids == whole(model, inputs, [user(model, kinds, question)])
    assert model.chat.decode(ids[start:stop]).strip() == question.strip()


def test_every_run_has_its_placeholder(model):
    for kinds in MEDIA:
        inputs = patchify(model, kinds)
        prefix = model.chat.prefix_ids(kinds, None, [media.spelling for media in inputs])
        visual = model.family.visual_ids(model.config)
        assert sum(i in visual for i in prefix) == sum(len(media.runs) for media in inputs)
        plan = model.family.plan(prefix, inputs, "max+1")
        assert int(plan.visual_mask.sum()) == sum(media.num_tokens for media in inputs)
        assert len(plan.ids) == len(prefix) + sum(n - 1 for media in inputs for n in media.runs)
        for media in inputs:
            assert len(media.group) == len(media.cell) == media.num_tokens
            assert len(media.grids) == len(media.frame_of_group) == int(media.group.max()) + 1
            scored = media.cell[:, 0] >= 0
            limits = np.array(media.grids)[media.group[scored].numpy()]
            assert (media.cell[scored].numpy() < limits).all(), "every cell lies in its group's grid"


def test_a_second_turn_is_the_whole(model):
    """Answers are tokens that the model sampled: here what the tokenizer makes of the answer's text in its place."""
    kinds, answer = ["image"], "blue and red"
    inputs = patchify(model, kinds)
    chat = model.chat
    prefix = chat.prefix_ids(kinds, None, [media.spelling for media in inputs])
    first, _, _ = chat.question_ids("what colour?", True, None)
    messages = [user(model, kinds, "what colour?"), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    want = whole(model, inputs, [*messages, {"role": "user", "content": [{"type": "text", "text": "and where?"}]}])
    second, _, _ = chat.question_ids("and where?", False, None)
    # OneVision's template reopens an old answer with a blank that its own generation prompt does not write.
    agree = len(prefix + first) - (model.family.name == "llava_onevision")
    assert want[:agree] == (prefix + first)[:agree]
    assert want[-len(second) :] == second
    said = want[len(prefix + first) : -len(second)]
    assert chat.decode(said).strip() == answer


def test_control_tokens_are_refused(model):
    for token in model.chat._control:
        with pytest.raises(BadRequest, match="control token"):
            model.chat.question_ids(f"what is {token}?", True, None)
