"""Every field of the spec changes something: one row a field, its change, and where the change must show.

The table is compared with the schema: a field without a row fails, and so does a row without its field.
Effects:
`key GLOB`  what bears identity differs at steps that the glob matches, and at no others; keys of what follows
            change, all other keys stay
`nodes`     other steps
`plan`      no key, but the plan: prices, layouts, backends, order
`job`       no key and no number of the plan, but a step's job file
`error`     the spec is refused; `fits`: the spec is refused without the change
`same`      nothing: another name of the same thing
`launcher`  nothing yet: what launchers will write into their scripts
`elsewhere` a test of its own
"""

from __future__ import annotations

import fnmatch
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import famc
from famc.backend import load_accelerator
from famc.errors import FamcError, SpecError
from famc.graph import Graph, resolve
from famc.plan import keys, plan
from famc.spec.family import Family, StageSpec
from famc.spec.load import drafts
from famc.steps import KINDS, STAGES

# --- the specs that rows change -----------------------------------------------------------------------------

SMALL = """\
famc: 1
family: {name: pocket, org: me, license: mit, seed: 7, languages: [en]}
arch: {type: qwen3, head_dim: 32, vocab_pad: 2048, context: 128}
sizes:
  s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}
  m: {layers: 4, hidden: 128, ffn: 256, heads: 4, kv_heads: 2, tie: true}
groups: {small: [s], both: [s, m]}
tokenizer: {vocab: 2000, train_on: {mix: text, bytes: 2MB}}
data:
  clean: {tidy: [normalize, {length: {min: 20}}, {decontaminate: {ngram: 13}}]}
  sources:
    code:  {pystdlib: source, clean: tidy, heldout: {by: group, fraction: 0.2}}
    docs:  {path: docs.jsonl, clean: text, text_field: body}
    qa:    {pystdlib: questions}
    prefs: {pystdlib: preferences}
  mixes: {text: {tokens: 200k, weights: {code: 3, docs: 1}, max_epochs: 40}}
stages:
  pretrain: {kind: pretrain, data: text, batch_tokens: 1024, lr: {peak: 1e-3, schedule: wsd}}
  kd:    {kind: distill, data: text, teacher: pretrain@m, by: {small: {alpha: 0.7}}}
  sft:   {kind: sft, from: base, data: qa, epochs: 2}
  dpo:   {kind: dpo, from: sft, data: prefs, beta: 0.1}
  grown: {kind: adopt, path: ckpt, license: mit}
variants:
  base: {stage: {m: pretrain, s: kd}, sizes: all, eval: lm}
  instruct: {stage: dpo, sizes: [s, m], eval: chat}
  found: {stage: grown, sizes: [m]}
evals:
  lm: [{task: bits_per_byte, data: docs, n: 20}]
  chat: [{task: answers, data: qa, n: 10}, {task: preference, data: prefs}]
  harness: [{task: lm_eval, tasks: [hellaswag]}]
exports:
  - {variants: [base], format: safetensors, quant: bf16}
  - {variants: [instruct], sizes: both, format: onnx, quant: [fp32, int4], target: [cpu, phone]}
gates:
  - {match: "*/instruct", beats: base, suite: chat, metrics: [answer_loss]}
  - {match: "*/*/export.onnx-*", parity: {tokenizer: exact, kl: 0.05}}
  - {match: base, require: {bits_per_byte: {max: 8.0}}}
  - {match: base, across: sizes, monotonic: lm}
targets: {phone: {memory: 1GB, context: 128}}
backends:
  laptop: {cpu: 2, ram: 8GB}
  box: {gpu: h100-80g, per_node: 8, usd_per_gpu_hour: 2.5}
place: {default: laptop, "m/pretrain": box}
release: {to: dir, path: release, repo: "{org}/{family}-{size}{-variant}", card: auto}
profiles: {quick: {stages.sft.epochs: 1}}
"""
WIDE = """\
famc: 1
family: {name: wide}
arch: {type: qwen3, head_dim: 64, vocab_pad: 32000, context: 2048}
sizes:
  d: {layers: 4, hidden: 256, heads: 4, kv_heads: 2, ffn: 512, tie: true}
  e: {layers: 4, hidden: 256, heads: 4, kv_heads: 2, moe: {experts: 8, active: 2, ffn: 256}}
  p: {preset: qwen3-0.6b}
  q: {params: 100M}
tokenizer: {vocab: 31000, train_on: {mix: web, bytes: 1GB}}
data:
  sources:
    web:   {hf: acme/web, revision: abc1234, clean: text}
    chat:  {hf: acme/chat, revision: abc1234, format: messages}
    tasks: {hf: acme/tasks, revision: abc1234, format: prompts}
    pairs: {synth: retrieval_pairs, from: web, by: base@d, n: 1M, keep: {cosine: 0.7}}
    other: {hf: acme/other, revision: abc1234}
    img:   {hf: acme/img, revision: abc1234, format: image_text}
    snd:   {hf: acme/snd, revision: abc1234, format: audio_text, rate: 16000}
  mixes: {long: {tokens: 1B, weights: {web: 1}, lengths: {4k-16k: 1}}}
stages:
  pretrain: {kind: pretrain, data: long}
  plain: {kind: pretrain, data: long}
  sft:   {kind: sft, from: pretrain, data: chat}
  rl:    {kind: grpo, from: pretrain, data: tasks, rewards: [rules]}
  emb:   {kind: embed, from: pretrain, data: pairs}
  rank:  {kind: rerank, from: pretrain, data: pairs}
  vl:    {kind: vlm, from: pretrain, data: img}
  au:    {kind: audio, from: pretrain, data: snd}
variants:
  base: {stage: pretrain, sizes: all}
  chat: {stage: sft, sizes: [d]}
  math: {stage: rl, sizes: [d]}
  embedding: {stage: emb, sizes: [d]}
  reranker: {stage: rank, sizes: [d]}
  vl: {stage: vl, sizes: [d]}
  audio: {stage: au, sizes: [d]}
exports:
  - {variants: [chat], format: gptq, bits: 4, calibrate: {data: chat, n: 64}}
backends: {pool: {gpu: h100-80g, per_node: 8, nodes: 4, scheduler: slurm, partition: gpu}}
release: {to: hf, dry_run: true}
"""
FINDERS = """\
famc: 1
family: {name: finder, seed: 7}
arch: {type: qwen3, head_dim: 32, vocab_pad: 2048, context: 128}
sizes:
  d: {arch: bert, layers: 2, hidden: 64, ffn: 128, heads: 2}
  q: {layers: 2, hidden: 64, ffn: 128, heads: 2, tie: true}
tokenizer: {vocab: 2000, train_on: {mix: code, bytes: 1MB}}
data:
  sources:
    code:  {pystdlib: source}
    pairs: {pystdlib: sentences}
    names: {pystdlib: names}
stages:
  pretrain: {kind: pretrain, data: code, batch_tokens: 1024}
  emb:   {kind: embed, from: pretrain, data: pairs}
  coach: {kind: embed, from: pretrain, data: names}
  rank:  {kind: rerank, from: pretrain, data: pairs}
  judge: {kind: rerank, from: pretrain, data: names, hard_negatives: null}
variants:
  embedding: {stage: emb, eval: find}
  reranker: {stage: rank, eval: order}
  embedding2: {stage: coach}
  reranker2: {stage: judge}
evals:
  find: [{task: retrieval, data: names, n: 20}]
  order: [{task: rerank, data: names, n: 20, top: 10}]
exports:
  - {variants: [embedding, reranker], format: onnx, quant: [fp32, int4]}
gates:
  - {match: "*/*/export.onnx-*", parity: {ndcg: 0.05}}
backends: {laptop: {cpu: 2, ram: 8GB}}
"""
BASES = {"small": SMALL, "wide": WIDE, "finders": FINDERS}


