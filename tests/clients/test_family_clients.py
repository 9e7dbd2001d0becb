"""The example family as it is released, in every runtime that the capability table names: built once by the command line,
with smaller budgets, GGUF included.

Slow. The models have learnt something, so their logits are peaked where they are sure: exact formats must give the source's
greedy answers, the others its first 20 tokens or a KL of at most 0.05.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clients import clean_transformers, sentence_transformers, transformers_js
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoTokenizer

from famc.steps.exports import CAPABILITIES, JS_DTYPES, ONNX_FILES, TEXT, folder_suffix, gguf_name
from famc.work.compare import TorchDecoder, common_prefix, compare_logits
from famc.work.evaluate import heldout
from famc.work.likelihood import encode_prompt, end_ids, last_turn
from famc.work.onnx_session import OnnxDecoder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GGUF = "exports.5={variants: [instruct], format: gguf, quant: [f16, q8_0, q4_0, q4_k_m]}"
BUILD = ["build", str(ROOT / "specs" / "pydoc.yaml"), "--profile", "quick", "--set", GGUF]
EXACT = {"fp32", "fp16", "f16"}
TOKENS, KL = 20, 0.05


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("family") / "out"
    command = [sys.executable, "-m", "famc.cli", *BUILD, "--out", str(out), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    torch.set_num_threads(2)
    return out


@pytest.fixture(scope="module")
def asked(built: Path) -> dict[str, Any]:
    """The family's tokenizer, held-out prompts and texts."""
    tokenizer = AutoTokenizer.from_pretrained(next((built / "store").glob("tokenizer-*")))
    chats = [e["messages"] for e in heldout(next((built / "store" / "data").glob("qa-*")), 6, ["messages"])]
    turns = [turn[0] for chat in chats if (turn := last_turn(chat)) is not None]
    return {
        "tokenizer": tokenizer,
        "messages": turns,
        "prompts": [encode_prompt(tokenizer, turn) for turn in turns],
        "texts": [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats],
        "ends": end_ids(tokenizer),
    }


def released(built: Path, size: str, variant: str, fmt: str, quant: str) -> Path:
    name = f"pydoc-{size}" + ("" if variant == "base" else f"-{variant}")
    folder = built / "release" / (name + folder_suffix(fmt, quant))
    assert folder.is_dir()
    return folder


def source(built: Path, size: str, variant: str) -> TorchDecoder:
    """What the release was made from: the main folder's safetensors are the model itself, or its bf16 export."""
    return TorchDecoder(released(built, size, variant, "safetensors", ""), 2)


def exports(built: Path) -> list[tuple[str, str, str, str]]:
    """(size, variant, format, quant) of everything that family.json lists."""
    index = json.loads((built / "release" / "family.json").read_text())
    found = []
    for entry in index["variants"]:
        for label in entry["exports"]:
            found.append((entry["size"], entry["variant"], *label.split("-", 1)))
    return sorted(set(found))


def test_the_release_holds_every_export_of_the_spec(built: Path) -> None:
    made = exports(built)
    assert (
        len(made) == 2 * (1 + 4 + 1 + 4) + 2 * 3
    )  # bf16; four ONNX; GPTQ; four GGUF; ONNX of the embedder and the reranker
    index = json.loads((built / "release" / "family.json").read_text())
    assert not [entry for entry in index["variants"] if "not_released" in entry]
    repos = {entry["repo"] for entry in index["variants"]}
    assert {"pydoc-m-instruct", "pydoc-m-instruct-GGUF", "pydoc-m-instruct-GPTQ-Int4"} <= repos


def test_every_export_loads_in_every_client_of_its_row_and_answers_as_the_model(built, asked) -> None:
    """All failures at once: a release is right in all clients, or one knows which it is not right in."""
    rows = {(row.format, row.quant): row for row in CAPABILITIES if row.task == TEXT and "qwen3" in row.archs}
    wrong, tried = [], set()
    for size, variant, fmt, quant in exports(built):
        if variant in ("embedding", "reranker"):
            continue
        folder = released(built, size, variant, fmt, quant)
        model = source(built, size, variant)
        for runtime in rows[fmt, quant].runtimes:
            tried.add((fmt, quant, runtime))
            fault = CLIENTS[runtime](model, folder, fmt, quant, asked)
            if fault:
                wrong.append(f"{size}/{variant} {fmt} {quant} in {runtime}: {fault}")
    assert wrong == []
    assert len({runtime for _, _, runtime in tried}) == 5


