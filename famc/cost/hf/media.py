"""Language models that see or hear: a tower, a projector, a decoder. LLaVA, PaliGemma, Gemma 3, Qwen-VL, Qwen2-Audio.

In: a Config and what stands above the last block. Out: an Anatomy with the parts `vision` or `audio`, `projector` and
`text`. Its towers have no tokens until `sums.with_media` says how many images or pieces of audio a sequence has; the
tokens that they become are part of the sequence. Weights are those that transformers builds (5.23). Bears no identity.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any

from famc.cost.anatomy import Anatomy, Attention, Block, Linear, Stack, Table
from famc.cost.hf.decoders import DECODERS
from famc.cost.hf.encoders import audio_encoder, encoder_block, once
from famc.cost.hf.read import Config
from famc.cost.hf.text import Task, Text, decoder, feed_forward, merged, projections, stacked, total
from famc.cost.hf.vision import TOWERS, patches

IMAGE = 448
"""Side in pixels of an image for towers that take any size, where nothing is said. Assumed."""
_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SO400M = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
SUB: dict[str, dict[str, tuple[str, Mapping[str, Any]]]] = {
    "gemma3": {"vision_config": ("siglip_vision_model", {}), "text_config": ("gemma3_text", {})},
    "llava": {"vision_config": ("clip_vision_model", _CLIP_L), "text_config": ("llama", {})},
    "llava_next": {"vision_config": ("clip_vision_model", _CLIP_L), "text_config": ("llama", {})},
    "llava_onevision": {
        "vision_config": (
            "siglip_vision_model",
            _SO400M | {"intermediate_size": 4304, "image_size": 384, "num_hidden_layers": 26},
        ),
        "text_config": ("qwen2", {}),
    },
    "paligemma": {
        "vision_config": (
            "siglip_vision_model",
            _SO400M | {"intermediate_size": 4096, "image_size": 224, "num_hidden_layers": 27},
        ),
        "text_config": (
            "gemma",
            {
                "hidden_size": 2048,
                "num_hidden_layers": 18,
                "intermediate_size": 16384,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
                "vocab_size": 257152,
            },
        ),
    },
    "qwen2_audio": {"audio_config": ("qwen2_audio_encoder", {}), "text_config": ("qwen2", {})},
}
"""Of each composition's parts: the model type where the part names none, and what it is made of where it is not there at
all (transformers' `sub_configs_defaults`)."""


def llava(c: Config, task: Task) -> Anatomy:
    """LLaVA, LLaVA-NeXT, LLaVA-OneVision: two linear layers over the features of one or several of the tower's blocks; the
    last two have a learnt token for a new line."""
    text, vision = _language(c), _sub(c, "vision_config", TOWERS)
    layers = c.get("vision_feature_layer")
    wide = vision.number("hidden_size") * (
        1 if isinstance(layers, int) else len(c.names("vision_feature_layer") or ())
    )
    h, bias, n = text.hidden, c.flag("multimodal_projector_bias"), patches(vision)
    linears = (Linear("linear_1", wide, h, bias), Linear("linear_2", h, h, bias, split="row"))
    newline = 0 if c.kind == "llava" else h
    projector = Anatomy(c.kind, (once("projector", h, linears, 0.0, n, "vision"),), (), vectors=newline)
    tie = c.flag("tie_word_embeddings") or (c.kind != "llava_next" and text.tie)
    return merged(c.kind, _tower(vision), total("projector", projector), _decoder(text, tie, task))


def paligemma(c: Config, task: Task) -> Anatomy:
    """One linear layer; the decoder sees the whole prompt in both directions, which is counted as causal."""
    text, vision = _language(c), _sub(c, "vision_config", TOWERS)
    wide, n = c.number("projection_dim"), patches(vision)
    linear = Linear("linear", vision.number("hidden_size"), wide, bias=True, split="none")
    projector = Anatomy(c.kind, (once("projector", wide, (linear,), 0.0, n, "vision"),), ())
    return merged(
        c.kind,
        _tower(vision),
        total("projector", projector),
        _decoder(text, c.flag("tie_word_embeddings"), task),
    )


def gemma3(c: Config, task: Task) -> Anatomy:
    """Patches are averaged to `mm_tokens_per_image`, normed and projected by one matrix."""
    text, vision = _language(c), _sub(c, "vision_config", TOWERS)
    wide, h = vision.number("hidden_size"), text.hidden
    linear = Linear("linear", wide, h, split="none")
    stack = once("projector", h, (linear,), 0.0, c.number("mm_tokens_per_image"), "vision", vectors=wide)
    return merged(
        c.kind,
        _tower(vision),
        total("projector", Anatomy(c.kind, (stack,), ())),
        _decoder(text, c.flag("tie_word_embeddings"), task),
    )


def qwen2_audio(c: Config, task: Task) -> Anatomy:
    """Whisper's encoder, its output averaged in pairs, one linear layer. The head is never tied."""
    text, audio = _language(c), _sub(c, "audio_config", ("qwen2_audio_encoder",))
    h = text.hidden
    linear = Linear("linear", audio.number("d_model"), h, bias=True, split="none")
    tokens = audio.number("max_source_positions") // 2
    projector = Anatomy(c.kind, (once("projector", h, (linear,), 0.0, tokens, "audio"),), ())
    return merged(c.kind, audio_encoder(audio), total("projector", projector), _decoder(text, False, task))


def qwen_vl(c: Config, task: Task, image: int) -> Anatomy:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: a tower for images of any size, here of `image` x `image` pixels; squares of its
    patches are merged to a token. ValueError for an image that no square fits in."""
    nested = c.sub("text_config")
    inner = f"{c.kind}_text"
    text = DECODERS[inner](Config(inner, nested or c.values))
    v = Config(f"{c.kind}_vision", c.sub("vision_config"))
    merge = v.number("spatial_merge_size")
    side = image // (v.side("patch_size")[0] * merge) * merge
    if side < 1:
        raise ValueError(f"{c.kind}: an image of {image} pixels a side holds no {merge} x {merge} patches")
    made = {"qwen2_vl": _qwen2_tower, "qwen2_5_vl": _qwen25_tower}.get(c.kind, _qwen3_tower)
    tower, merger = made(v, side * side, merge * merge)
    tie = c.flag("tie_word_embeddings")
    if c.kind in ("qwen2_vl", "qwen2_5_vl"):  # older files say it inside
        tie = tie or bool(nested.get("tie_word_embeddings"))
    return merged(c.kind, total("vision", tower), total("projector", merger), _decoder(text, tie, task))


MEDIA: Mapping[str, Callable[..., Anatomy]] = {
    "gemma3": gemma3,
    "llava": llava,
    "llava_next": llava,
    "llava_onevision": llava,
    "paligemma": paligemma,
    "qwen2_audio": qwen2_audio,
}
ANY_SIZE: Mapping[str, Callable[..., Anatomy]] = {
    "qwen2_vl": qwen_vl,
    "qwen2_5_vl": qwen_vl,
    "qwen3_vl": qwen_vl,
    "qwen3_vl_moe": qwen_vl,
}
"""Compositions whose tower takes images of any size."""


# --- parts ----------------------------------------------------------------------------------------------------


def _sub(c: Config, key: str, counted: Container[str]) -> Config:
    """A part's config, by its own model type or the composition's. ValueError for a model type that is not `counted`."""
    kind, defaults = SUB[c.kind][key]
    values = c.sub(key)
    if c.values.get(key) is None:
        return Config(kind, defaults)
    if not (c.kind == "gemma3" and key == "text_config"):  # there transformers minds no name
        kind = values.get("model_type", kind)
    if kind not in counted:
        raise ValueError(f"{c.kind}: famc doesn't count {kind} as its {key}")
    return Config(kind, values)


def _language(c: Config) -> Text:
    inner = _sub(c, "text_config", DECODERS)
    return DECODERS[inner.kind](inner)


def _tower(c: Config) -> Anatomy:
    return TOWERS[c.kind](c, alone=False)


def _decoder(text: Text, tie: bool, task: Task) -> Anatomy:
    """The language model of a composition, whose outer config says whether the head is tied."""
    return decoder(replace(text, tie=tie), task)


def _qwen2_tower(v: Config, n: int, merged_patches: int) -> tuple[Anatomy, Anatomy]:
    h, heads = v.number("embed_dim"), v.number("num_heads")
    block = encoder_block(h, heads, h * v.number("mlp_ratio"))
    block = replace(block, linears=_fused(h, block.linears), rope=True)
    stacks = (_patch(v, h, n, bias=False), *_blocks([block] * v.number("depth"), n))
    return Anatomy("", stacks, ()), _merger(h, v.number("hidden_size"), n, merged_patches, 2 * h)


def _qwen25_tower(v: Config, n: int, merged_patches: int) -> tuple[Anatomy, Anatomy]:
    """Windows of `window_size` pixels a side, but for some blocks; gated, RMSNorm."""
    h, heads = v.number("hidden_size"), v.number("num_heads")
    d, window = h // heads, (v.number("window_size") // v.side("patch_size")[0]) ** 2
    whole = set(v.names("fullatt_block_indexes") or ())
    linears = (
        *projections(h, h, h, bias=True, o_bias=True, fused=True),
        *feed_forward(h, v.number("intermediate_size"), gated=True, bias=True),
    )
    blocks = [
        Block(h, linears, (Attention(heads, heads, d, d, False, None if i in whole else window),), 2 * h)
        for i in range(v.number("depth"))
    ]
    stacks = (_patch(v, h, n, bias=False), *_blocks(blocks, n))
    return Anatomy("", stacks, ()), _merger(h, v.number("out_hidden_size"), n, merged_patches, h)


def _qwen3_tower(v: Config, n: int, merged_patches: int) -> tuple[Anatomy, Anatomy]:
    """With learnt positions, and a merger of its own for each of some blocks, whose output is added to the decoder's first
    layers (DeepStack)."""
    h, heads = v.number("hidden_size"), v.number("num_heads")
    block = encoder_block(h, heads, v.number("intermediate_size"))
    block = replace(block, linears=_fused(h, block.linears), rope=True)
    stacks = (_patch(v, h, n, bias=True), *_blocks([block] * v.number("depth"), n))
    tower = Anatomy("", stacks, (Table("positions", v.number("num_position_embeddings"), h),))
    out = v.number("out_hidden_size")
    first = _merger(h, out, n, merged_patches, 2 * h)
    deep = len(v.names("deepstack_visual_indexes") or ())
    if not deep:
        return tower, first
    other = _merger(h, out, n, merged_patches, 2 * h * merged_patches).stacks[0]
    return tower, replace(first, stacks=(*first.stacks, replace(other, layers=deep)))


def _fused(h: int, linears: tuple[Linear, ...]) -> tuple[Linear, ...]:
    """With queries, keys and values in one matrix."""
    return (*projections(h, h, h, bias=True, o_bias=True, fused=True), *linears[4:])


def _patch(v: Config, h: int, n: int, *, bias: bool) -> Stack:
    """A convolution over `temporal_patch_size` frames; an image is as many of them alike."""
    tall, wide = v.side("patch_size")
    pixels = v.number("in_channels") * v.number("temporal_patch_size") * tall * wide
    return once("vision", h, (Linear("patch", pixels, h, bias, split="none"),), 0.0, n, "vision")


def _blocks(blocks: list[Block], n: int) -> tuple[Stack, ...]:
    return stacked("vision", blocks, share=0.0, length=n, medium="vision")


def _merger(h: int, out: int, n: int, merged_patches: int, vectors: int) -> Anatomy:
    """A norm, and two linear layers over the patches of a square."""
    wide = h * merged_patches
    linears = (
        Linear("linear_1", wide, wide, bias=True),
        Linear("linear_2", wide, out, bias=True, split="row"),
    )
    stack = once("projector", wide, linears, 0.0, n // merged_patches, "vision", vectors)
    return Anatomy("", (stack,), ())
