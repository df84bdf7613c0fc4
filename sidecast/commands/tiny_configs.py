"""Configurations of transformers made small: the same family and the same options, next to no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidecast.errors import ConfigError

_HEAD_DIM = 4
_NUM_LAYERS = 2
_NUM_ROWS = 11

_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "depth", "num_blocks",
)  # fmt: skip
# What is absent or null in a configuration stays so.
_TINY = {
    **dict.fromkeys(
        (
            "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner", "ffn_dim",
            "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dim_ff", "dff", "d_inner", "feed_forward_size",
            "expert_ffn_hidden_size", "shared_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size",
            "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size",
        ),
        9,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions", "context_length"), 16
    ),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 6),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim", "index_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "state_size", "mamba_d_state", "ssm_state_size"), 4),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("linear_num_heads", "linear_num_key_heads"), 2),
    "linear_num_value_heads": 4,
    "qk_head_dim": 2 * _HEAD_DIM,
    "index_n_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "max_window_layers": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
_GROUP_COUNTS = ("n_group", "n_groups", "num_expert_group", "mamba_n_groups")
_NUM_GROUPS = 2
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
_MOST = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 3),
    **dict.fromkeys(_CHOSEN, 2),
}
_STREAMS_AND_HEADS = (
    ("hidden_size", "num_attention_heads"),
    ("n_embd", "n_head"),
    ("hidden_size", "n_head"),
    ("hidden_size", "num_heads"),
    ("d_model", "n_heads"),
    ("d_model", "n_head"),
    ("d_model", "encoder_attention_heads"),
    ("d_model", "decoder_attention_heads"),
    ("d_model", "num_attention_heads"),
    ("d_model", "attention_heads"),
    ("emb_dim", "n_heads"),
)
_FEW = {*_LAYER_COUNTS, "n_group", "topk_group", "num_expert_group", "max_window_layers", "first_k_dense_replace"}
_WIDTHS = ("_dim", "_size", "_rank", "d_model", "n_embd", "n_inner", "_width", "d_head", "_headdim")
_NO_WIDTHS = ("vocab_size", "kernel_size", "chunk_size", "window_size", "block_size", "image_size")
_SCALE = 16
_FOLLOWS_STREAM = ("word_embed_proj_dim", "lru_width", "attention_hidden_size")


def shrunken(config: Mapping[str, Any], *, num_groups: int = _NUM_GROUPS) -> dict[str, Any]:
    """A configuration of the same family and the same options, whose model takes next to no memory.

    Args:
        config: Of any size; configurations in it are made small too.
        num_groups: Into how many groups experts, or heads with states, are divided at most.

    Returns:
        Widths, layers and vocabulary made small; of lists with an entry for each layer, the first of every kind are
        kept. As many query heads stay in a group as can be told apart: one, two, or all.

    Raises:
        ConfigError: A number that it needs is none.
    """
    tiny = {
        key: shrunken(value, num_groups=num_groups) if _is_config(key, value) else value
        for key, value in config.items()
    }
    has_groups = num_groups > 1 and any(_is_grouped(config.get(key)) for key in _GROUP_COUNTS)
    kinds = _first_of_each_kind(config)
    layers = _kept_layers(config)
    for key, value in config.items():
        if value is None or isinstance(value, bool):
            continue
        if key in _LAYER_COUNTS:
            most = _NUM_LAYERS if kinds is None else len(kinds)
            tiny[key] = min(value, most) if isinstance(value, int) else most
        elif key in _TINY:
            tiny[key] = _TINY[key]
        elif key == "hidden_size_per_layer_input":
            tiny[key] = min(_HEAD_DIM, value)
        elif key in _GROUP_COUNTS:
            tiny[key] = num_groups if _is_grouped(value) else 1
        elif key == "topk_group":
            # One of two groups, so that it shows which one is chosen.
            tiny[key] = 1
        elif key in _MOST:
            most = 2 * num_groups if has_groups and key not in _CHOSEN else _MOST[key]
            tiny[key] = min(_count(config, key), most)
        elif isinstance(value, int) and "vocab" in key and "size" in key:
            tiny[key] = _NUM_ROWS
        elif isinstance(value, int | list) and key.endswith(("token_id", "token_index")):
            tiny[key] = 0
        else:
            tiny[key] = _of_layers(tiny[key], layers, _num_layers(config))
    for stream, heads in _STREAMS_AND_HEADS:
        if config.get(heads) is not None and config.get(stream) is not None:
            _shrink_heads(tiny, config, stream, heads)
    return tiny


def scaled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose widths are all divided by one number, for families whose widths depend on each other.

    Args:
        config: Of any size; configurations in it are scaled too.

    Returns:
        Numbers of heads, groups and the like stay; layers, vocabulary and experts are made few as by ``shrunken``.
    """
    small = {key: scaled(value) if _is_config(key, value) else value for key, value in config.items()}
    without_heads = {key: value for key, value in config.items() if not key.endswith("heads") and key != "n_head"}
    few = shrunken(without_heads, num_groups=1)
    layers = _kept_layers(config)
    for key, value in config.items():
        if value is None or isinstance(value, bool):
            continue
        if isinstance(value, int) and _is_width(key) and value >= _SCALE:
            small[key] = value // _SCALE
        elif not isinstance(value, Mapping) and (key in _FEW or key in _MOST or not isinstance(value, int)):
            small[key] = few.get(key, value)
        elif isinstance(value, int) and ("vocab" in key or key.endswith(("token_id", "token_index"))):
            small[key] = few[key]
        elif isinstance(value, Mapping):
            small[key] = _of_layers(small[key], layers, _num_layers(config))
    return small


