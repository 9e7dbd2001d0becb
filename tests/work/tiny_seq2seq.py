"""A tokenizer with the family's reserved tokens, shapes of bert, modernbert and t5, and data they can learn."""

from __future__ import annotations

import random
from pathlib import Path

from tiny_model import CHATML, TEXTS
from tiny_training import CONTEXT, chat_mix
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from famc.cost.shape import Shape
from famc.steps.others import SPECIAL_TOKENS

SHAPES = {
    "bert": Shape("bert", 448, 2, 32, 64, 2, 2, 16, True, CONTEXT),
    "modernbert": Shape("modernbert", 448, 3, 32, 64, 2, 2, 16, True, CONTEXT),
    "t5": Shape("t5", 448, 2, 32, 64, 2, 2, 16, True, CONTEXT),
}
PLANETS = ("Mars", "Venus", "Saturn", "Pluto", "Neptune", "Earth")


def marked_tokenizer(folder: Path, vocab: int = 400) -> Path:
    """A byte-level BPE with every token that a family reserves; fewer words than the model has rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, *(f"{p} is hot" for p in PLANETS * 3)], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = CHATML
    made.save_pretrained(folder)
    return folder


def questions(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Conversations whose answer is the planet of the question, and nothing else."""
    draw = random.Random(seed)
    chats = []
    for _ in range(count):
        planet = draw.choice(PLANETS)
        asked = draw.choice(("Is {} hot?", "Tell me of {} now.", "{}"))
        chats.append(
            [
                {"role": "user", "content": asked.format(planet)},
                {"role": "assistant", "content": planet},
            ]
        )
    return chat_mix(folder, chats)
