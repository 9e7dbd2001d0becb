"""A plan says of every step whether it is built, why not, what it costs; it loads nothing heavy for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_build import SPEC, Fake, machine, toy_plan, write_spec

from famc.errors import FitError
from famc.graph import open_family
from famc.plan import keys, measured, plan, ways
from famc.run import run
from famc.store import RECORD, Store

LR = ("lr: 1e-3", "lr: 2e-3")
SFT = ("epochs: 1}", "epochs: 2}")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the small family, built. Nothing may be built here again."""
    folder = tmp_path_factory.mktemp("built")
    made = toy_plan(folder)
    assert run(made, execute=Fake(made)).ok
    return folder


def statuses(folder: Path, *edits: tuple[str, str], **more):
    return {name: step.status for name, step in toy_plan(folder, *edits, **more).steps.items()}


# --- status -----------------------------------------------------------------------------------------------


def test_before_anything_is_built_every_step_is_new(tmp_path):
    assert set(statuses(tmp_path).values()) == {"new"}


def test_after_a_build_every_step_is_cached(built):
    made = toy_plan(built)
    assert {s.status for s in made.steps.values()} == {"cached"}
    assert all(s.because == () for s in made.steps.values())
    assert made.to_run == ()


@pytest.mark.parametrize(
    "edit",
    [
        ("famc: 1", "# a comment\nfamc: 1  # and another"),
        ("{cpu: 2, ram: 8GB}", "{cpu: 2, ram: 8GB, usd_per_hour: 3}"),
        ("{cpu: 2, ram: 8GB}", "{cpu: 1, ram: 4GB}"),
        ("batch_tokens: 512,", "batch_tokens: 512, micro_batch: 2,"),
        ("batch_tokens: 512,", "batch_tokens: 512, checkpoint_steps: 3,"),
        ("batch_tokens: 512,", "batch_tokens: 512, recompute: full,"),
        ("lr: 1e-3", "lr: {peak: 0.001}"),
        ("backends:", "groups: {all_of_them: [s, m]}\nbackends:"),
        ("profiles:", "release: {path: elsewhere}\nprofiles:"),
    ],
)
def test_what_can_not_change_an_output_changes_no_key(built, edit):
    assert set(statuses(built, edit).values()) == {"cached"}


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (LR, {"s/pretrain", "m/pretrain"}),
        (SFT, {"s/sft", "m/sft"}),
        (("tokens: 20k", "tokens: 21k"), {"mix/text"}),
        (("hidden: 64, ffn: 192", "hidden: 64, ffn: 256"), {"m/pretrain"}),
        (("bytes: 100kB", "bytes: 101kB"), {"tokenizer"}),
        (("max: 9.0", "max: 8.0"), {"s/base/gate.limits", "m/base/gate.limits"}),
    ],
)
def test_a_change_marks_the_step_and_all_that_follows_and_nothing_else(built, edit, changed):
    made = toy_plan(built, edit)
    inputs = {name: set(node.inputs.values()) for name, node in made.graph.nodes.items()}
    follows = set(changed)
    for name, needs in inputs.items():
        if needs & follows:
            follows.add(name)
    assert {name for name, step in made.steps.items() if step.status == "changed"} == follows
    assert {step.status for name, step in made.steps.items() if name not in follows} == {"cached"}


def test_a_new_size_is_new_and_the_others_stay(built):
    edit = ("  s: {", "  l: {layers: 4, hidden: 64, ffn: 192, heads: 2, kv_heads: 1, tie: true}\n  s: {")
    found = statuses(built, edit)
    assert {name for name, status in found.items() if status != "cached"} == {
        n for n in found if n.startswith("l/")
    }
    assert found["l/sft"] == "new"


def test_the_seed_changes_what_is_drawn_or_trained(built):
    made = toy_plan(built, ("seed: 7", "seed: 8"))
    assert {s.name for s in made.steps.values() if s.status == "changed"} >= {
        "s/pretrain",
        "mix/text",
        "data/code",
    }
    assert made.steps["data/code"].because == ("seed: 7 -> 8",)


def test_data_that_changes_on_disk_changes_its_source(tmp_path):
    made = toy_plan(tmp_path)
    run(made, execute=Fake(made))
    file = write_spec(tmp_path)
    with (tmp_path / "data" / "qa.jsonl").open("a") as more:
        more.write("\n")
    now = plan(open_family(file), tmp_path / "out", local=machine())
    assert now.steps["data/qa"].status == "changed"
    assert now.steps["data/code"].status == "cached"


