"""What a user may write: one frozen model a section of the YAML. Pure declarations; load.py turns text into
them.

Unknown keys are errors everywhere. Stages are declared in famc/steps (one file a kind); here stands what
they share. Nothing here bears identity by itself: graph.py hands each step the values that can change its
output, and only those.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, StringConstraints

from famc.spec.quantity import Bytes, Count

# Names become folder names, repository names and words in scripts: letters, digits, and - _ . inside.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?$")]
# A format's value: text, or a list of it; always a tuple afterwards.
Some = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]


class Strict(BaseModel):
    """Frozen; an undeclared key is an error, and so is a value of another type: `true` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class About(Strict):
    """Who the family is."""

    name: Name = Field(description="name of the family: the first part of every released model's name")
    org: Name = Field("local", description="organisation, used in repository names")
    license: str = Field("unknown", description="SPDX id of the released models' licence")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="every random choice follows from it")
    languages: tuple[str, ...] = Field(("en",), description="ISO 639 codes for the cards")


class Arch(Strict):
    """The architecture that sizes share, unless they name another."""

    type: str = Field(description="Hugging Face model_type: qwen3, qwen3_moe, llama; bert, modernbert; t5")
    head_dim: int | None = Field(
        None,
        ge=2,
        le=1024,
        description="width of one attention head; default, and always in bert and modernbert, hidden / heads",
    )
    vocab_pad: int | None = Field(
        None, ge=1, le=2**24, description="rows of the embedding: one for the whole family"
    )
    context: int = Field(2048, ge=8, le=2**24, description="positions at pretraining")
    rope_theta: float | None = Field(
        None,
        gt=0,
        description="base of the rotary position embedding; default 10000, in modernbert's global layers 160000",
    )


class MoeSize(Strict):
    """Experts of a mixture-of-experts size."""

    experts: int = Field(ge=1, le=65536, description="experts a layer")
    active: int = Field(ge=1, le=65536, description="experts that a token is routed to")
    ffn: int = Field(ge=1, le=2**20, description="intermediate size of one expert")


class Size(Strict):
    """One shape: explicit dimensions, or a preset, or a parameter count that famc solves."""

    arch: str | None = Field(
        None, description="another architecture for this size: bert, modernbert, t5; default: arch.type"
    )
    layers: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="transformer blocks; of t5 in the encoder, and as many in the decoder",
    )
    hidden: int | None = Field(None, ge=8, le=2**20, description="hidden_size")
    ffn: int | None = Field(
        None, ge=8, le=2**22, description="intermediate_size of the dense feed-forward (d_ff of t5)"
    )
    heads: int | None = Field(None, ge=1, le=4096, description="attention heads")
    kv_heads: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="key/value heads; default, and always outside decoders, as many as heads",
    )
    tie: bool | None = Field(
        None,
        description="share the embedding with the output head; default false; bert, modernbert, t5: always",
    )
    moe: MoeSize | None = Field(None, description="experts instead of a dense feed-forward (arch qwen3_moe)")
    preset: str | None = Field(None, description="a published shape, e.g. qwen3-0.6b")
    params: Count | None = Field(
        None, description="total parameters: famc solves the dimensions and prints them"
    )


class TrainOn(Strict):
    """What the tokenizer learns its merges from."""

    mix: str = Field(description="a mix or source")
    bytes: Bytes = Field(20_000_000, description="at most so much text, sampled evenly")


class TokenizerSpec(Strict):
    """The one tokenizer of the family."""

    kind: Literal["bbpe"] = Field("bbpe", description="byte-level BPE with Qwen's pre-tokenizer")
    vocab: int | None = Field(None, ge=300, le=2**22, description="entries, special tokens included")
    train_on: TrainOn | None = Field(None, description="what to learn merges from")
    chat_template: str | None = Field(None, description="a Jinja file; default: ChatML with generation marks")
    adopt: str | None = Field(None, description="folder of an existing tokenizer, instead of training one")


class HeldOut(Strict):
    """What a source keeps back for evaluation."""

    by: Literal["document", "group"] = Field(
        "group", description="unit that is never split: the document, or its group"
    )
    fraction: float = Field(0.1, ge=0, lt=1, description="share of units kept back")