@dataclass(frozen=True)
class Row:
    """A field's change: `sets` laid over a base (with `given` laid over both sides), and the effect."""

    sets: tuple[str, ...]
    effect: str
    base: str = "small"
    given: tuple[str, ...] = ()


def row(
    sets: str | tuple[str, ...], effect: str, base: str = "small", given: str | tuple[str, ...] = ()
) -> Row:
    def listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
        return (value,) if isinstance(value, str) else value

    return Row(listed(sets), effect, base, listed(given))


def w(sets: str | tuple[str, ...], effect: str, given: str | tuple[str, ...] = ()) -> Row:
    return row(sets, effect, "wide", given)


def f(sets: str | tuple[str, ...], effect: str, given: str | tuple[str, ...] = ()) -> Row:
    return row(sets, effect, "finders", given)


# --- the table ----------------------------------------------------------------------------------------------

CARDS = "key */card"
MODELS = "key */pretrain */kd */sft */dpo */grown */card"
ROWS: dict[str, Row] = {
    "famc": row("famc=2", "error"),
    "family.name": row("family.name=purse", "key */release */card"),
    "family.org": row("family.org=you", "key */release */card"),
    "family.license": row("family.license=apache-2.0", "key */release */card"),
    "family.seed": row("family.seed=8", "key data/* mix/* tokenizer */pretrain */kd */sft */dpo */card"),
    "family.languages": row("family.languages=[en, de]", CARDS),
    # --- architecture and sizes
    "arch.type": row("arch.type=llama", MODELS),
    "arch.head_dim": row("arch.head_dim=16", MODELS + " */export.onnx-int4"),  # blocks must divide its heads
    "arch.vocab_pad": row(("arch.vocab_pad=2112", "stages.grown.path=ckpt2"), f"{MODELS} tokenizer"),
    "arch.context": row("arch.context=256", f"{MODELS} */eval.* */parity.* */release"),
    "arch.rope_theta": row("arch.rope_theta=500000", MODELS),
    "sizes.*.arch": f("sizes.d.arch=modernbert", "key d/*"),
    "sizes.*.layers": row("sizes.s.layers=3", "key s/*"),
    "sizes.*.hidden": row("sizes.s.hidden=128", "key s/*"),
    "sizes.*.ffn": row("sizes.s.ffn=192", "key s/*"),
    "sizes.*.heads": row("sizes.s.heads=4", "key s/*"),
    "sizes.*.kv_heads": row("sizes.s.kv_heads=2", "key s/*"),
    "sizes.*.tie": row("sizes.s.tie=false", "key s/*"),
    "sizes.*.moe.experts": w("sizes.e.moe.experts=16", "key e/*"),
    "sizes.*.moe.active": w("sizes.e.moe.active=4", "key e/*"),
    "sizes.*.moe.ffn": w("sizes.e.moe.ffn=512", "key e/*"),
    "sizes.*.preset": w("sizes.p.preset=qwen3-1.7b", "key p/*"),
    "sizes.*.params": w("sizes.q.params=200M", "key q/*"),
    "groups": row("groups.both=[s]", "nodes"),
    # --- tokenizer
    "tokenizer.kind": row("tokenizer.kind=unigram", "error"),
    "tokenizer.vocab": row("tokenizer.vocab=1500", "key tokenizer"),
    "tokenizer.train_on.mix": row("tokenizer.train_on.mix=docs", "key tokenizer */found/card"),
    "tokenizer.train_on.bytes": row("tokenizer.train_on.bytes=1MB", "key tokenizer"),
    "tokenizer.chat_template": row("tokenizer.chat_template=chat.jinja", "key tokenizer"),
    "tokenizer.adopt": row("tokenizer={adopt: ckpt, chat_template: chat.jinja}", "key tokenizer */found/card",
                           given="tokenizer.chat_template=chat.jinja"),
    # --- data
    "data.clean": row("data.clean.tidy=[normalize, {length: {min: 30}}, {decontaminate: {ngram: 13}}]", "key data/code"),
    "data.sources.*.path": row("data.sources.docs.path=other.jsonl", "key data/docs"),
    "data.sources.*.hf": w("data.sources.web.hf=acme/more", "key data/web"),
    "data.sources.*.revision": w("data.sources.web.revision=fff9999", "key data/web"),
    "data.sources.*.split": w("data.sources.web.split=test", "key data/web"),
    "data.sources.*.pystdlib": row("data.sources.code.pystdlib=docs", "key data/code"),
    "data.sources.*.installed": w("data.sources.pairs.installed=[networkx, scikit-learn]", "key data/pairs",
                                  given="data.sources.pairs={installed: [networkx]}"),
    "data.sources.*.synth": w("data.sources.pairs.synth=arithmetic", "error"),  # of another format than its readers'
    "data.sources.*.n": row("data.sources.qa.n=50", "key data/qa"),
    "data.sources.*.from": w("data.sources.pairs.from=other", "nodes"),
    "data.sources.*.by": w("data.sources.pairs.by=base@q", "key data/pairs"),
    "data.sources.*.keep": w("data.sources.pairs.keep={cosine: 0.5}", "key data/pairs"),
    "data.sources.*.format": row("data.sources.docs.format=messages", "error"),
    "data.sources.*.text_field": row("data.sources.docs.text_field=text", "key data/docs"),
    "data.sources.*.group_field": row("data.sources.docs.group_field=book", "key data/docs"),
    "data.sources.*.rate": w("data.sources.snd.rate=8000", "key data/snd"),
    "data.sources.*.clean": row("data.sources.docs.clean=none", "key data/docs"),
    "data.sources.*.heldout.by": row("data.sources.docs.heldout.by=document", "key data/docs"),
    "data.sources.*.heldout.fraction": row("data.sources.docs.heldout.fraction=0.3", "key data/docs"),
    "data.sources.*.license": row("data.sources.qa.license=cc0-1.0", CARDS),
    "data.mixes.*.tokens": row("data.mixes.text.tokens=100k", "key mix/text */kd"),
    "data.mixes.*.weights": row("data.mixes.text.weights={code: 1, docs: 1}", "key mix/text tokenizer"),
    "data.mixes.*.max_epochs": row("data.mixes.text.max_epochs=50", "key mix/text"),
    "data.mixes.*.lengths": w("data.mixes.long.lengths={1k-2k: 1}", "key mix/long"),
    # --- what is published
    "variants.*.stage": row("variants.instruct.stage=sft", "nodes"),
    "variants.*.sizes": row("variants.instruct.sizes=[s]", "nodes"),
    "variants.*.eval": row("variants.found.eval=lm", "nodes"),
    "evals.*.task": row("evals.lm.0={task: lm_eval, tasks: [arc]}", "key */eval.lm mix/* */parity.*"),
    "evals.*.data": row("evals.lm.0.data=code", "key */eval.lm mix/* */parity.*"),
    "evals.*.n": row("evals.lm.0.n=30", "key */eval.lm"),
    "evals.*.max_new_tokens": row("evals.chat.0.max_new_tokens=9", "key */eval.chat"),
    "evals.*.top": f("evals.order.0.top=20", "key */eval.order"),
    "evals.*.tasks": row("evals.harness.0.tasks=[arc]", "key */eval.harness", given="variants.found.eval=harness"),
    "exports.*.variants": row("exports.0.variants=[base, instruct]", "nodes"),
    "exports.*.sizes": row("exports.0.sizes=[s]", "nodes"),
    "exports.*.format": row("exports.0={variants: [base], format: onnx}", "nodes"),
    "exports.*.quant": row("exports.0.quant=fp32", "nodes"),
    "exports.*.bits": w("exports.0.bits=8", "nodes"),
    "exports.*.block_size": row("exports.1.block_size=128", "key */instruct/export.onnx-int4"),
    "exports.*.algorithm": row("exports.1.algorithm=rtn", "key */instruct/export.onnx-int4"),
    "exports.*.symmetric": row("exports.1.symmetric=false", "key */instruct/export.onnx-int4", given="exports.1.algorithm=rtn"),
    "exports.*.lm_head": row("exports.1.lm_head=int4", "key */instruct/export.onnx-int4"),
    "exports.*.embeddings": row("exports.1.embeddings=fp32", "key */instruct/export.onnx-int4"),
    "exports.*.mixed.max_drop": row("exports.1.mixed.max_drop=0.02", "key */instruct/export.onnx-int4",
                                    given=("exports.1.calibrate={data: qa}", "exports.1.mixed={max_drop: 0.01}")),
    "exports.*.target": row("exports.1.target=[cpu, tiny]", "error", given="targets.tiny={memory: 1kB}"),
    "exports.*.calibrate.data": w("exports.0.calibrate.data=other", "nodes"),
    "exports.*.calibrate.n": w("exports.0.calibrate.n=32", "key */export.gptq-4"),
    "gates.*.match": row('gates.2.match="s/base"', "nodes"),
    "gates.*.name": row("gates.2.name=good", "nodes"),
    "gates.*.parity.tokenizer": row("gates.1.parity.tokenizer=null", "key */gate.onnx-*"),
    "gates.*.parity.template": row("gates.1.parity.template=exact", "key */gate.onnx-*"),
    "gates.*.parity.kl": row("gates.1.parity.kl=0.1", "key */gate.onnx-*"),
    "gates.*.parity.perplexity": row("gates.1.parity.perplexity=0.1", "key */gate.onnx-*"),
    "gates.*.parity.greedy": row("gates.1.parity.greedy=0.5", "key */gate.onnx-*"),
    "gates.*.parity.cosine": row("gates.1.parity.cosine=0.9", "key */gate.onnx-*"),
    "gates.*.parity.ranking": row("gates.1.parity.ranking=0.9", "key */gate.onnx-*"),
    "gates.*.parity.ndcg": f("gates.0.parity.ndcg=0.1", "key */gate.onnx-*"),
    "gates.*.max_drop.points": row("gates.1.max_drop.points=3", "key */gate.onnx-*", given="gates.1.max_drop={points: 2}"),
    "gates.*.max_drop.sigma": row("gates.1.max_drop.sigma=3", "key */gate.onnx-*", given="gates.1.max_drop={points: 2}"),
    "gates.*.require": row("gates.2.require={perplexity: {max: 9}}", "key */gate.limits"),
    "gates.*.require.*.min": row("gates.2.require.bits_per_byte.min=1", "key */gate.limits"),
    "gates.*.require.*.max": row("gates.2.require.bits_per_byte.max=7", "key */gate.limits"),
    "gates.*.beats": row("gates.0.beats=sft", "nodes"),
    "gates.*.metrics": row("gates.0.metrics=[chrf]", "key */gate.beats-base"),
    "gates.*.suite": row("gates.0={match: '*/instruct', beats: base, suite: lm}", "nodes"),
    "gates.*.within": row("gates.0.within=0.02", "key */gate.beats-base"),
    "gates.*.across": row("gates.3.across=null", "error"),
    "gates.*.monotonic": row("gates.3.monotonic=chat", "nodes"),
    "targets.*.device": row("targets.phone={device: iphone-50}", "error"),
    "targets.*.memory": row("targets.phone.memory=1kB", "error"),
    "targets.*.context": row("targets.phone.context=1", "fits", given="targets.phone.memory=3450kB"),
    # --- hardware
    "backends.*.use": row("backends.box={use: a100-80g}", "plan"),
    "backends.*.gpu": row("backends.box.gpu=l4", "plan"),
    "backends.*.per_node": row("backends.box.per_node=1", "plan"),
    "backends.*.nodes": w("backends.pool.nodes=1", "plan"),
    "backends.*.cpu": row("backends.laptop.cpu=4", "plan"),
    "backends.*.ram": row("backends.laptop.ram=16GB", "plan"),
    "backends.*.scheduler": row("backends.box.scheduler=slurm", "elsewhere test_a_scheduler_takes_jobs_off_this_machine"),
    "backends.*.runtime": w("backends.pool.runtime=any", "plan"),
    "backends.*.partition": w("backends.pool.partition=big", "launcher"),
    "backends.*.usd_per_gpu_hour": row("backends.box.usd_per_gpu_hour=5", "plan"),
    "backends.*.usd_per_hour": row("backends.laptop.usd_per_hour=0.5", "plan"),
    "backends.*.grid": row("backends.laptop.grid=france", "plan"),
    "place": row("place.m/pretrain=laptop", "plan"),
    # --- release
    "release.to": row("release.to=hf", "job"),
    "release.path": row("release.path=elsewhere", "job"),
    "release.repo": row('release.repo="{family}-{size}-x-{variant}"', "key */release */card"),
    "release.collection": row("release.collection=false", "job"),
    "release.card": row("release.card=none", "nodes"),
    "release.dry_run": row("release.dry_run=false", "job"),
    "profiles": row((), "elsewhere test_profiles_are_laid_over_the_spec"),
    # --- adopted checkpoints
    "stages[adopt].kind": row("stages.grown.kind=adapt", "error"),
    "stages[adopt].from": row("stages.grown.from=sft", "error"),
    "stages[adopt].by": row("stages.grown.by={m: {license: x}}", "error"),
    "stages[adopt].path": row("stages.grown.path=ckpt3", "key m/grown"),
    "stages[adopt].hf": row("stages.grown={kind: adopt, hf: a/c, revision: abc}", "key m/grown */card",
                            given="stages.grown={kind: adopt, hf: a/b, revision: abc, license: mit}"),
    "stages[adopt].revision": row("stages.grown.revision=def", "key m/grown",
                                  given="stages.grown={kind: adopt, hf: a/b, revision: abc}"),
    "stages[adopt].license": row("stages.grown.license=other", "key m/grown */found/card"),
}  # fmt: skip

