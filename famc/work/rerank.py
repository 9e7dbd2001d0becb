"""`rerank`: a sequence classifier with one label learns which passage answers a query, from lists of them.

In: tokenizer, data (a mix of pairs), model (a decoder, an encoder, or an earlier reranker; none with `lexical`),
negatives (mined; else the data's own), teacher (a reranker) for objective distill. Out: the classifier's folder; with head yes_no also `yes_no/`,
the language model whose `yes` less `no` at the last token is the same score (Qwen3-Reranker's form).

A step's loss is the mean over its queries, so that micro-batches change nothing. Pairs of like length run together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from famc.errors import StepFailed
from famc.job import Job
from famc.work.encoder_folder import encoder_tokenizer, save_reranker
from famc.work.likelihood import autocast, load_tokenizer, without_bars
from famc.work.merge import Merger
from famc.work.optim import make_optimizer, schedule
from famc.work.rank_data import Array, Encoder, Lists, Tokens, buckets, padded, read_lists
from famc.work.rank_loss import LOSSES, Loss
from famc.work.rank_model import (
    START,
    YES_NO,
    Head,
    exact,
    is_reranker,
    lexical_model,
    save_yes_no,
    score_layer,
    set_pad,
    start_model,
)  # fmt: skip
from famc.work.runner import CHECKPOINTS
from famc.work.text import limit_threads
from famc.work.training import Watch, arguments, row_order, run_trainer

PASS_TOKENS = {"cpu": 256, "cuda": 8192}  # padding that costs as much as a pass of its own
TEACHER_TOKENS = 8192  # of a padded batch


def run(job: Job, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Read lists, train, save."""
    limit_threads(job.threads)
    torch.set_num_threads(job.threads)
    params = job.params
    arch, context = str(params["shape"]["arch"]), int(params["context"])
    if params["objective"] == "distill" and "teacher" not in inputs:
        raise StepFailed(
            f"{job.name}: objective distill learns a teacher's scores, and there is no teacher",
            "name a reranker as teacher, or choose another objective",
        )
    tokenizer = encoder_tokenizer(inputs["tokenizer"], arch, words=params["text"] == "words", pairs=True)
    set_pad(tokenizer)
    head = Head.of(job, inputs, arch)
    lists = read_lists(inputs["data"], inputs.get("negatives"))
    encoder = Encoder(tokenizer, lists.texts, context)
    order = Order.of(params, lists)
    teacher = None
    if params["objective"] == "distill":
        teacher = _cached_scores(job, inputs["teacher"], lists, order, out / CHECKPOINTS / "teacher.npy")
    facts: dict[str, Any] = {}
    if "model" in inputs:
        model = start_model(job, inputs["model"], tokenizer, head)
    else:
        model, facts = lexical_model(job, lists, encoder, tokenizer, out / CHECKPOINTS / START)
    metrics = _train(job, model, int(tokenizer.pad_token_id), encoder, order, teacher, out)
    model.to("cpu")
    if head.tokens:
        save_yes_no(model, head, inputs["model"], out / YES_NO)
    save_reranker(model, tokenizer, out, context=context)
    for name in ("compute_seconds", "compute_cpu_seconds"):
        metrics[name] = round(metrics[name] + facts.pop(name, 0.0), 3)
    return {**metrics, **facts, "queries": len(lists.queries), "queries_without_negatives": lists.without}