def _is_width(key: str) -> bool:
    return key.endswith(_WIDTHS) and not key.endswith(_NO_WIDTHS)


def _of_layers(value: Any, layers: list[int], num_layers: int) -> Any:
    """What a list or a mapping says of the layers that are kept, in their new order."""
    if isinstance(value, list) and len(value) == num_layers:
        return [value[layer] for layer in layers]
    if isinstance(value, Mapping) and value and all(str(key).isdigit() for key in value):
        by_layer = {int(key): entry for key, entry in value.items()}
        return {place: by_layer[layer] for place, layer in enumerate(layers) if layer in by_layer}
    return value


def _is_config(key: str, value: object) -> bool:
    is_named = key.endswith("_config") and not key.startswith("quantization")
    return isinstance(value, Mapping) and (is_named or "model_type" in value)


def _num_layers(config: Mapping[str, Any]) -> int:
    counts = (config.get(key) for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"))
    return next((count for count in counts if isinstance(count, int)), -1)


def _kept_layers(config: Mapping[str, Any]) -> list[int]:
    num_layers, kinds = _num_layers(config), _first_of_each_kind(config)
    first = list(range(min(_NUM_LAYERS, num_layers) if num_layers >= 0 else _NUM_LAYERS))
    return first if kinds is None else kinds


def _first_of_each_kind(config: Mapping[str, Any]) -> list[int] | None:
    """Layers among which is each kind that the configuration lists; None if it lists none."""
    lists = [
        config[key]
        for key in ("layer_types", "layers_block_type", "mlp_layer_types")
        if isinstance(config.get(key), list) and len(config[key]) == _num_layers(config)
    ]
    if not lists:
        return None
    kinds = list(zip(*lists, strict=True))
    found = {repr(kind): layer for layer, kind in reversed(list(enumerate(kinds)))}
    layers = sorted(found.values())
    return layers if len(layers) > 1 else list(range(min(_NUM_LAYERS, len(kinds))))


def _is_grouped(value: object) -> bool:
    return isinstance(value, int) and value > 1


def _shrink_heads(tiny: dict[str, Any], config: Mapping[str, Any], stream: str, heads: str) -> None:
    num_heads, before = 3, _count(config, heads)
    if heads == "num_heads" and _is_grouped(tiny.get("n_groups")):
        num_heads = 2 * int(tiny["n_groups"])
    if tiny.get("num_key_value_heads") is not None:
        groups = _count(config, "num_key_value_heads")
        num_heads = 4 if 1 < groups < before else 3
        tiny["num_key_value_heads"] = 1 if groups == 1 else 2 if groups < before else num_heads
    tiny[heads] = num_heads
    tiny[stream] = num_heads * _HEAD_DIM
    for key in _FOLLOWS_STREAM:
        if tiny.get(key) is not None:
            tiny[key] = tiny[stream]
    if tiny.get("mamba_n_heads") is not None and tiny.get("mamba_d_head") is not None:
        expansion = 1 if tiny.get("mamba_expand") is None else _count(tiny, "mamba_expand")
        tiny["mamba_n_heads"] = 2
        tiny["mamba_d_head"] = tiny[stream] * expansion // 2
        if tiny.get("mamba_d_ssm") is not None:
            tiny["mamba_d_ssm"] = 2 * tiny["mamba_d_head"]
    if heads == "num_heads" and tiny.get("expand") is not None:
        tiny["head_dim"] = _HEAD_DIM * _count(tiny, "expand")
    elif tiny.get("head_dim") is not None:
        # Wider heads than the stream has room for stay wider.
        is_wide = _count(config, "head_dim") * before != _count(config, stream)
        tiny["head_dim"] = _HEAD_DIM + 2 * (is_wide and config.get("qk_rope_head_dim") is None)


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"the model's configuration has {key}={value!r}; it must be a positive integer")
    return value
