"""GGUF files hold what the model folder holds; llama.cpp (slow) reads them as transformers reads the folder.

The slow tests import llama_cpp without asking whether it is there: .ci/llama-cpp.sh installs it.
"""

from __future__ import annotations

import json
import random
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tiny_artifacts import content
from tiny_model import CHATML, CONVERSATION, SPECIAL, TEXTS, make_tiny_model, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed

from famc.errors import StepFailed
from famc.steps.others import CHATML as FAMILY_CHATML
from famc.steps.others import SPECIAL_TOKENS
from famc.work import compare as compare_module
from famc.work import gguf_source, gguf_vocabulary
from famc.work.compare import TorchDecoder, compare, compare_logits
from famc.work.gguf_build import build_gguf, tensor_errors
from famc.work.gguf_file import Stored, stored_tensors
from famc.work.gguf_source import QUANTS
from famc.work.gguf_vocabulary import PRE_TOKENIZERS, pre_tokenizer_name, without_generation_marks
from famc.work.ollama import is_chatml, modelfile
from famc.work.tokenizer import ODD, SPLIT

RULES = {name: rule for rule, name in PRE_TOKENIZERS.items()}
MULTILINGUAL = (
    *(unicodedata.normalize("NFC", text) for text in ODD),
    *TEXTS,
    "Привет, как дела? 12345 ½ ² Ⅷ", "नमस्ते दुनिया १२३", "مرحبا بالعالم ١٢٣", "Tiếng Việt có dấu",
    "can't CAN'T 'S 'LL we’ll they'Ve", "x = {'a': [1, 22, 333, 4444]}  # ¡olé!\n\n\n\tpass\r\n",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights, by architecture."""
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3": make_tiny_model(root / "qwen3", vocab_size=400),
        "llama": make_tiny_model(root / "llama", "llama", tied=False),
    }


def family_tokenizer(
    texts: Any = TEXTS, *, rule: str = "qwen2", vocab: int = 400, across: bool = False
) -> PreTrainedTokenizerFast:
    """As famc trains one, with another splitting rule if asked. `across`: its merges were learnt without
    splitting, so that every place where two implementations split differently shows in the ids."""
    regex, ignore_merges = RULES[rule]
    level = pre_tokenizers.ByteLevel
    steps = {
        gguf_vocabulary._GPT2: [level(add_prefix_space=False)],
        gguf_vocabulary._DIGITS: [
            pre_tokenizers.Digits(individual_digits=True),
            level(add_prefix_space=False),
        ],
    }.get(
        regex,
        [pre_tokenizers.Split(Regex(regex), "isolated"), level(add_prefix_space=False, use_regex=False)],
    )
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    split = pre_tokenizers.Sequence(steps)
    tokenizer.pre_tokenizer = level(add_prefix_space=False, use_regex=False) if across else split
    trainer = BpeTrainer(vocab_size=vocab, initial_alphabet=level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = split
    for name in SPECIAL_TOKENS:
        token = AddedToken(name, special=name.startswith("<|"), normalized=False)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = FAMILY_CHATML
    return fast


def with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, **shape: Any) -> Path:
    """A model of random weights for a tokenizer."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    make_tiny_model(folder, vocab_size=len(tokenizer) + 6, **ids, **shape)
    tokenizer.save_pretrained(folder)
    return folder


def field(reader: GGUFReader, name: str) -> Any:
    found = reader.get_field(name)
    return None if found is None else found.contents()


def tensors(path: Path) -> dict[str, tuple[Type, np.ndarray[Any, Any]]]:
    return {
        t.name: (t.tensor_type, gguf.quants.dequantize(t.data, t.tensor_type))
        for t in GGUFReader(path).tensors
    }


# --- what is in the file --------------------------------------------------------------------------------------


def test_weights_are_the_sources(folders: dict[str, Path], tmp_path: Path) -> None:
    facts = build_gguf(folders["qwen3"], tmp_path / "m.gguf", "f32", name="tiny")
    source = {k: v.numpy() for k, v in load_file(folders["qwen3"] / "model.safetensors").items()}
    made = tensors(tmp_path / "m.gguf")
    assert "output.weight" not in made  # tied: llama.cpp reads the embedding
    assert len(made) == len(source) == facts["tensors"]
    assert facts["parameters"] == sum(v.size for v in source.values())
    for ours, theirs in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.1.attn_k_norm.weight": "model.layers.1.self_attn.k_norm.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }.items():
        assert np.array_equal(made[ours][1], source[theirs]), ours


