"""Measurements are what they say: right tokens, right sums, honest errors, whatever the batch."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from tiny_artifacts import CHATS, DOCUMENTS, content, make_data, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from famc.errors import StepFailed
from famc.job import Job
from famc.work import evaluate
from famc.work.generate import greedy
from famc.work.likelihood import Row, encode_chat, encode_prompt, end_ids, load_model, score_rows
from famc.work.scores import Units, difference, independent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.set_num_threads(1)
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tokenizer):
    return make_model(tmp_path_factory.mktemp("learned"), tokenizer, steps=80)


@pytest.fixture(scope="module")
def noise(tmp_path_factory, tokenizer):
    return make_model(tmp_path_factory.mktemp("noise"), tokenizer)


@pytest.fixture(scope="module")
def uniform(tmp_path_factory, tokenizer):
    """Tied embeddings of nought: all logits are nought."""
    folder = make_model(tmp_path_factory.mktemp("uniform"), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    pairs = [
        {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [{"role": "assistant", "content": wrong}]}
        for chat, wrong in zip(CHATS, ("Zwei große Deiche und Salz?", "Print total.", "8"), strict=True)
    ]
    return {
        "text": make_data(root / "text", [{"text": text} for text in DOCUMENTS]),
        "chat": make_data(root / "chat", [{"messages": chat} for chat in CHATS]),
        "pairs": make_data(root / "pairs", pairs),
    }


def task(name, source, **more):
    return {"task": name, "data": source, "n": None, "max_new_tokens": 16, "tasks": [], **more}


def measure(out, model, tokenizer, data, *tasks, context=64, **job):
    params = {"suite": "s", "tasks": list(tasks), "context": context}
    inputs = {"model": model, "tokenizer": tokenizer} | {f"data.{k}": v for k, v in data.items()}
    out.mkdir(parents=True, exist_ok=True)
    metrics = evaluate.run(Job.for_test("xs/base/eval.s", "eval", params, **job), inputs, out)
    return metrics, json.loads((out / "results.json").read_text())


def plain_nll(model, ids):
    """-log p of every token but the first, by the shortest code there is."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return -logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


