"""An embedder's or reranker's graph is the model: torch's vectors and logits at shapes that the trace never saw; the
same bytes every time; what would come out wrong is refused, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tiny_artifacts import make_data
from tiny_encoder import DOCUMENTS, QUERIES, encoder_tokenizer, make_tiny_encoder
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from famc.errors import StepFailed
from famc.job import Job
from famc.work import export, gate, onnx_encoder, onnx_file, parity
from famc.work.compare_vectors import (
    compare_embedder,
    compare_embedders,
    compare_rankings,
    compare_reranker,
    compare_rerankers,
    kendall_tau,
    split,
    unit,
)
from famc.work.encoder_session import INPUTS, OnnxEncoder, TorchEncoder, encode, longest
from famc.work.onnx_encoder import Pooling, build_encoder, read_pooling

EMBED, RANK = "feature-extraction", "text-ranking"
TEXTS = QUERIES + DOCUMENTS
# every kind, every pooling, with and without unit length
EMBEDDERS = {
    "bert": ("cls_token", False),
    "modernbert": ("mean_tokens", True),
    "qwen3": ("lasttoken", True),
    "qwen3-bidirectional": ("mean_tokens", False),
}
MODES = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def batches(kind: Any, pairs: bool) -> list[dict[str, np.ndarray]]:
    """Batches of 1 and 3 that the trace, of 2 x 7, never saw, with padding on either side."""
    made = []
    for side in ("right", "left"):
        tokenizer = encoder_tokenizer(kind)
        tokenizer.padding_side = side
        for texts in ([DOCUMENTS[8]], [DOCUMENTS[0], DOCUMENTS[8], DOCUMENTS[3]]):
            others = [QUERIES[0]] * len(texts) if pairs else None
            batch = encode(tokenizer, texts, others, max_length=96)
            assert (len(texts) == 1) == bool(batch["attention_mask"].all())
            if kind == "bert" and not pairs:
                batch["token_type_ids"][:, ::2] = 1
            made.append(batch)
    assert {b["input_ids"].shape[0] for b in made} == {1, 3}
    assert 7 not in {b["input_ids"].shape[1] for b in made}
    return made


def pool_by_hand(hidden: np.ndarray, mask: np.ndarray, pooling: str, normalise: bool) -> np.ndarray:
    """Row by row: what a reader of sentence-transformers' files expects."""
    rows = []
    for vectors, kept in zip(hidden.astype(np.float64), mask.astype(bool), strict=True):
        real = vectors[kept]
        row = {"cls_token": real[0], "mean_tokens": real.mean(axis=0), "lasttoken": real[-1]}[pooling]
        rows.append(row / np.linalg.norm(row) if normalise else row)
    return np.stack(rows)


