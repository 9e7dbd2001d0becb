"""Folders of embedders and rerankers: the tokenizer that is saved is the one that training used, in every client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from test_rerank import family_tokenizer
from tiny_encoder import make_tiny_encoder
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from famc.work.encoder_folder import (
    WORDS,
    encoder_tokenizer,
    save_embedder,
    save_reranker,
    save_tokenizer,
)
from famc.work.encoder_session import prompts_of

ARCHS = ["qwen3", "bert", "modernbert"]
TEXTS = [
    "What does bread need?", "getHeader", "get_header", "HTTPServer2Test", "你好，世界! 再见", "", " ", "?!", "x",
    "Ça va, élève", "Zwölf\n\tBoxkämpfer", "a <|im_end|> b", "word " * 60,
]  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_tokenizer(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("getHeader", " get header"),
        ("get_header", " get header"),
        ("Get Header", " get header"),
        ("get-header()", " get header"),
        ("__init__", " init"),
        ("os.path.join", " os path join"),
        ("HTTPServer", " httpserver"),
        ("utf8Decoder", " utf8 decoder"),
        ("sha256Sum", " sha256 sum"),
        ("ÉlèveÀgé", " élève àgé"),
        ("e\u0301le", " éle"),  # two code points become one
        ("你好，世界", " 你好 世界"),
        ("a\n\tb", " a b"),
        ("x", " x"),
        ("", ""),
        ("  ", ""),
        ("?!", ""),
    ],
)
def test_words_are_found_whatever_stands_around_them(text: str, words: str) -> None:
    assert WORDS.normalize_str(text) == words
    assert WORDS.normalize_str(words) == words


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("words", [False, True])
def test_every_client_gets_the_same_ids(family: Path, tmp_path: Path, arch: str, words: bool) -> None:
    used = encoder_tokenizer(family, arch, words=words)
    wanted = used(TEXTS, truncation=True, max_length=40)["input_ids"]
    save_tokenizer(used, tmp_path, 40)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(auto, PreTrainedTokenizerFast)
    assert auto(TEXTS, truncation=True)["input_ids"] == wanted
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)(TEXTS, truncation=True)["input_ids"] == wanted
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.truncation is None
    assert plain.padding is None
    plain.enable_truncation(40)
    assert [one.ids for one in plain.encode_batch(TEXTS)] == wanted
    assert auto(TEXTS, TEXTS[::-1])["input_ids"] == used(TEXTS, TEXTS[::-1])["input_ids"]


@pytest.mark.parametrize("arch", ARCHS)
def test_marks_stand_at_the_ends(family: Path, tmp_path: Path, arch: str) -> None:
    save_tokenizer(encoder_tokenizer(family, arch, words=True), tmp_path, 40)
    words = AutoTokenizer.from_pretrained(tmp_path)
    start, end = words.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for text in TEXTS:
        ids = words(text, truncation=True)["input_ids"]
        assert ids[-1] == end
        assert len(ids) <= 40
        assert (ids[0] == start) is (arch != "qwen3")
    assert words("")["input_ids"] == ([end] if arch == "qwen3" else [start, end])
    pair = words("Q", "X")["input_ids"]
    assert pair.count(end) == (1 if arch == "qwen3" else 2)


@pytest.mark.parametrize("arch", ARCHS)
def test_settings_are_those_that_clients_ask_for(family: Path, tmp_path: Path, arch: str) -> None:
    used = encoder_tokenizer(family, arch, words=False)
    save_tokenizer(used, tmp_path, 40)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["padding_side"] == ("left" if arch == "qwen3" else "right")
    assert settings["model_max_length"] == 40
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words.chat_template is None
    assert set(words("Q")) == {
        "input_ids", "attention_mask", *(["token_type_ids"] if arch == "bert" else []),
    }  # fmt: skip
    if arch != "qwen3":
        assert (words.cls_token, words.sep_token) == ("<|im_start|>", "<|im_end|>")
        assert words.mask_token == "<|mask|>"
        assert words.unk_token is not None


def test_the_familys_tokenizer_stays_as_it_was(family: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in family.iterdir()}
    used = encoder_tokenizer(family, "bert", words=True)
    save_tokenizer(used, tmp_path, 40)
    assert used.model_max_length != 40
    assert {path.name: path.read_bytes() for path in family.iterdir()} == before


def model_of(folder: Path, family: Path, kind: Any, **more: Any) -> Any:
    vocab = len(AutoTokenizer.from_pretrained(family))
    make_tiny_encoder(folder, kind, vocab_size=vocab, **more)
    extra = {"add_pooling_layer": False} if kind == "bert" else {}
    return AutoModel.from_pretrained(folder, **extra)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_embedders_folder_is_read_back(family: Path, tmp_path: Path, arch: Any) -> None:
    model = model_of(tmp_path / "model", family, arch)
    model.config.use_cache = False  # as training leaves it
    out = tmp_path / "out"
    save_embedder(
        model, encoder_tokenizer(family, arch, words=False), out, pooling="mean", prompts={"query": "q: "},
        mrl=(16, 8), context=40,
    )  # fmt: skip
    found = SentenceTransformer(str(out), local_files_only=True, device="cpu")
    assert [type(module).__name__ for module in found] == ["Transformer", "Pooling", "Normalize"]
    assert found.max_seq_length == 40
    assert found[1].pooling_mode == "mean"
    assert found.prompts == {"query": "q: ", "document": ""} == prompts_of(out)
    assert found.get_embedding_dimension() == 64
    assert found.similarity_fn_name == "cosine"
    settings = json.loads((out / "config_sentence_transformers.json").read_text())
    assert settings["matryoshka_dims"] == [64, 16, 8]
    config = json.loads((out / "config.json").read_text())
    assert config.get("use_cache", False) is (arch == "qwen3")
    assert prompts_of(tmp_path / "model") == {}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_rerankers_folder_holds_no_template(family: Path, tmp_path: Path, arch: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    make_tiny_encoder(
        tmp_path / "model", arch, labels=1, vocab_size=len(AutoTokenizer.from_pretrained(family))
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    save_reranker(model, encoder_tokenizer(family, arch, words=False), tmp_path / "out", context=40)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (
        "Identity"
        in json.loads((tmp_path / "out/config.json").read_text())["sentence_transformers"]["activation_fn"]
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_only_a_bert_that_reads_pairs_is_told_which_text_a_token_belongs_to(family: Path, arch: str) -> None:
    """What embedders and masked language models save is as it was: they read one text."""
    for pairs in (False, True):
        tokenizer = encoder_tokenizer(family, arch, words=False, pairs=pairs)
        made = tokenizer("Q", "X", return_token_type_ids=True)
        second = len(made["input_ids"]) - made["token_type_ids"].count(1)
        told = pairs and arch == "bert"
        assert (made["token_type_ids"].count(1) > 0) is told
        if told:  # from behind the mark between the two, and to the end
            assert made["token_type_ids"] == [0] * second + [1] * (len(made["input_ids"]) - second)
            assert made["input_ids"][second - 1] == tokenizer.sep_token_id