def test_the_reason_is_the_field_old_and_new_and_who_wrote_it(built):
    made = toy_plan(built, LR)
    line = (
        SPEC.splitlines().index("  pretrain: {kind: pretrain, data: text, batch_tokens: 512, lr: 1e-3}") + 1
    )
    assert len(made.steps["s/pretrain"].because) == 1
    assert made.steps["s/pretrain"].because[0].startswith(f"lr.peak: 0.001 -> 0.002 (toy.yaml:{line}")
    assert made.steps["s/sft"].because == ("needs s/pretrain, which changed",)


def test_a_reason_names_who_overrode_the_value(built):
    made = toy_plan(built, sets=["stages.sft.epochs=3"])
    assert made.steps["s/sft"].because == ("epochs: 1.0 -> 3.0 (--set stages.sft.epochs)",)


def test_going_back_is_cached_again(tmp_path):
    for edits in ((), (LR,)):
        made = toy_plan(tmp_path, *edits)
        run(made, execute=Fake(made))
    assert set(statuses(tmp_path).values()) == {"cached"}


def test_a_damaged_record_of_an_older_artifact_is_told(tmp_path):
    made = toy_plan(tmp_path)
    run(made, execute=Fake(made))
    (Store(made.out / "store").path("s/sft", made.steps["s/sft"].key) / RECORD).write_text("{")
    again = toy_plan(tmp_path, SFT)
    assert again.steps["s/sft"].status == "changed"
    assert "its record can't be read" in again.steps["s/sft"].because[0]


# --- what can't run here ----------------------------------------------------------------------------------

