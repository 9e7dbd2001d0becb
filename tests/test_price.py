"""One step and its hardware -> layout, memory, time: what must move them, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from famc import calibrate as module
from famc.backend import Accelerator, detect_cpu, load_accelerator
from famc.calibrate import accelerator, calibrate
from famc.cost.layout import DoesNotFit
from famc.cost.shape import PRESETS, Shape
from famc.graph import Node
from famc.hardware import Hardware, hardware
from famc.price import options, price
from famc.spec.family import Family, StageSpec
from famc.steps import STAGES
from famc.steps.base import Amount, Setting, Training
from famc.steps.others import eval_work
from famc.steps.trained import train_work

STORED = Path(__file__).parents[1] / "benchmarks" / "data" / "cpu_steps.json"
SMALL = Shape("qwen3", 4096, 4, 192, 576, 3, 1, 64, True, 256)
SMALLER = Shape("qwen3", 4096, 3, 128, 384, 2, 1, 64, True, 256)
WIDE = Shape("bert", 4096, 1, 1024, 256, 16, 16, 64, True, 256)


def gpus(name: str = "h100-80g", nodes: int = 1, per_node: int = 8, **more: Any) -> Hardware:
    return Hardware("box", load_accelerator(name), nodes, per_node, "slurm", 2.0, "spec", **more)


def cpu(made: Accelerator) -> Hardware:
    return Hardware("here", made, 1, 1, "local", 0.0, "none known")


@pytest.fixture(scope="module")
def calibrated() -> Hardware:
    """Two cores with AMX, as `famc calibrate` measured them."""
    rates = json.loads(STORED.read_text())["rates"]
    return cpu(accelerator({**rates, "residual": 1.0}, detect_cpu()))


def step(
    kind: str, shape: Shape = SMALL, *, examples: float = 5000, tokens: float = 3e5, teacher: Shape | None = None, **fields: Any
) -> Node:  # fmt: skip
    """A trained stage as the graph makes it, of data of such a size."""
    data = Amount(tokens, examples, "modelled")
    given = {"kind": kind, "data": "d", **({"teacher": "t"} if teacher else {}), **fields}
    stage = STAGES[kind].model_validate(given)
    assert isinstance(stage, Training)
    values = dict(stage.resolve(Setting(shape, 10**6, data), lambda _: None).values)
    runtime = {k: values.pop(k) for k in ("micro_batch", "recompute") if k in values}
    work = train_work(stage, shape, values, data, teacher)
    return Node(f"s/{kind}", kind, "s", None, values, runtime, shape=shape, work=work)


# --- this machine -------------------------------------------------------------------------------------------

# CPU-seconds of jobs of specs/pydoc.yaml with one thread on such cores, start included. Rows, lengths and steps are those that
# the jobs had; the amounts of data lead to them.
JOBS: dict[str, tuple[float, Callable[[], Node]]] = {
    "pretraining": (108.8, lambda: step("pretrain", tokens=800768, batch_tokens=2048, optimizer="muon")),
    "distillation": (
        123.1,
        lambda: step("distill", SMALLER, teacher=SMALL, tokens=800768, batch_tokens=2048, optimizer="muon"),
    ),
    "fine-tuning": (
        54.8,
        lambda: step("sft", tokens=284000, epochs=1.5, batch_tokens=4096, optimizer="muon"),
    ),
    "preferences": (75.3, lambda: step("dpo", examples=3890, tokens=3890 * 51, steps=60)),
    "reranking": (
        93.8,
        lambda: step("rerank", examples=7228, tokens=7228 * 94.5, steps=40, optimizer="muon"),
    ),
    "embedding": (
        87.5,
        lambda: step(
            "embed", WIDE, examples=75360, tokens=75360 * 118, steps=2, mrl=(256,), lexical={"epochs": 3, "lr": 0.02}
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_a_calibrated_cpu_takes_as_long_as_is_said(calibrated: Hardware, name: str) -> None:
    seconds, made = JOBS[name]
    told = price(made(), calibrated)
    assert told.seconds == pytest.approx(seconds, rel=0.25)
    assert told.basis == "measured"
    assert told.interval[0] <= seconds <= told.interval[1]


def test_without_a_calibration_the_time_is_assumed() -> None:
    told = price(step("pretrain", tokens=1e5), cpu(load_accelerator("cpu")))
    assert told.basis == "assumed"
    assert told.interval[1] > 2 * told.seconds


def test_a_start_is_not_charged_to_every_local_step(calibrated: Hardware) -> None:
    """Workers wait with torch loaded: one step of pretraining takes a fraction of a second."""
    assert price(step("pretrain", steps=1, batch_tokens=2048), calibrated).seconds < 1.0


def test_a_reference_a_teacher_and_whole_logits_take_their_time(calibrated: Hardware) -> None:
    plain, taught = (
        price(step(kind, SMALLER, tokens=4e5, batch_tokens=2048, **more), calibrated).seconds
        for kind, more in (("pretrain", {}), ("distill", {"teacher": SMALL}))
    )
    assert taught > 1.4 * plain
    dpo = step("dpo", steps=60, tokens=3890 * 51, examples=3890)
    alone = replace(dpo, work=replace(dpo.work, teachers=()))
    fused = replace(dpo, work=replace(dpo.work, head="fused"))
    told = price(dpo, calibrated).seconds
    assert told > 1.1 * price(alone, calibrated).seconds
    assert told > 1.02 * price(fused, calibrated).seconds


def test_more_threads_only_where_they_are_faster() -> None:
    """Assumed curves grow with the cores, so that of two and four threads each is faster."""
    node = step("pretrain", Shape("qwen3", 4096, 8, 512, 1536, 8, 4, 64, True, 256), tokens=1e6)
    found = options(node, cpu(load_accelerator("cpu")))
    assert [quote.threads for quote in found] == [1, 2, 4]
    assert found[0].seconds > found[1].seconds > found[2].seconds


def test_batches_of_many_lengths_hold_compiled_kernels(calibrated: Hardware) -> None:
    """Fine-tuning took 1.5 to 2.2 GB where pretraining of the same model took 0.7."""
    packed, tuned = (price(step(kind), calibrated).memory.total for kind in ("pretrain", "sft"))
    assert packed < 0.9e9 < 1.4e9 < tuned < 2.4e9


def test_texts_that_are_read_lie_in_the_hosts_memory(calibrated: Hardware) -> None:
    """3.2 GB were measured with 75,000 pairs, 1.5 GB with 7,000; those of a billion do not fit."""
    few, many = (
        price(step("embed", WIDE, examples=n, tokens=n * 118, steps=2), calibrated).memory.total
        for n in (7e3, 75e3)
    )
    assert 1.3e9 < few < 2.4e9 < 3.0e9 < many < 4.2e9
    with pytest.raises(DoesNotFit, match="most of it the texts; use fewer pairs"):
        price(step("embed", WIDE, examples=1e9, tokens=1e11, steps=2), calibrated)


def test_a_micro_batch_of_the_spec_is_kept(calibrated: Hardware) -> None:
    told = price(step("pretrain", batch_tokens=4096, micro_batch=4), calibrated)
    assert (told.layout.micro_batch, told.layout.grad_accum) == (4, 4)


def test_evaluations_go_by_the_size_of_the_matrices(calibrated: Hardware) -> None:
    """10,000 pairs of 95 tokens through a 2.5 M model took 46.6 s, where a flat share of the peak said 171 s."""
    task = {"task": "rerank", "data": "d", "n": 200, "top": 50, "max_new_tokens": 1}
    held = {"d": Amount(308 * 95.0, 308)}
    node = Node("s/eval", "eval", "s", shape=SMALL, work=eval_work(SMALL, [task], held))
    assert price(node, calibrated).seconds == pytest.approx(46.6, rel=0.3)


def test_an_evaluation_reads_no_more_than_is_held_out() -> None:
    task = {"task": "answers", "data": "d", "n": 2000, "max_new_tokens": 10}
    few = eval_work(SMALL, [task], {"d": Amount(100 * 40.0, 100)})
    assert few.tokens == 100 * 50
    assert eval_work(SMALL, [task], {}).tokens > few.tokens


# --- GPUs ---------------------------------------------------------------------------------------------------


def big(kind: str, name: str = "llama3-8b", **more: Any) -> Node:
    return step(kind, PRESETS[name], examples=1e5, tokens=1e9, **more)


def test_llama3_8b_on_eight_h100_is_near_what_torchtitan_published() -> None:
    """5,762 tokens/s a GPU at 8,192 tokens in bf16 on H100s of 500 W, uncompiled, December 2024 (torchtitan,
    benchmarks/llama3_h100_202412_torchtitan.md, table 1). Half of the blocks were run twice there, a sixth of the work."""
    node = big("pretrain", context=8192, batch_tokens=8192 * 64)
    told = price(node, gpus("h100-hbm2e-96g"))
    assert (told.layout.devices, told.layout.recompute) == (8, "none")
    rate = node.work.tokens / (told.seconds - 60) / 8
    assert rate == pytest.approx(5762 * 7 / 6, rel=0.15)
    assert told.interval[0] < told.seconds < told.interval[1]


@pytest.mark.parametrize("kind", ["pretrain", "sft", "dpo", "distill", "grpo", "embed", "rerank"])
def test_each_kind_fits_and_keeps_its_batch(kind: str) -> None:
    more: dict[str, Any] = {"distill": {"teacher": PRESETS["llama3-8b"]}, "grpo": {"rewards": ("r",)}}.get(
        kind, {}
    )
    node = big(kind, "llama3-1b", context=4096, **more)
    told = price(node, gpus(nodes=2))
    assert told.layout.global_batch == round(node.work.sequences)
    assert told.layout.devices <= 16
    assert 0 < told.memory.total <= told.limit
    assert told.layout.why
    assert told.basis == ("assumed" if node.work.basis == "assumed" else "modelled")


def test_what_is_read_beside_takes_time_and_memory() -> None:
    """A teacher of 8 B reads the same: more than the 1 B student's own step, and 16 GB more over eight devices."""
    batch = {"batch_tokens": 4096 * 256}
    alone, taught = (
        big("pretrain", "llama3-1b", context=4096, **batch),
        big("distill", "llama3-1b", context=4096, teacher=PRESETS["llama3-8b"], **batch),
    )
    one, two = price(alone, gpus()), price(taught, gpus())
    assert two.seconds - 60 > 2 * (one.seconds - 60)
    assert two.memory.weights >= one.memory.weights + 16e9 / 8 * 0.99


