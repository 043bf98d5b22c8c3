"""An independent oracle: stock transformers run over the whole unpruned conversation with masks.

Rows that hold pruned tokens are computed and never looked at. In turn t the rows of the question see every kept token; rows of
generated tokens see, in each layer, the ones that were retrieved for that turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.requests import MediaSource, PrepareRequest, SamplingParams, Turn, TurnEvent, kept_count
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.media import Media
from sparsevila_cluster.models.adapter import Model
from sparsevila_cluster.models.prompt_plan import join_places
from tests.checkpoints.families import FAMILIES


def random_media(kind: str, frames: int, height: int, width: int, seed: int) -> Media:
    """Smooth random pictures: neighbouring patches differ, but not as white noise would."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (frames, height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    pictures = coarse.repeat(7, 1).repeat(7, 2)[:, :height, :width]
    times = np.arange(frames) * 0.5
    return Media(pictures, times, kind, f"seed-{seed}-{kind}-{frames}", frames * 0.5 if kind == "video" else 0.0)


@dataclass
class Spoken:
    """What the engine said in one turn: rows of the question, sampled tokens, and the logits f32 [V] that each came from."""

    question_ids: list[int]
    tokens: list[int]
    logits: list[torch.Tensor] = field(default_factory=list)


class Bench:
    """Our engines, driven step by step, with their logits recorded."""

    def __init__(self, model: Model, config: EngineConfig):
        self.model, self.config = model, config
        self.prefill, self.decode = PrefillEngine(model, config), DecodeEngine(model, config)
        self.logits: list[torch.Tensor] = []
        self._plain_logits = model.text.logits

    def prefix(self, media: Media | list[Media], key: str = "media"):
        medias = media if isinstance(media, list) else [media]
        preparation = Preparation(PrepareRequest((MediaSource(b"unused"),)))
        made = self.prefill.prefill(preparation, medias, key, self.decode.prefixes.reserve)
        return self.decode.prefixes.publish(made)

    def unpruned(self, media: Media | list[Media]):
        medias = media if isinstance(media, list) else [media]
        inputs, _ = self.prefill.patchify(medias)
        return inputs, self.prefill.plan(inputs)

    def submit(self, key: str, conversation: str, question: str, max_tokens: int, **options) -> list[TurnEvent | Exception]:
        events: list[TurnEvent | Exception] = []
        sampling = SamplingParams(max_tokens=max_tokens)
        self.decode.submit(Turn(f"{conversation}/{question}", conversation, key, question, sampling, **options), events.append)
        return events

    def run(self) -> None:
        while not self.decode.idle:
            self.decode.step()

    def say(self, key: str, conversation: str, question: str, max_tokens: int, **options) -> Spoken:
        """One turn alone, with its logits."""
        state = self.decode.conversations.get(conversation)
        first, pending = state is None or state.num_turns == 0, None if state is None else state.pending
        ids = self.model.chat.question_ids(question, first, pending)[0]
        recorded: list[torch.Tensor] = []

        def record(hidden):
            logits = self._plain_logits(hidden)
            recorded.append(logits[0].clone())
            return logits

        self.model.text.logits = record
        try:
            events = self.submit(key, conversation, question, max_tokens, **options)
            self.run()
        finally:
            self.model.text.logits = self._plain_logits
        errors = [e for e in events if isinstance(e, Exception)]
        assert not errors, errors
        return Spoken(ids, [t for e in events for t in e.token_ids], recorded)


def kept_of(prefix, inputs, plan=None) -> torch.Tensor:
    """Ordinals i64 [K] of the kept visual tokens in the unpruned prompt: by the evidence map, and all structural ones.

    Where several tokens of a group count to one cell (padding), their positions in `plan` tell them apart.
    """
    group, cell = join_places(inputs, torch.device("cpu"))
    structural = cell[:, 0] < 0
    places = [(g, *place) for g, place in zip(group.tolist(), cell.tolist(), strict=True)]
    found = [tuple(place) for place in prefix.metadata.token_map[prefix.visual_index].tolist()]
    if plan is not None and len(plan.positions) == 1:
        places = list(zip(places, plan.positions[0, plan.visual_mask].tolist(), strict=True))
        found = list(zip(found, prefix.metadata.positions[0, prefix.visual_index].tolist(), strict=True))
    ordinal = {place: i for i, place in enumerate(places)}
    kept = torch.tensor([ordinal[place] for place in found], dtype=torch.int64)
    return torch.cat([kept, structural.nonzero()[:, 0]]).sort().values


