"""Dense, sparse and `generate` on one model: which stages are timed, in which order, how often.

A session is the way from media to the answer of a second question; a step is one of a batch. Variants take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.lib import machine
from benchmarks.lib.engine_pair import QUESTION, VARIANTS, EnginePair, Session, endless, synchronize, time_round
from benchmarks.lib.flop_counts import encode_work
from benchmarks.lib.hf_peer import Peer
from benchmarks.lib.stopwatch import Repeats, Times, in_turns
from benchmarks.lib.timing_table import Ledger
from sparsevila_cluster.media import Media
from sparsevila_cluster.models import Model
from sparsevila_cluster.models.families.qwen_vl import GridInputs


@dataclass(frozen=True)
class Plan:
    """What to measure. hf_frames: the longest video that `generate` is given; encode_frames: the longest that is encoded with and
    without salience; `block` steps of one variant, then the next, `rounds` times; long_frames: the video whose memory is
    measured, 0 for none.
    """

    frames: tuple[int, ...] = (16, 64, 256)
    batches: tuple[int, ...] = (1, 4, 8)
    hf_frames: int = 64
    encode_frames: int = 64
    num_tokens: int = 32
    sessions: Repeats = Repeats(least=2, most=5, budget_s=150.0)
    encodes: Repeats = Repeats(least=5, most=15, budget_s=25.0)
    rounds: int = 10
    block: int = 2
    long_frames: int = 512


class EngineComparison:
    """Measures one model after another into one ledger. `tell` is for the reader of the report, `say` for who waits for it."""

    def __init__(self, ledger: Ledger, tell: Callable[[str], None], say: Callable[[str], None]):
        self.ledger, self.tell, self.say = ledger, tell, say

    def measure(
        self,
        name: str,
        directory: Path | None,
        model: Model,
        media: Sequence[Media],
        plan: Plan,
        hf_batches: tuple[int, ...] = (),
        matrix_width: float = 0.0,
    ) -> None:
        """Everything about one model. directory: of its checkpoint, for `generate`; None leaves that out. `hf_batches`: batch sizes
        in which `generate` is asked for steps. matrix_width: see `EnginePair`.
        """
        self.say(f"{name}: loading")
        peer = None if directory is None else Peer(directory, model)
        with endless(model):
            for video in media:
                frames = len(video.frames)
                if frames <= plan.encode_frames:
                    self._encode(name, model, video, plan)
                with_peer = peer if frames <= plan.hf_frames else None
                room = self._room(model, video, plan)
                num = 1 + max(room, default=0)
                pairs = {variant: EnginePair(model, variant, rows, num, matrix_width) for variant, rows in self._rows(model, video)}
                sessions = self._sessions(name, pairs, video, plan, with_peer)
                for batch in room:
                    self._steps(name, pairs, sessions, video, batch, plan, with_peer if batch in hf_batches else None)
                self._memory(name, frames, pairs, sessions)

    # ---- one video ---------------------------------------------------------------------------------------------------------

    def _rows(self, model: Model, video: Media) -> list[tuple[str, int]]:
        """Rows of a media prefix, at most, by variant."""
        dense = model.family.patchify(video).num_tokens + 64
        return [(variant, dense if variant == "dense" else dense // 3 + 64) for variant in VARIANTS]

    def _room(self, model: Model, video: Media, plan: Plan) -> tuple[int, ...]:
        """The batch sizes whose prefixes fit into half of the free memory."""
        one = sum(rows for _, rows in self._rows(model, video)) * model.spec.bytes_per_token
        free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else machine.free_bytes()
        # As much again for turns as for prefixes, and some to spare.
        fits = tuple(batch for batch in plan.batches if (1 + batch) * one < free / 2.5)
        if fits != plan.batches:
            self.tell(f"{len(video.frames)} frames: too little memory for all batches; measured: {fits}")
        return fits

    def _encode(self, name: str, model: Model, video: Media, plan: Plan) -> None:
        """The vision tower by itself, with and without salience."""
        frames, family = len(video.frames), model.family
        self.say(f"{name}, {frames} frames: encode")
        inputs = family.patchify(video)
        assert isinstance(inputs, GridInputs), "the mid-size and the demo model are of the Qwen-VL kind"

        def encode(*needs: str) -> None:
            family.encode([inputs], needs)
            synchronize(model.device)

        works = {
            "patchify": lambda: family.patchify(video),
            "plain": lambda: encode(),
            "with salience": lambda: encode("salience"),
        }
        times = in_turns(works, plan.encodes)
        work = encode_work(model.config, inputs.grid, model.spec.dtype.itemsize)
        self.ledger.add(name, frames, "patchify", "plain", times["patchify"])
        self.ledger.add(name, frames, "encode", "plain", times["plain"], work=work, visual_tokens=inputs.num_tokens)
        pairs = zip(times["with salience"].samples_ms, times["plain"].samples_ms, strict=True)
        share = statistics.median(1 - without / with_salience for with_salience, without in pairs)
        self.ledger.add(name, frames, "encode", "with salience", times["with salience"], salience_share=round(share, 4))

    def _sessions(self, name: str, pairs: dict[str, EnginePair], video: Media, plan: Plan, peer: Peer | None) -> dict[str, Session]:
        frames = len(video.frames)
        times: dict[tuple[str, str], Times] = {}
        sessions: dict[str, Session] = {}
        for number in plan.sessions.rounds():
            for variant, pair in pairs.items():
                self.say(f"{name}, {frames} frames: round {number + 1}, {variant}")
                session = sessions[variant] = pair.run_session(video, plan.num_tokens)
                for stage, ms in session.ms.items():
                    times.setdefault((stage, variant), Times()).add(ms)
            if peer is not None:
                self.say(f"{name}, {frames} frames: round {number + 1}, generate")
                made = peer.live(video, QUESTION, plan.num_tokens)
                for stage, ms in (("first token, cold", made.first_ms), ("end to end", made.total_ms)):
                    times.setdefault((stage, "hf"), Times()).add(ms)
        for (stage, variant), found in times.items():
            work = pairs[variant].work(sessions[variant]) if variant in pairs else {}
            more = {"equal_tokens": equal_tokens(sessions["dense"].tokens, made.tokens)} if variant == "hf" else {}
            self.ledger.add(name, frames, stage, variant, found, work=work.get(stage), **more)
        if peer is not None:
            same = equal_tokens(sessions["dense"].tokens, made.tokens)
            self.tell(f"{name}, {frames} frames: {same} of {plan.num_tokens} dense tokens equal generate's")
        return sessions

    def _steps(
        self,
        name: str,
        pairs: dict[str, EnginePair],
        sessions: dict[str, Session],
        video: Media,
        batch: int,
        plan: Plan,
        peer: Peer | None,
    ) -> None:
        """One decode step over `batch` conversations; between `generate`'s own tokens where there is a peer."""
        frames, rounds, block = len(video.frames), plan.rounds, plan.block
        self.say(f"{name}, {frames} frames: steps of a batch of {batch}")
        num_steps = rounds * (block + 1)
        times = {variant: Times() for variant in pairs}
        for variant, pair in pairs.items():
            pair.fill(sessions[variant].prefix, batch, num_steps + 4)
        if peer is None:
            for _ in range(rounds):
                time_round(pairs, times, block)
        else:
            inputs = peer.inputs(video, QUESTION, batch)
            times["hf"] = peer.generate(inputs, num_steps + 1, lambda: time_round(pairs, times, block), block).steps
        for variant, found in times.items():
            work = pairs[variant].step_work(sessions[variant], batch, num_steps) if variant in pairs else None
            self.ledger.add(name, frames, "step", variant, found, batch=batch, work=work)
        for variant, pair in pairs.items():
            pair.forget(keep=sessions[variant].prefix)

    def _memory(self, name: str, frames: int, pairs: dict[str, EnginePair], sessions: dict[str, Session]) -> None:
        for variant, session in sessions.items():
            row_bytes, device = pairs[variant].model.spec.bytes_per_token, pairs[variant].model.device
            on_device = {"peak_device_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
            self.ledger.rows.append(
                {
                    "model": name,
                    "frames": frames,
                    "stage": "memory",
                    "variant": variant,
                    "visual_tokens": session.usage.visual_tokens,
                    "kept": session.usage.visual_tokens_kept,
                    "retrieved": session.usage.visual_tokens_retrieved,
                    "prefix_bytes": session.prefix.kv_bytes,
                    "attended_bytes": (session.prefix.length - session.prefix.num_kept + session.usage.visual_tokens_retrieved)
                    * row_bytes,
                    "peak_rss_bytes": machine.peak_rss_bytes(),
                    **on_device,
                }
            )


def equal_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
