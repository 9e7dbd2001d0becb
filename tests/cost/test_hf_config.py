"""config.json against transformers on the meta device: every weight, difference 0."""

import os
from typing import Any

import pytest

from famc.cost import sums
from famc.cost.hf.config import MODEL_TYPES, anatomy
from famc.cost.hf.media import SUB
from famc.cost.hf.read import defaults

Config = dict[str, Any]

# --- small models, each with what is peculiar to its family -----------------------------------------------------

DENSE: Config = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MHA = DENSE | {"num_key_value_heads": 4}
GPT2: Config = {"vocab_size": 512, "n_positions": 128, "n_embd": 64, "n_layer": 3, "n_head": 4}
ENCODER: Config = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 128,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
}  # fmt: skip
EXPERTS: Config = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
MLA: Config = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32,
    "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
TOWER: Config = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
AUDIO: Config = {
    "d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96,
    "num_mel_bins": 16, "max_source_positions": 60,
}  # fmt: skip
WHISPER = AUDIO | {
    "vocab_size": 512, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 72,
    "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
QWEN2_VISION: Config = {
    "depth": 3, "embed_dim": 48, "hidden_size": 64, "mlp_ratio": 3, "num_heads": 4, "in_channels": 3,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN25_VISION: Config = {
    "depth": 4, "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "out_hidden_size": 64,
    "window_size": 56, "fullatt_block_indexes": [1, 3],
}  # fmt: skip
QWEN3_VISION: Config = {
    "depth": 4, "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "out_hidden_size": 64,
    "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2],
}  # fmt: skip

SMALL: list[tuple[str, str, Config]] = [
    ("apertus", "ApertusForCausalLM", DENSE),
    ("bert", "BertForMaskedLM", ENCODER),
    ("bert", "BertForMaskedLM", ENCODER | {"tie_word_embeddings": False}),
    ("bert", "BertForPreTraining", ENCODER),
    ("bert", "BertForSequenceClassification", ENCODER | {"id2label": {0: "a", 1: "b", 2: "c"}}),
    ("bert", "BertModel", ENCODER | {"type_vocab_size": 3}),
    ("bloom", "BloomForCausalLM", {"vocab_size": 512, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
    ("bloom", "BloomModel", {"vocab_size": 512, "n_embed": 64, "num_hidden_layers": 3, "num_attention_heads": 4}),
    ("clip", "CLIPModel", {"vision_config": TOWER, "text_config": ENCODER, "projection_dim": 32}),
    ("clip_text_model", "CLIPTextModel", ENCODER),
    ("clip_text_model", "CLIPTextModelWithProjection", ENCODER | {"projection_dim": 24}),
    ("clip_vision_model", "CLIPVisionModel", TOWER),
    ("clip_vision_model", "CLIPVisionModelWithProjection", TOWER | {"projection_dim": 24}),
    ("deepseek_v2", "DeepseekV2ForCausalLM", MLA | {"n_shared_experts": 2}),
    ("deepseek_v2", "DeepseekV2ForCausalLM", MLA | {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True}),
    ("deepseek_v2", "DeepseekV2ForCausalLM", MLA | {"first_k_dense_replace": 9}),
    ("deepseek_v3", "DeepseekV3ForCausalLM", MLA),
    ("deepseek_v3", "DeepseekV3ForCausalLM", MLA | {"q_lora_rank": None, "tie_word_embeddings": True}),
    ("falcon", "FalconForCausalLM", {**DENSE, "num_kv_heads": 2, "new_decoder_architecture": True}),
    ("falcon", "FalconForCausalLM", DENSE | {"num_ln_in_parallel_attn": 1, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", "FalconForCausalLM", DENSE | {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True}),
    ("falcon", "FalconForCausalLM", DENSE | {"ffn_hidden_size": 100, "tie_word_embeddings": False}),
    ("gemma", "GemmaForCausalLM", DENSE | {"head_dim": 24}),
    ("gemma2", "Gemma2ForCausalLM", DENSE | {"head_dim": 24}),
    ("gemma3", "Gemma3ForConditionalGeneration", {
        "text_config": DENSE | {"head_dim": 16}, "mm_tokens_per_image": 4,
        "vision_config": TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}}),
    ("gemma3", "Gemma3Model", {"text_config": DENSE, "vision_config": TOWER | {"model_type": "siglip_vision_model"}}),
    ("gemma3_text", "Gemma3ForCausalLM", DENSE | {"head_dim": 24}),
    ("gpt2", "GPT2LMHeadModel", GPT2),
    ("gpt2", "GPT2Model", GPT2 | {"n_inner": 100}),
    ("gpt2", "GPT2ForSequenceClassification", GPT2 | {"num_labels": 5, "pad_token_id": 0}),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", GPT2),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", GPT2 | {"multi_query": False}),
    ("gpt_neox", "GPTNeoXForCausalLM", DENSE),
    ("gpt_neox", "GPTNeoXForCausalLM", DENSE | {"attention_bias": False, "use_parallel_residual": False}),
    ("gpt_oss", "GptOssForCausalLM", DENSE | {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}),
    ("gptj", "GPTJForCausalLM", GPT2 | {"rotary_dim": 8}),
    ("granite", "GraniteForCausalLM", DENSE | {"mlp_bias": True}),
    ("llama", "LlamaForCausalLM", DENSE),
    ("llama", "LlamaForCausalLM", DENSE | {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", "LlamaForSequenceClassification", DENSE | {"id2label": {0: "only"}, "num_key_value_heads": None}),
    ("llama", "LlamaModel", DENSE),
    ("llava", "LlavaForConditionalGeneration", {
        "text_config": DENSE | {"model_type": "llama"}, "vision_config": TOWER | {"model_type": "clip_vision_model"}}),
    ("llava", "LlavaForConditionalGeneration", {
        "text_config": DENSE | {"model_type": "qwen2", "tie_word_embeddings": True}, "multimodal_projector_bias": False,
        "vision_config": TOWER | {"model_type": "siglip_vision_model"}, "vision_feature_layer": [-2, -1]}),
    ("llava", "LlavaModel", {"text_config": DENSE | {"model_type": "mistral"}, "vision_config": None}),
    ("llava_next", "LlavaNextForConditionalGeneration", {
        "text_config": DENSE | {"model_type": "mistral"}, "vision_config": TOWER | {"model_type": "clip_vision_model"}}),
    ("llava_onevision", "LlavaOnevisionForConditionalGeneration", {
        "text_config": DENSE | {"model_type": "qwen2", "tie_word_embeddings": True}, "vision_config": None}),
    ("mistral", "MistralForCausalLM", DENSE | {"head_dim": 24}),
    ("mixtral", "MixtralForCausalLM", DENSE | {"num_local_experts": 4}),
    ("modernbert", "ModernBertForMaskedLM", ENCODER),
    ("modernbert", "ModernBertForMaskedLM", ENCODER | {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}),
    ("modernbert", "ModernBertForMaskedLM", ENCODER | {"tie_word_embeddings": False, "decoder_bias": False, "global_attn_every_n_layers": 2}),
    ("modernbert", "ModernBertForMaskedLM", ENCODER | {"tie_word_embeddings": False}),
    ("modernbert", "ModernBertForSequenceClassification", ENCODER | {"num_labels": 1}),
    ("modernbert", "ModernBertModel", ENCODER),
    ("mpt", "MptForCausalLM", {"vocab_size": 512, "d_model": 64, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2}),
    ("nemotron", "NemotronForCausalLM", DENSE),
    ("olmo", "OlmoForCausalLM", DENSE),
    ("olmo2", "Olmo2ForCausalLM", DENSE),
    ("olmo3", "Olmo3ForCausalLM", DENSE | {"num_hidden_layers": 5}),
    ("olmoe", "OlmoeForCausalLM", MHA | {"num_experts": 8, "num_experts_per_tok": 2}),
    ("opt", "OPTForCausalLM", {**DENSE, "ffn_dim": 80, "max_position_embeddings": 64}),
    ("opt", "OPTForCausalLM", {**DENSE, "ffn_dim": 80, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("opt", "OPTForCausalLM", {**DENSE, "ffn_dim": 80, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("paligemma", "PaliGemmaForConditionalGeneration", {
        "text_config": DENSE | {"model_type": "gemma", "head_dim": 16}, "projection_dim": 64,
        "vision_config": TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}}),
    ("phi", "PhiForCausalLM", DENSE),
    ("phi", "PhiForCausalLM", DENSE | {"qk_layernorm": True}),
    ("phi3", "Phi3ForCausalLM", DENSE | {"pad_token_id": 0}),
    ("qwen2", "Qwen2ForCausalLM", DENSE),
    ("qwen2", "Qwen2ForCausalLM", DENSE | {"head_dim": 24, "tie_word_embeddings": True}),
    ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", {
        "text_config": DENSE | {"tie_word_embeddings": True}, "vision_config": QWEN25_VISION}),
    ("qwen2_5_vl_text", "Qwen2_5_VLTextModel", DENSE),
    ("qwen2_audio", "Qwen2AudioForConditionalGeneration", {"text_config": DENSE, "audio_config": AUDIO}),
    ("qwen2_audio_encoder", "Qwen2AudioEncoder", AUDIO),
    ("qwen2_moe", "Qwen2MoeForCausalLM", DENSE | EXPERTS | {"shared_expert_intermediate_size": 72}),
    ("qwen2_moe", "Qwen2MoeForCausalLM", DENSE | EXPERTS | {"mlp_only_layers": [1], "qkv_bias": False}),
    ("qwen2_vl", "Qwen2VLForConditionalGeneration", {"text_config": DENSE, "vision_config": QWEN2_VISION}),
    ("qwen2_vl", "Qwen2VLForConditionalGeneration", DENSE | {"tie_word_embeddings": True, "vision_config": QWEN2_VISION}),
    ("qwen2_vl_text", "Qwen2VLTextModel", DENSE),
    ("qwen3", "Qwen3ForCausalLM", DENSE | {"head_dim": 24, "attention_bias": True}),
    ("qwen3", "Qwen3ForSequenceClassification", DENSE),
    ("qwen3_moe", "Qwen3MoeForCausalLM", DENSE | EXPERTS | {"head_dim": 24}),
    ("qwen3_moe", "Qwen3MoeForCausalLM", DENSE | EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ("qwen3_vl", "Qwen3VLForConditionalGeneration", {
        "text_config": DENSE | {"head_dim": 16}, "vision_config": QWEN3_VISION, "tie_word_embeddings": True}),
    ("qwen3_vl", "Qwen3VLModel", {
        "text_config": DENSE, "vision_config": QWEN3_VISION | {"deepstack_visual_indexes": []}}),
    ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", {
        "text_config": DENSE | EXPERTS, "vision_config": QWEN3_VISION}),
    ("qwen3_vl_moe_text", "Qwen3VLMoeTextModel", DENSE | EXPERTS),
    ("qwen3_vl_text", "Qwen3VLTextModel", DENSE),
    ("roberta", "RobertaForMaskedLM", ENCODER),
    ("roberta", "RobertaForSequenceClassification", ENCODER | {"num_labels": 3}),
    ("roberta", "RobertaModel", ENCODER),
    ("siglip", "SiglipModel", {"vision_config": TOWER, "text_config": ENCODER}),
    ("siglip_text_model", "SiglipTextModel", ENCODER | {"projection_size": 24}),
    ("siglip_vision_model", "SiglipVisionModel", TOWER),
    ("siglip_vision_model", "SiglipVisionModel", TOWER | {"vision_use_head": False, "image_size": 70}),
    ("smollm3", "SmolLM3ForCausalLM", DENSE | {"pad_token_id": 0}),
    ("starcoder2", "Starcoder2ForCausalLM", DENSE),
    ("starcoder2", "Starcoder2ForCausalLM", DENSE | {"use_bias": False, "tie_word_embeddings": False}),
    ("t5", "T5ForConditionalGeneration", {"vocab_size": 512, "d_model": 64, "d_ff": 96, "num_heads": 4, "num_decoder_layers": 2}),
    ("t5", "T5EncoderModel", {"vocab_size": 512, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 16}),
    ("t5", "T5Model", {"vocab_size": 512, "d_kv": 24, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("vit", "ViTForImageClassification", TOWER | {"id2label": {i: str(i) for i in range(10)}}),
    ("vit", "ViTModel", TOWER | {"qkv_bias": False, "pooler_output_size": 32, "image_size": [56, 70]}),
    ("whisper", "WhisperForConditionalGeneration", WHISPER),
    ("whisper", "WhisperForConditionalGeneration", WHISPER | {"tie_word_embeddings": False}),
    ("whisper", "WhisperModel", WHISPER),
    ("xlm-roberta", "XLMRobertaForMaskedLM", ENCODER),
]  # fmt: skip


def _built(model_type: str, architecture: str, rest: Config) -> Any:
    """transformers' model on the meta device: no memory, every weight."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **rest)
    with torch.device("meta"):
        return getattr(transformers, architecture)._from_config(config)


def _config(model_type: str, architecture: str, rest: Config) -> Config:
    return {"model_type": model_type, "architectures": [architecture], **rest}


@pytest.mark.parametrize("case", SMALL, ids=[f"{i}-{c[1]}" for i, c in enumerate(SMALL)])
def test_small_models_have_every_weight_that_transformers_builds(case: tuple[str, str, Config]) -> None:
    made = anatomy(_config(*case))
    assert sums.parameters(made) == sum(p.numel() for p in _built(*case).parameters())
    assert sum(n for _, n in made.parts) == sums.parameters(made)


def test_each_model_type_is_compared() -> None:
    assert {c[0] for c in SMALL} == set(MODEL_TYPES)


# --- published sizes ------------------------------------------------------------------------------------------

# What the hub's config.json of each model says, as far as weights depend on it, and the number of weights that its
# safetensors files hold.
PUBLISHED: dict[str, tuple[int, str, str, Config]] = {
    "Qwen/Qwen2.5-7B": (7_615_616_512, "qwen2", "Qwen2ForCausalLM", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "use_sliding_window": False, "sliding_window": 131072}),
    "Qwen/Qwen1.5-MoE-A2.7B": (14_315_784_192, "qwen2_moe", "Qwen2MoeForCausalLM", {}),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, "qwen3_moe", "Qwen3MoeForCausalLM", {
        "num_hidden_layers": 48, "head_dim": 128}),
    "meta-llama/Llama-2-7b-hf": (6_738_415_616, "llama", "LlamaForCausalLM", {}),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, "mixtral", "MixtralForCausalLM", {}),
    "google/gemma-2-2b": (2_614_341_888, "gemma2", "Gemma2ForCausalLM", {}),
    "google/gemma-3-1b-pt": (999_885_952, "gemma3_text", "Gemma3ForCausalLM", {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
        "num_key_value_heads": 1, "sliding_window": 512}),
    "google/gemma-3-4b-pt": (4_300_079_472, "gemma3", "Gemma3ForConditionalGeneration", {
        "mm_tokens_per_image": 256,
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                        "model_type": "gemma3_text", "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                          "model_type": "siglip_vision_model", "num_attention_heads": 16,
                          "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}}),
    "openai-community/gpt2-xl": (1_557_611_200, "gpt2", "GPT2LMHeadModel", {
        "n_embd": 1600, "n_head": 25, "n_layer": 48}),
    "EleutherAI/gpt-neox-20b": (20_554_567_680, "gpt_neox", "GPTNeoXForCausalLM", {}),
    "bigscience/bloom-560m": (559_214_592, "bloom", "BloomForCausalLM", {
        "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16}),
    "facebook/opt-350m": (331_196_416, "opt", "OPTForCausalLM", {
        "hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "word_embed_proj_dim": 512, "do_layer_norm_before": False}),
    "mosaicml/mpt-7b": (6_649_286_656, "mpt", "MptForCausalLM", {
        "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432}),
    "tiiuae/falcon-7b": (6_921_720_704, "falcon", "FalconForCausalLM", {}),
    "tiiuae/falcon-40b": (41_303_293_952, "falcon", "FalconForCausalLM", {
        "hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8,
        "new_decoder_architecture": True}),
    "microsoft/phi-2": (2_779_683_840, "phi", "PhiForCausalLM", {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}),
    "microsoft/Phi-3-mini-4k-instruct": (3_821_079_552, "phi3", "Phi3ForCausalLM", {"pad_token_id": 0}),
    "allenai/OLMoE-1B-7B-0924": (6_919_161_856, "olmoe", "OlmoeForCausalLM", {"intermediate_size": 1024}),
    "bigcode/starcoder2-3b": (3_030_371_328, "starcoder2", "Starcoder2ForCausalLM", {}),
    "openai/gpt-oss-20b": (20_914_757_184, "gpt_oss", "GptOssForCausalLM", {
        "num_hidden_layers": 24, "num_local_experts": 32}),
    "deepseek-ai/DeepSeek-V2-Lite": (15_706_484_224, "deepseek_v2", "DeepseekV2ForCausalLM", {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_attention_heads": 16,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy"}),
    "google-t5/t5-base": (222_903_552, "t5", "T5ForConditionalGeneration", {
        "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "FacebookAI/roberta-base": (124_697_433, "roberta", "RobertaForMaskedLM", {
        "max_position_embeddings": 514, "type_vocab_size": 1}),
    "google/vit-base-patch16-224": (86_567_656, "vit", "ViTForImageClassification", {
        "id2label": {str(i): str(i) for i in range(1000)}}),
    "openai/clip-vit-large-patch14": (427_616_513, "clip", "CLIPModel", {
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                          "num_hidden_layers": 24, "patch_size": 14}}),
    "google/siglip-so400m-patch14-384, vision": (428_225_600, "siglip_vision_model", "SiglipVisionModel", {
        "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "num_attention_heads": 16,
        "num_hidden_layers": 27, "patch_size": 14}),
    "openai/whisper-large-v3": (1_543_490_560, "whisper", "WhisperForConditionalGeneration", {
        "d_model": 1280, "decoder_attention_heads": 20, "decoder_ffn_dim": 5120, "decoder_layers": 32,
        "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "encoder_layers": 32, "num_mel_bins": 128,
        "vocab_size": 51866}),
    "llava-hf/llava-1.5-7b-hf": (7_063_427_072, "llava", "LlavaForConditionalGeneration", {
        "text_config": {"model_type": "llama", "vocab_size": 32064},
        "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                          "model_type": "clip_vision_model", "num_attention_heads": 16,
                          "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}}),
    "Qwen/Qwen2-VL-2B-Instruct": (2_208_985_600, "qwen2_vl", "Qwen2VLForConditionalGeneration", {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 28,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936,
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16}}),
    "Qwen/Qwen2.5-VL-7B-Instruct": (8_292_166_656, "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}}),
    "Qwen/Qwen2-Audio-7B-Instruct": (8_397_094_912, "qwen2_audio", "Qwen2AudioForConditionalGeneration", {
        "text_config": {"model_type": "qwen2", "intermediate_size": 11008, "vocab_size": 156032},
        "audio_config": {"model_type": "qwen2_audio_encoder"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_have_the_weights_that_their_files_hold(name: str) -> None:
    count, *case = PUBLISHED[name]
    assert sums.parameters(anatomy(_config(*case))) == count  # type: ignore[arg-type]


# The outermost and the deepest of the published ones, built whole.
BUILT = (
    "deepseek-ai/DeepSeek-V2-Lite",
    "google/gemma-3-4b-pt",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen2.5-VL-7B-Instruct",
)


@pytest.mark.parametrize("name", BUILT)
def test_published_sizes_have_every_weight_that_transformers_builds(name: str) -> None:
    _, *case = PUBLISHED[name]
    built = _built(*case)  # type: ignore[arg-type]
    assert sums.parameters(anatomy(_config(*case))) == sum(p.numel() for p in built.parameters())  # type: ignore[arg-type]


# --- what a file leaves out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(defaults()))
def test_defaults_are_those_of_transformers_config_class(model_type: str) -> None:
    pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = CONFIG_MAPPING[model_type].__dataclass_fields__
    theirs = {key: fields[key].default for key in defaults()[model_type]}
    assert defaults()[model_type] == {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}


@pytest.mark.parametrize("model_type", sorted(SUB))
def test_parts_that_a_composition_leaves_out_are_those_of_transformers(model_type: str) -> None:
    pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for part, spec in CONFIG_MAPPING[model_type].sub_configs_defaults.items():
        kind, values = SUB[model_type][part]
        assert kind == spec.model_type
        ours, theirs = defaults()[kind] | dict(values), _defaults_of(spec) | spec.init_kwargs
        assert ours == {key: theirs[key] for key in ours}


def _defaults_of(spec: Any) -> Config:
    return {k: f.default for k, f in spec.get_config_class(spec.model_type).__dataclass_fields__.items()}


@pytest.mark.parametrize(
    "case",
    [
        ("falcon", "FalconForCausalLM"),
        ("whisper", "WhisperModel"),
        ("llava", "LlavaModel"),
        ("modernbert", "ModernBertModel"),
        ("qwen3", "Qwen3Model"),
    ],
)
def test_an_empty_config_is_the_default_model(case: tuple[str, str]) -> None:
    assert sums.parameters(anatomy(_config(*case, {}))) == sum(
        p.numel() for p in _built(*case, {}).parameters()
    )


def test_an_encoder_alone_has_the_weights_that_it_has_in_whisper() -> None:
    built = _built("whisper", "WhisperModel", WHISPER).encoder
    alone = anatomy(_config("whisper", "WhisperEncoder", WHISPER))
    assert sums.parameters(alone) == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in SMALL
        if c[1] in ("GPT2LMHeadModel", "FalconForCausalLM", "Phi3ForCausalLM", "ModernBertForMaskedLM")
        or c[1] in ("WhisperForConditionalGeneration", "Qwen2VLForConditionalGeneration", "OPTForCausalLM")
    ],
    ids=lambda c: str(c[1]),
)
def test_adapters_are_those_that_peft_adds(case: tuple[str, str, Config]) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(_built(*case), peft.LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert sums.adapters(anatomy(_config(*case)), 4) == trained
