"""`embed`: trains an embedder with sentence-transformers on pairs, and leaves its folder.

In: tokenizer, data (a mix of pairs), model (a decoder's, masked LM's or embedder's folder; none with `lexical`), negatives
(mined), teacher (an embedder). Out: a sentence-transformers folder with pooling, prompts and Matryoshka dimensions.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from famc.errors import StepFailed
from famc.job import Job
from famc.work import lexical
from famc.work.arch import inherit, new_config, without_dropout
from famc.work.contrast import InfoNCE
from famc.work.encoder_folder import encoder_tokenizer, save_embedder
from famc.work.likelihood import without_bars
from famc.work.marks import marks_of
from famc.work.merge import Merger
from famc.work.optim import make_optimizer, schedule
from famc.work.pair_data import Columns, Ordered, Pairs, read_pairs
from famc.work.runner import CHECKPOINTS
from famc.work.scores import read_json, write_json
from famc.work.search import Embedder
from famc.work.training import Watch, arguments, row_order, run_trainer

log = logging.getLogger(__name__)
START = "start"  # the model before its first step, below the checkpoints
FACTS = "facts.json"  # in there: the metrics of what was done to it, for a run that resumes


def run(job: Job, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Train for the job's budget; returns the step's metrics."""
    torch.set_num_threads(job.threads)
    params = job.params
    arch, context = str(params["shape"]["arch"]), int(params["context"])
    tokenizer = encoder_tokenizer(inputs["tokenizer"], arch, words=params["text"] == "words")
    prompts = {name: text for name, text in (params["prompts"] or {}).items() if text}
    k = int((params["hard_negatives"] or {}).get("k", 0))
    pairs = read_pairs(
        inputs["data"],
        inputs.get("negatives"),
        tokenizer,
        context=context,
        k=k,
        prompts=prompts,
        cloze=int(params["cloze"]),
        seed=int(params["seed"]),
    )
    if len(pairs.rows) < 2:
        raise StepFailed(
            f"{job.name}: pairs in the mix: {len(pairs.rows)}; nothing to tell apart", "add data"
        )
    folder = out / CHECKPOINTS / START
    if not folder.is_dir():
        raw, made = folder.with_name("raw"), folder.with_name("made")
        for left in (raw, made):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        bare = start_model(job, inputs, tokenizer)
        found: dict[str, float] = {}
        if params["lexical"]:
            _save(job, bare, tokenizer, prompts, raw)
            model = _load(raw, "cpu")
            bare = model[0].auto_model
            wall, cpu = time.perf_counter(), time.process_time()
            found = lexical_start(job, model, pairs, tokenizer, k)
            found |= {
                "compute_seconds": time.perf_counter() - wall,
                "compute_cpu_seconds": time.process_time() - cpu,
            }
            shutil.rmtree(raw)
        _save(job, bare, tokenizer, prompts, made)
        write_json(made / FACTS, found)
        made.replace(folder)  # whole or not at all
    facts: dict[str, Any] = read_json(folder / FACTS)
    model = _load(folder, "cuda" if torch.cuda.is_available() else "cpu")
    metrics = fit(job, inputs, model, pairs, tokenizer, k, out)
    _save(job, model[0].auto_model, tokenizer, prompts, out)
    for name in ("compute_seconds", "compute_cpu_seconds"):
        metrics[name] = round(metrics[name] + facts.pop(name, 0.0), 3)
    facts |= {"pairs": len(pairs.rows), "texts": len(pairs.ids), "cut": round(pairs.cut, 4)}
    return {**metrics, **facts, "dimensions": int(params["shape"]["hidden"])}


def start_model(job: Job, inputs: Mapping[str, Path], tokenizer: Any) -> Any:
    """The transformer without a head: the parent's, or a new one."""
    params = job.params
    arch = str(params["shape"]["arch"])
    extra = {"add_pooling_layer": False} if arch == "bert" else {}
    torch.manual_seed(int(params["seed"]))
    if "model" not in inputs:
        return AutoModel.from_config(new_config(params["shape"], tokenizer), dtype=torch.float32, **extra)
    config = AutoConfig.from_pretrained(inputs["model"], local_files_only=True)
    inherit(config, params["shape"])
    config.use_cache = False
    without_dropout(config)
    if params["bidirectional"]:
        config.is_causal = False  # not an argument: that one is dropped
    with without_bars():
        return AutoModel.from_pretrained(
            inputs["model"], config=config, dtype=torch.float32, local_files_only=True, **extra
        )


def lexical_start(job: Job, model: Any, pairs: Pairs, tokenizer: Any, k: int) -> dict[str, float]:
    """Make the bag of words that a new BERT begins as."""
    params, bert = job.params, model[0].auto_model
    lexical.start(bert, pairs, int(params["seed"]))
    loss = _loss(job, model, pairs, None)
    return lexical.train(
        bert, pairs, loss.calculate_loss, params["lexical"], k=k, cls=marks_of(tokenizer).cls, dims=_dims(params),
        seed=int(params["seed"]), progress=lambda share: job.progress(share * 0.5, 1.0),
    )  # fmt: skip


