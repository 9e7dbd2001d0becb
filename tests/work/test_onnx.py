"""The ONNX files are the model: torch's logits and text, cached or not, and damage doesn't go unseen."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from tiny_model import CONVERSATION, TEXTS, make_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from famc.work import onnx_build, onnx_file
from famc.work.compare import (
    TorchDecoder,
    common_prefix,
    compare,
    compare_logits,
    log_softmax,
    mean_and_error,
    tokenizer_report,
)
from famc.work.onnx_build import FILES, build_decoder, recipe_of
from famc.work.onnx_session import OnnxDecoder

QUANTS = ("fp32", "int8", "int4")
_random = random.Random(0)
NOISE = [[_random.randrange(3, 380) for _ in range(length)] for length in (120, 70, 1, 70)]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A Qwen3 with tied embeddings that has learnt TEXTS, exported three times."""
    folder = make_tiny_model(tmp_path_factory.mktemp("trained"), steps=60)
    facts = {quant: build_decoder(folder, folder, quant) for quant in QUANTS}
    return folder, facts


@pytest.fixture(scope="session")
def texts():
    tokenizer = tiny_tokenizer()
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="session")
def figures(trained, texts):
    folder, _ = trained
    reference, eos = TorchDecoder(folder, 1), {2}
    prompts = [ids[:5] for ids in texts]
    return {
        quant: compare(reference, OnnxDecoder(folder / "onnx" / FILES[quant], 1), texts, prompts, eos, 24)
        for quant in QUANTS
    }