@pytest.mark.parametrize("kind", EMBEDDERS)
def test_an_embedder_is_the_same_in_onnx(kind, tmp_path):
    pooling, normalise = EMBEDDERS[kind]
    folder = make_tiny_encoder(tmp_path / "m", kind, pooling=pooling, normalise=normalise)
    facts = build_encoder(folder, folder, "fp32", task=EMBED)
    assert (facts["pooling"], facts["normalised"]) == (MODES[pooling], str(normalise).lower())
    assert facts["bytes"] == (folder / "onnx/model.onnx").stat().st_size
    assert (facts["nodes_int8"], facts["external_bytes"]) == (0, 0)

    graph = session(folder / "onnx/model.onnx")
    shapes = {i.name: i.shape for i in graph.get_inputs()}
    assert shapes == {name: ["batch_size", "sequence_length"] for name in INPUTS if name in shapes}
    assert ("token_type_ids" in shapes) == (kind == "bert")
    assert {o.name: o.shape for o in graph.get_outputs()} == {
        "last_hidden_state": ["batch_size", "sequence_length", 64],
        "sentence_embedding": ["batch_size", 64],
    }
    reference = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    for batch in batches(kind, pairs=False):
        given = {name: batch[name] for name in shapes}
        hidden, vectors = graph.run(["last_hidden_state", "sentence_embedding"], given)
        with torch.inference_mode():
            wanted = reference(**{n: torch.from_numpy(v) for n, v in given.items()}).last_hidden_state.numpy()
        kept = batch["attention_mask"].astype(bool)
        assert np.abs(hidden - wanted)[kept].max() <= 1e-4
        assert (
            np.abs(vectors - pool_by_hand(wanted, batch["attention_mask"], pooling, normalise)).max() <= 1e-4
        )

    if kind.startswith("qwen3"):  # does a text's first token see its last one?
        ids = np.array([[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]])
        first = graph.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][
            :, 0
        ]
        assert (np.abs(first[0] - first[1]).max() > 1e-3) == (kind == "qwen3-bidirectional")

    tokenizer = encoder_tokenizer(kind)
    found = compare_embedder(folder, folder / "onnx/model.onnx", TEXTS, tokenizer, 1)
    assert all(type(value) is float for value in found.values())
    assert found["cosine_min"] == pytest.approx(1, abs=1e-6)
    assert found["max_difference"] <= 1e-4
    assert (found["top1_agreement"], found["overlap_at_10"], found["kendall_tau"]) == (1, 1, 1)
    assert (found["queries"], found["documents"], found["vectors"]) == (6, 23, 29)

    facts = build_encoder(folder, folder, "int8", task=EMBED)
    assert facts["nodes_int8"] >= 12
    assert facts["nodes_fp32"] == 0
    assert (folder / "onnx/model_int8.onnx").stat().st_size < 0.4 * (
        folder / "onnx/model.onnx"
    ).stat().st_size
    found = compare_embedder(folder, folder / "onnx/model_int8.onnx", TEXTS, tokenizer, 1)
    assert 0.99 <= found["cosine_min"] < found["cosine_mean"] < 1
    assert found["kendall_tau"] >= 0.9
    assert found["overlap_at_10"] >= 0.9

    facts = build_encoder(folder, folder, "int4", task=EMBED)
    assert facts["nodes_int4"] >= 12
    assert facts["nodes_fp32"] == 0
    assert (folder / "onnx/model_q4.onnx").stat().st_size < (folder / "onnx/model_int8.onnx").stat().st_size
    found = compare_embedder(folder, folder / "onnx/model_q4.onnx", TEXTS, tokenizer, 1)
    assert 0.96 <= found["cosine_mean"] < 1
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize(("kind", "labels"), [("bert", 2), ("modernbert", 1), ("qwen3", 1)])
def test_a_reranker_is_the_same_in_onnx(kind, labels, tmp_path):
    folder = make_tiny_encoder(tmp_path / "m", kind, labels=labels, steps=40)
    facts = build_encoder(folder, tmp_path / "out", "fp32", task=RANK)
    assert "pooling" not in facts
    path = tmp_path / "out" / str(facts["file"])
    graph = session(path)
    assert {o.name: o.shape for o in graph.get_outputs()} == {"logits": ["batch_size", labels]}
    reference = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    for batch in batches(kind, pairs=True):
        given = {i.name: batch[i.name] for i in graph.get_inputs()}
        # which text of a pair a token belongs to, the graph finds out: transformers.js tells it nothing
        assert set(given) == {"input_ids", "attention_mask"}
        told = given | ({"token_type_ids": batch["token_type_ids"]} if kind == "bert" else {})
        assert kind != "bert" or told["token_type_ids"].max() == 1
        with torch.inference_mode():
            wanted = reference(**{n: torch.from_numpy(v) for n, v in told.items()}).logits.numpy()
        assert np.abs(graph.run(["logits"], given)[0] - wanted).max() <= 1e-4

    tokenizer = encoder_tokenizer(kind)
    found = compare_reranker(folder, path, TEXTS, tokenizer, 1)
    assert found["max_logit_difference"] <= 1e-4
    assert (found["top1_agreement"], found["overlap_at_10"], found["kendall_tau"]) == (1, 1, 1)
    assert (found["queries"], found["documents"], found["pairs"]) == (6, 23, 138)

    for quant, most in (("int8", 0.3), ("int4", 1)):
        made = build_encoder(folder, tmp_path / "out", quant, task=RANK)
        assert quant == "int8" or made["nodes_fp32"] == 1, "the head stays float"
        found = compare_reranker(folder, tmp_path / "out" / str(made["file"]), TEXTS, tokenizer, 1)
        assert 0 < found["max_logit_difference"] < most
        assert found["kendall_tau"] >= 0.9
        assert found["overlap_at_10"] >= 0.9