def test_llamas_rows_are_permuted_and_its_head_is_there(folders: dict[str, Path], tmp_path: Path) -> None:
    build_gguf(folders["llama"], tmp_path / "m.gguf", "f32", name="tiny")
    source = {k: v.numpy() for k, v in load_file(folders["llama"] / "model.safetensors").items()}
    made = tensors(tmp_path / "m.gguf")
    assert np.array_equal(made["output.weight"][1], source["lm_head.weight"])
    for ours, theirs, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        rows = made[f"blk.0.{ours}.weight"][1]
        wanted = source[f"model.layers.0.self_attn.{theirs}.weight"]
        assert not np.array_equal(rows, wanted)
        back = rows.reshape(heads, 8, 2, 64).swapaxes(1, 2).reshape(wanted.shape)
        assert np.array_equal(back, wanted)
    assert np.array_equal(made["blk.0.attn_v.weight"][1], source["model.layers.0.self_attn.v_proj.weight"])


def test_metadata(folders: dict[str, Path], tmp_path: Path) -> None:
    facts = build_gguf(folders["qwen3"], tmp_path / "m.gguf", "q8_0", name="tiny one")
    reader = GGUFReader(tmp_path / "m.gguf")
    wanted = {
        "general.architecture": "qwen3", "general.name": "tiny one", "general.file_type": 7,
        "general.quantization_version": 2, "general.alignment": 32, "qwen3.context_length": 256,
        "qwen3.embedding_length": 64, "qwen3.block_count": 2, "qwen3.feed_forward_length": 128,
        "qwen3.attention.head_count": 4, "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32, "qwen3.vocab_size": 400,
        "qwen3.rope.freq_base": 1e6, "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False, "qwen3.rope.scaling.type": None,
    }  # fmt: skip
    assert {name: field(reader, name) for name in wanted} == wanted
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    tokenizer = tiny_tokenizer()
    assert tokens[:384] == tokenizer.convert_ids_to_tokens(list(range(384)))
    assert tokens[384:] == [f"[PAD{i}]" for i in range(384, 400)]
    assert types == [3] * 3 + [1] * 381 + [5] * 16
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert (facts["tokenizer_pre"], facts["tensors_q8_0"], facts["tensors_f32"]) == ("gpt-2", 15, 9)
    assert (facts["file"], facts["bytes"]) == ("m.gguf", (tmp_path / "m.gguf").stat().st_size)


def test_the_familys_tokenizer(tmp_path: Path) -> None:
    tokenizer = family_tokenizer()
    model = with_tokenizer(tmp_path / "model", tokenizer)
    assert build_gguf(model, tmp_path / "m.gguf", "f16", name="x")["tokenizer_pre"] == "qwen2"
    reader = GGUFReader(tmp_path / "m.gguf")
    types = field(reader, "tokenizer.ggml.token_type")
    for name in SPECIAL_TOKENS:
        assert types[tokenizer.convert_tokens_to_ids(name)] == (3 if name.startswith("<|") else 4), name
    assert field(reader, "tokenizer.ggml.bos_token_id") == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_ends_of_text(folders: dict[str, Path], tmp_path: Path) -> None:
    """What generation_config.json ends at, the file ends at."""
    model = copy(folders["qwen3"], tmp_path / "model")
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 0, 17]}))
    build_gguf(model, tmp_path / "m.gguf", "f16", name="x")
    assert field(GGUFReader(tmp_path / "m.gguf"), "tokenizer.ggml.eom_token_id") == 17  # 0 by its name
    path.write_text(json.dumps({"eos_token_id": [2, 17, 18]}))
    with pytest.raises(ValueError, match="can't end a text at all of"):
        build_gguf(model, tmp_path / "m.gguf", "f16", name="x")


