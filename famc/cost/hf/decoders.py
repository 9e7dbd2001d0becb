"""The decoders that famc can read a config.json of: one function a family, from its keys to a Text.

In: a Config. Out: a Text. Which weights there are is what transformers builds (5.23); tests compare them. Bears no
identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from famc.cost.hf.read import Config, windows
from famc.cost.hf.text import Latent, Mixture, Text


def _plain(c: Config) -> Text:
    """What Llama and its kin share: SwiGLU, RMSNorm, rotary positions, grouped queries."""
    heads, hidden = c.number("num_attention_heads"), c.number("hidden_size")
    return Text(
        c.kind,
        vocab=c.number("vocab_size"),
        layers=c.number("num_hidden_layers"),
        hidden=hidden,
        ffn=c.number("intermediate_size"),
        heads=heads,
        kv_heads=c.maybe("num_key_value_heads") or heads,
        head_dim=c.maybe("head_dim") or hidden // heads,
        tie=c.flag("tie_word_embeddings"),
    )


def _llama(c: Config) -> Text:
    """Llama, Granite, SmolLM3, Nemotron, Apertus, SeedOss-like: biases where the config says so."""
    bias = c.flag("attention_bias")
    return replace(_plain(c), qkv_bias=bias, o_bias=bias, mlp_bias=c.flag("mlp_bias"))


def _smollm3(c: Config) -> Text:
    """Every fourth layer has no rotary positions; where windows are used, those layers have them."""
    text = _llama(c)
    if not c.flag("use_sliding_window") or (sliding := c.maybe("sliding_window")) is None:
        return text
    step = c.number("no_rope_layer_interval")
    turned = c.names("no_rope_layers") or [int((i + 1) % step != 0) for i in range(text.layers)]
    types = c.names("layer_types") or ["full_attention" if t else "sliding_attention" for t in turned]
    return replace(text, windows=windows(c, text.layers, sliding, types))


def _layered(c: Config, text: Text, every: int) -> Text:
    """With windows in all layers but each `every`th, or as `layer_types` says."""
    types = c.names("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(text.layers)
    ]
    return replace(text, windows=windows(c, text.layers, c.maybe("sliding_window"), types))


def _qwen_windows(c: Config, text: Text) -> Text:
    """Qwen's windows: off unless `use_sliding_window`, and then above `max_window_layers`."""
    sliding = c.maybe("sliding_window") if c.flag("use_sliding_window") else None
    above = c.number("max_window_layers", least=0)
    types = c.names("layer_types") or [
        "sliding_attention" if i >= above else "full_attention" for i in range(text.layers)
    ]
    return replace(text, windows=windows(c, text.layers, sliding, types))


def _whole(c: Config, text: Text) -> Text:
    """The same window in every layer."""
    window = c.maybe("sliding_window")
    return text if window is None else replace(text, windows=(window,) * text.layers)


def _qwen2(c: Config) -> Text:
    return replace(_qwen_windows(c, _plain(c)), qkv_bias=True)


def _qwen3(c: Config) -> Text:
    return _qwen_windows(c, _qwen3_vl(c))


def _qwen3_vl(c: Config) -> Text:
    """Qwen3 inside Qwen3-VL, which has no windows."""
    bias = c.flag("attention_bias")
    return replace(_plain(c), qk_norm="head", qkv_bias=bias, o_bias=bias)


def _dense_layers(c: Config, layers: int) -> frozenset[int]:
    """Qwen's layers without experts: those named, and those between the sparse steps."""
    named, step = set(c.names("mlp_only_layers") or []), c.number("decoder_sparse_step")
    return frozenset(i for i in range(layers) if i in named or (i + 1) % step)


