"""Rows: what a mix becomes, which tokens the loss counts, and that a row's documents are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_artifacts import CHATS
from tiny_model import make_tiny_model, tiny_tokenizer
from tiny_training import CONTEXT, chat_mix, text_mix
from transformers import AutoModelForCausalLM

from famc.errors import StepFailed
from famc.work.rows import IGNORE, _best_fit, chat_rows, encode_chat, load_rows, text_rows

EOT = 0
TALK = [{"role": "user", "content": "And the oven?"}, {"role": "assistant", "content": "Heat."}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def rows_of(tokenizer: Any, chats: list[Any], context: int = CONTEXT, loss_on: str = "assistant") -> Any:
    return chat_rows(iter([{"messages": chat} for chat in chats]), tokenizer, context, loss_on=loss_on)


# --- text ---------------------------------------------------------------------------------------------------


def test_text_rows_hold_each_token_once_and_predict_the_next() -> None:
    """Rows laid end to end are the stream; labels are the stream one further, across row borders too."""
    stream = np.arange(1, 101, dtype=np.uint16)
    rows = text_rows(stream, EOT, 16)
    assert rows.input_ids.reshape(-1).tolist() == list(range(1, 97))
    assert rows.labels.reshape(-1).tolist() == list(range(2, 98))


def test_text_rows_positions_restart_at_each_document() -> None:
    """<|endoftext|> is position 0 of what follows it; its own prediction belongs to the document it ends."""
    stream = np.array([5, 6, EOT, 7, 8, EOT, EOT, 9, 10, 11, 12, EOT, 13], dtype=np.uint16)
    rows = text_rows(stream, EOT, 6)
    assert rows.position_ids.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0]]
    assert rows.labels[0, 1] == EOT


def test_text_rows_of_a_short_mix_are_refused() -> None:
    with pytest.raises(StepFailed, match="less than one row of 64"):
        text_rows(np.arange(40), EOT, 64)


def test_text_rows_from_disk_use_the_mix_own_end(tmp_path: Path, tokenizer: Any) -> None:
    rows = load_rows(text_mix(tmp_path, 1000), tokenizer, CONTEXT)
    assert len(rows) == 15
    assert (rows.position_ids[rows.input_ids == EOT] == 0).all()


# --- conversations ------------------------------------------------------------------------------------------


def test_chat_labels_are_the_assistants_words_and_the_end_of_turn(tokenizer: Any) -> None:
    """Decoding the labels gives each answer with its <|im_end|>, and nothing of users, system or marks."""
    rows = rows_of(tokenizer, CHATS, 128)
    counted = rows.labels[rows.labels != IGNORE]
    said = [m["content"] for chat in CHATS for m in chat if m["role"] == "assistant"]
    assert sorted(tokenizer.decode(counted).split("<|im_end|>")[:-1]) == sorted(said)


def test_chat_labels_are_the_inputs_shifted_within_a_conversation(tokenizer: Any) -> None:
    """A counted label is the next input of the same conversation: none crosses into a neighbour or into
    padding.
    """
    rows = rows_of(tokenizer, CHATS * 3, 128)
    for ids, labels, positions in zip(rows.input_ids, rows.labels, rows.position_ids, strict=True):
        for at in np.flatnonzero(labels != IGNORE):
            assert labels[at] == ids[at + 1]
            assert positions[at + 1] == positions[at] + 1


def test_chat_padding_counts_for_nothing(tokenizer: Any) -> None:
    rows = rows_of(tokenizer, [TALK])
    used = len(encode_chat(tokenizer, TALK)[0])
    assert (rows.labels[0, used - 1 :] == IGNORE).all()
    assert (rows.input_ids[0, used:] == tokenizer.pad_token_id).all()
    assert rows.position_ids[0, used] == 0


def test_chat_positions_restart_at_each_conversation(tokenizer: Any) -> None:
    rows = rows_of(tokenizer, CHATS, 128)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    lengths = sorted(len(encode_chat(tokenizer, chat)[0]) for chat in CHATS)
    begins = [
        (r, c)
        for r, c in zip(*np.nonzero(rows.position_ids == 0), strict=True)
        if rows.input_ids[r, c] == start
    ]
    assert len(begins) == len(lengths)


def test_loss_on_all_counts_every_token_but_the_first(tokenizer: Any) -> None:
    rows = rows_of(tokenizer, [TALK], loss_on="all")
    ids = encode_chat(tokenizer, TALK)[0]
    assert rows.labels[0, : len(ids) - 1].tolist() == ids[1:]


def test_long_conversations_are_cut_and_counted(tokenizer: Any) -> None:
    """What is longer than a row is cut; what has no assistant's word left is dropped; both are reported."""
    long_answer = [TALK[0], {"role": "assistant", "content": "Heat, " * 200}]
    long_question = [{"role": "user", "content": "Why? " * 200}, TALK[1]]
    rows = rows_of(tokenizer, [TALK, long_answer, long_question])
    assert (rows.facts["truncated"], rows.facts["dropped"], rows.facts["conversations"]) == (2, 1, 2)
    assert (
        rows.input_ids == tokenizer.eos_token_id
    ).sum() == 3  # user's and assistant's of TALK, user's of the cut one


