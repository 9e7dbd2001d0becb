"""One mistake at a time in a small valid spec, and the whole text that it brings: place, what is wrong, what to do.

Each case: a name, edits (old text, new text) of small_spec.SPEC, and every line of the error.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from small_spec import SPEC

from famc.errors import SpecError
from famc.graph import open_family

# --- a family with an encoder and pairs: what embedders and rerankers need
EMB = "emb: {kind: embed, from: pretrain, data: pairs}"
RANK = "rank: {kind: rerank, from: pretrain, data: pairs}"


def emb(more: str) -> str:
    return EMB.replace("pairs}", f"pairs, {more}}}")


def rank(more: str) -> str:
    return RANK.replace("pairs}", f"pairs, {more}}}")


def finders(*stages: str, **sizes: str) -> list[tuple[str, str]]:
    """Edits that add stages (line 26 and on), and publish some of them as `v-NAME` at these sizes; b is a bert."""
    published = "".join(f"  v-{name}: {{stage: {name}, sizes: [{where}]}}\n" for name, where in sizes.items())
    return [
        (
            "\ngroups: {small",
            "\n  b: {arch: bert, layers: 2, hidden: 64, ffn: 128, heads: 2}\ngroups: {small",
        ),
        (
            "prefs: {pystdlib: preferences}",
            "prefs: {pystdlib: preferences}\n    pairs: {pystdlib: sentences}",
        ),
        ("kd}, sizes: all", "kd}, sizes: [s, m]"),
        ("beta: 0.1}\n", "beta: 0.1}\n" + "".join(f"  {line}\n" for line in stages)),
        ("eval: chat}\n", f"eval: chat}}\n{published}"),
    ]


def exported(variant: str, size: str, words: str) -> list[tuple[str, str]]:
    """An edit that exports one of them."""
    return [("exports:\n", f"exports:\n  - {{variants: [{variant}], sizes: [{size}], format: {words}}}\n")]


# fmt: off
MISTAKES: list[tuple[str, list[tuple[str, str]], list[str]]] = [
    # --- unknown keys
    ("unknown section", [("groups: {small", "group: {small")], [
        "7:1: unknown key 'group' in the spec; did you mean 'groups'?",
    ]),
    ("unknown key in family", [("seed: 7", "sed: 7")], [
        "2:47: unknown key 'sed' in family; did you mean 'seed'?",
    ]),
    ("unknown key in arch", [("vocab_pad", "vocab_pads")], [
        "3:35: unknown key 'vocab_pads' in arch; did you mean 'vocab_pad'?",
    ]),
    ("unknown key in a size", [("ffn: 128", "fnn: 128")], [
        "5:30: unknown key 'fnn' in sizes.s; did you mean 'ffn'?",
    ]),
    ("unknown key in the tokenizer", [("{vocab: 2000", "{vocabs: 2000")], [
        "8:13: unknown key 'vocabs' in tokenizer; did you mean 'vocab'?",
    ]),
    ("unknown key in train_on", [("bytes: 2MB", "byte: 2MB")], [
        "8:48: unknown key 'byte' in tokenizer.train_on; did you mean 'bytes'?",
    ]),
    ("unknown key in data", [("  mixes:", "  mixtures:")], [
        "17:3: unknown key 'mixtures' in data; did you mean 'mixes'?",
    ]),
    ("unknown key in a source", [("clean: text", "cleen: text")], [
        "14:29: unknown key 'cleen' in data.sources.docs; did you mean 'clean'?",
    ]),
    ("unknown key in heldout", [("fraction: 0.2", "share: 0.2")], [
        "13:65: unknown key 'share' in data.sources.code.heldout; known: by, fraction",
    ]),
    ("unknown key in a mix", [("max_epochs: 4", "max_epoch: 4")], [
        "18:55: unknown key 'max_epoch' in data.mixes.text; did you mean 'max_epochs'?",
    ]),
    ("unknown key in a pretrain stage", [("batch_tokens: 1024", "batch_token: 1024")], [
        "20:42: unknown key 'batch_token' in stages.pretrain; did you mean 'batch_tokens'?",
    ]),
    ("unknown key in a distill stage", [("teacher: pretrain@m", "teacher: pretrain@m, temprature: 2")], [
        "21:59: unknown key 'temprature' in stages.kd; did you mean 'temperature'?",
    ]),
    ("unknown key in an sft stage", [("epochs: 2}", "epoch: 2}")], [
        "22:44: unknown key 'epoch' in stages.sft; did you mean 'epochs'?",
    ]),
    ("unknown key in a dpo stage", [("beta: 0.1", "betta: 0.1")], [
        "23:46: unknown key 'betta' in stages.dpo; did you mean 'beta'?",
    ]),
    ("unknown key in lr", [("schedule: wsd", "shedule: wsd")], [
        "20:79: unknown key 'shedule' in stages.pretrain.lr; did you mean 'schedule'?",
    ]),
    ("unknown key in by", [("{alpha: 0.7}", "{alhpa: 0.7}")], [
        "21:72: unknown key 'alhpa' in stages.kd.by.small; did you mean 'alpha'?",
    ]),
    ("unknown key in a variant", [("eval: lm}", "evals: lm}")], [
        "25:51: unknown key 'evals' in variants.base; did you mean 'eval'?",
    ]),
    ("unknown key in an eval task", [("docs, n: 20}", "docs, max_tokens: 20}")], [
        "28:42: unknown key 'max_tokens' in evals.lm.0; did you mean 'max_new_tokens'?",
    ]),
    ("unknown key in an export", [("format: safetensors", "formats: safetensors")], [
        "31:24: unknown key 'formats' in exports.0; did you mean 'format'?",
    ]),
    ("unknown key in a gate", [("suite: chat", "suit: chat")], [
        "34:40: unknown key 'suit' in gates.0; did you mean 'suite'?",
    ]),
    ("unknown key in parity", [("tokenizer: exact", "tokeniser: exact")], [
        "35:43: unknown key 'tokeniser' in gates.1.parity; did you mean 'tokenizer'?",
    ]),
    ("unknown key in a limit", [("{max: 8.0}", "{maximum: 8.0}")], [
        "36:45: unknown key 'maximum' in gates.2.require.bits_per_byte; did you mean 'max'?",
    ]),
    ("unknown key in a target", [("context: 128}}", "contexts: 128}}")], [
        "37:32: unknown key 'contexts' in targets.phone; did you mean 'context'?",
    ]),
    ("unknown key in a backend", [("per_node: 8", "pernode: 8")], [
        "40:24: unknown key 'pernode' in backends.box; did you mean 'per_node'?",
    ]),
    ("unknown key in release", [("card: auto", "cards: auto")], [
        "42:76: unknown key 'cards' in release; did you mean 'card'?",
    ]),
    ("python name of a key", [("from: sft", "from_: sft")], [
        "23:22: unknown key 'from_' in stages.dpo; did you mean 'from'?",
    ]),
    ("unknown target of a profile", [("stages.sft.epochs: 1", "stages.sfft.epochs: 1")], [
        "44:40: 'stages.sfft.epochs': stages has no 'sfft'; did you mean 'sft'?",
    ]),
    ("unknown key through a profile", [("stages.sft.epochs: 1", "stages.sft.epoch: 1")], [
        "44:40: unknown key 'epoch' in stages.sft; did you mean 'epochs'?",
    ]),
    ("bad value in a profile", [("stages.sft.epochs: 1", "stages.sft.epochs: many")], [
        "44:40: stages.sft.epochs: expected a number, not 'many'",
    ]),
    # --- missing
    ("no version", [("famc: 1\n", "")], [
        "1:1: the spec needs 'famc'; version of this language",
    ]),
    ("no family", [("family: {name: pocket, org: me, license: mit, seed: 7, languages: [en]}\n", "")], [
        "1:1: the spec needs 'family'; who the family is",
    ]),
    ("no name", [("name: pocket, ", "")], [
        "2:1: family needs 'name'; name of the family: the first part of every released model's name",
    ]),
    ("no kind", [("{kind: sft, ", "{")], [
        "22:3: stages.sft needs 'kind'; known: adopt, audio, distill, dpo, embed, grpo, pretrain, rerank, sft, vlm",
    ]),
    ("no stage in a variant", [("{stage: dpo, ", "{")], [
        "26:3: variants.instruct needs 'stage'; a stage, or stages by size or group",
    ]),
    ("no weights", [("weights: {code: 3, docs: 1}, ", "")], [
        "18:5: data.mixes.text needs 'weights'; share by source, or by source.tier; relative",
    ]),
    ("no teacher", [("teacher: pretrain@m, ", "")], [
        "21:3: stages.kd needs 'teacher'; variant@size, stage@size, or a variant or stage at the same size",
    ]),
    ("no from", [("from: sft, ", "")], [
        "23:3: stages.dpo: kind 'dpo' starts from a trained model: 'from' is missing; known: kd, pretrain, sft",
    ]),
    ("no data", [("data: prefs, ", "")], [
        "23:3: stages.dpo needs 'data'; known: code, docs, prefs, qa, text",
    ]),
    ("no format in an export", [("format: safetensors, ", "")], [
        "31:5: exports.0 needs 'format'; file format",
    ]),
    # --- values
    ("empty section", [("groups: {small: [s], both: [s, m]}", "groups:")], [
        "7:1: groups is empty; give it a value, or remove the key",
    ]),
    ("empty stage", [("  sft:   {kind: sft, from: base, data: qa, epochs: 2}", "  sft:")], [
        "22:3: stages.sft is empty; write at least its 'kind'",
    ]),
    ("list for a mapping", [("targets: {phone: {memory: 1GB, context: 128}}", "targets: [phone]")], [
        "37:10: targets: expected a mapping, not a list",
    ]),
    ("text for a mapping", [("arch: {type: qwen3, head_dim: 32, vocab_pad: 2048, context: 128}", "arch: qwen3")], [
        "3:7: arch: expected a mapping, not 'qwen3'",
    ]),
    ("mapping for text", [("license: mit", "license: {id: mit}")], [
        "2:42: family.license: expected text, not a mapping",
    ]),
    ("number for text", [("license: mit", "license: 2")], [
        "2:42: family.license: expected text, not 2; quote it",
    ]),
    ("text for a number", [("layers: 2", "layers: two")], [
        "5:15: sizes.s.layers: expected a whole number, not 'two'",
    ]),
    ("fraction for a whole number", [("layers: 2", "layers: 2.5")], [
        "5:15: sizes.s.layers: expected a whole number, not 2.5",
    ]),
    ("truth for a number", [("layers: 2", "layers: true")], [
        "5:15: sizes.s.layers: expected a whole number, not true",
    ]),
    ("text for a truth", [("tie: true}\n  m", "tie: yes}\n  m")], [
        "5:68: sizes.s.tie: expected true or false, not 'yes'",
    ]),
    ("text for a list", [("languages: [en]", "languages: en")], [
        "2:67: family.languages: expected a list, not 'en'",
    ]),
    ("number in a list of text", [("languages: [en]", "languages: [1]")], [
        "2:68: family.languages.0: expected text, not 1; quote it",
    ]),
    ("list for a union", [("from: base, data: qa", "from: base, data: [qa]")], [
        "22:40: stages.sft.data: expected text or a mapping, not a list",
    ]),
    ("number for a union", [("stage: dpo", "stage: 3")], [
        "26:21: variants.instruct.stage: expected text or a mapping, not 3",
    ]),
    ("text for a learning rate", [("peak: 1e-3", "peak: fast")], [
        "20:73: stages.pretrain.lr.peak: expected a number or scaling_law, not 'fast'",
    ]),
    ("bad unit", [("tokens: 200k", "tokens: 200x")], [
        "18:20: data.mixes.text.tokens: unknown unit 'x' in '200x': use k, m, b, t",
    ]),
    ("no amount", [("bytes: 2MB", "bytes: plenty")], [
        "8:55: tokenizer.train_on.bytes: expected an amount such as 20GB, not 'plenty'",
    ]),
    ("half a token", [("tokens: 200k", "tokens: 0.5")], [
        "18:20: data.mixes.text.tokens: 0.5 is not a whole number",
    ]),
    ("negative amount", [("tokens: 200k", "tokens: -200k")], [
        "18:20: data.mixes.text.tokens: must be at least 0, not '-200k'",
    ]),
    ("amount too large", [("tokens: 200k", "tokens: 9e30")], [
        "18:20: data.mixes.text.tokens: must be at most 10**18, not 9e+30",
    ]),
    ("zero layers", [("layers: 2", "layers: 0")], [
        "5:15: sizes.s.layers: must be at least 1, not 0",
    ]),
    ("negative learning rate", [("peak: 1e-3", "peak: -1")], [
        "20:73: stages.pretrain.lr.peak: must be more than 0, not -1",
    ]),
    ("number too large", [("seed: 7", "seed: 9999999999")], [
        "2:53: family.seed: must be at most 2147483647, not 9999999999",
    ]),
    ("share above one", [("fraction: 0.2", "fraction: 1")], [
        "13:75: data.sources.code.heldout.fraction: must be less than 1, not 1",
    ]),
    ("not a number", [("beta: 0.1", "beta: .nan")], [
        "23:52: stages.dpo.beta: expected a finite number, not nan",
    ]),
    ("wrong literal", [("to: dir", "to: directory")], [
        "42:15: release.to: unknown value 'directory'; known: dir, hf",
    ]),
    ("wrong version", [("famc: 1", "famc: 2")], [
        "1:7: famc: expected 1, not 2",
    ]),
    ("wrong schedule", [("schedule: wsd", "schedule: wds")], [
        "20:89: stages.pretrain.lr.schedule: unknown value 'wds'; did you mean 'wsd'?",
    ]),
    ("bad name of a family", [("name: pocket", "name: my family")], [
        "2:16: family.name: 'my family' can't be a name; use letters, digits, and . _ - inside",
    ]),
    ("bad name of a size", [("  s: {layers", "  s/1: {layers")], [
        "5:3: 's/1' can't be a name; use letters, digits, and . _ - inside",
        "7:18: groups.small: unknown size 's'; known: m",
        "7:29: groups.both: unknown size 's'; known: m",
        "25:31: variants.base.stage: no size or group is called 's'; known: both, m, small",
        "26:34: variants.instruct.sizes: no size or group is called 's'; known: all, both, m, small",
    ]),
    ("no sizes", [("sizes:\n  s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}\n  m: {layers: 4, hidden: 128, ffn: 256, heads: 4, kv_heads: 2, tie: true}\n", "sizes: {}\n")], [
        "4:1: sizes is empty; write at least one",
    ]),
    ("from differs by group", [("{alpha: 0.7}", "{from: sft}")], [
        "21:72: stages.kd.by.small: 'from' can't differ by group; make it a stage of its own",
    ]),
    # --- YAML
    ("duplicate key", [("license: mit", "name: pouch")], [
        "2:33: 'name' stands here a second time; the first is in line 2: keep one",
    ]),
    ("key that is a number", [("groups: {small: [s],", "groups: {small: [s], 1: [m],")], [
        '7:22: the key 1 is not text; quote it: "1"',
    ]),
    ("tag", [("license: mit", "license: !secret mit")], [
        "2:42: the tag '!secret' can't stand in a spec; write plain text, numbers, lists and mappings",
    ]),
    ("bracket not closed", [("languages: [en]}", "languages: [en}")], [
        "2:70: not valid YAML: expected ',' or ']', but got '}'",
    ]),
    ("colon in text", [("  sft:   {kind: sft, from: base, data: qa, epochs: 2}", "  sft: kind: sft")], [
        "22:12: a ':' can't stand here; quote text that holds ': ', and give each key a line of its own",
    ]),
    ("tab", [("  quick:", "\tquick:")], [
        "44:1: a tab can't indent YAML; use spaces",
    ]),
    ("unknown anchor", [("license: mit", "license: *mit")], [
        "2:42: no anchor is called 'mit'; define it before it is used, or quote text that starts with *",
    ]),
    ("second document", [("gates:", "---\ngates:")], [
        "33:1: a second document starts here; a file holds one spec: remove '---'",
    ]),
    ("wrong indentation", [("  instruct: {stage", " instruct: {stage")], [
        "26:2: this does not fit what stands above; check the indentation, the commas and the quotes",
    ]),
    ("control character", [("license: mit", "license: \"\\a\"")], [
        "2:42: '\\x07' holds a character that is not text",
    ]),
    ("text that must be quoted", [("license: mit", "license: @mit")], [
        "2:42: not valid YAML: text can't start with '@'; quote it",
    ]),
    # --- sizes
    ("unknown architecture", [("type: qwen3", "type: qwen2")], [
        "3:14: arch.type: unknown architecture 'qwen2'; did you mean 'qwen3'?",
    ]),
    ("nothing like an architecture", [("type: qwen3", "type: xlnet")], [
        "3:14: arch.type: unknown architecture 'xlnet'; known: bert, llama, modernbert, qwen3, qwen3_moe, t5",
    ]),
    ("size without dimensions", [("{layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}", "{tie: true}")], [
        "5:3: sizes.s: give one of: layers, hidden, heads and ffn; a preset; or params",
    ]),
    ("size in two ways", [("{layers: 2, hidden", "{preset: qwen3-0.6b, layers: 2, hidden")], [
        "5:3: sizes.s: give one of: layers, hidden, heads and ffn; a preset; or params (not dimensions and preset)",
    ]),
    ("size without heads", [("heads: 2, kv_heads: 1, ", "")], [
        "5:3: sizes.s: needs heads as well",
    ]),
    ("size without ffn", [("ffn: 128, ", "")], [
        "5:3: sizes.s: needs ffn (or moe)",
    ]),
    ("heads do not divide", [("kv_heads: 2", "kv_heads: 3")], [
        "6:3: sizes.m: 4 heads cannot share 3 key/value heads evenly",
    ]),
    ("odd head_dim", [("head_dim: 32", "head_dim: 33")], [
        "3:31: arch.head_dim is 33: rotary positions need an even number",
    ]),
    ("hidden does not divide", [("head_dim: 32, vocab_pad: 2048, context: 128}\nsizes:\n  s: {layers: 2, hidden: 64", "vocab_pad: 2048, context: 128}\nsizes:\n  s: {layers: 2, hidden: 65")], [
        "5:3: sizes.s: hidden 65 does not divide into 2 heads: set arch.head_dim, or choose other numbers",
    ]),
    ("experts in llama", [("type: qwen3, head_dim: 32, vocab_pad: 2048, context: 128}\nsizes:\n  s: {layers: 2, hidden: 64, ffn: 128", "type: llama, head_dim: 32, vocab_pad: 2048, context: 128}\nsizes:\n  s: {layers: 2, hidden: 64, moe: {experts: 4, active: 2, ffn: 32}")], [
        "5:3: sizes.s: llama takes no experts",
    ]),
    ("more active experts than there are", [("ffn: 128,", "moe: {experts: 4, active: 8, ffn: 32},")], [
        "5:3: sizes.s: 8 active experts of 4",
    ]),
    ("unknown preset", [("s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}", "s: {preset: qwen3-0.7b}")], [
        "5:3: sizes.s: unknown preset 'qwen3-0.7b'; did you mean 'qwen3-1.7b'?",
    ]),
    ("unknown preset as text", [("s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}", "s: qwen3-0.7b")], [
        "5:3: sizes.s: unknown preset 'qwen3-0.7b'; did you mean 'qwen3-1.7b'?",
    ]),
    ("preset of another architecture", [("s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}", "s: llama3-1b")], [
        "5:3: sizes.s: preset 'llama3-1b' is llama, the family is qwen3",
    ]),
    ("params that can't be met", [("s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}", "s: {params: 1000}")], [
        "5:3: sizes.s: 1,000 parameters: famc finds dimensions for 1M to 500B; give the dimensions instead",
    ]),
    ("unknown size in a group", [("small: [s]", "small: [xs]")], [
        "7:18: groups.small: unknown size 'xs'; did you mean 's'?",
    ]),
    ("group named as a size", [("small: [s],", "small: [s], m: [s],")], [
        "7:22: groups.m: the name already means a size; call the group something else",
    ]),
    ("size with a reserved name", [("  s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}", "  s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}\n  data: {params: 3M}")], [
        "6:3: sizes.data: a size can't be called 'data'; call it something else",
        "26:10: variants.base: size 'data' has no stage; add 'data' to variants.base.stage",
    ]),
    # --- tokenizer
    ("tokenizer from nothing", [(", train_on: {mix: text, bytes: 2MB}", "")], [
        "8:1: tokenizer needs 'train_on' (a mix to learn from) or 'adopt' (a folder); for example train_on: {mix: NAME}",
    ]),
    ("tokenizer from two", [("{vocab: 2000, ", "{vocab: 2000, adopt: folder, ")], [
        "8:26: tokenizer: 'adopt' and 'train_on' exclude each other; keep one",
    ]),
    ("vocabulary beyond its rows", [("vocab: 2000", "vocab: 3000")], [
        "8:20: tokenizer.vocab: 3000 entries do not fit the 2048 rows of arch.vocab_pad; raise vocab_pad",
    ]),
    ("tokenizer from an unknown mix", [("{mix: text,", "{mix: texts,")], [
        "8:42: tokenizer.train_on.mix: no mix or source is called 'texts'; did you mean 'text'?",
    ]),
    ("template without generation marks", [("{vocab: 2000, ", "{vocab: 2000, chat_template: plain.jinja, ")], [
        "8:41: tokenizer.chat_template: plain.jinja has no {% generation %} marks: which tokens are the assistant's can't be told; wrap the assistant's words in {% generation %} … {% endgeneration %}",
    ]),
    ("adopted tokenizer without a template", [("{vocab: 2000, train_on: {mix: text, bytes: 2MB}}", "{adopt: tok}")], [
        "22:17: stages.sft trains on conversations, but the adopted tokenizer has no chat template; set tokenizer.chat_template",
    ]),
    ("tokenizer that needs a model", [("    prefs: {", "    made: {synth: arithmetic, by: base@m}\n    prefs: {"), ("{mix: text, bytes", "{mix: made, bytes")], [
        "8:42: tokenizer.train_on.mix: 'made' is made by a model, and every model needs the tokenizer first; learn from sources that no model makes",
    ]),
    # --- data
    ("source from two origins", [("{pystdlib: questions}", "{pystdlib: questions, path: qa.jsonl}")], [
        "15:5: data.sources.qa comes from path and pystdlib; give one of path, hf, pystdlib, installed, synth",
    ]),
    ("source from nowhere", [("{pystdlib: questions}", "{format: messages}")], [
        "15:5: data.sources.qa does not say where it comes from; give one of path, hf, pystdlib, installed, synth",
    ]),
    ("hub source without revision", [("{pystdlib: docs, clean: text}", "{hf: me/docs}")], [
        "14:5: data.sources.docs: a hub dataset needs 'revision'; pin the commit, so that the data can't move",
    ]),
    ("revision without hub", [("{pystdlib: docs, clean: text}", "{pystdlib: docs, revision: abc}")], [
        "14:29: data.sources.docs: 'revision' is only for hub datasets (hf); remove it",
    ]),
    ("revision that YAML takes for a number", [("{pystdlib: docs, clean: text}", "{hf: me/docs, revision: 1234567}")], [
        "14:36: data.sources.docs.revision: expected text, not 1234567; quote it",
    ]),
    ("unknown generator", [("{pystdlib: docs, clean: text}", "{synth: arithmetics}")], [
        "14:20: data.sources.docs: unknown generator 'arithmetics'; did you mean 'arithmetic'?",
    ]),
    ("wrong part of the library", [("pystdlib: docs", "pystdlib: doc")], [
        "14:23: data.sources.docs.pystdlib: unknown value 'doc'; did you mean 'docs'?",
    ]),
    ("wrong format of the library", [("{pystdlib: questions}", "{pystdlib: questions, format: text}")], [
        "15:42: data.sources.qa: pystdlib questions is of format 'messages', not 'text'; remove 'format'",
    ]),
    ("wrong format for sft", [("from: base, data: qa", "from: base, data: prefs")], [
        "22:40: stages.sft.data: 'prefs' is of format 'preference', kind 'sft' reads messages; for example qa",
    ]),
    ("unknown recipe", [("clean: text", "clean: txt")], [
        "14:36: data.sources.docs: unknown cleaning recipe 'txt'; did you mean 'text'?",
    ]),
    ("unknown filter", [("[normalize,", "[normalise,")], [
        "11:12: data.clean.tidy: unknown filter 'normalise'; did you mean 'normalize'?",
    ]),
    ("unknown parameter of a filter", [("{min: 20}", "{minimum: 20}")], [
        "11:23: data.clean.tidy: unknown key 'minimum' in filter 'length'; did you mean 'min'?",
    ]),
    ("filter that is a list", [("[normalize,", "[[normalize],")], [
        "11:12: data.clean.tidy: a filter is a name, or {name: parameters}; for example length: {min: 20}",
    ]),
    ("negative weight", [("docs: 1}", "docs: -1}")], [
        "18:51: data.mixes.text: the weight of 'docs' is negative; leave the source out, or write 0",
    ]),
    ("weights that sum to nothing", [("{code: 3, docs: 1}", "{code: 0, docs: 0}")], [
        "18:26: data.mixes.text: the weights sum to nothing; give at least one source a weight above 0",
    ]),
    ("mixed formats", [("docs: 1}", "qa: 1}")], [
        "18:26: data.mixes.text: sources of different formats can't be mixed: code is text, qa is messages",
    ]),
    ("tier without a tier filter", [("docs: 1}", "docs.high: 1}")], [
        "18:45: data.mixes.text: 'docs.high' names a tier, but the recipe 'text' of 'docs' makes none; add tier to the recipe",
    ]),
    ("unknown source in a mix", [("docs: 1}", "doc: 1}")], [
        "18:45: data.mixes.text: no source is called 'doc'; did you mean 'docs'?",
    ]),
    ("mix and source of one name", [("    text: {tokens", "    docs: {weights: {code: 1}}\n    text: {tokens")], [
        "18:5: data.mixes.docs: a source has the same name; call one of them something else",
    ]),
    ("keep without a generator", [("{pystdlib: questions}", "{pystdlib: questions, keep: {cosine: 0.7}}")], [
        "15:34: data.sources.qa: 'keep' is only for generators (synth); remove it",
    ]),
    ("rate without audio", [("{pystdlib: questions}", "{pystdlib: questions, rate: 16000}")], [
        "15:34: data.sources.qa: 'rate' is only for audio; remove it",
    ]),
    ("sources in a circle", [("    prefs: {", "    a: {synth: arithmetic, from: b}\n    b: {synth: arithmetic, from: a}\n    prefs: {")], [
        "16:34: data.sources: a <- b <- a goes in a circle; cut it at one 'from'",
    ]),
    ("generator from an unknown source", [("    prefs: {", "    a: {synth: arithmetic, from: code2}\n    prefs: {")], [
        "16:34: data.sources.a.from: no source is called 'code2'; did you mean 'code'?",
    ]),
    ("generator without a size", [("    prefs: {", "    a: {synth: arithmetic, by: base}\n    prefs: {")], [
        "16:32: data.sources.a.by: which size of 'base' generates is not said; write base@SIZE: sizes are s, m",
    ]),
    ("generator by an unknown model", [("    prefs: {", "    a: {synth: arithmetic, by: bass@m}\n    prefs: {")], [
        "16:32: data.sources.a.by: no stage or variant is called 'bass'; did you mean 'base'?",
    ]),
    # --- stages
    ("unknown kind", [("kind: sft", "kind: stf")], [
        "22:17: unknown kind 'stf' in stages.sft; did you mean 'sft'?",
    ]),
    ("unknown parent", [("from: sft", "from: stf")], [
        "23:28: stages.dpo.from: no stage or variant is called 'stf'; did you mean 'sft'?",
    ]),
    ("parent at an unknown size", [("from: sft", "from: sft@l")], [
        "23:28: stages.dpo.from: unknown size 'l'; known: m, s",
    ]),
    ("parent is itself", [("from: sft", "from: dpo")], [
        "23:28: stages.dpo.from: a stage can't start from itself",
    ]),
    ("circle of two", [("from: base, data: qa", "from: dpo, data: qa")], [
        "22:28: a step would need itself: s/dpo <- s/sft <- s/dpo; cut it at 'from'",
    ]),
    ("circle through a variant", [("teacher: pretrain@m", "teacher: base")], [
        "21:47: a step would need itself: s/kd <- s/kd; cut it at 'teacher'",
    ]),
    ("circle of three over sizes", [("pretrain: {kind: pretrain, data: text,", "pretrain: {kind: distill, teacher: instruct@s, data: text,")], [
        "22:28: a step would need itself: s/kd <- m/pretrain <- s/dpo <- s/sft <- s/kd; cut it at 'from'",
    ]),
    ("unknown data", [("from: base, data: qa", "from: base, data: qaa")], [
        "22:40: stages.sft.data: no mix or source is called 'qaa'; did you mean 'qa'?",
    ]),
    ("data that the step itself makes", [("    prefs: {pystdlib: preferences}", "    prefs: {synth: arithmetic, by: instruct@m}")], [
        "16:36: data is needed before the step that makes it: m/pretrain <- m/dpo <- m/sft <- m/pretrain; cut it at 'by'",
        "23:39: stages.dpo.data: 'prefs' is of format 'prompts', kind 'dpo' reads preference",
        "29:69: evals.chat: 'preference' reads preference, 'prefs' is of format 'prompts'",
    ]),
    ("unknown teacher", [("teacher: pretrain@m", "teacher: pretain@m")], [
        "21:47: stages.kd.teacher: no stage or variant is called 'pretain'; did you mean 'pretrain'?",
    ]),
    ("teacher at an unknown size", [("teacher: pretrain@m", "teacher: pretrain@xl")], [
        "21:47: stages.kd.teacher: unknown size 'xl'; known: m, s",
    ]),
    ("teacher where it is not made", [("teacher: pretrain@m", "teacher: instruct@s"), ("sizes: [s, m], eval", "sizes: [m], eval")], [
        "21:47: stages.kd.teacher: variant 'instruct' is not made at size 's'; it is made at m",
    ]),
    ("teacher with another vocabulary", [("pretrain: {kind: pretrain, data: text,", "old: {kind: adopt, path: old}\n  pretrain: {kind: pretrain, data: text,")], [
        "20:28: stages.old: another vocabulary: 999 rows, the family has 2048; adopt its tokenizer and set arch.vocab_pad",
    ]),
    ("adopted without a revision", [("pretrain: {kind: pretrain, data: text,", "old: {kind: adopt, hf: me/old}\n  pretrain: {kind: pretrain, data: text,")], [
        "20:3: stages.old: a hub checkpoint needs 'revision'; pin the commit",
    ]),
    ("unknown group in by", [("by: {small:", "by: {smal:")], [
        "21:64: stages.kd.by: no size, group or backend is called 'smal'; did you mean 'small'?",
    ]),
    ("kind in by", [("{alpha: 0.7}", "{kind: sft}")], [
        "21:72: stages.kd.by.small: 'kind' can't differ by group; make it a stage of its own",
    ]),
    ("unknown teacher in by", [("{alpha: 0.7}", "{teacher: bases@m}")], [
        "21:81: stages.kd.by.small.teacher: no stage or variant is called 'bases'; did you mean 'base'?",
    ]),
    ("batch that is no whole number of rows", [("batch_tokens: 1024", "batch_tokens: 1000")], [
        "20:56: stages.pretrain.batch_tokens: 1000 is not a whole number of rows of 128 tokens; for example 1024",
    ]),
    ("context beyond positions", [("epochs: 2}", "epochs: 2, context: 512}")], [
        "22:64: stages.sft.context: 512 is beyond the 128 positions of the model; set rope_theta as well to extend them, or raise arch.context",
    ]),
    ("less data than a row", [("tokens: 200k", "tokens: 100")], [
        "20:36: stages.pretrain.data: 100 tokens are less than one row of 128; raise the mix's tokens, or lower context",
    ]),
    # --- what is published
    ("unknown stage of a variant", [("{stage: dpo,", "{stage: dpoo,")], [
        "26:21: variants.instruct: no stage is called 'dpoo'; did you mean 'dpo'?",
    ]),
    ("size without a stage", [("{m: pretrain, s: kd}", "{m: pretrain}")], [
        "25:10: variants.base: size 's' has no stage; add 's' to variants.base.stage",
    ]),
    ("unknown size of a variant", [("sizes: [s, m]", "sizes: [s, l]")], [
        "26:37: variants.instruct.sizes: no size or group is called 'l'; known: all, both, m, s, small",
    ]),
    ("unknown size of a stage", [("s: kd}", "xs: kd}")], [
        "25:10: variants.base: size 's' has no stage; add 's' to variants.base.stage",
        "25:31: variants.base.stage: no size or group is called 'xs'; did you mean 's'?",
    ]),
    ("unknown suite", [("eval: lm}", "eval: lmm}")], [
        "25:57: variants.base.eval: unknown suite 'lmm'; did you mean 'lm'?",
    ]),
    ("unknown data of a task", [("{task: answers, data: qa", "{task: answers, data: qaa")], [
        "29:32: evals.chat: no source is called 'qaa'; did you mean 'qa'?",
    ]),
    ("data of a wrong format", [("{task: answers, data: qa", "{task: answers, data: docs")], [
        "29:32: evals.chat: 'answers' reads messages, 'docs' is of format 'text'",
    ]),
    ("nothing kept back", [("docs:  {pystdlib: docs,", "docs:  {pystdlib: docs, heldout: {fraction: 0},")], [
        "28:36: evals.lm: 'docs' keeps nothing back (heldout.fraction is 0); evaluations read the held-out part",
    ]),
    ("lm_eval without tasks", [("{task: preference, data: prefs}", "{task: lm_eval}")], [
        "29:44: evals.chat: task 'lm_eval' needs 'tasks'; for example [arc_easy]",
    ]),
    ("tasks without lm_eval", [("{task: preference, data: prefs}", "{task: preference, tasks: [arc_easy]}")], [
        "29:63: evals.chat: 'tasks' is only for lm_eval and mteb; remove it",
    ]),
    ("unknown variant of an export", [("{variants: [base],", "{variants: [bass],")], [
        "31:17: exports.0: no variant is called 'bass'; did you mean 'base'?",
    ]),
    ("unknown size of an export", [("sizes: both", "sizes: bath")], [
        "32:35: exports.1.sizes: no size or group is called 'bath'; did you mean 'both'?",
    ]),
    ("unknown format", [("format: onnx", "format: onxn")], [
        "32:49: exports.1.format: unknown value 'onxn'; did you mean 'onnx'?",
    ]),
    ("unknown quantisation", [("[fp32, int4]", "[fp32, int3]")], [
        "32:62: exports.1: onnx has no 'int3'; did you mean 'int8'?",
    ]),
    ("unknown target", [("[cpu, phone]", "[cpu, phon]")], [
        "32:84: exports.1: unknown target 'phon'; did you mean 'phone'?",
    ]),
    ("bits without gptq", [("quant: bf16", "bits: 4")], [
        "31:45: exports.0: 'bits' is for gptq and awq; safetensors takes 'quant'",
    ]),
    ("architecture without export", [("  m: {layers: 4, hidden: 128, ffn: 256,", "  m: {layers: 4, hidden: 128, moe: {experts: 4, active: 2, ffn: 32},"), ("[fp32, int4]", "[fp16, int4]")], [
        "32:49: exports.1: onnx fp16 does not support text-generation models of architecture 'qwen3_moe' (size m); the nearest that is supported is safetensors bf16; also safetensors fp32",
    ]),
    ("no symmetric search for zero points", [("quant: [fp32, int4]", "quant: int4, algorithm: hqq, symmetric: true")], [
        "32:95: exports.1: hqq searches for zero points, so it can't be symmetric; leave symmetric out, or take rtn, gptq or awq",
    ]),
    ("calibration without data", [("quant: [fp32, int4]", "quant: int4, algorithm: awq")], [
        "32:5: exports.1: 'awq' needs 'calibrate'; for example calibrate: {data: SOURCE, n: 128}",
    ]),
    ("mixed without data", [("quant: [fp32, int4]", "quant: int4, mixed: {max_drop: 0.01}")], [
        "32:5: exports.1: 'mixed' needs 'calibrate'; for example calibrate: {data: SOURCE, n: 128}",
    ]),
    ("data for an algorithm that looks at none", [("quant: [fp32, int4]", "quant: int4, algorithm: rtn, calibrate: {data: qa}")], [
        "32:84: exports.1: rtn looks at no data; take gptq or awq, or set 'mixed'",
    ]),
    ("an option of another quantisation", [("quant: [fp32, int4]", "quant: fp32, lm_head: int4")], [
        "32:68: exports.1: 'lm_head' is for onnx int4 and int8; remove it",
    ]),
    ("a block that no kernel has", [("quant: [fp32, int4]", "quant: int4, block_size: 48")], [
        "32:80: exports.1: block_size 48 is no power of two; onnxruntime and vLLM take 16, 32, 64, 128 and 256",
    ]),
    ("blocks that do not fit", [("format: safetensors, quant: bf16", "format: gptq, bits: 4, block_size: 256, calibrate: {data: qa}")], [
        "31:59: exports.0: block_size 256 does not divide 64 (size s); leave it out: famc finds one that does",
    ]),
    ("zero points that transformers can't read", [("format: safetensors, quant: bf16", "format: gptq, bits: 4, symmetric: false, calibrate: {data: qa}")], [
        "31:47: exports.0: 'symmetric' is for onnx int4; remove it",
    ]),
    ("calibration on what no decoder reads", [("format: safetensors, quant: bf16", "format: gptq, bits: 4, calibrate: {data: [qa, pics]}"), ("    qa:    {", "    pics:  {path: docs.jsonl, format: image_text}\n    qa:    {")], [
        "32:65: exports.0.calibrate: 'pics' is of format 'image_text'; calibration reads text, messages, preference",
    ]),
    ("three bits", [("format: safetensors, quant: bf16", "format: gptq, bits: 3, calibrate: {data: qa}")], [
        "31:44: exports.0: gptq has no 3 bits; write 4 or 8",
    ]),
    ("too large for its target", [("memory: 1GB", "memory: 1MB")], [
        "32:84: exports.1: m as onnx fp32 needs 3.68 MB with 128 tokens of context, target 'phone' has 1 MB; the largest size that fits is s",
    ]),
    ("too large for a device", [("phone: {memory: 1GB, context: 128}", "phone: {device: raspberry-pi-4, memory: 1MB}")], [
        "32:84: exports.1: m as onnx fp32 needs 3.68 MB with 128 tokens of context, target 'phone' has 1 MB; the largest size that fits is s",
    ]),
    ("unknown device", [("phone: {memory: 1GB, context: 128}", "phone: {device: oneplus-21}")], [
        "37:27: targets.phone.device: no accelerator is called 'oneplus-21'; did you mean 'oneplus-12'?",
    ]),
    ("a target that is nothing", [("phone: {memory: 1GB, context: 128}", "phone: {context: 128}")], [
        "37:18: targets.phone says neither 'device' nor 'memory'; for example {device: oneplus-12}",
    ]),
    ("export made twice", [("  - {variants: [instruct], sizes", "  - {variants: [instruct], format: onnx, quant: int4, block_size: 64}\n  - {variants: [instruct], sizes")], [
        "33:49: exports.2: s/instruct as onnx int4 is made by exports.1 already, in another way; leave one of them out",
    ]),
    ("gate without a condition", [(", require: {bits_per_byte: {max: 8.0}}", "")], [
        "36:5: gates.2 states no condition; write one of parity, max_drop, require, beats, monotonic",
    ]),
    ("gate of two kinds", [("parity: {tokenizer: exact, kl: 0.05}", "parity: {kl: 0.05}, beats: base")], [
        "35:54: gates.1: 'parity' is about exports, 'beats' about variants; write two gates",
    ]),
    ("unknown metric", [("[answer_loss]", "[answer_los]")], [
        "34:63: gates.0: unknown metric 'answer_los'; did you mean 'answer_loss'?",
    ]),
    ("unknown required metric", [("{bits_per_byte: {max", "{bit_per_byte: {max")], [
        "36:29: gates.2: unknown metric 'bit_per_byte'; did you mean 'bits_per_byte'?",
    ]),
    ("metric of another suite", [("{bits_per_byte: {max", "{chrf: {max")], [
        "36:29: gates.2: 'chrf' is not measured by suite 'lm'; it measures bits_per_byte, perplexity",
    ]),
    ("limits that exclude each other", [("{max: 8.0}", "{min: 9, max: 8}")], [
        "36:29: gates.2: 'bits_per_byte' can't be at least 9 and at most 8",
    ]),
    ("limit without a number", [("{max: 8.0}", "{}")], [
        "36:29: gates.2: 'bits_per_byte' needs min or max",
    ]),
    ("gate that matches nothing", [('"*/instruct"', '"*/instrcut"')], [
        "34:13: gates.0: '*/instrcut' matches no variant; variants are called s/base",
    ]),
    ("export gate that matches nothing", [('"*/*/export.onnx-*"', '"*/*/export.onx-*"')], [
        "35:13: gates.1: '*/*/export.onx-*' matches no export; exports are called s/base/export.safetensors-bf16",
    ]),
    ("gate on an unscored variant", [(", eval: lm}", "}")], [
        "36:13: gates.2: 'base' is scored on nothing that could be compared; set 'suite' here, or variants.base.eval",
    ]),
    ("beats an unknown model", [("beats: base", "beats: bass")], [
        "34:34: gates.0.beats: no stage or variant is called 'bass'; did you mean 'base'?",
    ]),
    ("within without beats", [("require: {bits", "within: 0.1, require: {bits")], [
        "36:19: gates.2: 'within' needs 'beats'",
    ]),
    ("unknown gpu", [("gpu: h100-80g", "gpu: h100-90g")], [
        "40:14: backends.box.gpu: no accelerator is called 'h100-90g'; did you mean 'h100-80g'?",
    ]),
    ("grid that nobody knows", [("gpu: h100-80g", "grid: atlantis, gpu: h100-80g")], [
        "40:15: backends.box.grid: no grid `atlantis`: name one of world, europe, australia, austria, belgium, canada, czechia, denmark, estonia, finland, france, germany, netherlands, norway, poland, sweden, switzerland, united-kingdom, united-states, or kg CO2e for a kWh as a number",
    ]),
    ("grid in grams", [("gpu: h100-80g", "grid: 473, gpu: h100-80g")], [
        "40:15: backends.box.grid: grid is 473 kg CO2e for a kWh: it lies between 0 and 2 (France 0.044, Poland 0.615)",
    ]),
    ("gpu that is a cpu", [("gpu: h100-80g", "gpu: cpu")], [
        "40:14: backends.box.gpu: 'cpu' is no GPU; write it under 'use'",
    ]),
    ("place on an unknown backend", [('"m/pretrain": box', '"m/pretrain": bix')], [
        "41:40: place: no backend is called 'bix'; did you mean 'box'?",
    ]),
    ("place that matches nothing", [('"m/pretrain": box', '"m/pretran": box')], [
        "41:26: place: 'm/pretran' matches no step; did you mean 'm/pretrain'?",
    ]),
    ("repository with an unknown field", [("{family}-{size}", "{famly}-{size}")], [
        "42:41: release.repo: unknown field '{famly}'; did you mean 'family'?",
    ]),
    ("repository without variant", [("{size}{-variant}", "{size}")], [
        "42:41: release.repo: without {variant} all variants of a size would have one name; write {family}-{size}{-variant}",
    ]),
    ("repository without size", [("{family}-{size}", "{family}")], [
        "42:41: release.repo: without {size} all sizes would have one name; write {family}-{size}{-variant}",
    ]),
    ("repository that can't be", [('repo: "{org}/', 'repo: "../{org}/')], [
        "42:41: release.repo: this can't name a repository; letters, digits, and . _ - between fields such as {size}; one / after {org}",
    ]),
    ("brace without a partner", [('repo: "{org}/', 'repo: "{org/')], [
        "42:41: release.repo: a '{' or '}' has no partner; for example {family}-{size}{-variant}",
    ]),
    ("path that leaves the folder", [("path: release", "path: ../release")], [
        "42:26: release.path: '../release' leaves the output folder; use a folder name",
    ]),
    # --- embedders and rerankers
    ("embedder without a start", finders("emb: {kind: embed, data: pairs}", emb="b"), [
        "26:3: stages.emb: kind 'embed' starts from a trained model: 'from' is missing; write it, or lexical: {} to begin as a bag of words (bert)",
    ]),
    ("embedder without a start that nothing publishes", finders("emb: {kind: embed, data: pairs}"), [
        "26:3: stages.emb: kind 'embed' starts from a trained model: 'from' is missing; write it, or lexical: {} to begin as a bag of words (bert)",
    ]),
    ("embedder without a start at one of its sizes", finders("emb: {kind: embed, data: pairs, by: {b: {lexical: {}}}}", emb="b, s"), [
        "26:3: stages.emb: kind 'embed' starts from a trained model: 'from' is missing; write it, or lexical: {} to begin as a bag of words (bert)",
    ]),
    ("bag of words with a parent", finders(emb("lexical: {}"), emb="b"), [
        "26:51: stages.emb.lexical: a lexical start has no parent, and 'from' names one; keep one",
    ]),
    ("bag of words with a parent, at one size", finders(emb("by: {b: {lexical: {}}}"), emb="b"), [
        "26:60: stages.emb.by.b.lexical: a lexical start has no parent, and 'from' names one; keep one",
    ]),
    ("bag of words of a decoder", finders("emb: {kind: embed, data: pairs, lexical: {}}", emb="s, b"), [
        "26:35: stages.emb.lexical: only bert can begin as a bag of words, and size 's' is a qwen3; start from a trained model: set 'from'",
    ]),
    ("bag of words that is pooled elsewhere", finders("emb: {kind: embed, data: pairs, lexical: {}, pooling: mean}", emb="b"), [
        "26:57: stages.emb.pooling: a lexical start gathers the words in the first token, which 'mean' does not read; leave it out",
    ]),
    ("weight of no teacher", finders(emb("alpha: 0.3"), emb="s"), [
        "26:51: stages.emb.alpha: the weight of a teacher, and there is none; set teacher, or remove it",
    ]),
    ("weight of no teacher, in a group", finders(emb("by: {small: {alpha: 0.3}}"), emb="s"), [
        "26:64: stages.emb.by.small.alpha: the weight of a teacher, and there is none; set teacher, or remove it",
    ]),
    ("more dimensions than there are", finders(emb("mrl: [32, 96]"), emb="s, m"), [
        "26:61: stages.emb.mrl: 96 dimensions are more than the 64 of size 's'; at most 64",
    ]),
    ("more dimensions than there are, at one size", finders(emb("by: {b: {mrl: [65]}}"), emb="s, b"), [
        "26:66: stages.emb.by.b.mrl: 65 dimensions are more than the 64 of size 'b'; at most 64",
    ]),
    ("no dimensions", finders(emb("mrl: [32, 0]"), emb="s"), [
        "26:61: stages.emb.mrl.1: must be at least 1, not 0",
    ]),
    ("encoder made bidirectional", finders(emb("bidirectional: true"), emb="s, b"), [
        "26:66: stages.emb.bidirectional: bert sees both ways already (size b); it is for qwen3",
    ]),
    ("llama made bidirectional", [("type: qwen3", "type: llama"), *finders(emb("bidirectional: true"), emb="s")], [
        "26:66: stages.emb.bidirectional: llama can't be made to see what follows (size s); it is for qwen3",
    ]),
    ("decoder's first token", finders(emb("pooling: cls"), emb="b, s"), [
        "26:60: stages.emb.pooling: the first token of a qwen3 has seen nothing (size s); last, or mean",
    ]),
    ("loss of another objective", finders(rank("objective: pairwise, loss: listnet"), rank="s"), [
        "26:80: stages.rank.loss: 'listnet' is no loss of objective 'pairwise'; it has ranknet",
    ]),
    ("distilled reranker without a teacher", finders(rank("objective: distill"), rank="s"), [
        "26:64: stages.rank.objective: 'distill' needs 'teacher'; a reranker: variant@size or stage@size",
    ]),
    ("teacher of an objective without one", finders(EMB, RANK.replace("rank:", "judge:"), rank("teacher: judge"), rank="s"), [
        "28:53: stages.rank.teacher: objective 'pointwise' reads no teacher; set objective: distill",
    ]),
    ("embedder that learns from no embedder", finders(emb("teacher: base@m"), emb="s"), [
        "26:60: stages.emb.teacher: 'base@m' is of kind 'pretrain', and embedders learn from embedders",
    ]),
    ("reranker that learns from an embedder", finders(EMB, rank("objective: distill, teacher: emb@m"), rank="s"), [
        "27:82: stages.rank.teacher: 'emb@m' is of kind 'embed', and rerankers learn from rerankers",
    ]),
    ("embedder that learns from nobody", finders(emb("teacher: emd"), emb="s"), [
        "26:60: stages.emb.teacher: no stage or variant is called 'emd'; did you mean 'emb'?",
    ]),
    ("embedder that learns from itself", finders(emb("teacher: emb"), emb="s"), [
        "26:60: a step would need itself: s/emb <- s/emb; cut it at 'teacher'",
    ]),
    ("next token of an encoder", finders(rank("head: yes_no"), rank="s, b"), [
        "26:59: stages.rank.head: a bert says no next token (size b); use classifier",
    ]),
    ("negatives by nobody", finders(rank("hard_negatives: {by: emb}"), rank="s"), [
        "26:74: stages.rank.hard_negatives.by: no stage or variant is called 'emb'; known: base, dpo, instruct, kd, pretrain, rank, sft, v-rank",
    ]),
    ("negatives by a language model", finders(EMB, rank("hard_negatives: {by: base}"), rank="s"), [
        "27:74: stages.rank.hard_negatives.by: 'base' is of kind 'distill', and embedders mine; known: bm25, emb",
    ]),
    ("negatives by a language model, at one size", finders(EMB, rank("by: {m: {hard_negatives: {by: sft}}}"), rank="s, m"), [
        "27:83: stages.rank.by.m.hard_negatives.by: 'sft' is of kind 'sft', and embedders mine; known: bm25, emb",
    ]),
    ("negatives by what is not made at a size", finders(EMB, rank("hard_negatives: {by: v-emb}"), emb="s", rank="s, m"), [
        "27:74: stages.rank.hard_negatives.by: variant 'v-emb' is not made at size 'm'; write v-emb@s",
    ]),
    ("negatives by the embedder that needs them", finders(emb("hard_negatives: {by: emb}"), emb="s"), [
        "26:67: a step would need itself: s/emb <- s/emb; cut it at 'hard_negatives'",
    ]),
    ("negatives by an embedder that starts from it", finders(emb("hard_negatives: {by: emb2}"), "emb2: {kind: embed, from: emb, data: pairs}", emb="s"), [
        "27:29: a step would need itself: s/emb <- s/emb2 <- s/emb; cut it at 'from'",
    ]),
    ("prompts that a later stage loses", finders(emb("prompts: {query: 'find: '}"), "emb2: {kind: embed, from: emb, data: pairs}", emb2="s, m"), [
        "27:3: stages.emb2: 'emb' was trained with prompts, and this stage has none; write the same, or prompts: {}",
    ]),
    ("pooling that a later stage loses", finders("emb: {kind: embed, data: pairs, lexical: {}}", "emb2: {kind: embed, from: emb, data: pairs}", emb2="b"), [
        "27:3: stages.emb2: 'emb' was trained with pooling cls, and this stage would have mean; write pooling: cls",
    ]),
    ("words that later stages read otherwise", finders(emb("text: words"), "emb2: {kind: embed, from: emb, data: pairs}", "rank: {kind: rerank, from: v-emb, data: pairs}", emb="s", emb2="s, m", rank="s"), [
        "27:3: stages.emb2: 'emb' was trained with text words, and this stage would have as_is; write text: words",
        "28:3: stages.rank: 'emb' was trained with text words, and this stage would have as_is; write text: words",
    ]),
    ("sight that a later stage loses", finders(emb("bidirectional: true"), "emb2: {kind: embed, from: emb, data: pairs}", emb2="s"), [
        "27:3: stages.emb2: 'emb' was trained with bidirectional true, and this stage would have false; write bidirectional: true",
    ]),
    ("what is not for embedders", finders(emb("tokens: 5k, batch_tokens: 8192, lora: {r: 4}, rope_theta: 1e6"), emb="s"), [
        "26:51: stages.emb.tokens: not for this kind; set steps or epochs",
        "26:63: stages.emb.batch_tokens: not for this kind; set global_batch",
        "26:83: stages.emb.lora: not for this kind yet",
        "26:97: stages.emb.rope_theta: not for this kind; it keeps the parent's positions",
    ]),
    ("what is not for rerankers, at one size", finders(rank("by: {s: {tokens: 5k}}"), rank="s"), [
        "26:62: stages.rank.by.s.tokens: not for this kind; set steps or epochs",
    ]),
    ("text for an embedder", finders("emb: {kind: embed, from: pretrain, data: docs}", emb="s"), [
        "26:44: stages.emb.data: 'docs' is of format 'text', kind 'embed' reads pairs; for example pairs",
    ]),
    ("reranker without a parent", finders("rank: {kind: rerank, data: pairs}", rank="s"), [
        "26:3: stages.rank: kind 'rerank' starts from a trained model: 'from' is missing; write it, or lexical: {} to begin with the query's words (bert)",
    ]),
    ("reranker that begins with words, and with a parent", finders(rank("lexical: {}"), rank="b"), [
        "26:53: stages.rank.lexical: a lexical start has no parent, and 'from' names one; keep one",
        "26:53: stages.rank.lexical: a lexical start needs a bert with 2 or more layers, 1 head and hidden 32 or more; size 'b' has 2 layers, 2 heads, hidden 64 (bert); give the size arch: bert, layers: 2, heads: 1",
    ]),
    ("words of a reranker that is a decoder", finders("rank: {kind: rerank, data: pairs, lexical: {}}", rank="s"), [
        "26:37: stages.rank.lexical: a lexical start needs a bert with 2 or more layers, 1 head and hidden 32 or more; size 's' has 2 layers, 2 heads, hidden 64 (qwen3); give the size arch: bert, layers: 2, heads: 1",
    ]),
    ("no negative", finders(rank("hard_negatives: {k: 0}"), rank="s"), [
        "26:73: stages.rank.hard_negatives.k: must be at least 1, not 0",
    ]),
    ("misspelt objective", finders(rank("objective: pairwse"), rank="s"), [
        "26:64: stages.rank.objective: unknown value 'pairwse'; did you mean 'pairwise'?",
    ]),
    ("block size of an embedder's int8", finders(EMB, emb="s") + exported("v-emb", "s", "onnx, quant: int8, block_size: 32"), [
        "35:64: exports.0: 'block_size' is for onnx int4, and language models; s/v-emb is for feature-extraction; remove it",
    ]),
    ("options of language models on an embedder", finders(EMB, emb="s") + exported("v-emb", "s", "onnx, quant: int4, lm_head: int8, embeddings: int8, calibrate: {data: qa}, mixed: {max_drop: 0.01}"), [
        "35:64: exports.0: 'lm_head' is for language models; s/v-emb is for feature-extraction; remove it",
        "35:79: exports.0: 'embeddings' is for language models; s/v-emb is for feature-extraction; remove it",
        "35:97: exports.0: 'calibrate' is for language models; s/v-emb is for feature-extraction; remove it",
        "35:120: exports.0: 'mixed' is for language models; s/v-emb is for feature-extraction; remove it",
    ]),
    ("options of language models on an embedder among them", [*finders(EMB, emb="s"), ("variants: [instruct], sizes: both", "variants: [instruct, v-emb], sizes: both, lm_head: int4")], [
        "36:48: exports.1: 'lm_head' is for language models; s/v-emb is for feature-extraction; remove it, or export v-emb on its own",
    ]),
    ("calibrated int4 of an embedder", finders(EMB, emb="s") + exported("v-emb", "s", "onnx, quant: int4, algorithm: gptq"), [
        "35:75: exports.0: gptq looks at data, as only language models' exports do; s/v-emb is for feature-extraction; take k_quant, rtn or hqq",
    ]),
    ("no symmetric search for zero points in an embedder", finders(EMB, emb="s") + exported("v-emb", "s", "onnx, quant: int4, algorithm: hqq, symmetric: true"), [
        "35:91: exports.0: hqq searches for zero points, so it can't be symmetric; leave symmetric out, or take rtn",
    ]),
    ("gptq of an embedder", finders(EMB, emb="s") + exported("v-emb", "s", "gptq, bits: 4, calibrate: {data: qa}"), [
        "35:45: exports.0: gptq 4 does not support feature-extraction models of architecture 'qwen3' (size s); the nearest that is supported is gguf q4_0; also gguf q4_k_m, onnx int4, gguf q8_0, onnx int8, safetensors bf16, gguf f16, safetensors fp32, onnx fp32",
    ]),
    ("awq of a reranker", finders(RANK, rank="b") + exported("v-rank", "b", "awq, bits: 4, calibrate: {data: qa}"), [
        "35:46: exports.0: awq 4 does not support text-ranking models of architecture 'bert' (size b); the nearest that is supported is onnx int4; also onnx int8, safetensors bf16, safetensors fp32, onnx fp32",
    ]),
    ("fp16 of an embedder", finders(EMB, emb="s") + exported("v-emb", "s", "onnx, quant: fp16"), [
        "35:45: exports.0: onnx fp16 does not support feature-extraction models of architecture 'qwen3' (size s); the nearest that is supported is onnx int8; also onnx int4, onnx fp32, safetensors bf16, gguf f16, gguf q8_0, gguf q4_k_m, gguf q4_0, safetensors fp32",
    ]),
    ("gguf of an embedder that reads words", finders(emb("text: words"), emb="s") + exported("v-emb", "s", "gguf, quant: [f16, q8_0]"), [
        "35:45: exports.0: no GGUF of s/v-emb: its tokenizer lower-cases and splits (text: words), and llama.cpp can't normalise text; onnx can do it: its tokenizer does; or train it with text: as_is",
    ]),
    ("gguf of an embedder that reads words at one size", finders(emb("by: {m: {text: words}}"), emb="s, m") + exported("v-emb", "s, m", "gguf, quant: f16"), [
        "35:48: exports.0: no GGUF of m/v-emb: its tokenizer lower-cases and splits (text: words), and llama.cpp can't normalise text; onnx can do it: its tokenizer does; or train it with text: as_is",
    ]),
    ("gguf of a reranker that sees both ways", finders(emb("bidirectional: true"), "rank: {kind: rerank, from: emb, data: pairs}", rank="s") + exported("v-rank", "s", "gguf, quant: f16"), [
        "36:46: exports.0: no GGUF of s/v-rank: its tokens see what follows, and llama.cpp then reads the score off the first one; onnx can do it",
    ]),
    ("gguf of a bert that reranks", finders(RANK, rank="b") + exported("v-rank", "b", "gguf, quant: f16"), [
        "35:46: exports.0: gguf f16 does not support text-ranking models of architecture 'bert' (size b); the nearest that is supported is safetensors bf16; also onnx int8, onnx int4, safetensors fp32, onnx fp32",
    ]),
    ("int4 of a masked language model", finders("mlm: {kind: pretrain, data: text}", mlm="b") + exported("v-mlm", "b", "onnx, quant: int4"), [
        "35:45: exports.0: onnx int4 does not support fill-mask models of architecture 'bert' (size b); the nearest that is supported is safetensors bf16; also safetensors fp32",
    ]),
    # --- installed packages
    ("package twice", [("    qa:    {", "    lib:   {installed: [torch, scikit-learn, SciKit_Learn, torch]}\n    qa:    {")], [
        "15:46: data.sources.lib.installed: 'SciKit_Learn' is package 'scikit-learn' again; remove it",
        "15:60: data.sources.lib.installed: 'torch' is there twice; remove it",
    ]),
    ("no package", [("    qa:    {", "    lib:   {installed: []}\n    qa:    {")], [
        "15:13: data.sources.lib.installed is empty; write at least one",
    ]),
    ("package that is none", [("    qa:    {", "    lib:   {installed: [torch, ../torch]}\n    qa:    {")], [
        "15:32: data.sources.lib.installed.1: '../torch' can't be a name; use letters, digits, and . _ - inside",
    ]),
    ("one package without a list", [("    qa:    {", "    lib:   {installed: torch}\n    qa:    {")], [
        "15:24: data.sources.lib.installed: expected a list, not 'torch'",
    ]),
    ("packages of another format", [("    qa:    {", "    lib:   {installed: [torch], format: text}\n    qa:    {")], [
        "15:41: data.sources.lib: installed is of format 'pairs', not 'text'; remove 'format'",
    ]),
    ("packages beside a file", [("    qa:    {", "    lib:   {installed: [torch], path: docs.jsonl}\n    qa:    {")], [
        "15:5: data.sources.lib comes from path and installed; give one of path, hf, pystdlib, installed, synth",
    ]),
]
# fmt: on


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what some mistakes need: a template, a tokenizer and a checkpoint that do not fit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.jinja").write_text("{{ messages }}")
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer_config.json").write_text("{}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text('{"vocab_size": 999}')
    return tmp_path


def mistakes_in(text: str) -> list[str]:
    """The lines of the error that a spec brings, without the file's name."""
    file = Path("family.yaml")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError) as error:
        open_family(file)
    return [line.removeprefix("family.yaml:") for line in error.value.render().splitlines()]