# --- stages: what they share, and their own -----------------------------------------------------------------

AT = {  # kind -> (stage's name, base, another source or mix of its format)
    "pretrain": ("pretrain", "small", "docs"),
    "sft": ("sft", "small", "{weights: {qa: 1}, tokens: 5k}"),
    "dpo": ("dpo", "small", "{weights: {prefs: 1}, max_epochs: 9}"),
    "distill": ("kd", "small", "docs"),
    "grpo": ("rl", "wide", "chat"),
    "embed": ("emb", "wide", "{weights: {pairs: 1}, max_epochs: 9}"),
    "rerank": ("rank", "wide", "{weights: {pairs: 1}, max_epochs: 9}"),
    "vlm": ("vl", "wide", "{weights: {img: 1}, max_epochs: 9}"),
    "audio": ("au", "wide", "{weights: {snd: 1}, max_epochs: 9}"),
}
SHARED: dict[str, tuple[str, str]] = {  # field -> (value, effect; `key` alone: the stage's own steps)
    "steps": ("77", "key"),
    "tokens": ("5k", "key"),
    "epochs": ("3.5", "key"),
    "batch_tokens": ("8192", "key"),
    "context": ("64", "key"),
    "rope_theta": ("777.0", "key, and what starts from it"),
    "lr.peak": ("0.002", "key"),
    "lr.schedule": ("constant", "key"),
    "lr.warmup": ("0.3", "key"),
    "lr.min_ratio": ("0.3", "key"),
    "lr.decay": ("0.6", "key"),
    "optimizer": ("muon", "key"),
    "weight_decay": ("0.33", "key"),
    "betas": ("[0.8, 0.9]", "key"),
    "clip": ("0.5", "key"),
    "lora.r": ("8", "key"),
    "lora.alpha": ("8.0", "key"),
    "lora.dropout": ("0.1", "key"),
    "lora.targets": ("[q_proj]", "key"),
    "precision": ("fp32", "key"),
    "micro_batch": ("1", "plan"),
    "recompute": ("full", "plan"),
    "checkpoint_steps": ("7", "job"),
}
OWN: dict[str, dict[str, tuple[str, str]]] = {
    "pretrain": {"fim": ("0.5", "key"), "z_loss": ("0.001", "key")},
    "sft": {"loss_on": ("all", "key"), "modes": ("[think]", "key")},
    "dpo": {"beta": ("0.2", "key"), "loss": ("ipo", "key"), "sft_weight": ("0.5", "key"), "global_batch": ("8", "key"),
            "tokens": ("5k", "error"), "batch_tokens": ("8192", "error")},
    "distill": {"teacher": ("base@m", "same"), "mode": ("on_policy", "key"), "loss": ("jsd", "key"),
                "temperature": ("2.0", "key"), "alpha": ("0.1", "key")},
    "grpo": {"rewards": ("[other]", "key"), "group": ("4", "key")},
    "embed": {"loss": ("triplet", "error"), "temperature": ("0.1", "key"), "symmetric": ("false", "key"),
              "false_negatives": ("null", "key"), "pooling": ("mean", "key"), "bidirectional": ("true", "key"),
              "mrl": ("[64]", "key"), "cloze": ("2", "key"), "prompts.query": ("'find: '", "key"), "prompts.document": ("'text: '", "key")},
    "rerank": {"head": ("classifier", "key"), "objective": ("listwise", "key")},
    "vlm": {"tower": ("google/other", "key"), "tower.vit.layers": ("3", "key"), "tower.vit.hidden": ("96", "key"),
            "tower.vit.patch": ("16", "key"), "tower.vit.image": ("64", "key"), "projector": ("linear", "key"),
            "train": ("[projector]", "key")},
}  # fmt: skip
OWN["audio"] = OWN["vlm"]
# of both that read pairs; what is counted in tokens means nothing to them
PAIRED: dict[str, tuple[str, str]] = {
    "global_batch": ("64", "key"), "text": ("words", "key"), "merge.method": ("linear", "key"), "merge.last": ("2", "key"),
    "hard_negatives.k": ("3", "key, and who mines"), "hard_negatives.margin": ("0.1", "who mines"),
    "tokens": ("5k", "error"), "batch_tokens": ("8192", "error"), "rope_theta": ("777.0", "error"), "lora": ("{r: 4}", "error"),
}  # fmt: skip
OWN["embed"] |= PAIRED
OWN["rerank"] |= PAIRED
GIVEN = {  # what a nested field needs to stand in
    "lora": "{r: 4}",
    "hard_negatives": "{k: 5}",
    "merge": "{method: slerp, last: 3}",
    "tower": "{vit: {layers: 2, hidden: 64, patch: 8, image: 32}}",
}


