"""What this machine's CPU does: matrix products, linear layers, element-wise work, memory, a training step.

In: seconds to spend. Out: a dict of figures in the units of `famc.backend.CpuMeasured`. Run as a process of its own
(`python -m famc.work.measure OUT.json`), so that no other library's threads disturb it. Each figure is the first quartile of
its repetitions: another program can only make them slower.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from famc.cost.cpu_time import PROBE, PROBE_ROWS, Step, step_seconds
from famc.cost.device import GB
from famc.cost.of_shape import anatomy
from famc.cost.shape import DECODERS, Shape

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
WIDTHS = (32, 64, 128, 256, 512, 1024)
ROWS = (128, 1024, 8192)
SIZES_MB = (0.25, 1.0, 4.0, 16.0, 32.0, 36.0, 64.0)  # above 33.5 MB glibc asks for fresh pages each time
MEMORY_MB = 256
MATVEC = (4096, 8192)  # 134 MB in fp32: more than a cache
BEST = (512, 1024, 2048)  # of which the best product is taken
LARGEST = 2e10  # FLOPs of a pass that is repeated thrice; larger ones are left out of the curve
FRESH_WIDTHS = (64, 256, 1024)
FRESH_ROWS = 9
TRAINER_STEPS = 60
QUIET: dict[str, Any] = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10,
    "dataloader_pin_memory": False, "remove_unused_columns": False,
}  # fmt: skip


def measure(seconds: float = 35.0, *, cores: int | None = None) -> dict[str, Any]:
    """All figures, in about `seconds` (10 at least) and a quarter more on a busy machine.

    `cores`: threads of the second set of curves beside those of one thread; default: torch's own number.
    Keys: those of `CpuMeasured` that do not name the machine. `disturbed`: the second set was useless and is left out.
    """
    began = time.perf_counter()
    startup = _startup()
    many = cores or torch.get_num_threads()
    counts = (1,) if many == 1 else (1, many)
    left = max(seconds, 10.0) - (time.perf_counter() - began) - 6.0  # for Trainer and the real step
    each = max(left, 4.0) / len(counts)
    _settle()
    vectors = {threads: _vectors(threads, each / 40) for threads in counts}  # before anything large was freed
    curves = [_curves(threads, each, vectors[threads]) for threads in counts]
    disturbed = len(curves) > 1 and _disturbed(*curves)
    torch.set_num_threads(1)
    made = {
        "torch": torch.__version__,
        "step_overhead_ms": round(_trainer_overhead() * 1e3, 3),
        "startup_s": round(startup, 2),
        "disturbed": disturbed,
        "curves": curves[:1] if disturbed else curves,
    }
    return {**made, "residual": round(_residual(made), 3)}


def _startup() -> float:
    """CPU seconds of this process, once all that a training job imports is there."""
    import transformers.trainer  # noqa: F401  # torch itself is in already

    import famc.work.training  # noqa: F401

    return time.process_time()


def _disturbed(one: Mapping[str, Any], many: Mapping[str, Any]) -> bool:
    """Whether other programs held cores that the threads wanted: threads that wait for each other at the end of every product
    then lose far more than their share. Of large layers a quarter is slower than with one thread."""
    lost = [
        b < 0.7 * a
        for name in PRECISIONS
        for (width, rows, a), (_, _, b) in zip(
            one["linear_gflops"][name], many["linear_gflops"][name], strict=True
        )
        if width >= 128 and rows >= 1024
    ]
    return bool(sum(lost) > len(lost) / 4)


def _time(run: Callable[[], object], budget: float) -> float:
    """Seconds of `run`, the best of its repetitions: once unmeasured, then for `budget` seconds; thrice at least, unless that takes
    four times as long.

    Other programs only ever make it slower. One thread's own CPU time leaves out when it had to wait for them; of several
    threads that would be a sum, and the wall is what counts.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    best, left, spent, began = math.inf, 3, 0.0, time.perf_counter()
    while math.isinf(best) or spent < budget or (left > 0 and spent < 4 * budget):
        at = clock()
        run()
        best, left, spent = min(best, clock() - at), left - 1, time.perf_counter() - began
    return best


def _vectors(threads: int, budget: float) -> list[list[float]]:
    """[MB, GB/s] by size. glibc serves what is larger than its threshold from its own free chunks where it has such: a process
    that has freed larger ones measures something else than a job's steps, whose tensors are all in use."""
    torch.set_num_threads(threads)
    return [[mb, round(_vector(mb, budget) / GB, 2)] for mb in SIZES_MB]


