"""Gates hold or fall at the edge, nan never passes, and a failure says everything at once."""

from __future__ import annotations

import json
import math

import pytest

from famc.errors import StepFailed
from famc.job import Job
from famc.work import gate
from famc.work.scores import Score, Units, write_json

PARITY = {
    "tokenizer": "exact", "template": "exact", "kl": 0.05, "max_abs": 1.0, "top1_agreement": 0.9,
    "perplexity_reference": 10.0, "perplexity_candidate": 10.3, "perplexity_ratio": 1.03,
    "perplexity_ratio_error": 0.001, "greedy_equal": 0.75, "prompts": 8.0,
}  # fmt: skip


def parity(folder, scores=None, **more):
    write_json(folder / "results.json", {"parity": PARITY | more, "scores": scores or {}})
    return folder


def entry(value, stderr=0.01, n=10, **more):
    return Score(value, stderr, n).record() | more


def compared(before, after, stderr):
    change = Score(after - before, stderr, 10).record()
    return {"source": entry(before), "export": entry(after), "difference": change}


def scored(folder, results, units=None):
    write_json(folder / "results.json", results)
    write_json(folder / "units.json", {k: u.record() for k, u in (units or {}).items()})
    return folder


def judge(tmp_path, params, **inputs):
    """(passed, checks); the job fails just when the verdict says so."""
    out = tmp_path / "out"
    job = Job.for_test("xs/base/gate.g", "gate", params, inputs={r: (f"at/{r}", "k") for r in inputs})
    try:
        metrics = gate.run(job, inputs, out)
    except StepFailed:
        metrics = {"passed": 0}
    verdict = json.loads((out / "verdict.json").read_text())
    assert verdict["passed"] == bool(metrics["passed"]) == all(c["passed"] for c in verdict["checks"])
    return verdict["passed"], verdict["checks"]


@pytest.mark.parametrize(
    ("limits", "holds"),
    [
        ({"kl": 0.05}, True), ({"kl": 0.0499}, False),
        ({"perplexity": 0.0300001}, True), ({"perplexity": 0.029}, False),
        ({"greedy": 0.75}, True), ({"greedy": 0.76}, False),
        ({"tokenizer": "exact", "template": "exact", "kl": None}, True),
    ],
)  # fmt: skip
def test_parity_holds_up_to_its_limit(tmp_path, limits, holds):
    assert judge(tmp_path, {"parity": limits}, parity=parity(tmp_path / "p"))[0] is holds


@pytest.mark.parametrize(
    ("found", "limits"),
    [
        ({"tokenizer": "differs"}, {"tokenizer": "exact"}),
        ({"template": "differs"}, {"template": "exact"}),
        ({"kl": None}, {"kl": 1e9}),
        ({"perplexity_ratio": None}, {"perplexity": 1e9}),
        ({"greedy_equal": None}, {"greedy": 0.0}),
    ],
)
def test_what_differs_or_is_no_number_fails(tmp_path, found, limits):
    assert not judge(tmp_path, {"parity": limits}, parity=parity(tmp_path / "p", **found))[0]


@pytest.mark.parametrize(
    ("name", "before", "after", "stderr", "points", "sigma", "holds"),
    [
        ("token_accuracy", 0.50, 0.48, 0.0, 2.01, 2, True),
        ("token_accuracy", 0.50, 0.47, 0.0, 2, 2, False),
        ("token_accuracy", 0.50, 0.47, 0.006, 2, 2, True),  # 3 points; 2 + 2 × 0.6 are allowed
        ("token_accuracy", 0.50, 0.47, 0.006, 2, 1, False),
        ("token_accuracy", 0.50, 0.90, 0.0, 0, 0, True),  # better is no drop
        ("answer_loss", 2.0, 2.09, 0.0, 5, 2, True),  # 4.5 % of the source's
        ("answer_loss", 2.0, 2.11, 0.0, 5, 2, False),
        ("answer_loss", 2.0, 1.5, 0.0, 0, 0, True),
        ("answer_loss", 2.0, math.nan, 0.0, 1000, 2, False),
    ],
)
def test_max_drop_grants_points_and_noise(tmp_path, name, before, after, stderr, points, sigma, holds):
    folder = parity(tmp_path / "p", {name: compared(before, after, stderr)})
    params = {"max_drop": {"points": points, "sigma": sigma}}
    assert judge(tmp_path, params, parity=folder)[0] is holds


def test_perplexity_counts_as_a_score_only_without_others(tmp_path):
    bad = compared(10, 20, 0.1)
    params = {"max_drop": {"points": 1, "sigma": 2}}
    assert not judge(tmp_path, params, parity=parity(tmp_path / "a", {"perplexity": bad}))[0]
    both = {"answer_loss": compared(2, 2, 0.1), "perplexity": bad}
    assert judge(tmp_path, params, parity=parity(tmp_path / "b", both))[0]


@pytest.mark.parametrize(
    ("bound", "holds"),
    [
        ({"max": 1.5, "min": None}, True), ({"max": 1.49}, False),
        ({"min": 1.5}, True), ({"min": 1.51}, False),
        ({"min": 1.0, "max": 2.0}, True),
    ],
)  # fmt: skip
def test_require_includes_its_bounds(tmp_path, bound, holds):
    folder = scored(tmp_path / "s", {"bits_per_byte": entry(1.5)})
    assert judge(tmp_path, {"require": {"bits_per_byte": bound}}, score=folder)[0] is holds