class Source(Strict):
    """Where text comes from. One of path, hf, pystdlib, installed, synth."""

    path: str | None = Field(
        None, description="file, folder or glob: jsonl(.gz), parquet, arrow, txt, md, py"
    )
    hf: str | None = Field(None, description="dataset on the Hugging Face hub; needs revision")
    revision: str | None = Field(
        None, description="commit of the hub dataset: pinned, so that data can't move"
    )
    split: str = Field("train", description="split of the hub dataset")
    pystdlib: (
        Literal["source", "docs", "questions", "preferences", "sentences", "names", "summaries"] | None
    ) = Field(
        None,
        description="the interpreter's own standard library: text (source, docs), conversations (questions, "
        "summaries), preferences, or pairs of query and docstring (sentences, names)",
    )
    installed: tuple[Name, ...] | None = Field(
        None,
        min_length=1,
        description="docstrings of installed Python packages, as pairs: dotted name and docstring, first "
        "sentence and the rest; packages as pip calls them: [torch, scikit-learn]",
    )
    synth: str | None = Field(None, description="a generator: arithmetic, retrieval_pairs, …")
    n: Count | None = Field(None, ge=1, description="examples that a generator makes, or at most reads")
    from_: str | None = Field(None, alias="from", description="source that a generator starts from")
    by: str | None = Field(None, description="variant@size whose model generates")
    keep: dict[str, float] | None = Field(
        None, description="filters on generated examples, e.g. {cosine: 0.7}"
    )
    format: Literal["text", "messages", "preference", "prompts", "pairs", "image_text", "audio_text"] = Field(
        "text", description="what one record holds"
    )
    text_field: str = Field("text", description="column that holds the text of a text source")
    group_field: str | None = Field(
        None, description="column whose value is never split over train and held-out"
    )
    rate: int | None = Field(None, ge=1000, le=384000, description="sample rate of audio, Hz")
    clean: str = Field(
        "none", description="cleaning recipe: a name in data.clean, or built in: none, text, web, code"
    )
    heldout: HeldOut = Field(HeldOut(), description="what is kept back for evaluation")
    license: str | None = Field(None, description="licence of the data, for the cards")


class Mix(Strict):
    """Sources by weight, to an exact number of tokens."""

    tokens: Count | None = Field(
        None, ge=1, description="tokens of the packed mixture; default: everything once"
    )
    weights: dict[str, float] = Field(description="share by source, or by source.tier; relative")
    max_epochs: float = Field(
        4.0, gt=0, le=1000, description="a source repeated more often than this is an error"
    )
    lengths: dict[str, float] | None = Field(
        None, description="share of documents by length in tokens, e.g. {4k-16k: 1}"
    )


class Data(Strict):
    """Sources, how they are cleaned, and how they are mixed."""

    clean: dict[Name, tuple[Any, ...]] = Field({}, description="named, ordered recipes of filters")
    sources: dict[Name, Source] = Field({}, description="where text comes from")
    mixes: dict[Name, Mix] = Field({}, description="sources by weight")


class StageSpec(Strict):
    """What every stage has in common. Its kind (famc/steps) declares the rest."""

    kind: str = Field(description="what the stage does")
    from_: str | None = Field(None, alias="from", description="stage, or variant@size, that it starts from")
    by: dict[str, dict[str, Any]] = Field({}, description="other values by group, size or backend")

    @classmethod
    def references(cls) -> dict[str, str]:
        """Fields whose value names something else in the spec: field -> `stage`, `variant`, `data`."""
        return {"from": "stage"}


class Variant(Strict):
    """What is published: a stage's result at some sizes."""

    stage: str | dict[str, str] = Field(description="a stage, or stages by size or group")
    sizes: str | tuple[str, ...] = Field("all", description="all, a group, or a list of sizes and groups")
    eval: str | None = Field(None, description="the suite that scores it: a name in evals, or built in")


class EvalTask(Strict):
    """One measurement of a suite."""

    task: Literal[
        "bits_per_byte", "answers", "preference", "lm_eval", "fill_mask", "retrieval", "rerank", "mteb"
    ] = Field(description="what is measured")
    data: str | None = Field(
        None, description="source whose held-out part is used; default: what the variant trained on"
    )
    n: int | None = Field(None, ge=1, le=10**7, description="examples at most")
    max_new_tokens: int = Field(64, ge=1, le=32768, description="tokens that a generated answer may have")
    top: int = Field(
        50, ge=1, le=10_000, description="rerank: passages of the first stage that are read again"
    )
    tasks: tuple[str, ...] = Field(
        (), description="names of tasks: of lm-evaluation-harness (lm_eval), or of MTEB (mteb)"
    )


class Calibrate(Strict):
    """Data that a calibrated quantisation looks at."""

    data: Some = Field(description="a source or mix, or a list of them, of text or conversations")
    n: int = Field(512, ge=1, le=10**6, description="examples in all: conversations, or rows of text")


