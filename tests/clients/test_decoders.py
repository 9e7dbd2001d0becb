"""The capability table is true: every row that says `yes` is made, released, and loaded by every runtime that it names,
offline, from the released folder, with the model's own answers.

One tiny family an architecture goes through the real workers: export, then release. Runtimes that need a program of
their own are slow tests; they fail where it is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clients import clean_transformers, transformers_js
from tiny_artifacts import CHATS, make_data, make_model, make_tokenizer
from tiny_model import CONVERSATION, TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from famc.cost.shape import Moe, Shape
from famc.job import Job
from famc.spec.family import Export
from famc.steps.exports import (
    CAPABILITIES,
    JS_DTYPES,
    ONNX_FILES,
    TEXT,
    export_params,
    folder_suffix,
    gguf_name,
)
from famc.work import export, release
from famc.work.checkpoint import WEIGHTS
from famc.work.compare import TorchDecoder, compare
from famc.work.onnx_session import OnnxDecoder

# how far a format may be from the source, nats a token, on models that know a few texts by heart
KL = {
    "fp32": 1e-6, "fp16": 1e-4, "bf16": 5e-3, "f16": 1e-4, "int8": 5e-3, "q8_0": 5e-3, "8": 5e-3, "int4": 0.05,
    "q4_0": 0.05, "q4_k_m": 0.05, "q5_k_m": 0.02, "q6_k": 0.01, "f32": 1e-6, "4": 0.05,
}  # fmt: skip
EXACT = {"fp32", "fp16", "f16", "f32"}
SLOW = {"transformers.js", "llama.cpp", "sentence-transformers"}
NAME = "tiny-xs-instruct"
HIDDEN, FFN, VOCAB = 64, 128, 384

ROWS = [
    pytest.param(arch, row.format, row.quant, runtime, id=f"{arch}-{row.format}-{row.quant}-{runtime}",
                 marks=[pytest.mark.slow] if runtime in SLOW else [])
    for row in CAPABILITIES
    if row.status == "yes" and row.task == TEXT
    for arch in row.archs
    for runtime in row.runtimes
]  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model, its tokenizer, what its texts and prompts are, and its released folders by (format, quant)."""

    model: Path
    tokenizer: Path
    texts: list[list[int]]
    prompts: list[list[int]]
    release: Callable[[str, str], Path]


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> Callable[[str], Family]:
    """Families by architecture, each made on first demand."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("families")
    made: dict[str, Family] = {}

    def get(arch: str) -> Family:
        if arch not in made:
            made[arch] = family(root / arch, arch)
        return made[arch]

    return get


def family(root: Path, arch: str) -> Family:
    root.mkdir()
    tokenizer = make_tokenizer(root / "tokenizer")
    model = root / "model"
    if arch == "qwen3_moe":
        make_moe(model, tokenizer)
    else:
        make_model(model, tokenizer, steps=60, kind=arch)
    data = mix(root / "data")
    words = AutoTokenizer.from_pretrained(tokenizer)
    folders: dict[tuple[str, str], Path] = {}

    def released(fmt: str, quant: str) -> Path:
        if (fmt, quant) not in folders:
            made = root / f"export.{fmt}-{quant}"
            made.mkdir()
            job = Job.for_test(f"xs/instruct/export.{fmt}-{quant}", "export", params(arch, fmt, quant))
            inputs = {"model": model, "tokenizer": tokenizer}
            export.run(job, inputs | ({"data.qa": data} if "examples" in job.params else {}), made)
            folder = root / f"{NAME}-{fmt}-{quant}"  # one folder an export: each must stand alone
            folder.mkdir()
            suffix = folder_suffix(fmt, quant)
            wanted = {
                "repo": NAME + suffix,
                "max_context": 256,
                "license": "mit",
                "format": fmt if suffix else "",
            }
            inputs |= {f"export.{fmt}-{quant}": made}
            release.run(Job.for_test("xs/instruct/release", "release", wanted), inputs, folder)
            folders[fmt, quant] = folder
        return folders[fmt, quant]

    texts = [words(text)["input_ids"] for text in TEXTS]
    prompts = [
        words.apply_chat_template(c[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        for c in CHATS
    ]
    return Family(model, tokenizer, texts, prompts, released)


def params(arch: str, fmt: str, quant: str) -> dict[str, Any]:
    """The values that the graph gives such a step."""
    said = {"bits": int(quant)} if quant in "48" else {"quant": quant}
    calibrate = {"calibrate": {"data": "qa", "n": 8}} if fmt in ("gptq", "awq") or quant == "int4" else {}
    wanted = Export.model_validate({"variants": ("instruct",), "format": fmt, **said, **calibrate})
    shape = Shape(
        arch,
        VOCAB,
        2,
        HIDDEN,
        FFN,
        4,
        2,
        32 if arch == "qwen3" else 16,
        True,
        128,
        1e6,
        Moe(4, 2, 32) if arch == "qwen3_moe" else None,
    )
    return {**export_params(wanted, quant, shape), "name": NAME}


def make_moe(folder: Path, tokenizer: Path) -> None:
    """A mixture of experts with random weights: no format but safetensors has a worker for it yet."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())


