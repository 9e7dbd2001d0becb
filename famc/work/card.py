"""`card`: the model card, from what was measured: nothing on it is typed by hand.

In: model, tokenizer, `eval.<suite>`, `parity.<label>`, `gate.<label>`. Out: README.md with YAML front matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from famc.job import Job
from famc.steps.exports import (
    CALIBRATED_FORMATS,
    CONVERTING,
    FILLING,
    GENAI_ORDER,
    JS_DTYPES,
    ONNX_FILES,
    RANKING,
    TEXT,
    VECTORS,
    gguf_name,
    task_in,
)
from famc.steps.others import HIGHER_IS_BETTER
from famc.work.encoder_session import prompts_of
from famc.work.onnx_encoder import read_pooling
from famc.work.scores import RESULTS, Score, read_json

TEMPLATES = Path(__file__).parent.parent / "report" / "templates"
SAMPLES = 5
CARD_FORMATS = ("safetensors", "onnx", "gguf", *CALIBRATED_FORMATS)
ONNX_ORDER = ("int4", "int8", "fp32", "fp16")  # the first is what the card shows how to run
LONGEST = 600  # characters of one message on the card

# what a metric says, for readers who do not know it
MEANING = {
    "bits_per_byte": "-log2 p of held-out text per UTF-8 byte",
    "perplexity": "exp of the loss per token; depends on the tokenizer",
    "answer_loss": "-ln p per token that the assistant says, held-out conversations",
    "token_accuracy": "share of those tokens that were the model's first choice",
    "chrf": "character n-gram overlap of greedy answers with the references",
    "exact_match": "greedy answers equal to the references",
    "ended": "greedy answers that ended by themselves",
    "preference_accuracy": "held-out pairs whose chosen answer is likelier per token",
    "preference_accuracy_sum": "the same with whole answers: favours short ones",
    "length_bias": "pairs of unequal length in which the model prefers the longer answer",
    "length_bias_data": "pairs of unequal length whose longer answer is the chosen one",
    "chosen_tokens": "mean length of the chosen answers, tokens",
    "rejected_tokens": "mean length of the rejected answers, tokens",
    "ndcg@10": "how early the first ten results hold what answers a held-out query: 1 is the best order",
    "mrr@10": "1 / the place of the first right passage, 0 beyond the tenth; mean over queries",
    "recall@10": "share of the right passages that are among the first ten",
    "recall@100": "share of the right passages that are among the first hundred",
    "bm25_ndcg@10": "the same of BM25, which compares words and has learnt nothing",
    "fused_ndcg@10": "the same of both rankings together, by the sum of their standardised scores",
    "over_bm25": "nDCG@10 over BM25's, as a share of it",
    "fused_over_bm25": "that of both together over BM25's",
    "fused_over_embedder": "that of both together over the embedder's",
    "mrl_kept": "share of nDCG@10 that is left with the shortest vectors it was trained for",
    "retriever_ndcg@10": "the same of the order that the reranker was given",
    "retriever_recall": "share of the right passages that the reranker was given at all",
    "over_retriever": "nDCG@10 over that of the order it was given, as a share of it",
    "masked_loss": "-ln p of hidden tokens of held-out text",
    "masked_accuracy": "share of them that were the model's first choice",
}
# what a model of a task is, and the sections of the card that are about it
WHAT = {
    TEXT: "decoder", VECTORS: "embedder", RANKING: "reranker", FILLING: "masked language model",
    CONVERTING: "encoder and decoder",
}  # fmt: skip
PIPELINES = {VECTORS: "sentence-similarity"}  # the hub's name where it is not the task's
LIBRARIES = {VECTORS: "sentence-transformers", RANKING: "sentence-transformers"}
TAGS = {
    VECTORS: ("sentence-transformers", "feature-extraction", "sentence-similarity"),
    RANKING: ("sentence-transformers", "cross-encoder", "reranker"),
}
CLIENTS = ("sentence-transformers", "cross-encoder")  # tags of what reads no GGUF
JS_POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last_token"}
# of a parity check, by task: heading and metric
TABLES: Mapping[str, tuple[tuple[str, str], ...]] = {
    TEXT: (
        ("KL, nats a token", "kl"), ("first choice equal", "top1_agreement"), ("perplexity ×", "perplexity_ratio"),
        ("greedy answers equal", "greedy_equal"), ("tokenizer", "tokenizer"), ("template", "template"),
    ),
    VECTORS: (
        ("cosine, mean", "cosine_mean"), ("worst", "cosine_min"), ("Kendall's tau of rankings", "kendall_tau"),
        ("nDCG@10", "ndcg"), ("of the model", "ndcg_source"), ("tokenizer", "tokenizer"),
    ),
    RANKING: (
        ("logits differ by at most", "max_logit_difference"), ("first choice equal", "top1_agreement"),
        ("Kendall's tau of rankings", "kendall_tau"), ("nDCG@10", "ndcg"), ("of the model", "ndcg_source"),
        ("tokenizer", "tokenizer"),
    ),
    FILLING: (
        ("KL, nats a hidden token", "kl"), ("first choice equal", "top1_agreement"),
        ("perplexity ×", "perplexity_ratio"), ("tokenizer", "tokenizer"),
    ),
    CONVERTING: (
        ("KL, nats a token", "kl"), ("first choice equal", "top1_agreement"), ("perplexity ×", "perplexity_ratio"),
        ("greedy answers equal", "greedy_equal"), ("tokenizer", "tokenizer"),
    ),
}  # fmt: skip
ERRORS = {"perplexity_ratio": "perplexity_ratio_error"}  # metrics that have one


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Write the card."""
    text = render(context(job, inputs))
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(text, encoding="utf-8")
    return {"bytes": len(text.encode())}