def test_a_bos_that_the_tokenizer_adds(folders: dict[str, Path], tmp_path: Path) -> None:
    model = copy(folders["qwen3"], tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair=None, special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save_pretrained(model)
    build_gguf(model, tmp_path / "m.gguf", "f16", name="x")
    reader = GGUFReader(tmp_path / "m.gguf")
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    assert field(reader, "tokenizer.ggml.bos_token_id") == 1
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A", pair=None, special_tokens=[("<|im_end|>", 2)]
    )
    tokenizer.save_pretrained(model)
    with pytest.raises(ValueError, match="before a text"):
        build_gguf(model, tmp_path / "m.gguf", "f16", name="x")


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0"])
def test_types_and_errors(folders: dict[str, Path], tmp_path: Path, quant: str) -> None:
    build_gguf(folders["llama"], tmp_path / "m.gguf", quant, name="x")
    kind = QUANTS[quant].types[0]
    made = tensors(tmp_path / "m.gguf")
    assert {name: k for name, (k, v) in made.items() if k != (kind if v.ndim > 1 else Type.F32)} == {}
    errors = tensor_errors(tmp_path / "m.gguf", folders["llama"])
    assert set(errors) == set(made)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    # bits of precision: f16 11, bf16 8; q8_0 has 254 steps over a block's range
    low, high = {"f16": (1e-8, 1e-7), "bf16": (5e-7, 5e-6), "q8_0": (5e-6, 1e-4)}[quant]
    assert all(low < e < high for name, e in errors.items() if "norm" not in name)
    assert all(e == 0 for name, e in errors.items() if "norm" in name)


