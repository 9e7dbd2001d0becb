"""Parameter counts against published ones and against transformers itself."""

import os
from typing import Any

import pytest

from famc.cost.parameters import around, bare, blocks, count, lora, matrices, ranker
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
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "modernbert-base": 149_655_232,
    "modernbert-large": 395_881_664,
}
# T5 v1.1 has a head of its own, which transformers 5 ties: so many vocabulary rows more.
UNTIED = {"t5-small": 76_961_152, "t5-base": 247_577_856, "t5-large": 783_150_080}

TINY = [
    Shape("qwen3", 4096, 4, 128, 384, 4, 2, 32, True, 256),
    Shape("qwen3", 1000, 3, 192, 500, 2, 1, 64, False, 256),
    Shape("llama", 4096, 2, 256, 688, 8, 2, 32, False, 256),
    Shape("llama", 512, 5, 64, 160, 4, 4, 32, True, 256),
    Shape("qwen3_moe", 2048, 3, 128, 384, 4, 2, 48, True, 256, moe=Moe(8, 2, 96)),
]
READERS = [
    Shape("bert", 1000, 1, 64, 128, 2, 2, 32, True, 96),
    Shape("bert", 2048, 5, 96, 400, 4, 4, 24, True, 512),
    Shape("modernbert", 1000, 1, 64, 128, 2, 2, 32, True, 96),
    Shape("modernbert", 2048, 7, 96, 200, 4, 4, 24, True, 512),
    Shape("t5", 1000, 1, 64, 128, 2, 2, 32, True, 96),
    Shape("t5", 2048, 4, 96, 200, 6, 6, 40, True, 512),
]
NEW_PRESETS = ("bert-base", "bert-large", "modernbert-base", "modernbert-large", *UNTIED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_count_equals_the_published_checkpoint(name: str) -> None:
    assert count(PRESETS[name]).total == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(UNTIED))
def test_count_equals_the_published_t5_but_for_its_head(name: str) -> None:
    shape = PRESETS[name]
    assert count(shape).total + shape.vocab * shape.hidden == UNTIED[name]


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


def _transformers_model(shape: Shape, **more: Any) -> Any:
    """Built on the meta device: no memory, every weight."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
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
    if shape.arch in ("bert", "modernbert"):
        sizes = {k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "head_dim")}
        sizes["max_position_embeddings"] = shape.context
        sizes |= dict.fromkeys(
            ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0
        )
    if shape.arch == "t5":
        sizes = {
            "vocab_size": shape.vocab, "num_layers": shape.layers, "d_model": shape.hidden, "d_ff": shape.ffn,
            "num_heads": shape.heads, "d_kv": shape.head_dim, "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": shape.tie,
        }  # fmt: skip
    heads = {
        "bert": "AutoModelForMaskedLM",
        "modernbert": "AutoModelForMaskedLM",
        "t5": "AutoModelForSeq2SeqLM",
    }
    made = getattr(transformers, heads.get(shape.arch, "AutoModelForCausalLM"))
    config = transformers.AutoConfig.for_model(shape.arch, **(sizes | more))
    with torch.device("meta"):
        return made.from_config(config)


@pytest.mark.parametrize(
    "shape",
    [*TINY, *READERS]
    + [PRESETS[n] for n in ("qwen3-0.6b", "llama3-1b", "llama3-8b", "qwen3-30b-a3b", *NEW_PRESETS)],
)
def test_count_equals_transformers(shape: Shape) -> None:
    """Every weight, difference 0; encoders with the head that fills in masked tokens."""
    model = _transformers_model(shape)
    assert count(shape).total == sum(p.numel() for p in model.parameters())


def test_transformers_ties_t5_whatever_it_is_told() -> None:
    """Why a Shape of t5 is always tied."""
    shape = READERS[-1]
    model = _transformers_model(shape, tie_word_embeddings=False)
    assert count(shape).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", READERS)
def test_matrices_are_all_linear_layers_below_the_head(shape: Shape) -> None:
    torch = pytest.importorskip("torch")
    model = _transformers_model(shape)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    assert matrices(shape) == sum(m.weight.numel() for m in linear)
    small = sum(p.numel() for p in model.parameters()) - matrices(shape) - count(shape).embedding
    assert blocks(shape) + around(shape) - matrices(shape) == small


@pytest.mark.parametrize("shape", [TINY[0], *READERS])
def test_lora_counts_what_peft_adds(shape: Shape) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        _transformers_model(shape), peft.LoraConfig(r=4, target_modules="all-linear")
    )
    assert lora(shape, 4) == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def test_lora_counts_what_peft_would_add() -> None:
    """Rank 8 on the seven linears of Llama-3-8B: 20,971,520, the figure peft prints."""
    assert lora(PRESETS["llama3-8b"], 8) == 20_971_520


@pytest.mark.parametrize(
    "shape",
    [s for s in (*TINY[:4], *READERS) if s.arch != "t5"] + [PRESETS["bert-base"], PRESETS["modernbert-base"]],
)
def test_embedders_and_rerankers_are_counted_without_the_head_that_they_lost(shape: Shape) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = _transformers_model(shape).config
    config.num_labels = 1
    pooler = {"add_pooling_layer": False} if shape.arch == "bert" else {}
    with torch.device("meta"):
        body = transformers.AutoModel.from_config(config, **pooler)
        classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    assert bare(shape) == body.num_parameters()
    assert ranker(shape) == classifier.num_parameters()
