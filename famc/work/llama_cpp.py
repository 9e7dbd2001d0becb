"""llama.cpp, by llama-cpp-python: a GGUF file as its users run it, and llama.cpp's own quantiser.

In: a .gguf file. Out: logits, greedy text and token ids of it; or another .gguf file.

Through the C interface, not through the class `Llama`: that one adds a BOS of its own, samples, and sends the
process' stderr elsewhere while it loads. The key-value cache is f16, llama.cpp's default, as for its users.
"""

from __future__ import annotations

import collections
import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np

Ids = list[list[int]]
Logits = np.ndarray[Any, np.dtype[np.float32]]

# Tokens that one call decodes: with a vocabulary of 150k, 512 rows of logits are 300 MB in llama.cpp's buffer.
BATCH = 512
# Rows that the quantiser holds at once, as f32; its default is 8 GiB, a whole embedding.
ROWS_BYTES = 2**28
_WARN, _ERROR = 2, 3  # enum ggml_log_level

# llama.cpp has one log in a process. It says little about a failure but there, so its last words are kept.
_last_words: collections.deque[str] = collections.deque(maxlen=20)


@lib.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _listen(level: int, text: bytes, _: Any) -> None:
    if level in (_WARN, _ERROR):
        _last_words.append(text.decode("utf-8", "replace").strip())


lib.llama_log_set(_listen, ctypes.c_void_p(0))
lib.llama_backend_init()