def test_bf16_weights_survive_bf16_untouched(folders: dict[str, Path], tmp_path: Path) -> None:
    model = copy(folders["llama"], tmp_path / "model")
    weights = {k: v.bfloat16() for k, v in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    build_gguf(model, tmp_path / "m.gguf", "bf16", name="x")
    assert max(tensor_errors(tmp_path / "m.gguf", model).values()) == 0


def test_rows_that_do_not_divide_into_blocks(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", hidden_size=48, intermediate_size=80)
    facts = build_gguf(model, tmp_path / "m.gguf", "q8_0", name="x")
    # attn_output reads 128 of the heads, all else 48 or 80
    assert (facts["tensors_q8_0"], facts["tensors_f16"], facts["fallback"]) == (2, 13, 13)


def test_shards_chunks_and_threads_change_no_byte(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    build_gguf(folders["llama"], tmp_path / "a.gguf", "q8_0", name="x", progress=lambda *at: seen.append(at))
    assert seen == [(i + 1, 21) for i in range(21)]
    model = copy(folders["llama"], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {name: f"{i % 3}.safetensors" for i, name in enumerate(sorted(weights))}
    for shard in set(index.values()):
        save_file({n: w for n, w in weights.items() if index[n] == shard}, model / shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    monkeypatch.setattr(gguf_source, "CHUNK", 640)
    build_gguf(model, tmp_path / "b.gguf", "q8_0", name="x", threads=2)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_header_is_read_as_gguf_reads_it(folders: dict[str, Path], tmp_path: Path) -> None:
    build_gguf(folders["llama"], tmp_path / "m.gguf", "q8_0", name="x")
    theirs = GGUFReader(tmp_path / "m.gguf").tensors
    assert stored_tensors(tmp_path / "m.gguf") == [
        Stored(t.name, t.tensor_type, tuple(int(n) for n in t.shape)[::-1], int(t.data_offset))
        for t in theirs
    ]
    assert all(int(t.data_offset) % 32 == 0 for t in theirs)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_transformers_reads_the_file(tmp_path: Path, kind: Any) -> None:
    """A second reader. Its Qwen3 knows a head_dim of 128 only: it ignores key_length."""
    model = make_tiny_model(tmp_path, kind, **({"head_dim": 128} if kind == "qwen3" else {}))
    build_gguf(model, tmp_path / "m.gguf", "f32", name="x")
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        (tmp_path / "model.safetensors").unlink()
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        assert torch.equal(read(ids).logits, wanted)


# --- refusals -------------------------------------------------------------------------------------------------


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "knows LlamaForCausalLM, Qwen3ForCausalLM"),
        ({"is_causal": False}, "is_causal"),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2}, "sliding"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE of type dynamic"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "YaRN",
        ),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ({"attention_bias": True}, "no biases"),
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "tensors unknown"),
        ({"tie_word_embeddings": False}, r"missing: \['lm_head.weight'\]"),
        ({"vocab_size": 300}, "300 rows"),
    ],
)  # fmt: skip
def test_refuses_what_llama_cpp_would_do_otherwise(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    model = copy(folders["qwen3"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=said):
        build_gguf(model, tmp_path / "out" / "m.gguf", "f16", name="x")
    assert content(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normaliser Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no name that famc knows"),
        ({"pre_tokenizer": None}, "no name that famc knows"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "no name that famc knows",
        ),
        ({"model": {"ignore_merges": True}}, "with ignore_merges"),
        ({"model": {"byte_fallback": True}}, "byte fallback"),
        ({"model": {"merges": []}}, "without merges"),
        ({"added_tokens": {"lstrip": True}}, "strip space"),
    ],
)  # fmt: skip
def test_refuses_tokenizers_that_would_give_other_ids(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    model = copy(folders["qwen3"], tmp_path / "model")
    spec = json.loads((model / "tokenizer.json").read_text())
    for key, value in change.items():
        if key == "model":
            spec["model"] |= value
        elif key == "added_tokens":
            spec[key] = [token | value for token in spec[key]]
        else:
            spec[key] = value
    (model / "tokenizer.json").write_text(json.dumps(spec))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=said):
        build_gguf(model, tmp_path / "m.gguf", "f16", name="x")


def test_a_regex_that_is_almost_qwens_is_refused() -> None:
    assert PRE_TOKENIZERS[SPLIT, False] == "qwen2"  # what famc trains
    tokenizer = family_tokenizer()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    assert pre_tokenizer_name(spec) == "qwen2"
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = SPLIT.replace(r"\p{N}", r"\p{N}{1,2}", 1)
    with pytest.raises(ValueError, match="no name that famc knows"):
        pre_tokenizer_name(spec)


def test_an_unknown_quantisation(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'q4_k_m'"):
        build_gguf(folders["qwen3"], tmp_path / "m.gguf", "q4_k_n", name="x")


def test_without_llama_cpp(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "famc.work.llama_cpp", raising=False)
    with pytest.raises(ValueError, match=re.escape("pip install 'famc[gguf]'")):
        build_gguf(folders["qwen3"], tmp_path / "m.gguf", "q4_k_m", name="x")
    assert content(tmp_path) == {}


def test_nothing_half_written(folders: dict[str, Path], tmp_path: Path) -> None:
    model = copy(folders["qwen3"], tmp_path / "model")
    target = tmp_path / "out" / "m.gguf"
    build_gguf(model, target, "f16", name="x")
    before = content(tmp_path / "out")
    weights = load_file(model / "model.safetensors")
    last = weights["model.norm.weight"]
    last[3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepFailed, match=r"model\.norm\.weight.*not finite"):
        build_gguf(model, target, "f16", name="x")
    assert content(tmp_path / "out") == before
    last[3] = 1.0
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepFailed, match="too large for f16"):
        build_gguf(model, target, "f16", name="x")
    build_gguf(model, target, "bf16", name="x")
    build_gguf(model, target, "q8_0", name="x")


# --- chat template and Modelfile --------------------------------------------------------------------------------


def plain_jinja(template: str, **values: Any) -> str:
    """As llama.cpp's: no tags but Jinja's own."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(template).render(**values)


@pytest.mark.parametrize(
    "template",
    [
        FAMILY_CHATML,
        CHATML,
        "{% for m in messages %}\n  {% generation %}\n  {{ m.content }}\n  {% endgeneration %}\n\n{% endfor %}",
        "{% for m in messages %}a  {%- generation -%}  {{ m.content }}  {%- endgeneration %} b {% endfor %}",
        "{% for m in messages %}{% generation %}\n\n{{ m.role }}{%endgeneration%}\n{% endfor %}",
        "{% if messages %}{%+ generation %} {{ messages[0].content }}\n\n{% endgeneration +%}\n!{% endif %}",
    ],
)
def test_a_template_without_generation_marks_renders_the_same(template: str) -> None:
    stripped = without_generation_marks(template)
    assert "generation %}" not in stripped.replace("add_generation_prompt %}", "")
    tokenizer = tiny_tokenizer()
    for messages in (CONVERSATION, CONVERSATION[1:3], CONVERSATION[:1]):
        for prompt in (False, True):
            wanted = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
            assert plain_jinja(stripped, messages=messages, add_generation_prompt=prompt) == wanted
    assert without_generation_marks(stripped) == stripped


def test_the_families_template_stays_readable() -> None:
    assert without_generation_marks(FAMILY_CHATML) == re.sub(r"{% (end)?generation %}", "", FAMILY_CHATML)


def test_the_template_in_the_file(folders: dict[str, Path], tmp_path: Path) -> None:
    build_gguf(folders["qwen3"], tmp_path / "m.gguf", "f16", name="x")
    inside = field(GGUFReader(tmp_path / "m.gguf"), "tokenizer.chat_template")
    assert "generation %}" not in inside
    wanted = tiny_tokenizer().apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert plain_jinja(inside, messages=CONVERSATION, add_generation_prompt=True) == wanted


def test_chatml_is_known_by_what_it_writes() -> None:
    assert is_chatml(FAMILY_CHATML)
    assert is_chatml(CHATML)
    assert is_chatml(without_generation_marks(FAMILY_CHATML))
    assert not is_chatml(FAMILY_CHATML.replace("<|im_start|>", "<|start|>"))
    assert not is_chatml("{% if tools %}{{ tools }}{% endif %}" + FAMILY_CHATML)
    assert not is_chatml("{{ messages[0].nothing.there }}")


def test_ollamas_modelfile() -> None:
    text = modelfile("m.gguf", FAMILY_CHATML, ["<|im_end|>", "<|endoftext|>"], 256)
    lines = text.splitlines()
    assert lines[0] == "FROM ./m.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    assert lines[-2:] == ["PARAMETER num_ctx 256", "PARAMETER temperature 0"]
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.S)
    assert go is not None
    # Go's template language, as far as this template uses it
    body = re.fullmatch(r"\{\{- range \.Messages \}\}(.*?)\{\{ end \}\}(.*)", go[1], re.S)
    assert body is not None
    rendered = "".join(
        body[1].replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in CONVERSATION
    )
    wanted = tiny_tokenizer().apply_chat_template(
        CONVERSATION, chat_template=FAMILY_CHATML, tokenize=False, add_generation_prompt=True
    )
    assert rendered + body[2] == wanted


def test_a_modelfile_says_what_it_can_not_do() -> None:
    other = modelfile("m.gguf", "{{ messages }}", ["</s>"], 64)
    assert 'TEMPLATE "' not in other
    assert "# Ollama doesn't run the Jinja chat template" in other
    assert 'TEMPLATE "{{ .Prompt }}"' in modelfile("m.gguf", None, [], 64)


# --- llama.cpp ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that know TEXTS by heart, of a shape that k-quants divide into their blocks."""
    root = tmp_path_factory.mktemp("learned")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "head_dim": 16}
    set_seed(0)
    return {
        kind: make_tiny_model(root / kind, kind, steps=60, **shape)  # type: ignore[arg-type]
        for kind in ("qwen3", "llama")
    }