def fit(
    job: Job, inputs: Mapping[str, Path], model: Any, pairs: Pairs, tokenizer: Any, k: int, out: Path
) -> dict[str, Any]:
    """The training loop: transformers' Trainer over sentence-transformers' model and loss."""
    params = job.params
    batch = min(int(params["global_batch"]), len(pairs.rows))
    steps = int(params["steps"] or max(1, math.ceil(float(params["epochs"]) * len(pairs.rows) / batch)))
    order = row_order(len(pairs.rows), steps * batch, int(params["seed"]))
    loss = _loss(job, model, pairs, _teacher(job, inputs, pairs))
    dims = _dims(params)
    whole = MatryoshkaLoss(model, loss, matryoshka_dims=dims) if len(dims) > 1 else loss
    optimizer = make_optimizer(model, params)
    settings = arguments(job, out, steps=steps, batch=batch)
    # the batch is one: its memory is the loss's affair, which embeds `micro_batch` texts at once
    settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
    data = Ordered(pairs, order, k)
    tokens = float(sum(len(pairs.ids[n]) for at in range(len(data)) for n in data[at]))
    watch = Watch(job, tokens / steps)
    merger = Merger(model, steps, params["merge"], out / CHECKPOINTS) if params["merge"] else None
    trainer = ContrastiveTrainer(
        model=model,
        args=TrainingArguments(**settings, train_sampling_strategy="sequential"),
        train_dataset=data,
        data_collator=Columns(pairs, int(tokenizer.pad_token_id), params["shape"]["arch"] == "bert"),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(params, steps))),
        callbacks=[watch, *([merger] if merger else [])],
        loss=whole,
    )
    metrics = run_trainer(trainer, out, watch, tokens=tokens)
    if merger:
        metrics["merged"] = merger.apply(model)
    return {**metrics, "steps": steps, "epochs": round(steps * batch / len(pairs.rows), 4)}


class ContrastiveTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trainer whose loss embeds the batch itself."""

    def __init__(self, *args: Any, loss: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.contrast = loss
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Similarities are taken in fp32: autocast is inside, where texts are embedded."""
        with torch.autocast(inputs["labels"].device.type, enabled=False):
            loss = self.contrast(inputs["columns"], inputs["labels"])
        return (loss, None) if return_outputs else loss


def _loss(job: Job, model: Any, pairs: Pairs, teacher: torch.Tensor | None) -> InfoNCE:
    params = job.params
    batch = min(int(params["global_batch"]), len(pairs.rows))
    loss = InfoNCE(
        model, temperature=float(params["temperature"]), micro_batch=min(job.micro_batch or batch, CHUNK),
        families=pairs.families, margin=params["false_negatives"], symmetric=bool(params["symmetric"]),
        bf16=job.precision == "bf16", teacher=teacher, alpha=float(params["alpha"]),
    )  # fmt: skip
    loss.cached = (job.micro_batch or batch) < batch
    return loss


CHUNK = 64  # texts that run at once even where all would fit: of like length, so that little is padding


def _dims(params: Mapping[str, Any]) -> list[int]:
    return sorted({*params["mrl"], int(params["shape"]["hidden"])}, reverse=True)


def _teacher(job: Job, inputs: Mapping[str, Path], pairs: Pairs) -> torch.Tensor | None:
    """The teacher's vectors of every text, once: [texts, its dimensions]."""
    if "teacher" not in inputs:
        return None
    teacher = Embedder(inputs["teacher"], None, job.threads, job.precision)
    asked = sorted({row.query for row in pairs.rows})
    read = sorted(set(range(len(pairs.texts))) - set(asked))
    made = torch.zeros(len(pairs.texts), teacher.dims[0])
    for numbers, embed in ((asked, teacher.queries), (read, teacher.passages)):
        if numbers:
            made[numbers] = torch.from_numpy(embed([pairs.texts[n] for n in numbers]))
    return made


def _save(job: Job, bare: Any, tokenizer: Any, prompts: Mapping[str, str], out: Path) -> None:
    params = job.params
    save_embedder(
        bare,
        tokenizer,
        out,
        pooling=params["pooling"],
        prompts=prompts,
        mrl=params["mrl"],
        context=int(params["context"]),
    )


def _load(folder: Path, device: str) -> Any:
    """BERT without its pooler, which nobody reads: drawn anew in each process, it would be saved with the model."""
    bert = read_json(folder / "config.json").get("model_type") == "bert"
    with without_bars():
        return SentenceTransformer(
            str(folder),
            local_files_only=True,
            device=device,
            model_kwargs={"add_pooling_layer": False} if bert else {},
        )
