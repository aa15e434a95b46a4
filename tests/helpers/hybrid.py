"""A decoder with recurrent layers among those of attention, and its oracle: each layer runs on what is left alone."""

from contextlib import contextmanager

import torch
from families import IMAGE
from oracle_layers import layers_of
from upstream import EMBEDS, MASK, ROTARY, USE_CACHE, with_cache

N_LAYERS = 5
KINDS = ("linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention")
CONFIG = {
    "image_token_id": IMAGE,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
    },
    "text_config": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "layer_types": list(KINDS),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.5,
        },
    },
}
FAMILY = "qwen3_5"


@contextmanager
def only_alive(model, alive, merge=None):
    """Within the block each layer runs on the tokens `alive[layer]` `[L]` of the model's single unpadded row alone."""
    decoder, whole = model.get_decoder(), {}

    def enter(module, args, kwargs):
        changed = {**kwargs, **with_cache(None), USE_CACHE: False}
        if merge is not None:
            changed[EMBEDS] = merge(kwargs[EMBEDS])
        return (), changed

    def hook(i):
        def run(module, args, kwargs):
            length = len(alive[i])
            before = torch.ones(length, dtype=torch.bool) if i == 0 else alive[i - 1]
            if i == 0:
                whole.update(kwargs)
            cos, sin = whole[ROTARY]
            n = int(alive[i].sum())
            mask = None
            if KINDS[i] == "full_attention":
                mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
            changed = {**kwargs, MASK: mask, ROTARY: (cos[:, alive[i]], sin[:, alive[i]])}
            return (args[0][:, alive[i][before]],), changed

        return run

    handles = [decoder.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers_of(decoder))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
