"""A t5 folder to ONNX, in fp32 or int8: one graph for the encoder, one for the decoder with its cache.

In: a Hugging Face folder. Out: onnx/encoder_model.onnx and onnx/decoder_model_merged.onnx (`_int8` before `.onnx` where
weights have 8 bits), the names and inputs that transformers.js asks for.

"Merged" means a decoder that runs with a cache and without. Others put two graphs behind an If for that. Here one graph
does both: keys and values of the encoder's states are computed for the positions that their cache lacks, which are all
of them at first and none from then on. `past_key_values.N.encoder.*` and `.decoder.*` are of length 0 at first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSeq2SeqLM

from famc.errors import StepFailed
from famc.work.likelihood import without_bars
from famc.work.onnx_encoder import fold, graph_facts, quantise, stamp
from famc.work.onnx_file import quiet, save
from famc.work.scores import read_json

Seq2SeqQuant = Literal["fp32", "int8"]
# what transformers.js adds to a name by its `dtype` option
SUFFIXES: dict[Seq2SeqQuant, str] = {"fp32": "", "int8": "_int8"}
PARTS = ("encoder_model", "decoder_model_merged")
BATCH, SOURCE, TARGET, PAST, SEEN = (
    "batch_size", "encoder_sequence_length", "decoder_sequence_length", "past_decoder_sequence_length",
    "past_encoder_sequence_length",
)  # fmt: skip
LONGEST = 2**20  # of an axis, for the tracer: t5 itself has no end
SIDES = (
    "decoder.key",
    "decoder.value",
    "encoder.key",
    "encoder.value",
)  # of a layer's cache, in the graph's order


def graph_names(quant: Seq2SeqQuant) -> tuple[str, str]:
    """(encoder, decoder), in the folder of the export.

    >>> graph_names("int8")
    ('onnx/encoder_model_int8.onnx', 'onnx/decoder_model_merged_int8.onnx')
    """
    first, second = (f"onnx/{part}{SUFFIXES[quant]}.onnx" for part in PARTS)
    return first, second


def cache_names(layers: int, prefix: str = "past_key_values") -> list[str]:
    """The cache's inputs, or with the prefix `present` its outputs.

    >>> cache_names(1)[:3]
    ['past_key_values.0.decoder.key', 'past_key_values.0.decoder.value', 'past_key_values.0.encoder.key']
    """
    return [f"{prefix}.{layer}.{side}" for layer in range(layers) for side in SIDES]


def build_seq2seq(model_dir: Path, out: Path, quant: Seq2SeqQuant) -> dict[str, float | int | str]:
    """Write both graphs, and say what was made. StepFailed for what can't be exported; nothing is written then."""
    if quant not in SUFFIXES:
        raise StepFailed(f"no ONNX export of t5 in {quant}", f"known: {', '.join(SUFFIXES)}")
    begun = time.perf_counter()
    model = load_t5(model_dir)
    out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, float | int | str] = {}
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=out) as scratch:
        ready = Path(scratch) / "ready"
        ready.mkdir()
        for part, trace, name in zip(PARTS, (_encoder, _decoder), graph_names(quant), strict=True):
            made = _made(trace(model), quant, ready / Path(name).name, Path(scratch) / part)
            facts |= {f"{part.partition('_')[0]}_{key}": value for key, value in made.items()}
        (out / "onnx").mkdir(exist_ok=True)
        for name in graph_names(quant):  # data first, and the old graph gone before
            (out / name).unlink(missing_ok=True)
            (out / f"{name}_data").unlink(missing_ok=True)
        for path in sorted(ready.iterdir(), reverse=True):
            path.replace(out / "onnx" / path.name)
    size = sum(int(facts[f"{side}_bytes"]) for side in ("encoder", "decoder"))
    return {**facts, "bytes": size, "seconds": time.perf_counter() - begun}


