"""The one training loop of all packed kinds, on transformers' Trainer.

In: a job, a model, rows. Out: a Hugging Face model folder. The order of rows is a function of seed and step
alone, so a killed job that resumes, or another micro-batch, reads the same rows. Checkpoints lie in
`<partial>/checkpoints`.
"""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (  # one import: transformers loads lazily
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from famc.cost.shape import ENCODER_DECODERS, ENCODERS
from famc.errors import StepFailed
from famc.job import Job
from famc.work.arch import auto_class, inherit, new_config
from famc.work.loss import Teacher, head_loss
from famc.work.marks import save_marked
from famc.work.optim import make_optimizer, schedule
from famc.work.rows import IGNORE, Rows
from famc.work.runner import CHECKPOINTS

log = logging.getLogger(__name__)
CHECKPOINT_SECONDS = 45.0  # at most so much work is lost to a kill, by the plan's estimate
SHORT_ROWS = 512
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


# --- models -------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> Any:
    """The family's tokenizer."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def new_model(shape: Mapping[str, Any], tokenizer: Any, seed: int) -> PreTrainedModel:
    """A model with random weights, by transformers' own initialisation: normal, sd 0.02, as GPT-2 and Llama;
    t5's by the width of each matrix.
    """
    config = new_config(shape, tokenizer)
    torch.manual_seed(seed)
    model: PreTrainedModel = auto_class(shape["arch"]).from_config(config, dtype=torch.float32)
    return model


def parent_model(folder: Path, shape: Mapping[str, Any]) -> PreTrainedModel:
    """The model that a step starts from, with the step's own positions and rotary base."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.use_cache = False
    inherit(config, shape)
    model: PreTrainedModel = auto_class(shape["arch"]).from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True
    )
    return model


def start_model(job: Job, inputs: Mapping[str, Path], tokenizer: Any) -> PreTrainedModel:
    """The parent's model if there is one, else a new one; with adapters if the step says so."""
    torch.set_num_threads(job.threads)
    shape = job.params["shape"]
    model = (
        parent_model(inputs["model"], shape)
        if "model" in inputs
        else new_model(shape, tokenizer, int(job.params["seed"]))
    )
    model.set_attn_implementation(attention(int(job.params["context"])))
    if job.params.get("lora"):
        from peft import LoraConfig, get_peft_model

        lora = job.params["lora"]
        targets = lora["targets"][0] if list(lora["targets"]) == ["all-linear"] else list(lora["targets"])
        torch.manual_seed(int(job.params["seed"]))
        model = get_peft_model(
            model,
            LoraConfig(
                r=lora["r"],
                lora_alpha=lora["alpha"],
                lora_dropout=lora["dropout"],
                target_modules=targets,
                task_type=ADAPTED.get(shape["arch"], "CAUSAL_LM"),
            ),
        )
    return model


ADAPTED = {"t5": "SEQ_2_SEQ_LM", "bert": None, "modernbert": None}  # peft's word for what a model does


def attention(context: int) -> str:
    """eager on CPUs for short rows, where it trains a quarter faster than sdpa at 256 tokens a row (equal to
    float rounding; both isolate packed documents); sdpa elsewhere."""
    return "eager" if not torch.cuda.is_available() and context <= SHORT_ROWS else "sdpa"


def save_model(
    model: Any, tokenizer_folder: Path, out: Path, tokenizer: Any, max_new_tokens: int = 256
) -> None:
    """A complete Hugging Face folder: weights in fp32, config, generation config, tokenizer with its
    template. An encoder's tokenizer has marks around a text instead, t5's an end.
    """
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    arch = model.config.model_type
    if arch in ENCODERS:
        if hasattr(model.config, "use_cache"):
            del model.config.use_cache  # Trainer's: an encoder has no cache
    else:  # Trainer and training turn it off, and would write that into config.json
        model.config.use_cache = True
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        )
    model.save_pretrained(out, safe_serialization=True)
    if arch in (*ENCODERS, *ENCODER_DECODERS):
        marked = copy.deepcopy(tokenizer)
        positions = "n_positions" if arch in ENCODER_DECODERS else "max_position_embeddings"
        marked.model_max_length = getattr(model.config, positions, None) or tokenizer.model_max_length
        save_marked(marked, arch, out)
        return
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, out / name)


# --- budget and order ---------------------------------------------------------------------------------------


