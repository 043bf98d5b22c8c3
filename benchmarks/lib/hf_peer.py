"""The peer: transformers' own `generate` on the same weights, in the same precision, from the same pixels.

It runs as a user would run it: `AutoModelForImageTextToText`, scaled-dot-product attention, greedy, its own KV memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.stopwatch import Times
from sparsevila_cluster.media import Media
from sparsevila_cluster.models import Model
from sparsevila_cluster.models.families.qwen_vl import QwenVL


class Peer:
    def __init__(self, directory: Path, model: Model):
        """`model`: ours, for preprocessing and token ids; its weights are not used."""
        from transformers import AutoModelForImageTextToText

        self._ours = model
        self._theirs = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=model.spec.dtype, attn_implementation="sdpa", local_files_only=True
        ).eval()
        # An answer of fixed length: no token ends it.
        self._theirs.generation_config.eos_token_id = None

    def inputs(self, media: Media, question: str, batch: int = 1) -> dict[str, Any]:
        """The same video and question `batch` times. Pixels come from our preprocessing, which equals theirs."""
        ours = self._ours
        family = ours.family
        assert isinstance(family, QwenVL), "both models of the benchmark are of the Qwen-VL kind"
        cut = family.patchify(media)
        plan = family.plan(ours.chat.prefix_ids([media.kind], None), [cut], "hf5")
        words, _, _ = ours.chat.question_ids(question, first=True, pending=None)
        ids = torch.cat([plan.ids, torch.tensor(words)])
        kind = torch.zeros_like(ids)
        kind[: len(plan.ids)][plan.visual_mask] = 2
        groups, rows, cols = cut.grid
        merge = ours.config.vision_config.spatial_merge_size
        pixels = family.pixel_values(cut)
        return {
            "input_ids": ids.expand(batch, -1),
            "attention_mask": torch.ones(batch, len(ids), dtype=torch.int64),
            "mm_token_type_ids": kind.expand(batch, -1),
            "pixel_values_videos": pixels.repeat(batch, 1),
            "video_grid_thw": torch.tensor([[groups, rows * merge, cols * merge]] * batch),
            "second_per_grid_ts": [cut.seconds_per_group] * batch,
        }

    def live(self, media: Media, question: str, num_tokens: int) -> Generation:
        """From frames in memory to a whole answer; the times include making the inputs."""
        start_s = time.perf_counter()
        inputs = self.inputs(media, question)
        inputs_ms = (time.perf_counter() - start_s) * 1e3
        made = self.generate(inputs, num_tokens)
        return replace(made, first_ms=made.first_ms + inputs_ms, total_ms=made.total_ms + inputs_ms)

    @torch.inference_mode()
    def generate(
        self, inputs: dict[str, Any], num_tokens: int, between: Callable[[], None] | None = None, block: int = 1
    ) -> Generation:
        """Greedy tokens. After every `block` timed steps `between` is called, on nobody's time."""
        clock = _Clock(between, block)
        ids = self._theirs.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, streamer=clock)
        tokens = tuple(ids[0, inputs["input_ids"].shape[1] :].tolist())
        assert len(tokens) == num_tokens, "something ended the answer"
        return Generation(tokens, clock.first_ms, clock.total_ms, clock.steps)


@dataclass(frozen=True)
class Generation:
    """Tokens of the first sequence; milliseconds from the prompt to the first token and to the last; single steps."""

    tokens: tuple[int, ...]
    first_ms: float
    total_ms: float
    steps: Times


class _Clock:
    """A streamer, which `generate` calls with the prompt and then with every token, that looks at the time.

    Time runs from its creation, not from the prompt: `generate` encodes the media before it hands out the prompt. The first step
    after a pause warms the processor's caches and is left out of `steps`.
    """

    def __init__(self, between: Callable[[], None] | None, block: int):
        self.steps = Times()
        self.first_ms = self.total_ms = 0.0
        self._between, self._block = between, block
        self._prompt = True
        self._last_s = time.perf_counter()
        self._since_pause = -1

    def put(self, value: Tensor) -> None:
        now_s = time.perf_counter()
        if self._prompt:
            self._prompt = False
            return
        self._take((now_s - self._last_s) * 1e3)
        self._last_s = time.perf_counter()

    def _take(self, ms: float) -> None:
        self.total_ms += ms
        if not self.first_ms:
            self.first_ms = ms
            return
        self._since_pause += 1
        if self._since_pause:
            self.steps.add(ms)
        if self._between is not None and self._since_pause == self._block:
            self._between()
            self._since_pause = -1

    def end(self) -> None:
        pass