def mix(folder: Path) -> Path:
    """The chats as a mix artifact."""
    import shutil

    made = make_data(folder, [{"messages": chat} for chat in CHATS])
    shutil.move(made / "heldout.parquet", made / "examples.parquet")
    return made


def near(source: Family, candidate: Any, quant: str) -> None:
    """The candidate gives the source's logits and, where nothing is lost, its text."""
    found = compare(TorchDecoder(source.model, 1), candidate, source.texts, source.prompts, {2}, 16)
    assert found["kl"] <= KL[quant]
    assert found["perplexity_ratio"] <= 1 + KL[quant] + 1e-3
    if quant in EXACT:
        assert found["greedy_equal"] == 1


# --- runtimes -------------------------------------------------------------------------------------------------------


def by_transformers(source: Family, folder: Path, fmt: str, quant: str) -> None:
    near(source, TorchDecoder(folder, 1), quant)
    words = AutoTokenizer.from_pretrained(folder)
    own = AutoTokenizer.from_pretrained(source.tokenizer)
    assert words.apply_chat_template(CONVERSATION, tokenize=False) == own.apply_chat_template(
        CONVERSATION, tokenize=False
    )
    assert [words(text)["input_ids"] for text in TEXTS] == [own(text)["input_ids"] for text in TEXTS]


def by_onnxruntime(source: Family, folder: Path, fmt: str, quant: str) -> None:
    near(source, OnnxDecoder(folder / ONNX_FILES[quant], 1), quant)


def by_genai(source: Family, folder: Path, fmt: str, quant: str) -> None:
    """Its tokenizer, template and greedy text, from the folder alone."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    words = AutoTokenizer.from_pretrained(source.tokenizer)
    for text in TEXTS:
        assert list(tokenizer.encode(text)) == words(text)["input_ids"]
    rendered = tokenizer.apply_chat_template(json.dumps(CONVERSATION), add_generation_prompt=True)
    assert rendered == words.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    reference = TorchDecoder(source.model, 1)
    same = []
    for prompt in source.prompts:
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=len(prompt) + 16, do_sample=False)
        generator = og.Generator(model, settings)
        generator.append_tokens(np.asarray(prompt, dtype=np.int32))
        new: list[int] = []
        while not generator.is_done() and len(new) < 16:
            generator.generate_next_token()
            new.append(int(generator.get_next_tokens()[0]))
        same.append(new == reference.generate(prompt, 16, {2}))  # the end mark included
    assert all(same) if quant in EXACT | {"int8"} else sum(same) >= len(same) - 1


def by_transformers_js(source: Family, folder: Path, fmt: str, quant: str) -> None:
    """Node: ids, template and greedy text. fp16 is for GPUs: on a CPU its text may leave the source's late."""
    words = AutoTokenizer.from_pretrained(source.tokenizer)
    asked = {
        "task": TEXT, "folder": str(folder), "dtype": JS_DTYPES[quant], "texts": TEXTS, "messages": CHATS[0][:1],
        "max_new_tokens": 16,
    }  # fmt: skip
    answer = transformers_js(asked)
    assert answer["input_ids"] == [words(text)["input_ids"] for text in TEXTS]
    assert answer["rendered"] == words.apply_chat_template(
        CHATS[0][:1], tokenize=False, add_generation_prompt=True
    )
    expected = TorchDecoder(source.model, 1).generate(source.prompts[0], 16, {2})
    shared = next(
        (i for i, (a, b) in enumerate(zip(answer["new_ids"], expected, strict=False)) if a != b), 16
    )
    assert answer["new_ids"] == expected if quant in EXACT | {"int8"} else shared >= 3


