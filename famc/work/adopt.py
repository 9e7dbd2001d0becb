"""`adopt`: an existing checkpoint enters the family.

In: a folder, or a pinned revision on the hub, and the family's tokenizer. Out: a model folder as if famc
had trained it: one safetensors file in fp32, the family's tokenizer files. Shape, vocabulary and licence
are checked before anything is copied; pickled weights and custom code are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from famc.errors import StepFailed
from famc.job import Job
from famc.store import link_or_copy
from famc.work.checkpoint import DTYPES, INDEX, WEIGHTS, convert_weights, shards
from famc.work.likelihood import load_tokenizer
from famc.work.release import TOKENIZER_FILES, with_template
from famc.work.scores import read_json, write_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "README.md",
          "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
          "*.jinja"]  # fmt: skip


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Check all, then copy."""
    torch.set_num_threads(job.threads)
    model = find(job)
    ignored = check_files(model)
    config = read_json(model / "config.json")
    problems = [*shape_problems(config, job.params["shape"]), *tensor_problems(model)]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise StepFailed(
            f"{model} is not of this size:\n{lines}",
            "correct the size in the spec, or adopt another checkpoint",
        )
    same_vocabulary(model, inputs["tokenizer"])
    license_ = license_of(model, job.params.get("license"))

    facts = convert_weights(model, out / WEIGHTS, "fp32", lambda done, total: job.progress(done, total))
    tokenizer = load_tokenizer(inputs["tokenizer"])
    config.pop("torch_dtype", None)
    config |= {"dtype": DTYPES["fp32"][2], "use_cache": True, "bos_token_id": None}
    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_json(out / "config.json", config)
    generation = {"do_sample": False, "eos_token_id": tokenizer.eos_token_id, "max_new_tokens": 256}
    write_json(out / "generation_config.json", generation | {"pad_token_id": tokenizer.pad_token_id})
    for name in TOKENIZER_FILES:
        if name != "tokenizer_config.json" and (inputs["tokenizer"] / name).is_file():
            link_or_copy(inputs["tokenizer"] / name, out / name)
    write_json(out / "tokenizer_config.json", with_template(inputs["tokenizer"]))
    return {**facts, "license": license_, "ignored": ", ".join(ignored)}


def find(job: Job) -> Path:
    """The checkpoint's folder; from the hub at a pinned revision if the spec says so."""
    if job.runtime.get("folder"):
        folder = Path(str(job.runtime["folder"]))
        if not folder.is_dir():
            raise StepFailed(f"{folder} is not a folder", "adopt.path names a Hugging Face model folder")
        return folder
    repo, revision = job.params.get("hf"), job.params.get("revision")
    if not repo or not revision:
        raise StepFailed(f"{job.name}: no checkpoint", "give adopt a path, or hf and revision")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            str(repo), revision=str(revision), allow_patterns=WANTED, local_files_only=job.offline
        )
    except Exception as error:  # the client raises many kinds, and all mean that it is not there
        hint = (
            "the job runs offline: download it first (hf download)"
            if job.offline
            else "look at name and revision"
        )
        raise StepFailed(
            f"{repo} at {revision} can't be fetched: {type(error).__name__}: {error}", hint
        ) from None
    return Path(found)


def check_files(model: Path) -> list[str]:
    """Refuse what is missing, pickled without safetensors, or code. Returns the names of pickles that are
    left behind.
    """
    names = sorted(p.name for p in model.iterdir() if p.is_file())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if WEIGHTS not in names and INDEX not in names:
        if pickles:
            hint = "famc unpickles nothing: save it with save_pretrained(..., safe_serialization=True)"
            raise StepFailed(f"{model} has pickled weights only: {', '.join(pickles)}", hint)
        raise StepFailed(f"{model} has no {WEIGHTS}", "adopt a Hugging Face model folder")
    if "config.json" not in names:
        raise StepFailed(f"{model} has no config.json", "adopt a Hugging Face model folder")
    if "auto_map" in read_json(model / "config.json"):
        raise StepFailed(
            f"{model}/config.json names custom code (auto_map)", "famc runs no code of a checkpoint"
        )
    return pickles


