"""Embedders, rerankers, masked LMs and T5: parity on held-out pairs, the released folder as its clients load it, and the
card's code, which runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from test_card_release import CARD, RELEASE, in_a_clean_room
from tiny_artifacts import make_data
from tiny_encoder import DOCUMENTS, QUERIES, encoder_tokenizer, make_tiny_encoder
from tokenizers import Regex, normalizers
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from famc.errors import StepFailed
from famc.job import Job
from famc.steps.exports import capability, export_params
from famc.work import card, export, gate, parity, release
from famc.work.compare_vectors import Pairs, compare_ndcg, ndcg
from famc.work.encoder_session import prompts_of

PAIRS = [
    {"query": query, "positives": json.dumps([document]), "negatives": "[]"}
    for query, document in zip(QUERIES, DOCUMENTS, strict=False)
]
PROMPTS = {"query": "find: ", "document": ""}
TASKS = {
    "embed": "feature-extraction",
    "rerank": "text-ranking",
    "mask": "fill-mask",
    "t5": "text2text-generation",
}
LABELS = {
    "embed": ("safetensors-fp32", "onnx-fp32", "onnx-int4"),
    "rerank": ("safetensors-bf16", "onnx-int4"),
    "t5": ("safetensors-bf16", "onnx-fp32"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make(folder: Path, what: str) -> Path:
    """A tiny model folder of a kind. The embedder's tokenizer lower-cases, which the family's does not."""
    if what in ("embed", "rerank"):
        ranks = {"labels": 1, "steps": 40} if what == "rerank" else {}
        make_tiny_encoder(folder, "qwen3", **ranks)
        if what == "embed":
            words = encoder_tokenizer("qwen3").backend_tokenizer
            words.normalizer = normalizers.Sequence(
                [normalizers.Replace(Regex("_"), " "), normalizers.Lowercase(), normalizers.NFC()]
            )
            words.save(str(folder / "tokenizer.json"))
            said = {"prompts": PROMPTS, "similarity_fn_name": "cosine", "matryoshka_dims": [32, 64]}
            (folder / "config_sentence_transformers.json").write_text(json.dumps(said))
        return folder
    tokenizer = encoder_tokenizer("bert" if what == "mask" else "qwen3")
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 2}
    torch.manual_seed(0)
    if what == "mask":
        wide = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        model: Any = BertForMaskedLM(BertConfig(**shape, **wide, pad_token_id=tokenizer.pad_token_id))
    else:
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        shape = {
            "vocab_size": len(tokenizer),
            "num_layers": 1,
            "d_model": 32,
            "d_ff": 64,
            "num_heads": 2,
            "d_kv": 16,
        }
        model = T5ForConditionalGeneration(
            T5Config(**shape, **ends, decoder_start_token_id=tokenizer.pad_token_id)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def step(module: Any, out: Path, kind: str, params: dict[str, Any], inputs: dict[str, Path]) -> Path:
    out.mkdir(parents=True)
    module.run(Job.for_test(out.name, kind, params, inputs={r: (r, "k") for r in inputs}), inputs, out)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By kind of model: all that its release needs, by role."""
    root = tmp_path_factory.mktemp("made")
    text = make_data(root / "text", [{"text": " ".join(DOCUMENTS[i : i + 6])} for i in range(0, 18, 6)])
    pairs = make_data(root / "pairs", PAIRS)
    found: dict[str, dict[str, Path]] = {}

    def get(what: str) -> dict[str, Path]:
        if what in found:
            return found[what]
        here = root / what
        both = {"model": make(here / "model", what), "tokenizer": root}
        held = {"pairs.p": pairs} if what in ("embed", "rerank") else {"text.t": text}
        for label in LABELS.get(what, ("safetensors-bf16",)):
            fmt, quant = label.split("-")
            words = {"format": fmt, "quant": quant, "task": TASKS[what]}
            both[f"export.{label}"] = step(export, here / label, "export", words, {"model": both["model"]})
            words |= {"context": 64, "texts": 8, "prompts": 2, "max_new_tokens": 4, "pairs": 30}
            inputs = {"model": both["model"], "export": both[f"export.{label}"], **held}
            both[f"parity.{label}"] = step(parity, here / f"parity.{label}", "parity", words, inputs)
        params = CARD | {"variant": what, "repo": f"me/pocket-{what}"}
        params |= {
            "exports": {
                e: dict(zip(("format", "quant"), e.split("-"), strict=True)) for e in LABELS.get(what, ())
            }
        }
        inputs = {r: p for r, p in both.items() if r == "model" or r.startswith("parity")}
        both["card"] = step(card, here / "card", "card", params, inputs)
        found[what] = both
        return both

    return get