def _qwen2_moe(c: Config) -> Text:
    text = _plain(c)
    moe = Mixture(
        c.number("num_experts"),
        c.number("num_experts_per_tok"),
        c.number("moe_intermediate_size"),
        shared=c.number("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    text = replace(text, qkv_bias=c.flag("qkv_bias"), moe=moe, dense=_dense_layers(c, text.layers))
    if not c.flag("use_sliding_window") or (sliding := c.maybe("sliding_window")) is None:
        return text
    below = c.number("max_window_layers", least=0)
    types = c.names("layer_types") or [
        "sliding_attention" if i < below and i % 2 == 0 else "full_attention" for i in range(text.layers)
    ]
    return replace(text, windows=windows(c, text.layers, sliding, types))


def _qwen3_moe(c: Config) -> Text:
    text = _qwen3_vl_moe(c)
    return _whole(c, text) if c.flag("use_sliding_window") else text


def _qwen3_vl_moe(c: Config) -> Text:
    text = _qwen3_vl(c)
    moe = Mixture(c.number("num_experts"), c.number("num_experts_per_tok"), c.number("moe_intermediate_size"))
    return replace(text, moe=moe, dense=_dense_layers(c, text.layers))


def _mistral(c: Config) -> Text:
    return _whole(c, _plain(c))


def _mixtral(c: Config) -> Text:
    text = _mistral(c)
    return replace(
        text, moe=Mixture(c.number("num_local_experts"), c.number("num_experts_per_tok"), text.ffn)
    )


def _gemma(c: Config) -> Text:
    bias = c.flag("attention_bias")
    return replace(_plain(c), qkv_bias=bias, o_bias=bias, causal=not c.flag("use_bidirectional_attention"))


def _gemma2(c: Config) -> Text:
    """A norm before and after each half; a window in every other layer."""
    return _layered(c, replace(_gemma(c), norms=4), 2)


def _gemma3(c: Config) -> Text:
    """As Gemma 2, with norms of queries and keys, and five windows of six."""
    text = replace(_gemma(c), norms=4, qk_norm="head")
    return _layered(c, text, c.number("sliding_window_pattern"))


def _gpt2(c: Config) -> Text:
    if c.flag("add_cross_attention"):
        raise ValueError(f"{c.kind}: famc counts it alone, not with add_cross_attention")
    hidden, heads = c.number("n_embd"), c.number("n_head")
    return Text(
        c.kind, c.number("vocab_size"), c.number("n_layer"), hidden, c.maybe("n_inner") or 4 * hidden,
        heads, heads, hidden // heads, c.flag("tie_word_embeddings"), gated=False, norm=2, qkv_bias=True,
        o_bias=True, mlp_bias=True, fused_qkv=True, rope=False, positions=c.number("n_positions"),
    )  # fmt: skip


def _gpt_bigcode(c: Config) -> Text:
    text = _gpt2(c)
    return replace(text, kv_heads=1) if c.flag("multi_query") else text


def _gptj(c: Config) -> Text:
    hidden, heads = c.number("n_embd"), c.number("n_head")
    return Text(
        c.kind, c.number("vocab_size"), c.number("n_layer"), hidden, c.maybe("n_inner") or 4 * hidden,
        heads, heads, hidden // heads, c.flag("tie_word_embeddings"), gated=False, norm=2, norms=1,
        mlp_bias=True, head_bias=True, parallel=True,
    )  # fmt: skip


def _gpt_neox(c: Config) -> Text:
    hidden, heads, bias = c.number("hidden_size"), c.number("num_attention_heads"), c.flag("attention_bias")
    return Text(
        c.kind, c.number("vocab_size"), c.number("num_hidden_layers"), hidden, c.number("intermediate_size"),
        heads, heads, hidden // heads, c.flag("tie_word_embeddings"), gated=False, norm=2, qkv_bias=bias,
        o_bias=bias, mlp_bias=True, fused_qkv=True, parallel=c.flag("use_parallel_residual"),
    )  # fmt: skip


def _opt(c: Config) -> Text:
    """Two rows more than positions (an offset for padding). OPT-350M norms after each half, and has a narrower table."""
    hidden, heads, bias = c.number("hidden_size"), c.number("num_attention_heads"), c.flag("enable_bias")
    width = c.maybe("word_embed_proj_dim") or hidden
    return Text(
        c.kind, c.number("vocab_size"), c.number("num_hidden_layers"), hidden, c.number("ffn_dim"),
        heads, heads, hidden // heads, c.flag("tie_word_embeddings"), gated=False,
        norm=2 if c.flag("layer_norm_elementwise_affine") else 0,
        final_norm=c.flag("do_layer_norm_before") and not c.flag("_remove_final_layer_norm"),
        qkv_bias=bias, o_bias=bias, mlp_bias=bias, rope=False,
        positions=c.number("max_position_embeddings") + 2, embed_width=width,
    )  # fmt: skip


def _bloom(c: Config) -> Text:
    hidden, heads = c.number("hidden_size"), c.number("n_head")
    return Text(
        c.kind, c.number("vocab_size"), c.number("n_layer"), hidden, 4 * hidden, heads, heads,
        hidden // heads, c.flag("tie_word_embeddings"), gated=False, norm=2, embed_norm=True, qkv_bias=True,
        o_bias=True, mlp_bias=True, fused_qkv=True, rope=False,
    )  # fmt: skip


def _mpt(c: Config) -> Text:
    """transformers builds it without biases, four times as wide inside, and with ALiBi, whatever the config says."""
    hidden, heads = c.number("d_model"), c.number("n_heads")
    return Text(
        c.kind, c.number("vocab_size"), c.number("n_layers"), hidden, 4 * hidden, heads, heads,
        hidden // heads, c.flag("tie_word_embeddings"), gated=False, fused_qkv=True, rope=False,
    )  # fmt: skip


def _falcon(c: Config) -> Text:
    """Falcon-7B: one key/value head, one norm before both halves. 40B and 180B: groups, and a norm before each half."""
    hidden, heads, bias = c.number("hidden_size"), c.number("num_attention_heads"), c.flag("bias")
    grouped, parallel = c.flag("new_decoder_architecture"), c.flag("parallel_attn")
    kv = (c.maybe("num_kv_heads") or heads) if grouped else 1 if c.flag("multi_query") else heads
    beside = c.maybe("num_ln_in_parallel_attn") or (2 if grouped else 1)
    return Text(
        c.kind, c.number("vocab_size"), c.number("num_hidden_layers"), hidden,
        c.maybe("ffn_hidden_size") or 4 * hidden, heads, kv, hidden // heads, c.flag("tie_word_embeddings"),
        gated=False, norm=2, norms=2 if (grouped and beside == 2) or not parallel else 1, qkv_bias=bias,
        o_bias=bias, mlp_bias=bias, fused_qkv=True, rope=not c.flag("alibi"), parallel=parallel or grouped,
    )  # fmt: skip


def _phi(c: Config) -> Text:
    """Phi-1.5 and Phi-2: biases everywhere, the head's too; one norm before both halves."""
    text = replace(
        _plain(c), gated=False, norm=2, norms=1, qkv_bias=True, o_bias=True, mlp_bias=True, head_bias=True,
        parallel=True,
    )  # fmt: skip
    if c.flag("qk_layernorm"):  # LayerNorms: scale and shift of each channel of a head
        text = replace(text, qk_norm="head", extra=2 * text.head_dim)
    return text


def _phi3(c: Config) -> Text:
    return _whole(c, replace(_plain(c), fused_qkv=True, fused_gate=True))


def _olmo(c: Config) -> Text:
    """Norms without weights."""
    bias = c.flag("attention_bias")
    return replace(_plain(c), norm=0, qkv_bias=bias, o_bias=bias)


def _olmo2(c: Config) -> Text:
    bias = c.flag("attention_bias")
    return replace(_plain(c), qk_norm="all", qkv_bias=bias, o_bias=bias)


def _olmo3(c: Config) -> Text:
    return _layered(c, _olmo2(c), 4)


def _olmoe(c: Config) -> Text:
    text = _olmo2(c)
    return replace(text, moe=Mixture(c.number("num_experts"), c.number("num_experts_per_tok"), text.ffn))


def _nemotron(c: Config) -> Text:
    """Squared ReLU, so no gate; LayerNorm."""
    return replace(_llama(c), gated=False, norm=2)


def _apertus(c: Config) -> Text:
    """xIELU, so no gate, with two learnt numbers a layer; norms of queries and keys."""
    bias = c.flag("attention_bias")
    return replace(_plain(c), gated=False, qk_norm="head", qkv_bias=bias, o_bias=bias, extra=2)


def _starcoder2(c: Config) -> Text:
    bias = c.flag("use_bias")
    text = replace(_plain(c), gated=False, norm=2, qkv_bias=bias, o_bias=bias, mlp_bias=bias)
    return _whole(c, text)


def _gpt_oss(c: Config) -> Text:
    """Each head has a learnt sink that takes part in its softmax; a window in every other layer."""
    text, bias = _plain(c), c.flag("attention_bias")
    moe = Mixture(c.number("num_local_experts"), c.number("num_experts_per_tok"), text.ffn, bias=True)
    return _layered(c, replace(text, qkv_bias=bias, o_bias=bias, moe=moe, extra=text.heads), 2)


def _deepseek(c: Config) -> Text:
    """Latent attention; the first layers dense; experts beside shared ones. Multi-token prediction is not built by
    transformers and not counted; neither is V3's balancing bias, which no gradient trains."""
    heads, ffn = c.number("num_attention_heads"), c.number("moe_intermediate_size")
    mla = Latent(
        c.maybe("q_lora_rank"), c.number("kv_lora_rank"), c.number("qk_nope_head_dim"),
        c.number("qk_rope_head_dim"), c.number("v_head_dim"),
    )  # fmt: skip
    bias, layers = c.flag("attention_bias"), c.number("num_hidden_layers")
    mlp_bias = c.kind == "deepseek_v2" and c.flag("mlp_bias")
    dense = frozenset(range(min(layers, c.number("first_k_dense_replace", least=0))))
    moe = None
    if len(dense) < layers:
        shared = (c.maybe("n_shared_experts") or 0) * ffn
        moe = Mixture(
            c.number("n_routed_experts"), c.number("num_experts_per_tok"), ffn, shared, shared_bias=mlp_bias
        )
    return Text(
        c.kind, c.number("vocab_size"), layers, c.number("hidden_size"), c.number("intermediate_size"), heads,
        heads, mla.nope + mla.rope, c.flag("tie_word_embeddings"), qkv_bias=bias, o_bias=bias,
        mlp_bias=mlp_bias, moe=moe, dense=dense, mla=mla,
    )  # fmt: skip


DECODERS: dict[str, Callable[[Config], Text]] = {
    "apertus": _apertus,
    "bloom": _bloom,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "gptj": _gptj,
    "granite": _llama,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "mpt": _mpt,
    "nemotron": _nemotron,
    "olmo": _olmo,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "olmoe": _olmoe,
    "opt": _opt,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2_5_vl_text": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen2_vl_text": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen3_vl_moe_text": _qwen3_vl_moe,
    "qwen3_vl_text": _qwen3_vl,
    "smollm3": _smollm3,
    "starcoder2": _starcoder2,
}
