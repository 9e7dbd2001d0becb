"""The tokens around a text, and the one that hides a word: which of a tokenizer's they are, and how they get there.

In: the family's tokenizer. Out: their ids; the same tokenizer for an encoder (`<|im_start|> text <|im_end|>`) or for
t5 (`text <|im_end|>`, as T5's own tokenizer ends every text), without a chat template.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from famc.errors import StepFailed
from famc.work.scores import read_json, write_json

CLS, SEP, MASK = "<|im_start|>", "<|im_end|>", "<|mask|>"


@dataclass(frozen=True, slots=True)
class Marks:
    """Ids of the tokens before, after and between texts, of what hides a token, and of what pads."""

    cls: int
    sep: int
    mask: int
    pad: int


def marks_of(tokenizer: Any) -> Marks:
    """A tokenizer's own marks if it names them (an adopted one), else the family's reserved tokens."""
    vocabulary = tokenizer.get_vocab()

    def found(own: int | None, reserved: str, what: str) -> int:
        if own is None and reserved not in vocabulary:
            raise StepFailed(
                f"the tokenizer has no {what}: neither one of its own nor {reserved}",
                "use the family's tokenizer, which reserves it, or an adopted one that names it",
            )
        return int(vocabulary[reserved] if own is None else own)

    return Marks(
        found(tokenizer.cls_token_id, CLS, "token before a text"),
        found(tokenizer.sep_token_id, SEP, "token after a text"),
        mask_of(tokenizer),
        int(tokenizer.pad_token_id),
    )


def mask_of(tokenizer: Any) -> int:
    """The token that hides others."""
    found = tokenizer.mask_token_id
    if found is None:
        found = tokenizer.get_vocab().get(MASK)
    if found is None:
        raise StepFailed(
            f"the tokenizer has no token that hides others: neither a mask_token nor {MASK}",
            "use the family's tokenizer, which reserves it, or an adopted one that names it",
        )
    return int(found)


def marked(tokenizer: Any, arch: str, *, pairs: bool = False) -> Any:
    """A copy of the tokenizer that puts an architecture's marks around a text, without a chat template. `pairs`: for a model
    that reads two texts: a BERT was made to be told which of them a token belongs to."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = None
    made.model_input_names = ["input_ids", *(["token_type_ids"] if arch == "bert" else []), "attention_mask"]
    made.padding_side = "right"
    if arch == "t5":
        end = made.eos_token
        single, pair, used = f"$A {end}", f"$A {end} $B {end}", [end]
        if made.mask_token is None and MASK in made.get_vocab():
            made.mask_token = MASK
    else:
        marks = marks_of(made)
        cls, sep, mask = (made.convert_ids_to_tokens(i) for i in (marks.cls, marks.sep, marks.mask))
        made.cls_token, made.sep_token, made.mask_token = cls, sep, mask
        if made.unk_token is None:
            made.unk_token = made.pad_token  # byte-level BPE never says it, but clients ask for one
        single, used = f"{cls} $A {sep}", [cls, sep]
        second = ":1" if pairs and arch == "bert" else ""
        pair = f"{cls} $A {sep} $B{second} {sep}{second}"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=[(t, made.convert_tokens_to_ids(t)) for t in used]
    )
    return made


def write_tokenizer(tokenizer: Any, out: Path) -> None:
    """tokenizer.json and tokenizer_config.json. transformers 5 leaves out the class that others know, the names of the
    inputs and the padding side: who then loads the folder pads on the right and passes token types."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = read_json(path) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
    }
    if settings.get("chat_template") is None:
        settings.pop("chat_template", None)  # a null is one for some clients
    write_json(path, settings)


def save_marked(tokenizer: Any, arch: str, out: Path) -> None:
    """Write the files of `marked`; `tokenizer` is left as it was."""
    write_tokenizer(marked(tokenizer, arch), out)