class LlamaFile:
    """A GGUF file that llama.cpp runs on the CPU, and the tokenizer inside it."""

    def __init__(self, path: Path, threads: int, context: int, *, embeds: bool = False) -> None:
        _last_words.clear()
        wanted = lib.llama_model_default_params()
        wanted.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(str(path).encode(), wanted)
        if not self._model:
            raise ValueError(f"llama.cpp can't load {path}: {said()}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self._vocab))
        if embeds:  # BERT has no more places than it was trained for
            context = min(context, int(lib.llama_model_n_ctx_train(self._model)))
        self.context = context
        # tokens that see each other are decoded at once
        self._batch_size = context if embeds else min(BATCH, context)
        options = lib.llama_context_default_params()
        options.n_ctx = context
        options.n_batch = options.n_ubatch = self._batch_size
        options.n_threads = options.n_threads_batch = threads
        options.embeddings = embeds
        options.no_perf = True
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            lib.llama_model_free(self._model)
            raise ValueError(f"llama.cpp has no room for {path} with {context} tokens: {said()}")
        self._free = weakref.finalize(self, _free, self._context, self._model)

    def close(self) -> None:
        """Give the memory back now; without it, that happens with the object."""
        self._free()

    # --- tokenizer -------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Text as text: `<|im_end|>` in it is eight characters or more, not the mark. No BOS, no EOS."""
        return self._tokenize(text, False)

    def tokenize_marked(self, text: str) -> list[int]:
        """As a text to embed is read: marks in it become their ids, and the file's own stand around it."""
        return self._tokenize(text, True, around=True)

    def tokenize_pair(self, query: str, document: str) -> list[int]:
        """As llama-server reads the two texts of a reranker, with the marks that the file names."""
        pair = self.metadata.get("tokenizer.chat_template.rerank")
        if pair is None:
            raise ValueError("the file doesn't say how two texts stand beside each other")
        return self._tokenize(pair.replace("{query}", query).replace("{document}", document), True)

    def tokenize_special(self, text: str) -> list[int]:
        """As a rendered conversation is read: marks become their ids. No BOS, no EOS."""
        return self._tokenize(text, True)

    def _tokenize(self, text: str, special: bool, *, around: bool = False) -> list[int]:
        data = text.encode()
        room = len(data) + 8  # a byte-level token is one byte at least
        ids = (lib.llama_token * room)()
        count = lib.llama_tokenize(self._vocab, data, len(data), ids, room, around, special)
        if count < 0:
            raise ValueError(f"llama.cpp can't tokenize {text[:80]!r}: {said()}")
        return list(ids[:count])

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids, marks included.

        Token by token: llama_detokenize would also take spaces before punctuation away.
        """
        return b"".join(self._piece(token) for token in ids).decode("utf-8", "replace")

    def _piece(self, token: int) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = int(lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, True))
            if size >= 0:
                return buffer.raw[:size]
            room = -size

    def is_end(self, token: int) -> bool:
        """Does llama.cpp end its text at this token?"""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    # --- metadata --------------------------------------------------------------------------------------------

    @property
    def metadata(self) -> dict[str, str]:
        """The file's key-value pairs as llama.cpp prints them; without arrays."""
        keys, values = lib.llama_model_meta_key_by_index, lib.llama_model_meta_val_str_by_index

        def text(read: Callable[..., int], index: int) -> str:
            # the C function says how long the text is, whatever room it has
            size = read(self._model, index, ctypes.create_string_buffer(1), 1)
            buffer = ctypes.create_string_buffer(size + 1)
            read(self._model, index, buffer, size + 1)
            return buffer.value.decode("utf-8", "replace")

        return {text(keys, i): text(values, i) for i in range(lib.llama_model_meta_count(self._model))}

    @property
    def template(self) -> str | None:
        """The chat template in the file."""
        found = lib.llama_model_chat_template(self._model, None)
        return found.decode() if found else None


class LlamaDecoder(LlamaFile):
    """A `Decoder` (compare.py)."""

    def logits(self, ids: Ids) -> Logits:
        """[batch, length, vocabulary] for rows of equal length; padding rows of the vocabulary are in it."""
        return np.stack([self._feed(row, 0, all_rows=True) for row in ids])

    def generate(self, prompt_ids: list[int], max_new_tokens: int, eos: Set[int]) -> list[int]:
        """Greedy: the new ids, up to and with the first one in `eos`."""
        new: list[int] = []
        feed, at = prompt_ids, 0
        while len(new) < max_new_tokens:
            new.append(int(self._feed(feed, at, all_rows=False)[-1].argmax()))
            if new[-1] in eos:
                break
            at += len(feed)
            feed = new[-1:]
        return new

    def _feed(self, ids: Sequence[int], start: int, *, all_rows: bool) -> Logits:
        """Decode ids that stand from `start` on, after what is in the cache; the logits of all, or the last."""
        if not ids or start + len(ids) > self.context:
            raise ValueError(f"{start + len(ids)} tokens for a context of {self.context}")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise ValueError(f"ids outside the file's vocabulary of {self.vocab_size}")
        if start == 0:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        out = np.empty((len(ids) if all_rows else 1, self.vocab_size), dtype=np.float32)
        batch = lib.llama_batch_init(self._batch_size, 0, 1)
        try:
            for begin in range(0, len(ids), self._batch_size):
                piece = ids[begin : begin + self._batch_size]
                for i, token in enumerate(piece):
                    batch.token[i] = token
                    batch.pos[i] = start + begin + i
                    batch.n_seq_id[i] = 1
                    batch.seq_id[i][0] = 0
                    batch.logits[i] = all_rows or begin + i == len(ids) - 1
                batch.n_tokens = len(piece)
                if code := lib.llama_decode(self._context, batch):
                    raise ValueError(f"llama.cpp can't decode {len(ids)} tokens (code {code}): {said()}")
                last = begin + len(piece) == len(ids)
                if all_rows or last:
                    rows = len(piece) if all_rows else 1
                    view = np.ctypeslib.as_array(
                        lib.llama_get_logits(self._context), shape=(rows, self.vocab_size)
                    )
                    at = begin if all_rows else 0
                    out[at : at + rows] = view  # a copy: llama.cpp reuses the buffer
        finally:
            lib.llama_batch_free(batch)
        return out


class LlamaEncoder(LlamaFile):
    """An `Encoder` (encoder_session.py): vectors of length 1, as llama-server and Ollama give them, or scores."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        super().__init__(path, threads, context, embeds=True)
        self._ranks = lib.llama_pooling_type(self._context) == lib.LLAMA_POOLING_TYPE_RANK
        self._labels = int(lib.llama_model_n_cls_out(self._model))
        self._width = self._labels if self._ranks else int(lib.llama_model_n_embd(self._model))

    def outputs(self, batch: Mapping[str, np.ndarray[Any, Any]]) -> Logits:
        """[rows, hidden] vectors, or [rows, 1] logits; the file says how tokens become one. Types of tokens are not
        read: llama.cpp has one."""
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        found = np.stack([self._one([int(i) for i in ids[kept.astype(bool)]]) for ids, kept in rows])
        if not self._ranks:
            length = np.linalg.norm(found.astype(np.float64), axis=1, keepdims=True)
            return np.asarray(found / length, dtype=np.float32)
        if self._labels == 1:
            return found
        # Of two labels llama.cpp gives the softmax, and llama-server passes on the first: the score's sigmoid, in which
        # scores above 17 are all 1. So are they here: this is what users rank by.
        sure = np.clip(found[:, :1].astype(np.float64), np.finfo(np.float32).tiny, 1 - 2.0**-24)
        return np.asarray(np.log(sure) - np.log1p(-sure), dtype=np.float32)

    def _one(self, ids: list[int]) -> Logits:
        if not 0 < len(ids) <= self.context:
            raise ValueError(f"{len(ids)} tokens for a context of {self.context}")
        if memory := lib.llama_get_memory(self._context):
            lib.llama_memory_clear(memory, True)
        batch = lib.llama_batch_init(len(ids), 0, 1)
        try:
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
                batch.logits[i] = True
            batch.n_tokens = len(ids)
            if code := lib.llama_decode(self._context, batch):
                raise ValueError(f"llama.cpp can't read {len(ids)} tokens (code {code}): {said()}")
        finally:
            lib.llama_batch_free(batch)
        found = lib.llama_get_embeddings_seq(self._context, 0)
        if not found:
            raise ValueError("the file doesn't say how its tokens become one vector")
        return np.array(found[: self._width], dtype=np.float32)


def quantize_file(source: Path, target: Path, file_type: int, threads: int) -> None:
    """llama.cpp's quantiser, with its own choice of a type for every tensor. `file_type` is a llama_ftype."""
    _last_words.clear()
    params = lib.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = file_type
    params.max_buf_size = ROWS_BYTES
    # a reranker's last layer is a row or two, and the score itself; the list ends at an empty item
    params.tt_overrides = (lib.llama_model_tensor_override * 2)(
        (rb"^cls\.output\.weight$", lib.GGML_TYPE_F32)
    )
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise ValueError(f"llama.cpp can't quantise {source.name}: {said()}")


def said() -> str:
    """llama.cpp's last warnings and errors."""
    return " ".join(line for line in _last_words if line) or "it doesn't say why"


def _free(context: Any, model: Any) -> None:
    lib.llama_free(context)
    lib.llama_model_free(model)
