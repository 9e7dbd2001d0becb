"""`dpo`: trl's DPOTrainer against the frozen parent, whose log-probabilities are computed once.

In: tokenizer, a mix of preference pairs, the parent. Out: a model folder. Metrics: margins, accuracy, length
bias.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset, disable_caching, disable_progress_bars
from trl import DPOConfig, DPOTrainer

from famc.errors import StepFailed
from famc.job import Job
from famc.work.likelihood import Row, score_rows
from famc.work.optim import make_optimizer, schedule
from famc.work.rows import examples
from famc.work.training import (
    Watch,
    arguments,
    load_tokenizer,
    row_order,
    run_trainer,
    save_model,
    start_model,
)


class PairTrainer(DPOTrainer):  # type: ignore[misc]  # trl is untyped
    """DPOTrainer with a loss on the chosen answer: its mean negative log-probability a token, averaged over
    pairs (RPO, arXiv 2404.19733, eq. 2). trl's own averages over the tokens of a micro-batch, so that its
    size would change the result.
    """

    def __init__(self, *args: Any, sft_weight: float, **kwargs: Any) -> None:
        self.sft_weight = sft_weight
        super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The reference's log-probabilities of both answers, the head run on their tokens alone: trl's own takes
        the logits of every token, in fp32, and a third of a small job's time.
        """
        scored: dict[str, list[float]] = {}
        precision = "bf16" if self.args.bf16 else "fp32"
        for side in ("chosen", "rejected"):
            rows = []
            for item in dataset:
                before, answer = item["prompt_ids"], item[f"{side}_ids"]
                ids = [*before, *answer][: self.args.max_length]
                rows.append(Row(ids, [at >= len(before) for at in range(len(ids))]))
            scored[side] = [
                -float(score.nll.sum()) for score in score_rows(self.model.eval(), rows, precision)
            ]
        self.model.train()
        with_one = dataset.add_column("ref_chosen_logps", scored["chosen"])
        return with_one.add_column("ref_rejected_logps", scored["rejected"])

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.sft_weight:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        seen: list[torch.Tensor] = []
        hook = model.register_forward_hook(lambda module, given, output: seen.append(output.log_probs))
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            hook.remove()
        mask = inputs["completion_mask"][:, 1:].chunk(2)[0]
        chosen = seen[-1][:, -mask.shape[1] :].chunk(2)[0]
        penalty = -((chosen * mask).sum(1) / mask.sum(1).clamp(min=1)).mean() * self.sft_weight
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Order the pairs, train, save."""
    params = job.params
    tokenizer = load_tokenizer(inputs["tokenizer"])
    pairs = [{k: record[k] for k in ("prompt", "chosen", "rejected")} for record in examples(inputs["data"])]
    if not pairs:
        raise StepFailed(f"{job.name}: the mix holds no preference pairs")
    batch = int(params["global_batch"])
    steps = int(params["steps"] or max(1, -(-int(len(pairs) * params["epochs"]) // batch)))
    order = row_order(len(pairs), steps * batch, int(params["seed"]))
    disable_caching()
    disable_progress_bars()
    model = start_model(job, inputs, tokenizer)
    optimizer = make_optimizer(model, params)
    config = DPOConfig(
        **arguments(job, out, steps=steps, batch=batch) | {"gradient_checkpointing": job.recompute == "full"},
        loss_type=[params["loss"]],
        beta=params["beta"],
        max_length=params["context"],
        precompute_ref_log_probs=True,
        train_sampling_strategy="sequential",
        activation_offloading=False,
    )
    watch = Watch(job, float(batch * params["context"]))
    # the pairs of the whole run, in order: pass after pass, so that step n reads the same pairs after a kill
    data = Dataset.from_list([pairs[i] for i in order])
    trainer = PairTrainer(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(params, steps))),
        callbacks=[watch],
        sft_weight=float(params["sft_weight"]),
    )
    metrics = run_trainer(trainer, out, watch, tokens=float(steps * batch * 2 * params["context"]))
    save_model(trainer.model, inputs["tokenizer"], out, tokenizer)
    tail = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry][-5:]
    return {
        **metrics,
        "pairs": len(pairs),
        "steps": steps,
        "beta": params["beta"],
        **{
            name: round(sum(r[key] for r in tail) / len(tail), 5)
            for name, key in _REPORTED.items()
            if tail and key in tail[0]
        },
        **length_bias(pairs),
    }


_REPORTED = {
    "reward_margin": "rewards/margins",
    "reward_accuracy": "rewards/accuracies",
    "logp_chosen": "logps/chosen",
    "logp_rejected": "logps/rejected",
}


def length_bias(pairs: list[dict[str, Any]]) -> dict[str, float]:
    """How far length tells chosen from rejected: how often the longer is chosen, and mean characters."""

    def characters(side: str, pair: dict[str, Any]) -> int:
        return sum(len(m["content"]) for m in pair[side])

    chosen = [characters("chosen", p) for p in pairs]
    rejected = [characters("rejected", p) for p in pairs]
    longer = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(pairs)
    return {
        "longer_is_chosen": round(longer, 4),
        "characters_chosen": round(sum(chosen) / len(pairs), 1),
        "characters_rejected": round(sum(rejected) / len(pairs), 1),
    }