def test_the_same_bytes_in_another_process_and_folder(tmp_path):
    """and no path of the machine in them."""
    folder = make_tiny_encoder(tmp_path / "m", "bert")
    shutil.copytree(folder, tmp_path / "elsewhere/copy")
    code = (
        "import sys; from pathlib import Path; from famc.work.onnx_encoder import build_encoder\n"
        "for quant in ('int8', 'fp32', 'int4'):\n"
        f"    build_encoder(Path(sys.argv[1]), Path(sys.argv[1]), quant, task={EMBED!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "elsewhere/copy")],
        env=os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for quant, name in onnx_encoder.FILES.items():
        build_encoder(folder, folder, quant, task=EMBED)
        made = (folder / "onnx" / name).read_bytes()
        assert made == (tmp_path / "elsewhere/copy/onnx" / name).read_bytes()
        assert str(tmp_path).encode() not in made
        assert b"site-packages" not in made


def test_weights_beside_the_graph_when_they_exceed_a_protobuf(tmp_path, monkeypatch):
    """the same vectors; and a small graph made after it leaves no old weights behind."""
    folder = make_tiny_encoder(tmp_path / "m", "bert")
    reference, tokenizer = TorchEncoder(folder, 1, EMBED), encoder_tokenizer("bert")
    batch = encode(tokenizer, DOCUMENTS[:3], max_length=96)
    with monkeypatch.context() as patch:
        patch.setattr(onnx_encoder, "ONNX_INLINE", 1)
        patch.setattr(onnx_file, "ONNX_INLINE", 1)
        for quant, name in onnx_encoder.FILES.items():
            facts = build_encoder(folder, tmp_path / "out", quant, task=EMBED)
            data = tmp_path / "out/onnx" / f"{name}_data"
            assert facts["external_bytes"] == data.stat().st_size > 20_000
            found = OnnxEncoder(tmp_path / "out/onnx" / name, 1, EMBED).outputs(batch)
            assert (unit(found) * unit(reference.outputs(batch))).sum(axis=1).min() > 0.99
    build_encoder(folder, tmp_path / "out", "fp32", task=EMBED)
    names = sorted(p.name for p in (tmp_path / "out/onnx").iterdir())
    beside = [f"model_{name}.onnx{end}" for name in ("int8", "q4") for end in ("", "_data")]
    assert names == ["model.onnx", *beside]


def test_a_failure_on_the_way_keeps_what_was_there(tmp_path, monkeypatch):
    folder = make_tiny_encoder(tmp_path / "m", "bert")
    (tmp_path / "out/onnx").mkdir(parents=True)
    (tmp_path / "out/onnx/model_int8.onnx").write_text("before")

    def full(*_: Any) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(onnx_encoder, "quantise", full)
    with pytest.raises(OSError, match="no space left"):
        build_encoder(folder, tmp_path / "out", "int8", task=EMBED)
    assert [str(p.relative_to(tmp_path)) for p in (tmp_path / "out").rglob("*")] == [
        "out/onnx",
        "out/onnx/model_int8.onnx",
    ]
    assert (tmp_path / "out/onnx/model_int8.onnx").read_text() == "before"


# --- refusals -------------------------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def without_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    kept = load_file(folder / "model.safetensors")
    del kept["layers.1.mlp.up_proj.weight"]
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def modules(folder: Path, *kinds: str) -> None:
    made = [{"type": f"x.{kind}", "path": f"{i}_{kind}" if i else ""} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(made))


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REFUSED = {
    "unknown architecture": (
        lambda f: edit(f / "config.json", architectures=["T5Model"]),
        "the ONNX export for feature-extraction doesn't know T5Model",
    ),
    "no modules.json": (
        lambda f: (f / "modules.json").unlink(),
        "doesn't say how its tokens become one vector: it has no modules.json",
    ),
    "dynamic rope": (
        lambda f: edit(f / "config.json", rope_parameters=DYNAMIC),
        "the ONNX export can't do Qwen3Model with RoPE of type dynamic",
    ),
    "dynamic rope of one kind of layer": (
        lambda f: edit(f / "config.json", rope_parameters={"full_attention": DYNAMIC}),
        "with RoPE of type dynamic",
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "damaged config.json": (lambda f: (f / "config.json").write_text("{"), "config.json can't be read: "),
    "damaged modules.json": (lambda f: (f / "modules.json").write_text("["), "modules.json can't be read: "),
    "wrong modules.json": (
        lambda f: (f / "modules.json").write_text('{"a": 1}'),
        "modules.json is not a list",
    ),
    "a dense layer": (
        lambda f: modules(f, "Transformer", "Pooling", "Dense"),
        "can't do the modules Transformer, Pooling, Dense",
    ),
    "no pooling": (
        lambda f: shutil.rmtree(f / "1_Pooling"),
        "1_Pooling/config.json can't be read: ",
    ),
    "pooling by maximum": (
        lambda f: edit(f / "1_Pooling/config.json", pooling_mode_lasttoken=False, pooling_mode_max_tokens=True),
        "can't pool by pooling_mode_max_tokens",
    ),
    "two poolings": (
        lambda f: edit(f / "1_Pooling/config.json", pooling_mode_mean_tokens=True),
        "can't pool by pooling_mode_lasttoken, pooling_mode_mean_tokens",
    ),
    "prompts outside the pooling": (
        lambda f: edit(f / "1_Pooling/config.json", include_prompt=False),
        "can't leave prompts out of the pooling",
    ),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "can't be loaded: "),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "can't be loaded: "),
    "a weight too few": (without_a_weight, "lacks the weights layers.1.mlp.up_proj.weight"),
    "other shapes": (lambda f: edit(f / "config.json", hidden_size=32), "can't be loaded: "),
}  # fmt: skip


