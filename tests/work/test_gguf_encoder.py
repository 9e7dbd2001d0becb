"""Embedders' and rerankers' GGUF files hold what the folder holds; llama.cpp (slow) gives torch's vectors and scores.

The slow tests import llama_cpp without asking whether it is there: .ci/llama-cpp.sh installs it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from safetensors.torch import load_file
from test_card_release import CARD, RELEASE, in_a_clean_room
from test_encoder_release import PAIRS, front
from test_gguf import MULTILINGUAL, copy, family_tokenizer, field, tensors
from tiny_artifacts import content, make_data
from tiny_encoder import DOCUMENTS, QUERIES, WORDS, encoder_tokenizer, make_tiny_encoder
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from famc.errors import StepFailed
from famc.graph.published import default_gate
from famc.job import Job
from famc.steps.exports import CAPABILITIES, capability, gguf_name
from famc.work import card, export, gate, parity, release
from famc.work import encoder_folder as family
from famc.work.arch import new_config
from famc.work.compare_vectors import compare_embedder, compare_reranker
from famc.work.encoder_session import TorchEncoder, encode, gguf_ids
from famc.work.gguf_build import build_gguf, tensor_errors

EMBED, RANK = "feature-extraction", "text-ranking"
ARCHS = {"qwen3": "qwen3", "qwen3-bidirectional": "qwen3", "bert": "bert", "modernbert": "modern-bert"}
POOLING = {"mean_tokens": 1, "cls_token": 2, "lasttoken": 3}
FAMILY = ("qwen3", "bert", "modernbert")
RANKS = ("qwen3", "modernbert")
TEXTS = (
    QUERIES + DOCUMENTS + [" ".join(WORDS[i : i + 60]) for i in range(0, 50, 10)]
)  # beyond ModernBERT's window
MARKS = {"start": 1, "end": 2}  # <|im_start|>, <|im_end|>


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Embedders by kind; `rank-KIND`: rerankers."""
    root = tmp_path_factory.mktemp("models")
    made = {kind: make_tiny_encoder(root / kind, kind) for kind in ARCHS}  # type: ignore[arg-type]
    for kind in RANKS:
        made[f"rank-{kind}"] = make_tiny_encoder(root / f"rank-{kind}", kind, labels=1, steps=40)  # type: ignore[arg-type]
    return made


def task_of(name: str) -> str:
    return RANK if name.startswith("rank") else EMBED


