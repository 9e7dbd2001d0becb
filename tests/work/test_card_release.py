"""The released folder works by itself, and the card on it says what was measured, with code that runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from tiny_artifacts import CHATS, DOCUMENTS, PARAMS, content, make_data, make_model, make_tokenizer
from transformers import AutoTokenizer

from famc.errors import StepFailed
from famc.job import Job
from famc.work import card, evaluate, export, gate, parity, release
from famc.work.generate import greedy
from famc.work.likelihood import encode_prompt, end_ids, load_model
from famc.work.onnx_session import OnnxDecoder

CARD = {
    "family": {"name": "pocket", "org": "me", "license": "mit", "seed": 1, "languages": ["en", "no"]},
    "size": "xs", "variant": "instruct", "lineage": ["xs/pretrain", "xs/sft"], "parameters": 123_456,
    "shape": {"arch": "qwen3", "vocab": 384, "layers": 2, "hidden": 64, "context": 256},
    "licenses": {"stories": "cc-by-4.0", "web": "unknown"}, "repo": "me/pocket-xs-instruct", "base": None,
    "exports": {
        f"{fmt}-{quant}": {"format": fmt, "quant": quant}
        for fmt, quant in (("safetensors", "bf16"), ("onnx", "fp32"), ("onnx", "int4"))
    },
}  # fmt: skip
RELEASE = {"repo": "pocket-xs-instruct", "to": "dir", "dry_run": True, "license": "mit", "max_context": 256}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All that a release needs, by role, as the pipeline makes it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("made")
    tokenizer = make_tokenizer(root / "tokenizer")
    model = make_model(root / "model", tokenizer, steps=80)
    (model / "famc.json").write_text("{}")  # the store's record is no part of a release
    text = make_data(root / "text", [{"text": t} for t in DOCUMENTS])
    chat = make_data(root / "chat", [{"messages": c} for c in CHATS])
    both = {"model": model, "tokenizer": tokenizer}

    def step(module, name, kind, params, inputs):
        out = root / name.replace("/", ".")
        out.mkdir()
        module.run(Job.for_test(name, kind, params, inputs={r: (r, "k") for r in inputs}), inputs, out)
        return out

    for label in ("safetensors-bf16", "onnx-fp32", "onnx-int4"):
        fmt, quant = label.split("-")
        both[f"export.{label}"] = step(
            export, f"export.{label}", "export", {"format": fmt, "quant": quant}, {"model": model}
        )
        inputs = {"model": model, "tokenizer": tokenizer, "export": both[f"export.{label}"], "chat.c": chat}
        both[f"parity.{label}"] = step(parity, f"parity.{label}", "parity", {"format": fmt, **PARAMS}, inputs)
        both[f"gate.{label}"] = step(
            gate, f"gate.{label}", "gate", {"parity": {"kl": 0.5, "tokenizer": "exact"}},
            {"parity": both[f"parity.{label}"]},
        )  # fmt: skip
    tasks = [
        {"task": name, "data": source, "n": None, "max_new_tokens": 12, "tasks": []}
        for name, source in (("bits_per_byte", "t"), ("answers", "c"))
    ]
    both["eval.chat"] = step(
        evaluate, "eval.chat", "eval", {"suite": "chat", "tasks": tasks, "context": 128},
        {"model": model, "tokenizer": tokenizer, "data.t": text, "data.c": chat},
    )  # fmt: skip
    both["card"] = step(card, "card", "card", CARD, of(both, "model", "tokenizer", "eval", "parity", "gate"))
    return both


@pytest.fixture(scope="module")
def released(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("release") / "pocket-xs-instruct"
    out.mkdir()
    assemble(out, of(made, "model", "tokenizer", "export", "card"))
    return out


def of(made, *kinds):
    return {role: path for role, path in made.items() if role.partition(".")[0] in kinds}


def assemble(out, inputs, **params):
    out.mkdir(parents=True, exist_ok=True)
    return release.run(Job.for_test("xs/instruct/release", "release", RELEASE | params), inputs, out)


def in_a_clean_room(folder, code):
    """A new interpreter, offline, that knows nothing but the folder."""
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder.parent),
        "OMP_NUM_THREADS": "1",
    }
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


# --- the folder ------------------------------------------------------------------------------------------


def test_the_folder_holds_what_users_expect_and_nothing_else(released):
    assert set(content(released)) == {
        "README.md", "config.json", "generation_config.json", "genai_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "onnx/model.onnx", "onnx/model_q4.onnx", "release.json",
    }  # fmt: skip
    listing = json.loads((released / "release.json").read_text())
    found = {name: len(data) for name, data in content(released).items() if name != "release.json"}
    assert listing["files"] == found
    config = json.loads((released / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["dtype"] == "bfloat16"  # the weights are the bf16 export's
    assert "transformers.js_config" not in config
    generation = json.loads((released / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    assert generation["pad_token_id"] == 0
    assert generation["max_new_tokens"] == 128
    assert "generation" in json.loads((released / "tokenizer_config.json").read_text())["chat_template"]


def test_large_files_are_links(released, made):
    assert (released / "model.safetensors").samefile(made["export.safetensors-bf16"] / "model.safetensors")
    assert (released / "onnx/model_q4.onnx").samefile(made["export.onnx-int4"] / "onnx/model_q4.onnx")


def test_transformers_answers_from_the_folder_alone(made, tmp_path):
    """The same greedy text as the model in the store."""
    assemble(tmp_path / "r", of(made, "model", "tokenizer", "card"))
    words, model = AutoTokenizer.from_pretrained(made["tokenizer"]), load_model(made["model"], 1)
    prompts = [encode_prompt(words, chat[:-1]) for chat in CHATS]
    expected = [words.decode(new) for new in greedy(model, prompts, 20, end_ids(words))]
    assert expected[0] == "Flour and salt.<|im_end|>"
    code = f"""
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
found = []
for chat in json.loads({json.dumps(json.dumps([chat[:-1] for chat in CHATS]))}):
    how = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = tokenizer.apply_chat_template(chat, **how)
    found.append(tokenizer.decode(model.generate(**ids)[0, ids["input_ids"].shape[1]:]))
