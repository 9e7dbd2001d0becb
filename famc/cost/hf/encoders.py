"""Encoders of text, and encoders with a decoder: BERT, RoBERTa, ModernBERT, T5, Whisper.

In: a Config and what stands above the last block. Out: an Anatomy. Weights are those that transformers builds (5.23);
tests compare them. Bears no identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from famc.cost.anatomy import Anatomy, Attention, Block, Linear, Stack, Table
from famc.cost.hf.read import Config, windows
from famc.cost.hf.text import feed_forward, merged, projections, stacked, total
from famc.cost.sums import with_media

ENCODER_SHARE, DECODER_SHARE = 0.9, 0.2
"""Of a text's tokens, in T5: span corruption takes 15 % of them out in spans of 3 (Raffel et al. 2019,
arXiv:1910.10683, section 3.1.4). The encoder reads the other 85 % and a mark for each span, 5 %; the decoder
writes the marks and what was taken out: 512 tokens in, 114 out. Conversations are taken for the same
(assumed)."""
CONV = 3  # width of Whisper's two convolutions over time; the second one halves the frames


def bert(c: Config, task: str) -> Anatomy:
    """BERT and RoBERTa. `lm`: the head that fills in masked tokens; `pretraining`: that and the next sentence's; `base`: with
    the pooler; `classes`: a classifier of the first token."""
    if c.flag("add_cross_attention") or c.flag("is_decoder"):
        raise ValueError(
            f"{c.kind}: famc counts it as an encoder, not with is_decoder or add_cross_attention"
        )
    h, heads, vocab = c.number("hidden_size"), c.number("num_attention_heads"), c.number("vocab_size")
    context = c.number("max_position_embeddings")
    block = encoder_block(h, heads, c.number("intermediate_size"))
    tie, masked = c.flag("tie_word_embeddings"), task in ("lm", "pretraining")
    tables = (
        Table("tokens", vocab, h, head=masked and tie),
        Table("positions", context, h),
        Table("types", c.number("type_vocab_size"), h),
    )
    above = {
        "lm": (),
        "base": (_dense("pooler", h, h),),
        "pretraining": (_dense("pooler", h, h), _dense("next_sentence", h, 2)),
        "classes": (_dense("dense", h, h), _dense("classes", h, c.labels)),
    }[task]
    stacks = stacked("text", [block] * c.number("num_hidden_layers"))
    return total(
        "text",
        Anatomy(
            c.kind,
            stacks + ((once("text", h, above, 1 / context),) if above else ()),
            tables,
            (_dense("dense", h, h),) if masked else (),
            Linear("head", h, vocab, bias=True) if masked and not tie else None,
            vocab if masked else 0,
            2 * h + (2 * h + vocab if masked else 0),
        ),
    )


def modernbert(c: Config, task: str) -> Anatomy:
    """Q, K and V lie in one matrix, gate and value in another; the first block has no norm before its attention. Local
    layers see `local_attention` / 2 tokens to each side, and the token itself."""
    h, heads, vocab = c.number("hidden_size"), c.number("num_attention_heads"), c.number("vocab_size")
    layers, ffn = c.number("num_hidden_layers"), c.number("intermediate_size")
    norm = 2 if c.flag("norm_bias") else 1
    bias, tie = c.flag("attention_bias"), c.flag("tie_word_embeddings")
    every = c.number("global_attn_every_n_layers")
    types = c.names("layer_types") or [
        "sliding_attention" if i % every else "full_attention" for i in range(layers)
    ]
    near, d = c.number("local_attention") // 2 * 2 + 1, h // heads
    seen = windows(c, layers, near, types) or (None,) * layers
    linears = (
        *projections(h, h, h, bias=bias, o_bias=bias, fused=True),
        *feed_forward(h, ffn, gated=True, bias=c.flag("mlp_bias"), fused=True),
    )

    def block(i: int) -> Block:
        norms = 1 if i == 0 else 2
        return Block(h, linears, (Attention(heads, heads, d, d, False, seen[i]),), norms * norm * h, norms)

    masked = task == "lm"
    dense, context = (
        Linear("dense", h, h, c.flag("classifier_bias"), split="none"),
        c.number("max_position_embeddings"),
    )
    stacks = stacked("text", map(block, range(layers)))
    if task == "classes":
        stacks += (once("text", h, (dense, _dense("classes", h, c.labels)), 1 / context),)
    above = {"lm": norm * h, "classes": norm * h, "base": 0}[task]
    untied = masked and not tie
    if masked and tie and c.flag("decoder_bias"):
        above += vocab
    return total(
        "text",
        Anatomy(
            c.kind,
            stacks,
            (Table("tokens", vocab, h, head=masked and tie),),
            (dense,) if masked else (),
            Linear("head", h, vocab, c.flag("decoder_bias")) if untied else None,
            vocab if masked else 0,
            2 * norm * h + above,
        ),
    )


def t5(c: Config, task: str) -> Anatomy:
    """T5, with its tables tied whatever the config says, as transformers builds it. The first layer of each stack has a bias
    for each bucket of distances and head. `encoder`: without the decoder; it then reads all of the step's tokens."""
    h, heads, d = c.number("d_model"), c.number("num_heads"), c.number("d_kv")
    q, vocab = heads * d, c.number("vocab_size")
    kinds = c.get("feed_forward_proj")
    if not isinstance(kinds, str):
        raise ValueError(f"{c.kind}: feed_forward_proj is {kinds!r}: it must be like relu or gated-gelu")
    gated = kinds.startswith("gated-")
    own = projections(h, q, q, bias=False, o_bias=False)
    feed = feed_forward(h, c.number("d_ff"), gated=gated, bias=False)
    core = Attention(heads, heads, d, d, causal=False, flash=False)
    body = Block(h, (*own, *feed), (core,), 2 * h, rope=False, gated=gated)
    around = h + c.number("relative_attention_num_buckets") * heads
    layers, tokens = c.number("num_layers"), Table("tokens", vocab, h, head=task == "lm")
    alone = task == "encoder"
    encoder = Stack("encoder", layers, body, 1.0 if alone else ENCODER_SHARE)
    if alone:
        return total("text", Anatomy(c.kind, (encoder,), (tokens,), vectors=around))
    writer = Block(
        h,
        (*own, *crossed(own), *feed),
        (replace(core, causal=True), replace(core, cross=True)),
        3 * h,
        norms=3,
        rope=False,
        gated=gated,
    )
    decoder = Stack(
        "decoder", c.maybe("num_decoder_layers") or layers, writer, DECODER_SHARE, source=ENCODER_SHARE
    )
    made = Anatomy(
        c.kind,
        (encoder, decoder),
        (tokens,),
        vocab=vocab if task == "lm" else 0,
        vectors=2 * around,
        head_share=DECODER_SHARE,
    )
    return total("text", made)