def test_a_metric_that_was_not_measured_fails_and_nan_fails(tmp_path):
    folder = scored(tmp_path / "s", {"bits_per_byte": entry(math.nan), "chrf": entry(0.5)})
    bounds = {"bits_per_byte": {"max": 9.0}, "bit_per_byte": {"max": 9.0}}
    holds, checks = judge(tmp_path, {"require": bounds}, score=folder)
    assert not holds
    assert [c["passed"] for c in checks] == [False, False]
    assert checks[0]["value"] is None
    assert "bits_per_byte" in checks[1]["note"]


@pytest.mark.parametrize(
    ("ours", "theirs", "more", "holds"),
    [
        (1.49, 1.5, {}, True), (1.5, 1.5, {}, False), (1.51, 1.5, {}, False),
        (1.53, 1.5, {"within": 0.02}, True), (1.5301, 1.5, {"within": 0.02}, False),
        (1.4, 1.5, {"within": 0.0}, True), (math.nan, 1.5, {"within": 9}, False), (1.5, math.nan, {}, False),
    ],
)  # fmt: skip
def test_beats_is_strict_unless_within_grants_a_share(tmp_path, ours, theirs, more, holds):
    """A loss: lower is better."""
    a = scored(tmp_path / "a", {"answer_loss": entry(ours), "chrf": entry(0.1)})
    b = scored(tmp_path / "b", {"answer_loss": entry(theirs), "chrf": entry(0.9)})
    assert judge(tmp_path, {"beats": "sft", **more}, score=a, beats=b)[0] is holds


def test_beats_compares_the_metrics_that_it_is_told_and_higher_may_be_better(tmp_path):
    a = scored(
        tmp_path / "a", {"answer_loss": entry(9), "chrf": entry(0.5), "acc": entry(1, higher_is_better=False)}
    )
    b = scored(
        tmp_path / "b", {"answer_loss": entry(1), "chrf": entry(0.4), "acc": entry(2, higher_is_better=False)}
    )
    assert judge(tmp_path, {"beats": "x", "metrics": ["chrf", "acc"]}, score=a, beats=b)[0]
    holds, checks = judge(
        tmp_path, {"beats": "x", "metrics": ["chrf", "answer_loss", "no"]}, score=a, beats=b
    )
    assert not holds
    assert [c["passed"] for c in checks] == [True, False, False]


def test_the_same_examples_are_compared_in_pairs(tmp_path):
    keys = [str(i) for i in range(40)]
    hard = [1 + i / 10 for i in range(40)]
    ours = Units.of(
        zip(keys, [h - 0.05 - 0.001 * (i % 2) for i, h in enumerate(hard)], [1] * 40, strict=True)
    )
    theirs = Units.of(zip(keys, hard, [1] * 40, strict=True))
    a = scored(tmp_path / "a", {"answer_loss": ours.score().record()}, {"answer_loss": ours})
    b = scored(tmp_path / "b", {"answer_loss": theirs.score().record()}, {"answer_loss": theirs})
    _, (check,) = judge(tmp_path, {"beats": "x"}, score=a, beats=b)
    assert "paired over 40" in check["note"]
    scored(tmp_path / "b", {"answer_loss": theirs.score().record()})
    _, (apart,) = judge(tmp_path, {"beats": "x"}, score=a, beats=b)
    assert "not the same examples" in apart["note"]
    assert sigmas(check) > 100 > 1 > sigmas(apart)


def sigmas(check):
    return float(check["note"].split("standard errors")[0].split(",")[-1])


@pytest.mark.parametrize(("bigger", "holds"), [(1.4, True), (1.5, True), (1.528, True), (1.53, False)])
def test_a_bigger_size_may_be_worse_by_two_standard_errors(tmp_path, bigger, holds):
    """0.01 each: the difference has 0.0141."""
    a = scored(tmp_path / "a", {"bits_per_byte": entry(bigger)})
    b = scored(tmp_path / "b", {"bits_per_byte": entry(1.5)})
    assert judge(tmp_path, {"across": "sizes", "monotonic": "base"}, score=a, beats=b)[0] is holds


def test_a_failed_gate_names_every_condition_its_value_its_limit_and_where_from(tmp_path):
    job = Job.for_test(
        "xs/instruct/gate.onnx-int4", "gate", {"parity": {"kl": 0.01, "greedy": 0.9, "tokenizer": "exact"}},
        inputs={"parity": ("xs/instruct/parity.onnx-int4", "k")},
    )  # fmt: skip
    with pytest.raises(StepFailed) as caught:
        gate.run(job, {"parity": parity(tmp_path / "p")}, tmp_path / "out")
    text = caught.value.message
    assert "2 of 3 conditions" in text
    assert "kl is 0.05, must be <= 0.01" in text
    assert "greedy_equal is 0.75, must be >= 0.9" in text
    assert text.count("xs/instruct/parity.onnx-int4") == 2
    assert "tokenizer" not in text


def test_an_advisory_gate_gives_the_same_verdict_and_does_not_fail(tmp_path):
    params = {"parity": {"kl": 0.01}, "advisory": True}
    metrics = gate.run(
        Job.for_test("g", "gate", params), {"parity": parity(tmp_path / "p")}, tmp_path / "out"
    )
    verdict = json.loads((tmp_path / "out/verdict.json").read_text())
    assert metrics["passed"] == 0
    assert not verdict["passed"]
    assert verdict["advisory"]
    assert "kl" in metrics["failures"]


def test_a_gate_without_condition_does_not_pass(tmp_path):
    with pytest.raises(StepFailed, match="nothing to check"):
        gate.run(Job.for_test("g", "gate", {}), {}, tmp_path)