def row_order(rows: int, wanted: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`wanted` row numbers: pass after pass over all rows, each pass shuffled by seed and its own number."""
    passes = [
        np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
        for epoch in range(-(-wanted // rows))
    ]
    return np.concatenate(passes)[:wanted]


def step_count(params: Mapping[str, Any], rows: int, batch_rows: int) -> int:
    """Optimizer steps of the budget: steps, else tokens, else epochs over the rows there are."""
    if params["steps"]:
        return int(params["steps"])
    if params["tokens"]:
        return max(1, math.ceil(int(params["tokens"]) / (batch_rows * int(params["context"]))))
    return max(1, math.ceil(float(params["epochs"] or 1.0) * rows / batch_rows))


# --- the loop -----------------------------------------------------------------------------------------------

Order = np.ndarray[Any, np.dtype[np.int64]]
# (examples' numbers in training order, global batch) -> (data set, how many tokens it has)
Ordered = Callable[[Order, int], tuple[torch.utils.data.Dataset[Any], float]]


class RowSet(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows in training order."""

    def __init__(self, rows: Rows, order: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.order[index]
        return {
            "input_ids": torch.from_numpy(self.rows.input_ids[row]),
            "labels": torch.from_numpy(self.rows.labels[row]),
            "position_ids": torch.from_numpy(self.rows.position_ids[row]),
        }


Batch = dict[str, torch.Tensor]
# (batch, which of its tokens count) -> what the student follows there
Follow = Callable[[Batch, torch.Tensor], Teacher]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a loss is made of: hidden states before the output head and their labels, all of which count; the head's
    weight; and, flat, which tokens of the batch's `labels` these are.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    kept: torch.Tensor


Score = Callable[[Any, Batch], Scored]
Collate = Callable[[list[Batch]], Batch]


class PackedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trainer on rows whose labels are shifted already, or need no shift. Losses are sums over the counted tokens of
    the global batch, divided once: the same result whatever the micro-batch is. `score` says what counts.
    """

    def __init__(
        self, *args: Any, score: Score, z_loss: float = 0.0, follow: Follow | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.score, self.z_loss, self.follow = score, z_loss, follow
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Nobody needs the logits: the loss is taken from the hidden states, in half the head's time on CPUs."""
        bare = self.accelerator.unwrap_model(model)
        if hasattr(bare, "get_base_model"):  # adapters sit inside the blocks
            bare = bare.get_base_model()
        with (
            self.accelerator.autocast()
        ):  # the trainer wraps the whole model's forward in it, not the blocks'
            found = self.score(bare, inputs)
        loss = head_loss(
            found.hidden.float(), found.weight, found.labels, bf16=self.args.bf16, z_loss=self.z_loss,
            teacher=self.follow(inputs, found.kept) if self.follow else None,
        )  # fmt: skip
        loss = loss / (num_items_in_batch if num_items_in_batch is not None else found.kept.sum())
        return (loss, None) if return_outputs else loss


def score_causal(causal: Any, inputs: Batch) -> Scored:
    """A decoder's: every token whose label counts."""
    labels = inputs["labels"].reshape(-1)
    kept = labels != IGNORE
    hidden = hidden_states(causal, inputs)
    weight = causal.get_output_embeddings().weight
    if bool(kept.all()):
        return Scored(hidden, weight, labels, kept)
    return Scored(hidden[kept], weight, labels[kept], kept)


def hidden_states(causal: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[tokens, hidden] before the output head."""
    states = causal.base_model(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
    )[0]
    flat: torch.Tensor = states.reshape(-1, states.shape[-1])
    return flat


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Every logged step to the job's metrics file; a loss that is no number stops the step where it
    happened.
    """

    def __init__(self, job: Job, tokens_a_step: float) -> None:
        self.job, self.tokens = job, tokens_a_step
        self.first: tuple[float, int] | None = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        now, step = time.time(), state.global_step
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs.get("grad_norm", 0.0)):
            raise StepFailed(
                f"{self.job.name}: the loss is {logs['loss']}, the gradient norm {logs.get('grad_norm')} "
                f"at step {step} of {state.max_steps}",
                "lower the learning rate, or look at the rows of that step",
            )
        if self.first is None:
            self.first = (now, step)
        speed = self.tokens * (step - self.first[1]) / (now - self.first[0]) if now > self.first[0] else 0.0
        self.job.progress(
            step,
            state.max_steps,
            loss=logs["loss"],
            lr=logs["learning_rate"],
            grad_norm=logs.get("grad_norm", 0.0),
            tokens_per_second=round(speed, 1),
        )


def arguments(job: Job, out: Path, *, steps: int, batch: int) -> dict[str, Any]:
    """TrainingArguments that all trained kinds share. `batch`: sequences of the global batch."""
    micro = job.micro_batch or batch
    if batch % micro:
        micro = math.gcd(batch, micro)
    every = int(
        job.runtime.get("checkpoint_steps")
        or max(20, round(steps * CHECKPOINT_SECONDS / max(job.seconds, 1.0)))
    )
    return {
        "output_dir": str(out / CHECKPOINTS),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "max_grad_norm": job.params["clip"],
        "learning_rate": job.params["lr.peak"],
        "bf16": job.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": job.recompute == "full",
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "logging_steps": max(1, min(10, steps // 50)),
        "logging_nan_inf_filter": False,
        "seed": int(job.params["seed"]),
        "data_seed": int(job.params["seed"]),
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def last_checkpoint(out: Path) -> str | None:
    """The newest complete checkpoint: its trainer_state.json is the last file that Trainer writes. Others
    are removed.
    """
    folder = out / CHECKPOINTS
    found = (
        sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        if folder.is_dir()
        else []
    )
    complete = [p for p in found if (p / "trainer_state.json").is_file() and (p / "optimizer.pt").is_file()]
    for path in found:
        if path not in complete:
            shutil.rmtree(path)
    return str(complete[-1]) if complete else None


def train_rows(
    job: Job, model: Any, rows: Rows, out: Path, *, follow: Follow | None = None
) -> dict[str, Any]:
    """Train a model on rows for the job's budget; returns the step's metrics."""

    def ordered(order: Order, batch: int) -> tuple[RowSet, float]:
        return RowSet(rows, order), float(len(order) * int(job.params["context"]))

    metrics = train_examples(job, model, len(rows), ordered, out, follow=follow)
    return {**metrics, **rows.facts}


def stacked(items: list[Batch]) -> Batch:
    """Rows of equal length as a batch."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def train_examples(
    job: Job,
    model: Any,
    count: int,
    ordered: Ordered,
    out: Path,
    *,
    collate: Collate = stacked,
    score: Score = score_causal,
    follow: Follow | None = None,
) -> dict[str, Any]:
    """Train on `count` examples for the job's budget. `ordered` makes the data set from their numbers in training
    order and the global batch; with it how many tokens that is.
    """
    params = job.params
    batch = max(1, int(params["batch_tokens"]) // int(params["context"]))
    steps = step_count(params, count, batch)
    data, tokens = ordered(row_order(count, steps * batch, int(params["seed"])), batch)
    optimizer = make_optimizer(model, params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(params, steps))
    watch = Watch(job, tokens / steps)
    trainer = PackedTrainer(
        model=model,
        args=TrainingArguments(
            **arguments(job, out, steps=steps, batch=batch), train_sampling_strategy="sequential"
        ),
        train_dataset=data,
        data_collator=collate,
        optimizers=(optimizer, scheduler),
        callbacks=[watch],
        score=score,
        z_loss=float(params.get("z_loss") or 0.0),
        follow=follow,
    )
    metrics = run_trainer(trainer, out, watch, tokens=tokens)
    return {**metrics, "steps": steps, "epochs": round(steps * batch / count, 4)}


def run_trainer(trainer: Trainer, out: Path, watch: Watch, *, tokens: float) -> dict[str, Any]:
    """trainer.train(), resumed where it was killed; how long the loop took, and the loss at both ends."""
    resume = last_checkpoint(out)
    if resume:
        log.info("resumes at %s", Path(resume).name)
    wall, cpu = time.perf_counter(), time.process_time()
    before = trainer.state.global_step if resume is None else int(resume.rpartition("-")[2])
    trainer.train(resume_from_checkpoint=resume)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    share = 1.0 - before / max(1, trainer.state.max_steps)
    for (
        name,
        parameter,
    ) in trainer.model.named_parameters():  # the last steps may stand after the last logged one
        if not torch.isfinite(parameter).all():
            raise StepFailed(
                f"{watch.job.name}: {name} is not finite after step {trainer.state.global_step}",
                "lower the learning rate",
            )
    # the trainer's own history outlives a kill: both ends of the whole run, not of what ran since
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens": tokens,
        "tokens_per_second": round(tokens * share / wall, 1) if wall else 0.0,
        "compute_seconds": round(wall, 3),
        "compute_cpu_seconds": round(cpu, 3),
        "first_loss": round(losses[0], 6) if losses else None,
        "last_loss": round(sum(losses[-5:]) / len(losses[-5:]), 6) if losses else None,
        "resumed_at": before,
    }