def load_t5(model_dir: Path) -> Any:
    """The source in torch, in fp32, with all of its weights."""
    if not (model_dir / "config.json").is_file():
        raise StepFailed(f"{model_dir} has no config.json", "give a Hugging Face model folder")
    name = (read_json(model_dir / "config.json").get("architectures") or ["unknown"])[0]
    if name != "T5ForConditionalGeneration":
        raise StepFailed(
            f"the ONNX export of encoder and decoder doesn't know {name} ({model_dir})",
            "it knows T5ForConditionalGeneration",
        )
    try:
        with without_bars(), quiet():
            model, info = AutoModelForSeq2SeqLM.from_pretrained(
                model_dir, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StepFailed(f"{model_dir} can't be loaded: {error}", "make the model again") from error
    if missing := sorted(info["missing_keys"]):  # transformers would fill them at random
        raise StepFailed(f"{model_dir} lacks the weights {', '.join(missing[:3])}", "make the model again")
    return model.eval()


def _made(program: ir.Model, quant: Seq2SeqQuant, target: Path, scratch: Path) -> dict[str, Any]:
    """Write one graph; what it is made of."""
    scratch.mkdir()
    if quant == "int8":
        save(program, scratch / "fp32.onnx")
        program = ir.load(quantise(fold(scratch / "fp32.onnx", scratch), scratch))
    stamp(program, quant)
    program.graph.name = target.name.partition("_")[0]
    save(program, target)
    return graph_facts(program, target)


# --- what is traced ---------------------------------------------------------------------------------------


class _Distances(torch.nn.Module):
    """T5's bias of each distance as a table, in place of logarithms: where these fall on a whole number (distances 16,
    32, 64), a runtime's rounding would decide between two rows."""

    rows: torch.Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.last = int(attention.relative_attention_max_distance)  # from here on all are alike
        with torch.no_grad():
            bias = attention.compute_bias(2 * self.last + 1, 2 * self.last + 1)
        self.register_buffer("rows", bias[0, :, self.last].T.contiguous())

    def forward(self, length: int, keys: int, *, past_seen_tokens: int = 0, **_: Any) -> torch.Tensor:
        """[1, heads, length, keys], for queries that follow others."""
        queries = torch.arange(length)[:, None] + past_seen_tokens
        apart = torch.arange(keys)[None, :] - queries
        return self.rows[apart.clamp(-self.last, self.last) + self.last].permute(2, 0, 1)[None]


class _Encoder(torch.nn.Module):
    """Token ids and mask -> the states that the decoder attends to."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.config = model.encoder, model.config
        attention = self.encoder.block[0].layer[0].SelfAttention
        self.distances = _Distances(attention)
        attention.__dict__["compute_bias"] = self.distances  # before the class's own

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return {"last_hidden_state": found.last_hidden_state}


class _Decoder(torch.nn.Module):
    """transformers' decoder with its cache as plain tensors, in and out.

    The modules and their order are the model's own; what differs is how the cache grows: `past` holds, for each layer,
    keys and values of what the decoder said and of the encoder's states, either of any length.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head, self.config = model.decoder, model.lm_head, model.config
        self.distances = _Distances(self.decoder.block[0].layer[0].SelfAttention)
        self.scale = model.model_dim**-0.5 if model.config.scale_decoder_outputs else 1.0

    def forward(
        self,
        encoder_attention_mask: torch.Tensor,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        said, read = past[0].shape[2], past[2].shape[2]
        states = self.decoder.embed_tokens(input_ids)
        length = states.shape[1]
        bias = self.distances(length, said + length, past_seen_tokens=said)
        least = torch.finfo(states.dtype).min
        rows = torch.arange(length)[:, None] + said
        bias = bias + torch.where(torch.arange(said + length)[None, :] > rows, least, 0.0)[None, None]
        hidden = (1.0 - encoder_attention_mask[:, None, None, :].to(states.dtype)) * least
        unread = encoder_hidden_states[:, read:]
        present: list[torch.Tensor] = []
        for number, block in enumerate(self.decoder.block):
            own, other, forward = block.layer
            cache = past[4 * number : 4 * number + 4]
            found = own.layer_norm(states)
            mixed, kept = _attend(own.SelfAttention, found, found, cache[0], cache[1], bias)
            states = states + mixed
            present += kept
            mixed, kept = _attend(
                other.EncDecAttention, other.layer_norm(states), unread, cache[2], cache[3], hidden
            )
            states = states + mixed
            present += kept
            states = forward(states)
        return (self.head(self.decoder.final_layer_norm(states) * self.scale), *present)


def _attend(
    layer: Any, queries: torch.Tensor, read: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """(what attention adds, the cache with what was read); T5 does not scale its products."""

    def split(states: torch.Tensor) -> torch.Tensor:
        width = int(layer.key_value_proj_dim)
        return states.reshape(*states.shape[:2], layer.n_heads, width).transpose(1, 2)

    key = torch.cat([key, split(layer.k(read))], dim=2)
    value = torch.cat([value, split(layer.v(read))], dim=2)
    weights = torch.softmax(split(layer.q(queries)) @ key.transpose(2, 3) + bias, dim=-1)
    return layer.o((weights @ value).transpose(1, 2).flatten(2)), [key, value]


def _encoder(model: Any) -> ir.Model:
    # padding in the sample: without it the tracer finds the mask to be of no effect
    ids, mask = torch.full((2, 7), 3), torch.ones(2, 7, dtype=torch.long)
    ids[1, 4:], mask[1, 4:] = model.config.pad_token_id, 0
    axes = {0: torch.export.Dim(BATCH), 1: torch.export.Dim(SOURCE, max=LONGEST)}
    inputs = {"input_ids": ids, "attention_mask": mask}
    with quiet():
        # Here, not above: this import registers patches for every architecture.
        from transformers.exporters import OnnxConfig, OnnxExporter

        config = OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(inputs, axes))
        program: ir.Model = OnnxExporter().export(_Encoder(model), inputs, config).program
    return _tidied(program, [[BATCH, SOURCE], [BATCH, SOURCE]], [[BATCH, SOURCE, model.config.d_model]])


def _decoder(model: Any) -> ir.Model:
    config = model.config
    layers, heads, width = int(config.num_decoder_layers), int(config.num_heads), int(config.d_kv)
    batch, source, said, read, length = (
        2,
        7,
        5,
        3,
        4,
    )  # all different, and none 0 or 1, which would be taken for fixed
    mask = torch.ones(batch, source, dtype=torch.long)
    mask[1, 4:] = 0
    past = [
        torch.randn(batch, heads, read if side.startswith("encoder") else said, width)
        for _ in range(layers)
        for side in SIDES
    ]
    args = (mask, torch.full((batch, length), 3), torch.randn(batch, source, config.d_model), past)
    # What is read is less than the source, the tracer is told. In the graph it may be all of it, or nothing: an ONNX
    # file has no guards, and none of its operators cares.
    dims = {name: torch.export.Dim(name, max=LONGEST) for name in (BATCH, TARGET, PAST)}
    dims |= {
        SOURCE: torch.export.Dim(SOURCE, min=4, max=LONGEST),
        SEEN: torch.export.Dim(SEEN, max=LONGEST - 2),
    }
    shapes = (
        {0: dims[BATCH], 1: dims[SOURCE]},
        {0: dims[BATCH], 1: dims[TARGET]},
        {0: dims[BATCH], 1: dims[SOURCE]},
        [
            {0: dims[BATCH], 2: dims[SEEN if side.startswith("encoder") else PAST]}
            for _ in range(layers)
            for side in SIDES
        ],
    )
    names = ["encoder_attention_mask", "input_ids", "encoder_hidden_states", *cache_names(layers)]
    with quiet(), torch.no_grad():
        traced = torch.export.export(_Decoder(model), args, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            traced, input_names=names, output_names=["logits", *cache_names(layers, "present")], optimize=True
        )
    assert exported is not None
    total = f"{PAST} + {TARGET}"
    sides = {"decoder": PAST, "encoder": SEEN}
    after = {"decoder": total, "encoder": SOURCE}

    def cache(length_of: dict[str, str]) -> list[list[str | int]]:
        made: list[list[str | int]] = []
        for side in SIDES * layers:
            made.append([BATCH, heads, length_of[side.partition(".")[0]], width])
        return made

    return _tidied(
        exported.model,
        [[BATCH, SOURCE], [BATCH, TARGET], [BATCH, SOURCE, config.d_model], *cache(sides)],
        [[BATCH, TARGET, config.vocab_size], *cache(after)],
    )


def _tidied(
    program: ir.Model, inputs: Sequence[Sequence[str | int]], outputs: Sequence[Sequence[str | int]]
) -> ir.Model:
    """Axes under names that a reader, and transformers.js, understands; and no notes of the tracer about the nodes, which
    quote source lines and the paths of this machine."""
    for values, shapes in ((program.graph.inputs, inputs), (program.graph.outputs, outputs)):
        for value, shape in zip(values, shapes, strict=True):
            value.shape = ir.Shape([ir.SymbolicDim(d) if isinstance(d, str) else d for d in shape])
    outside = {*program.graph.inputs, *program.graph.outputs}
    for node in ir.traversal.RecursiveGraphIterator(program.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outside:  # shapes in the tracer's numbers; every runtime infers its own
                value.shape = value.type = None
    return program
