"""t5: span corruption, answers, evaluation, and the graphs that onnxruntime runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_artifacts import CHATS, DOCUMENTS, content, make_data
from tiny_model import TEXTS
from tiny_seq2seq import PLANETS, SHAPES, marked_tokenizer, questions
from tiny_training import CONTEXT, chat_mix, furthest, make_job, run, same, text_mix
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from famc.cost.parameters import count
from famc.errors import StepFailed
from famc.job import Job
from famc.work import evaluate
from famc.work.loss import head_loss
from famc.work.onnx_seq2seq import build_seq2seq, cache_names, graph_names
from famc.work.onnx_session import open_graph
from famc.work.pieces import generator
from famc.work.rows import IGNORE, examples
from famc.work.seq2seq import (
    PairSet,
    chat_pairs,
    collate,
    corrupt,
    encode_source,
    encode_target,
    last_exchange,
    raw_length,
    score_target,
    spans_of,
    try_out_seq2seq,
)
from famc.work.seq2seq_session import OnnxSeq2Seq, compare_seq2seq
from famc.work.training import new_model, parent_model, save_model

MASK, END = 1, 2
SHAPE = SHAPES["t5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's tokenizer, data, and a t5 that learnt to answer."""
    folder = tmp_path_factory.mktemp("home")
    marked_tokenizer(folder / "tokenizer")
    text_mix(folder / "text", 6000)
    questions(folder / "chat", 48)
    chats = [
        [{"role": "user", "content": f"Tell me of {p} now."}, {"role": "assistant", "content": p}]
        for p in PLANETS
    ]
    make_data(folder / "asked", [{"messages": chat} for chat in [*chats, *CHATS[:2]]])
    make_data(folder / "held", [{"text": text} for text in DOCUMENTS])
    train(folder, folder / "model", "sft", steps=240)
    return folder


def train(home: Path, out: Path, kind: str, *, parent: Path | None = None, **more: Any) -> Any:
    """Metrics of a run."""
    data = {"pretrain": "text", "sft": "chat"}[kind]
    inputs = {"tokenizer": home / "tokenizer", "data": home / data} | ({"model": parent} if parent else {})
    return run(make_job(kind, **{"shape": SHAPE, "lr": {"peak": 1e-2}} | more), inputs, out)


