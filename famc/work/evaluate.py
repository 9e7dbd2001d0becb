"""`eval`: a suite of measurements of one model, each with its standard error.

In: model and tokenizer, `data.<source>` for each task's held-out part; for `rerank` maybe `retriever`, an
embedder. Out: results.json (metric -> value, stderr, n, 95 % interval), units.json (the same by document,
for paired comparison in gates), samples.jsonl (the first answers, to be read). Examples are taken in the order of the hash of their id: the same ones for every
model, whatever the file's order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from famc.errors import StepFailed
from famc.job import Job
from famc.work.arch import fits, load_fitting
from famc.work.generate import greedy
from famc.work.likelihood import (
    Row,
    document_start,
    encode_chat,
    encode_prompt,
    end_ids,
    last_turn,
    load_tokenizer,
    score_rows,
)
from famc.work.scores import RESULTS, UNITS, Score, Units, interval, metric, write_json
from famc.work.search import SEARCHES, suits

SAMPLES = 20


@dataclass
class Measured:
    """What a task found: ratios over units, scores without units, and answers to read."""

    units: dict[str, Units] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    higher: dict[str, bool] = field(
        default_factory=dict
    )  # for metrics that others.HIGHER_IS_BETTER does not know


@dataclass(frozen=True)
class Subject:
    """The model under test and what tasks need to ask it. Tasks that search load the folder themselves."""

    model: Any
    tokenizer: Any
    context: int
    precision: str
    progress: Callable[[float], None]  # share of the task that is done
    folder: Path
    tokenizer_folder: Path
    threads: int
    reference: Any = None
    retriever: Path | None = None


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Measure all tasks of the suite."""
    tasks: Sequence[Mapping[str, Any]] = job.params["tasks"]
    for task in tasks:
        suits(inputs["model"], task["task"])
    told = [task["task"] for task in tasks if task["task"] not in SEARCHES]
    # who searches loads the folder in its own way
    model = load_fitting(inputs["model"], job.threads) if told else None
    for name in told:
        fits(model, name)
    tokenizer = load_tokenizer(inputs["tokenizer"]) if told else None
    reference = load_fitting(inputs["reference"], job.threads) if told and "reference" in inputs else None
    results: dict[str, dict[str, Any]] = {}
    units: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    seen: set[str] = set()
    for index, task in enumerate(tasks):

        def progress(share: float, done: int = index) -> None:
            job.progress(done + share, len(tasks))

        subject = Subject(
            model, tokenizer, int(job.params["context"]), job.precision, progress,
            inputs["model"], inputs["tokenizer"], job.threads, reference, inputs.get("retriever"),
        )  # fmt: skip
        found = TASKS[task["task"]](subject, task, inputs.get(f"data.{task['data']}"))
        # a second task of the same kind carries its source in its metrics' names
        suffix = f".{task['data']}" if task["task"] in seen else ""
        seen.add(task["task"])
        for name, measured in found.units.items():
            results[name + suffix] = {
                **measured.score().record(),
                "interval": interval(measured, name + suffix),
            }
            units[name + suffix] = measured.record()
        for name, score in found.scores.items():
            results[name + suffix] = score.record()
        for name, higher in found.higher.items():
            results[name + suffix]["higher_is_better"] = higher
        samples += found.samples
        job.progress(index + 1, len(tasks))
    write_json(out / RESULTS, results)
    (out / UNITS).write_text(json.dumps(units, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples[:SAMPLES])
    (out / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: metric(Score.read(entry).value) for name, entry in results.items()}


def heldout(folder: Path | None, n: int | None, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The first `n` held-out examples in the order of sha256(id); JSON columns are read."""
    if folder is None:
        raise StepFailed("the evaluation has no data", "name a source: data: SOURCE")
    path = folder / "heldout.parquet"
    table = pq.read_table(path)
    absent = [name for name in columns if name not in table.column_names]
    if absent:
        has = ", ".join(table.column_names)
        raise StepFailed(
            f"{path} has no column {absent[0]!r}; it has {has}", "the source's format does not fit the task"
        )
    rows = table.select(["id", *columns]).to_pylist()
    if not rows:
        raise StepFailed(f"{path} holds no examples", "raise heldout.fraction of the source")
    rows.sort(key=lambda row: (hashlib.sha256(str(row["id"]).encode()).hexdigest(), str(row["id"])))
    chosen = rows if n is None else rows[:n]
    return [{k: json.loads(v) if k in JSON_COLUMNS else v for k, v in row.items()} for row in chosen]


JSON_COLUMNS = frozenset({"messages", "prompt", "chosen", "rejected"})


# --- text -------------------------------------------------------------------------------------------------


def bits_per_byte(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """-log2 p of held-out documents per UTF-8 byte; comparable between tokenizers, as perplexity per token
    is not.

    Documents are cut into windows of `context` tokens that do not overlap, so each token is scored once; a
    document's first token is scored after <|endoftext|>, a later window's after the last token of the one
    before.
    """
    start = document_start(subject.tokenizer)
    rows: list[Row] = []
    owner: list[int] = []
    documents = [d for d in heldout(data, task["n"], ["text"]) if d["text"]]
    for index, document in enumerate(documents):
        ids = [start, *subject.tokenizer(document["text"], add_special_tokens=False)["input_ids"]]
        for window in windows(ids, subject.context):
            rows.append(Row(window, [True] * len(window)))
            owner.append(index)
    nll, tokens = [0.0] * len(documents), [0] * len(documents)
    for index, score in zip(owner, _scores(subject, rows), strict=True):
        nll[index] += float(score.nll.sum())
        tokens[index] += len(score.nll)
    ids_ = [str(d["id"]) for d in documents]
    size = [len(d["text"].encode()) for d in documents]
    bits = Units.of((i, x / math.log(2), b) for i, x, b in zip(ids_, nll, size, strict=True))
    loss = Units.of(zip(ids_, nll, tokens, strict=True)).score()
    value = math.exp(min(loss.value, 700))
    return Measured({"bits_per_byte": bits}, {"perplexity": Score(value, value * loss.stderr, loss.n)})


def windows(ids: Sequence[int], context: int) -> Iterable[Sequence[int]]:
    """Inputs of at most `context` tokens with their targets: each token but the first is a target once."""
    for at in range(0, len(ids) - 1, context):
        yield ids[at : at + context + 1]


def fill_mask(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """Loss and accuracy on hidden tokens of held-out documents: of masked LMs, and of t5, which says spans."""
    from famc.work.seq2seq_eval import fill_mask as measure

    documents = [d for d in heldout(data, task["n"], ["text"]) if d["text"]]
    found = measure(
        subject.model, subject.tokenizer, subject.context, subject.precision, documents, subject.progress
    )
    return Measured(found, higher={"masked_loss": False, "masked_accuracy": True})


# --- conversations ----------------------------------------------------------------------------------------


def answers(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """Loss and accuracy on what the assistant says in held-out conversations, and greedy answers to the
    last turn.
    """
    if subject.model.config.is_encoder_decoder:
        from famc.work.seq2seq_eval import answers as measure

        units, samples = measure(
            subject.model, subject.tokenizer, subject.context, subject.precision,
            heldout(data, task["n"], ["messages"]), int(task["max_new_tokens"]), subject.progress,
        )  # fmt: skip
        return Measured(units, samples=samples[:SAMPLES])
    from sacrebleu.metrics import CHRF

    tokenizer = subject.tokenizer
    kept: list[tuple[str, Row]] = []
    turns: list[tuple[str, list[Mapping[str, Any]], str, list[int]]] = []
    for example in heldout(data, task["n"], ["messages"]):
        key = str(example["id"])
        ids, said = encode_chat(tokenizer, example["messages"])
        row = Row(ids[: subject.context], said[: subject.context])
        if any(row.wanted[1:]):
            kept.append((key, row))
        turn = last_turn(example["messages"])
        if turn is not None:
            prompt = encode_prompt(tokenizer, turn[0])
            if len(prompt) < subject.context:
                turns.append((key, *turn, prompt))
    if not kept:
        raise StepFailed(
            "no held-out conversation has an assistant's word within the context", "raise the context"
        )
    scores = _scores(subject, [row for _, row in kept], 0.5)
    loss = Units.of((key, s.nll.sum(), len(s.nll)) for (key, _), s in zip(kept, scores, strict=True))
    right = Units.of((key, s.hit.sum(), len(s.hit)) for (key, _), s in zip(kept, scores, strict=True))
    found = Measured({"answer_loss": loss, "token_accuracy": right})
    if not turns:
        return found

    eos = end_ids(tokenizer)
    limits = [min(int(task["max_new_tokens"]), subject.context - len(prompt)) for *_, prompt in turns]
    made = greedy(
        subject.model, [prompt for *_, prompt in turns], limits, eos,
        progress=lambda done: subject.progress(0.5 + 0.5 * done / len(turns)),
    )  # fmt: skip
    chrf = CHRF()
    rated: list[tuple[str, float, float, float]] = []
    for (key, before, reference, _), new in zip(turns, made, strict=True):
        answer = tokenizer.decode(new, skip_special_tokens=True).strip()
        expected = reference.strip()
        similarity = chrf.sentence_score(answer, [expected]).score / 100
        rated.append((key, similarity, float(answer == expected), float(new[-1] in eos)))
        if len(found.samples) < SAMPLES:
            found.samples.append({"id": key, "prompt": before, "reference": reference, "answer": answer})
    for column, name in enumerate(("chrf", "exact_match", "ended"), start=1):
        found.units[name] = Units.of((str(row[0]), float(row[column]), 1.0) for row in rated)
    return found


# --- preferences ------------------------------------------------------------------------------------------


def preference(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """Does the model find the chosen answer likelier than the rejected one?

    preference_accuracy compares log p per token, preference_accuracy_sum the whole answer's log p (which
    favours short ones); a tie counts half. length_bias is the share of pairs of unequal length in which the
    model prefers (per token) the longer answer, length_bias_data the share in which the longer is the
    chosen one. With a reference model, preference_accuracy_implicit compares DPO's implicit rewards, log p
    - log p_reference.
    """
    keys: list[str] = []
    rows: list[Row] = []
    for example in heldout(data, task["n"], ["prompt", "chosen", "rejected"]):
        before = example["prompt"]
        start = len(encode_prompt(subject.tokenizer, before))
        pair = []
        for side in ("chosen", "rejected"):
            ids, said = encode_chat(subject.tokenizer, [*before, *example[side]])
            said = [mark and at >= start for at, mark in enumerate(said)]
            pair.append(Row(ids[: subject.context], said[: subject.context]))
        if all(any(row.wanted[1:]) for row in pair):
            keys.append(str(example["id"]))
            rows += pair
    if not keys:
        raise StepFailed("no held-out pair has both answers within the context", "raise the context")
    scores = _scores(subject, rows)
    total = [-float(s.nll.sum()) for s in scores]
    length = [len(s.nll) for s in scores]
    mean = [t / n for t, n in zip(total, length, strict=True)]
    pairs = range(0, len(rows), 2)

    def share(values: Sequence[float]) -> Units:
        return Units.of(
            (key, _wins(values[i], values[i + 1]), 1.0) for key, i in zip(keys, pairs, strict=True)
        )

    found = Measured({"preference_accuracy": share(mean), "preference_accuracy_sum": share(total)})
    if subject.reference is not None:
        base = [-float(s.nll.sum()) for s in score_rows(subject.reference, rows, subject.precision)]
        found.units["preference_accuracy_implicit"] = share([a - b for a, b in zip(total, base, strict=True)])
        found.higher["preference_accuracy_implicit"] = True
    unequal = [(key, i) for key, i in zip(keys, pairs, strict=True) if length[i] != length[i + 1]]
    if unequal:
        longer = [(key, i, length[i] > length[i + 1]) for key, i in unequal]
        found.units["length_bias"] = Units.of(
            (key, won if chosen else 1 - won, 1.0)
            for key, i, chosen in longer
            for won in [_wins(mean[i], mean[i + 1])]
        )
        found.units["length_bias_data"] = Units.of((key, float(chosen), 1.0) for key, _, chosen in longer)
    found.units["chosen_tokens"] = Units.of((key, length[i], 1.0) for key, i in zip(keys, pairs, strict=True))
    found.units["rejected_tokens"] = Units.of(
        (key, length[i + 1], 1.0) for key, i in zip(keys, pairs, strict=True)
    )
    return found


def _wins(a: float, b: float) -> float:
    """1 if a is greater, a half if they are equal, 0 otherwise; nan if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else 0.5 * ((a > b) + (a >= b))


# --- search ------------------------------------------------------------------------------------------------


def retrieval(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """How early an embedder finds what answers held-out queries, beside BM25 and together with it."""
    from famc.work import retrieval_eval

    return retrieval_eval.retrieval(subject, task, data)


def rerank(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """How much better a reranker orders what a first stage found."""
    from famc.work import retrieval_eval

    return retrieval_eval.rerank(subject, task, data)


def mteb(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """Tasks of MTEB, by name; of no names, the held-out pairs as MTEB counts them."""
    from famc.work import mteb_eval

    return mteb_eval.mteb(subject, task, data)


# --- lm-evaluation-harness --------------------------------------------------------------------------------


def lm_eval(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """Tasks of EleutherAI's lm-evaluation-harness, by name."""
    try:
        import lm_eval as harness
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise StepFailed(
            "the task 'lm_eval' needs the package lm-eval", "pip install 'famc[lm-eval]'"
        ) from None
    model = HFLM(
        pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=8, max_length=subject.context
    )
    found = harness.simple_evaluate(
        model=model,
        tasks=list(task["tasks"]),
        limit=task["n"],
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
    )
    measured = Measured()
    for name, values in found["results"].items():
        better = found.get("higher_is_better", {}).get(name, {})
        for key, value in values.items():
            label, _, variant = key.partition(",")
            if (
                label.endswith("_stderr")
                or label in ("alias", "sample_len")
                or not isinstance(value, (int, float))
            ):
                continue
            error = values.get(f"{label}_stderr,{variant}")
            n = found.get("n-samples", {}).get(name, {}).get("effective", task["n"] or 0)
            full = f"{name}.{label}" if variant in ("", "none") else f"{name}.{label}.{variant}"
            measured.scores[full] = Score(
                float(value), float(error) if isinstance(error, (int, float)) else math.nan, int(n)
            )
            if better.get(label) is not None:
                measured.higher[full] = bool(better[label])
    return measured


TASKS: dict[str, Callable[[Subject, Mapping[str, Any], Path | None], Measured]] = {
    "bits_per_byte": bits_per_byte,
    "fill_mask": fill_mask,
    "answers": answers,
    "preference": preference,
    "retrieval": retrieval,
    "rerank": rerank,
    "mteb": mteb,
    "lm_eval": lm_eval,
}


def _scores(subject: Subject, rows: Sequence[Row], share: float = 1.0) -> Any:
    total = max(sum(len(row.ids) for row in rows), 1)
    return score_rows(
        subject.model, rows, subject.precision, progress=lambda done: subject.progress(share * done / total)
    )