def _curves(threads: int, seconds: float, vectors: list[list[float]]) -> dict[str, Any]:
    """The figures with so many threads: `ThreadCurves`."""
    torch.set_num_threads(threads)
    passes = len(WIDTHS) * len(ROWS) * len(PRECISIONS) + len(BEST) * 2 + 5
    share = seconds / passes * 0.7  # what is too slow for its share takes more
    linear = {
        name: [
            [width, rows, round(rate / 1e9, 2)]
            for rows in ROWS
            for width in WIDTHS
            if (rate := _linear(width, rows, dtype, share))
        ]
        for name, dtype in PRECISIONS.items()
    }
    return {
        "threads": threads,
        "matmul_gflops": {
            name: round(max(_matmul(n, dtype, share) for n in BEST) / 1e9, 1)
            for name, dtype in PRECISIONS.items()
        },
        "linear_gflops": linear,
        "vector_gbs": vectors,
        "softmax_gbs": round(_softmax(share) / GB, 2),
        "memory_gbs": round(_copy(share) / GB, 2),
        "matvec_gbs": {name: round(_matvec(dtype, share) / GB, 2) for name, dtype in PRECISIONS.items()},
        "operation_us": round(_operation(share) * 1e6, 2),
        "fresh_ms": {
            name: [[width, round(_fresh(width, dtype) * 1e3, 3)] for width in FRESH_WIDTHS]
            for name, dtype in PRECISIONS.items()
        },
    }


def _settle() -> None:
    """Bring glibc's allocator where a training job has it after its first step: the threshold above which memory comes fresh
    from the system grows with what is freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD)."""
    for megabytes in (8, 16, 31):
        freed = torch.ones(megabytes * 2**18)
        del freed