def _stages() -> dict[str, Row]:
    found: dict[str, Row] = {}
    for kind, (stage, base, data) in AT.items():
        at, mine = f"stages.{stage}", f"*/{stage}"
        first = "m" if kind == "pretrain" else "s" if base == "small" else "d"
        found[f"stages[{kind}].kind"] = row(f"{at}.kind={kind}s", "error", base)
        parent = "stages.sft.from=pretrain" if kind == "sft" else f"{at}.from=plain"
        if kind == "pretrain":
            found["stages[pretrain].from"] = w("stages.pretrain.from=plain", "nodes")
        elif kind == "distill":
            found["stages[distill].from"] = row(f"{at}.from=pretrain", "nodes")
        elif kind == "sft":
            found["stages[sft].from"] = row(parent, "nodes")
        elif kind == "dpo":
            found["stages[dpo].from"] = row(f"{at}.from=base", "nodes")
        else:
            found[f"stages[{kind}].from"] = row(parent, "nodes", base)
        found[f"stages[{kind}].by"] = row(f"{at}.by={{{first}: {{clip: 0.2}}}}", f"key {first}/{stage}", base)
        found[f"stages[{kind}].data"] = row(f"{at}.data={data}", "nodes", base)
        for name, (value, effect) in {**SHARED, **OWN[kind]}.items():
            top = name.partition(".")[0]
            if top != name and OWN[kind].get(top, ("", ""))[1] == "error":  # refused as a whole
                continue
            given = (f"{at}.{top}={GIVEN[top]}",) if "." in name and top in GIVEN else ()
            if (kind, name) == ("distill", "alpha"):
                given = (f"{at}.by={{}}",)  # which sets alpha
            found[f"stages[{kind}].{name}"] = row(
                f"{at}.{name}={value}",
                {
                    "key": f"key {mine}",
                    "key, and what starts from it": f"key {mine} *",
                    "key, and who mines": f"key {mine} */mine/*",
                    "who mines": "key */mine/*",
                }.get(effect, effect),
                base,
                given,
            )
    return found


