"""The models that rerank: what one begins as, how its score is read, and the language model that says the same.

In: a parent's folder, or none for a lexical start; the tokenizer. Out: a sequence classifier with one label, and for
head yes_no the folder of the language model whose `yes` less `no` is its score.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from famc.cost.shape import ENCODERS
from famc.errors import StepFailed
from famc.job import Job
from famc.work import matching
from famc.work.arch import inherit, new_config, without_dropout
from famc.work.likelihood import load_tokenizer, without_bars
from famc.work.marks import marks_of
from famc.work.rank_data import Encoder, Lists, template_of
from famc.work.scores import read_json, write_json
from famc.work.training import attention

START, FACTS = "start", "facts.json"  # a lexical start, below the checkpoints, and its metrics
YES_NO = "yes_no"  # the folder of the language model
RESERVED, PLAIN = ("<|yes|>", "<|no|>"), ("yes", "no")


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
    exact(layer)
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


def exact(layer: torch.nn.Linear) -> None:
    """Scores in fp32 under autocast too: bf16 has three figures, and losses are made of their differences."""
    if not isinstance(layer, torch.nn.Linear):  # a teacher's head of several layers stays as it is
        return

    def forward(states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return torch.nn.functional.linear(states.float(), layer.weight, layer.bias)

    layer.forward = forward  # type: ignore[assignment, method-assign]


def lexical_model(
    job: Job, lists: Lists, encoder: Encoder, tokenizer: Any, folder: Path
) -> tuple[Any, dict[str, Any]]:
    """A new BERT that begins by looking up the query's words, and what making it took. It lies beside the checkpoints,
    so that a job that resumes does not make it again."""
    params, seed = job.params, int(job.params["seed"])
    if not folder.is_dir():
        wall, cpu = time.perf_counter(), time.process_time()
        config = new_config(params["shape"], tokenizer)
        config.num_labels = 1
        torch.manual_seed(seed)  # of what the start leaves to chance: the feed-forwards, the pooler
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        matching.suits(model)
        hidden = int(config.hidden_size)
        matcher = matching.Matcher(
            hidden,
            matching.spelling(tokenizer, hidden - matching.first(hidden), seed),
            matching.rarity(encoder.ids, len(tokenizer)),
        )
        facts = matching.train(
            matcher, lists, matching.Words.of(encoder.ids, encoder.room), params["lexical"], seed=seed,
            progress=lambda share: job.progress(share * 0.5, 1.0),
        )  # fmt: skip
        matching.write(model, matcher, marks_of(tokenizer))
        facts |= {
            "compute_seconds": time.perf_counter() - wall,
            "compute_cpu_seconds": time.process_time() - cpu,
        }
        made = folder.with_name("made")
        shutil.rmtree(made, ignore_errors=True)  # of a run that was killed
        model.save_pretrained(made, safe_serialization=True)
        write_json(made / FACTS, facts)
        made.replace(folder)  # whole or not at all
    with without_bars():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    model.set_attn_implementation(attention(int(params["context"])))
    return model, read_json(folder / FACTS)


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


def set_pad(tokenizer: Any) -> None:
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