@pytest.fixture(scope="session")
def embedder(tmp_path_factory):
    return make_tiny_encoder(tmp_path_factory.mktemp("embedder") / "m", "qwen3")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(case, embedder, tmp_path):
    damage, sentence = REFUSED[case]
    folder = tmp_path / "m"
    shutil.copytree(embedder, folder)
    damage(folder)
    with pytest.raises(StepFailed) as told:
        build_encoder(folder, tmp_path / "out", "fp32", task=EMBED)
    assert sentence in told.value.message
    assert str(folder) in told.value.message
    assert told.value.hint
    assert not (tmp_path / "out").exists()


def test_other_refusals(embedder, tmp_path):
    with pytest.raises(StepFailed, match=r"^no ONNX export of embedders and rerankers in fp16$") as told:
        build_encoder(embedder, tmp_path / "out", "fp16", task=EMBED)  # type: ignore[arg-type]
    assert told.value.hint == "known: fp32, int8, int4"
    with pytest.raises(StepFailed, match=r"^no ONNX export for the task 'summarise'$"):
        build_encoder(embedder, tmp_path / "out", "fp32", task="summarise")  # type: ignore[arg-type]
    with pytest.raises(StepFailed, match="the ONNX export for text-ranking doesn't know Qwen3Model"):
        build_encoder(embedder, tmp_path / "out", "fp32", task=RANK)
    ranker = make_tiny_encoder(tmp_path / "ranker", "qwen3", labels=1)
    edit(ranker / "config.json", pad_token_id=None)
    with pytest.raises(StepFailed, match=r"names no pad_token_id in config\.json"):
        build_encoder(ranker, tmp_path / "out", "fp32", task=RANK)
    assert not (tmp_path / "out").exists()