ROWS |= _stages()
WORDS = ("sizes.r={arch: bert, layers: 2, hidden: 64, heads: 1, ffn: 64}", "variants.reranker.sizes=[r]",
         "stages.rank={kind: rerank, data: pairs, lexical: {}}")  # fmt: skip
LEXICAL = ("variants.embedding.sizes=[d]", "stages.emb={kind: embed, data: pairs, lexical: {}}")
ROWS |= {
    # who else an embedder or reranker learns from, and who finds its negatives
    "stages[embed].hard_negatives.by": f("stages.emb.hard_negatives.by=coach", "nodes", "stages.emb.hard_negatives={k: 3}"),
    "stages[embed].teacher": f("stages.emb.teacher=coach", "key */emb */card"),  # whose sources' licences count
    "stages[embed].alpha": f("stages.emb.alpha=0.9", "key */emb", "stages.emb.teacher=coach"),
    "stages[embed].lexical.epochs": f("stages.emb.lexical.epochs=2", "key */emb", LEXICAL),
    "stages[embed].lexical.batch": f("stages.emb.lexical.batch=64", "key */emb", LEXICAL),
    "stages[embed].lexical.lr": f("stages.emb.lexical.lr=0.1", "key */emb", LEXICAL),
    **{f"stages[rerank].lexical.{field}": f(f"stages.rank.lexical.{field}={value}", "key r/rank", WORDS)
       for field, value in (("epochs", 2), ("batch", 64), ("lr", 0.1))},
    "stages[rerank].hard_negatives.by": f("stages.rank.hard_negatives.by=coach", "nodes"),
    "stages[rerank].loss": f("stages.rank.loss=plistmle", "key */rank", "stages.rank.objective=listwise"),
    "stages[rerank].teacher": f("stages.rank.teacher=judge@q", "key d/rank",
                                ("stages.rank.objective=distill", "stages.rank.teacher=judge")),
}  # fmt: skip


