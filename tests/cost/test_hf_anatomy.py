"""What a config.json means for time and memory: windows, experts, latents, images; and configs that can't be counted."""

import subprocess
import sys
from typing import Any

import pytest

from famc.cost import sums
from famc.cost.hf.config import anatomy
from famc.cost.models import known

Config = dict[str, Any]


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gemma2", {}), ("gemma3_text", {"num_hidden_layers": 13}), ("gpt_oss", {}), ("olmo3", {}), ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7}),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 2}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 8}),
        ("modernbert", {"num_hidden_layers": 8}),
        ("modernbert", {"num_hidden_layers": 8, "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 3}),
    ],
)  # fmt: skip
def test_as_many_layers_have_a_window_as_in_transformers(model_type: str, more: Config) -> None:
    """By the `layer_types` that its config class works out."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type, **more)
    made = anatomy({"model_type": model_type, **more})
    windowed = sum(s.layers for s in made.stacks if s.block.attentions[0].window is not None)
    assert windowed == theirs.layer_types.count("sliding_attention")


def test_a_window_is_as_wide_as_the_config_says() -> None:
    """Mistral v0.1 in all layers, v0.2 none; ModernBERT 64 tokens to each side and the token itself."""
    one = anatomy({"model_type": "mistral"}).stacks
    assert [(s.layers, s.block.attentions[0].window) for s in one] == [(32, 4096)]
    two = anatomy({"model_type": "mistral", "sliding_window": None}).stacks
    assert [(s.layers, s.block.attentions[0].window) for s in two] == [(32, None)]
    assert {s.block.attentions[0].window for s in anatomy({"model_type": "modernbert"}).stacks} == {None, 129}


# --- experts, latents, media ----------------------------------------------------------------------------------

V3: Config = {"model_type": "deepseek_v3"}


def test_the_cache_of_deepseek_v3_is_that_of_its_paper() -> None:
    """70.272 KB a token; Qwen2.5-72B 327.680, Llama-3.1-405B 516.096 (arXiv:2505.09343, table 1)."""
    dense = {"head_dim": 128, "num_key_value_heads": 8}
    qwen = {
        "model_type": "qwen2",
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "hidden_size": 8192,
        **dense,
    }
    llama = {
        "model_type": "llama",
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "hidden_size": 16384,
        **dense,
    }
    assert [sums.kv_bytes(anatomy(c), 1) for c in (V3, qwen, llama)] == [70_272, 327_680, 516_096]


def test_deepseek_v3_activates_37_of_671_billion() -> None:
    """Its abstract (arXiv:2412.19437); first three layers dense, 256 experts of which 8, one shared."""
    made = anatomy(V3)
    assert sums.parameters(made) == pytest.approx(671e9, rel=1e-3)
    assert sums.active(made) == pytest.approx(37e9, rel=0.02)
    dense, sparse = made.stacks
    assert (dense.layers, sparse.layers) == (3, 58)
    found = {x.name: (x.copies, x.active, x.split) for x in sparse.block.linears}
    assert found["up"] == (256, 8, "column")
    assert found["down"] == (256, 8, "row")
    assert found["shared_up"] == (1, 1, "column")
    assert found["router"] == (1, 1, "none")


def test_latents_stand_whole_on_each_rank_and_heads_are_divided() -> None:
    """Split on tensor parallelism; queries and keys of 128 + 64, values of 128."""
    block = anatomy(V3).stacks[0].block
    split = {x.name: x.split for x in block.linears[:5]}
    assert split == {"q_a": "none", "q_b": "column", "kv_a": "none", "kv_b": "column", "o": "row"}
    core = block.attentions[0]
    assert (core.qk_dim, core.v_dim, core.heads, core.cached) == (192, 128, 128, 576)


def test_training_flops_a_token_are_those_that_deepseek_counts() -> None:
    """250 and 155 GFLOPs for V3 and V2, 2,448 for Llama-3.1-405B, in sequences of 4,096 (arXiv:2505.09343, table 2)."""
    found = [
        3e-9 * sums.forward_flops(known(key), 1, 4096)
        for key in ("deepseek-v3", "deepseek-v2", "llama3.1-405b")
    ]
    assert found[:2] == pytest.approx([250, 155], rel=0.003)
    assert found[2] == pytest.approx(2448, rel=0.015)


def test_vit_base_takes_17_6_billion_multiply_adds_an_image() -> None:
    """17.56 G by torchvision's table of vit_b_16, which counts a multiply-add once."""
    made = anatomy({"model_type": "vit", "architectures": ["ViTForImageClassification"]})
    assert sums.forward_flops(made, 197, 197) == pytest.approx(2 * 17.56e9, rel=0.005)