print(json.dumps(found))
"""
    assert json.loads(in_a_clean_room(tmp_path / "r", code)) == expected


def test_onnxruntime_answers_from_the_folder(released):
    words = AutoTokenizer.from_pretrained(released)
    prompt = encode_prompt(words, CHATS[0][:-1])
    for name in ("model.onnx", "model_q4.onnx"):
        new = OnnxDecoder(released / "onnx" / name, 1).generate(prompt, 20, end_ids(words))
        assert words.decode(new, skip_special_tokens=True) == CHATS[0][-1]["content"]


def test_weights_beside_a_graph_are_announced_to_transformers_js(tmp_path, made):
    beside = tmp_path / "export"
    shutil.copytree(made["export.onnx-int4"], beside)
    (beside / "onnx/model_q4.onnx_data").write_bytes(b"weights")
    assemble(tmp_path / "r", of(made, "model", "tokenizer") | {"export.onnx-int4": beside})
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": {"model_q4.onnx": 1}}
    assert (tmp_path / "r/onnx/model_q4.onnx_data").is_file()


def changed_model(tmp_path, made, name=None, change=None):
    folder = tmp_path / "model"
    shutil.copytree(made["model"], folder)
    if name:
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return of(made, "tokenizer") | {"model": folder}


def test_a_cache_that_training_turned_off_is_on_again(tmp_path, made):
    inputs = changed_model(tmp_path, made, "config.json", lambda c: c | {"use_cache": False})
    assemble(tmp_path / "r", inputs)
    assert json.loads((tmp_path / "r/config.json").read_text())["use_cache"] is True


def test_a_template_in_a_file_of_its_own_moves_inside(tmp_path, made):
    inputs = changed_model(tmp_path, made)
    path = inputs["model"] / "tokenizer_config.json"
    config = json.loads(path.read_text())
    (inputs["model"] / "chat_template.jinja").write_text(config.pop("chat_template"))
    path.write_text(json.dumps(config))
    assemble(tmp_path / "r", inputs)
    assert not (tmp_path / "r/chat_template.jinja").exists()
    assert content(tmp_path / "r")["tokenizer_config.json"].count(b"generation") > 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer_config.json", lambda c: c | {"chat_template": "{{ messages }}"}, "not the family's"),
        ("generation_config.json", lambda c: c | {"eos_token_id": 7}, "ends answers at"),
        ("config.json", lambda c: c | {"num_hidden_layers": 1}, "can't be loaded"),
        (
            "config.json", lambda c: c | {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
            "does not load cleanly: unexpected_keys",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_would_disappoint_is_not_released(tmp_path, made, name, change, message):
    with pytest.raises(StepFailed, match=message):
        assemble(tmp_path / "r", changed_model(tmp_path, made, name, change))


def test_a_missing_tensor_is_noticed(tmp_path, made):
    inputs = changed_model(tmp_path, made)
    path = inputs["model"] / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(StepFailed, match="up_proj"):
        assemble(tmp_path / "r", inputs)


# --- the card --------------------------------------------------------------------------------------------


def front(text):
    return YAML(typ="safe", pure=True).load(text.split("---\n")[1])


def test_the_front_matter_is_yaml_that_the_hub_reads(released):
    values = front((released / "README.md").read_text())
    assert values["license"] == "mit"
    assert values["language"] == ["en", "no"]  # not False
    assert values["library_name"] == "transformers"
    assert "onnx" in values["tags"]


def test_the_card_shows_scores_with_errors_parity_gates_lineage_and_licences(released, made):
    text = (released / "README.md").read_text()
    results = json.loads((made["eval.chat"] / "results.json").read_text())
    for name, entry in results.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
        error = "–" if entry["stderr"] is None else f"{entry['stderr']:.4g}"
        assert f"{entry['value']:.4g} ± {error}" in line
    for label in ("safetensors-bf16", "onnx-fp32", "onnx-int4"):
        measured = json.loads((made[f"parity.{label}"] / "results.json").read_text())["parity"]
        (line,) = [
            line for line in text.splitlines() if line.startswith(f"| {label} | {measured['kl']:.4g} |")
        ]
        assert line.endswith("| exact | exact |")
        assert f"| {label} | kl |" in text
    assert "1. `xs/pretrain`" in text
    assert "2. `xs/sft` (this model)" in text
    assert "licence of web is not known" in text
    assert "cc-by-4.0" in text
    assert CHATS[0][-1]["content"] in text


def test_the_cards_python_runs_in_the_folder(released):
    """Three blocks: transformers, onnxruntime, onnxruntime-genai."""
    blocks = re.findall(r"```python\n(.*?)```", (released / "README.md").read_text(), re.S)
    assert len(blocks) == 3
    for block in blocks:
        in_a_clean_room(released, block)


def test_a_base_models_card_promises_no_conversation(tmp_path, made):
    params = CARD | {"variant": "base", "licenses": {"a": "mit"}, "repo": "pocket-xs", "exports": {}}
    card.run(Job.for_test("card", "card", params), of(made, "model", "tokenizer"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "# pocket-xs\n" in text
    assert "apply_chat_template" not in text
    assert "Warning" not in text
    assert "onnx" not in front(text)["tags"]
    assert re.search(r"\n{4,}", text) is None


def test_a_models_words_cannot_break_the_card(tmp_path):
    """Fences, tables, templates: a sample is text."""
    folder = tmp_path / "eval"
    folder.mkdir()
    (folder / "results.json").write_text("{}")
    answer = "```\n# Not a title\n```\n{{ 7 * 7 }}"
    sample = {
        "id": "x",
        "prompt": [{"role": "user", "content": "a\n# b"}],
        "reference": "r",
        "answer": answer,
    }
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    card.run(Job.for_test("card", "card", CARD), {"eval.s": folder}, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert f"````text\n{answer}\n````" in text
    assert "> a\n> # b" in text


def test_the_card_has_the_same_bytes_each_time(tmp_path, made):
    inputs = of(made, "model", "tokenizer", "eval", "parity", "gate")
    job = Job.for_test("card", "card", CARD, inputs={r: (r, "k") for r in inputs})
    card.run(job, dict(reversed(inputs.items())), tmp_path)
    assert content(tmp_path) == content(made["card"])


def test_searches_are_no_answers_of_a_language_model(tmp_path):
    """A base that an embedder is compared with has samples of both."""
    folder = tmp_path / "eval"
    folder.mkdir()
    lines = [
        {"id": "1", "query": "q", "found": []},
        {"id": "2", "prompt": [], "answer": "a", "reference": "b"},
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [sample["id"] for sample in card._samples({"eval.search": folder})] == ["2"]