def whisper(c: Config, task: str) -> Anatomy:
    """Whisper; `encoder`: its encoder alone, whose tokens then are the step's. The whole model: steps count the decoder's
    tokens, and each sequence of `max_target_positions` has one piece of audio (30 s) unless `with_media` says else."""
    if task == "encoder":
        return audio_encoder(c, alone=True)
    h, heads, vocab = c.number("d_model"), c.number("decoder_attention_heads"), c.number("vocab_size")
    frames, written = c.number("max_source_positions"), c.number("max_target_positions")
    tie, lm = c.flag("tie_word_embeddings"), task == "lm"
    own = _keys_without_bias(h)
    core = Attention(heads, heads, h // heads, h // heads)
    block = Block(
        h,
        (*own, *crossed(own), *feed_forward(h, c.number("decoder_ffn_dim"), gated=False, bias=True)),
        (core, replace(core, causal=False, cross=True)),
        6 * h,
        norms=3,
        rope=False,
        gated=False,
    )
    decoder = Anatomy(
        c.kind,
        (Stack("decoder", c.number("decoder_layers"), block, source_length=frames, medium="audio"),),
        (Table("tokens", vocab, h, head=lm and tie), Table("positions", written, h)),
        head=Linear("head", h, vocab) if lm and not tie else None,
        vocab=vocab if lm else 0,
        vectors=2 * h,
    )
    whole = merged(c.kind, audio_encoder(c, part="encoder"), total("decoder", decoder))
    return with_media(whole, written, {"audio": 1})


def audio_encoder(c: Config, *, part: str = "audio", alone: bool = False) -> Anatomy:
    """Whisper's encoder, Qwen2-Audio's too: two convolutions over the spectrogram, the second with stride 2, learnt
    positions, blocks. `alone`: its own tokens are the step's; else `with_media` sets how many there are."""
    h, heads, frames = (
        c.number("d_model"),
        c.number("encoder_attention_heads"),
        c.number("max_source_positions"),
    )
    share, medium = (1.0, "") if alone else (0.0, "audio")
    feed = feed_forward(h, c.number("encoder_ffn_dim"), gated=False, bias=True)
    core = Attention(heads, heads, h // heads, h // heads, causal=False)
    block = Block(h, (*_keys_without_bias(h), *feed), (core,), 4 * h, rope=False, gated=False)
    first = _dense("conv1", CONV * c.number("num_mel_bins"), h)
    stacks = (
        once(part, h, (first,), 2 * share, 2 * frames, medium),
        once(part, h, (_dense("conv2", CONV * h, h),), share, frames, medium),
        Stack(part, c.number("encoder_layers"), block, share, frames, medium=medium),
    )
    return total(part, Anatomy(c.kind, stacks, (Table("positions", frames, h),), vectors=2 * h))


ENCODERS: Mapping[str, Callable[..., Anatomy]] = {
    "bert": bert,
    "modernbert": modernbert,
    "roberta": bert,
    "t5": t5,
    "whisper": whisper,
    "xlm-roberta": bert,
}


# --- parts --------------------------------------------------------------------------------------------------


def encoder_block(hidden: int, heads: int, ffn: int, *, qkv_bias: bool = True, causal: bool = False) -> Block:
    """BERT's, ViT's and their kin: two LayerNorms, biases, GELU without a gate, positions added below."""
    d = hidden // heads
    linears = (
        *projections(hidden, hidden, hidden, bias=qkv_bias, o_bias=True),
        *feed_forward(hidden, ffn, gated=False, bias=True),
    )
    return Block(
        hidden, linears, (Attention(heads, heads, d, d, causal),), 4 * hidden, rope=False, gated=False
    )


def crossed(own: tuple[Linear, ...]) -> tuple[Linear, ...]:
    """The projections of a second attention, whose keys and values are made of another stack's tokens."""
    return tuple(replace(x, name=f"cross_{x.name}", cross=x.name in ("k", "v")) for x in own)


def once(
    part: str,
    hidden: int,
    linears: tuple[Linear, ...],
    share: float,
    length: int | None = None,
    medium: str = "",
    vectors: int = 0,
) -> Stack:
    """Linear layers without attention that not every token of the step meets: poolers, convolutions, projectors."""
    block = Block(hidden, linears, (), vectors, norms=0, rope=False, gated=False)
    return Stack(part, 1, block, share, length, medium=medium)


def _dense(name: str, fan_in: int, fan_out: int) -> Linear:
    return Linear(name, fan_in, fan_out, bias=True, split="none")


def _keys_without_bias(hidden: int) -> tuple[Linear, ...]:
    """Whisper's: a bias on all but the keys, which softmax would cancel."""
    own = projections(hidden, hidden, hidden, bias=True, o_bias=True)
    return tuple(replace(x, bias=x.name != "k") for x in own)
