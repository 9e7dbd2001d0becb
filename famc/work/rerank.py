"""`rerank`: a sequence classifier with one label learns which passage answers a query, from lists of them.

In: tokenizer, data (a mix of pairs), model (a decoder, an encoder, or an earlier reranker), negatives (mined; else the
data's own), teacher (a reranker) for objective distill. Out: the classifier's folder; with head yes_no also `yes_no/`,
the language model whose `yes` less `no` at the last token is the same score (Qwen3-Reranker's form).

A step's loss is the mean over its queries, so that micro-batches change nothing. Pairs of like length run together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from famc.cost.shape import ENCODERS
from famc.errors import StepFailed
from famc.job import Job
from famc.work.arch import inherit, without_dropout
from famc.work.encoder_folder import encoder_tokenizer, save_reranker
from famc.work.likelihood import autocast, load_tokenizer, without_bars
from famc.work.merge import Merger
from famc.work.optim import make_optimizer, schedule
from famc.work.rank_data import Array, Encoder, Lists, Tokens, buckets, padded, read_lists, template_of
from famc.work.rank_loss import LOSSES, Loss
from famc.work.runner import CHECKPOINTS
from famc.work.scores import read_json
from famc.work.text import limit_threads
from famc.work.training import Watch, arguments, attention, row_order, run_trainer

YES_NO = "yes_no"  # the folder of the language model
RESERVED, PLAIN = ("<|yes|>", "<|no|>"), ("yes", "no")
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
    tokenizer = encoder_tokenizer(inputs["tokenizer"], arch, words=params["text"] == "words")
    _set_pad(tokenizer)
    head = Head.of(job, inputs, arch)
    lists = read_lists(inputs["data"], inputs.get("negatives"))
    encoder = Encoder(tokenizer, lists.texts, context)
    order = Order.of(params, lists)
    teacher = None
    if params["objective"] == "distill":
        teacher = _cached_scores(job, inputs["teacher"], lists, order, out / CHECKPOINTS / "teacher.npy")
    model = start_model(job, inputs["model"], tokenizer, head)
    metrics = _train(job, model, int(tokenizer.pad_token_id), encoder, order, teacher, out)
    model.to("cpu")
    if head.tokens:
        save_yes_no(model, head, inputs["model"], out / YES_NO)
    save_reranker(model, tokenizer, out, context=context)
    return {**metrics, "queries": len(lists.queries), "queries_without_negatives": lists.without}


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


# --- models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """How a score is read: as `yes` less `no` where there are two such tokens, else by a classifier of its own."""

    tokens: tuple[int, int] | None = None
    reserved: bool = False  # the two stand in no text: their embeddings may change

    @classmethod
    def of(cls, job: Job, inputs: Mapping[str, Path], arch: str) -> Head:
        """The head that a stage asks for."""
        if job.params["head"] != "yes_no":
            return cls()
        if arch in ENCODERS:
            raise StepFailed(f"{job.name}: {arch} predicts no next token", "set head: classifier")
        tokenizer = load_tokenizer(inputs["tokenizer"])
        vocabulary = tokenizer.get_vocab()
        if all(token in vocabulary for token in RESERVED):
            return cls((vocabulary[RESERVED[0]], vocabulary[RESERVED[1]]), reserved=True)
        ids = [tokenizer.encode(word, add_special_tokens=False) for word in PLAIN]
        if any(len(one) != 1 for one in ids):
            raise StepFailed(
                f"{job.name}: head yes_no needs `yes` and `no` as one token each, in this tokenizer they are "
                f"{len(ids[0])} and {len(ids[1])}",
                f"set head: classifier, or use a tokenizer with {' and '.join(RESERVED)}",
            )
        return cls((ids[0][0], ids[1][0]))


def start_model(job: Job, parent: Path, tokenizer: Any, head: Head) -> Any:
    """The parent with one label. A reranker keeps its head; another gets that of the stage."""
    params = job.params
    config = AutoConfig.from_pretrained(parent, local_files_only=True)
    inherit(config, params["shape"])
    config.num_labels, config.pad_token_id, config.use_cache = 1, int(tokenizer.pad_token_id), False
    without_dropout(config)
    ranks = is_reranker(parent)
    torch.manual_seed(int(params["seed"]))  # what the parent lacks is drawn, such as BERT's pooler
    with without_bars():
        model = AutoModelForSequenceClassification.from_pretrained(
            parent, config=config, dtype=torch.float32, local_files_only=True
        )
    model.set_attn_implementation(attention(int(params["context"])))
    layer = score_layer(model)
    if not ranks:
        with torch.no_grad():
            if head.tokens:
                yes, no = head.tokens
                rows = output_rows(model, parent)
                layer.weight.copy_((rows[yes] - rows[no])[None])
            else:
                generator = torch.Generator().manual_seed(int(params["seed"]))
                layer.weight.normal_(0.0, float(config.initializer_range), generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
    _exact(layer)
    return model


def is_reranker(folder: Path) -> bool:
    """Whether a folder holds a sequence classifier with one label."""
    config = read_json(folder / "config.json")
    names = config.get("architectures") or [""]
    labels = config.get("num_labels") or len(config.get("id2label") or {0: "", 1: ""})
    return str(names[0]).endswith("ForSequenceClassification") and labels == 1


def score_layer(model: Any) -> torch.nn.Linear:
    """The layer that makes the score, by transformers' names for it."""
    layer: torch.nn.Linear = model.score if hasattr(model, "score") else model.classifier
    return layer


