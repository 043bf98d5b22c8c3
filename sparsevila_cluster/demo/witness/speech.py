"""The projector learns to speak to a language model that does not change: videos as its words, sentences as answers.

The tower is done by now. Of every frame the most salient tokens are kept, as features of its four patches before the projector; the
frozen language model reads what the projector makes of them, and its answers' cross entropy is all that there is to learn from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from sparsevila_cluster.demo.checkpoint_builder import TOKENS_PER_STEP
from sparsevila_cluster.demo.questions import SceneQuestion
from sparsevila_cluster.demo.scenes import STREAMS, Scene
from sparsevila_cluster.demo.training.scene_videos import SampledScene
from sparsevila_cluster.demo.training.windows import crop
from sparsevila_cluster.demo.witness.sentences import SENTENCE_KINDS, make_sentences
from sparsevila_cluster.demo.witness.siglip_runner import FRAMES_PER_STEP, SiglipRunner

IGNORE = -100
MOST_KEPT = 12
WARM_UP = 50
MASTERED = 90.0


@dataclass(frozen=True)
class SeenFrames:
    """The most salient tokens of encoded videos, as features of their patches. features: half [frames, MOST_KEPT, 4, hidden]."""

    scenes: tuple[Scene, ...]
    firsts: tuple[int, ...]  # the first frame of each video
    features: Tensor
    cells: Tensor  # int64 [frames, MOST_KEPT], most salient first

    @staticmethod
    @torch.no_grad()
    def encode(videos: Iterable[SampledScene], num_videos: int, runner: SiglipRunner) -> SeenFrames:
        """The first `num_videos` of them."""
        scenes, firsts, features, cells, first = [], [], [], [], 0
        for video in islice(videos, num_videos):
            seen = runner.patches(runner.patchify(video.frames[None]))
            salience = runner.pool(seen.salience[..., None])[..., 0]
            best = salience.topk(MOST_KEPT, -1).indices
            half = runner.side // 2
            square = seen.tokens.unflatten(1, (half, 2, half, 2)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)
            scenes.append(video.scene)
            firsts.append(first)
            features.append(square.gather(1, best[..., None, None].expand(-1, -1, *square.shape[2:])).half())
            cells.append(best)
            first += len(best)
        return SeenFrames(tuple(scenes), tuple(firsts), torch.cat(features), torch.cat(cells))


class SpeechStage:
    """Owns the projector's optimizer. One `update` is one optimizer step."""

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        frames: SeenFrames,
        seed: int = 0,
        lr: float = 1e-3,
    ) -> None:
        self.model, self.tokenizer, self.frames, self.lr = model, tokenizer, frames, lr
        self.rng = np.random.default_rng((STREAMS["training"], seed, 21))
        self.learned = [*model.model.multi_modal_projector.parameters(), model.model.image_newline]
        self.optimizer = torch.optim.AdamW(self.learned, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.num_updates, self.accuracy = 0, dict[str, float]()

    def update(self, num_steps: int, num_items: int, num_turns: int, num_kept: int, decay: float = 1.0) -> float:
        """The loss of answers."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.num_updates + 1) / WARM_UP) * decay
        hard = tuple(kind for kind in SENTENCE_KINDS if self.accuracy.get(kind, 0.0) < MASTERED)
        items = [self._item(self.frames, self.rng, num_steps, num_turns, hard or SENTENCE_KINDS) for _ in range(num_items)]
        with torch.autocast("cpu", torch.bfloat16):
            logits, wanted, _ = self._predict(self.frames, items, num_kept)
            loss = F.cross_entropy(logits.float(), wanted)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        self.num_updates += 1
        return loss.item()

    @torch.no_grad()
    def examine(self, held: SeenFrames, num_steps: int, num_items: int = 24, num_kept: int = MOST_KEPT) -> dict[str, float]:
        """Per cent of answers that are right word for word, by kind and of all, about other videos."""
        rng, right = np.random.default_rng(0), defaultdict[str, list[bool]](list)
        for _ in range(0, num_items, 4):
            items = [self._item(held, rng, num_steps, len(SENTENCE_KINDS), SENTENCE_KINDS) for _ in range(4)]
            with torch.autocast("cpu", torch.bfloat16):
                logits, wanted, turns = self._predict(held, items, num_kept)
            same, asked = logits.argmax(-1) == wanted, [question for _, _, questions in items for question in questions]
            for number, question in enumerate(asked):
                right[question.kind].append(bool(same[turns == number].all()))
        every = [match for matches in right.values() for match in matches]
        self.accuracy = {kind: 100 * float(np.mean(matches)) for kind, matches in sorted(right.items())}
        return self.accuracy | {"all": 100 * float(np.mean(every))}

    @staticmethod
    def _item(
        frames: SeenFrames, rng: np.random.Generator, num_steps: int, num_turns: int, kinds: Sequence[str]
    ) -> tuple[int, Scene, list[SceneQuestion]]:
        while True:
            video = int(rng.integers(len(frames.scenes)))
            first = int(rng.integers(frames.scenes[video].num_steps - num_steps + 1))
            scene = crop(frames.scenes[video], first, num_steps)
            if next(scene.things(), None) is None:
                continue
            asked = make_sentences(scene, rng, num_turns // 2, kinds) + make_sentences(scene, rng, num_turns - num_turns // 2)
            if asked:
                return frames.firsts[video] + FRAMES_PER_STEP * first, scene, asked

    def _predict(
        self, frames: SeenFrames, items: Sequence[tuple[int, Scene, list[SceneQuestion]]], num_kept: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the rows that predict an answer token, those tokens, and which turn each is of. Turns do not see each other."""
        text, encode = self.model.model.language_model, self._encode
        num_frames = FRAMES_PER_STEP * items[0][1].num_steps
        before, after = encode("<|im_start|>user\n"), encode("\n")
        cells = torch.stack([frames.cells[first : first + num_frames, :num_kept] for first, _, _ in items])
        features = torch.stack([frames.features[first : first + num_frames, :num_kept].float() for first, _, _ in items])
        place = (torch.arange(num_frames)[:, None] * TOKENS_PER_STEP + cells).flatten(1)
        order = place.argsort(1)
        visual = self.model.model.multi_modal_projector(features).mean(3).flatten(1, 2)
        visual = visual.gather(1, order[..., None].expand(-1, -1, visual.shape[-1]))
        num_media, end = len(before) + place.shape[1] + 1, len(before) + num_frames * TOKENS_PER_STEP + 1
        rows, number = [], 0
        for _, _, questions in items:
            ids, of_turns, places = list(after), [-1] * len(after), [end + i for i in range(len(after))]
            expected = [IGNORE] * len(after)
            for i, question in enumerate(questions):
                head = "" if i == 0 else "<|im_end|>\n<|im_start|>user\n"
                asked = encode(f"{head}{question.text}<|im_end|>\n<|im_start|>assistant\n")
                said = encode(f"{question.answer}<|im_end|>")
                ids += asked + said
                expected += [IGNORE] * len(asked) + said
                of_turns += [number] * (len(asked) + len(said))
                # Each turn stands where the first would stand.
                places += [end + len(after) + j for j in range(len(asked) + len(said))]
                number += 1
            rows.append((ids, of_turns, places, expected))
        length = max(len(ids) for ids, *_ in rows)

        def padded(part: int, value: int) -> Tensor:
            return torch.tensor([row[part] + [value] * (length - len(row[part])) for row in rows])

        suffix, turn, position, labels = (padded(part, value) for part, value in ((0, 0), (1, -2), (2, 0), (3, IGNORE)))
        table, num_items = text.embed_tokens, len(items)
        newline = self.model.model.image_newline.expand(num_items, 1, -1)
        prefix = table(torch.tensor(before)).expand(num_items, -1, -1)
        embeds = torch.cat([prefix, visual, newline, table(suffix)], 1)
        media_positions = torch.cat([torch.arange(len(before)).expand(num_items, -1), len(before) + place.gather(1, order)], 1)
        positions = torch.cat([media_positions, torch.full((num_items, 1), end - 1), position], 1)
        of_turn = torch.cat([torch.full((num_items, num_media), -1), turn], 1)
        total = embeds.shape[1]
        sees = (of_turn[:, :, None] == of_turn[:, None, :]) | (of_turn[:, None, :] == -1)
        mask = (sees & torch.ones(total, total, dtype=torch.bool).tril())[:, None]
        bias = torch.zeros(mask.shape, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)
        hidden = text(inputs_embeds=embeds, attention_mask=bias, position_ids=positions, use_cache=False).last_hidden_state
        wanted = labels[:, 1:]
        predicts = hidden[:, num_media:-1][wanted != IGNORE]
        return self.model.lm_head(predicts), wanted[wanted != IGNORE], turn[:, 1:][wanted != IGNORE]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on as if nothing had happened."""
        parts = {"projector": self.model.model.multi_modal_projector.state_dict(), "newline": self.model.model.image_newline.data}
        return parts | {
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.bit_generator.state,
            "num_updates": self.num_updates,
            "accuracy": self.accuracy,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.model.model.multi_modal_projector.load_state_dict(state["projector"])
        self.model.model.image_newline.data.copy_(state["newline"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        self.num_updates, self.accuracy = state["num_updates"], dict(state["accuracy"])
