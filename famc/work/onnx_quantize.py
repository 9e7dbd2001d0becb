"""A float graph of a decoder -> the same graph with weights of few bits, for ONNX Runtime's own kernels.

In: the graph that onnxruntime-genai's builder makes in fp32, and a recipe. Out: the graph, changed in place: MatMul
becomes MatMulNBits, the embedding's Gather becomes GatherBlockQuantized, and a tied matrix is stored once. One
matrix is in memory at a time: the float weights stay mapped from the builder's file.

The builder's own quantiser holds the whole model several times, can't take weights that GPTQ or AWQ found, and
gives a graph that ONNX Runtime refuses for asymmetric tied models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from famc.work.quantize import Grid, Quantized, quantize

Array = np.ndarray[Any, np.dtype[Any]]

EMBEDDING, HEAD = "/model/embed_tokens/Gather", "/lm_head/MatMul"
DOMAIN = "com.microsoft"
# MatMulNBits: activations are rounded to int8, so that the products run on the CPU's int8 units
ACCURACY_LEVEL = 4

_NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_BLOCKS = {"attn": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True)
class Recipe:
    """How weights lose their bits. `made` holds matrices that were quantised before, by module name."""

    grid: Grid
    algorithm: str = "rtn"
    head: Grid | None = None  # None: the output head stays float
    embedding: Grid | None = None  # None: the embedding stays float
    made: Mapping[str, Quantized] = field(default_factory=dict)


def quantize_graph(
    model: ir.Model,
    recipe: Recipe,
    *,
    tied: bool,
    progress: Callable[[float, float], None] = lambda d, t: None,
) -> dict[str, float]:
    """Replace the weights; returns the relative squared error of each matrix, by node."""
    nodes = {node.name or "": node for node in model.graph}
    head, gather = nodes[HEAD], nodes[EMBEDDING]
    matrices = [
        n for n in nodes.values() if _is_weight_matmul(n) and (n is not head or recipe.head is not None)
    ]
    errors: dict[str, float] = {}
    # an embedding of its own first: a tied one is read from the head's floats, which are released below
    own = _own_embedding(gather, recipe, tied)
    for done, node in enumerate(matrices):
        weight, floats = _rows(node), node.inputs[1]
        packed = _quantized(node, weight, recipe)
        errors[node.name or ""] = packed.error(weight)
        added = _replace_matmul(model.graph, node, packed)
        if node is head and tied and own is None and packed.grid == recipe.embedding and _fits(packed):
            zeros = added.inputs[3] if len(added.inputs) > 3 else None
            _replace_gather(model.graph, gather, packed, (added.inputs[1], added.inputs[2], zeros))
        if floats is not None and isinstance(floats.const_value, ir.ExternalTensor):
            floats.const_value.release()  # its pages of the builder's file
        progress(done + 1, len(matrices))
    if own is not None:
        _replace_gather(model.graph, gather, own, stored_weights(model.graph, "model.embed_tokens", own))
    drop_unused(model.graph)
    model.opset_imports[DOMAIN] = 1
    return errors


def modules_of(node: str) -> tuple[str, ...]:
    """The transformers modules whose weights a node of the builder's graph holds, top to bottom.

    >>> modules_of("/model/layers.3/attn/qkv_proj/MatMul")[1]
    'model.layers.3.self_attn.k_proj'
    >>> modules_of("/lm_head/MatMul")
    ('lm_head',)
    """
    if node == HEAD:
        return ("lm_head",)
    found = _NODE.fullmatch(node)
    if found is None:
        raise ValueError(f"the builder made a matrix that famc does not know: {node}")
    layer, block, name = found.groups()
    return tuple(f"model.layers.{layer}.{_BLOCKS[block]}.{part}" for part in _FUSED.get(name, (name,)))


def _quantized(node: ir.Node, weight: torch.Tensor, recipe: Recipe) -> Quantized:
    modules = modules_of(node.name or "")
    if all(name in recipe.made for name in modules):
        parts = [recipe.made[name] for name in modules]
        grid = parts[0].grid
        zeros = (
            None if grid.symmetric else torch.cat([part.zeros for part in parts if part.zeros is not None])
        )
        return Quantized(
            grid, torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]), zeros
        )
    grid = recipe.grid if node.name != HEAD else (recipe.head or recipe.grid)
    return quantize(weight, grid, _data_free(recipe, grid))


def _data_free(recipe: Recipe, grid: Grid | None = None) -> str:
    """Eight bits are near enough by rounding; so is what a calibrated algorithm did not look at."""
    grid = grid or recipe.embedding or recipe.grid
    return recipe.algorithm if grid.bits == 4 and recipe.algorithm in ("k_quant", "hqq") else "rtn"


def _is_weight_matmul(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and any(v is not None and v.const_value is not None for v in node.inputs)


def _rows(node: ir.Node) -> torch.Tensor:
    """A MatMul's matrix as torch's Linear holds it: [outputs, inputs]."""
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    return torch.from_numpy(np.ascontiguousarray(value.const_value.numpy().T))


def _own_embedding(gather: ir.Node, recipe: Recipe, tied: bool) -> Quantized | None:
    """The embedding quantised by itself; None if it stays float, or is tied to a head of the same grid."""
    if recipe.embedding is None or (tied and recipe.embedding == recipe.head):
        return None
    made = quantize(_embedding_matrix(gather), recipe.embedding, _data_free(recipe, recipe.embedding))
    return made if _fits(made) else None


def _fits(packed: Quantized) -> bool:
    """GatherBlockQuantized has no short last block."""
    return packed.codes.shape[1] % packed.grid.block_size == 0


def _embedding_matrix(gather: ir.Node) -> torch.Tensor:
    """A copy of the embedding as [tokens, hidden]; tied ones reach the Gather through a Transpose of the head."""
    value = gather.inputs[0]
    assert value is not None
    if value.const_value is not None:
        return torch.from_numpy(value.const_value.numpy().copy())
    source = value.producer()
    assert source is not None and source.op_type == "Transpose"
    head = source.inputs[0]
    assert head is not None and head.const_value is not None
    return torch.from_numpy(np.ascontiguousarray(head.const_value.numpy().T))


# --- packing: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md ------------------------


def pack_codes(packed: Quantized) -> Array:
    """MatMulNBits' input B: uint8 [rows, blocks, block_size * bits / 8], the first of two 4-bit codes in the low half."""
    grid = packed.grid
    codes = packed.codes.numpy()
    rows, columns = codes.shape
    blocks = packed.scales.shape[1]
    middle = 2 ** (grid.bits - 1)
    whole: Array = np.full((rows, blocks * grid.block_size), middle, dtype=np.uint8)
    whole[:, :columns] = codes
    if grid.bits == 4:
        whole = whole[:, 0::2] | (whole[:, 1::2] << 4)
    return whole.reshape(rows, blocks, grid.block_size * grid.bits // 8)


def pack_zeros(packed: Quantized) -> Array | None:
    """MatMulNBits' zero points: uint8 [rows, ceil(blocks * bits / 8)]; None for symmetric weights."""
    if packed.zeros is None:
        return None
    zeros: Array = packed.zeros.numpy()
    if packed.grid.bits == 8:
        return zeros
    if zeros.shape[1] % 2:
        zeros = np.concatenate([zeros, np.zeros((len(zeros), 1), dtype=np.uint8)], axis=1)
    both: Array = zeros[:, 0::2] | (zeros[:, 1::2] << 4)
    return both


def stored_weights(
    graph: ir.Graph, name: str, packed: Quantized
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Initializers of a quantised matrix."""
    grid = packed.grid
    made: list[ir.Value | None] = []
    arrays = (
        (f"{name}.weight_Q{grid.bits}G{grid.block_size}", pack_codes(packed)),
        (f"{name}.weight_scale", packed.scales.numpy().astype(np.float32)),
        (f"{name}.weight_zp", pack_zeros(packed)),
    )
    for title, array in arrays:
        if array is None:
            made.append(None)
            continue
        tensor = ir.tensor(np.ascontiguousarray(array), name=title)
        value = ir.Value(name=title, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        made.append(value)
    codes, scales, zeros = made
    assert codes is not None and scales is not None
    return codes, scales, zeros


def _replace_matmul(graph: ir.Graph, node: ir.Node, packed: Quantized) -> ir.Node:
    grid = packed.grid
    rows, columns = packed.codes.shape
    name = (node.name or "").strip("/").replace("/", ".")
    codes, scales, zeros = stored_weights(graph, name, packed)
    inputs = [node.inputs[0], codes, scales, *([zeros] if zeros is not None else [])]
    attributes = {"K": columns, "N": rows, "bits": grid.bits, "block_size": grid.block_size,
                  "accuracy_level": ACCURACY_LEVEL}  # fmt: skip
    added = ir.node(
        "MatMulNBits", inputs, attributes=attributes, domain=DOMAIN, name=f"{node.name}_Q{grid.bits}"
    )
    take_place(graph, node, [added])
    return added


def _replace_gather(
    graph: ir.Graph, gather: ir.Node, packed: Quantized, stored: tuple[Any, Any, Any]
) -> None:
    """Look rows up in quantised weights: the same ones that the head multiplies with, or the embedding's own."""
    grid = packed.grid
    rows, columns = packed.codes.shape
    codes, scales, zeros = stored
    prefix = "/model/embed_tokens"
    shape = ir.tensor([rows, columns * grid.bits // 8], name=f"{prefix}/shape", dtype=ir.DataType.INT64)
    constant = ir.node("Constant", [], attributes={"value": shape}, name=f"{prefix}/Constant")
    flat = ir.node("Reshape", [codes, constant.outputs[0]], name=f"{prefix}/Reshape")
    constant.outputs[0].name, flat.outputs[0].name = (
        f"{prefix}/Constant/output_0",
        f"{prefix}/Reshape/output_0",
    )
    lookup = ir.node(
        "GatherBlockQuantized",
        [flat.outputs[0], gather.inputs[1], scales, *([zeros] if zeros is not None else [])],
        attributes={"bits": grid.bits, "block_size": grid.block_size, "gather_axis": 0, "quantize_axis": 1},
        domain=DOMAIN,
        name=f"{prefix}/GatherBlockQuantized",
    )
    take_place(graph, gather, [constant, flat, lookup])


def take_place(graph: ir.Graph, old: ir.Node, added: list[ir.Node]) -> None:
    """Put nodes where one was; the last of them gives what it gave, under its name."""
    before, after = old.outputs[0], added[-1].outputs[0]
    after.type, after.shape = before.type, before.shape
    name = before.name
    graph.insert_before(old, added)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    after.name = name


def drop_unused(graph: ir.Graph) -> None:
    """Nodes and initializers that nothing reads any more: the float weights, and the Transpose of a tied one."""
    for node in list(graph):
        if (
            node.op_type == "Transpose"
            and not node.outputs[0].uses()
            and not node.outputs[0].is_graph_output()
        ):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
