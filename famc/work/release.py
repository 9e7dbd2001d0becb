"""`release`: a variant's finished folder, as the hub and its clients expect it.

In: model, tokenizer, card, `export.<label>`. Out, by `format`: a Hugging Face model folder with README.md, onnx/ and,
of a decoder, genai_config.json, or, of an embedder, sentence-transformers' files; the same with the quantised weights of gptq or awq; or GGUF files with a Modelfile, which Ollama needs and a reranker has not. And
release.json, the list of its files. Large files are hard links. At last a model folder is loaded as a user would load
it; GGUF files were loaded by llama.cpp in their parity checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from famc.errors import StepFailed
from famc.job import Job
from famc.steps.exports import (
    CALIBRATED_FORMATS,
    CONVERTING,
    GENAI_CONFIG,
    GENAI_ORDER,
    TEXT,
    VECTORS,
    task_in,
)
from famc.store import link_or_copy
from famc.work.checkpoint import HF_FILES, INDEX, WEIGHTS
from famc.work.encoder_session import prompts_of
from famc.work.export import copy_modules
from famc.work.likelihood import document_start, encode_prompt, end_ids, load_tokenizer, without_bars
from famc.work.scores import read_json, write_json
from famc.work.try_encoder import try_encoder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
MAX_NEW_TOKENS = 256
REQUIRED = ("config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)
# of an embedder: what it writes before a text, by what the text is
PROMPTS = ("query", "document")


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Put the folder together, and look at it."""
    fmt = str(job.params.get("format") or "")
    exports = {r.removeprefix("export."): p for r, p in sorted(inputs.items()) if r.startswith("export.")}
    if fmt == "gguf":
        facts = gguf_folder(job, inputs, exports, out)
    else:
        facts = model_folder(job, inputs, exports, out, quantised=fmt in CALIBRATED_FORMATS)
    files = {p.relative_to(out).as_posix(): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    write_json(
        out / "release.json",
        {"repo": job.params["repo"], "license": job.params.get("license"), "files": files},
    )
    return {"repo": str(job.params["repo"]), "files": len(files), "bytes": sum(files.values()), **facts}


def model_folder(
    job: Job, inputs: Mapping[str, Path], exports: Mapping[str, Path], out: Path, *, quantised: bool
) -> dict[str, Any]:
    """A folder for transformers: the model's own weights with onnx/, or the quantised ones of a calibrated export."""
    model = inputs["model"]
    if quantised:
        (weights,) = exports.values()
    else:
        weights = exports.get("safetensors-bf16") or model
    if (weights / INDEX).is_file():
        raise StepFailed(f"{weights} is sharded", "export it as safetensors: that makes one file")

    added: dict[str, Path] = {}

    def add(relative: str, source: Path) -> None:
        if relative in added:
            raise StepFailed(
                f"{job.name}: {relative} comes from {added[relative]} and from {source}", "drop one export"
            )
        added[relative] = source
        link_or_copy(source, out / relative)

    written = {"config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in HF_FILES:
        if (model / name).is_file() and name not in written:
            add(name, model / name)
    if not (weights / WEIGHTS).is_file():
        raise StepFailed(f"{weights} has no {WEIGHTS}", "famc build makes it again")
    add(WEIGHTS, weights / WEIGHTS)
    for label, folder in exports.items():
        if label.startswith("onnx-"):
            for path in sorted((folder / "onnx").iterdir()):
                add(f"onnx/{path.name}", path)
    if "card" in inputs:
        add("README.md", inputs["card"] / "README.md")

    task = task_in(read_json(model / "config.json"), (model / "modules.json").is_file())
    write_json(out / "config.json", config_of(weights, sorted(added), generates=task in (TEXT, CONVERTING)))
    if task != TEXT:
        return other_folder(job, model, weights, out, task)
    write_json(out / "tokenizer_config.json", with_template(model))
    tokenizer = load_tokenizer(out)
    if tokenizer.chat_template != load_tokenizer(inputs["tokenizer"]).chat_template:
        raise StepFailed(
            f"{job.name}: the model's chat template is not the family's", "famc build makes the model again"
        )
    write_json(
        out / "generation_config.json", generation_of(model, tokenizer, int(job.params["max_context"]))
    )
    graphs = [exports[f"onnx-{quant}"] for quant in GENAI_ORDER if f"onnx-{quant}" in exports]
    if graphs:  # onnxruntime-genai reads one graph of a folder
        write_json(out / GENAI_CONFIG, genai_of(graphs[0], out, tokenizer))
    complete(job, out, (*REQUIRED, "generation_config.json"))
    return try_out(out, tokenizer, job.threads)


def other_folder(job: Job, model: Path, weights: Path, out: Path, task: str) -> dict[str, Any]:
    """What is particular to an embedder, a reranker, a masked LM or a T5: no chat template, and its own tokenizer, which
    need not be the family's."""
    write_json(out / "tokenizer_config.json", encoder_words(model))
    required = [*REQUIRED, *copy_modules(model, out)]
    if task == VECTORS:
        prompts = prompts_of(model)
        absent = [name for name in PROMPTS if name not in prompts]
        exported = prompts_of(weights)
        if absent or exported != prompts:
            what = (
                f"no prompt for {' and '.join(absent)} in {model}" if absent else f"{weights} has {exported}"
            )
            raise StepFailed(
                f"{job.name}: prompts missing at export: {what}",
                "without them a user gets other vectors than those that were measured: famc build makes it again",
            )
    if task == CONVERTING:
        tokenizer = load_tokenizer(out)
        made = generation_of(model, tokenizer, int(job.params["max_context"]))
        write_json(out / "generation_config.json", made)
        required.append("generation_config.json")
    complete(job, out, required)
    return try_encoder(out, task, job.threads)


def complete(job: Job, out: Path, required: Sequence[str]) -> None:
    """No file of these may be missing."""
    missing = [name for name in required if not (out / name).is_file()]
    if missing:
        raise StepFailed(
            f"{job.name}: the model folder lacks {', '.join(missing)}", "famc build makes it again"
        )


def gguf_folder(
    job: Job, inputs: Mapping[str, Path], exports: Mapping[str, Path], out: Path
) -> dict[str, Any]:
    """A folder for llama.cpp: every GGUF file, and a Modelfile with which Ollama serves the smallest; Ollama serves no
    rerankers."""
    from famc.work.ollama import embedder_modelfile, modelfile

    files = [path for folder in exports.values() for path in sorted(folder.glob("*.gguf"))]
    if len(files) != len(exports):
        raise StepFailed(
            f"{job.name}: {len(files)} GGUF files of {len(exports)} exports", "famc build makes them again"
        )
    for path in files:
        link_or_copy(path, out / path.name)
    smallest = min(files, key=lambda path: (path.stat().st_size, path.name)).name
    model, context = inputs["model"], int(job.params["max_context"])
    task = task_in(read_json(model / "config.json"), (model / "modules.json").is_file())
    text = ""
    if task == TEXT:
        tokenizer = load_tokenizer(inputs["tokenizer"])
        ends = [tokenizer.convert_ids_to_tokens(i) for i in sorted(end_ids(tokenizer))]
        text = modelfile(smallest, tokenizer.chat_template, ends, context)
    elif task == VECTORS:
        text = embedder_modelfile(smallest, context)
    if text:
        (out / "Modelfile").write_text(text, encoding="utf-8")
    if "card" in inputs:
        link_or_copy(inputs["card"] / "README.md", out / "README.md")
    return {"ggufs": len(files)}


def config_of(folder: Path, files: list[str], *, generates: bool = True) -> dict[str, Any]:
    """config.json with the cache on if it generates, the rotary base where older clients look for it, and what transformers.js must
    know of weights beside a graph."""
    config: dict[str, Any] = read_json(folder / "config.json")
    if generates:
        config["use_cache"] = (
            True  # training turns it off; without it each new token costs a whole forward pass
        )
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        # transformers before 5, and much that reads its files, looks here, and takes 10000 in silence if it finds none
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    outside: dict[str, int] = {}
    for name in files:
        graph, found, _ = name.rpartition("_data")
        if found and graph in files:
            outside[Path(graph).name] = outside.get(Path(graph).name, 0) + 1
    config.pop("transformers.js_config", None)
    if outside:
        config["transformers.js_config"] = {"use_external_data_format": outside}
    return config


def genai_of(export: Path, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """genai_config.json that ends answers where generation_config.json ends them: the builder guesses what
    config.json leaves open (a missing bos becomes token 1)."""
    config: dict[str, Any] = read_json(export / GENAI_CONFIG)
    generation = read_json(folder / "generation_config.json")
    config["model"] |= {
        "eos_token_id": generation["eos_token_id"],
        "pad_token_id": generation["pad_token_id"],
        "bos_token_id": document_start(tokenizer),
    }
    return config


def with_template(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with the chat template inside: transformers.js does not read
    chat_template.jinja.
    """
    config: dict[str, Any] = read_json(folder / "tokenizer_config.json")
    apart = folder / "chat_template.jinja"
    if apart.is_file():  # transformers prefers it to the one inside
        config["chat_template"] = apart.read_text(encoding="utf-8")
    if (
        config.get("tokenizer_class") == "TokenizersBackend"
    ):  # transformers 5's name, which 4 and others do not know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # of decoders; left out, transformers 4 adds token_type_ids, which `generate` then refuses
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return config


def encoder_words(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json without a chat template: with one, sentence-transformers renders a reranker's pairs as a
    chat. A class and names of inputs that transformers 4 and transformers.js know."""
    config = with_template(folder)
    config.pop("chat_template", None)
    return config


def generation_of(model: Path, tokenizer: Any, context: int) -> dict[str, Any]:
    """generation_config.json: where answers end, what pads, and an end for those that don't."""
    path = model / "generation_config.json"
    config: dict[str, Any] = read_json(path) if path.is_file() else {}
    for internal in ("_from_model_config", "output_attentions", "output_hidden_states"):
        config.pop(internal, None)
    if config.get("eos_token_id") is None:
        config["eos_token_id"] = tokenizer.eos_token_id
    if config.get("pad_token_id") is None:
        config["pad_token_id"] = tokenizer.pad_token_id
    for name in ("eos_token_id", "pad_token_id"):
        if config[name] is None:
            raise StepFailed(
                f"neither generation_config.json nor the tokenizer names {name}", "name it in the tokenizer"
            )
    config["max_new_tokens"] = min(int(config.get("max_new_tokens") or MAX_NEW_TOKENS), max(1, context // 2))
    config.setdefault("do_sample", False)
    config["use_cache"] = True
    return dict(sorted(config.items()))


def try_out(folder: Path, tokenizer: Any, threads: int) -> dict[str, Any]:
    """Load the folder as its users do: no tensor may be missing or unknown, and it must answer."""
    torch.set_num_threads(threads)
    try:
        with without_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever it raises, a user of the folder would see it
        raise StepFailed(f"{folder.name} can't be loaded: {error}", "famc build makes it again") from error
    wrong: Mapping[str, Any] = {k: sorted(map(str, v)) for k, v in info.items() if v}
    if wrong:
        lines = "; ".join(f"{key}: {', '.join(names[:5])}" for key, names in wrong.items())
        raise StepFailed(
            f"{folder.name} does not load cleanly: {lines}", "config.json and weights do not belong together"
        )
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    if not ends <= end_ids(tokenizer):
        raise StepFailed(
            f"generation_config.json ends answers at {sorted(ends)}",
            f"the tokenizer: {sorted(end_ids(tokenizer))}",
        )
    prompt = [document_start(tokenizer)]
    if tokenizer.chat_template is not None:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt]), logits_to_keep=1).logits
    if not bool(torch.isfinite(logits).all()):
        raise StepFailed(
            f"{folder.name} answers with numbers that are not finite", "look at the losses of its training"
        )
    return {"dtype": str(model.dtype).removeprefix("torch.")}
