"""Chat templates cut into prefix, question and closing: the pieces must be the whole."""

import json
import shutil

import pytest

from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest
from sparsevila_cluster.models.adapter import Slot
from sparsevila_cluster.models.chat_template import TemplateChat
from sparsevila_cluster.models.checkpoint import Checkpoint
from tests.checkpoints import tiny_qwen2_5_vl

SYSTEM = [None, "Answer in one word."]
QUESTIONS = ["what colour is the star?", "  spaces and\nnew lines ", "\n\nyes", "ünïcode 😀 ok", "a", "."]


@pytest.fixture(scope="module")
def stock(hub):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(hub))


def whole(stock, kinds, system, turns):
    """ids of the conversation rendered at once; turns: questions and answers in turn."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, text in enumerate(turns):
        content = [{"type": kind} for kind in kinds] if i == 0 else []
        messages.append({"role": ("user", "assistant")[i % 2], "content": content + [{"type": "text", "text": text}]})
    return stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]


@pytest.mark.parametrize("system", SYSTEM)
@pytest.mark.parametrize("kinds", [["video"], ["image"], ["image", "video", "image"]])
@pytest.mark.parametrize("question", QUESTIONS)
def test_first_turn(model, stock, kinds, system, question):
    ids, start, stop = model.chat.question_ids(question, True, None)
    prefix = model.chat.prefix_ids(kinds, system)
    assert prefix + ids == whole(stock, kinds, system, [question])
    assert prefix[-1] == model.config.vision_end_token_id
    assert stock.decode(ids[start:stop]) == question


@pytest.mark.parametrize("question", QUESTIONS)
def test_later_turns_closed_by_an_end_token(model, stock, question):
    end = stock.convert_tokens_to_ids("<|im_end|>")
    ids = model.chat.prefix_ids(["video"], None) + model.chat.question_ids("where is it?", True, None)[0]
    for answer in ("red", "the blue one.", "green"):
        ids += stock.encode(answer, add_special_tokens=False)
        more, start, stop = model.chat.question_ids(question, False, end)
        assert more[0] == end and stock.decode(more[start:stop]) == question
        ids += more
    turns = ["where is it?", "red", question, "the blue one.", question, "green", question]
    assert ids == whole(stock, ["video"], None, turns)


def test_an_answer_cut_short_is_closed_by_the_template(model):
    closed, start, stop = model.chat.question_ids("why", False, next(iter(model.chat.eos_ids)))
    cut, start_cut, stop_cut = model.chat.question_ids("why", False, 65)
    assert cut == [65, *closed] and (start_cut, stop_cut) == (start + 1, stop + 1)
    assert model.chat.question_ids("why", False, None)[0] == closed


def test_an_empty_question_has_no_words(model):
    ids, start, stop = model.chat.question_ids("", True, None)
    assert start == stop <= len(ids)


@pytest.mark.parametrize("token", tiny_qwen2_5_vl.SPECIAL)
def test_control_tokens_are_refused(model, token):
    with pytest.raises(BadRequest) as caught:
        model.chat.question_ids(f"what {token} now", True, None)
    assert token in str(caught.value) and "question" in str(caught.value)
    with pytest.raises(BadRequest, match="system prompt"):
        model.chat.prefix_ids(["video"], token)
    with pytest.raises(BadRequest, match="at least one media"):
        model.chat.prefix_ids([], None)


def test_default_system_prompt_is_the_template_s_own(model):
    assert "helpful assistant" in model.chat.decode(model.chat.prefix_ids(["video"], None))
    assert "helpful assistant" not in model.chat.decode(model.chat.prefix_ids(["video"], "Be brief."))


def test_decode_and_sizes(model, stock):
    ids = stock.encode("the star is réd", add_special_tokens=False)
    assert model.chat.decode([*ids, *model.chat.eos_ids]) == "the star is réd"
    assert model.chat.vocab_size == len(stock)
    assert {stock.decode([i]) for i in model.chat.eos_ids} == {"<|im_end|>", "<|endoftext|>"}


def chat_of(hub, tmp_path, template=None, files=None, remove=()):
    directory = tmp_path / "chat"
    shutil.copytree(hub, directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    for name, data in (files or {}).items():
        (directory / name).write_text(json.dumps(data))
    for name in remove:
        (directory / name).unlink()
    checkpoint = Checkpoint.open(directory)
    ids = {kind: checkpoint.config[f"{kind}_token_id"] for kind in ("video", "image")}
    return TemplateChat(checkpoint, {kind: Slot(kind, (token,)) for kind, token in ids.items()}, list(ids.values()))


def test_the_processor_s_template_comes_first(hub, tmp_path):
    chat = chat_of(
        hub, tmp_path, files={"chat_template.json": {"chat_template": tiny_qwen2_5_vl.TEMPLATE.replace("helpful", "silent")}}
    )
    assert "silent assistant" in chat.decode(chat.prefix_ids(["video"], None))


def test_a_template_that_trims(hub, tmp_path):
    chat = chat_of(hub, tmp_path, tiny_qwen2_5_vl.TEMPLATE.replace("{{ part['text'] }}", "{{ part['text'] | trim }}"))
    assert chat.question_ids("  why  ", True, None) == chat.question_ids("why", True, None)


PART = "{% elif 'text' in part %}{{ part['text'] }}"
BROKEN = {
    "cannot be rendered": "{% for m in messages %}{{ m.nothing.there }}{% endfor %}",
    "cannot be rendered: TemplateSyntaxError": "{% for %}",
    "does not place '<|video_pad|>'": tiny_qwen2_5_vl.TEMPLATE.replace("<|video_pad|>", ""),
    "places more media": tiny_qwen2_5_vl.TEMPLATE.replace("<|image_pad|>", "<|image_pad|><|image_pad|>"),
    "exactly once": tiny_qwen2_5_vl.TEMPLATE.replace(PART, PART + "{{ part['text'] }}"),
    "for each of: video": "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
    "as it writes the first": tiny_qwen2_5_vl.TEMPLATE.replace("{% if add_generation_prompt %}", "{% if messages | length == 1 %}"),
    "surrounds a question differently": tiny_qwen2_5_vl.TEMPLATE.replace(
        "<|video_pad|><|vision_end|>", "<|video_pad|><|vision_end|>\n"
    ),
}


@pytest.mark.parametrize("message", sorted(BROKEN))
def test_templates_that_cannot_be_cut_are_refused(hub, tmp_path, message):
    with pytest.raises(BadCheckpoint, match=message):
        chat_of(hub, tmp_path, BROKEN[message])


def test_a_prefix_must_end_at_a_control_token(hub, tmp_path):
    plain = tiny_qwen2_5_vl.TEMPLATE.replace("<|vision_start|><|video_pad|><|vision_end|>", "[video]")
    directory = shutil.copytree(hub, tmp_path / "chat")
    (directory / "chat_template.jinja").write_text(plain)
    with pytest.raises(BadCheckpoint, match="no control token before the question"):
        TemplateChat(Checkpoint.open(directory), {"video": Slot("video", ("[video]",))}, [])


def test_missing_pieces_are_named(hub, tmp_path):
    with pytest.raises(BadCheckpoint, match="has no tokenizer"):
        chat_of(hub, tmp_path / "a", remove=["tokenizer.json"])
    with pytest.raises(BadCheckpoint, match="has no chat template"):
        chat_of(hub, tmp_path / "b", files={"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}})
    with pytest.raises(BadCheckpoint, match="tokenizer cannot be loaded"):
        chat_of(hub, tmp_path / "c", files={"tokenizer.json": {"version": "1.0"}})
    with pytest.raises(BadCheckpoint, match="eos_token_id.*'x'|eos_token_id.*x"):
        chat_of(hub, tmp_path / "d", files={"generation_config.json": {"eos_token_id": ["x"]}})