def test_answers_are_written_before_they_are_learnt_from() -> None:
    told = big("grpo", "llama3-1b", context=4096, rewards=("r",))
    given = replace(told, work=replace(told.work, generated=0.0))
    assert price(told, gpus()).seconds > 1.3 * price(given, gpus()).seconds


def test_adapters_need_less_memory_and_time() -> None:
    whole, adapted = (price(big("sft", context=4096, lora=lora), gpus()) for lora in (None, {"r": 16}))
    assert adapted.memory.optimizer < 0.1 * whole.memory.optimizer
    assert adapted.seconds < whole.seconds


def test_short_texts_take_less_than_the_context_that_memory_must_hold() -> None:
    """The same tokens in all, in texts of 64 or 1,024 tokens: the memory is that of the longest."""
    short, long = (
        price(
            step("rerank", PRESETS["llama3-1b"], examples=1e5, tokens=1e5 * n, context=2048, steps=100),
            gpus(),
        )
        for n in (64, 1024)
    )
    assert short.seconds - 60 < 0.5 * (long.seconds - 60)


def test_the_runtime_that_famc_has_is_never_given_a_pipeline_or_8_bits() -> None:
    """30 B with 128 experts on 16 nodes: with any runtime expert parallelism is faster."""
    node = step("pretrain", PRESETS["qwen3-30b-a3b"], tokens=1e11, context=4096, batch_tokens=4096 * 1024)
    here, anywhere = (price(node, gpus(nodes=4, runtime=r)) for r in ("accelerate", "any"))
    assert (here.layout.pp, here.layout.ep, here.layout.precision) == (1, 1, "bf16")
    assert here.layout.recompute in ("none", "full")
    assert anywhere.layout.pp * anywhere.layout.ep > 1
    assert anywhere.seconds < here.seconds