@pytest.mark.parametrize(("edits", "expected"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
@pytest.mark.usefixtures("folder")
def test_mistake_is_told_with_place_and_cure(edits: list[tuple[str, str]], expected: list[str]) -> None:
    text = SPEC
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    assert mistakes_in(text) == expected


@pytest.mark.usefixtures("folder")
def test_embedders_and_rerankers_without_a_mistake() -> None:
    """What the cases above change: were it wrong itself, they would show nothing."""
    text = SPEC
    more = "emb2: {kind: embed, from: emb, data: pairs, prompts: {}, pooling: mean}"
    lexical = "bag: {kind: embed, data: pairs, lexical: {}}"
    for old, new in finders(EMB, more, lexical, RANK, emb="s, m, b", emb2="b", bag="b", rank="s, m, b"):
        text = text.replace(old, new)
    Path("family.yaml").write_text(text)
    assert {"b/bag", "b/emb2", "m/rank"} <= set(open_family(Path("family.yaml")).nodes)


@pytest.mark.usefixtures("folder")
def test_base_spec_has_no_mistake() -> None:
    Path("family.yaml").write_text(SPEC)
    assert len(open_family(Path("family.yaml")).nodes) == 50


def test_table_has_no_case_twice() -> None:
    assert len({name for name, _, _ in MISTAKES}) == len(MISTAKES)