class Mixed(Strict):
    """Matrices that stay at 8 bits: the most sensitive ones, as many as it takes."""

    max_drop: float = Field(
        gt=0, le=1, description="perplexity on the calibration data may rise by this share (0.01 = 1 %)"
    )


class Export(Strict):
    """Formats made from variants."""

    variants: tuple[str, ...] = Field(description="variants that are exported")
    sizes: str | tuple[str, ...] = Field("all", description="all, a group, or a list")
    format: Literal["safetensors", "onnx", "gguf", "gptq", "awq", "fp8"] = Field(description="file format")
    quant: Some = Field((), description="onnx: fp32, fp16, int8, int4; gguf: q4_k_m, q8_0 …")
    bits: int | None = Field(None, ge=2, le=16, description="gptq, awq: bits of a weight")
    block_size: int | None = Field(
        None,
        ge=16,
        le=256,
        description="weights that share a scale; default: 64, gptq and awq 128, as far as the shape divides",
    )
    algorithm: Literal["rtn", "k_quant", "hqq", "gptq", "awq"] | None = Field(
        None, description="how int4 codes are found; default: k_quant, with `calibrate` gptq"
    )
    symmetric: bool | None = Field(
        None, description="int4 without zero points; default: as the algorithm has it"
    )
    lm_head: Literal["int4", "int8", "fp32"] | None = Field(
        None, description="output head of onnx int8 and int4; default int8"
    )
    embeddings: Literal["int4", "int8", "fp32"] | None = Field(
        None, description="embedding of onnx int8 and int4; default int8; a tied one shares the head's"
    )
    calibrate: Calibrate | None = Field(None, description="the family's own data, for gptq, awq and mixed")
    mixed: Mixed | None = Field(None, description="keep the most sensitive matrices of an int4 at 8 bits")
    target: Some = Field((), description="what it must run on: cpu, cuda, or a name in targets")


class Parity(Strict):
    """How far an export may be from its source."""

    tokenizer: Literal["exact"] | None = Field(None, description="ids equal on held-out text")
    template: Literal["exact"] | None = Field(None, description="rendered conversation equal")
    kl: float | None = Field(None, ge=0, description="mean KL divergence per token, nats, at most")
    perplexity: float | None = Field(
        None, ge=0, description="relative rise of perplexity, at most (0.03 = 3 %)"
    )
    greedy: float | None = Field(None, ge=0, le=1, description="share of greedy answers that must be equal")
    cosine: float | None = Field(
        None, ge=-1, le=1, description="embedders: mean cosine of vectors to the source's, at least"
    )
    ranking: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="embedders, rerankers: Kendall's tau of rankings to the source's, at least",
    )
    ndcg: float | None = Field(
        None, ge=0, description="embedders, rerankers: relative drop of nDCG@10, at most (0.02 = 2 %)"
    )


class MaxDrop(Strict):
    """How much worse an export may score: points, beyond sigma standard errors."""

    points: float = Field(ge=0, description="points of 100, for scores between 0 and 1")
    sigma: float = Field(2.0, ge=0, description="a drop within so many standard errors is noise")


class Bound(Strict):
    """Limits of one metric."""

    min: float | None = Field(None, description="at least")
    max: float | None = Field(None, description="at most")


class Gate(Strict):
    """A condition that must hold before release."""

    match: str = Field(description="glob over addresses: */instruct, */*/export.*, or a variant's name")
    name: Name | None = Field(None, description="what the gate is called; default: from its condition")
    parity: Parity | None = Field(None, description="an export against its source")
    max_drop: MaxDrop | None = Field(None, description="an export's scores against its source's")
    require: dict[str, Bound] | None = Field(
        None, description="limits by metric, e.g. {bits_per_byte: {max: 1.6}}"
    )
    beats: str | None = Field(
        None, description="variant, or stage, that it must score better than at the same size"
    )
    metrics: tuple[str, ...] = Field(
        (), description="metrics that must be better; default: the suite's main one"
    )
    suite: str | None = Field(None, description="suite that both are scored on")
    within: float | None = Field(
        None, ge=0, description="with beats: may be worse by this share (0.02 = 2 %)"
    )
    across: Literal["sizes"] | None = Field(None, description="compare sizes with each other")
    monotonic: str | None = Field(None, description="suite on which a bigger size must not score worse")


