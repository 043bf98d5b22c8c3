"""From media to a media prefix: decode, encode, prune, prefill. No question is known here.

The stages of a prefill:

sources -> frames -> patches -> visual tokens + salience -> keep -> [system + kept tokens] -> KV rows in an extent
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsevila_cluster.attention.torch_backend import MediaBatch
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.errors import BadRequest, TooLarge
from sparsevila_cluster.core.fair_sharing import FairLock
from sparsevila_cluster.core.protocols import Progress
from sparsevila_cluster.core.requests import PrepareRequest, Timeline
from sparsevila_cluster.engine.config_check import check_choices
from sparsevila_cluster.engine.content_key import content_key, tenant_salt
from sparsevila_cluster.engine.prompt_rows import chunk_bounds, close_gaps, keep_of_each, kept_prompt_rows
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.kvcache.prefix import MediaPrefix, PrefixMetadata
from sparsevila_cluster.media import DecoderSandbox, Media, MediaCost, check_cost, identify, measure_media, open_media
from sparsevila_cluster.models.adapter import Model, PromptPlan, VisualInputs, VisualTokens
from sparsevila_cluster.pruning import build_pruning
from sparsevila_cluster.pruning.pruning_method import PruningMethod

STAGES = ("decode", "encode", "prune", "prefill")
SECRET_BYTES = 32


class PrefillObserver(Protocol):
    """Follows a prefix while it is made, to send or to copy it. Called in the prefill's thread; raising ends the prefill."""

    def on_start(self, prefix: MediaPrefix, bounds: Sequence[int]) -> None:
        """All of `prefix` but its KV rows is known. They will be written chunk by chunk, [bounds[i], bounds[i + 1])."""
        ...

    def on_rows(self, layer: int, start: int, stop: int) -> None:
        """Rows [start, stop) of a layer are in the extent and final; on a GPU, as soon as what is enqueued by now has run."""
        ...


def _ignore_progress(stage: str, done: int, total: int) -> None:
    pass


def _wanted() -> None:
    pass


@dataclass
class Preparation:
    """One request on its way to a media prefix: whom to report progress to, when each stage began, whose turn it is to compute.

    check: raises once nobody waits for it any more. lock: held by the one preparation that computes. queued: no thread has it yet.
    """

    request: PrepareRequest
    progress: Progress = _ignore_progress
    check: Callable[[], object] = _wanted
    lock: FairLock = field(default_factory=FairLock)
    timeline: Timeline = field(default_factory=Timeline)
    queued: bool = True

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute alone in the block, but for pauses. Raises what `check` raises."""
        self.lock.acquire(self.request.owner, self.check)
        try:
            yield
        finally:
            self.lock.release(self.request.owner)

    def pause(self) -> None:
        """Between two pieces of work: another owner's preparation computes first if it has had less. Raises what `check` raises."""
        self.lock.pause(self.request.owner, self.check)

    def stage(self, name: str) -> None:
        """A stage begins."""
        self.timeline.mark(name)
        self.progress(name, 0, 1)

    def stage_ms(self) -> dict[str, float]:
        """Milliseconds of each stage that ran."""
        ends = dict(zip(STAGES, (*STAGES[1:], "ready"), strict=True))
        spans = {name: self.timeline.ms(name, end) for name, end in ends.items()}
        return {name: round(ms, 3) for name, ms in spans.items() if ms is not None}