# --- the schema ---------------------------------------------------------------------------------------------


def models_in(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """(`.*` for each mapping on the way, model) for every model that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "", annotation
        return
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for one in arguments:
            yield from models_in(one)
    elif origin is typing.Annotated:
        yield from models_in(arguments[0])
    elif origin is dict:
        yield from ((f".*{rest}", model) for rest, model in models_in(arguments[1]))
    elif origin is tuple:
        yield from ((f".*{rest}", model) for rest, model in models_in(arguments[0]))


def fields_of(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """The path of every field below a model; a field that holds sections counts by its sections' fields."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        inner = [(rest, one) for rest, one in models_in(info.annotation) if one is not StageSpec]
        if path == "stages":
            continue
        if not inner:
            yield path
        plain = [a for a in typing.get_args(info.annotation) if a is str]
        if inner and plain:
            yield path  # a name, or a section in place
        for rest, one in inner:
            if path.endswith(".data") and one.__name__ == "Mix":
                continue  # a mix in place is the mix of data.mixes
            # a list of suites' tasks, and limits by metric, are addressed through both levels
            yield from fields_of(one, f"{path}{rest.replace('.*.*', '.*')}.")
            if one.__name__ == "Bound":
                yield path


def schema() -> set[str]:
    """Every field that a user may write."""
    found = set(fields_of(Family, ""))
    for kind, model in STAGES.items():
        found |= set(fields_of(model, f"stages[{kind}]."))
    return found


def test_every_field_has_a_row_and_every_row_its_field() -> None:
    assert sorted(schema() - ROWS.keys()) == [], "fields without a row"
    assert sorted(ROWS.keys() - schema()) == [], "rows without a field"


# --- what a change does -------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the specs name."""
    found = tmp_path_factory.mktemp("spec")
    for name in ("docs", "other"):
        line = json.dumps({"body": f"{name} and more words " * 50, "text": name, "book": "b"})
        (found / f"{name}.jsonl").write_text(f"{line}\n" * 2000)
    for name, rows in (("ckpt", 2048), ("ckpt2", 2112), ("ckpt3", 2048)):
        (found / name).mkdir()
        (found / name / "config.json").write_text(json.dumps({"vocab_size": rows, "name": name}))
    (found / "chat.jinja").write_text(TEMPLATE)
    return found


@cache
def compiled(base: str, sets: tuple[str, ...], folder: Path) -> Graph | str:
    """The graph, or the error."""
    try:
        return resolve(drafts(BASES[base], STAGES, folder=folder, sets=list(sets)))
    except FamcError as error:
        return error.render()


def identity(graph: Graph, name: str) -> str:
    """What bears a step's identity, but for its inputs' keys."""
    node = graph.nodes[name]
    return json.dumps([node.kind, node.params, dict(node.inputs)], sort_keys=True, default=list)


def planned(graph: Graph, folder: Path) -> tuple[str, str]:
    """(the plan's JSON, all job files)."""
    made = plan(graph, folder / "out", local=load_accelerator("cpu"))
    return json.dumps(made.to_dict()), "".join(made.job(name).to_json() for name in made.steps)


@pytest.mark.parametrize("field", sorted(ROWS))
def test_a_field_changes_what_its_row_says(field: str, folder: Path) -> None:
    """Both specs are compiled, and compared."""
    change = ROWS[field]
    effect, _, globs = change.effect.partition(" ")
    if effect == "elsewhere":
        assert callable(globals()[globs])
        return
    before = compiled(change.base, change.given, folder)
    after = compiled(change.base, (*change.given, *change.sets), folder)
    if effect == "fits":  # the other way round: the base is refused, the change is not
        assert isinstance(before, str) and isinstance(after, Graph)
        return
    assert isinstance(before, Graph), before
    if effect == "error":
        assert isinstance(after, str)
        return
    assert isinstance(after, Graph), after
    if effect == "nodes":
        assert before.nodes.keys() != after.nodes.keys()
        return
    assert before.nodes.keys() == after.nodes.keys()
    changed = {name for name in before.nodes if identity(before, name) != identity(after, name)}
    if effect == "key":
        assert changed
        stray = {n for n in changed if not any(fnmatch.fnmatchcase(n, glob) for glob in globs.split())}
        assert not stray
        unmet = [glob for glob in globs.split() if not any(fnmatch.fnmatchcase(n, glob) for n in changed)]
        assert not unmet
        old, new = keys(before), keys(after)
        moved = {name for name in old if old[name] != new[name]}
        assert moved == followers(before, changed)
        return
    assert not changed
    assert keys(before) == keys(after)
    if effect == "same":  # another name of the same thing
        return
    plans, jobs = zip(planned(before, folder), planned(after, folder), strict=True)
    if effect == "plan":
        assert plans[0] != plans[1]
    elif effect == "job":
        assert jobs[0] != jobs[1]
    else:
        assert effect == "launcher"
        assert before.spec.family.backends != after.spec.family.backends


def followers(graph: Graph, names: set[str]) -> set[str]:
    """Steps and all that reads their output, however far."""
    reached = set(names)
    for name, node in graph.nodes.items():  # needs come first
        if reached & set(node.inputs.values()):
            reached.add(name)
    return reached


# --- workers obey what is hashed ----------------------------------------------------------------------------

# parameters that no worker names, and why that is right
UNREAD = {
    "precision": "the plan makes auto concrete and hands it on as the job's precision",
    "fim": "refused before anything starts (graph.not_ready)",
    "modes": "refused before anything starts (graph.not_ready)",
    "interpreter": "the standard library's fingerprint: the worker reads the library itself",
    "files": "a digest of what the worker reads at runtime.path",
    "kind": "tokenizer.kind has one value",
    "across": "the graph obeys it: it chooses which score the gate compares with",
    "rate": "audio can be planned only: its mix is refused before anything starts",
    "suite": "an evaluation's name; the worker reads its tasks",
}


def test_no_parameter_is_hashed_but_never_read_by_a_worker(folder: Path) -> None:
    """Every parameter of a step that can run is named by famc/work; the exceptions are told above."""
    code = "".join(p.read_text() for p in sorted((Path(famc.__file__).parent / "work").glob("*.py")))
    named = set(re.findall(r"[\"']([a-z][a-z0-9_.]*)[\"']", code))
    for base in BASES:
        graph = compiled(base, (), folder)
        assert isinstance(graph, Graph)
        for node in graph.nodes.values():
            planned_only = any("this version of famc" in reason for reason in node.missing)
            if KINDS[node.kind].worker is not None and not planned_only:
                unread = {name for name in node.params if name not in named and name not in UNREAD}
                assert not unread, f"{node.name}: {sorted(unread)}"


def test_profiles_are_laid_over_the_spec(folder: Path) -> None:
    """A profile in use changes the steps it is about; a wrong one is told though nobody uses it."""
    plain = resolve(drafts(SMALL, STAGES, folder=folder))
    quick = resolve(drafts(SMALL, STAGES, folder=folder, profile="quick"))
    changed = {name for name in plain.nodes if identity(plain, name) != identity(quick, name)}
    assert changed == {"s/sft", "m/sft"}
    with pytest.raises(SpecError, match="lots"):
        resolve(drafts(SMALL.replace("epochs: 1}}", "epochs: lots}}"), STAGES, folder=folder))


def test_positions_that_a_stage_extended_are_kept_by_what_follows(folder: Path) -> None:
    """A longer context and a new rotary base hold for every later stage, its card and its release."""
    sets = ["stages.long={kind: pretrain, from: pretrain, data: long, context: 8192, rope_theta: 1000000}",
            "stages.sft.from=long"]  # fmt: skip
    graph = resolve(drafts(WIDE, STAGES, folder=folder, sets=sets))
    for name in ("d/long", "d/sft"):
        shape = graph.nodes[name].params["shape"]
        assert (shape["context"], shape["rope_theta"]) == (8192, 1e6)
    assert graph.nodes["d/pretrain"].params["shape"]["rope_theta"] == 1e4
    assert graph.nodes["d/chat/release"].params["max_context"] == 8192
    assert graph.nodes["d/chat/card"].params["shape"]["context"] == 8192
    assert graph.nodes["d/base/release"].params["max_context"] == 2048


def test_a_scheduler_takes_jobs_off_this_machine(folder: Path) -> None:
    """famc starts jobs itself only where the scheduler is local."""
    local = {}
    for scheduler in ("local", "slurm"):
        graph = resolve(drafts(SMALL, STAGES, folder=folder, sets=[f"backends.box.scheduler={scheduler}"]))
        made = plan(graph, folder / "out", local=load_accelerator("cpu"))
        local[scheduler] = [name for name, step in made.steps.items() if not step.hardware.local]
    assert local == {"local": [], "slurm": ["m/pretrain"]}
