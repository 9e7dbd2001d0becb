"""FLOPs of a forward pass: sums over the anatomy, against torch's own count and hand-computed figures."""

import pytest

from famc.cost import sums
from famc.cost.hf.encoders import DECODER_SHARE, ENCODER_SHARE
from famc.cost.of_shape import anatomy
from famc.cost.parameters import count
from famc.cost.shape import PRESETS, Shape

TINY = Shape("qwen3", 4096, 4, 128, 384, 4, 2, 32, True, 256)


def forward(shape: Shape, tokens: float, context: float, causal: bool = True) -> float:
    """With `causal` off a decoder's queries see all keys, as torch counts them."""
    made = anatomy(shape)
    more = 0.0 if causal else sums.attention_flops(made, tokens, context)
    return sums.forward_flops(made, tokens, context) + more


def test_forward_is_two_flops_a_weight_and_token_when_attention_is_negligible() -> None:
    shape = PRESETS["llama3-8b"]
    weights = count(shape).total - shape.vocab * shape.hidden  # the input table is looked up, not multiplied
    assert forward(shape, 1, 1) == pytest.approx(2 * weights, rel=1e-3)


def test_forward_equals_the_count_of_torch() -> None:
    """torch's own FLOP counter over a real forward pass; it counts attention in full."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.AutoConfig.for_model(
        "qwen3",
        vocab_size=4096,
        num_hidden_layers=4,
        hidden_size=128,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        ids = torch.zeros((2, 64), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    assert forward(TINY, 2 * 64, 64, causal=False) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_causal_attention_is_half_of_full() -> None:
    base = forward(TINY, 100, 0)
    full = forward(TINY, 100, 4096, causal=False) - base
    assert forward(TINY, 100, 4096) - base == pytest.approx(full / 2)


def test_a_mixture_works_like_its_active_part() -> None:
    moe = PRESETS["qwen3-30b-a3b"]
    active = count(moe).active - moe.vocab * moe.hidden
    assert forward(moe, 1, 1) == pytest.approx(2 * active, rel=1e-3)


BERT = Shape("bert", 4096, 4, 128, 384, 4, 4, 32, True, 256)
MODERN = Shape("modernbert", 4096, 4, 128, 384, 4, 4, 32, True, 256)
T5 = Shape("t5", 4096, 3, 128, 384, 4, 4, 48, True, 256)


@pytest.mark.parametrize("shape", [BERT, MODERN])
def test_forward_of_an_encoder_equals_the_count_of_torch(shape: Shape) -> None:
    """64 tokens lie in every window of ModernBERT."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = transformers.AutoConfig.for_model(
        shape.arch, vocab_size=4096, num_hidden_layers=4, hidden_size=128, intermediate_size=384,
        num_attention_heads=4, attn_implementation="eager", **ids,
    )  # fmt: skip
    model = transformers.AutoModelForMaskedLM.from_config(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones((2, 64), dtype=torch.long))
    assert forward(shape, 2 * 64, 64) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_forward_of_t5_equals_the_count_of_torch() -> None:
    """Of 100 tokens of text the encoder reads 90, the decoder writes 20."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.AutoConfig.for_model(
        "t5", vocab_size=4096, num_layers=3, d_model=128, d_ff=384, num_heads=4, d_kv=48,
        feed_forward_proj="gated-gelu", attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        read, written = (torch.zeros((2, n), dtype=torch.long) for n in (90, 20))
        with FlopCounterMode(display=False) as counter:
            model(input_ids=read, decoder_input_ids=written)
    assert forward(T5, 2 * 100, 100) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_span_corruption_makes_what_the_paper_says() -> None:
    """15 % in spans of 3 tokens: 512 tokens for the encoder come with 114 for the decoder."""
    noise, spans = 0.15, 0.15 / 3
    read, written = ENCODER_SHARE, DECODER_SHARE
    assert (read, written) == pytest.approx((1 - noise + spans, noise + spans))
    for_512 = 512 * written / read
    assert for_512 == pytest.approx(114, abs=1)


def test_a_window_bounds_the_work_of_local_attention() -> None:
    """Of four blocks two are global: the first and the fourth."""
    far, farther = (forward(MODERN, 1, n) for n in (1000, 2000))
    assert farther - far == pytest.approx(2 * 4 * 128 * 1000)
    assert forward(BERT, 1, 2000) - forward(BERT, 1, 1000) == pytest.approx(4 * 4 * 128 * 1000)
