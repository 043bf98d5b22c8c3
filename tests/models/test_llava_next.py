"""LLaVA-NeXT: videos as pictures in the template's own way, templates and text models of its published checkpoints."""

import pytest
import torch

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.chat_template import TemplateChat
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.families.llava_next import LlavaNext
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.tiny_llava_next import TEMPLATE, make_llava_next, stock_inputs
from tests.checkpoints.transformers_oracle import Bench, random_media, worst


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_llava_next(tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


IMAGES = "{% for part in turn['content'] if part['type'] == 'image' %}"
TEXTS = "{% for part in turn['content'] if part['type'] == 'text' %}"
# In the manner of the published checkpoints, by text model: what stands between two pictures, and the template.
TEMPLATES = {
    "mistral": ("\n", TEMPLATE),
    "vicuna": (
        "\n",
        "{% for turn in messages %}{% if turn['role'] != 'system' %}{{ turn['role'].upper() + ': ' }}{% endif %}"
        + IMAGES + "{{ '<image>\\n' }}{% endfor %}" + TEXTS + "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ),
    "llama 3": (
        "",
        "{% for turn in messages %}{{ '</s>' + turn['role'] + '<s>\\n\\n' }}"
        + IMAGES + "{{ '<image>' }}{% endfor %}" + TEXTS + "{{ '\\n' + part['text'] + '</s>' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '</s>assistant<s>\\n\\n' }}{% endif %}",
    ),
}  # fmt: skip


def chat_of(directory, tmp_path, template, config):
    import shutil

    copy = shutil.copytree(directory, tmp_path / "chat")
    (copy / "chat_template.jinja").write_text(template)
    return TemplateChat(Checkpoint.open(copy), LlavaNext.slots(config), LlavaNext.visual_ids(config))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_video_is_written_as_the_template_writes_pictures(directory, model, tmp_path, name):
    between, template = TEMPLATES[name]
    chat = chat_of(directory, tmp_path, template, model.config)
    video = model.family.patchify(tiny_qwen2_5_vl.media("video", frames=3, height=40, width=60))
    ids = chat.prefix_ids(["video"], None, [video.spelling])
    assert ids == chat.prefix_ids(["image"] * 3, None)
    written = chat._core.decode(ids, skip_special_tokens=False).replace(" ", "")
    assert written.endswith(between.join(["<image>"] * 3))
    plan = model.family.plan(ids, [video])
    assert int(plan.visual_mask.sum()) == 3 * 17 == video.num_tokens and video.runs == (17,) * 3


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_templates_are_cut_without_a_seam(directory, model, tmp_path, name, system):
    chat = chat_of(directory, tmp_path, TEMPLATES[name][1], model.config)
    content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
    messages = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    text = chat._tokenizer.apply_chat_template(messages, chat_template=chat._template, tokenize=False, add_generation_prompt=True)
    question, start, stop = chat.question_ids("what colour is it?", True, None)
    prefix = chat.prefix_ids(["image"], system)
    assert prefix + question == chat._tokenizer(text)["input_ids"]
    assert prefix[0] == 1 and prefix[1] != 1, "one token opens the sequence"
    assert chat.decode(question[start:stop]).strip() == "what colour is it?"
    later = chat.question_ids("and where?", False, next(iter(chat.eos_ids)))[0]
    assert "and where?" in chat.decode(later)


def test_a_picture_beside_a_video_keeps_its_place(model):
    """Both are pictures to the template: any order is possible."""
    bench = Bench(model, build_config(model="unused", prefix_bytes=2**22, turn_bytes=2**22))
    medias = [tiny_qwen2_5_vl.media("video", frames=2, height=40, width=60), tiny_qwen2_5_vl.media("image", height=60, width=90)]
    inputs, plan = bench.unpruned(medias)
    assert [one.kind for one in inputs] == ["video", "image"]
    assert int(plan.visual_mask.sum()) == sum(one.num_tokens for one in inputs)
    changes = (plan.visual_mask[1:] & ~plan.visual_mask[:-1]).sum()
    assert int(changes) == 3, "two frames and a picture, text between them"


def test_a_picture_is_tiled_in_any_company(model):
    one = tiny_qwen2_5_vl.media("image", height=100, width=60)
    alone, among = model.family.patchify(one), model.family.patchify(one, alone=False)
    assert torch.equal(alone.pixels, among.pixels) and alone.runs == among.runs and len(alone.grids) == 2


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_other_text_models_equal_generate(tmp_path, text):
    directory = make_llava_next(tmp_path, text=text, layers=2)
    model, stock = load_model(directory), tiny_qwen2_5_vl.hf_model(directory)
    model.chat.eos_ids = frozenset()
    config = build_config(model="unused", prefix_bytes=2**22, turn_bytes=2**22, prune="keep_all", retrieve="retrieve_all")
    bench, media = Bench(model, config), random_media("image", 1, 84, 112, seed=1)
    inputs, plan = bench.unpruned(media)
    spoken = bench.say(bench.prefix(media).key, "talk", "what is it?", 6)
    ids = torch.tensor([plan.ids.tolist() + spoken.question_ids])
    want = stock.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **stock_inputs(model, inputs), max_new_tokens=6, do_sample=False,
        output_logits=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert model.text.name == "lean" and spoken.tokens == want.sequences[0, ids.shape[1] :].tolist()
    assert worst([spoken], [torch.cat(want.logits)]) < 1e-4