class PrefillEngine:
    """Makes media prefixes. Needs the parts vision, embed and llm.

    Its methods may be called from any thread: preparations decode and resize side by side, and share one lock to compute under.
    Owns the processes in which sources are decoded, from the first `load` to `close`.
    """

    def __init__(self, model: Model, config: EngineConfig, wire: str = "none", secret: bytes | None = None):
        """wire: how KV is quantized on its way to where it is used; it is part of the content key.

        secret: salts content keys; engines name the same media alike only if they share it. None: one of this engine's own.
        """
        check_choices(config)
        self._secret = secrets.token_bytes(SECRET_BYTES) if secret is None else secret
        self.model = model
        self.config = config
        self.wire = wire
        self.sandbox = DecoderSandbox()
        self.num_prefills = 0

    def key_of(self, request: PrepareRequest) -> str:
        """The content key of the prefix that `prefill` would make, from one pass over the source bytes and no decoding.

        Raises:
            BadMedia, BadRequest, TooLarge, DeadlineExceeded.
        """
        limits = self.config.limits
        if len(request.sources) > limits.max_images:
            raise BadRequest(f"{len(request.sources)} media in one request; the limit is {limits.max_images}")
        fps, cap = self._sampling(request)
        known = [identify(source, fps=fps, max_frames=cap, limits=limits) for source in request.sources]
        kinds = [kind for _, kind in known]
        return content_key(
            media_hashes=[media_hash for media_hash, _ in known],
            processor_hash=self.model.processor_hash,
            spec=self.model.spec,
            pruning=[self.pruning(request, kind) for kind in kinds],
            positions=self.config.positions,
            video_text_pos=self.config.video_text_pos,
            prefix_ids=self.model.chat.prefix_ids(kinds, self.config.system_prompt),
            salt=tenant_salt(self._secret, request.tenant),
            wire=self.wire,
        )

    def load(self, request: PrepareRequest) -> list[Media]:
        """Decode and sample every source. Raises BadMedia, TooLarge, DeadlineExceeded, Unavailable (closed)."""
        fps, cap = self._sampling(request)
        limits, sandbox = self.config.limits, self.sandbox
        medias, sampled = [], 0
        for source in request.sources:
            medias.append(open_media(source, fps=fps, max_frames=cap, limits=limits, sandbox=sandbox))
            sampled += medias[-1].frames[..., 0].size
            check_cost(MediaCost(sampled=sampled), len(request.sources), limits)
        return medias

    def cost_of(self, request: PrepareRequest) -> MediaCost:
        """What decoding the sources will cost, before any frame is decoded.

        Raises:
            BadMedia, DeadlineExceeded, Unavailable (closed). TooLarge: one source, or all together, are over a limit.
        """
        fps, cap = self._sampling(request)
        limits, sandbox, cost = self.config.limits, self.sandbox, MediaCost()
        for source in request.sources:
            cost += measure_media(source, fps=fps, max_frames=cap, limits=limits, sandbox=sandbox)
            check_cost(cost, len(request.sources), limits)
        return cost

    def close(self) -> None:
        """End the processes that decode. Idempotent."""
        self.sandbox.close()

    def _sampling(self, request: PrepareRequest) -> tuple[float, int]:
        """Frames per second and most frames."""
        fps = self.config.fps if request.fps is None else request.fps
        cap = self.config.max_frames if request.max_frames is None else request.max_frames
        if cap > self.config.limits.max_frames:
            raise TooLarge(f"max_frames={cap} is over the limit of {self.config.limits.max_frames}")
        return float(fps), cap

    def pruning(self, request: PrepareRequest, kind: str) -> PruningMethod:
        """The pruning method for media of this kind ("video" or "image")."""
        sparsity = self.config.sparsity.resolved(kind)
        keep = sparsity.prune_keep if request.prune_keep is None else request.prune_keep
        assert keep is not None and sparsity.prune_scope != "auto"
        return build_pruning(sparsity.prune, keep, sparsity.prune_scope, sparsity.seed)

    def prepare(
        self, preparation: Preparation, key: str, reserve: Callable[[int], Extent], observer: PrefillObserver | None = None
    ) -> MediaPrefix:
        """Decode the sources of a preparation, then `prefill`. Raises what `load` and `prefill` raise."""
        preparation.stage("decode")
        medias = self.load(preparation.request)
        handed_over = (medias.pop(0) for _ in range(len(medias)))  # frames are large: nobody but the prefill holds them
        return self.prefill(preparation, handed_over, key, reserve, observer)

    @torch.inference_mode()
    def prefill(
        self,
        preparation: Preparation,
        medias: Iterable[Media],
        key: str,
        reserve: Callable[[int], Extent],
        observer: PrefillObserver | None = None,
    ) -> MediaPrefix:
        """Run every stage after decoding; KV rows go to the extent that `reserve(length)` gives. `observer` follows them.

        Between two passes of the tower, and two chunks of the text model, other preparations may compute.

        `medias` is read once. Frames are let go as soon as they are patches, and patches when they are visual tokens, so that
        memory holds them no longer than the caller does.

        Raises:
            BadMedia, TooLarge: media that the model cannot take. Whatever `reserve`, `observer` or the progress callback raises.
        """
        preparation.stage("encode")
        inputs, medias = self.patchify(medias)
        with preparation.computing():
            return self._compute(preparation, inputs, medias, key, reserve, observer)

    def _compute(
        self,
        preparation: Preparation,
        inputs: list[VisualInputs],
        medias: list[Media],
        key: str,
        reserve: Callable[[int], Extent],
        observer: PrefillObserver | None,
    ) -> MediaPrefix:
        def encoded(done: int, total: int) -> None:
            preparation.progress("encode", done, total)
            preparation.pause()

        plan = self.plan(inputs)
        methods = [self.pruning(preparation.request, media.kind) for media in inputs]
        tokens = self.model.family.encode(
            inputs,
            needs=frozenset().union(*(method.needs for method in methods)),
            report=encoded,
        )
        inputs[:] = [replace(one, pixels=one.pixels.new_empty(0)) for one in inputs]  # the caller's list, too
        preparation.stage("prune")
        keep = keep_of_each(methods, inputs, tokens)
        preparation.stage("prefill")
        kept_rows = kept_prompt_rows(plan, keep)
        extent = reserve(len(kept_rows))
        prefix = self._describe(key, preparation.request, plan, inputs, medias, tokens, keep, kept_rows, extent)
        self._run_text(preparation, plan, tokens, keep, kept_rows, prefix, observer)
        preparation.timeline.mark("ready")
        preparation.progress("prefill", 1, 1)
        self.num_prefills += 1
        return prefix

    def patchify(self, medias: Iterable[Media]) -> tuple[list[VisualInputs], list[Media]]:
        """Every media of one prompt cut for the tower, and what else is known about it: `Media` without frames.

        A video's frames are let go before the next media is decoded. Pictures wait, because a model may cut one that is alone
        otherwise than one of several. Raises BadMedia, TooLarge.
        """
        inputs: dict[int, VisualInputs] = {}
        held: list[Media] = []
        for i, media in enumerate(medias):
            if media.kind == "video":
                inputs[i] = self.model.family.patchify(media)
                media = _without_frames(media)
            held.append(media)
        pictures = [i for i, media in enumerate(held) if media.kind == "image"]
        for i in pictures:
            inputs[i] = self.model.family.patchify(held[i], alone=len(pictures) == 1)
            held[i] = _without_frames(held[i])
        return [inputs[i] for i in range(len(held))], held

    def plan(self, inputs: list[VisualInputs]) -> PromptPlan:
        """The unpruned prompt. Raises TooLarge: too many visual tokens, or longer than the model's positions."""
        num_tokens, most = sum(media.num_tokens for media in inputs), self.config.limits.max_visual_tokens
        if num_tokens > most:
            raise TooLarge(f"the media have {num_tokens} visual tokens; the limit is max_visual_tokens = {most}. Use fewer frames")
        ids = self.model.chat.prefix_ids(
            [media.kind for media in inputs], self.config.system_prompt, [media.spelling for media in inputs]
        )
        plan = self.model.family.plan(ids, inputs, self.config.video_text_pos)
        if plan.question_start_pos >= self.model.max_position:
            raise TooLarge(
                f"the media reach position {plan.question_start_pos}; the model has {self.model.max_position}. "
                f"Fewer frames (max_frames) make them fit"
            )
        device = self.model.device
        return replace(plan, ids=plan.ids.to(device), visual_mask=plan.visual_mask.to(device), positions=plan.positions.to(device))

    def _run_text(
        self,
        preparation: Preparation,
        plan: PromptPlan,
        tokens: VisualTokens,
        keep: Tensor,
        rows: Tensor,
        prefix: MediaPrefix,
        observer: PrefillObserver | None = None,
    ) -> None:
        """Chunk by chunk, so that activations and embeddings are those of one chunk; what a chunk attends to lies in the extent."""
        text, num_layers = self.model.text, self.model.spec.num_layers

        def wrote(layer: int, start: int, stop: int) -> None:
            if observer is not None:
                observer.on_rows(layer, start, stop)
            preparation.progress("prefill", start + (stop - start) * (layer + 1) // num_layers, prefix.length)

        bounds = chunk_bounds(prefix.length, self.config.prefill_chunk)
        if observer is not None:
            observer.on_start(prefix, bounds)
        placed = plan.visual_mask[rows].nonzero()[:, 0]
        ordinals = torch.searchsorted(placed, torch.tensor(bounds, device=rows.device)).tolist()
        for (start, stop), (first, last) in zip(pairwise(bounds), pairwise(ordinals), strict=True):
            preparation.pause()
            hidden = text.embed(plan.ids[rows[start:stop]])
            visual_rows, visual = placed[first:last] - start, keep[first:last]
            hidden[visual_rows] = tokens.embeds[visual].to(hidden.dtype)
            deepstack = [level[visual].to(hidden.dtype) for level in tokens.deepstack]
            batch = MediaBatch(prefix.extent, start, stop, wrote)
            text.forward(hidden, prefix.metadata.positions[:, start:stop], batch, deepstack, visual_rows, kv_only=True)

    def _describe(
        self,
        key: str,
        request: PrepareRequest,
        plan: PromptPlan,
        inputs: list[VisualInputs],
        medias: list[Media],
        tokens: VisualTokens,
        keep: Tensor,
        rows: Tensor,
        extent: Extent,
    ) -> MediaPrefix:
        # Structural tokens count as text from here on: they have no place in a picture, and always stay.
        scored = ~tokens.salience.isnan()
        is_visual = plan.visual_mask[rows]
        is_visual[is_visual.clone()] = scored[keep]
        token_map = torch.full((len(rows), 3), -1, dtype=torch.int32, device=rows.device)
        seen = keep[scored[keep]]
        token_map[is_visual] = torch.cat([tokens.group[seen, None], tokens.cell[seen]], 1).to(torch.int32)
        positions, next_pos, floor = plan.positions[:, rows], plan.question_start_pos, plan.generation_floor
        if self.config.positions == "compact":
            # Closed up, text always goes on after the largest position: nothing is left for a floor to jump over.
            positions, next_pos, floor = *close_gaps(positions, is_visual), 0
        frames = [frame for one in inputs for frame in one.frame_of_group]
        times = [float(media.times_s[f]) for one, media in zip(inputs, medias, strict=True) for f in one.frame_of_group]
        metadata = PrefixMetadata(
            key=key,
            tenant=request.tenant,
            owner=request.owner,
            spec=self.model.spec,
            is_visual=is_visual,
            positions=positions,
            token_map=token_map,
            next_pos=next_pos,
            generation_floor=floor,
            grids=tuple(grid for one in inputs for grid in one.grids),
            media=tuple(i for i, one in enumerate(inputs) for _ in one.grids),
            frames=tuple(frames),
            times_s=tuple(times),
            kind="image" if all(media.kind == "image" for media in medias) else "video",
            num_frames=sum(len(media.times_s) for media in medias),
            duration_s=sum(media.duration_s for media in medias),
            num_visual=int(scored.sum()),
        )
        return MediaPrefix(metadata, extent)


def _without_frames(media: Media) -> Media:
    return replace(media, frames=np.empty((0, *media.frames.shape[1:]), np.uint8))
