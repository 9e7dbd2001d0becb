"""Work of a pass."""

import pytest

from famc.cost import flops
from famc.cost.parameters import count
from famc.cost.shape import PRESETS, Shape

TINY = Shape("qwen3", 4096, 4, 128, 384, 4, 2, 32, True, 256)


def test_forward_is_two_flops_a_weight_and_token_when_attention_is_negligible() -> None:
    shape = PRESETS["llama3-8b"]
    weights = count(shape).total - shape.vocab * shape.hidden  # the input table is looked up, not multiplied
    assert flops.forward(shape, 1, 1) == pytest.approx(2 * weights, rel=1e-3)


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
    assert flops.forward(TINY, 2 * 64, 64, causal=False) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_training_is_three_forwards() -> None:
    assert flops.training(TINY, 1000, 256) == pytest.approx(3 * flops.forward(TINY, 1000, 256))


def test_causal_attention_is_half_of_full() -> None:
    base = flops.forward(TINY, 100, 0)
    full = flops.forward(TINY, 100, 4096, causal=False) - base
    assert flops.forward(TINY, 100, 4096) - base == pytest.approx(full / 2)


def test_recomputation_adds_at_most_one_forward() -> None:
    once = flops.forward(TINY, 1000, 2048)
    none, selective, full = (
        flops.training(TINY, 1000, 2048, recompute=r) for r in ("none", "selective", "full")
    )
    assert none < selective < full <= none + once
    with pytest.raises(ValueError, match="recompute"):
        flops.training(TINY, 1, 1, recompute="half")


def test_frozen_weights_save_their_gradient_pass() -> None:
    once = flops.forward(TINY, 1000, 256)
    assert flops.training(TINY, 1000, 256, trainable=0.0) == pytest.approx(2 * once)


def test_a_mixture_works_like_its_active_part() -> None:
    moe = PRESETS["qwen3-30b-a3b"]
    active = count(moe).active - moe.vocab * moe.hidden
    assert flops.forward(moe, 1, 1) == pytest.approx(2 * active, rel=1e-3)