def test_a_graph_of_another_task_is_told(tmp_path, embedder):
    from onnx import TensorProto, helper, save

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    save(helper.make_model(helper.make_graph([node], "g", [value], [out]), ir_version=8,
                           opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "g.onnx")  # fmt: skip
    with pytest.raises(StepFailed, match="has no sentence_embedding: its outputs are y"):
        compare_embedder(embedder, tmp_path / "g.onnx", TEXTS, encoder_tokenizer("qwen3"), 1)


# --- pooling and comparing, by hand -----------------------------------------------------------------------------------

HIDDEN = torch.tensor([[[1.0, 2], [3, 4], [5, 8]], [[6.0, 8], [3, 4], [0, 0]]])


@pytest.mark.parametrize(
    ("mode", "mask", "wanted"),
    [
        ("cls", [[1, 1, 1], [1, 1, 0]], [[1, 2], [6, 8]]),
        ("cls", [[0, 1, 1], [1, 1, 1]], [[3, 4], [6, 8]]),  # padding on the left
        ("mean", [[1, 1, 1], [1, 1, 0]], [[3, 14 / 3], [4.5, 6]]),
        ("lasttoken", [[1, 1, 1], [1, 1, 0]], [[5, 8], [3, 4]]),
        ("lasttoken", [[0, 1, 1], [1, 0, 0]], [[5, 8], [6, 8]]),
    ],
)
def test_pooling_by_hand(mode, mask, wanted):
    found = Pooling(mode, False)(HIDDEN, torch.tensor(mask))
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float32))
    lengths = Pooling(mode, True)(HIDDEN, torch.tensor(mask)).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(2))


def test_pooling_is_read_in_both_spellings(embedder, tmp_path):
    assert read_pooling(embedder) == Pooling("lasttoken", True)
    modules(tmp_path, "Transformer", "Pooling")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode": "mean"}')
    assert read_pooling(tmp_path) == Pooling("mean", False)


class Table:
    """An encoder that says what stands in a table; a batch is the list of keys."""

    def __init__(self, rows: dict[Any, list[float]]) -> None:
        self._rows = rows

    def outputs(self, batch: Any) -> np.ndarray:
        return np.array([self._rows[key] for key in batch["keys"]], dtype=np.float32)


def test_vectors_are_compared_by_hand():
    ours = {"q": [1, 0], "a": [1, 0], "b": [0.6, 0.8], "c": [0, 2]}
    theirs = ours | {"a": [0, 1], "c": [0, 4]}
    found = compare_embedders(
        Table(ours), Table(theirs), ["q"], ["a", "b", "c"], lambda texts: {"keys": list(texts)}
    )
    # cosines 1, 0, 1, 1; scores 1, .6, 0 become 0, .6, 0: of three pairs one turns round, one stays, one ties
    assert found == pytest.approx(
        {
            "vectors": 4, "cosine_mean": 0.75, "cosine_min": 0, "max_difference": 2, "queries": 1, "documents": 3,
            "top1_agreement": 0, "overlap_at_10": 1, "kendall_tau": 0, "kendall_tau_min": 0,
        }
    )  # fmt: skip


def test_logits_are_compared_by_hand():
    """with two labels, the second one's logit ranks."""
    ours = {("q", "a"): [9, 1], ("q", "b"): [0, 2], ("r", "a"): [0, 5], ("r", "b"): [0, 4]}
    theirs = ours | {("q", "a"): [9, 3], ("r", "b"): [0.5, 4]}
    found = compare_rerankers(
        Table(ours), Table(theirs), ["q", "r"], [["a", "b"]] * 2,
        lambda queries, documents: {"keys": list(zip(queries, documents, strict=True))},
    )  # fmt: skip
    assert found == pytest.approx(
        {
            "pairs": 4, "max_logit_difference": 2, "queries": 2, "documents": 2, "top1_agreement": 0.5,
            "overlap_at_10": 1, "kendall_tau": 0, "kendall_tau_min": -1,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "tau"),
    [
        ([1, 2, 3], [4, 5, 9], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 3], [1, 3, 2], 1 / 3),
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(2 * 3)),
        ([1, 1, 1], [1, 2, 3], math.nan),
        ([1, 2, 3], [1, math.nan, 3], math.nan),
    ],
)
def test_kendalls_tau_by_hand(a, b, tau):
    assert kendall_tau(np.array(a, float), np.array(b, float)) == pytest.approx(tau, nan_ok=True)