class Oracle:
    """Teacher-forced logits of a whole conversation from the stock model (eager attention, fp32)."""

    def __init__(self, stock, model: Model, inputs, plan, keep: torch.Tensor, retrieve_keep: float = 1.0):
        stock.set_attn_implementation("eager")
        self.stock, self.plan, self.keep, self.retrieve_keep = stock, plan, keep, retrieve_keep
        family = FAMILIES[model.family.name]
        with torch.no_grad():
            self.features, self.levels = family.stock_features(stock, family.stock_inputs(model, inputs))
        self.visual = plan.visual_mask.nonzero()[:, 0]
        scored = join_places(inputs, torch.device("cpu"))[1][:, 0] >= 0
        # Structural tokens are never pruned and never left out by a retrieval.
        self.scored = self.visual[scored]
        self.kept_columns = self.visual[keep[scored[keep]]]

    def logits(self, turns: list[Spoken]) -> list[torch.Tensor]:
        """Per turn f32 [number of tokens, V]: what the stock model predicts for each sampled token."""
        chosen: list[torch.Tensor] = []
        for t in range(len(turns)):
            if self.retrieve_keep < 1.0:
                chosen.append(self._retrieve(turns[: t + 1], chosen))
        ids, spans = self._layout(turns)
        out = self._forward(ids, spans, chosen)
        want = []
        for spoken, (_, question_stop) in zip(turns, spans, strict=True):
            want.append(out.logits[0, question_stop - 1 : question_stop - 1 + len(spoken.tokens)])
        return want

    def _layout(self, turns: list[Spoken]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """All rows that hold KV, and per turn the half-open interval of its question rows. A turn's last token has no row of
        its own: it opens the next question."""
        ids, spans = self.plan.ids.tolist(), []
        for spoken in turns:
            spans.append((len(ids), len(ids) + len(spoken.question_ids)))
            ids = ids + spoken.question_ids + spoken.tokens[:-1]
        return torch.tensor(ids), spans

    def _retrieve(self, turns: list[Spoken], chosen: list[torch.Tensor]) -> torch.Tensor:
        """Kept columns bool [L, T] that the last turn's answer may see: top share of the question rows' attention."""
        ids, spans = self._layout(turns)
        start, stop = spans[-1]
        out = self._forward(ids[:stop], spans, chosen, attentions=True)
        count = kept_count(self.retrieve_keep, len(self.kept_columns))
        allowed = []
        for weights in out.attentions:
            mass = weights[0, :, start:stop].mean((0, 1))[self.kept_columns]
            mask = torch.zeros(len(self.plan.ids), dtype=torch.bool)
            mask[self.kept_columns[mass.topk(count).indices]] = True
            allowed.append(mask)
        return torch.stack(allowed)

    def _forward(self, ids, spans, chosen, attentions=False):
        num, prefix = len(ids), len(self.plan.ids)
        num_rows = len(self.plan.positions)
        after = (self.plan.question_start_pos + torch.arange(num - prefix)).expand(num_rows, -1)
        positions = torch.cat([self.plan.positions, after], dim=1)
        visible = torch.ones(num, num, dtype=torch.bool).tril()
        pruned = torch.ones(len(self.visual), dtype=torch.bool)
        pruned[self.keep] = False
        visible[:, self.visual[pruned]] = False
        layers = [visible.clone() for _ in range(self.stock.config.text_config.num_hidden_layers)]
        for t, allowed in enumerate(chosen):
            start = spans[t][1]
            stop = spans[t + 1][0] if t + 1 < len(spans) else num
            for layer, mask in enumerate(layers):
                hidden = self.scored[~allowed[layer][self.scored]]
                mask[start:stop, hidden] = False
        diagonal = torch.eye(num, dtype=torch.bool)  # rows of pruned tokens see themselves, so that their softmax is defined
        additive = [torch.zeros(num, num).masked_fill(~(mask | diagonal), float("-inf"))[None, None] for mask in layers]
        core = self.stock.model.language_model
        hooks = [
            layer.self_attn.register_forward_pre_hook(_use_mask(additive[i]), with_kwargs=True)
            for i, layer in enumerate(core.layers)
        ]
        extra = {}
        if self.levels:
            at = torch.zeros(1, num, dtype=torch.bool)
            at[0, self.visual] = True
            extra = {"visual_pos_masks": at, "deepstack_visual_embeds": list(self.levels)}
        try:
            with torch.no_grad():
                out = core(
                    inputs_embeds=self._embed(ids), position_ids=positions[:, None] if num_rows == 3 else positions,
                    attention_mask=additive[0], use_cache=False, output_attentions=attentions, **extra,
                )  # fmt: skip
                out.logits = self.stock.lm_head(out.last_hidden_state)
                return out
        finally:
            for hook in hooks:
                hook.remove()

    def _embed(self, ids) -> torch.Tensor:
        """[1, T, D]. Not by input_ids: a random model may say a placeholder, which stock code would take for more media."""
        with torch.no_grad():
            embeds = self.stock.model.get_input_embeddings()(ids)
            embeds[self.visual] = self.features
        return embeds[None]


def _use_mask(mask):
    def hook(module, args, kwargs):
        kwargs["attention_mask"] = mask
        return args, kwargs

    return hook


def worst(turns: list[Spoken], wanted: list[torch.Tensor]) -> float:
    """Largest absolute difference of any logit of any sampled token."""
    return max(float((torch.stack(s.logits) - w).abs().max()) for s, w in zip(turns, wanted, strict=True))