# --- order of the lists -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """The lists of the whole run, step after step: query and passages, as numbers of texts."""

    queries: list[int]
    passages: list[list[int]]
    steps: int
    batch: int
    epochs: float

    @classmethod
    def of(cls, params: Mapping[str, Any], lists: Lists) -> Order:
        """A function of seed and step alone."""
        rows, batch, seed = len(lists.queries), int(params["global_batch"]), int(params["seed"])
        k = int(params["hard_negatives"]["k"]) if params["hard_negatives"] else None
        steps = int(params["steps"] or max(1, math.ceil(rows * float(params["epochs"]) / batch)))
        order = row_order(rows, steps * batch, seed).tolist()
        return cls(
            [lists.queries[row].query for row in order],
            [lists.members(row, place // rows, k, seed) for place, row in enumerate(order)],
            steps,
            batch,
            round(steps * batch / rows, 4),
        )

    def pairs(self) -> Iterator[tuple[int, int]]:
        """All pairs, as they come."""
        for query, passages in zip(self.queries, self.passages, strict=True):
            for passage in passages:
                yield query, passage


class ListSet(torch.utils.data.Dataset[dict[str, Any]]):
    """The lists in training order; within a step those of long pairs first, so that micro-batches are of like length
    (what does not fit in memory fails at once)."""

    def __init__(
        self, order: Order, encoder: Encoder, teacher: Mapping[tuple[int, int], float] | None
    ) -> None:
        self.order, self.encoder, self.teacher = order, encoder, teacher
        longest = [
            max(encoder.length(query, passage) for passage in passages)
            for query, passages in zip(order.queries, order.passages, strict=True)
        ]
        places = range(len(longest))
        self.places = sorted(places, key=lambda at: (at // order.batch, -longest[at], at))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.places[index]
        query, passages = self.order.queries[place], self.order.passages[place]
        labels = [1.0, *(0.0 for _ in passages[1:])]
        if self.teacher is not None:
            labels = [self.teacher[query, passage] for passage in passages]
        return {"pairs": [self.encoder.pair(query, passage) for passage in passages], "labels": labels}


@dataclass(frozen=True)
class Collate:
    """Lists as a batch: buckets of padded pairs, where their scores belong in [queries, list], labels and mask."""

    pad: int
    pass_tokens: int

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        width = max(len(item["pairs"]) for item in items)
        pairs = [pair for item in items for pair in item["pairs"]]
        places = [row * width + at for row, item in enumerate(items) for at in range(len(item["pairs"]))]
        parts = buckets([len(pair.ids) for pair in pairs], self.pass_tokens)
        labels = torch.zeros(len(items), width)
        mask = torch.zeros(len(items), width, dtype=torch.bool)
        for row, item in enumerate(items):
            labels[row, : len(item["labels"])] = torch.tensor(item["labels"])
            mask[row, : len(item["labels"])] = True
        return {
            "buckets": [_tensors([pairs[at] for at in part], self.pad) for part in parts],
            "places": torch.tensor([places[at] for part in parts for at in part]),
            "relevance": labels,
            "mask": mask,
        }


def _tensors(pairs: Sequence[Tokens], pad: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in padded(pairs, pad).items()}


# --- training -----------------------------------------------------------------------------------------------


class ListTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trainer over lists: each pair runs once, its loss is that of its list."""

    def __init__(self, *args: Any, loss: Loss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.list_loss = loss
        # micro-batches hold equally many queries: the mean of their means is the step's
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the queries."""
        found = torch.cat([model(**bucket).logits[:, 0].float() for bucket in inputs["buckets"]])
        mask = inputs["mask"]
        scores = found.new_zeros(mask.numel()).index_copy(0, inputs["places"], found).view(mask.shape)
        loss = self.list_loss(scores, inputs["relevance"], mask).mean()
        return (loss, None) if return_outputs else loss


def _train(
    job: Job, model: Any, pad: int, encoder: Encoder, order: Order,
    teacher: Mapping[tuple[int, int], float] | None, out: Path,
) -> dict[str, Any]:  # fmt: skip
    params, steps = job.params, order.steps
    pairs = tokens = cut = 0
    for query, passage in order.pairs():
        pairs += 1
        tokens += encoder.length(query, passage)
        cut += encoder.truncated(query, passage)
    optimizer = make_optimizer(model, params)
    watch = Watch(job, tokens / steps)
    merger = Merger(model, steps, params["merge"], out / CHECKPOINTS) if params["merge"] else None
    trainer = ListTrainer(
        model=model,
        args=TrainingArguments(
            **arguments(job, out, steps=steps, batch=order.batch), train_sampling_strategy="sequential"
        ),
        train_dataset=ListSet(order, encoder, teacher),
        data_collator=Collate(pad, PASS_TOKENS["cuda" if torch.cuda.is_available() else "cpu"]),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(params, steps))),
        callbacks=[watch, *([merger] if merger else [])],
        loss=LOSSES[params["loss"]],
    )
    metrics = run_trainer(trainer, out, watch, tokens=float(tokens))
    if merger:
        metrics["merged"] = merger.apply(model)
    return {
        **metrics,
        "steps": steps,
        "epochs": order.epochs,
        "pairs": pairs,
        "mean_list": round(pairs / len(order.passages), 4),
        "truncated_share": round(cut / pairs, 4),
        "pairs_per_second": round(metrics["tokens_per_second"] * pairs / tokens, 1),
    }


# --- the teacher --------------------------------------------------------------------------------------------


def _cached_scores(
    job: Job, folder: Path, lists: Lists, order: Order, cache: Path
) -> dict[tuple[int, int], float]:
    """The teacher's score of every pair of the run. They lie beside the checkpoints, so that a job that resumes learns
    the same ones without asking again."""
    pairs = list(dict.fromkeys(order.pairs()))
    if not cache.is_file():
        scores = teacher_scores(folder, lists.texts, pairs, job)
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".tmp")
        with partial.open("wb") as file:
            np.save(file, scores)
        partial.replace(cache)
    found = np.load(cache)
    if len(found) != len(pairs):
        raise StepFailed(
            f"{cache} holds {len(found)} scores, not {len(pairs)}", "remove the job's partial folder"
        )
    return dict(zip(pairs, found.tolist(), strict=True))


def teacher_scores(folder: Path, texts: Sequence[str], pairs: Sequence[tuple[int, int]], job: Job) -> Array:
    """The scores of a reranker's folder, by its own tokenizer and within its own positions."""
    if not is_reranker(folder):
        raise StepFailed(f"the teacher {folder} is no reranker with one label", "give a stage of kind rerank")
    tokenizer = load_tokenizer(folder)
    with without_bars():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    exact(score_layer(model))
    positions = int(getattr(model.config, "max_position_embeddings", tokenizer.model_max_length))
    encoder = Encoder(tokenizer, texts, min(positions, int(tokenizer.model_max_length)))
    lengths = [encoder.length(*pair) for pair in pairs]
    ranked = sorted(range(len(pairs)), key=lambda at: (-lengths[at], at))
    scores = np.zeros(len(pairs), np.float32)
    at = 0
    while at < len(ranked):
        part = ranked[at : at + max(1, TEACHER_TOKENS // lengths[ranked[at]])]
        at += len(part)
        batch = _tensors(
            [encoder.pair(*pairs[number]) for number in part], int(model.config.pad_token_id or 0)
        )
        with torch.inference_mode(), autocast(model, job.precision):
            made = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits[:, 0]
        scores[part] = made.float().cpu().numpy()
    if not np.isfinite(scores).all():
        raise StepFailed(
            f"the teacher {folder} gives scores that are not finite", "its training has diverged"
        )
    return scores