def render(values: Mapping[str, Any]) -> str:
    """The template, filled. A name that is missing raises."""
    environment = Environment(  # Markdown, not HTML: texts are quoted by `quoted`
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=False,  # noqa: S701
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "fenced": fenced,
        "quoted": quoted,
        "number": number,
        "count": count,
        "cell": cell,
        "quote": json.dumps,
    }
    return environment.get_template("card.md.jinja").render(values)


def context(job: Job, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Everything that the template may name."""
    params = job.params
    family: Mapping[str, Any] = params["family"]
    licenses = dict(params["licenses"])
    parities = _parities(job, inputs)
    exports: Mapping[str, Mapping[str, Any]] = params.get("exports") or {}
    made = {
        fmt: [q for e in exports.values() if e["format"] == fmt for q in [str(e["quant"])]]
        for fmt in CARD_FORMATS
    }
    onnx = sorted(made["onnx"], key=lambda quant: list(ONNX_ORDER).index(quant))
    name = str(params["repo"]).rpartition("/")[2]
    task = task_of(inputs)
    return {
        "name": name,
        "task": task,
        "what": WHAT.get(task, WHAT[TEXT]),
        "parity_heads": [head for head, _ in _columns(task, parities)],
        "parity_rows": [[p["label"], *_cells(task, p, parities)] for p in parities],
        "embeds": embedder_of(inputs["model"], params) if task == VECTORS else {},
        "family": family,
        "size": params["size"],
        "variant": params["variant"],
        "chat": task == TEXT and params["variant"] != "base",
        "base": params.get("base"),
        "lineage": list(params["lineage"]),
        "parameters": int(params["parameters"]),
        "shape": params["shape"],
        "licenses": licenses,
        "unknown": [name for name, value in licenses.items() if not value or value == "unknown"],
        "differing": sorted(
            {v for v in licenses.values() if v and v.lower() not in ("unknown", family["license"].lower())}
        ),
        "front": front_matter(family, params, made, task),
        "suites": _suites(inputs),
        "parities": parities,
        "gates": _gates(job, inputs),
        "samples": _samples(inputs)[:SAMPLES],
        # transformers.js has no class for a Qwen3 classifier; AutoModel runs any graph that needs no cache
        "js_class": "AutoModel"
        if params["shape"]["arch"] == "qwen3"
        else "AutoModelForSequenceClassification",
        "onnx": [{"file": ONNX_FILES[q], "dtype": JS_DTYPES[q]} for q in onnx],
        "genai": next((ONNX_FILES[q] for q in GENAI_ORDER if q in onnx), None),
        "ggufs": [gguf_name(name.removesuffix("-GGUF"), quant) for quant in made["gguf"]],
        "quantised": [e for e in exports.values() if e["format"] in CALIBRATED_FORMATS],
        "context": params["shape"]["context"],
    }


def task_of(inputs: Mapping[str, Path]) -> str:
    """What the model is for, by its folder."""
    model = inputs.get("model")
    if model is None or not (model / "config.json").is_file():
        return TEXT
    return task_in(read_json(model / "config.json"), (model / "modules.json").is_file())


def embedder_of(model: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """What users of an embedder must know: prompts, pooling, and to how many numbers its vectors may be cut."""
    pooling, prompts = read_pooling(model), prompts_of(model)
    said = model / "config_sentence_transformers.json"
    own = read_json(said) if said.is_file() else {}
    dimensions = own.get("matryoshka_dims") or params.get("mrl") or ()
    width = int(params["shape"]["hidden"])
    return {
        "prompts": prompts,
        "query": prompts.get("query", ""),
        "document": prompts.get("document", ""),
        "pooling": pooling.mode,
        "js_pooling": JS_POOLING[pooling.mode],
        "normalised": pooling.normalise,
        "width": width,
        "dimensions": sorted({int(d) for d in dimensions if int(d) < width}, reverse=True),
    }


def _columns(task: str, parities: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What the parity table shows: figures that were measured; of a decoder all, measured or not."""
    table = TABLES.get(task, TABLES[TEXT])
    return [(h, m) for h, m in table if task == TEXT or any(m in p for p in parities)]


def _cells(task: str, parity: Mapping[str, Any], parities: Sequence[Mapping[str, Any]]) -> list[str]:
    made = []
    for _, metric in _columns(task, parities):
        error = parity.get(ERRORS.get(metric, ""))
        made.append(number(parity.get(metric)) + ("" if error is None else f" ± {number(error)}"))
    return made


def front_matter(
    family: Mapping[str, Any], params: Mapping[str, Any], made: Mapping[str, list[str]], task: str = TEXT
) -> str:
    """The YAML that the hub reads."""
    known = family["license"] != "unknown"
    tags = [family["name"], params["variant"], params["shape"]["arch"], "famc"]
    values: dict[str, Any] = {
        "license": family["license"] if known else "other",
        **({} if known else {"license_name": "unknown"}),
        "language": list(family["languages"]),
        "library_name": "gguf" if made["gguf"] else LIBRARIES.get(task, "transformers"),
        "pipeline_tag": PIPELINES.get(task, task),
        "tags": tags
        + [t for t in TAGS.get(task, ()) if not (made["gguf"] and t in CLIENTS)]
        + (["onnx", "transformers.js"] if made["onnx"] else []),
    }
    if params.get("base"):  # the hub shows it below the model that it was made from
        values |= {
            "base_model": f"{family['org']}/{str(params['base']).rpartition('/')[2]}",
            "base_model_relation": "quantized",
        }
    # JSON's strings are YAML's, in quotes: `no` stays Norwegian
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def _suites(inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    found = []
    for role, folder in sorted(inputs.items()):
        if role.startswith("eval."):
            rows = []
            for name, entry in read_json(folder / RESULTS).items():
                base = name.partition(".")[0]
                higher = entry.get("higher_is_better", HIGHER_IS_BETTER.get(base))
                arrow = {True: "↑", False: "↓", None: ""}[higher]
                row = {
                    "name": name,
                    "score": Score.read(entry),
                    "arrow": arrow,
                    "meaning": MEANING.get(base, ""),
                }
                rows.append(row)
            found.append({"name": role.removeprefix("eval."), "rows": rows})
    return found


def _address(job: Job, role: str) -> str:
    """The step behind a role; the role itself in a job without a plan."""
    return job.inputs[role][0] if role in job.inputs else role


def _parities(job: Job, inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    found = {}
    for role, folder in sorted(inputs.items()):
        if role.startswith("parity."):
            # by address, not role: the role carries the gate's name, which may be one's own
            label = _address(job, role).rpartition("parity.")[2]
            found[label] = {"label": label, **read_json(folder / RESULTS)["parity"]}
    return [found[label] for label in sorted(found)]


def _gates(job: Job, inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    found = []
    for role, folder in sorted(inputs.items()):
        if role.startswith("gate."):
            verdict = read_json(folder / "verdict.json")
            found.append({"name": _address(job, role).rpartition("gate.")[2], **verdict})
    return found


def _samples(inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Answers to conversations: a variant may be scored on searches as well, to be compared with."""
    found = []
    for role, folder in sorted(inputs.items()):
        path = folder / "samples.jsonl"
        if role.startswith("eval.") and path.is_file():
            found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [sample for sample in found if "prompt" in sample]


# --- filters ----------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """Four significant digits; a dash for what is no number."""
    if isinstance(value, str):
        return value
    return "–" if value is None or value != value else f"{value:.4g}"


def count(value: int) -> str:
    """5,812,224."""
    return f"{value:,}"


def cell(text: str) -> str:
    """Inside a table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def quoted(text: str) -> str:
    """A block quote, cut to what one reads."""
    short = str(text) if len(str(text)) <= LONGEST else str(text)[:LONGEST].rstrip() + " …"
    return "\n".join(f"> {line}".rstrip() for line in short.splitlines() or [""])


def fenced(text: str) -> str:
    """A code block whose fence is longer than any inside: a model's words can't end it."""
    short = str(text) if len(str(text)) <= LONGEST else str(text)[:LONGEST].rstrip() + " …"
    ticks = 3
    while "`" * ticks in short:
        ticks += 1
    fence = "`" * ticks
    return f"{fence}text\n{short}\n{fence}"
