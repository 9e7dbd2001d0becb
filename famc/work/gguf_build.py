"""A Hugging Face folder of a decoder, embedder or reranker to one GGUF file, for llama.cpp, Ollama and LM Studio.

In: a model folder (config.json, safetensors, tokenizer). Out: one .gguf with weights, tokenizer and chat
template, or pooling. f16, bf16, f32 and q8_0 are written here; what llama.cpp mixes by its own rules (q4_k_m keeps some
tensors at more bits) is made by llama.cpp itself.

Refused rather than guessed, since llama.cpp would load it and answer wrongly: other architectures and kinds
of RoPE, sliding windows, and tokenizers whose splitting rule llama.cpp has no name for. One difference
stays: llama.cpp doesn't normalise text of byte-level BPEs, so text that isn't NFC gets other ids there than
from a tokenizer with an NFC normaliser.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PretrainedConfig

from famc.errors import did_you_mean
from famc.steps.exports import TEXT
from famc.work.gguf_file import stored_tensors
from famc.work.gguf_source import EXACT, QUANTS, ROPE_FREQS, Quant, Source, source_config
from famc.work.gguf_vocabulary import read_vocabulary


def build_gguf(
    model_dir: Path,
    target: Path,
    quant: str,
    *,
    name: str,
    task: str = TEXT,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float | int | str]:
    """Write `target` and say what was made; ValueError for what llama.cpp can't do as the source does.

    One tensor is in memory at a time. `fallback` counts the matrices whose rows don't divide into the blocks
    of the type that they should have had.
    """
    if quant not in QUANTS:
        raise ValueError(f"no GGUF quantisation {quant!r}; {did_you_mean(quant, QUANTS)}")
    begun = time.perf_counter()
    how = QUANTS[quant]
    config = _config(model_dir, task)
    vocabulary = read_vocabulary(model_dir, config, task)
    quantize = _llama_quantizer() if how.by_llama_cpp else None  # before minutes of work
    target.parent.mkdir(parents=True, exist_ok=True)
    # a folder of its own: on failure all goes with it, and the rename stays on one disk
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=target.parent) as scratch, ExitStack() as stack:
        source = _source(model_dir, config, stack, task)
        made = Path(scratch) / "made.gguf"
        if quantize is None:
            source.write(made, how, vocabulary, name, progress)
        else:
            wide = Path(scratch) / "wide.gguf"
            source.write(wide, source.lossless(), vocabulary, name, progress)
            quantize(wide, made, int(how.file_type), threads)
        facts = _facts(made, how)
        made.replace(target)
    return {
        "file": target.name,
        **facts,
        "tokenizer_pre": vocabulary.pre,
        "seconds": time.perf_counter() - begun,
    }


def _config(model_dir: Path, task: str) -> PretrainedConfig:
    if task == TEXT:
        return source_config(model_dir)
    from famc.work.gguf_encoder import encoder_config

    return encoder_config(model_dir, task)


def _source(model_dir: Path, config: PretrainedConfig, stack: ExitStack, task: str) -> Source:
    if task == TEXT:
        return Source(model_dir, config, stack)
    from famc.work.gguf_encoder import EncoderSource

    return EncoderSource(model_dir, config, stack, task)


def _llama_quantizer() -> Callable[[Path, Path, int, int], None]:
    try:
        from famc.work.llama_cpp import quantize_file
    except ImportError as error:
        raise ValueError(
            f"this quantisation needs llama.cpp ({error}): pip install 'famc[gguf]'; f16, bf16 and q8_0 don't"
        ) from None
    return quantize_file


def _facts(made: Path, how: Quant) -> dict[str, float | int | str]:
    tensors = stored_tensors(made)
    types = Counter(tensor.kind for tensor in tensors)
    matrices = [t for t in tensors if len(t.shape) > 1 and t.name not in EXACT]
    fallback = sum(1 for tensor in matrices if tensor.kind not in how.types)
    return {
        "bytes": made.stat().st_size,
        "tensors": len(tensors),
        "parameters": sum(math.prod(t.shape) for t in tensors if t.name != ROPE_FREQS),
        **{f"tensors_{kind.name.lower()}": types[kind] for kind in sorted(types)},
        "fallback": fallback,
    }


def tensor_errors(gguf_file: Path, model_dir: Path, task: str = TEXT) -> dict[str, float]:
    """Relative squared error of every tensor against the source's weights, by GGUF name, worst first."""
    errors: dict[str, float] = {}
    with ExitStack() as stack:
        source = _source(model_dir, _config(model_dir, task), stack, task)
        data = np.memmap(gguf_file, mode="r")
        for tensor in stored_tensors(gguf_file):
            if tensor.name not in source.names:
                continue
            width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
            block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
            at, wrong, total = tensor.offset, 0.0, 0.0
            for chunk in source.chunks(tensor.name):
                weights = chunk.to(torch.float64).numpy().reshape(-1, width)
                nbytes = weights.size // block * size
                packed = np.asarray(data[at : at + nbytes]).reshape(len(weights), -1)
                kept = gguf.quants.dequantize(packed, tensor.kind)
                wrong += float(np.square(kept - weights).sum())
                total += float(np.square(weights).sum())
                at += nbytes
            errors[tensor.name] = wrong / total if total else 0.0
    return dict(sorted(errors.items(), key=lambda item: (-item[1], item[0])))