def rows(folder: Path) -> tuple[Any, list[list[int]]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, [tokenizer(text)["input_ids"] for text in TEXTS]


# KL in nats a token on text that is known by heart: ten times what was measured, at least.
LIMITS = {"f32": 2e-7, "f16": 3e-7, "bf16": 1e-5, "q8_0": 1.5e-4, "q6_k": 5e-4, "q5_k_m": 7e-4}
LIMITS |= {"q4_k_m": 3e-3, "q4_0": 3e-3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_every_quantisation_is_near_torch(learned: dict[str, Path], tmp_path: Path, kind: str) -> None:
    from famc.work.llama_cpp import LlamaDecoder

    tokenizer, texts = rows(learned[kind])
    reference = TorchDecoder(learned[kind], 1)
    prompts = [ids[:5] for ids in texts]
    kl, sizes = {}, {}
    for quant in QUANTS:
        path = tmp_path / f"{quant}.gguf"
        facts = build_gguf(learned[kind], path, quant, name="x")
        assert facts["fallback"] == 0
        sizes[quant] = facts["bytes"]
        decoder = LlamaDecoder(path, 1, 128)
        found = compare(reference, decoder, texts, prompts, {tokenizer.eos_token_id}, 40)
        kl[quant] = found["kl"]
        assert found["kl"] < LIMITS[quant], quant
        if quant in ("f32", "f16"):
            assert (found["top1_agreement"], found["greedy_equal"]) == (1.0, 1.0), quant
        assert found["top1_agreement"] > 0.97, quant
        decoder.close()
    assert kl["f16"] < kl["q8_0"] < kl["q6_k"] < min(kl["q4_k_m"], kl["q4_0"])
    assert sizes["f16"] > sizes["q8_0"] > sizes["q6_k"] > sizes["q5_k_m"] > sizes["q4_k_m"]
    worst = {q: max(tensor_errors(tmp_path / f"{q}.gguf", learned[kind]).values()) for q in QUANTS}
    assert worst["q8_0"] < worst["q6_k"] < worst["q4_k_m"] < worst["q4_0"] < 0.02


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("qwen3", {"num_key_value_heads": 1, "tied": False}),
        ("llama", {"tied": False, "num_key_value_heads": 4}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"rope": "linear"}),
        ("llama", {"rope": "linear"}),
        ("llama", {"rope": "llama3", "head_dim": 64}),
        ("qwen3", {"rope": "yarn"}),
        ("llama", {"rope": "yarn", "head_dim": 64}),
    ],
)
def test_shapes_and_ropes(tmp_path: Path, kind: Any, shape: dict[str, Any]) -> None:
    """In f32, with random weights and long rows: what is wrong in the arithmetic shows."""
    from famc.work.llama_cpp import LlamaDecoder

    more = dict(shape)
    if rope := more.pop("rope", ""):
        more["rope_parameters"] = {"rope_type": rope, "rope_theta": 1e4, **ROPES[rope]}
    model = make_tiny_model(tmp_path / "model", kind, initializer_range=0.1, **more)
    if shape.get("mlp_bias"):
        torch.manual_seed(0)
        weights = load_file(model / "model.safetensors")
        for name in weights:
            if name.endswith("bias"):  # transformers begins them with zeros
                weights[name].normal_(0, 0.3)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    _, texts = rows(model)
    build_gguf(model, tmp_path / "m.gguf", "f32", name="x")
    long = [[token for ids in texts for token in ids][:240]]
    found = compare_logits(TorchDecoder(model, 1), LlamaDecoder(tmp_path / "m.gguf", 1, 256), long)
    assert found["kl"] < 1e-6
    assert found["top1_agreement"] > 0.99


