"""The smallest media and media prefix that make sense: with them a worker loads and builds what its first request needs."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.kvcache.prefix import MediaPrefix, PrefixMetadata

SIDE = 64  # pixels of the picture
ROWS = 16  # tokens of the prefix


def tiny_picture() -> bytes:
    """A PNG file of SIDE x SIDE pixels."""
    ramp = np.arange(SIDE, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None] * 3, ramp[None] * 3, np.uint8(128)), 2)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tiny_prefix(key: str, extent: Extent, num_position_rows: int) -> MediaPrefix:
    """A prefix of ROWS rows that no media is behind, all visual; its KV is noise."""
    assert extent.length == ROWS
    arena = extent.arena
    device = arena.k[0].device
    noise = torch.Generator(device).manual_seed(0)
    for layer in range(arena.spec.num_layers):
        for rows in extent.rows(layer):
            rows.normal_(generator=noise)
    cells = torch.arange(ROWS, dtype=torch.int32, device=device)
    metadata = PrefixMetadata(
        key=key,
        spec=arena.spec,
        is_visual=torch.ones(ROWS, dtype=torch.bool, device=device),
        positions=torch.arange(ROWS, device=device).expand(num_position_rows, -1).contiguous(),
        token_map=torch.stack([torch.zeros_like(cells), torch.zeros_like(cells), cells], 1),
        next_pos=ROWS,
        generation_floor=0,
        grids=((1, ROWS),),
        media=(0,),
        frames=(0,),
        times_s=(0.0,),
        kind="image",
        num_frames=1,
        duration_s=0.0,
        num_visual=ROWS,
    )
    return MediaPrefix(metadata, extent)
