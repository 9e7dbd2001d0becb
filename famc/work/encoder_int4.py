"""An encoder's traced graph with weights of few bits: what `onnx_quantize` does to a decoder's graph, for any graph.

In: the float graph of an embedder or reranker, constants folded, and a recipe. Out: the graph, changed in place: every
MatMul and Gemm with a matrix of its own becomes MatMulNBits, every table of embeddings GatherBlockQuantized. One matrix
is in memory at a time beside the graph.

A matrix with few outputs stays float: a reranker's head, whose error would be the score's, weighs nothing.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from famc.work.onnx_quantize import ACCURACY_LEVEL, DOMAIN, Recipe, drop_unused, stored_weights, take_place
from famc.work.quantize import Quantized, quantize

FEW = 16  # outputs, or rows of a table, up to which a matrix stays float


def quantize_encoder(program: ir.Model, recipe: Recipe) -> dict[str, float]:
    """Replace the weights; returns the relative squared error of each matrix, by node."""
    errors: dict[str, float] = {}
    for node in list(program.graph):
        name = node.name or node.op_type
        if node.op_type in ("MatMul", "Gemm") and (weight := _matrix(node)) is not None:
            if min(weight.shape) > FEW:
                packed = quantize(weight, recipe.grid, recipe.algorithm)
                errors[name] = packed.error(weight)
                _replace_product(program.graph, node, packed)
        elif node.op_type == "Gather" and (table := _table(node)) is not None:
            grid = recipe.embedding
            if grid is not None and min(table.shape) > FEW and table.shape[1] % grid.block_size == 0:
                packed = quantize(table, grid, recipe.algorithm if grid.bits == 4 else "rtn")
                errors[name] = packed.error(table)
                _replace_lookup(program.graph, node, packed)
    drop_unused(program.graph)
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(program.graph)}
    for domain in list(program.opset_imports):
        if domain not in used:  # ONNX Runtime writes down every domain that it knows
            program.opset_imports.pop(domain)
    program.opset_imports[DOMAIN] = 1
    return errors


def _matrix(node: ir.Node) -> torch.Tensor | None:
    """The matrix that a product reads, [outputs, inputs]; None if it has none, or more than the product is done."""
    value = node.inputs[1]
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    rows = value.const_value.numpy()
    if node.op_type == "Gemm":
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if attributes.get("transA", 0) or (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) != (
            1.0,
            1.0,
        ):
            return None
        if attributes.get("transB", 0):
            return torch.from_numpy(rows.copy())
    return torch.from_numpy(rows.T.copy())


def _table(node: ir.Node) -> torch.Tensor | None:
    """The table of embeddings that a Gather looks up, [tokens, hidden]."""
    value, axis = node.inputs[0], node.attributes.get("axis")
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    if (axis is not None and axis.value != 0) or value.const_value.dtype != ir.DataType.FLOAT:
        return None
    return torch.from_numpy(value.const_value.numpy().copy())


def _replace_product(graph: ir.Graph, node: ir.Node, packed: Quantized) -> None:
    rows, columns = packed.codes.shape
    codes, scales, zeros = stored_weights(graph, f"{node.name}", packed)
    attributes = {"K": columns, "N": rows, "bits": packed.grid.bits, "block_size": packed.grid.block_size,
                  "accuracy_level": ACCURACY_LEVEL}  # fmt: skip
    product = ir.node(
        "MatMulNBits", [node.inputs[0], codes, scales, *([zeros] if zeros is not None else [])],
        attributes=attributes, domain=DOMAIN, name=f"{node.name}_Q{packed.grid.bits}",
    )  # fmt: skip
    added = [product]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:  # a Gemm's
        product.outputs[0].name = f"{node.name}_product"
        added.append(ir.node("Add", [product.outputs[0], bias], name=f"{node.name}_bias"))
    take_place(graph, node, added)


def _replace_lookup(graph: ir.Graph, node: ir.Node, packed: Quantized) -> None:
    """GatherBlockQuantized reads [tokens, hidden * bits / 8]: the codes as MatMulNBits has them, but in rows."""
    rows = len(packed.codes)
    codes, scales, zeros = stored_weights(graph, f"{node.name}", packed)
    assert codes.const_value is not None
    flat = ir.tensor(codes.const_value.numpy().reshape(rows, -1), name=codes.name)
    codes.const_value, codes.shape = flat, flat.shape
    lookup = ir.node(
        "GatherBlockQuantized",
        [codes, node.inputs[1], scales, *([zeros] if zeros is not None else [])],
        attributes={"bits": packed.grid.bits, "block_size": packed.grid.block_size, "gather_axis": 0,
                    "quantize_axis": 1},
        domain=DOMAIN, name=f"{node.name}_Q{packed.grid.bits}",
    )  # fmt: skip
    take_place(graph, node, [lookup])
