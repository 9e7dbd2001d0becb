"""What a model is made of against the counts of parameters and FLOPs, and against hand-computed sums."""

import pytest

from famc.cost import sums
from famc.cost.anatomy import Anatomy, Attention, Block, Linear, Stack, Table
from famc.cost.of_shape import anatomy
from famc.cost.parameters import count, lora
from famc.cost.shape import PRESETS, Moe, Shape

TINY = [
    Shape("qwen3", 4096, 4, 128, 384, 4, 2, 32, True, 256),
    Shape("llama", 4096, 2, 256, 688, 8, 2, 32, False, 256),
    Shape("qwen3_moe", 2048, 3, 128, 384, 4, 2, 48, True, 256, moe=Moe(8, 2, 96)),
    Shape("bert", 1000, 1, 64, 128, 2, 2, 32, True, 96),
    Shape("modernbert", 1000, 1, 64, 128, 2, 2, 32, True, 96),
    Shape("modernbert", 2048, 3, 96, 200, 4, 4, 24, True, 512),
    Shape("modernbert", 2048, 5, 96, 200, 4, 4, 24, True, 512),
    Shape("t5", 2048, 4, 96, 200, 6, 6, 40, True, 512),
]
ALL = [*PRESETS.values(), *TINY]


@pytest.mark.parametrize("shape", ALL, ids=[*PRESETS, *(f"tiny{i}" for i in range(len(TINY)))])
def test_sums_equal_the_counts_of_every_preset(shape: Shape) -> None:
    made, p = anatomy(shape), count(shape)
    assert (sums.parameters(made), sums.active(made)) == (p.total, p.active)
    assert dict(made.parts) == {"text": p.total}
    assert sums.adapters(made, 8) == lora(shape, 8)


def _core(**more: object) -> Anatomy:
    block = Block(64, (), (Attention(4, 2, 16, 8, **more),))  # type: ignore[arg-type]
    return Anatomy("one", (Stack("text", 3, block),), ())


def test_causal_attention_is_half_of_full_and_a_window_is_counted_as_wide_as_it_is() -> None:
    """3 layers x 4 heads x 2 x (16 + 8) x keys seen, of 100 tokens; window 40 of 100 causal: 40 - 1600 / 200 = 32."""
    pair = 3 * 4 * 2 * 24
    assert sums.attention_flops(_core(causal=False), 100, 100) == 100 * pair * 100
    assert sums.attention_flops(_core(), 100, 100) == 100 * pair * 50
    assert sums.attention_flops(_core(causal=False, window=40), 100, 100) == 100 * pair * 40
    assert sums.attention_flops(_core(window=40), 100, 100) == pytest.approx(100 * pair * 32)
    assert sums.attention_flops(_core(window=400), 100, 100) == 100 * pair * 50


def test_llama3_8b_keeps_128_kib_a_token() -> None:
    """32 layers x 2 x 8 heads x 128 x 2 bytes, as in the Llama 3 report's GQA arithmetic."""
    made = anatomy(PRESETS["llama3-8b"])
    assert sums.kv_bytes(made, 1) == 131_072
    assert sums.kv_bytes(made, 1000) == 131_072_000


def test_an_encoder_keeps_no_cache_and_t5_keeps_its_input_too() -> None:
    assert sums.kv_bytes(anatomy(PRESETS["bert-base"]), 1) == 0
    made = anatomy(PRESETS["t5-small"])  # 8 layers, 6 heads of 64
    assert sums.kv_bytes(made, 1) == 8 * 2 * 6 * 64 * 2
    assert sums.kv_bytes(made, 10, source=90) == 100 * sums.kv_bytes(made, 1)


def test_a_windowed_layer_keeps_no_more_than_its_window_and_a_latent_is_counted_as_it_is() -> None:
    assert sums.kv_bytes(_core(window=40), 100) == 3 * 2 * 24 * 40 * 2
    assert sums.kv_bytes(_core(cached=10), 100) == 3 * 10 * 100 * 2


def test_experts_count_whole_in_weights_and_by_the_active_ones_in_flops() -> None:
    block = Block(8, (Linear("up", 8, 4, bias=True, copies=6, active=2),), ())
    made = Anatomy("moe", (Stack("text", 1, block),), (Table("tokens", 10, 8),))
    assert sums.parameters(made) == 6 * (32 + 4) + 80
    assert sums.active(made) == 2 * (32 + 4) + 80
    assert sums.matmul_flops(made, 1) == 2 * 2 * 32


def test_images_cost_nothing_until_there_are_some() -> None:
    """2 images of 16 tokens in sequences of 128: a quarter of a token each, and attention over 16 tokens."""
    tower = Block(8, (Linear("up", 8, 4),), (Attention(1, 1, 8, 8, causal=False),))
    made = Anatomy("vl", (Stack("vision", 1, tower, 0.0, length=16, medium="vision"),), ())
    assert sums.forward_flops(made, 128, 128) == 0
    two = sums.with_media(made, 128, {"vision": 2})
    assert sums.matmul_flops(two, 128) == 32 * 2 * 32
    assert sums.attention_flops(two, 128, 128) == 32 * 16 * 2 * 16


def test_media_that_a_model_does_not_read_are_named() -> None:
    with pytest.raises(ValueError, match="qwen3 reads no audio: it reads text alone"):
        sums.with_media(anatomy(PRESETS["qwen3-0.6b"]), 128, {"audio": 1})
    tower = Anatomy("vl", (Stack("vision", 1, Block(8, (), ()), 0.0, length=16, medium="vision"),), ())
    with pytest.raises(ValueError, match="-1 inputs of vision"):
        sums.with_media(tower, 128, {"vision": -1})
