"""A released embedder, reranker, masked LM or T5, loaded as its users load it: every tensor known, numbers finite, and
sentence-transformers gives what the model itself gives.

In: the folder, its task. Out: facts for the record; StepFailed for what would disappoint a user.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from famc.errors import StepFailed
from famc.steps.exports import CONVERTING, FILLING, RANKING, VECTORS, installed
from famc.work.encoder_session import Array, TorchEncoder, encode, longest, prompts_of
from famc.work.likelihood import load_tokenizer, without_bars
from famc.work.onnx_file import quiet

CLASSES = {
    VECTORS: AutoModel, RANKING: AutoModelForSequenceClassification, FILLING: AutoModelForMaskedLM,
    CONVERTING: AutoModelForSeq2SeqLM,
}  # fmt: skip
# a question and an answer
SAMPLE = ("Open a file for reading", "open(file, mode='r') returns a file object.")
NEAR = 1e-4


def try_encoder(folder: Path, task: str, threads: int) -> dict[str, Any]:
    """Load it with transformers, and with sentence-transformers where it is for that and installed."""
    torch.set_num_threads(threads)
    model = _loaded(folder, task)
    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template is not None:
        raise StepFailed(f"{folder.name} brings a chat template", "a bug of famc: these models have none")
    batch = {
        name: value
        for name, value in tokenizer(SAMPLE[0], return_tensors="pt").items()
        if name != "token_type_ids"
    }
    if task == CONVERTING:
        batch |= {"labels": batch["input_ids"]}
    with torch.inference_mode():
        found = model(**batch)
    values = found.last_hidden_state if task == VECTORS else found.logits
    if not bool(torch.isfinite(values).all()):
        raise StepFailed(
            f"{folder.name} answers with numbers that are not finite", "look at the losses of its training"
        )
    if task in (VECTORS, RANKING) and installed("sentence-transformers"):
        _same_in_sentence_transformers(folder, task, tokenizer, threads)
    return {"dtype": str(model.dtype).removeprefix("torch.")}


def _loaded(folder: Path, task: str) -> Any:
    try:
        with without_bars(), quiet():
            model, info = CLASSES[task].from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever it raises, a user of the folder would see it
        raise StepFailed(f"{folder.name} can't be loaded: {error}", "famc build makes it again") from error
    told = {key: sorted(map(str, names)) for key, names in info.items()}
    if task == VECTORS:  # a pooler that nobody reads is made anew; the head of the pretraining is left behind
        told["missing_keys"] = [name for name in told["missing_keys"] if not name.startswith("pooler.")]
        told["unexpected_keys"] = [
            n for n in told["unexpected_keys"] if not n.startswith(("cls.", "lm_head."))
        ]
    wrong: Mapping[str, list[str]] = {key: names for key, names in told.items() if names}
    if wrong:
        lines = "; ".join(f"{key}: {', '.join(names[:5])}" for key, names in wrong.items())
        raise StepFailed(
            f"{folder.name} does not load cleanly: {lines}", "config.json and weights do not belong together"
        )
    return model.eval()


def _same_in_sentence_transformers(folder: Path, task: str, tokenizer: Any, threads: int) -> None:
    """Its vectors, or its score, of the sample against those of the weights with the files' own prompts and pooling."""
    embeds = task == VECTORS
    try:
        with without_bars(), quiet():
            found = _vectors(folder) if embeds else _score(folder)
    except Exception as error:  # whatever it raises, a user of the folder would see it
        raise StepFailed(
            f"sentence-transformers can't use {folder.name}: {error}", "famc build makes it again"
        ) from error
    reference = TorchEncoder(folder, threads, "feature-extraction" if embeds else "text-ranking")
    limit = longest(tokenizer, reference.positions, reference.positions)
    if embeds:
        prompts = prompts_of(folder)
        texts = [
            prompts.get(side, "") + text for side, text in zip(("query", "document"), SAMPLE, strict=True)
        ]
        rows = [reference.outputs(encode(tokenizer, [text], max_length=limit)) for text in texts]
        wanted = np.concatenate(rows)
    else:
        wanted = reference.outputs(encode(tokenizer, [SAMPLE[0]], [SAMPLE[1]], max_length=limit))
    off = float(np.abs(found.reshape(wanted.shape) - wanted).max())
    if not off <= NEAR * max(1.0, float(np.abs(wanted).max())):
        what = "vectors" if embeds else "a score"
        raise StepFailed(
            f"sentence-transformers gives {what} of {folder.name} that differ by {off:.2g} from the model's own",
            "modules.json, 1_Pooling or the prompts do not belong to the weights",
        )


def _vectors(folder: Path) -> Array:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )
    pair = (model.encode_query([SAMPLE[0]]), model.encode_document([SAMPLE[1]]))
    return np.concatenate([np.asarray(vector) for vector in pair])


def _score(folder: Path) -> Array:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )
    return np.asarray(model.predict([SAMPLE], activation_fn=torch.nn.Identity()))
