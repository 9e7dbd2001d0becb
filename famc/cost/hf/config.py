"""The anatomy of a model that Hugging Face's config.json describes.

In: the mapping that the file holds. Out: an Anatomy with the weights that transformers builds from it (5.23), difference 0
in the tests. transformers itself is not imported: what a file leaves out is in `data/hf_defaults.json`. Bears no identity.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from famc.cost.anatomy import Anatomy
from famc.cost.hf.decoders import DECODERS
from famc.cost.hf.encoders import ENCODERS, audio_encoder
from famc.cost.hf.media import ANY_SIZE, IMAGE, MEDIA
from famc.cost.hf.read import Config
from famc.cost.hf.text import decoder
from famc.cost.hf.vision import VISION

MODEL_TYPES = tuple(sorted({*DECODERS, *ENCODERS, *VISION, *MEDIA, *ANY_SIZE, "qwen2_audio_encoder"}))
"""`model_type`s that famc counts."""
_TASKS = (
    ("ForCausalLM", "lm"),
    ("ForConditionalGeneration", "lm"),
    ("ForMaskedLM", "lm"),
    ("LMHeadModel", "lm"),
    ("ForPreTraining", "pretraining"),
    ("ForSequenceClassification", "classes"),
    ("ForImageClassification", "classes"),
    ("WithProjection", "projection"),
    ("EncoderModel", "encoder"),
    ("Encoder", "encoder"),
    ("Model", "base"),
)
"""What the name of a class ends in, and what then stands above the last block."""
_COUNTED: dict[str, tuple[str, ...]] = {
    "bert": ("lm", "base", "classes", "pretraining"),
    "roberta": ("lm", "base", "classes"),
    "xlm-roberta": ("lm", "base", "classes"),
    "modernbert": ("lm", "base", "classes"),
    "t5": ("lm", "base", "encoder"),
    "whisper": ("lm", "base", "encoder"),
    "qwen2_audio_encoder": ("encoder",),
    "vit": ("base", "classes"),
    "clip_vision_model": ("base", "projection"),
    "clip_text_model": ("base", "projection"),
    **dict.fromkeys(("siglip", "clip", "siglip_vision_model", "siglip_text_model"), ("base",)),
    **dict.fromkeys((*MEDIA, *ANY_SIZE), ("lm", "base")),
}
_DECODER_TASKS = ("lm", "base", "classes")


def anatomy(config: Mapping[str, Any], *, image: int | None = None) -> Anatomy:
    """What the model of a config.json is made of.

    `architectures` says what stands above the last block (`…ForCausalLM`, `…Model`, `…ForSequenceClassification`); where
    it is missing, the first of those that the model type has. `image`: side in pixels of an image for a tower that takes
    any size (Qwen-VL; 448 where not said).

    ValueError, naming it, for a model type or architecture that famc doesn't count, a value that is no number where one
    is needed, dimensions that don't divide, and an `image` for a model whose images have one size.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError("the config has no model_type: it must be a Hugging Face config.json")
    if kind not in MODEL_TYPES:
        near = difflib.get_close_matches(kind, MODEL_TYPES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"model_type {kind}: famc doesn't count it; {hint}It counts {', '.join(MODEL_TYPES)}"
        )
    c = Config(kind, config)
    task = _task(c)
    if image is not None and kind not in ANY_SIZE:
        raise ValueError(f"{kind} takes no images of any size: leave out the image's size")
    if kind in DECODERS:
        return decoder(DECODERS[kind](c), task, c.labels)  # type: ignore[arg-type]
    if kind == "qwen2_audio_encoder":
        return audio_encoder(c, alone=True)
    if kind in ANY_SIZE:
        return ANY_SIZE[kind](c, task, IMAGE if image is None else image)
    return {**ENCODERS, **VISION, **MEDIA}[kind](c, task)


def _task(c: Config) -> str:
    """What stands above the last block, by the first of `architectures`."""
    counted = _COUNTED.get(c.kind, _DECODER_TASKS)
    named = c.values.get("architectures")
    if not named:
        return counted[0]
    name = str(named[0])
    task = next((t for end, t in _TASKS if name.endswith(end)), None)
    if task not in counted:
        ends = sorted({f"…{end}" for end, t in _TASKS if t in counted})
        raise ValueError(f"{c.kind}: famc doesn't count {name}: it counts {', '.join(ends)}")
    return task