@pytest.mark.parametrize("quant", ["fp32", "int8", "int4"])
def test_the_embedder_finds_the_same_in_every_client(built: Path, quant: str) -> None:
    """Names in camelCase and snake_case among the texts: the tokenizer's words must be those of every client."""
    folder = released(built, "e", "embedding", "onnx", quant)
    rows = heldout(next((built / "store" / "data").glob("names-*")), 12, ["query", "positives"])
    # short ones: transformers.js cuts a text that is too long behind its marks, and the last mark goes
    passages = [text for row in rows if len(text := json.loads(row["positives"])[0]) < 400]
    texts = [str(row["query"]) for row in rows] + passages + ["getHeader", "get_header"]
    wanted = SentenceTransformer(str(folder), device="cpu").encode(texts)
    assert wanted[-1] == pytest.approx(wanted[-2], abs=1e-6), "one word, however it is written"
    here = sentence_transformers(
        {"task": "feature-extraction", "folder": str(folder), "file": ONNX_FILES[quant], "texts": texts}
    )
    asked = {"task": "feature-extraction", "folder": str(folder), "dtype": JS_DTYPES[quant], "texts": texts}
    there = transformers_js(asked | {"pooling": "cls", "normalize": True})
    least = {"fp32": 0.99999, "int8": 0.995, "int4": 0.98}[quant]
    for name, found in (
        ("onnx", here["onnx"]),
        ("graph", there["sentence_embedding"]),
        ("pipeline", there["pooled"]),
    ):
        assert (np.asarray(found) * wanted).sum(1).min() >= least, name
    assert (np.asarray(here["torch"]) * wanted).sum(1).min() >= 0.99999


@pytest.mark.parametrize("quant", ["fp32", "int8", "int4"])
def test_the_reranker_scores_the_same_in_every_client(built: Path, quant: str) -> None:
    """Which of two texts a token belongs to reaches the model in every client, though transformers.js says nothing of it."""
    folder = released(built, "r", "reranker", "onnx", quant)
    rows = heldout(next((built / "store" / "data").glob("names-*")), 12, ["query", "positives"])
    passages = [text for row in rows if len(text := json.loads(row["positives"])[0]) < 400]
    pairs = [[str(row["query"]), text] for row in rows[:4] for text in passages]
    wanted = np.asarray(CrossEncoder(str(folder), device="cpu").predict([tuple(p) for p in pairs])).ravel()
    asked = {"task": "text-ranking", "folder": str(folder), "pairs": pairs}
    here = sentence_transformers(asked | {"file": ONNX_FILES[quant]})["onnx"]
    there = transformers_js(asked | {"dtype": JS_DTYPES[quant]})["logits"]
    for name, found in (("sentence-transformers", here), ("transformers.js", there)):
        got = np.asarray(found, dtype=np.float64).ravel()
        if quant == "fp32":
            assert np.abs(got - wanted).max() <= 1e-3, name
        assert np.corrcoef(got, wanted)[0, 1] >= 0.95, name


# --- clients: "" or what is wrong --------------------------------------------------------------------------------------


def judged(model: TorchDecoder, candidate: Any, quant: str, asked: dict[str, Any]) -> str:
    """By logits and greedy text."""
    kl = compare_logits(model, candidate, asked["texts"])["kl"]
    answers = [candidate.generate(ids, TOKENS, asked["ends"]) for ids in asked["prompts"]]
    return by_text(model, answers, quant, asked) if quant in EXACT else "" if kl <= KL else f"KL {kl:.3f}"


def by_text(
    model: TorchDecoder, answers: list[list[int]], quant: str, asked: dict[str, Any], kl: float = 9.0
) -> str:
    """Exact formats: every answer. Others: the first 20 tokens of each, or the KL."""
    expected = [model.generate(ids, TOKENS, asked["ends"]) for ids in asked["prompts"][: len(answers)]]
    shared = [common_prefix(a, b) / max(1, len(b)) for a, b in zip(answers, expected, strict=True)]
    if quant in EXACT:
        return "" if answers == expected else f"greedy answers share {shared}"
    return "" if answers == expected or kl <= KL else f"first tokens share {shared}, KL {kl:.3f}"


