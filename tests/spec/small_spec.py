"""A small valid spec that uses most of the language. The tests make one mistake in it at a time."""

SPEC = """\
famc: 1
family: {name: pocket, org: me, license: mit, seed: 7, languages: [en]}
arch: {type: qwen3, head_dim: 32, vocab_pad: 2048, context: 128}
sizes:
  s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}
  m: {layers: 4, hidden: 128, ffn: 256, heads: 4, kv_heads: 2, tie: true}
groups: {small: [s], both: [s, m]}
tokenizer: {vocab: 2000, train_on: {mix: text, bytes: 2MB}}
data:
  clean:
    tidy: [normalize, {length: {min: 20}}, {decontaminate: {ngram: 13}}]
  sources:
    code:  {pystdlib: source, clean: tidy, heldout: {by: group, fraction: 0.2}}
    docs:  {pystdlib: docs, clean: text}
    qa:    {pystdlib: questions}
    prefs: {pystdlib: preferences}
  mixes:
    text: {tokens: 200k, weights: {code: 3, docs: 1}, max_epochs: 4}
stages:
  pretrain: {kind: pretrain, data: text, batch_tokens: 1024, lr: {peak: 1e-3, schedule: wsd}}
  kd:    {kind: distill, data: text, teacher: pretrain@m, by: {small: {alpha: 0.7}}}
  sft:   {kind: sft, from: base, data: qa, epochs: 2}
  dpo:   {kind: dpo, from: sft, data: prefs, beta: 0.1}
variants:
  base: {stage: {m: pretrain, s: kd}, sizes: all, eval: lm}
  instruct: {stage: dpo, sizes: [s, m], eval: chat}
evals:
  lm: [{task: bits_per_byte, data: docs, n: 20}]
  chat: [{task: answers, data: qa, n: 10}, {task: preference, data: prefs}]
exports:
  - {variants: [base], format: safetensors, quant: bf16}
  - {variants: [instruct], sizes: both, format: onnx, quant: [fp32, int4], target: [cpu, phone]}
gates:
  - {match: "*/instruct", beats: base, suite: chat, metrics: [answer_loss]}
  - {match: "*/*/export.onnx-*", parity: {tokenizer: exact, kl: 0.05}}
  - {match: base, require: {bits_per_byte: {max: 8.0}}}
targets: {phone: {memory: 1GB, context: 128}}
backends:
  laptop: {cpu: 2, ram: 8GB}
  box: {gpu: h100-80g, per_node: 8, usd_per_gpu_hour: 2.5}
place: {default: laptop, "m/pretrain": box}
release: {to: dir, path: release, repo: "{org}/{family}-{size}{-variant}", card: auto}
profiles:
  quick: {data.mixes.text.tokens: 50k, stages.sft.epochs: 1}
"""
