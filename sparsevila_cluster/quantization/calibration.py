"""From materials to sequences of embeddings, as the text model will see them when it serves.

media -> patchify -> plan -> encode -> all visual tokens, and again those that serving would keep -> + turns -> Sample
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.errors import BadRequest, UserError
from sparsevila_cluster.core.requests import MediaSource, PrepareRequest
from sparsevila_cluster.engine.prefill_engine import PrefillEngine
from sparsevila_cluster.engine.prompt_rows import keep_of_each, kept_prompt_rows
from sparsevila_cluster.media import Media
from sparsevila_cluster.models.adapter import Model
from sparsevila_cluster.models.loading.originals import Vocabulary
from sparsevila_cluster.models.loading.text_only import TextModel
from sparsevila_cluster.quantization.layer_quantizer import Sample
from sparsevila_cluster.quantization.materials import Material, Turn

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reading:
    """How materials are read. text_tokens: longest piece of plain text; fps, max_frames: of videos; pruned: media also as pruning
    leaves them.
    """

    text_tokens: int = 512
    fps: float = 1.0
    max_frames: int = 16
    pruned: bool = True


@torch.inference_mode()
def make_samples(
    model: Model | TextModel,
    vocabulary: Vocabulary,
    materials: Sequence[Material],
    reading: Reading,
    report: Report = lambda *_: None,
) -> list[Sample]:
    """Run materials through the vision side and the embedding of `model`; samples lie in CPU memory, float32.

    Raises:
        BadRequest: an id or a text that the model does not take, or no materials. BadMedia, TooLarge: media that do not
        decode or do not fit. Every message begins with the material's name.
    """
    if not materials:
        raise BadRequest("there is nothing to calibrate on")
    samples: list[Sample] = []
    with closing(_Studio(model, vocabulary, reading)) as studio:
        for number, material in enumerate(materials):
            report("calibration", number, len(materials))
            try:
                samples += studio.dialogue(material) if material.media else studio.text(token_ids(vocabulary, material))
            except UserError as error:
                if str(error).startswith(material.name):
                    raise
                raise type(error)(f"{material.name}: {error}") from error
    report("calibration", len(materials), len(materials))
    return samples


def token_ids(vocabulary: Vocabulary, material: Material) -> list[int]:
    """A material as text alone: all that a quantizer sees that knows no media.

    Raises:
        BadRequest: an id that the model does not have.
    """
    over = [one for one in material.ids if one >= vocabulary.size]
    if over:
        raise BadRequest(f"{material.name}: the model has no token {over[0]}; it has {vocabulary.size}")
    spoken = " ".join(part for turn in material.turns for part in turn if part)
    return list(material.ids) or vocabulary.ids_of(material.text or spoken)


class _Studio:
    """A model's vision side, opened when the first media come."""

    def __init__(self, model: Model | TextModel, vocabulary: Vocabulary, reading: Reading):
        self._model, self._vocabulary, self._reading = model, vocabulary, reading
        self._engine: PrefillEngine | None = None

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def text(self, ids: Sequence[int]) -> Iterator[Sample]:
        model = self._model
        for piece in torch.tensor(ids).split(min(self._reading.text_tokens, model.max_position)):
            hidden = model.text.embed(piece.to(model.device)).float().cpu()
            positions = torch.arange(len(piece)).expand(model.text.num_position_rows, -1)
            yield Sample(hidden, positions, torch.empty(0, dtype=torch.int64))

    def dialogue(self, material: Material) -> Iterator[Sample]:
        model, reading = self._model, self._reading
        if not isinstance(model, Model):
            raise BadRequest("it has media, and the model is a language model without vision")
        if self._engine is None:
            self._engine = PrefillEngine(model, EngineConfig(fps=reading.fps, max_frames=reading.max_frames))
        engine = self._engine
        sources = [MediaSource(str(one)) for one in material.media if isinstance(one, Path)]
        request = PrepareRequest(tuple(sources) or (MediaSource(material.name),))
        loaded = iter(engine.load(request) if sources else [])
        inputs, _ = engine.patchify(one if isinstance(one, Media) else next(loaded) for one in material.media)
        plan = engine.plan(inputs)
        tokens = model.family.encode(inputs, ("salience",) if reading.pruned else ())
        keeps = [torch.arange(len(tokens.embeds), device=model.device)]
        if reading.pruned:
            keeps.append(keep_of_each([engine.pruning(request, one.kind) for one in inputs], inputs, tokens))
        ids = self._spoken(model, material.turns)[: model.max_position - plan.question_start_pos]
        spoken = torch.tensor(ids, dtype=torch.int64, device=model.device)
        after = torch.arange(plan.question_start_pos, plan.question_start_pos + len(ids), device=model.device)
        for keep in keeps:
            rows = kept_prompt_rows(plan, keep)
            visual_rows = plan.visual_mask[rows].nonzero()[:, 0]
            hidden = model.text.embed(torch.cat((plan.ids[rows], spoken))).float()
            hidden[visual_rows] = tokens.embeds[keep].float()
            positions = torch.cat((plan.positions[:, rows], after.expand(len(plan.positions), -1)), 1)
            deepstack = tuple(level[keep].float().cpu() for level in tokens.deepstack)
            yield Sample(hidden.cpu(), positions.cpu(), visual_rows.cpu(), deepstack)

    def _spoken(self, model: Model, turns: Sequence[Turn]) -> list[int]:
        """Questions and answers behind the media, as the chat template writes them."""
        ids: list[int] = []
        for number, (question, answer) in enumerate(turns):
            ids += model.chat.question_ids(question, first=number == 0, pending=None)[0]
            ids += self._vocabulary.ids_of(answer) if answer else []
        return ids


def num_rows(samples: Sequence[Sample]) -> int:
    """Tokens of all samples."""
    return sum(len(sample.hidden) for sample in samples)


def check_finite(samples: Sequence[Sample]) -> None:
    """Raises BadRequest: embeddings that are not finite, so that nothing can be measured on them."""
    for number, sample in enumerate(samples):
        tensors: tuple[Tensor, ...] = (sample.hidden, *sample.deepstack)
        if not all(torch.isfinite(one).all() for one in tensors):
            raise BadRequest(f"calibration sample {number}: its embeddings are not finite; embedding or vision tower are broken")