def by_transformers(model: TorchDecoder, folder: Path, fmt: str, quant: str, asked: dict[str, Any]) -> str:
    """In this process for logits, and in a Python that has never seen famc for ids and template."""
    told = clean_transformers(
        {"folder": str(folder), "texts": ["def f(x):\n    return x"], "messages": asked["messages"][0], "max_new_tokens": 4},
        "5",
    )  # fmt: skip
    words = asked["tokenizer"]
    if told["rendered"] != words.apply_chat_template(
        asked["messages"][0], tokenize=False, add_generation_prompt=True
    ):
        return "another template"
    if told["input_ids"] != [words("def f(x):\n    return x")["input_ids"]]:
        return "other ids"
    return judged(model, TorchDecoder(folder, 2), quant, asked)


def by_onnxruntime(model: TorchDecoder, folder: Path, fmt: str, quant: str, asked: dict[str, Any]) -> str:
    return judged(model, OnnxDecoder(folder / ONNX_FILES[quant], 2), quant, asked)


def by_genai(model: TorchDecoder, folder: Path, fmt: str, quant: str, asked: dict[str, Any]) -> str:
    """genai_config.json names one graph; the others by an overlay, as its users do."""
    import onnxruntime_genai as og

    settings = og.Config(str(folder))
    settings.overlay(json.dumps({"model": {"decoder": {"filename": ONNX_FILES[quant]}}}))
    session = og.Model(settings)
    tokenizer = og.Tokenizer(session)
    answers = []
    for turn, ids in zip(asked["messages"], asked["prompts"], strict=True):
        text = tokenizer.apply_chat_template(json.dumps(turn), add_generation_prompt=True)
        if list(tokenizer.encode(text)) != ids:
            return "other ids of a rendered conversation"
        params = og.GeneratorParams(session)
        params.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
        generator = og.Generator(session, params)
        generator.append_tokens(np.asarray(ids, dtype=np.int32))
        new: list[int] = []
        while not generator.is_done() and len(new) < TOKENS:
            generator.generate_next_token()
            new.append(int(generator.get_next_tokens()[0]))
        answers.append(new)
    return by_text(model, answers, quant, asked, near(folder, quant, model, asked))


def by_transformers_js(model: TorchDecoder, folder: Path, fmt: str, quant: str, asked: dict[str, Any]) -> str:
    answers = []
    for turn, ids in zip(asked["messages"][:2], asked["prompts"][:2], strict=True):
        told = transformers_js(
            {"task": TEXT, "folder": str(folder), "dtype": JS_DTYPES[quant], "texts": ["a b\n"], "messages": turn,
             "max_new_tokens": TOKENS}
        )  # fmt: skip
        words = asked["tokenizer"]
        if told["rendered"] != words.apply_chat_template(turn, tokenize=False, add_generation_prompt=True):
            return "another template"
        answers.append(told["new_ids"])
        assert words(told["rendered"], add_special_tokens=False)["input_ids"] == ids
    return by_text(model, answers, quant, asked, near(folder, quant, model, asked))


def near(folder: Path, quant: str, model: TorchDecoder, asked: dict[str, Any]) -> float:
    """KL of the graph itself: two clients read one file."""
    return compare_logits(model, OnnxDecoder(folder / ONNX_FILES[quant], 2), asked["texts"])["kl"]


def by_llama_cpp(model: TorchDecoder, folder: Path, fmt: str, quant: str, asked: dict[str, Any]) -> str:
    from famc.work.llama_cpp import LlamaDecoder

    decoder = LlamaDecoder(folder / gguf_name(folder.name.removesuffix("-GGUF"), quant), 2, 256)
    words = asked["tokenizer"]
    for turn, ids in zip(asked["messages"], asked["prompts"], strict=True):
        text = words.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, chat_template=decoder.template
        )
        if decoder.tokenize_special(text) != ids:
            return "other ids of a rendered conversation"
    return judged(model, decoder, quant, asked)


CLIENTS = {
    "transformers": by_transformers,
    "onnxruntime": by_onnxruntime,
    "onnxruntime-genai": by_genai,
    "transformers.js": by_transformers_js,
    "llama.cpp": by_llama_cpp,
}
