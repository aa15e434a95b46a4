"""The seam: what belongs to transformers, timm and accelerate is named in ``tokenprune/upstream/`` alone.

`WORDS` lists their names: of arguments, attributes, config fields, classes and modules. Outside the seam none of them
may stand as an attribute, a keyword, a parameter or a string (docstrings and messages are prose and do not count: only
strings that are the word itself, or a dotted path that holds it).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = {"transformers", "timm", "accelerate"}

ARGUMENTS = """
    attention_mask cache_params cu_seq_lens_k cu_seq_lens_q cu_seqlens deepstack_visual_embeds hidden_states input_ids
    inputs_embeds logits_to_keep mm_encoder_outputs mm_token_type_ids past_key_values past_key_value pixel_values
    pixel_values_videos position_embeddings position_ids rope_deltas token_type_ids use_cache visual_pos_masks
    image_grid_thw video_grid_thw image_sizes image_hidden_states image_embeds shared_rel_pos_bias image_grids
    video_grids batch_num_images vision_aspect_ratio vision_feature_select_strategy pixel_values_images
    key_states value_states query_length beam_idx logits_processor return_dict_in_generate
    add_generation_prompt return_tensors output_hidden_states
"""
ATTRIBUTES = """
    get_decoder get_input_embeddings get_output_embeddings get_seq_length get_mask_sizes get_query_offset
    layer_class_to_replicate lazy_initialization is_initialized cumulative_length max_cache_len is_sliding
    conv_states recurrent_states self_attention_cache cross_attention_cache
    _quantized_keys _quantized_values reorder_cache batch_select_indices batch_repeat_interleave
    layer_idx scaling num_key_value_groups sinks s_aux gradient_checkpointing grad_checkpointing _hf_hook
    execution_device tp_size generation_config pooler_output last_hidden_state deepstack_features
    num_prefix_tokens num_register_tokens embed_dim global_pool attn_pool patch_embed dynamic_img_size fused_attn
    q_proj k_proj v_proj o_proj out_proj q_norm k_norm qkv attn_drop proj_drop q_bias k_bias v_bias rel_pos_bias
    relative_position_bias_table norm1 norm2 layer_norm1 layer_norm2 layernorm_before layernorm_after self_attn
    multi_modal_projector vision_tower vision_model language_model tokenizer apply_chat_template image_token
    from_pretrained image_processor feature_extractor chat_template pack_image_features image_size_to_num_patches
"""
FIELDS = """
    _attn_implementation attn_implementation deepstack_visual_indexes downsample_ratio head_dim hidden_size
    image_patch_id image_size image_token_id image_token_index is_encoder_decoder layer_types linear_attention
    full_attention sliding_attention model_type mrope_section num_attention_heads num_hidden_layers
    num_key_value_heads patch_size rope_parameters sliding_window spatial_merge_size spatial_pool_stride text_config
    video_token_id vision_config vision_feature_layer intermediate_size vocab_size image_grid_pinpoints
    visual_indicator_token_ids
"""
CLASSES = """
    AttentionInterface ALL_ATTENTION_FUNCTIONS AutoConfig AutoModel AutoModelForCausalLM AutoModelForImageTextToText
    AutoProcessor Cache DynamicCache DynamicLayer LogitsProcessorList QuantizedCache QuantizedLayer StaticCache
    StaticLayer create_causal_mask create_masks_for_generate eager_attention_forward apply_rot_embed_cat
"""
WORDS = frozenset(" ".join((ARGUMENTS, ATTRIBUTES, FIELDS, CLASSES)).split())


def outside() -> list[Path]:
    files = [path for folder in ("tokenprune", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if not path.is_relative_to(ROOT / "tokenprune" / "upstream")]


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a piece of code gives to what it reads or hands over, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg, node.value.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value.strip():
            for part in node.value.split("."):
                yield part.strip(), node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.lineno


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module), node.lineno


@pytest.mark.parametrize("path", outside(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_belongs_to_others_is_named_in_the_seam_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [f"line {line}: {name}" for name, line in names(tree) if name in WORDS]
    found += [f"line {line}: import {name}" for name, line in imported(tree) if name.partition(".")[0] in LIBRARIES]
    assert found == []
