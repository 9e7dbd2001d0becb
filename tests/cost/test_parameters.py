"""Parameter counts against published ones and against transformers itself."""

import os

import pytest

from famc.cost.parameters import count, lora
from famc.cost.shape import PRESETS, Moe, Shape

# Exact totals of the published checkpoints (safetensors metadata; tied heads counted once).
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "llama3-1b": 1_235_814_400,
    "llama3-3b": 3_212_749_824,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}

TINY = [
    Shape("qwen3", 4096, 4, 128, 384, 4, 2, 32, True, 256),
    Shape("qwen3", 1000, 3, 192, 500, 2, 1, 64, False, 256),
    Shape("llama", 4096, 2, 256, 688, 8, 2, 32, False, 256),
    Shape("llama", 512, 5, 64, 160, 4, 4, 32, True, 256),
    Shape("qwen3_moe", 2048, 3, 128, 384, 4, 2, 48, True, 256, moe=Moe(8, 2, 96)),
]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_count_equals_the_published_checkpoint(name: str) -> None:
    assert count(PRESETS[name]).total == PUBLISHED[name]


def test_active_parameters_match_the_models_names() -> None:
    """Qwen3-30B-A3B and 235B-A22B: 3.3 B and 22 B active, by their model cards."""
    assert count(PRESETS["qwen3-30b-a3b"]).active == pytest.approx(3.3e9, rel=0.03)
    assert count(PRESETS["qwen3-235b-a22b"]).active == pytest.approx(22e9, rel=0.02)


def test_every_parameter_of_a_dense_model_is_active() -> None:
    p = count(PRESETS["qwen3-4b"])
    assert p.active == p.total


def test_tying_saves_exactly_one_table() -> None:
    tied, untied = (count(Shape("qwen3", 512, 2, 64, 192, 2, 1, 32, tie, 64)) for tie in (True, False))
    assert untied.total - tied.total == 512 * 64
    assert untied.embedding == 2 * tied.embedding


def _transformers_config(shape: Shape) -> object:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": shape.vocab, "num_hidden_layers": shape.layers, "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "tie_word_embeddings": shape.tie,
    }  # fmt: skip
    if shape.moe is not None:
        sizes |= {
            "num_experts": shape.moe.experts,
            "num_experts_per_tok": shape.moe.active,
            "moe_intermediate_size": shape.moe.ffn,
        }
    return transformers.AutoConfig.for_model(shape.arch, **sizes)


@pytest.mark.parametrize(
    "shape", [*TINY, *(PRESETS[n] for n in ("qwen3-0.6b", "llama3-1b", "llama3-8b", "qwen3-30b-a3b"))]
)
def test_count_equals_transformers(shape: Shape) -> None:
    """Built on the meta device: no memory, every weight, difference 0."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = _transformers_config(shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert count(shape).total == sum(p.numel() for p in model.parameters())


def test_lora_counts_what_peft_would_add() -> None:
    """Rank 8 on the seven linears of Llama-3-8B: 20,971,520, the figure peft prints."""
    assert lora(PRESETS["llama3-8b"], 8) == 20_971_520