def assemble(out: Path, inputs: dict[str, Path]) -> dict[str, Any]:
    out.mkdir(parents=True)
    kept = {r: p for r, p in inputs.items() if not r.startswith("parity")}
    return release.run(Job.for_test("xs/x/release", "release", RELEASE), kept, out)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["parity"]


def test_an_embedders_parity_reads_pairs_with_the_models_own_words(made):
    exact = results(made("embed")["parity.onnx-fp32"])
    assert (exact["queries"], exact["documents"], exact["vectors"]) == (5, 5, 10)
    assert exact["tokenizer"] == "exact"
    assert "template" not in exact
    assert exact["ndcg"] == exact["ndcg_source"] > 0
    assert exact["ndcg_drop"] == 0
    few = results(made("embed")["parity.onnx-int4"])
    assert 0.9 < few["cosine_mean"] < 1
    assert few["ndcg_drop"] == pytest.approx(1 - few["ndcg"] / few["ndcg_source"])
    assert results(made("embed")["parity.safetensors-fp32"])["cosine_min"] == pytest.approx(1)


def test_a_gate_asks_for_ndcg_and_never_passes_without_it(made, tmp_path):
    inputs = {"parity": made("embed")["parity.onnx-fp32"]}
    asked = {"parity": {"ndcg": 0.0, "tokenizer": "exact", "cosine": 0.999}}
    step(gate, tmp_path / "a", "gate", asked, inputs)
    (check,) = [
        c for c in json.loads((tmp_path / "a/verdict.json").read_text())["checks"] if c["what"] == "ndcg_drop"
    ]
    assert check["relation"] == "<="
    with pytest.raises(StepFailed, match="template is nan"):
        step(gate, tmp_path / "b", "gate", {"parity": {"template": "exact"}}, inputs)