@pytest.fixture(scope="module")
def loud(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A t5 of random weights in which distances and norms matter: what a graph loses of them is heard."""
    folder = tmp_path_factory.mktemp("loud")
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    model = new_model(make_job("sft", shape=SHAPE).params["shape"], words, 5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative" in name:
                weight.mul_(10)
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
    save_model(model, home / "tokenizer", folder, words)
    return folder


@pytest.fixture(scope="module")
def graphs(home: Path, loud: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The loud model in fp32, the trained one in int8."""
    folder = tmp_path_factory.mktemp("graphs")
    build_seq2seq(loud, folder / "fp32", "fp32")
    build_seq2seq(home / "model", folder / "int8", "int8")
    return {quant: folder / quant for quant in ("fp32", "int8")}


# --- span corruption --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4, 7, 20, 64, 568, 5000])
def test_fifteen_percent_go_in_spans_of_three_and_all_can_be_put_back(length: int) -> None:
    ids = np.arange(10, 10 + length)
    noise, spans = spans_of(length)
    for seed in range(5):
        pair = corrupt(ids, generator(seed), MASK, END)
        source, target = pair.source.tolist(), pair.target.tolist()
        assert (source.count(MASK), target.count(MASK)) == (spans, spans)
        assert len(source) == length - noise + spans + 1
        assert len(target) == noise + spans + 1
        assert (source[-1], target[-1], target[0]) == (END, END, MASK)
        taken: list[list[int]] = []
        for token in target[:-1]:
            if token == MASK:
                taken.append([])
            else:
                taken[-1].append(token)
        assert all(taken)
        back = [t for token in source[:-1] for t in (taken.pop(0) if token == MASK else [token])]
        assert back == ids.tolist()
    if length >= 568:
        assert noise == pytest.approx(0.15 * length, abs=1)
        assert noise / spans == pytest.approx(3, abs=0.1)


def test_spans_move_with_chance_and_stay_with_the_seed() -> None:
    ids = np.arange(10, 200)
    one, again, other = (corrupt(ids, generator(seed), MASK, END).source.tolist() for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("context", [8, 16, 64, 100, 512, 1024])
def test_a_source_fills_the_context_and_never_more(context: int) -> None:
    length = raw_length(context)
    sizes = [length + 1 - (spans_of(length)[0] - spans_of(length)[1]) for length in (length, length + 1)]
    assert sizes[0] <= context < sizes[1]
    assert raw_length(512) == 568  # as T5's own preprocessing


# --- conversations ----------------------------------------------------------------------------------------


def test_the_last_exchange_of_a_conversation_is_learnt(home: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    chat_mix(tmp_path / "mix", [*CHATS, [{"role": "user", "content": "unanswered"}]])
    pairs, facts = chat_pairs(examples(tmp_path / "mix"), words, 32)
    texts = [(words.decode(pair.source), words.decode(pair.target)) for pair in pairs]
    assert texts[0] == ("What does bread need?<|im_end|>", "Flour and salt.<|im_end|>")
    assert texts[2] == ("How many?<|im_end|>", "Seven.<|im_end|>")
    assert facts == {"rows": 3, "truncated": 0, "dropped": 1, "longer_conversations": 1}


def test_long_texts_are_cut_and_a_cut_answer_has_no_end(home: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    chats = [[{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}]]
    chat_mix(tmp_path / "mix", chats)
    (pair,), facts = chat_pairs(examples(tmp_path / "mix"), words, 10)
    assert (len(pair.source), len(pair.target)) == (10, 10)
    assert pair.source[-1] == words.eos_token_id != pair.target[-1]
    assert facts["truncated"] == 1


def test_an_answer_that_just_fits_is_not_cut(home: Path) -> None:
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    ids = words("Flour and salt.")["input_ids"]
    assert encode_target(words, "Flour and salt.", len(ids) + 1) == [*ids, words.eos_token_id]
    assert encode_target(words, "Flour and salt.", len(ids)) == ids
    assert encode_source(words, "Flour and salt.", len(ids)) == [*ids[:-1], words.eos_token_id]


def test_no_exchange_without_a_user() -> None:
    assert last_exchange([{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]) is None
    assert last_exchange([{"role": "assistant", "content": "a"}]) is None


def test_conversations_without_answers_are_an_error(home: Path, tmp_path: Path) -> None:
    chat_mix(tmp_path / "mix", [[{"role": "user", "content": "unanswered"}]])
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    with pytest.raises(StepFailed, match="nothing to learn"):
        chat_pairs(examples(tmp_path / "mix"), words, 32)


# --- the loss ---------------------------------------------------------------------------------------------


def test_the_loss_is_transformers_own_with_its_gradients(home: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    pairs, _ = chat_pairs(examples(chat_mix(tmp_path / "mix", CHATS)), words, CONTEXT)
    model = new_model(make_job("sft", shape=SHAPE).params["shape"], words, 0)
    items = [PairSet(pairs)[i] for i in range(3)]
    batch = collate(items, words.pad_token_id, words.pad_token_id)
    assert (batch["attention_mask"] == 0).any()
    assert (batch["labels"] == IGNORE).any()
    named = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    theirs = model(**named).loss
    theirs.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = score_target(model, batch)
    ours = head_loss(found.hidden, found.weight, found.labels, bf16=False) / len(found.labels)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4), name


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_span_corruption_learns_and_leaves_a_folder(home: Path, tmp_path: Path, optimizer: str) -> None:
    metrics = train(home, tmp_path / "out", "pretrain", steps=120, optimizer=optimizer)
    assert metrics["last_loss"] < 0.75 * metrics["first_loss"]
    assert (metrics["noise"], metrics["mean_span"]) == (0.15, 3.0)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == count(SHAPE).total
    try_out_seq2seq(tmp_path / "out", AutoTokenizer.from_pretrained(tmp_path / "out"))


def test_it_learns_to_name_the_planet(home: Path) -> None:
    """Greedy answers of transformers, as a user of the folder asks for them."""
    words = AutoTokenizer.from_pretrained(home / "model")
    model = AutoModelForSeq2SeqLM.from_pretrained(home / "model")
    assert words.chat_template is None
    assert words.model_max_length == CONTEXT
    for planet in PLANETS:
        made = model.generate(**words(f"Is {planet} hot?", return_tensors="pt"))
        assert words.decode(made[0], skip_special_tokens=True) == planet
        assert made[0, -1] == words.eos_token_id


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_the_micro_batch_changes_nothing(home: Path, tmp_path: Path, kind: str) -> None:
    for name, micro in (("whole", 4), ("single", 1)):
        train(home, tmp_path / name, kind, steps=3, micro_batch=micro)
    assert furthest(tmp_path / "whole", tmp_path / "single") < 1e-3


@pytest.mark.parametrize(("kind", "precision"), [("pretrain", "fp32"), ("sft", "bf16")])
def test_a_job_that_resumes_leaves_the_same_bytes(
    home: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    """The run without a break against one whose later checkpoint and result are lost."""
    more: dict[str, Any] = {"steps": 20, "checkpoint_steps": 10, "precision": precision, "optimizer": "muon"}
    for name in ("straight", "broken"):
        train(home, tmp_path / name, kind, **more)
    (tmp_path / "broken/model.safetensors").unlink()
    shutil.rmtree(tmp_path / "broken/checkpoints/checkpoint-20")
    assert train(home, tmp_path / "broken", kind, **more)["resumed_at"] == 10
    assert same(tmp_path / "straight", tmp_path / "broken")


def test_answers_are_learnt_on_top_of_span_corruption(home: Path, tmp_path: Path) -> None:
    train(home, tmp_path / "base", "pretrain", steps=4)
    metrics = train(home, tmp_path / "out", "sft", parent=tmp_path / "base", steps=1, lr={"peak": 1e-9})
    assert metrics["rows"] == 48
    assert furthest(tmp_path / "base", tmp_path / "out") < 1e-6
    shape = make_job("sft", shape=SHAPE).params["shape"]
    assert parent_model(tmp_path / "base", {**shape, "context": 256}).config.n_positions == 256


def test_adapters_are_merged(home: Path, tmp_path: Path) -> None:
    train(home, tmp_path / "out", "sft", parent=home / "model", steps=3, lora={"r": 2})
    assert 0 < furthest(home / "model", tmp_path / "out") < 0.5


def test_an_untied_head_and_a_loss_on_all_are_refused(home: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    shape = make_job("sft", shape=SHAPE).params["shape"]
    with pytest.raises(StepFailed, match="ties"):
        new_model({**shape, "tie": False}, words, 0)
    with pytest.raises(StepFailed, match="loss_on: all has no meaning"):
        train(home, tmp_path / "out", "sft", loss_on="all", steps=1)


def test_a_folder_that_does_not_say_how_it_was_trained_is_refused(home: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(home / "model")
    shutil.copytree(home / "model", tmp_path / "model", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(StepFailed, match="its tokenizer makes"):
        try_out_seq2seq(tmp_path / "model", AutoTokenizer.from_pretrained(home / "tokenizer"))
    path = tmp_path / "model/generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": 7}))
    with pytest.raises(StepFailed, match="ends answers at 7"):
        try_out_seq2seq(tmp_path / "model", words)
    del settings["decoder_start_token_id"]
    path.write_text(json.dumps(settings))
    with pytest.raises(StepFailed, match="no decoder_start_token_id"):
        try_out_seq2seq(tmp_path / "model", words)


# --- evaluation -------------------------------------------------------------------------------------------


def measure(home: Path, out: Path, task: str, data: str) -> dict[str, Any]:
    tasks = [{"task": task, "data": data, "n": None, "max_new_tokens": 8}]
    job = Job.for_test("t/eval", "eval", {"tasks": tasks, "context": CONTEXT})
    inputs = {"model": home / "model", "tokenizer": home / "tokenizer", f"data.{data}": home / data}
    out.mkdir()
    return evaluate.run(job, inputs, out)


def test_answers_are_scored_and_kept(home: Path, tmp_path: Path) -> None:
    found = measure(home, tmp_path / "out", "answers", "asked")
    # six planets are known; of bread and the oven it knows nothing
    assert found["exact_match"] == pytest.approx(6 / 8)
    assert 6 / 8 <= found["chrf"] < 1
    assert found["ended"] >= 6 / 8
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    right = [s for s in samples if s["answer"] == s["reference"]]
    assert {s["reference"] for s in right} == set(PLANETS)
    assert right[0]["prompt"][0]["role"] == "user"
    units = json.loads((tmp_path / "out/units.json").read_text())
    assert all(len(entry["ids"]) == 8 for entry in units.values())
    model = AutoModelForSeq2SeqLM.from_pretrained(home / "model")
    words = AutoTokenizer.from_pretrained(home / "model")
    total = tokens = 0.0
    for sample in samples:
        ids = words(sample["prompt"][0]["content"], return_tensors="pt")["input_ids"]
        labels = words(sample["reference"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * labels.numel()
        tokens += labels.numel()
    assert found["answer_loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_hidden_spans_are_scored_without_their_marks(home: Path, tmp_path: Path) -> None:
    found = measure(home, tmp_path / "out", "fill_mask", "held")
    assert found["masked_loss"] > 0
    units = json.loads((tmp_path / "out/units.json").read_text())
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    wanted = 0
    for text in DOCUMENTS:
        size = len(words(text)["input_ids"])
        longest = raw_length(CONTEXT)
        pieces = [min(longest, size - at) for at in range(0, size, longest)]
        wanted += sum(spans_of(piece)[0] for piece in pieces if piece >= 4)
    assert sum(units["masked_loss"]["den"]) == wanted


def test_what_follows_is_not_asked_of_t5(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="asks what follows"):
        measure(home, tmp_path / "out", "bits_per_byte", "held")


# --- ONNX -------------------------------------------------------------------------------------------------

ASKED = [
    *((f"Is {planet} hot?", planet) for planet in PLANETS),
    (" ".join(TEXTS * 2), TEXTS[0]),  # distances beyond the table's end
    ("", "x"),
]


def test_the_graphs_are_the_model(loud: Path, graphs: dict[str, Path]) -> None:
    words = AutoTokenizer.from_pretrained(loud)
    found = compare_seq2seq(loud, graphs["fp32"], ASKED, words, 1)
    assert found["states_max_abs"] < 1e-4
    assert found["max_abs"] < 1e-3
    assert found["cached_max_abs"] < 1e-3
    assert found["kl"] < 1e-8
    assert found["top1_agreement"] == found["greedy_equal"] == 1.0
    assert found["prompts"] == len(ASKED)


def test_eight_bits_are_near(home: Path, graphs: dict[str, Path]) -> None:
    words = AutoTokenizer.from_pretrained(home / "model")
    found = compare_seq2seq(home / "model", graphs["int8"], ASKED[:6], words, 1)
    assert 0 < found["kl"] < 0.05
    assert found["greedy_equal"] == 1.0
    whole, small = (sum((graphs[q] / name).stat().st_size for name in graph_names(q)) for q in graphs)
    assert small < 0.7 * whole


def test_a_cache_that_is_lost_is_seen(loud: Path, graphs: dict[str, Path]) -> None:
    """The graph without its past says something else: the comparison has something to find."""
    words = AutoTokenizer.from_pretrained(loud)
    session = OnnxSeq2Seq(graphs["fp32"], 1)
    states = session.encode(encode_source(words, "Is Mars hot?", CONTEXT))
    _, past = session.step(states, [words.pad_token_id])
    token = int(words("Mars")["input_ids"][0])
    with_past, grown = session.step(states, [token], past)
    without, _ = session.step(states, [token])
    assert np.abs(with_past - without).max() > 1e-2
    assert grown["past_key_values.0.decoder.key"].shape[2] == 2
    assert grown["past_key_values.0.encoder.key"].shape[2] == states.shape[1]


def test_names_and_axes_are_those_that_transformers_js_asks_for(graphs: dict[str, Path]) -> None:
    encoder, decoder = (onnx.load(graphs["fp32"] / name).graph for name in graph_names("fp32"))
    assert [i.name for i in encoder.input] == ["input_ids", "attention_mask"]
    assert [o.name for o in encoder.output] == ["last_hidden_state"]
    names = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in decoder.input
    }
    assert set(names) == {
        "encoder_attention_mask", "input_ids", "encoder_hidden_states", *cache_names(SHAPE.layers),
    }  # fmt: skip
    past = names["past_key_values.1.encoder.key"]
    # an axis of another name counts as 0 there: the cache starts empty
    assert past == ["batch_size", SHAPE.heads, "past_encoder_sequence_length", SHAPE.head_dim]
    assert [o.name for o in decoder.output] == ["logits", *cache_names(SHAPE.layers, "present")]
    text = encoder.SerializeToString() + decoder.SerializeToString()
    assert b".py" not in text  # no notes of the tracer, with the paths of this machine


def test_the_same_model_gives_the_same_bytes(home: Path, graphs: dict[str, Path], tmp_path: Path) -> None:
    facts = build_seq2seq(home / "model", tmp_path / "again", "int8")
    assert content(tmp_path / "again") == content(graphs["int8"])
    sizes = [(tmp_path / "again" / name).stat().st_size for name in graph_names("int8")]
    assert facts["bytes"] == sum(sizes)
    assert int(facts["decoder_nodes_int8"]) > 0 == facts["decoder_nodes_fp32"]


def test_rows_of_unequal_length_are_masked(loud: Path, graphs: dict[str, Path]) -> None:
    """A batch with padding, in two runs of the decoder: as transformers.js runs it."""
    encoder, decoder = (open_graph(graphs["fp32"] / name, 1) for name in graph_names("fp32"))
    model = AutoModelForSeq2SeqLM.from_pretrained(loud)
    ids, mask = np.random.default_rng(0).integers(20, 390, (3, 11)), np.ones((3, 11), dtype=np.int64)
    mask[1, 6:] = mask[2, 2:] = 0
    said = np.random.default_rng(1).integers(20, 390, (3, 5))
    with torch.no_grad():
        wanted = model(*(torch.from_numpy(x) for x in (ids, mask, said))).logits.numpy()
    states = encoder.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    past = {
        name: np.zeros((3, SHAPE.heads, 0, SHAPE.head_dim), np.float32) for name in cache_names(SHAPE.layers)
    }
    for part in (slice(0, 4), slice(4, 5)):
        feeds = {"input_ids": said[:, part], "encoder_hidden_states": states, "encoder_attention_mask": mask}
        logits, *present = decoder.run(None, feeds | past)
        past = dict(zip(past, present, strict=True))
        assert np.abs(logits - wanted[:, part]).max() < 1e-4


def test_what_can_not_be_exported_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="in int4"):
        build_seq2seq(home / "model", tmp_path / "out", "int4")  # type: ignore[arg-type]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(StepFailed, match="doesn't know BertModel"):
        build_seq2seq(tmp_path / "bert", tmp_path / "out", "fp32")
    with pytest.raises(StepFailed, match=r"no config\.json"):
        build_seq2seq(tmp_path / "nothing", tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()
    with pytest.raises(StepFailed, match="0 pairs of encoder and decoder"):
        OnnxSeq2Seq(tmp_path, 1)
