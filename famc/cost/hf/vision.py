"""Towers that read images, and pairs of a tower and a text encoder: ViT, SigLIP, CLIP.

In: a Config and what stands above the last block. Out: an Anatomy. Weights are those that transformers builds (5.23);
tests compare them. Bears no identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from famc.cost.anatomy import Anatomy, Attention, Block, Linear, Stack, Table
from famc.cost.hf.encoders import crossed, encoder_block, once
from famc.cost.hf.read import Config
from famc.cost.hf.text import feed_forward, merged, projections, stacked, total
from famc.cost.sums import with_media


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tower stands. `step`: its own tokens an image where they are the step's; 0 inside a larger model, where
    `with_media` says how many images there are."""

    part: str = "vision"
    step: int = 0

    def put(self, stack: Stack, length: int) -> Stack:
        """The stack with its `length` tokens an image; one that attends to others has as many of them as its own step."""
        return replace(
            stack,
            part=self.part,
            share=length / self.step if self.step else 0.0,
            length=length,
            source=stack.source_length / self.step if self.step and stack.source_length else 0.0,
            medium="" if self.step else "vision",
        )


def patches(c: Config) -> int:
    """Patches of an image of the size the model was made for."""
    (height, width), (tall, wide) = c.side("image_size"), c.side("patch_size")
    return (height // tall) * (width // wide)


def patch_embedding(c: Config, hidden: int, *, bias: bool = True) -> Linear:
    """A convolution whose stride is its width: a linear layer over the pixels of a patch."""
    tall, wide = c.side("patch_size")
    return Linear("patch", c.number("num_channels") * tall * wide, hidden, bias, split="none")


def vit(c: Config, task: str) -> Anatomy:
    """ViT with a classifier on its first token (`classes`), or with its pooler (`base`)."""
    h, n = c.number("hidden_size"), patches(c)
    place = Place(step=n + 1)
    block = encoder_block(
        h, c.number("num_attention_heads"), c.number("intermediate_size"), qkv_bias=c.flag("qkv_bias")
    )
    stacks = [
        place.put(once("", h, (patch_embedding(c, h),), 0.0), n),
        place.put(Stack("", c.number("num_hidden_layers"), block), n + 1),
    ]
    head = None
    if task == "classes":
        head = Linear("classes", h, c.labels, bias=True, split="none")
    else:
        pooler = Linear("pooler", h, c.maybe("pooler_output_size") or h, bias=True, split="none")
        stacks.append(place.put(once("", h, (pooler,), 0.0), 1))
    made = Anatomy(
        c.kind,
        tuple(stacks),
        (Table("positions", n + 1, h),),
        head=head,
        vectors=h + 2 * h,  # the first token, the last norm
        head_share=1 / (n + 1),
    )
    return total("vision", made)


def siglip_vision(c: Config, task: str = "base", *, alone: bool = True) -> Anatomy:
    """SigLIP's tower: no token of its own; a learnt query attends to all patches above the last block
    (`vision_use_head`)."""
    h, heads, ffn, n = (
        c.number("hidden_size"), c.number("num_attention_heads"), c.number("intermediate_size"), patches(c),
    )  # fmt: skip
    place = Place(step=n if alone else 0)
    stacks = [
        place.put(once("", h, (patch_embedding(c, h),), 0.0), n),
        place.put(Stack("", c.number("num_hidden_layers"), encoder_block(h, heads, ffn)), n),
    ]
    if c.flag("vision_use_head"):
        query, key, value, out = crossed(projections(h, h, h, bias=True, o_bias=True))
        pool = Block(
            h,
            (query, key, value, out, *feed_forward(h, ffn, gated=False, bias=True)),
            (Attention(heads, heads, h // heads, h // heads, causal=False, cross=True),),
            vectors=3 * h,  # a norm and the query
            norms=1,
            rope=False,
            gated=False,
        )
        stacks.append(place.put(Stack("", 1, pool, source_length=n), 1))
    made = Anatomy(c.kind, tuple(stacks), (Table("positions", n, h),), vectors=2 * h)
    return total("vision", made)


def clip_vision(c: Config, task: str = "base", *, alone: bool = True) -> Anatomy:
    """CLIP's tower: a token of its own, a norm below the first block and one above the last. `projection`: with the matrix
    into the space that images and texts share."""
    h, n = c.number("hidden_size"), patches(c)
    place = Place(step=n + 1 if alone else 0)
    block = encoder_block(h, c.number("num_attention_heads"), c.number("intermediate_size"))
    stacks = [
        place.put(once("", h, (patch_embedding(c, h, bias=False),), 0.0), n),
        place.put(Stack("", c.number("num_hidden_layers"), block), n + 1),
    ]
    if task == "projection":
        shared = Linear("projection", h, c.number("projection_dim"), split="none")
        stacks.append(place.put(once("", h, (shared,), 0.0), 1))
    made = Anatomy(c.kind, tuple(stacks), (Table("positions", n + 1, h),), vectors=h + 4 * h)
    return total("vision", made)


def siglip_text(c: Config, task: str = "base") -> Anatomy:
    return _text(
        c,
        causal=False,
        above=Linear("projection", c.number("hidden_size"), _projected(c), True, split="none"),
    )


def clip_text(c: Config, task: str = "base") -> Anatomy:
    """`projection`: with the matrix into the shared space."""
    shared = Linear("projection", c.number("hidden_size"), c.number("projection_dim"), split="none")
    return _text(c, causal=True, above=shared if task == "projection" else None)


def siglip(c: Config, task: str) -> Anatomy:
    """Both towers: a step counts the text's tokens, each text of full length has an image unless `with_media` says else."""
    vision = siglip_vision(Config("siglip_vision_model", c.sub("vision_config")), alone=False)
    inner = Config("siglip_text_model", c.sub("text_config"))
    return _pair(c, vision, siglip_text(inner), 2, inner)


def clip(c: Config, task: str) -> Anatomy:
    """As `siglip`; the shared space has the width that the outer config says."""
    wide = {"projection_dim": c.number("projection_dim")}
    vision = Config("clip_vision_model", {**c.sub("vision_config"), **wide})
    inner = Config("clip_text_model", {**c.sub("text_config"), **wide})
    tower = clip_vision(vision, "projection", alone=False)
    return _pair(c, tower, clip_text(inner, "projection"), 1, inner)


VISION: Mapping[str, Callable[..., Anatomy]] = {
    "clip": clip,
    "clip_text_model": clip_text,
    "clip_vision_model": clip_vision,
    "siglip": siglip,
    "siglip_text_model": siglip_text,
    "siglip_vision_model": siglip_vision,
    "vit": vit,
}
TOWERS: Mapping[str, Callable[..., Anatomy]] = {
    "clip_vision_model": clip_vision,
    "siglip_vision_model": siglip_vision,
}
"""Those that compositions put before a language model."""


def _projected(c: Config) -> int:
    return c.maybe("projection_size") or c.number("hidden_size")


def _text(c: Config, *, causal: bool, above: Linear | None) -> Anatomy:
    h, context = c.number("hidden_size"), c.number("max_position_embeddings")
    block = encoder_block(h, c.number("num_attention_heads"), c.number("intermediate_size"), causal=causal)
    stacks = stacked("text", [block] * c.number("num_hidden_layers"))
    if above is not None:
        stacks += (once("text", h, (above,), 1 / context),)
    tables = (Table("tokens", c.number("vocab_size"), h), Table("positions", context, h))
    return total("text", Anatomy(c.kind, stacks, tables, vectors=2 * h))


def _pair(c: Config, vision: Anatomy, text: Anatomy, scalars: int, inner: Config) -> Anatomy:
    """Two towers and the loss's scale (and bias)."""
    whole = merged(c.kind, vision, text)
    whole = replace(whole, vectors=whole.vectors + scalars, parts=(*whole.parts, ("loss", scalars)))
    return with_media(whole, inner.number("max_position_embeddings"), {"vision": 1})