def by_llama_cpp(source: Family, folder: Path, fmt: str, quant: str) -> None:
    from famc.work.llama_cpp import LlamaDecoder

    decoder = LlamaDecoder(folder / gguf_name(NAME, quant), 1, 256)
    near(source, decoder, quant)
    words = AutoTokenizer.from_pretrained(source.tokenizer)
    for text in TEXTS:
        assert decoder.tokenize(text) == words(text)["input_ids"]
    assert f"FROM ./{gguf_name(NAME, quant)}\n" in (folder / "Modelfile").read_text()


RUNTIMES = {
    "transformers": by_transformers,
    "onnxruntime": by_onnxruntime,
    "onnxruntime-genai": by_genai,
    "transformers.js": by_transformers_js,
    "llama.cpp": by_llama_cpp,
}


@pytest.mark.parametrize(("arch", "fmt", "quant", "runtime"), ROWS)
def test_what_the_table_promises_loads_and_answers(families, arch, fmt, quant, runtime):
    source = families(arch)
    folder = source.release(fmt, quant)
    RUNTIMES[runtime](source, folder, fmt, quant)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "fmt", "quant", "major"),
    [
        ("qwen3", "safetensors", "fp32", "5"), ("llama", "safetensors", "bf16", "5"), ("qwen3", "gptq", "4", "5"),
        ("qwen3", "safetensors", "fp32", "4"), ("llama", "safetensors", "fp32", "4"),
    ],
)  # fmt: skip
def test_a_clean_environment_needs_the_folder_alone(families, arch, fmt, quant, major):
    """Nothing of famc's process: another Python, transformers of today or the last 4, offline. The rotary base is not
    transformers' default: a client that overlooks it gives other logits."""
    source = families(arch)
    asked = {
        "folder": str(source.release(fmt, quant)), "texts": TEXTS, "messages": CHATS[0][:1], "max_new_tokens": 16,
    }  # fmt: skip
    answer = clean_transformers(asked, major)
    assert answer["version"].startswith(f"{major}.")
    words = AutoTokenizer.from_pretrained(source.tokenizer)
    assert answer["input_ids"] == [words(text)["input_ids"] for text in TEXTS]
    assert answer["rendered"] == words.apply_chat_template(
        CHATS[0][:1], tokenize=False, add_generation_prompt=True
    )
    reference = TorchDecoder(source.model, 1)
    expected = reference.logits([answer["input_ids"][0]])[0, -1]
    if quant == "fp32":
        assert np.abs(np.asarray(answer["logits"]) - expected).max() < 1e-3
    assert answer["new_ids"] == reference.generate(source.prompts[0], 16, {2})


@pytest.mark.parametrize("quant", ["4", "8"])
def test_calibrated_folders_hold_packed_weights(families, quant):
    """Fewer bytes than bf16, and a config that says so: nobody loads floats by mistake."""
    source = families("qwen3")
    folder = source.release("gptq", quant)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (folder / WEIGHTS).stat().st_size < (
        source.release("safetensors", "bf16") / WEIGHTS
    ).stat().st_size
