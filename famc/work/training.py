"""The one training loop of all packed kinds, on transformers' Trainer.

In: a job, a model, rows. Out: a Hugging Face model folder. The order of rows is a function of seed and step
alone, so a killed job that resumes, or another micro-batch, reads the same rows. Checkpoints lie in
`<partial>/checkpoints`.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (  # one import: transformers loads lazily
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from famc.errors import StepFailed
from famc.job import Job
from famc.work.loss import Teacher, head_loss
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
    """A model with random weights: normal, sd 0.02, as GPT-2 and Llama; transformers' own initialisation."""
    moe = shape["moe"]
    values: dict[str, Any] = {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "max_position_embeddings": shape["context"],
        "rope_parameters": {"rope_type": "default", "rope_theta": shape["rope_theta"]},
        "tie_word_embeddings": shape["tie"],
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "use_cache": False,
    }
    if moe:
        values |= {
            "num_experts": moe["experts"],
            "num_experts_per_tok": moe["active"],
            "moe_intermediate_size": moe["ffn"],
            "norm_topk_prob": True,
        }
    config = AutoConfig.for_model(shape["arch"], **values)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def parent_model(folder: Path, shape: Mapping[str, Any]) -> PreTrainedModel:
    """The model that a step starts from, with the step's own positions and rotary base."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.use_cache = False
    if shape["context"] > config.max_position_embeddings:
        config.max_position_embeddings = shape["context"]
    config.rope_parameters = {
        **(config.rope_parameters or {"rope_type": "default"}),
        "rope_theta": shape["rope_theta"],
    }
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
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
                task_type="CAUSAL_LM",
            ),
        )
    return model


def attention(context: int) -> str:
    """eager on CPUs for short rows, where it trains a quarter faster than sdpa at 256 tokens a row (equal to
    float rounding; both isolate packed documents); sdpa elsewhere."""
    return "eager" if not torch.cuda.is_available() and context <= SHORT_ROWS else "sdpa"


def save_model(
    model: Any, tokenizer_folder: Path, out: Path, tokenizer: Any, max_new_tokens: int = 256
) -> None:
    """A complete Hugging Face folder: weights in fp32, config, generation config, tokenizer with its
    template.
    """
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.config.use_cache = True  # Trainer and training turn it off, and would write that into config.json
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    model.save_pretrained(out, safe_serialization=True)
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


# (batch, which of its tokens count) -> what the student follows there
Follow = Callable[[dict[str, torch.Tensor], torch.Tensor], Teacher]


class PackedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trainer on packed rows, whose labels are shifted already. Losses are sums over the counted tokens of
    the global batch, divided once: the same result whatever the micro-batch is.
    """

    def __init__(self, *args: Any, z_loss: float = 0.0, follow: Follow | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.z_loss, self.follow = z_loss, follow
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
        causal = self.accelerator.unwrap_model(model)
        if hasattr(causal, "get_base_model"):  # adapters sit inside the blocks
            causal = causal.get_base_model()
        labels = inputs["labels"].reshape(-1)
        kept = labels != IGNORE
        with (
            self.accelerator.autocast()
        ):  # the trainer wraps the whole model's forward in it, not the blocks'
            hidden = hidden_states(causal, inputs)
        whole = bool(kept.all())
        flat = hidden if whole else hidden[kept]
        loss = head_loss(
            flat.float(), causal.get_output_embeddings().weight, labels if whole else labels[kept], bf16=self.args.bf16,
            z_loss=self.z_loss, teacher=self.follow(inputs, kept) if self.follow else None,
        )  # fmt: skip
        loss = loss / (num_items_in_batch if num_items_in_batch is not None else kept.sum())
        return (loss, None) if return_outputs else loss


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
    params = job.params
    batch = max(1, int(params["batch_tokens"]) // int(params["context"]))
    steps = step_count(params, len(rows), batch)
    order = row_order(len(rows), steps * batch, int(params["seed"]))
    optimizer = make_optimizer(model, params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(params, steps))
    watch = Watch(job, float(params["batch_tokens"]))
    trainer = PackedTrainer(
        model=model,
        args=TrainingArguments(
            **arguments(job, out, steps=steps, batch=batch), train_sampling_strategy="sequential"
        ),
        train_dataset=RowSet(rows, order),
        data_collator=lambda items: {k: torch.stack([item[k] for item in items]) for k in items[0]},
        optimizers=(optimizer, scheduler),
        callbacks=[watch],
        z_loss=float(params.get("z_loss") or 0.0),
        follow=follow,
    )
    metrics = run_trainer(trainer, out, watch, tokens=steps * batch * int(params["context"]))
    return {**metrics, **rows.facts, "steps": steps, "epochs": round(steps * batch / len(rows), 4)}


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