def test_rankings_by_hand():
    ours = np.arange(12.0, 0, -1)[None]
    theirs = ours.copy()
    theirs[0, 11] = 3.5  # the last becomes the tenth
    found = compare_rankings(ours, theirs)
    assert (found["top1_agreement"], found["overlap_at_10"]) == (1, pytest.approx(0.9))
    assert found["kendall_tau"] == pytest.approx(1 - 2 * 2 / 66)  # it passed two of 66 pairs
    broken = compare_rankings(ours, np.full_like(ours, np.nan))
    for name in ("top1_agreement", "overlap_at_10", "kendall_tau", "kendall_tau_min"):
        assert math.isnan(broken[name]), "a gate's <= and >= both fail"


def test_texts_are_split_into_queries_and_documents():
    queries, documents = split([*map(str, range(12)), "3", " "], 2, 6)
    assert (queries, documents) == (["0", "5"], ["1", "2", "3", "4", "6", "7"])
    with pytest.raises(StepFailed, match="needs a query and at least two documents"):
        compare_embedders(Table({}), Table({}), ["q"], ["a"], lambda texts: {"keys": list(texts)})


def test_texts_are_cut_to_what_model_and_tokenizer_can_do():
    tokenizer = encoder_tokenizer("bert")
    assert longest(tokenizer, 128, 512) == 96
    assert longest(tokenizer, 64, 512) == 64
    assert longest(tokenizer, 128, 32) == 32
    assert encode(tokenizer, DOCUMENTS, max_length=16)["input_ids"].shape[1] == 16


# --- as steps of a family ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "limits"), [
    ("feature-extraction", {"cosine": 0.99, "ranking": 0.8}), ("text-ranking", {"ranking": 0.8}),
])  # fmt: skip
def test_export_parity_and_gate_of_a_family(tmp_path, task, limits):
    """The workers that a text model's exports go through: told by `task` what to make, and what to compare."""
    learnt = {"labels": 1, "steps": 60} if task == "text-ranking" else {}
    model = make_tiny_encoder(tmp_path / "model", "qwen3", **learnt)
    texts = make_data(tmp_path / "text", [{"text": text} for text in TEXTS])
    made, compared = tmp_path / "export", tmp_path / "parity"
    made.mkdir()
    compared.mkdir()
    params = {"format": "onnx", "quant": "int8", "task": task}
    facts = export.run(Job.for_test("export", "export", params), {"model": model}, made)
    assert facts["file"] == "onnx/model_int8.onnx"
    params = {**params, "context": 64, "texts": len(TEXTS), "prompts": 2, "max_new_tokens": 4}
    inputs = {"model": model, "export": made, "tokenizer": model, "text.t": texts}
    flat = parity.run(Job.for_test("parity", "parity", params), inputs, compared)
    assert flat["kendall_tau"] > 0.8 and flat["tokenizer"] == "exact"
    gated = Job.for_test("gate", "gate", {"parity": limits}, inputs={"parity": ("parity", "k")})
    (tmp_path / "gate").mkdir()
    gate.run(gated, {"parity": compared}, tmp_path / "gate")
    with pytest.raises(StepFailed, match="kl"):  # no such figure: it never passes for one that holds
        gate.run(
            Job.for_test("gate", "gate", {"parity": {"kl": 9.0}}), {"parity": compared}, tmp_path / "gate"
        )


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen3"])
def test_a_folder_gives_the_ids_that_its_tokenizer_was_made_with(tmp_path, kind):
    """Loaded as a user loads it: a class that transformers rebuilds would give unknown ids on both sides, and no
    comparison of them would notice."""
    folder = make_tiny_encoder(tmp_path / "m", kind)
    loaded, own = AutoTokenizer.from_pretrained(folder), encoder_tokenizer(kind)
    assert [loaded(text)["input_ids"] for text in TEXTS] == [own(text)["input_ids"] for text in TEXTS]
    assert len({i for text in TEXTS for i in loaded(text)["input_ids"]}) > 20
