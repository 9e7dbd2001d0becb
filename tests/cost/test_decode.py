"""Bytes a token and what follows from them, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from famc.backend import load_accelerator
from famc.cost import decode
from famc.cost.parameters import count
from famc.cost.shape import PRESETS, Moe, Shape

# 2 layers of 64: attention 2*64*32*(4+2) = 24,576, ffn 3*64*128 = 24,576, norms 2*64+2*32 = 192; head 100*64
# = 6,400
SMALL = Shape("qwen3", 100, 2, 64, 128, 4, 2, 32, True, 256)
MATRICES, HEAD, NORMS = 2 * (24_576 + 24_576), 6_400, 2 * 192 + 64


def test_bits_of_a_block():
    """a scale in 32 bits for 32 weights is one bit a weight; zero points take 4 bits a block."""
    assert decode.block_bits(4, 32) == 5.0
    assert decode.block_bits(4, 128) == 4.25
    assert decode.block_bits(4, 32, symmetric=False) == 5.125
    assert decode.block_bits(4, 128, scale_bits=16) == 4.125
    with pytest.raises(ValueError, match="block_size"):
        decode.block_bits(4, 0)


def test_weights_read_in_full_precision():
    """fp32: every parameter once, but of the table a single row, and the head even where it is tied to it."""
    how = decode.stored("onnx", "fp32")
    assert decode.weight_bytes(SMALL, how) == 4 * (MATRICES + HEAD + NORMS + 64)
    assert decode.weight_bytes(SMALL, how) == 4 * (count(SMALL).total + 64)
    untied = replace(SMALL, tie=False)
    assert decode.weight_bytes(untied, how) == decode.weight_bytes(SMALL, how)


def test_weights_read_of_int4():
    """blocks at 5 bits, head and row at 9, norms in fp32."""
    how = decode.stored("onnx", "int4", block_size=32)
    by_hand = (MATRICES * 5 + (HEAD + 64) * 9 + NORMS * 32) / 8
    assert decode.weight_bytes(SMALL, how) == by_hand
    whole = decode.stored("onnx", "int4", block_size=16, symmetric=False, head="fp32", table="fp32")
    assert decode.weight_bytes(SMALL, whole) == (MATRICES * 6.25 + (HEAD + 64) * 32 + NORMS * 32) / 8
    assert decode.stored("onnx", "int4", tie=False, table="fp32").table == 32
    assert decode.stored("onnx", "int4", tie=True, table="fp32").table == 9


@pytest.mark.parametrize(
    ("fmt", "quant", "bits"),
    [
        ("onnx", "int8", (9, 9)), ("onnx", "fp16", (16, 16)), ("gguf", "q4_0", (4.5, 6.5625)), ("gguf", "Q8_0", (8.5, 8.5)),
        ("gguf", "q4_k_m", (4.85, 6.5625)), ("gguf", "f16", (16, 16)), ("safetensors", "bf16", (16, 16)),
        ("gptq", "4", (4.5, 16)), ("awq", "8", (8.5, 16)),
    ],
)  # fmt: skip
def test_formats(fmt, quant, bits):
    """bits of the blocks and of the head, scales included."""
    how = decode.stored(fmt, quant)
    assert (how.body, how.head) == bits


def test_unknown_format():
    with pytest.raises(ValueError, match="gguf q3_x"):
        decode.stored("gguf", "q3_x")


def test_a_mixture_reads_its_active_experts():
    """2 of 8 experts of 32: 3*64*32*2, and the router 64*8."""
    moe = replace(SMALL, arch="qwen3_moe", moe=Moe(8, 2, 32))
    how = decode.stored("onnx", "fp32")
    ffn = 3 * 64 * 32 * 2 + 64 * 8
    assert decode.weight_bytes(moe, how) == 4 * (2 * (24_576 + ffn) + HEAD + NORMS + 64)


def test_cache_and_limit():
    """the token after 9 others reads their keys and values and writes its own; fp16 halves both."""
    how = decode.stored("onnx", "fp32")
    assert decode.cache_bytes(SMALL, how, 9) == 2 * 2 * 2 * 32 * 4 * 10
    assert decode.cache_bytes(SMALL, replace(how, cache=2.0), 9) == 2 * 2 * 2 * 32 * 2 * 10
    moved = decode.weight_bytes(SMALL, how) + decode.cache_bytes(SMALL, how, 9)
    assert decode.token_bytes(SMALL, how, 9) == moved
    assert decode.limit(SMALL, how, 1e9, 9) == pytest.approx(1e9 / moved)
    assert decode.limit(SMALL, how, 1e9, 200) < decode.limit(SMALL, how, 1e9, 9)


def test_qwen3_8b_on_an_h100():
    """a known figure: 8.2 B parameters in bf16 less the table are 15.1 GB, 222 tokens/s from 3.35 TB/s."""
    shape = PRESETS["qwen3-8b"]
    how = decode.stored("torch", "bf16", tie=False)
    assert decode.weight_bytes(shape, how) == pytest.approx(
        2 * (count(shape).total - 151_936 * 4096), rel=1e-3
    )
    assert decode.limit(shape, how, 3.35e12) == pytest.approx(221, rel=0.01)


def test_prediction_is_below_the_limit_and_has_a_basis():
    """the share of the bandwidth and the start of kernels both cost; more bytes, fewer tokens."""
    device = load_accelerator("cpu").with_cores(2).device
    shape = PRESETS["qwen3-0.6b"]
    speeds = []
    for quant in ("fp32", "int8", "int4"):
        how = decode.stored("onnx", quant)
        told = decode.predict(shape, how, device, "onnxruntime-genai", quant, prompt=512, tokens=64)
        assert told.decode < decode.limit(shape, how, device.bandwidth, 544)
        assert told.first_token == pytest.approx(512 / told.prefill)
        assert told.prefill > told.decode
        speeds.append(told.decode)
    assert speeds == sorted(speeds)
    assert decode.efficiency("onnxruntime-genai", "int4").basis == "measured"
    assert decode.efficiency("onnxruntime", "fp16").basis == "assumed"
    assert decode.efficiency("another", "int4").basis == "assumed"


def test_prediction_by_hand():
    """decode: bytes at the middle / (bandwidth x share) + layers x start; prefill: FLOPs over the peak's
    share."""
    device = load_accelerator("cpu").with_cores(1).device
    how = decode.stored("torch", "fp32")
    known = decode.efficiency("torch", "fp32")
    told = decode.predict(SMALL, how, device, "torch", "fp32", prompt=100, tokens=10)
    seconds = decode.token_bytes(SMALL, how, 105) / (device.bandwidth * known.share) + 2 * known.layer
    assert told.decode == pytest.approx(1 / seconds)
    # torch computes the logits of the last position only; attention's core is 4 * 4 * 32 * 100 / 2 a token
    # and layer
    work = 100 * (2 * MATRICES + 2 * 4 * 4 * 32 * 100 * 0.5) + 2 * HEAD
    share = known.compute * 64 / (64 + 16) * 100 / (100 + 16)
    first = max(
        work / (device.peak("fp32") * share),
        decode.weight_bytes(SMALL, how) / (device.bandwidth * known.share),
    )
    assert told.first_token == pytest.approx(first + 2 * known.layer)


def test_a_precision_that_the_device_lacks():
    """a CPU without bf16 units computes bf16 as what it has."""
    device = replace(load_accelerator("cpu").with_cores(2).device, peaks=(("fp32", 1e11),))
    how = decode.stored("torch", "bf16")
    assert decode.predict(SMALL, how, device, "torch", "bf16", prompt=8, tokens=8).prefill > 0


@pytest.mark.parametrize("name", ["bert-base", "modernbert-base", "t5-base"])
def test_readers_weigh_what_they_have(name):
    """fp32: every parameter once, in the file and in a pass; the table is the head's own."""
    shape = PRESETS[name]
    how = decode.stored("onnx", "fp32")
    assert decode.file_bytes(shape, how) == 4 * count(shape).total
    assert decode.weight_bytes(shape, how) == 4 * (count(shape).total + shape.hidden)
    assert decode.file_bytes(shape, decode.stored("onnx", "int8")) < 0.35 * decode.file_bytes(shape, how)


def test_an_encoder_moves_no_cache_and_t5_that_of_both_texts():
    how = decode.stored("onnx", "fp32")
    assert decode.cache_bytes(PRESETS["bert-base"], how, 100) == 0
    assert decode.cache_bytes(PRESETS["t5-base"], how, 99) == 2 * 12 * 768 * 4 * 100


@pytest.mark.parametrize("name", ["bert-base", "modernbert-base", "t5-base"])
def test_a_reader_has_a_prediction(name):
    device = load_accelerator("cpu").with_cores(2).device
    told = decode.predict(
        PRESETS[name], decode.stored("torch", "fp32"), device, "torch", "fp32", prompt=128, tokens=8
    )
    assert told.prefill > told.decode > 0
    assert told.first_token == pytest.approx(128 / told.prefill)