# --- text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [7, 64])
def test_a_uniform_model_costs_log2_of_the_vocabulary_a_token(tmp_path, uniform, tokenizer, data, context):
    """Whatever the windows: every token of every document is scored exactly once."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    tokens = sum(len(words(text)["input_ids"]) for text in DOCUMENTS)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    metrics, results = measure(
        tmp_path, uniform, tokenizer, data, task("bits_per_byte", "text"), context=context
    )
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(len(words)) * tokens / size, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(len(words), rel=1e-5)
    assert results["bits_per_byte"]["n"] == len(DOCUMENTS)
    assert results["bits_per_byte"]["stderr"] > 0


def test_a_documents_first_token_is_scored_after_the_end_of_another(tmp_path, noise, tokenizer, data):
    model, words = load_model(noise, 1), AutoTokenizer.from_pretrained(tokenizer)
    expected = sum(plain_nll(model, [0, *words(text)["input_ids"]]).sum() for text in DOCUMENTS)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    metrics, _ = measure(tmp_path, noise, tokenizer, data, task("bits_per_byte", "text"), context=1000)
    assert metrics["bits_per_byte"] == pytest.approx(expected / math.log(2) / size, rel=1e-5)


def test_examples_are_chosen_by_their_ids_not_by_their_order(tmp_path):
    rows = [{"id": f"d{i}", "text": str(i)} for i in range(30)]
    ordered, shuffled = list(rows), random.Random(1).sample(rows, 30)
    first = evaluate.heldout(make_data(tmp_path / "a", ordered), 5, ["text"])
    assert first == evaluate.heldout(make_data(tmp_path / "b", shuffled), 5, ["text"])
    assert [row["id"] for row in first] != [row["id"] for row in rows[:5]]


def test_learning_lowers_bits_per_byte_and_bf16_says_nearly_the_same(
    tmp_path, learned, noise, tokenizer, data
):
    ask = task("bits_per_byte", "text", n=6)
    good, _ = measure(tmp_path / "good", learned, tokenizer, data, ask)
    half, _ = measure(tmp_path / "half", learned, tokenizer, data, ask, precision="bf16")
    bad, _ = measure(tmp_path / "bad", noise, tokenizer, data, ask)
    assert good["bits_per_byte"] < 0.5 * bad["bits_per_byte"]
    assert half["bits_per_byte"] == pytest.approx(good["bits_per_byte"], rel=0.03)


# --- batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_rows_of_any_lengths_score_as_one_by_one(noise, batch_tokens):
    """Padding on the right touches nothing; only wanted tokens come back, in order."""
    model, rng = load_model(noise, 1), random.Random(0)
    rows = []
    for length in (1, 2, 40, 17, 40, 5):
        ids = [rng.randrange(3, 380) for _ in range(length)]
        rows.append(Row(ids, [rng.random() < 0.5 for _ in ids]))
    for row, score in zip(rows, score_rows(model, rows, batch_tokens=batch_tokens), strict=True):
        wanted = np.asarray(row.wanted[1:], dtype=bool)
        expected = plain_nll(model, list(row.ids))[wanted] if len(row.ids) > 1 else np.empty(0)
        assert score.nll == pytest.approx(expected, abs=2e-4)
        assert len(score.hit) == wanted.sum()


def test_greedy_text_is_the_same_in_a_batch_alone_and_from_transformers(learned, tokenizer):
    """Prompts of different lengths, answers of different lengths, a limit each."""
    model, words = load_model(learned, 1), AutoTokenizer.from_pretrained(tokenizer)
    prompts = [encode_prompt(words, chat[:-1]) for chat in CHATS] + [words("Rivers carry")["input_ids"]]
    eos, limits = end_ids(words), [16, 16, 16, 5]
    together = greedy(model, prompts, limits, eos)
    assert together == greedy(model, prompts, limits, eos, batch=1)
    assert together == greedy(model, prompts, limits, eos, batch=3)
    for prompt, limit, new in zip(prompts, limits, together, strict=True):
        made = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=limit, do_sample=False, eos_token_id=sorted(eos), pad_token_id=0,
        )  # fmt: skip
        assert made[0, len(prompt) :].tolist() == new
    assert len(together[-1]) == 5
    assert {new[-1] for new in together[:3]} == {words.eos_token_id}


def test_no_new_tokens_are_none(noise):
    assert greedy(load_model(noise, 1), [[5, 6], [7]], [0, 3], set())[0] == []


# --- conversations ---------------------------------------------------------------------------------------


def test_answer_loss_counts_only_what_the_assistant_says(tmp_path, noise, tokenizer, data):
    """Against the ids between the marks, found without the template's mask."""
    model, words = load_model(noise, 1), AutoTokenizer.from_pretrained(tokenizer)
    losses, hits = [], 0
    for chat in CHATS:
        ids = words.apply_chat_template(chat, return_dict=True)["input_ids"]
        nll = plain_nll(model, ids)
        with torch.inference_mode():
            choices = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        start, role = words.convert_tokens_to_ids("<|im_start|>"), words("assistant\n")["input_ids"]
        for at in range(len(ids)):
            if ids[at] == start and ids[at + 1 : at + 1 + len(role)] == role:
                end = ids.index(words.eos_token_id, at)
                for target in range(at + 1 + len(role), end + 1):
                    losses.append(nll[target - 1])
                    hits += choices[target - 1] == ids[target]
    metrics, results = measure(tmp_path, noise, tokenizer, data, task("answers", "chat"), context=200)
    assert metrics["answer_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(hits / len(losses), abs=1e-7)
    assert results["answer_loss"]["n"] == len(CHATS)


def test_a_model_that_knows_the_answers_gives_them_and_ends(tmp_path, learned, tokenizer, data):
    metrics, _ = measure(tmp_path, learned, tokenizer, data, task("answers", "chat"), context=200)
    assert metrics["exact_match"] == metrics["ended"] == 1
    assert metrics["chrf"] == pytest.approx(1)
    assert metrics["token_accuracy"] == 1
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == len(CHATS)
    assert {s["reference"] for s in samples} == {chat[-1]["content"] for chat in CHATS}
    assert all(s["answer"] == s["reference"] and s["prompt"][-1]["role"] == "user" for s in samples)


def test_an_answer_that_is_cut_off_has_not_ended(tmp_path, learned, tokenizer, data):
    ask = task("answers", "chat", max_new_tokens=1)
    assert measure(tmp_path, learned, tokenizer, data, ask, context=200)[0]["ended"] == 0


def test_a_template_without_marks_is_refused(tokenizer):
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.chat_template = words.chat_template.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    with pytest.raises(StepFailed, match="does not mark"):
        encode_chat(words, CHATS[0])


# --- preferences -----------------------------------------------------------------------------------------


def test_preference_knows_the_chosen_answers_and_their_length(tmp_path, learned, uniform, tokenizer, data):
    """Two of three chosen answers are longer; the model knows all three. A uniform one can't tell."""
    good, results = measure(
        tmp_path / "a", learned, tokenizer, data, task("preference", "pairs"), context=200
    )
    assert good["preference_accuracy"] == good["preference_accuracy_sum"] == 1
    assert good["length_bias"] == pytest.approx(good["length_bias_data"]) == pytest.approx(2 / 3)
    assert results["preference_accuracy"]["stderr"] == 0
    level, _ = measure(tmp_path / "b", uniform, tokenizer, data, task("preference", "pairs"), context=200)
    assert level["preference_accuracy_sum"] == pytest.approx(1 / 3)  # the sum favours the shorter


def test_preference_is_per_token_and_its_sum_is_not(tmp_path, uniform, tokenizer):
    """Against sums and means over plain logits, for pairs on which the two disagree."""
    model = AutoModelForCausalLM.from_pretrained(uniform)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    model.save_pretrained(tmp_path / "model")
    shutil.copyfile(uniform / "tokenizer.json", tmp_path / "model/tokenizer.json")
    shutil.copyfile(uniform / "tokenizer_config.json", tmp_path / "model/tokenizer_config.json")
    words, before = AutoTokenizer.from_pretrained(tokenizer), [{"role": "user", "content": "Hm?"}]
    start = len(encode_prompt(words, before))
    means, sums, rows = [], [], []
    chosen, rejected = (
        ("Salt and ships. " * 3, "Heat", "Sea, fog"),
        ("Salt", "Heat and salt", "The oven " * 4),
    )
    for texts in zip(chosen, rejected, strict=True):
        said = [[{"role": "assistant", "content": text}] for text in texts]
        rows.append({"prompt": before, "chosen": said[0], "rejected": said[1]})
        pair = []
        for turn in said:
            ids, mask = encode_chat(words, before + turn)
            nll = plain_nll(model, ids)
            pair.append([-nll[at - 1] for at in range(start, len(ids)) if mask[at]])
        means.append(float(np.mean(pair[0]) > np.mean(pair[1])))
        sums.append(float(np.sum(pair[0]) > np.sum(pair[1])))
    assert np.mean(means) != np.mean(sums)  # else this test would see nothing
    data = {"pairs": make_data(tmp_path / "pairs", rows)}
    found, _ = measure(
        tmp_path / "o", tmp_path / "model", tokenizer, data, task("preference", "pairs"), context=200
    )
    assert found["preference_accuracy"] == pytest.approx(np.mean(means))
    assert found["preference_accuracy_sum"] == pytest.approx(np.mean(sums))


def test_with_a_reference_the_rewards_are_implicit(tmp_path, learned, noise, tokenizer, data):
    """A model against itself has no reward: all pairs tie. Against noise, it has learnt them."""
    shares = []
    for reference in (learned, noise):
        ask = {**data, "x": data["text"]}
        params = {"suite": "s", "tasks": [task("preference", "pairs")], "context": 200}
        inputs = {"model": learned, "tokenizer": tokenizer, "reference": reference}
        inputs |= {f"data.{k}": v for k, v in ask.items()}
        shares.append(
            evaluate.run(Job.for_test("e", "eval", params), inputs, tmp_path)["preference_accuracy_implicit"]
        )
    assert shares == [0.5, 1]


# --- files and errors ------------------------------------------------------------------------------------


def test_the_same_job_writes_the_same_bytes(tmp_path, learned, tokenizer, data):
    asked = [task("bits_per_byte", "text"), task("answers", "chat"), task("preference", "pairs")]
    first, results = measure(tmp_path / "a", learned, tokenizer, data, *asked)
    second, _ = measure(tmp_path / "b", learned, tokenizer, data, *asked)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert first == second
    assert set(content(tmp_path / "a")) == {"results.json", "units.json", "samples.jsonl"}
    units = json.loads((tmp_path / "a/units.json").read_text())
    for name, entry in units.items():
        again = Units.read(entry).score()
        assert again.value == pytest.approx(results[name]["value"], rel=1e-6)


def test_two_tasks_of_a_kind_do_not_overwrite_each_other(tmp_path, noise, tokenizer, data):
    both = {"text": data["text"], "more": data["text"]}
    asked = [task("bits_per_byte", "text", n=2), task("bits_per_byte", "more", n=4)]
    _, results = measure(tmp_path, noise, tokenizer, both, *asked)
    assert results["bits_per_byte"]["n"] == 2
    assert results["bits_per_byte.more"]["n"] == 4


def test_a_source_of_another_format_is_named(tmp_path, noise, tokenizer, data):
    with pytest.raises(StepFailed, match="no column 'messages'"):
        measure(tmp_path, noise, tokenizer, data, task("answers", "text"))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_lm_eval_says_what_to_install(tmp_path, noise, tokenizer, data):
    with pytest.raises(StepFailed, match="lm-eval") as caught:
        measure(tmp_path, noise, tokenizer, {}, task("lm_eval", None, tasks=["arc_easy"]))
    assert "pip install" in caught.value.hint


# --- errors of scores ------------------------------------------------------------------------------------


def test_the_standard_error_of_a_ratio_is_that_of_resampling_its_units():
    rng = np.random.default_rng(0)
    den = rng.integers(5, 200, 300)
    num = den * rng.normal(2, 0.5, 300)
    units = Units.of(zip(map(str, range(300)), num, den, strict=True))
    picks = rng.integers(0, 300, (4000, 300))
    spread = (num[picks].sum(1) / den[picks].sum(1)).std()
    assert units.score().stderr == pytest.approx(spread, rel=0.06)
    assert units.value == pytest.approx(num.sum() / den.sum())


def test_a_paired_difference_is_surer_than_an_independent_one():
    rng = np.random.default_rng(0)
    base = rng.normal(2, 1, 200)
    keys = [str(i) for i in range(200)]
    ours = Units.of(zip(keys, base + rng.normal(-0.1, 0.05, 200), [1] * 200, strict=True))
    theirs = Units.of(zip(keys, base, [1] * 200, strict=True))
    paired, apart = difference(ours, theirs), independent(ours.score(), theirs.score())
    assert paired.value == pytest.approx(apart.value) == pytest.approx(-0.1, abs=0.02)
    assert paired.stderr < 0.1 * apart.stderr
    assert math.isnan(Units.of([("a", 1, 1)]).score().stderr)
