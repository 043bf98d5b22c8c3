"""Directories that one calibrates on: what they mean, and every way in which they can be broken."""

import json

import pytest
from PIL import Image

from sparsevila_cluster.core.errors import BadMedia, BadRequest
from sparsevila_cluster.models.loading.originals import open_original
from sparsevila_cluster.quantization.calibration import Reading, make_samples, token_ids
from sparsevila_cluster.quantization.materials import DEFAULT_TURNS, Material, read_materials
from tests.checkpoints import tiny_qwen2_5_vl
from tests.media.media_files import picture_bytes, video_bytes
from tests.quantization.quantization_subjects import READING, TURNS, texts


@pytest.fixture(scope="module")
def original(vl):
    return open_original(vl, device="cpu")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(video_bytes(8, fps=4, size=(64, 48)))
    (tmp_path / "clip.txt").write_text("what colour is it?\n\n where is it? \n")
    (tmp_path / "picture.png").write_bytes(picture_bytes(Image.new("RGB", (64, 48), (200, 30, 30))))
    (tmp_path / "notes.txt").write_text("the star is red " * 20)
    (tmp_path / ".hidden").write_text("nothing")
    (tmp_path / "below").mkdir()
    lines = [
        {"text": "where is the circle?"},
        {"ids": [1, 2, 3]},
        {"media": ["picture.png", "clip.mp4"], "turns": [["what?", "a star"]]},
    ]
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return tmp_path


def test_a_directory_is_read_file_by_file(folder):
    (folder / "alone.png").write_bytes((folder / "picture.png").read_bytes())
    found = {material.name: material for material in read_materials(folder)}
    assert set(found) == {"more.jsonl, line 1", "more.jsonl, line 2", "more.jsonl, line 3", "alone.png", "notes.txt"}
    assert found["alone.png"].turns == DEFAULT_TURNS
    assert found["more.jsonl, line 2"].ids == (1, 2, 3)
    assert found["more.jsonl, line 3"].media == (folder / "picture.png", folder / "clip.mp4")
    (folder / "more.jsonl").unlink()
    found = {material.name: material for material in read_materials(folder)}
    assert set(found) == {"alone.png", "clip.mp4", "picture.png", "notes.txt"}
    assert found["clip.mp4"].turns == (("what colour is it?", ""), ("where is it?", ""))


def test_materials_become_sequences(folder, original):
    materials = read_materials(folder)
    samples = make_samples(original.model, original.vocabulary, materials, READING)
    ids = token_ids(original.vocabulary, next(m for m in materials if m.name == "notes.txt"))
    pieces = [len(ids[i : i + 64]) for i in range(0, len(ids), 64)]
    lengths = [len(sample.hidden) for sample in samples if not len(sample.visual_rows)]
    assert sorted(lengths) == sorted([*pieces, 3, len(original.vocabulary.ids_of("where is the circle?"))])
    dense, pruned = [sample for sample in samples if len(sample.visual_rows)]
    assert len(pruned.visual_rows) < len(dense.visual_rows) == len(dense.hidden) - len(pruned.hidden) + len(pruned.visual_rows)
    for sample in samples:
        assert sample.positions.shape == (3, len(sample.hidden)) and sample.hidden.dtype.is_floating_point
    only = make_samples(original.model, original.vocabulary, materials, Reading(64, max_frames=4, pruned=False))
    assert len(only) == len(samples) - 1


def test_dialogues_are_written_as_the_template_writes_them(original):
    """Turn by turn, up to the answer of the last one."""
    material = Material("a", media=(tiny_qwen2_5_vl.media("image"),), turns=TURNS)
    sample, *_ = make_samples(original.model, original.vocabulary, [material], READING)
    chat = original.model.chat
    prefix = len(sample.hidden) - sum(
        len(chat.question_ids(question, first=i == 0, pending=None)[0]) + len(original.vocabulary.ids_of(answer))
        for i, (question, answer) in enumerate(TURNS)
    )
    assert prefix > len(sample.visual_rows) and (sample.positions[:, prefix:].diff(dim=1) == 1).all()


def test_samples_end_where_the_models_positions_end(tmp_path, text_model):
    original = open_original(text_model, device="cpu")
    samples = make_samples(original.model, original.vocabulary, [Material("long", ids=(1,) * 1200)], Reading(text_tokens=4096))
    assert [len(sample.hidden) for sample in samples] == [512, 512, 176]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"\xff\xfe\x00", "a.txt: not UTF-8 text: byte 0 is 0xff"),
        ("a.txt", b"  \n", "a.txt: holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[1]", "a.jsonl, line 1: must be an object"),
        ("a.jsonl", b'{"txt": "x"}', "a.jsonl, line 1: must be an object with 'text', 'ids', or 'media' and 'turns', got ['txt']"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl, line 1: 'text' must be"),
        ("a.jsonl", b'{"ids": []}', "a.jsonl, line 1: 'ids' must be"),
        ("a.jsonl", b'{"ids": [1, -2]}', "a.jsonl, line 1: 'ids' must be"),
        ("a.jsonl", b'{"ids": [true]}', "a.jsonl, line 1: 'ids' must be"),
        ("a.jsonl", b'{"media": "none.mp4"}', "a.jsonl, line 1: there is no file"),
        ("a.jsonl", b'{"media": [], "turns": []}', "a.jsonl, line 1: 'media' must be"),
        ("a.jsonl", b'{"media": "a.jsonl", "turns": [["q"]]}', "a.jsonl, line 1: 'turns' must be"),
        ("a.jsonl", b"", "a.jsonl: holds no text"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRequest) as caught:
        read_materials(tmp_path)
    assert str(caught.value).startswith(told.split(":")[0]) and told in str(caught.value)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="holds no media"):
        read_materials(tmp_path)
    with pytest.raises(BadRequest, match="not a directory"):
        read_materials(tmp_path / "missing")


def test_a_file_that_is_no_media_is_named(tmp_path, original):
    (tmp_path / "broken.mp4").write_bytes(b"This is no video. " * 100)
    with pytest.raises(BadMedia, match=r"^broken\.mp4: "):
        make_samples(original.model, original.vocabulary, read_materials(tmp_path), READING)


def test_tokens_and_media_that_a_model_does_not_have_are_refused(original, text_model):
    with pytest.raises(BadRequest, match=r"^far: the model has no token 5000"):
        make_samples(original.model, original.vocabulary, [Material("far", ids=(5000,))], READING)
    language = open_original(text_model, device="cpu")
    material = Material("seen", media=(tiny_qwen2_5_vl.media("image"),), turns=TURNS)
    with pytest.raises(BadRequest, match=r"^seen: it has media"):
        make_samples(language.model, language.vocabulary, [material], READING)


def test_fingerprints_tell_materials_apart(folder):
    prints = [material.fingerprint() for material in [*read_materials(folder), *texts(3)]]
    assert len(set(prints)) == len(prints)
    before = {material.name: material.fingerprint() for material in read_materials(folder)}
    (folder / "clip.mp4").write_bytes((folder / "clip.mp4").read_bytes() + b"\0")
    after = {material.name: material.fingerprint() for material in read_materials(folder)}
    assert {name for name in before if before[name] != after[name]} == {"more.jsonl, line 3"}