def _matmul(n: int, dtype: torch.dtype, budget: float) -> float:
    """FLOP/s of [n, n] x [n, n]."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n**3 / _time(lambda: a @ b, budget)


def _linear(width: int, rows: int, dtype: torch.dtype, budget: float) -> float | None:
    """FLOP/s of a linear layer [rows, width], forward and backward, as a worker runs it: weights in fp32, autocast for bf16.
    None where one pass is too long to be repeated."""
    flops = 6.0 * rows * width * width
    if flops > LARGEST:
        return None
    layer = torch.nn.Linear(width, width, bias=False)
    given = torch.randn(rows, width, requires_grad=True)
    back = torch.randn(rows, width).to(dtype)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            made = layer(given)
        made.backward(back)

    return flops / _time(run, budget)


def _vector(mb: float, budget: float) -> float:
    """bytes/s, read and written, of tensor x number into a new tensor of `mb` megabytes."""
    given = torch.randn(int(mb * 1e6 / 4))
    return 2 * given.nbytes / _time(lambda: given * 1.5, budget)


def _softmax(budget: float) -> float:
    """bytes/s, read and written, of softmax over 256 numbers in 2 MB."""
    given = torch.randn(2048, 256)
    return 2 * given.nbytes / _time(lambda: torch.softmax(given, -1), budget)


def _copy(budget: float) -> float:
    """bytes/s, read and written, of a copy that is larger than most caches."""
    given = torch.randn(MEMORY_MB * 250_000)
    out = torch.empty_like(given)
    return 2 * given.nbytes / _time(lambda: out.copy_(given), budget)


def _matvec(dtype: torch.dtype, budget: float) -> float:
    """bytes/s of weights in matrix x vector: what decoding a token at batch 1 does."""
    weights = torch.randn(*MATVEC).to(dtype)
    vector = torch.randn(MATVEC[1]).to(dtype)
    return weights.nbytes / _time(lambda: weights @ vector, budget)


def _operation(budget: float) -> float:
    """Seconds of one operation on 8 numbers, forward and its part of backward."""
    count = 200
    given = torch.randn(8, requires_grad=True)

    def run() -> None:
        made = given
        for _ in range(count):
            made = made * 1.0001
        made.sum().backward()  # type: ignore[no-untyped-call]

    return _time(run, budget) / count


def _fresh(width: int, dtype: torch.dtype) -> float:
    """Seconds that a linear layer, forward and backward, takes longer for a number of rows that it has not met."""
    layer = torch.nn.Linear(width, width, bias=False)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def run(rows: int) -> float:
        given, back = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width).to(dtype)
        at = clock()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            made = layer(given)
        made.backward(back)
        return clock() - at

    first = 300 + width  # no other figure has such numbers of rows
    gaps = sorted(run(rows) - min(run(rows), run(rows)) for rows in range(first, first + FRESH_ROWS))
    return max(gaps[len(gaps) // 2], 1e-6)


def _trainer_overhead() -> float:
    """Seconds of a step of transformers' Trainer whose model is next to nothing."""
    from transformers import Trainer, TrainingArguments

    class Nothing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.layer(x).square().mean()}

    stamps: list[float] = []

    class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return TRAINER_STEPS

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            stamps.append(time.perf_counter())
            return {"x": torch.ones(4)}

    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=TRAINER_STEPS, per_device_train_batch_size=1, **QUIET
        )
        Trainer(model=Nothing(), args=settings, train_dataset=Rows()).train()
    steps = sorted(b - a for a, b in pairwise(stamps[5:]))
    return steps[len(steps) // 2]


def _residual(made: dict[str, Any]) -> float:
    """A real training step here, by famc's own trainer with one thread, over what the figures predict for it."""
    from famc.backend import CpuMeasured

    precision = best_precision(made["curves"][0])
    figures = {**made, "date": "", "cpu_model": "", "cores": 1, "flags": ()}
    rates = CpuMeasured.model_validate(figures).rates()
    step = Step(anatomy(PROBE), rows=PROBE_ROWS, context=PROBE.context, precision=precision)
    told = step_seconds(step, rates, threads=1)
    return (trainer_step(PROBE, PROBE_ROWS, precision) - told.overhead) / (told.seconds - told.overhead)


def trainer_step(shape: Shape, rows: int, precision: str, steps: int = 10) -> float:
    """CPU seconds of a step of `PackedTrainer` with AdamW on a new model: the median of the later ones."""
    import numpy as np
    from transformers import TrainingArguments

    from famc.work.rows import Rows
    from famc.work.training import PackedTrainer, RowSet, score_causal, stacked

    stamps: list[float] = []

    class Stamped(RowSet):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if index % rows == 0:
                stamps.append(time.process_time())
            return super().__getitem__(index)

    context = shape.context
    ids = np.random.default_rng(0).integers(0, shape.vocab, (steps * rows, context))
    data = Rows(ids, ids, np.tile(np.arange(context), (steps * rows, 1)), {})
    model = _model(shape)
    chosen = _optimizer(model, "adamw")
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=rows, bf16=precision == "bf16",
            train_sampling_strategy="sequential", **QUIET,
        )  # fmt: skip
        PackedTrainer(
            model=model,
            args=settings,
            train_dataset=Stamped(data, np.arange(steps * rows)),
            data_collator=stacked,
            optimizers=(chosen, torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1.0)),
            score=score_causal,
        ).train()
    taken = sorted(b - a for a, b in pairwise(stamps[2:]))
    return taken[len(taken) // 2]


def best_precision(curves: dict[str, Any]) -> str:
    """The precision in which a linear layer of 256 x 1,024 rows trains faster: bf16 where the CPU multiplies it."""
    rate = {
        name: next(r for w, rows, r in points if w == 256 and rows == 1024)
        for name, points in curves["linear_gflops"].items()
    }
    return "bf16" if rate["bf16"] > rate["fp32"] else "fp32"


def real_step(
    shape: Shape, rows: int, context: int, precision: str, optimizer: str = "adamw", budget: float = 2.0
) -> float:
    """Seconds of a training step as the packed kinds take it, without Trainer: forward, loss, backward, clipping, update.
    Decoders and encoders; an encoder's loss is taken from its last states alone."""
    from famc.work.loss import head_loss

    model = _model(shape)
    steps = _optimizer(model, optimizer)
    ids = torch.randint(0, shape.vocab, (rows, context))
    places = torch.arange(context).expand(rows, context).contiguous()
    labels = torch.randint(0, shape.vocab, (rows * context,))
    given: dict[str, Any] = {"input_ids": ids, "position_ids": places}
    if shape.arch in DECODERS:
        given |= {"use_cache": False}

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            states = model.base_model(**given)[0]
        weight = model.get_output_embeddings().weight
        loss = head_loss(
            states.reshape(-1, states.shape[-1]).float(), weight, labels, bf16=precision == "bf16"
        )
        (loss / labels.numel()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        steps.zero_grad()

    return _time(run, budget)


def _model(shape: Shape) -> Any:
    from types import SimpleNamespace

    from famc.work.training import attention, new_model

    marks = SimpleNamespace(
        eos_token_id=0, pad_token_id=0, cls_token_id=0, sep_token_id=0, mask_token_id=0, get_vocab=dict
    )
    model = new_model(asdict(shape), marks, 0)
    model.set_attn_implementation(attention(shape.context))
    return model


def _optimizer(model: Any, name: str) -> torch.optim.Optimizer:
    from famc.work.optim import make_optimizer

    return make_optimizer(
        model, {"optimizer": name, "lr.peak": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    )


def main(argv: list[str]) -> int:
    """`python -m famc.work.measure OUT.json SECONDS CORES`: the figures as JSON."""
    if len(argv) != 3:
        print("usage: python -m famc.work.measure OUT.json SECONDS CORES", file=sys.stderr)
        return 2
    found = measure(float(argv[1]), cores=int(argv[2]))
    Path(argv[0]).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