BLOCKED = {
    "a kind without a worker": (
        [
            (
                "  sft:      {kind: sft, from: base, data: qa, epochs: 1}",
                "  sft: {kind: grpo, from: base, data: qa, rewards: [exact_number]}",
            )
        ],
        "s/sft",
        "kind 'grpo' can be planned, but this version of famc has no worker for it",
    ),
    "a format without a worker": (
        [
            ("format: onnx, quant: [fp32, int4], target: cpu", "format: fp8"),
            ('  - {match: "*/*/export.onnx-*", parity: {tokenizer: exact, kl: 0.05}}\n', ""),
        ],
        "s/instruct/export.fp8-8",
        "format 'fp8' of text-generation models can be planned, but this version of famc has no worker for it",
    ),
    "data that is not here": (
        [("path: data/qa.jsonl", "path: data/none.jsonl")],
        "data/qa",
        "data/none.jsonl",
    ),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_what_can_not_run_here_is_blocked_with_its_reason_and_so_is_all_that_needs_it(tmp_path, case):
    edits, name, reason = BLOCKED[case]
    if case == "a kind without a worker":
        edits = [*edits, ("format: messages", "format: prompts")]
        edits += [
            ("eval: chat}", "eval: lm}"),
            (
                '{match: "*/instruct", beats: base, suite: chat, metrics: [answer_loss]}',
                '{match: "*/instruct", beats: base, suite: lm}',
            ),
        ]
        edits += [("  chat: [{task: answers, data: qa, n: 10, max_new_tokens: 8}]\n", "")]
    made = toy_plan(tmp_path, *edits)
    assert made.steps[name].status == "blocked"
    assert reason in made.steps[name].because[0]
    for follower in made.graph.closure([name], up=False) - {name}:
        assert made.steps[follower].status == "blocked"
        assert made.steps[follower].because[0].startswith("needs ")
    assert made.steps["tokenizer"].status == "new" or "data" in case


def test_a_chip_that_famc_does_not_train_on_is_planned_and_blocked(tmp_path):
    made = toy_plan(tmp_path, ("{cpu: 2, ram: 8GB}", "{gpu: tpu-v5e, per_node: 4, scheduler: slurm}"))
    step = made.steps["s/pretrain"]
    assert step.status == "blocked"
    assert "needs xla: it can only be planned" in step.because[0]
    assert step.seconds > 0 and step.layout.why
    assert made.steps["s/sft"].because[0].startswith("needs ") or "xla" in made.steps["s/sft"].because[0]
    assert made.steps["mix/text"].status == "new"


def test_a_layout_that_only_other_software_runs_is_planned_and_blocked(tmp_path):
    """fp8 is what `any` may plan and famc's trainers have not; `accelerate` stays with what they have."""
    edits = [
        (
            "  s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}",
            "  s: {preset: qwen3-8b}",
        ),
        ("batch_tokens: 512,", "batch_tokens: 65536,"),
    ]
    found = {}
    for runtime in ("accelerate", "any"):
        where = f"{{gpu: h100-80g, per_node: 8, nodes: 2, scheduler: slurm, runtime: {runtime}}}"
        found[runtime] = toy_plan(
            tmp_path / runtime, *edits, ("{cpu: 2, ram: 8GB}", where), names=["s/pretrain"]
        ).steps["s/pretrain"]
    assert found["accelerate"].status == "new" and found["accelerate"].layout.precision == "bf16"
    assert found["any"].status == "blocked" and found["any"].layout.precision == "fp8"
    assert found["any"].because == (
        "fp8: backends.laptop.runtime is any, and famc's trainers have none of it",
    )
    assert found["any"].seconds < found["accelerate"].seconds


def test_the_ways_of_a_step_begin_with_the_fewest_devices(tmp_path):
    made = toy_plan(tmp_path, ("{cpu: 2, ram: 8GB}", "{gpu: h100-80g, per_node: 8, scheduler: slurm}"))
    found = ways(made.steps["s/pretrain"])
    assert [w.layout.devices for w in found] == sorted({w.layout.devices for w in found})
    assert {(w.name, w.key, w.status) for w in found} == {("s/pretrain", made.steps["s/pretrain"].key, "new")}
    assert ways(made.steps["tokenizer"]) == (made.steps["tokenizer"],)


def test_a_cached_step_is_not_blocked_by_what_it_was_made_of(built):
    """Its data may be gone by now: the artifact is there."""
    made = toy_plan(built)
    assert made.steps["data/qa"].status == "cached"


# --- the contract -----------------------------------------------------------------------------------------

STEP = {
    "name",
    "kind",
    "key",
    "size",
    "variant",
    "needs",
    "status",
    "because",
    "backend",
    "layout",
    "memory",
    "params",
    "tokens",
    "flops",
    "mfu",
    "seconds",
    "interval",
    "device_hours",
    "cost_usd",
    "energy_kwh",
    "co2e_kg",
    "basis",
}
LAYOUT = {
    "nodes",
    "devices",
    "dp_replicate",
    "dp_shard",
    "tp",
    "cp",
    "pp",
    "ep",
    "micro_batch",
    "grad_accum",
    "recompute",
    "precision",
    "threads",
    "why",
}
MEMORY = {
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "kv_cache",
    "overhead",
    "total",
    "limit",
}


def test_the_json_has_the_fields_that_scripts_rely_on(built):
    value = json.loads(json.dumps(toy_plan(built, LR).to_dict(), allow_nan=False))
    assert value.keys() == {"family", "steps", "totals"}
    for step in value["steps"]:
        assert step.keys() == STEP
        assert step["layout"].keys() == LAYOUT
        assert step["memory"].keys() == MEMORY
        assert step["params"].keys() == {"total", "active"}
        assert step["status"] in ("new", "changed", "cached", "blocked")
        assert step["basis"] in ("measured", "modelled", "assumed")
        parts = sum(v for k, v in step["memory"].items() if k not in ("total", "limit"))
        assert parts == pytest.approx(step["memory"]["total"])
        assert step["memory"]["total"] <= step["memory"]["limit"]
        assert len(step["key"]) == 64
        low, high = step["interval"]
        assert low <= step["seconds"] <= high


def test_needs_stand_before_what_needs_them(built):
    seen: set[str] = set()
    for step in toy_plan(built).to_dict()["steps"]:
        assert seen.issuperset(step["needs"])
        seen.add(step["name"])


def test_a_finished_step_tells_measured_seconds_and_the_others_do_not(built):
    made = measured(toy_plan(built, LR))
    for step in made.steps.values():
        assert (step.basis == "measured") == (step.status == "cached")
        assert (step.seconds == 0.5) == (step.status == "cached")


def test_totals_are_sums_over_what_is_to_run(built):
    made = toy_plan(built, LR)
    totals = made.totals()
    todo = [s for s in made.steps.values() if s.status != "cached"]
    assert totals["seconds"] == pytest.approx(sum(s.seconds for s in todo))
    assert totals["tokens"] == sum(s.node.work.tokens for s in todo)
    assert totals["status"] == {"cached": len(made.steps) - len(todo), "changed": len(todo)}


def test_a_price_is_hours_times_what_the_spec_says(tmp_path):
    made = toy_plan(tmp_path, ("{cpu: 2, ram: 8GB}", "{cpu: 2, ram: 8GB, usd_per_hour: 3}"))
    for step in made.steps.values():
        assert step.cost_usd == pytest.approx(step.seconds / 3600 * 3)


def test_names_restrict_the_plan_to_them_and_what_they_need(tmp_path):
    assert set(statuses(tmp_path, names=["s/pretrain"])) == {
        "data/code",
        "data/qa",
        "tokenizer",
        "mix/text",
        "s/pretrain",
    }


def test_a_plan_writes_nothing(tmp_path):
    toy_plan(tmp_path)
    assert not (tmp_path / "out").exists()


# --- what does not fit ------------------------------------------------------------------------------------


def test_what_fits_no_layout_is_told_with_its_largest_part_and_a_hint(tmp_path):
    with pytest.raises(FitError) as caught:
        toy_plan(tmp_path, ("{cpu: 2, ram: 8GB}", "{cpu: 2, ram: 600MB}"))
    assert caught.value.exit_code == 3
    lines = caught.value.message.splitlines()
    assert len(lines) >= 2, "all of them at once"
    for line in lines:
        name, _, rest = line.partition(" does not fit laptop: needs ")
        assert name in open_family(write_spec(tmp_path)).nodes
        assert "most of it " in rest
        assert "; a host with " in rest or "; use " in rest


def test_a_step_that_is_not_asked_for_need_not_fit(tmp_path):
    edit = ("{cpu: 2, ram: 8GB}", "{cpu: 2, ram: 600MB}")
    assert set(statuses(tmp_path, edit, names=["tokenizer"])) == {"data/code", "data/qa", "tokenizer"} - {
        "data/qa"
    }


# --- light ------------------------------------------------------------------------------------------------

HEAVY = (
    "torch",
    "transformers",
    "trl",
    "datasets",
    "numpy",
    "pyarrow",
    "onnxruntime",
    "onnx",
    "accelerate",
    "tokenizers",
    "networkx",
    "rich",
    "jinja2",
    "psutil",
    "ortools",
    "pandas",
)


@pytest.mark.parametrize(
    "command", ["plan", "validate", "status", "gc", "verify", "graph", "schema", "why", "show"]
)
def test_no_command_about_a_plan_loads_a_heavy_module(tmp_path, command):
    spec = (
        []
        if command == "schema"
        else [
            str(write_spec(tmp_path)),
            *(["s/sft"] if command in ("why", "show") else []),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    code = (
        f"import sys; from famc.cli import main; code = main({[command, '-q', *spec]!r});"
        f"print(code, sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == "0 []\n"


def test_keys_of_a_graph_are_those_of_its_plan(built):
    made = toy_plan(built)
    assert keys(made.graph) == {name: step.key for name, step in made.steps.items()}


def test_gguf_waits_for_llama_cpp_and_says_how_to_get_it(tmp_path, monkeypatch):
    """Told by the plan, not by a job an hour later; and nothing else of the family is held up."""
    edits = [
        ("format: onnx, quant: [fp32, int4], target: cpu", "format: gguf, quant: q8_0"),
        ('  - {match: "*/*/export.onnx-*", parity: {tokenizer: exact, kl: 0.05}}\n', ""),
    ]
    monkeypatch.setattr("famc.steps.exports.find_spec", lambda name: None)
    made = toy_plan(tmp_path, *edits)
    blocked = {name: step.because for name, step in made.steps.items() if step.status == "blocked"}
    assert "pip install 'famc[gguf]'" in blocked["s/instruct/export.gguf-q8_0"][0]
    assert "s/instruct/release" not in blocked and "s/instruct/release.gguf" in blocked
    monkeypatch.setattr("famc.steps.exports.find_spec", lambda name: object())
    assert not [s for s in toy_plan(tmp_path, *edits).steps.values() if s.status == "blocked"]


def test_a_format_of_its_own_folder_waits_for_its_own_gates_alone(tmp_path):
    """A quantised folder that fails its gate stops itself, not the model's."""
    made = toy_plan(tmp_path, ("format: onnx, quant: [fp32, int4], target: cpu",
                               "format: onnx, quant: [fp32, int4]}\n  - {variants: [instruct], format: gptq, bits: 4, calibrate: {data: qa, n: 8}"))  # fmt: skip
    own, main = made.steps["s/instruct/release.gptq.int4"].node, made.steps["s/instruct/release"].node
    assert "s/instruct/gate.gptq-4" in own.after and "s/instruct/gate.gptq-4" not in main.after
    assert (
        set(own.inputs) >= {"model", "tokenizer", "card", "export.gptq-4"}
        and "export.gptq-4" not in main.inputs
    )
    assert own.params["repo"] == main.params["repo"] + "-GPTQ-Int4"