def test_a_tower_reads_the_images_that_a_sequence_has() -> None:
    """LLaVA-1.5: 577 tokens of a 336-pixel image in CLIP, 576 in the projector, in a sequence of 1024."""
    made = anatomy({"model_type": "llava"})
    assert {s.share for s in made.stacks if s.part != "text"} == {0.0}
    one = sums.with_media(made, 1024, {"vision": 1})
    tower = max((s for s in one.stacks if s.part == "vision"), key=lambda s: s.layers)
    projector = next(s for s in one.stacks if s.part == "projector")
    assert (tower.layers, tower.length, tower.share) == (24, 577, 577 / 1024)
    assert (projector.length, projector.share) == (576, 576 / 1024)
    assert [part for part, _ in made.parts] == ["vision", "projector", "text"]


@pytest.mark.parametrize(("image", "patches"), [(None, 1024), (224, 256), (230, 256), (112, 64)])
def test_qwen_vl_reads_images_of_the_size_that_is_asked(image: int | None, patches: int) -> None:
    """Squares of 2 x 2 patches of 14 pixels are a token each: 448 pixels a side are 32 x 32 patches, 256 tokens."""
    made = anatomy({"model_type": "qwen2_vl"}, image=image)
    assert {s.length for s in made.stacks if s.part == "vision"} == {patches}
    assert {s.length for s in made.stacks if s.part == "projector"} == {patches // 4}


def test_qwen25_vl_looks_through_windows_but_for_four_blocks() -> None:
    """112 pixels a side are 8 x 8 patches."""
    stacks = [
        s for s in anatomy({"model_type": "qwen2_5_vl"}).stacks if s.part == "vision" and s.block.attentions
    ]
    assert {(s.layers, s.block.attentions[0].window) for s in stacks} == {(28, 64), (4, None)}


def test_whisper_writes_while_its_decoder_looks_at_1500_frames() -> None:
    made = anatomy({"model_type": "whisper"})
    decoder = made.stacks[-1]
    assert (decoder.part, decoder.share, decoder.source_length) == ("decoder", 1.0, 1500)
    assert decoder.source == pytest.approx(1500 / 448)
    assert sums.kv_bytes(made, 448, source=1500) == 4 * 2 * 384 * 2 * (448 + 1500)
    alone = anatomy({"model_type": "whisper", "architectures": ["WhisperEncoder"]})
    assert sums.parameters(alone) == dict(made.parts)["encoder"]
    assert {s.share for s in alone.stacks} == {1.0, 2.0}  # the first convolution reads 3000 frames


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no model_type"),
        ({"model_type": "qwen4_exp"}, "model_type qwen4_exp: .*did you mean qwen.*It counts apertus, bert"),
        ({"model_type": "rwkv"}, "model_type rwkv: famc doesn't count it"),
        ({"model_type": "llama", "hidden_size": "big"}, "llama: hidden_size is 'big': .*whole number"),
        ({"model_type": "llama", "hidden_size": 0}, "hidden_size is 0: .*at least 1"),
        ({"model_type": "llama", "num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "32 heads cannot share 5 key/value heads"),
        ({"model_type": "llama", "attention_bias": 1}, "attention_bias is 1: it must be true or false"),
        ({"model_type": "llama", "architectures": ["LlamaForQuestionAnswering"]}, "LlamaForQuestionAnswering: it counts .*ForCausalLM"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types names 1 of 26 layers"),
        ({"model_type": "olmo3", "layer_types": ["linear_attention"] * 32}, "layer_types has linear_attention"),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 200}, "200 active experts of 128"),
        ({"model_type": "deepseek_v2"}, "deepseek_v2: num_experts_per_tok is None"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder"),
        ({"model_type": "llava", "vision_config": {"model_type": "vit"}}, "llava: famc doesn't count vit as its vision_config"),
        ({"model_type": "llava", "text_config": {"model_type": "t5"}}, "llava: famc doesn't count t5 as its text_config"),
        ({"model_type": "llava", "text_config": []}, "text_config is .*it must be a mapping"),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_named(config: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anatomy(config)


def test_an_image_size_for_a_model_of_one_size_and_one_without_patches_are_errors() -> None:
    with pytest.raises(ValueError, match="llava takes no images of any size"):
        anatomy({"model_type": "llava"}, image=224)
    with pytest.raises(ValueError, match="an image of 20 pixels a side holds no 2 x 2 patches"):
        anatomy({"model_type": "qwen2_vl"}, image=20)


def test_reading_a_config_loads_no_heavy_module() -> None:
    program = (
        "import sys; from famc.cost.hf.config import anatomy; from famc.cost.models import known;"
        "anatomy({'model_type': 'qwen2_5_vl'}); known('llama3-8b');"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