def shape_problems(config: Mapping[str, Any], shape: Mapping[str, Any]) -> list[str]:
    """Every difference between a config.json and what the spec says of the size."""
    heads = config.get("num_attention_heads") or 1
    rope = config.get("rope_parameters") or {}
    has: dict[str, Any] = {
        "arch": config.get("model_type"),
        "vocab": config.get("vocab_size"),
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "ffn": config.get("intermediate_size"),
        "heads": config.get("num_attention_heads"),
        "kv_heads": config.get("num_key_value_heads") or config.get("num_attention_heads"),
        "head_dim": config.get("head_dim") or (config.get("hidden_size") or 0) // heads,
        "tie": bool(config.get("tie_word_embeddings", False)),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
    }
    if shape.get("moe"):
        has.pop("ffn")
        has["moe"] = {
            "experts": config.get("num_local_experts", config.get("num_experts")),  # transformers 5, and 4
            "active": config.get("num_experts_per_tok"),
            "ffn": config.get("moe_intermediate_size"),
        }
    names = [name for name in has if name in shape and has[name] != shape[name]]
    problems = [f"{name}: the checkpoint has {has[name]}, the spec says {shape[name]}" for name in names]
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions < int(shape.get("context") or 0):
        problems.append(f"context: the checkpoint has {positions}, the spec says {shape['context']}")
    return problems


def tensor_problems(model: Path) -> list[str]:
    """Tensors that config.json promises and the files don't hold, or hold in another shape; and the other
    way round.
    """
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except Exception as error:  # transformers has many kinds
        raise StepFailed(f"{model}/config.json is not one that transformers reads: {error}") from error
    if config.model_type not in _DENSE:  # experts are stored one by one and fused when loaded
        return []
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    expected = {name: list(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    found: dict[str, list[int]] = {}
    for shard in shards(model):
        with safe_open(shard, framework="pt") as file:
            found |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"{name} belongs to no {config.model_type}" for name in sorted(found.keys() - expected.keys())
    ]
    problems += [
        f"{name} is {found[name]}, config.json promises {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    return problems


_DENSE = ("llama", "qwen3")


def same_vocabulary(model: Path, family: Path) -> None:
    """Every token has the same id in both, and the same text gets the same ids."""
    if not any((model / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        hint = "put its tokenizer.json beside it: without one, nothing tells whether its ids mean the same"
        raise StepFailed(f"{model} has no tokenizer", hint)
    theirs, ours = load_tokenizer(model), load_tokenizer(family)
    a, b = theirs.get_vocab(), ours.get_vocab()
    other = sorted(
        (t for t in a.keys() | b.keys() if a.get(t) != b.get(t)), key=lambda t: (b.get(t, a.get(t)), t)
    )
    hint = f"make its tokenizer the family's: tokenizer: {{adopt: {model}}}"
    if other:
        shown = ", ".join(
            f"{t!r} is {a.get(t, 'absent')}, the family's {b.get(t, 'absent')}" for t in other[:5]
        )
        more = f", and {len(other) - 5} more" if len(other) > 5 else ""
        raise StepFailed(f"{model}: {len(other)} tokens have other ids: {shown}{more}", hint)
    for text in _PROBES:
        if (
            theirs(text, add_special_tokens=False)["input_ids"]
            != ours(text, add_special_tokens=False)["input_ids"]
        ):
            raise StepFailed(f"{model}: the same tokens, but {text!r} is split otherwise", hint)


_PROBES = (
    "The quick brown fox doesn't jump 1234567 times.",
    "  def f(x):\n\treturn x ** 2  # Größe, naïve\n\n\n",
    "你好，世界! Привет, مرحبا — “quotes” 🙂 \u0065\u0301",
)


def license_of(model: Path, stated: Any) -> str:
    """The licence that the spec states, or that the checkpoint's card names in its front matter."""
    if stated:
        return str(stated)
    card = model / "README.md"
    head = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8"), re.S) if card.is_file() else None
    if head:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError

        try:
            values = YAML(typ="safe", pure=True).load(head[1])
        except YAMLError:
            values = None
        if isinstance(values, dict) and isinstance(values.get("license"), str) and values["license"]:
            return str(
                values.get("license_name")
                if values["license"] == "other" and values.get("license_name")
                else values["license"]
            )
    raise StepFailed(f"{model} states no licence", "write it into the stage: license: SPDX-ID")