def _exact(layer: torch.nn.Linear) -> None:
    """Scores in fp32 under autocast too: bf16 has three figures, and losses are made of their differences."""
    if not isinstance(layer, torch.nn.Linear):  # a teacher's head of several layers stays as it is
        return

    def forward(states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return torch.nn.functional.linear(states.float(), layer.weight, layer.bias)

    layer.forward = forward  # type: ignore[assignment, method-assign]


def output_rows(model: Any, parent: Path) -> torch.Tensor:
    """The output embeddings of a parent: its language model's head, or what that is tied to."""
    if model.config.tie_word_embeddings:
        rows: torch.Tensor = model.get_input_embeddings().weight.detach()
        return rows
    for folder in (parent, parent / YES_NO):
        names = read_json(folder / "config.json").get("architectures") or [""] if folder.is_dir() else [""]
        if str(names[0]).endswith("ForCausalLM"):
            with without_bars():
                whole = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True
                )
            found: torch.Tensor = whole.get_output_embeddings().weight.detach().clone()
            return found
    raise StepFailed(
        f"head yes_no needs the language model's head, which {parent} has not (its embeddings are not tied)",
        "start from a language model, or set head: classifier",
    )


def save_yes_no(model: Any, head: Head, parent: Path, out: Path) -> None:
    """The language model whose `yes` less `no` is the score. Its two rows lie half the score's vector above and below
    their mean. Where head and embedding are one and the two tokens may stand in a text, the head becomes its own.
    """
    assert head.tokens is not None
    yes, no = head.tokens
    rows = output_rows(model, parent).cpu().clone()
    half = score_layer(model).weight.detach().cpu()[0] / 2
    mean = (rows[yes] + rows[no]) / 2
    rows[yes], rows[no] = mean + half, mean - half
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = bool(config.tie_word_embeddings and head.reserved)
    config.num_labels, config.use_cache, config.architectures = 2, True, None
    if hasattr(
        config, "sentence_transformers"
    ):  # of a parent that was a reranker: says how a classifier is read
        del config.sentence_transformers
    # as sentence-transformers' LogitScore names them
    config.true_token_id, config.false_token_id = yes, no
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    whole.base_model.load_state_dict(model.base_model.state_dict())
    with torch.no_grad():
        whole.get_output_embeddings().weight.copy_(rows)  # a tied embedding with it
    whole.save_pretrained(out, safe_serialization=True)
    (out / "generation_config.json").unlink(missing_ok=True)


def _set_pad(tokenizer: Any) -> None:
    """A token that ends a text can't pad it: the classifier reads the last one that is no padding."""
    around = template_of(tokenizer).ids
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in around:
        return
    for token in ("<|endoftext|>", tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens):
        number = tokenizer.get_vocab().get(token)
        if number is not None and number not in around:
            tokenizer.pad_token = token
            return
    raise StepFailed(
        "the tokenizer has no token to pad with but those at a text's ends", "use another tokenizer"
    )


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
    _exact(score_layer(model))
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