@pytest.mark.slow
def test_decoder_batches_and_refuses(learned: dict[str, Path], tmp_path: Path) -> None:
    from famc.work import llama_cpp
    from famc.work.llama_cpp import LlamaDecoder

    _, texts = rows(learned["qwen3"])
    build_gguf(learned["qwen3"], tmp_path / "m.gguf", "f16", name="x")
    decoder = LlamaDecoder(tmp_path / "m.gguf", 1, 64)
    both = decoder.logits([texts[0][:20], texts[1][:20]])
    assert both.shape == (2, 20, 384)
    assert both.dtype == np.float32
    assert np.array_equal(decoder.logits([texts[0][:20]])[0], both[0])  # nothing of the row before
    with pytest.raises(ValueError, match="65 tokens for a context of 64"):
        decoder.logits([[5] * 65])
    with pytest.raises(ValueError, match="outside the file's vocabulary of 384"):
        decoder.logits([[384]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "BATCH", 7)
        pieces = LlamaDecoder(tmp_path / "m.gguf", 1, 64)
    assert np.abs(pieces.logits([texts[0][:20]])[0] - both[0]).max() < 0.05
    assert decoder.metadata["general.name"] == "x"
    assert decoder.metadata["qwen3.vocab_size"] == "384"
    (tmp_path / "bad.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"can't load .*bad\.gguf: .+"):
        LlamaDecoder(tmp_path / "bad.gguf", 1, 64)


@pytest.mark.slow
def test_generation_ends_at_eos(learned: dict[str, Path], tmp_path: Path) -> None:
    from famc.work.llama_cpp import LlamaDecoder

    tokenizer, texts = rows(learned["llama"])
    build_gguf(learned["llama"], tmp_path / "m.gguf", "f16", name="x")
    decoder = LlamaDecoder(tmp_path / "m.gguf", 1, 128)
    new = decoder.generate(texts[0][:5], 100, {tokenizer.eos_token_id})
    assert new == [*texts[0][5:], tokenizer.eos_token_id]
    assert decoder.generate(texts[0][:5], 3, {tokenizer.eos_token_id}) == texts[0][5:8]
    assert decoder.is_end(tokenizer.eos_token_id)
    assert not decoder.is_end(texts[0][5])


@pytest.mark.slow
def test_llama_cpps_q8_0_is_ours(learned: dict[str, Path], tmp_path: Path) -> None:
    from famc.work.llama_cpp import quantize_file

    for quant in ("f32", "q8_0"):
        build_gguf(learned["qwen3"], tmp_path / f"{quant}.gguf", quant, name="x")
    quantize_file(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", int(QUANTS["q8_0"].file_type), 1)
    ours, theirs = (
        {t.name: t for t in GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("q8_0", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].tensor_type == theirs[name].tensor_type
        assert np.array_equal(ours[name].data, theirs[name].data), name


@pytest.mark.slow
def test_llama_cpp_makes_the_same_bytes_twice_and_leaves_nothing(
    learned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from famc.work import llama_cpp

    for name, threads in (("a", 1), ("b", 2)):
        build_gguf(learned["qwen3"], tmp_path / f"{name}.gguf", "q4_k_m", name="x", threads=threads)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(content(tmp_path)) == ["a.gguf", "b.gguf"]

    def fails(*_: Any) -> None:
        raise ValueError("llama.cpp can't quantise: no")

    monkeypatch.setattr(llama_cpp, "quantize_file", fails)
    with pytest.raises(ValueError, match="can't quantise"):
        build_gguf(learned["qwen3"], tmp_path / "c.gguf", "q4_k_m", name="x")
    assert sorted(content(tmp_path)) == ["a.gguf", "b.gguf"]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.mark.slow
def test_small_widths_fall_back(folders: dict[str, Path], tmp_path: Path) -> None:
    facts = build_gguf(folders["qwen3"], tmp_path / "m.gguf", "q4_k_m", name="x")
    assert facts["fallback"] == 15  # rows of 64 and 128: all of them, to q5_0 and q8_0
    assert facts["tensors_q5_0"] + facts["tensors_q8_0"] == 15  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_ids_are_equal(tmp_path: Path, rule: str) -> None:
    """On languages and code, and on nonsense for which every split is a word of its own."""
    from famc.work.llama_cpp import LlamaDecoder

    # letters and marks up to Unicode 14, where llama.cpp's tables and tokenizers' agree
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x5D0, 0x5EB), (0x620, 0x700), (0x904, 0x980)]
    ranges += [(0xE01, 0xE3B), (0x2000, 0x2100), (0x3041, 0x3097), (0x4E00, 0x4E60), (0x1F600, 0x1F640)]
    draw = random.Random(0)

    def nonsense() -> str:
        some = draw.sample(ranges, 2)
        letters = [chr(draw.randrange(*draw.choice(some))) for _ in range(8)]
        text = "".join(
            draw.choice([*letters, " ", "\n", "\r", "\t", "'s", "'LL", "12", "a"]) for _ in range(16)
        )
        return unicodedata.normalize("NFC", text)

    texts = [nonsense() for _ in range(1500)]
    code = Path(compare_module.__file__).read_text(encoding="utf-8")
    tokenizer = family_tokenizer([*texts, code, *MULTILINGUAL], rule=rule, vocab=3000, across=True)
    model = with_tokenizer(tmp_path / "model", tokenizer)
    facts = build_gguf(model, tmp_path / "m.gguf", "f16", name="x")
    assert facts["tokenizer_pre"] == rule
    decoder = LlamaDecoder(tmp_path / "m.gguf", 1, 64)
    source = AutoTokenizer.from_pretrained(model)
    for text in (*MULTILINGUAL, code, *texts):
        ids = source(text)["input_ids"]
        assert decoder.tokenize(text) == ids, text
        assert decoder.detokenize(ids) == text


@pytest.mark.slow
def test_conversations_in_llama_cpp_are_the_sources(tmp_path: Path) -> None:
    from famc.work.llama_cpp import LlamaDecoder

    tokenizer = family_tokenizer()
    model = with_tokenizer(tmp_path / "model", tokenizer)
    build_gguf(model, tmp_path / "m.gguf", "f16", name="x")
    decoder = LlamaDecoder(tmp_path / "m.gguf", 1, 64)
    golden = [*CONVERSATION, {"role": "assistant", "content": "<think>\nHeat.\n</think>\n\nHeat. 你好"}]
    wanted = tokenizer.apply_chat_template(golden, tokenize=False)
    assert decoder.template is not None
    assert plain_jinja(decoder.template, messages=golden) == wanted
    ids = tokenizer.apply_chat_template(golden, return_dict=True)["input_ids"]
    assert decoder.tokenize_special(wanted) == ids
    assert decoder.detokenize(ids) == wanted
    # a mark that a user types is text, a word like <think> is one token all the same
    mark, think = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<think>"))
    assert mark not in decoder.tokenize("a<|im_end|>b")
    assert think in decoder.tokenize("a<think>b")
    assert decoder.is_end(mark)


@pytest.mark.slow
def test_padding_rows_of_the_vocabulary(folders: dict[str, Path], tmp_path: Path) -> None:
    from famc.work.llama_cpp import LlamaDecoder

    build_gguf(folders["qwen3"], tmp_path / "m.gguf", "f32", name="x")
    decoder = LlamaDecoder(tmp_path / "m.gguf", 1, 64)
    assert decoder.logits([[5, 6]]).shape == (1, 2, 400)
    assert set(SPECIAL) <= {decoder.detokenize([i]) for i in range(3)}