# --- what is in the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHS)
def test_an_embedders_file_says_how_it_pools_and_what_stands_around_a_text(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    facts = build_gguf(folders[kind], tmp_path / "m.gguf", "q8_0", name="finder", task=EMBED)
    reader, arch = GGUFReader(tmp_path / "m.gguf"), ARCHS[kind]
    said = json.loads((folders[kind] / "1_Pooling/config.json").read_text())
    (mode,) = (mode for mode, at in POOLING.items() if said[f"pooling_mode_{mode}"])
    wanted = {
        "general.architecture": arch, "general.name": "finder", f"{arch}.pooling_type": POOLING[mode],
        f"{arch}.attention.causal": None if kind == "qwen3" else False, f"{arch}.context_length": 128,
        "tokenizer.ggml.add_bos_token": not kind.startswith("qwen3"), "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.eos_token_id": MARKS["end"], "tokenizer.chat_template": None,
        "tokenizer.chat_template.rerank": None, "tokenizer.ggml.padding_token_id": 0,
    }  # fmt: skip
    if not kind.startswith("qwen3"):
        wanted |= {"tokenizer.ggml.bos_token_id": MARKS["start"], "tokenizer.ggml.seperator_token_id": 2}
        wanted |= {f"{arch}.attention.layer_norm_epsilon": pytest.approx(1e-12 if kind == "bert" else 1e-5)}
    if kind == "modernbert":
        wanted |= {f"{arch}.attention.sliding_window": 16}
        wanted |= {f"{arch}.attention.sliding_window_pattern": [False, True, True, False]}
    assert {name: field(reader, name) for name in wanted} == wanted
    assert facts["fallback"] == 0  # positions and types of tokens are no matrices that it multiplies with
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    if kind == "bert":
        assert kinds["position_embd.weight"] == kinds["token_types.weight"] == Type.F32
    assert kinds["token_embd.weight"] == Type.Q8_0


@pytest.mark.parametrize("name", [*ARCHS, *(f"rank-{kind}" for kind in RANKS)])
def test_weights_are_the_sources(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    facts = build_gguf(folders[name], tmp_path / "m.gguf", "f16", name="x", task=task_of(name))
    source = load_file(folders[name] / "model.safetensors")
    errors = tensor_errors(tmp_path / "m.gguf", folders[name], task_of(name))
    assert len(errors) == len(source) == facts["tensors"]
    assert max(errors.values()) < 1e-7
    zeros = source["score.weight"].numel() if name == "rank-qwen3" else 0
    assert facts["parameters"] == sum(t.numel() for t in source.values()) + zeros


def test_a_score_of_one_row_stands_beside_zeros(folders: dict[str, Path], tmp_path: Path) -> None:
    """llama.cpp's Qwen3 takes a softmax of the labels, which of a single one says 1 of every pair."""
    build_gguf(folders["rank-qwen3"], tmp_path / "m.gguf", "q8_0", name="x", task=RANK)
    kind, rows = tensors(tmp_path / "m.gguf")["cls.output.weight"]
    score = load_file(folders["rank-qwen3"] / "model.safetensors")["score.weight"].numpy()
    assert (kind, rows.shape) == (Type.F32, (2, 64))
    assert np.array_equal(rows, np.concatenate([score, np.zeros_like(score)]))
    reader = GGUFReader(tmp_path / "m.gguf")
    assert field(reader, "qwen3.pooling_type") == 4
    assert field(reader, "qwen3.classifier.output_labels") == ["relevant", "other"]
    assert field(reader, "tokenizer.chat_template.rerank") == "{query}<|im_start|>{document}<|im_end|>"


def test_modernberts_pair_and_pooling(folders: dict[str, Path], tmp_path: Path) -> None:
    build_gguf(folders["rank-modernbert"], tmp_path / "m.gguf", "f16", name="x", task=RANK)
    reader = GGUFReader(tmp_path / "m.gguf")
    pair = "<|im_start|>{query}<|im_end|>{document}<|im_end|>"
    assert field(reader, "tokenizer.chat_template.rerank") == pair
    pooling = json.loads((folders["rank-modernbert"] / "config.json").read_text())["classifier_pooling"]
    assert field(reader, "modern-bert.classifier.pooling_type") == {"mean": 1, "cls": 2}[pooling]


def test_heads_of_pretraining_are_left_out(tmp_path: Path) -> None:
    """An embedder that was saved with the head that predicted words."""
    from transformers import BertConfig, BertForMaskedLM

    folder = make_tiny_encoder(tmp_path / "m", "bert")
    config = BertConfig.from_pretrained(folder)
    BertForMaskedLM(config).save_pretrained(folder)
    facts = build_gguf(folder, tmp_path / "m.gguf", "f16", name="x", task=EMBED)
    assert facts["tensors"] == 5 + 16 * 2
    assert max(tensor_errors(tmp_path / "m.gguf", folder, EMBED).values()) < 1e-7


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("rank-qwen3", {"is_causal": False}, "is_causal"),
        ("rank-qwen3", {"id2label": {"0": "a", "1": "b"}}, "2 labels"),
        ("rank-qwen3", {"architectures": ["BertForSequenceClassification"]}, "knows Qwen3ForSequenceClassification"),
        ("qwen3", {"architectures": ["LlamaModel"]}, "doesn't know LlamaModel"),
        ("qwen3", {"hidden_act": "relu"}, "the activation relu"),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE of type dynamic"),
        ("qwen3", {"attention_bias": True}, "biases"),
        ("qwen3", {"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "tensors unknown"),
        ("bert", {"hidden_act": "relu"}, "the activation relu"),
        ("bert", {"is_decoder": True}, "a causal mask"),
        ("modernbert", {"hidden_activation": "relu"}, "the activation relu"),
        ("modernbert", {"norm_bias": True}, "biases"),
        ("modernbert", {"num_hidden_layers": 5}, "tensors missing"),
    ],
)  # fmt: skip
def test_refuses_what_llama_cpp_would_do_otherwise(
    folders: dict[str, Path], tmp_path: Path, name: str, change: dict[str, Any], said: str
) -> None:
    model = copy_all(folders[name], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    if change.get("num_hidden_layers") == 5:
        config.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=said):
        build_gguf(model, tmp_path / "out" / "m.gguf", "f16", name="x", task=task_of(name))
    assert content(tmp_path / "out") == {}


def copy_all(source: Path, target: Path) -> Path:
    """With an embedder's folders of modules."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            copy(path, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_refuses_a_tokenizer_of_words(folders: dict[str, Path], tmp_path: Path) -> None:
    """Known to the checks as well: tests/spec/test_mistakes.py."""
    model = copy_all(folders["qwen3"], tmp_path / "model")
    tokenizer = encoder_tokenizer("qwen3")
    tokenizer.backend_tokenizer.normalizer = family.WORDS
    family.save_tokenizer(tokenizer, model, 96)
    with pytest.raises(ValueError, match=r"the normaliser NFC\+Replace\+Replace\+Lowercase\+Strip\+Prepend"):
        build_gguf(model, tmp_path / "m.gguf", "f16", name="x", task=EMBED)


@pytest.mark.parametrize(
    ("single", "pair", "said"),
    [
        ("<|im_end|> <|im_start|> $A", "$A $B", "before a text"),
        ("$A <|im_end|>", f"$A {WORDS[0][0]} $B", "no tokens that were added"),
    ],
)
def test_refuses_marks_that_llama_cpp_can_not_write(
    folders: dict[str, Path], tmp_path: Path, single: str, pair: str, said: str
) -> None:
    model = copy_all(folders["rank-qwen3"], tmp_path / "model")
    tokenizer = encoder_tokenizer("qwen3")
    used = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>", WORDS[0][0])]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=used
    )
    tokenizer.save_pretrained(model)
    with pytest.raises(ValueError, match=said):
        build_gguf(model, tmp_path / "m.gguf", "f16", name="x", task=RANK)


def test_an_embedder_that_does_not_say_how_it_pools(folders: dict[str, Path], tmp_path: Path) -> None:
    model = copy_all(folders["qwen3"], tmp_path / "model")
    (model / "modules.json").unlink()
    with pytest.raises(StepFailed, match=r"no modules\.json"):
        build_gguf(model, tmp_path / "m.gguf", "f16", name="x", task=EMBED)


def test_capabilities() -> None:
    """Every row is made, compared and loaded below."""
    rows = [row for row in CAPABILITIES if (row.format, row.status) == ("gguf", "yes")]
    for task, archs in ((EMBED, FAMILY), (RANK, RANKS)):
        made = {(arch, row.quant) for row in rows if row.task == task for arch in row.archs}
        assert made == {(arch, quant) for arch in archs for quant in LIMITS if quant != "f32"}
    for quant in ("f16", "q8_0", "q4_0", "q4_k_m"):
        for arch in ("qwen3", "bert", "modernbert"):
            row = capability(arch, EMBED, "gguf", quant)
            assert row is not None
            assert (row.status, row.runtimes) == ("yes", ("llama.cpp",))
        ranks = {a: capability(a, RANK, "gguf", quant) for a in ("qwen3", "modernbert", "bert", "llama")}
        assert {a: row and row.status for a, row in ranks.items()} == {
            "qwen3": "yes", "modernbert": "yes", "bert": None, "llama": "later",
        }  # fmt: skip
        asked = default_gate(f"gguf-{quant}", EMBED).parity
        assert asked is not None
        assert asked.cosine == (0.999 if quant in ("f16", "q8_0") else 0.95)


# --- llama.cpp ------------------------------------------------------------------------------------------------

# mean cosine to torch at least, of random weights
LIMITS = {"f32": 0.999999, "f16": 0.99999, "q8_0": 0.999, "q4_k_m": 0.99, "q4_0": 0.95}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pooling"),
    [(kind, pooling) for kind in ARCHS for pooling in POOLING if (kind, pooling) != ("qwen3", "cls_token")],
)
def test_vectors_are_torchs(tmp_path: Path, kind: Any, pooling: str) -> None:
    folder = make_tiny_encoder(tmp_path / "model", kind, pooling=pooling)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for quant, least in LIMITS.items():
        path = tmp_path / f"{quant}.gguf"
        build_gguf(folder, path, quant, name="x", task=EMBED)
        found = compare_embedder(folder, path, TEXTS, tokenizer, 1)
        assert found["vectors"] == len(set(TEXTS))
        assert found["cosine_mean"] > least, quant
        if quant in ("f32", "f16", "q8_0"):
            assert found["cosine_min"] > (0.998 if quant == "q8_0" else 0.999), quant
            assert found["kendall_tau"] > 0.95, quant
        assert gguf_ids(folder, path, TEXTS, EMBED, 1) == {"tokenizer": "exact"}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "task"), [(arch, EMBED) for arch in FAMILY] + [(a, RANK) for a in RANKS])
def test_ids_of_the_familys_own_tokenizer(tmp_path: Path, arch: str, task: str) -> None:
    """As the stages `embed` and `rerank` save it, on languages and code."""
    from famc.work.llama_cpp import LlamaEncoder

    code = Path(family.__file__).read_text(encoding="utf-8")
    family_tokenizer([*MULTILINGUAL, code], vocab=900).save_pretrained(tmp_path / "tokenizer")
    tokenizer = family.encoder_tokenizer(tmp_path / "tokenizer", arch, words=False)
    shape = {"vocab": len(tokenizer) + 6, "hidden": 64, "ffn": 128, "layers": 2, "heads": 4, "kv_heads": 2}
    shape |= {"head_dim": 16, "context": 2048, "rope_theta": 1e4, "tie": True, "moe": None}  # type: ignore[dict-item]
    config = new_config(shape | {"arch": arch}, tokenizer)
    config.num_labels = 1
    torch.manual_seed(0)
    kind: Any = AutoModel if task == EMBED else AutoModelForSequenceClassification
    model = kind.from_config(config, dtype=torch.float32)
    if task == EMBED:
        said: Any = {"pooling": "last", "prompts": {}, "mrl": ()}
        family.save_embedder(model, tokenizer, tmp_path / "m", context=2048, **said)
    else:
        family.save_reranker(model, tokenizer, tmp_path / "m", context=2048)
    build_gguf(tmp_path / "m", tmp_path / "m.gguf", "f16", name="x", task=task)
    texts = [*MULTILINGUAL, code, "a<|im_end|>b", "<think>", "x\n\n"]
    assert gguf_ids(tmp_path / "m", tmp_path / "m.gguf", texts, task, 1) == {"tokenizer": "exact"}
    encoder, source = LlamaEncoder(tmp_path / "m.gguf", 1, 512), AutoTokenizer.from_pretrained(tmp_path / "m")
    if task == RANK:
        assert (
            encoder.tokenize_pair("{document}", code) == source(code, code)["input_ids"]
        )  # as llama-server fills in
    else:
        assert encoder.tokenize_marked(code) == source(code)["input_ids"]
        found = compare_embedder(tmp_path / "m", tmp_path / "m.gguf", texts, source, 1)
        assert found["cosine_min"] > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("kind", RANKS)
@pytest.mark.parametrize("quant", LIMITS)
def test_scores_are_torchs(folders: dict[str, Path], tmp_path: Path, kind: str, quant: str) -> None:
    folder = folders[f"rank-{kind}"]
    build_gguf(folder, tmp_path / "m.gguf", quant, name="x", task=RANK)
    found = compare_reranker(folder, tmp_path / "m.gguf", TEXTS, AutoTokenizer.from_pretrained(folder), 1)
    limit, tau = {"f32": (0.01, 0.98), "f16": (0.01, 0.98), "q8_0": (0.1, 0.95)}.get(quant, (1.0, 0.85))
    assert 0 < found["max_logit_difference"] < limit
    assert found["kendall_tau"] > tau
    assert gguf_ids(folder, tmp_path / "m.gguf", TEXTS, RANK, 1) == {"tokenizer": "exact"}
    if quant in ("q4_0", "q4_k_m"):  # whatever llama.cpp's quantiser makes of the rest
        assert {t.name: t.tensor_type for t in GGUFReader(tmp_path / "m.gguf").tensors}[
            "cls.output.weight"
        ] == Type.F32


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHS)
def test_the_python_packages_own_class_gives_the_vectors(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """As a user calls it: text in, marks and pooling from the file."""
    from llama_cpp import Llama

    build_gguf(folders[kind], tmp_path / "m.gguf", "f16", name="x", task=EMBED)
    size = {"n_ctx": 96, "n_batch": 96, "n_ubatch": 96}
    model = Llama(str(tmp_path / "m.gguf"), embedding=True, verbose=False, **size)
    found = np.array(model.embed(DOCUMENTS, normalize=True))
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    wanted = TorchEncoder(folders[kind], 1, EMBED).outputs(encode(tokenizer, DOCUMENTS, max_length=96))
    assert (found * wanted).sum(axis=1).min() > 0.9999


@pytest.mark.slow
def test_marks_that_a_text_holds_and_lengths(folders: dict[str, Path], tmp_path: Path) -> None:
    from famc.work.llama_cpp import LlamaEncoder

    build_gguf(folders["qwen3"], tmp_path / "m.gguf", "f16", name="x", task=EMBED)
    encoder = LlamaEncoder(tmp_path / "m.gguf", 1, 512)
    assert encoder.context == 128  # the model's
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen3"])
    for text in ("a<|im_end|>b", "<|im_start|>", ""):
        assert encoder.tokenize_marked(text) == tokenizer(text)["input_ids"]
    batch = encode(tokenizer, TEXTS[:4], max_length=96)
    assert np.allclose(np.linalg.norm(encoder.outputs(batch), axis=1), 1)
    one = {name: values[2:3] for name, values in batch.items()}
    assert np.allclose(
        encoder.outputs(one)[0], encoder.outputs(batch)[2], atol=1e-6
    )  # nothing of the row before
    long = {"input_ids": np.full((1, 129), 5), "attention_mask": np.ones((1, 129), dtype=np.int64)}
    with pytest.raises(ValueError, match="129 tokens for a context of 128"):
        encoder.outputs(long)
    with pytest.raises(ValueError, match="how two texts stand"):
        encoder.tokenize_pair("a", "b")


@pytest.mark.slow
def test_scores_that_the_sigmoid_can_not_hold_are_equal(folders: dict[str, Path], tmp_path: Path) -> None:
    """llama-server passes on a float: what users can't tell apart, parity must not."""
    from safetensors.torch import save_file

    from famc.work.llama_cpp import LlamaEncoder

    model = copy_all(folders["rank-qwen3"], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["score.weight"] *= 1000
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    build_gguf(model, tmp_path / "m.gguf", "f16", name="x", task=RANK)
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = encode(tokenizer, [QUERIES[0]] * len(DOCUMENTS), DOCUMENTS, max_length=96)
    found = LlamaEncoder(tmp_path / "m.gguf", 1, 512).outputs(batch)
    wanted = TorchEncoder(model, 1, RANK).outputs(batch)
    assert found.shape == wanted.shape == (len(DOCUMENTS), 1)
    assert np.isfinite(found).all()
    assert (wanted > 20).sum() > 1
    assert np.ptp(found[wanted > 20]) == 0


@pytest.mark.slow
def test_ids_that_differ_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    build_gguf(folders["qwen3"], tmp_path / "m.gguf", "f16", name="x", task=EMBED)
    model = copy_all(folders["qwen3"], tmp_path / "model")
    tokenizer = encoder_tokenizer("qwen3")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    tokenizer.save_pretrained(model)
    assert gguf_ids(model, tmp_path / "m.gguf", TEXTS, EMBED, 1) == {"tokenizer": "differs"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "modernbert", "rank-qwen3", "rank-modernbert"])
def test_from_the_export_to_a_release_whose_card_runs(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    task, arch, quants = task_of(name), name.removeprefix("rank-"), ("f16", "q4_k_m")
    model = copy_all(folders[name], tmp_path / "model")
    if task == EMBED:
        prompts = {"query": "it's sought: ", "document": ""}
        (model / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    pairs = make_data(tmp_path / "pairs", PAIRS)
    inputs: dict[str, Path] = {}

    def step(module: Any, role: str, kind: str, params: dict[str, Any], given: dict[str, Path]) -> Path:
        out = tmp_path / role
        out.mkdir()
        module.run(Job.for_test(role, kind, params, inputs={r: (r, "k") for r in given}), given, out)
        return out

    for quant in quants:
        words: dict[str, Any] = {"format": "gguf", "quant": quant, "task": task, "name": "pocket-find"}
        label = f"gguf-{quant}"
        made = inputs[f"export.{label}"] = step(export, f"export.{label}", "export", words, {"model": model})
        assert {p.name for p in made.iterdir()} == {gguf_name("pocket-find", quant)}
        words |= {"context": 64, "texts": 8, "pairs": 30}
        given = {"model": model, "export": made, "pairs.p": pairs}
        inputs[f"parity.{label}"] = step(parity, f"parity.{label}", "parity", words, given)
        own = default_gate(label, task, pairs=True).parity
        assert own is not None
        asked = {"parity": own.model_dump(exclude_none=True)}
        step(gate, f"gate.{label}", "gate", asked, {"parity": inputs[f"parity.{label}"]})
        verdict = json.loads((tmp_path / f"gate.{label}/verdict.json").read_text())
        assert {c["what"] for c in verdict["checks"]} >= {"tokenizer", "kendall_tau", "ndcg_drop"}
        assert all(c["passed"] for c in verdict["checks"])
    exports = {f"gguf-{q}": {"format": "gguf", "quant": q} for q in quants}
    params = CARD | {"repo": "me/pocket-find-GGUF", "base": "me/pocket-find", "exports": exports}
    params |= {"shape": CARD["shape"] | {"arch": arch, "context": 96}}  # type: ignore[operator]
    given = {r: p for r, p in inputs.items() if r.startswith("parity")} | {"model": model}
    inputs["card"] = step(card, "card", "card", params, given)
    out = tmp_path / "pocket-find-GGUF"
    out.mkdir()
    given = {r: p for r, p in inputs.items() if not r.startswith("parity")} | {"model": model}
    facts = release.run(
        Job.for_test("r", "release", RELEASE | {"format": "gguf", "max_context": 96}), given, out
    )
    assert facts["ggufs"] == 2

    files = {p.name for p in out.iterdir()}
    wanted = {"README.md", "release.json", *(gguf_name("pocket-find", q) for q in quants)}
    assert files == wanted | ({"Modelfile"} if task == EMBED else set())
    text = (out / "README.md").read_text()
    assert front(text)["library_name"] == "gguf"
    assert "sentence-transformers" not in front(text)["tags"]
    assert "llama-cli" not in text
    assert re.search(r"\n{4,}", text) is None
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    if task == EMBED:
        smallest = gguf_name("pocket-find", "q4_k_m")
        assert (out / "Modelfile").read_text() == f"FROM ./{smallest}\nPARAMETER num_ctx 96\n"
        assert "llama-server -m pocket-find-F16.gguf --embedding -c 96 -b 96 -ub 96" in text
        assert "it\\u0027s sought: How do I" in text  # an apostrophe would end the shell's word
        (block,) = blocks
        assert -1 <= float(in_a_clean_room(out, block)) <= 1
    else:
        assert "llama-server -m pocket-find-F16.gguf --rerank -c 96 -b 96 -ub 96" in text
        assert ("exp(-score)" in text) == (arch == "qwen3")
        assert blocks == []