def test_a_tokenizer_that_a_folder_lost_is_told(made, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(made("embed")["export.safetensors-fp32"], folder)
    encoder_tokenizer("qwen3").backend_tokenizer.save(str(folder / "tokenizer.json"))
    model = made("embed")["model"]
    assert parity.own_ids(model, folder, ["Some_Name"]) == {"tokenizer": "differs"}
    assert parity.own_ids(model, model, ["Some_Name"]) == {"tokenizer": "exact"}


@pytest.mark.parametrize("what", ["mask", "t5"])
def test_parity_of_masked_lms_and_t5(made, what):
    found = results(made(what)["parity.safetensors-bf16"])
    assert 0 < found["kl"] < 0.01
    assert found["perplexity_ratio"] == pytest.approx(1, abs=0.05)
    assert found["tokenizer"] == "exact"
    assert ("greedy_equal" in found) == (what == "t5")
    if what == "t5":
        found = results(made(what)["parity.onnx-fp32"])
        assert (found["greedy_equal"], found["tokenizer"]) == (1, "exact")
        assert 0 <= found["kl"] < 1e-6


@pytest.mark.parametrize("what", TASKS)
def test_the_folder_is_what_clients_load(made, tmp_path, what):
    out = tmp_path / f"pocket-{what}"
    facts = assemble(out, made(what))
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    wanted = {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "release.json",
    }
    wanted |= {
        "embed": {
            "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json",
            "onnx/model.onnx", "onnx/model_q4.onnx",
        },
        "rerank": {"onnx/model_q4.onnx"}, "mask": set(), "t5": {"generation_config.json", "onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx"},
    }[what]  # fmt: skip
    assert files == wanted
    words = json.loads((out / "tokenizer_config.json").read_text())
    assert "chat_template" not in words
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert facts["dtype"] in ("float32", "bfloat16")
    if what == "embed":
        assert prompts_of(out) == PROMPTS


def test_a_release_without_prompts_is_refused(made, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(made("embed")["model"], model)
    (model / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    with pytest.raises(StepFailed, match="prompts missing at export: no prompt for document"):
        assemble(tmp_path / "out", {"model": model, "tokenizer": model})


def test_other_pooling_than_the_weights_were_measured_with_is_not_released(made, tmp_path, monkeypatch):
    """sentence-transformers reads the released files, and must give what the model gives."""
    from famc.work import try_encoder

    monkeypatch.setattr(try_encoder, "_vectors", lambda folder: np.zeros((2, 64)))
    with pytest.raises(StepFailed, match="sentence-transformers gives vectors of out that differ by"):
        assemble(tmp_path / "out", {"model": made("embed")["model"], "tokenizer": made("embed")["model"]})


def front(text: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(text.split("---\n")[1])


@pytest.mark.parametrize(
    ("what", "tag", "library", "blocks"),
    [
        ("embed", "sentence-similarity", "sentence-transformers", 2),
        ("rerank", "text-ranking", "sentence-transformers", 2),
        ("mask", "fill-mask", "transformers", 1),
        ("t5", "text2text-generation", "transformers", 1),
    ],
)
def test_the_card_is_about_its_task_and_its_code_runs(made, tmp_path, what, tag, library, blocks):
    out = tmp_path / f"pocket-{what}"
    assemble(out, made(what))
    text = (out / "README.md").read_text()
    assert (front(text)["pipeline_tag"], front(text)["library_name"]) == (tag, library)
    assert ("sentence-transformers" in front(text)["tags"]) == (library == "sentence-transformers")
    found = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(found) == blocks
    for block in found:
        in_a_clean_room(out, block)
    assert re.search(r"\n{4,}", text) is None
    assert ("Five of its answers" in text) == (what == "t5")
    if what == "embed":
        assert '| query | `"find: "` |' in text
        assert "truncate_dim=32" in text
        assert '"find: " + "How do I' in text
        measured = results(made("embed")["parity.onnx-int4"])
        assert f"| onnx-int4 | {measured['cosine_mean']:.4g} | {measured['cosine_min']:.4g} |" in text
        assert "| nDCG@10 |" in text


# --- by hand ----------------------------------------------------------------------------------------------


def test_ndcg_by_hand():
    relevant = np.array([[True, False, False], [False, True, True], [True, False, False]])
    scores = np.array([[3.0, 2, 1], [3, 2, 1], [1, 1, 1]])
    second = (1 / np.log2(3) + 1 / 2) / (1 + 1 / np.log2(3))
    assert ndcg(scores, relevant).tolist() == pytest.approx(
        [1, second, 1 / 2]
    )  # of equals, the right one is last
    assert ndcg(np.array([[1.0, np.nan, 0]]), relevant[:1]).tolist() == pytest.approx([np.nan], nan_ok=True)
    found = compare_ndcg(scores[:1], -scores[:1], relevant[:1])
    assert found == pytest.approx({"ndcg": 0.5, "ndcg_source": 1, "ndcg_drop": 0.5})


def test_pairs_are_cut_and_a_query_never_meets_its_own_answers():
    examples = [{"query": f"q{i}", "positives": [f"a{i}", f"b{i}"]} for i in range(5)]
    pairs = Pairs.of([*examples, {"query": " ", "positives": ["x"]}], 7)
    assert pairs.queries == ("q0", "q1", "q2")
    assert sorted(pairs.passages) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert pairs.relevant().sum() == 6
    rows = pairs.candidates(4)
    assert [row[0] for row in rows] == ["a0", "a1", "a2"]
    assert all(len(set(row)) == 4 and f"b{i}" not in row for i, row in enumerate(rows))
    assert rows == Pairs.of(examples[:3], 7).candidates(4)


def test_capabilities_and_recipes():
    for task in ("feature-extraction", "text-ranking"):
        for arch in ("qwen3", "bert", "modernbert"):
            assert all(capability(arch, task, "onnx", q).status == "yes" for q in ("fp32", "int8", "int4"))
        assert capability("llama", task, "onnx", "int4").status == "later"
    assert capability("bert", "fill-mask", "safetensors", "bf16").status == "yes"
    assert capability("t5", "text2text-generation", "safetensors", "fp32").status == "yes"
    assert capability("t5", "text2text-generation", "onnx", "int4") is None
    from famc.cost.shape import Shape
    from famc.spec.family import Export

    shape = Shape.__new__(Shape)
    object.__setattr__(shape, "hidden", 256)
    wanted = Export.model_validate({"format": "onnx", "quant": ("int8", "int4"), "variants": ("v",)})
    assert export_params(wanted, "int8", shape, "text-ranking") == {"format": "onnx", "quant": "int8"}
    assert export_params(wanted, "int4", shape, "text-ranking") == {
        "format": "onnx", "quant": "int4", "block_size": 16, "algorithm": "k_quant", "symmetric": False,
    }  # fmt: skip
