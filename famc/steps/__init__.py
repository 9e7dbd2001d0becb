"""LIGHT side of every kind of step: its parameters, what it reads, how much work it is. No torch.

base.py: what stages share, and the defaults an expert would choose. One file a stage: adopt, pretrain, sft, dpo, distill,
embed, rerank (retrieval.py: what these two share; mine.py: the negatives that they ask for);
later.py: kinds that can be planned but not run yet. corpus.py: sources and filters. others.py: tokenizer, mix, export,
parity, eval, gate, card, release. The table below is the whole registry: a new kind is one file here, one in famc/work, one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from famc.spec.family import StageSpec
from famc.steps.adopt import Adopt
from famc.steps.distill import Distill
from famc.steps.dpo import Dpo
from famc.steps.embed import Embed
from famc.steps.later import LATER
from famc.steps.pretrain import Pretrain
from famc.steps.rerank import Rerank
from famc.steps.sft import Sft


@dataclass(frozen=True, slots=True)
class Kind:
    """One line of the table. `version` rises when a worker's output for equal parameters changes: keys change with it."""

    version: int
    worker: str | None  # module of famc.work with `run(job)`; None: planned only
    stage: type[StageSpec] | None
    about: str


KINDS: dict[str, Kind] = {
    "corpus": Kind(1, "corpus", None, "a source, cleaned and split"),
    "tokenizer": Kind(1, "tokenizer", None, "byte-level BPE and the chat template"),
    "mix": Kind(1, "mix", None, "sources by weight, decontaminated, packed to an exact number of tokens"),
    "adopt": Kind(2, "adopt", Adopt, "an existing checkpoint"),
    "pretrain": Kind(1, "pretrain", Pretrain, "next-token prediction, from scratch or continued"),
    "sft": Kind(1, "sft", Sft, "supervised fine-tuning on conversations"),
    "dpo": Kind(1, "dpo", Dpo, "direct preference optimisation"),
    "distill": Kind(1, "distill", Distill, "a size learns from another"),
    "mine": Kind(1, "mine", None, "hard negatives for a mix of pairs"),
    "embed": Kind(1, "embed", Embed, "an embedder: contrastive, by sentence-transformers"),
    "rerank": Kind(2, "rerank", Rerank, "a cross-encoder: how well a passage answers a query"),
    **{name: Kind(1, None, model, (model.__doc__ or "").strip()) for name, model in LATER.items()},
    "export": Kind(3, "export", None, "a variant in another format"),
    "parity": Kind(1, "parity", None, "an export, reloaded and compared with its source"),
    "eval": Kind(1, "evaluate", None, "a suite of measurements"),
    "gate": Kind(1, "gate", None, "a condition that must hold"),
    "card": Kind(3, "card", None, "the model card"),
    "release": Kind(2, "release", None, "a variant's finished folder"),
}
STAGES: Mapping[str, type[StageSpec]] = {name: kind.stage for name, kind in KINDS.items() if kind.stage}