class BackendUse(Strict):
    """Hardware that this family may use."""

    use: str | None = Field(None, description="a YAML of backends/, or one beside the spec")
    gpu: str | None = Field(None, description="accelerator: a YAML of backends/")
    per_node: int = Field(1, ge=1, le=1024, description="accelerators a node")
    nodes: int = Field(1, ge=1, le=100_000, description="nodes at most")
    cpu: int | None = Field(None, ge=1, le=4096, description="cores; default: those of this machine")
    ram: Bytes | None = Field(None, description="memory for famc's jobs; default: this machine's")
    scheduler: Literal["local", "slurm", "kubernetes", "skypilot"] = Field(
        "local", description="how jobs start"
    )
    partition: Name | None = Field(None, description="Slurm partition")
    runtime: Literal["accelerate", "any"] = Field(
        "accelerate",
        description="what a layout may use: accelerate: FSDP2/HSDP, TP and CP, which famc's trainers run; any: PP and EP too, planned only",
    )
    usd_per_gpu_hour: float | None = Field(None, ge=0, description="price of one accelerator-hour")
    usd_per_hour: float | None = Field(None, ge=0, description="price of one node-hour")
    grid: str | float | None = Field(
        None,
        description="where electricity comes from: a country, or kg CO2e for a kWh; default: the world's average",
    )


class Target(Strict):
    """A device that exports must fit on."""

    device: str | None = Field(None, description="what it is: a YAML of backends/, or one beside the spec")
    memory: Bytes | None = Field(
        None,
        description="memory for weights and KV cache; default: what the device leaves beside the runtime",
    )
    context: int = Field(4096, ge=1, le=2**24, description="tokens of KV cache that must fit")


class Release(Strict):
    """Where the finished family goes."""

    to: Literal["dir", "hf"] = Field("dir", description="a folder, or the Hugging Face hub")
    path: str = Field("release", description="folder below --out")
    repo: str = Field("{family}-{size}{-variant}", description="name of a released model")
    collection: bool = Field(True, description="write family.json, the index of the release")
    card: Literal["auto", "none"] = Field("auto", description="write a model card")
    dry_run: bool = Field(True, description="prepare the upload but do not send it (to: hf)")


class Family(Strict):
    """The whole spec."""

    famc: Literal[1] = Field(description="version of this language")
    family: About = Field(description="who the family is")
    arch: Arch = Field(description="the architecture")
    sizes: dict[Name, Size] = Field(min_length=1, description="shapes by name")
    groups: dict[Name, tuple[str, ...]] = Field({}, description="sizes by a common name")
    tokenizer: TokenizerSpec = Field(TokenizerSpec(), description="the tokenizer")
    data: Data = Field(Data(), description="sources, recipes, mixes")
    stages: dict[Name, StageSpec] = Field(
        min_length=1, description="recipes without a size; edges are `from`"
    )
    variants: dict[Name, Variant] = Field(min_length=1, description="what is published")
    evals: dict[Name, tuple[EvalTask, ...]] = Field({}, description="suites by name")
    exports: tuple[Export, ...] = Field((), description="formats")
    gates: tuple[Gate, ...] = Field((), description="conditions")
    targets: dict[Name, Target] = Field({}, description="devices that exports must fit on")
    backends: dict[Name, BackendUse] = Field({}, description="hardware")
    place: dict[str, str] = Field(
        {}, description="backend by glob over step addresses; `default` for the rest"
    )
    release: Release = Field(Release(), description="where the family goes")
    profiles: dict[Name, dict[str, Any]] = Field({}, description="named sets of overrides: path -> value")

    # what sizes_of found: a pure function of a frozen value, asked thousands of times for a large family
    _meant: dict[str | tuple[str, ...], dict[str, None]] = PrivateAttr(default_factory=dict)

    def sizes_of(self, wanted: str | tuple[str, ...]) -> tuple[str, ...]:
        """Sizes that `all`, a group, or a list of sizes and groups means, in the spec's order. Unknown names
        are left out.
        """
        if wanted not in self._meant:
            names = (wanted,) if isinstance(wanted, str) else wanted
            chosen: set[str] = set()
            for name in names:
                chosen.update(self.sizes if name == "all" else self.groups.get(name, (name,)))
            self._meant[wanted] = {size: None for size in self.sizes if size in chosen}
        return tuple(self._meant[wanted])

    def stage_of(self, variant: str, size: str) -> str | None:
        """The stage whose result the variant publishes at a size; None where the variant has no such size."""
        spec = self.variants[variant]
        self.sizes_of(spec.sizes)
        if size not in self._meant[spec.sizes]:
            return None
        if isinstance(spec.stage, str):
            return spec.stage
        if size in spec.stage:  # a size's own line wins over its group's
            return spec.stage[size]
        return next(
            (stage for group, stage in spec.stage.items() if size in self.groups.get(group, ())), None
        )