def test_data_without_an_assistants_word_is_refused(tokenizer: Any) -> None:
    with pytest.raises(StepFailed, match="nothing to learn"):
        rows_of(tokenizer, [[{"role": "user", "content": "Anyone?"}]])


def test_packing_is_best_fit() -> None:
    """The fullest row that still takes a conversation gets it; nothing is lost or split."""
    bins = _best_fit([6, 5, 4, 3, 2], 10)
    assert sorted(map(sorted, bins)) == [[0, 2], [1, 3, 4]]
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 32, 500)]
    bins = _best_fit(lengths, 64)
    assert sorted(i for row in bins for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 64 for row in bins)
    assert sum(lengths) / (64 * len(bins)) > 0.95


def test_rows_are_a_function_of_the_data_alone(tmp_path: Path, tokenizer: Any) -> None:
    one = load_rows(chat_mix(tmp_path / "a", CHATS * 2), tokenizer, CONTEXT)
    two = load_rows(chat_mix(tmp_path / "b", CHATS * 2), tokenizer, CONTEXT)
    assert np.array_equal(one.input_ids, two.input_ids)


# --- isolation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_conversation_has_the_logits_it_has_alone(
    tmp_path: Path, tokenizer: Any, attention: str, kind: Any
) -> None:
    """No token of a row looks into its neighbours: in training mode, as Trainer calls the model."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "m", kind))
    model.set_attn_implementation(attention)
    model.train()
    rows = rows_of(tokenizer, CHATS, 192)
    assert len(rows) == 1
    ids, positions = torch.from_numpy(rows.input_ids), torch.from_numpy(rows.position_ids)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    starts = [i for i in range(192) if positions[0, i] == 0]
    leaks = model(input_ids=ids, use_cache=False).logits[0]  # positions run on: one document
    for start, end in zip(starts, [*starts[1:], 192], strict=True):
        alone = model(input_ids=ids[:, start:end], use_cache=False).logits[0]
        torch.testing.assert_close(packed[start:end], alone, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(packed[starts[1] :], leaks[starts[1] :], atol=1e-2)  # the comparison can tell


def test_packed_text_is_isolated_in_every_row_of_a_batch(tmp_path: Path) -> None:
    """Rows with different borders in one batch, as micro-batches have them."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "m")).eval()
    stream = np.array([5, 6, 7, EOT, 9, 10, 11, 12, 13, EOT, 15, 16, 17, EOT, 19, 20, 21], dtype=np.uint16)
    rows = text_rows(stream, EOT, 8)
    ids = torch.from_numpy(rows.input_ids)
    packed = model(input_ids=ids, position_ids=torch.from_numpy(rows.position_ids), use_cache=False).logits
    for row, start, end in ((0, 0, 3), (0, 3, 8), (1, 0, 1), (1, 1, 5), (1, 5, 8)):
        alone = model(input_ids=ids[row : row + 1, start:end], use_cache=False).logits[0]
        torch.testing.assert_close(packed[row, start:end], alone, atol=2e-5, rtol=1e-4)