def test_fp32_is_torch(figures):
    """fp32 gives torch's logits to rounding, and the same greedy text."""
    fp32 = figures["fp32"]
    assert fp32["kl"] < 1e-6
    assert fp32["max_logit_difference"] < 1e-3
    assert fp32["top1_agreement"] == 1
    assert fp32["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert (fp32["greedy_equal"], fp32["greedy_agree_tokens"]) == (1, 24)
    assert all(type(value) is float for value in fp32.values())


def test_quantised_files_lose_in_order(figures):
    """fewer bits, farther from the source; none of them far."""
    assert figures["fp32"]["kl"] < figures["int8"]["kl"] < figures["int4"]["kl"] < 0.05
    assert figures["int8"]["kl"] < 1e-3
    assert figures["int4"]["top1_agreement"] > 0.9


def test_head_at_8_bits_helps_int4(trained, texts, figures, tmp_path):
    """the default is better than int4 throughout."""
    folder, _ = trained
    facts = build_decoder(
        folder, tmp_path, "int4", recipe=recipe_of("int4", lm_head="int4", embeddings="int4")
    )
    assert (facts["lm_head"], facts["embedding"], facts["nodes_int8"]) == ("int4", "int4", 0)
    plain = compare_logits(TorchDecoder(folder, 1), OnnxDecoder(tmp_path / "onnx/model_q4.onnx", 1), texts)
    assert plain["kl"] > figures["int4"]["kl"]


def test_facts_and_sizes(trained):
    """the facts say which weights have how many bits, and a tied embedding isn't stored twice."""
    folder, facts = trained
    kept = {q: (f["embedding"], f["lm_head"], f["nodes_float"], f["nodes_int8"], f["nodes_int4"])
            for q, f in facts.items()}  # fmt: skip
    assert kept == {
        "fp32": ("fp32", "fp32", 11, 0, 0),
        "int8": ("int8", "int8", 0, 11, 0),
        "int4": ("int8", "int8", 0, 1, 10),
    }
    parameters = sum(p.numel() for p in TorchDecoder(folder, 1)._model.parameters())
    for fact in facts.values():
        assert fact["bytes"] == (folder / fact["file"]).stat().st_size
        assert fact["external_bytes"] == 0
    # beside the weights: graph, RoPE tables (256 x 32 floats), and a scale for each 32 weights
    assert 4 * parameters < facts["fp32"]["bytes"] < 4 * parameters + 100_000
    assert facts["int8"]["bytes"] < 1.2 * parameters + 70_000
    assert facts["int4"]["bytes"] < facts["int8"]["bytes"]
    assert sorted(p.name for p in (folder / "onnx").iterdir()) == sorted(FILES[quant] for quant in QUANTS)
    assert not list(folder.glob(".onnx-*")), "the scratch folder is gone"


def test_cache_dims_are_what_transformers_js_reads(trained):
    """the cache's first dimension is literally batch_size, and the head size is a number."""
    folder, facts = trained
    for fact in facts.values():
        graph = onnx.load(folder / fact["file"]).graph
        caches = [v for v in (*graph.input, *graph.output) if "key" in v.name or "value" in v.name]
        assert len(caches) == 8
        for cache in caches:
            dims = cache.type.tensor_type.shape.dim
            assert (dims[0].dim_param, dims[1].dim_value, dims[3].dim_value) == ("batch_size", 2, 32)


def test_same_bytes_in_another_process(trained, tmp_path):
    """another process with another hash seed writes the same bytes, and says nothing."""
    folder, _ = trained
    code = (
        "import sys; from pathlib import Path; from famc.work.onnx_build import build_decoder\n"
        "for q in ('fp32', 'int8', 'int4'): build_decoder(Path(sys.argv[1]), Path(sys.argv[2]), q)"
    )
    root = Path(onnx_build.__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "" and "Reading" not in ran.stderr and "quantize" not in ran.stderr
    for name in (FILES[quant] for quant in QUANTS):
        assert (tmp_path / "onnx" / name).read_bytes() == (folder / "onnx" / name).read_bytes()
        assert "+" not in onnx.load(folder / "onnx" / name).producer_version


@pytest.mark.parametrize(
    ("kind", "tied", "theta"),
    [("qwen3", True, 1e4), ("qwen3", False, 1e6), ("llama", True, 1e6), ("llama", False, 1e4)],
)
def test_architectures_match_torch(kind, tied, theta, tmp_path):
    """Qwen3 and Llama, tied or not, with their own RoPE base: random weights where positions matter."""
    folder = make_tiny_model(tmp_path, kind, tied=tied, theta=theta)
    build_decoder(folder, folder, "fp32")
    facts = build_decoder(folder, folder, "int8")
    assert facts["embedding"] == "int8"
    nodes = {node.name for node in onnx.load(folder / "onnx/model_int8.onnx").graph.node}
    assert "/lm_head/MatMul_Q8" in nodes and "/model/embed_tokens/Transpose" not in nodes
    reference = TorchDecoder(folder, 1)
    fp32 = compare(reference, OnnxDecoder(folder / "onnx/model.onnx", 1), NOISE, [NOISE[1][:9]], set(), 12)
    assert fp32["kl"] < 1e-6
    assert fp32["greedy_equal"] == 1
    int8 = compare_logits(reference, OnnxDecoder(folder / "onnx/model_int8.onnx", 1), NOISE)
    assert int8["kl"] < 0.05
    # the comparison can tell: the same weights with the other base are another model
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e4 if theta == 1e6 else 1e6
    (folder / "config.json").write_text(json.dumps(config))
    other = compare_logits(TorchDecoder(folder, 1), OnnxDecoder(folder / "onnx/model.onnx", 1), NOISE)
    assert other["kl"] > 1e-2


def test_bf16_folder_matches_fp32_reference(tmp_path):
    """weights saved in bf16 are exported as the fp32 numbers they are."""
    folder = make_tiny_model(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    build_decoder(folder, folder, "fp32")
    figures = compare_logits(TorchDecoder(folder, 1), OnnxDecoder(folder / "onnx/model.onnx", 1), NOISE)
    assert figures["kl"] < 1e-6


def test_llama3_rope(tmp_path):
    """Llama 3's stretched RoPE is computed as torch computes it."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    folder = make_tiny_model(tmp_path, "llama", rope_parameters=rope)
    build_decoder(folder, folder, "fp32")
    figures = compare_logits(TorchDecoder(folder, 1), OnnxDecoder(folder / "onnx/model.onnx", 1), NOISE)
    assert figures["kl"] < 1e-6


@pytest.mark.parametrize("quant", QUANTS)
def test_prefill_in_two_chunks_is_one(trained, texts, quant):
    """the cache holds what came before: in chunks for one row, token by token for a batch."""
    folder, _ = trained
    decoder = OnnxDecoder(folder / "onnx" / FILES[quant], 1)
    batch = [ids[:20] for ids in texts]
    whole = decoder.logits(batch)
    assert whole.shape == (len(batch), 20, 384)
    for rows, cuts in ((slice(1), (0, 13, 14, 20)), (slice(None), (0, 17, 18, 19, 20))):
        parts, past = [], None
        for start, end in pairwise(cuts):
            part, past = decoder.step([ids[start:end] for ids in batch[rows]], past)
            parts.append(part)
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole[rows], atol=1e-3)


def test_generate_stops_at_eos(trained, texts):
    """greedy ends with the first end token, in both decoders alike."""
    folder, _ = trained
    decoders = [TorchDecoder(folder, 1), OnnxDecoder(folder / "onnx/model.onnx", 1)]
    free = [d.generate(texts[0][:5], 12, set()) for d in decoders]
    assert free[0] == free[1] and len(free[0]) == 12
    stop = free[0][4]
    expected = free[0][: free[0].index(stop) + 1]
    assert [d.generate(texts[0][:5], 12, {stop}) for d in decoders] == [expected, expected]


def test_damage_is_seen(trained, texts, figures, tmp_path):
    """a file with noise as large as the weights in one matrix is farther from the source than int4."""
    folder, _ = trained
    model = onnx.load(folder / "onnx/model.onnx")
    weight = next(i for i in model.graph.initializer if "layers.1.mlp.down_proj" in i.name)
    good = onnx.numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).normal(0, good.std(), good.shape)
    weight.CopyFrom(onnx.numpy_helper.from_array((good + noise).astype(np.float32), weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    damaged = compare_logits(TorchDecoder(folder, 1), OnnxDecoder(tmp_path / "model.onnx", 1), texts)
    assert damaged["kl"] > 3 * figures["int4"]["kl"]
    assert damaged["log_ratio"] > 0 and damaged["perplexity_ratio"] > 1


def test_nan_fails_any_limit(trained, texts, tmp_path):
    """a candidate that gives nan can't pass `value <= limit`."""
    folder, _ = trained
    model = onnx.load(folder / "onnx/model.onnx")
    weight = next(i for i in model.graph.initializer if "final_norm" in i.name)
    broken = np.full(onnx.numpy_helper.to_array(weight).shape, np.nan, dtype=np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(broken, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    figures = compare_logits(TorchDecoder(folder, 1), OnnxDecoder(tmp_path / "model.onnx", 1), texts[:2])
    for name in ("kl", "max_logit_difference", "perplexity_candidate", "perplexity_ratio"):
        assert not figures[name] <= 1e9, name


def test_external_data_when_too_large(trained, texts, figures, tmp_path, monkeypatch):
    """weights over the limit go beside the graph, under the name that transformers.js fetches; a rebuild
    that fits again leaves none behind."""
    folder, _ = trained
    monkeypatch.setattr(onnx_file, "ONNX_INLINE", 1000)
    facts = build_decoder(folder, tmp_path, "int4")
    assert sorted(p.name for p in (tmp_path / "onnx").iterdir()) == ["model_q4.onnx", "model_q4.onnx_data"]
    assert facts["external_bytes"] == (tmp_path / "onnx/model_q4.onnx_data").stat().st_size > 50_000
    there = compare_logits(TorchDecoder(folder, 1), OnnxDecoder(tmp_path / "onnx/model_q4.onnx", 1), texts)
    assert there["kl"] == pytest.approx(figures["int4"]["kl"])
    monkeypatch.undo()
    build_decoder(folder, tmp_path, "int4")
    assert [p.name for p in (tmp_path / "onnx").iterdir()] == ["model_q4.onnx"]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "Qwen3MoeForCausalLM"),
        ({"is_causal": False}, "Qwen3ForCausalLM with is_causal"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial RoPE",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2},
            "sliding-window",
        ),
    ],
)
def test_refuses_what_it_would_get_wrong(trained, tmp_path, change, names):
    """an architecture or an attention that the graph can't hold is an error that names it."""
    folder, _ = trained
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=names):
        build_decoder(tmp_path, tmp_path, "fp32")
    assert not (tmp_path / "onnx").exists()


def test_refuses_an_unknown_algorithm(trained, tmp_path):
    with pytest.raises(ValueError, match="k_quant"):
        recipe_of("int4", algorithm="default")
    with pytest.raises(ValueError, match="calibrated before"):
        recipe_of("int4", algorithm="gptq")
    with pytest.raises(ValueError, match="nothing is quantised"):
        build_decoder(trained[0], tmp_path, "fp32", recipe=recipe_of("int4"))


def test_tokenizer_report_of_a_true_copy(trained):
    """a folder equals itself, and decodes what it encodes, accents and Chinese included."""
    report = tokenizer_report(trained[0], trained[0], CONVERSATION, [*TEXTS, "", "e\u0301 \x00 \U0001f600"])
    assert report["equal"] and report["round_trip"]
    assert (report["texts"], report["texts_with_other_ids"], report["texts_lossy"]) == (8, 0, 0)


def test_tokenizer_report_sees_changes(trained, tmp_path):
    """another template, end token or merge is told apart, each by its own name."""

    def changed(name, edit):
        released = tmp_path / name
        shutil.copytree(trained[0], released, ignore=shutil.ignore_patterns("onnx", "*.safetensors"))
        edit(released)
        report = tokenizer_report(trained[0], released, CONVERSATION, TEXTS)
        assert not report["equal"]
        return {key for key, value in report.items() if value is False} - {"equal"}

    def template(old, new):
        def edit(folder):
            file = folder / "chat_template.jinja"
            assert old in file.read_text()
            file.write_text(file.read_text().replace(old, new))

        return edit

    def end_token(folder):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<|endoftext|>"}))

    def merges(folder):
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        del content["model"]["merges"][:20]
        file.write_text(json.dumps(content))

    both = {"template_equal", "template_with_prompt_equal"}
    assert changed("mark", template("<|im_end|>", "")) == both
    assert changed("prompt", template("assistant\n'", "assistant'")) == {"template_with_prompt_equal"}
    assert changed("eos", end_token) == {"eos_equal"}
    assert changed("merges", merges) == {"ids_equal"}
    assert changed("none", lambda folder: (folder / "chat_template.jinja").unlink()) == both


class Table:
    """A decoder whose logits are a table by the last token: no weights, so that figures can be worked out."""

    def __init__(self, table):
        self.table = np.asarray(table, dtype=np.float32)

    def logits(self, ids):
        return self.table[np.asarray(ids)]

    def generate(self, prompt_ids, max_new_tokens, eos):
        new = [*prompt_ids]
        for _ in range(max_new_tokens):
            new.append(int(self.table[new[-1]].argmax()))
        return new[len(prompt_ids) :]


def test_figures_by_hand():
    """KL, agreement, perplexity and greedy on a vocabulary of two, against arithmetic, in chunks."""
    p, q = np.log([0.75, 0.25]), np.log([0.5, 0.5])
    q[0] += 1e-6  # the same first choice, clearly
    same, other = Table([p, p]), Table([q, q])
    text = [0, 0, 0, 1] * 50 + [0]
    figures = compare(same, other, [text, text[::-1]], [[0], [1]], set(), 3)
    assert figures["kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-4)
    assert figures["tokens"] == 402
    assert figures["top1_agreement"] == figures["greedy_equal"] == 1
    assert figures["perplexity_candidate"] == pytest.approx(2, rel=1e-4)
    assert figures["perplexity_reference"] == pytest.approx(0.75**-0.75 * 0.25**-0.25, rel=1e-2)
    assert figures["perplexity_ratio"] == pytest.approx(
        figures["perplexity_candidate"] / figures["perplexity_reference"]
    )
    swapped = compare(same, Table([p, p[::-1]]), [text], [[0], [1]], set(), 3)
    assert swapped["top1_agreement"] == pytest.approx(151 / 201)
    assert (swapped["greedy_equal"], swapped["greedy_agree_tokens"]) == (0.5, 1.5)


def test_statistics_helpers():
    """the error of whole groups is not that of their values when each group agrees with itself."""
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2 and common_prefix([1], [1, 2]) == 1
    groups = [np.full(100, 1.0), np.full(100, -1.0)]
    assert mean_and_error(groups) == (0, pytest.approx(1.0))
    assert mean_and_error([np.concatenate(groups)])[1] == pytest.approx(1 / math.sqrt(199), rel=1e-2)
    assert mean_and_error([np.ones(1)]) == (1, math.inf)
    np.testing.assert_allclose(np.exp(log_softmax(np.array([[1e4, 1e4]]))), [[0.5, 0.5]])
    with pytest.raises(ValueError, match="two tokens"):
        compare_logits(Table([[0, 1]]), Table([[0, 1]]), [[0]])