def test_more_devices_are_faster_and_cost_more() -> None:
    found = options(big("pretrain", "llama3-1b", context=4096, batch_tokens=4096 * 256), gpus(nodes=4))
    assert len(found) >= 4
    devices, seconds = [q.layout.devices for q in found], [q.seconds for q in found]
    assert devices == sorted(set(devices)) and seconds == sorted(set(seconds), reverse=True)
    assert seconds[-1] == pytest.approx(
        price(big("pretrain", "llama3-1b", context=4096, batch_tokens=4096 * 256), gpus(nodes=4)).seconds,
        rel=0.01,
    )


def test_what_fits_nowhere_names_the_consumer_and_what_would_fit() -> None:
    with pytest.raises(DoesNotFit) as caught:
        price(big("pretrain", "llama3-70b", context=4096), gpus("rtx4090"))
    assert caught.value.biggest in str(caught.value)
    assert any(word in caught.value.hint for word in ("would fit", "nodes"))


def test_weights_of_an_evaluation_are_spread_over_a_node() -> None:
    shape = PRESETS["llama3-70b"]
    task = {"task": "bits_per_byte", "data": "d", "n": 100, "max_new_tokens": 1}
    node = Node("s/eval", "eval", "s", shape=shape, work=eval_work(shape, [task], {}))
    assert price(node, gpus()).layout.tp == 2
    with pytest.raises(DoesNotFit, match="weights"):
        price(node, gpus(per_node=1))


# --- hardware -----------------------------------------------------------------------------------------------


def family(**backends: Any) -> Family:
    return Family.model_validate(
        {
            "famc": 1, "family": {"name": "f", "seed": 1}, "arch": {"type": "qwen3"},
            "sizes": {"s": {"layers": 1, "hidden": 64, "ffn": 64, "heads": 1}}, "backends": backends, "stages": {"p": StageSpec(kind="pretrain")}, "variants": {"v": {"stage": "p"}},
        }
    )  # fmt: skip


def test_cores_and_memory_of_the_spec_hold_for_the_cpu(tmp_path: Path) -> None:
    here = load_accelerator("cpu")
    assert here.device.memory == 16e9
    used = hardware(family(box={"cpu": 2, "ram": "3GB"}), tmp_path, here)["box"].accelerator
    assert (used.device.cores, used.device.memory) == (2, 3e9)
    only = hardware(family(box={"ram": "3GB"}), tmp_path, here)["box"].accelerator
    assert (only.device.cores, only.device.memory) == (4, 3e9)


def test_a_calibration_beside_the_spec_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = json.loads(STORED.read_text())["rates"]
    monkeypatch.setattr(
        module, "_measured", lambda seconds, cores: {**rates, "residual": 1.0, "disturbed": False}
    )
    assert hardware(family(), tmp_path)["local"].accelerator.device.rates is None
    calibrate(tmp_path / "backends" / "this-cpu.yaml")
    assert hardware(family(), tmp_path)["local"].accelerator.device.rates is not None
