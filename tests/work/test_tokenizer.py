"""A trained tokenizer is exactly as large as asked, loses nothing, and marks the assistant's words."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from famc.errors import StepFailed
from famc.job import Job
from famc.steps.others import CHATML, SPECIAL_TOKENS
from famc.work import tokenizer as worker
from famc.work.text import Writer, dumps

WORDS = ("return the value of an item in list or raise error when key is missing from self cache").split()  # noqa: SIM905


def corpus(folder: Path, texts: list[str], heldout: list[str] | None = None, messages: bool = False) -> Path:
    """A corpus artifact."""
    folder.mkdir(parents=True)
    for name, rows in (("train", texts), ("heldout", heldout or texts[:2])):
        with Writer(
            folder / f"{name}.parquet", ("id", "group", "messages" if messages else "text")
        ) as writer:
            for i, text in enumerate(rows):
                body = dumps([{"role": "user", "content": "?"}, {"role": "assistant", "content": text}])
                writer.add((f"{name}{i}", f"g{i}", body if messages else text))
    return folder


def prose(count: int, salt: int = 0) -> list[str]:
    """Texts with enough different pairs for some hundred merges."""
    return [
        " ".join(
            WORDS[(i * 7 + k * (3 + salt) + k * k) % len(WORDS)] + WORDS[(i + k) % 11][:3] for k in range(60)
        )
        for i in range(count)
    ]


def train(out: Path, sources: dict[str, Path], **more: Any) -> dict[str, Any]:
    params = {
        "template": CHATML, "kind": "bbpe", "vocab": 400, "rows": 512, "bytes": 10**9, "seed": 7,
        "weights": dict.fromkeys(sources, 1.0), "special_tokens": list(SPECIAL_TOKENS),
    } | more  # fmt: skip
    out.mkdir(parents=True)
    job = Job.for_test("tokenizer", "tokenizer", params)
    return worker.run(job, {f"source.{name}": path for name, path in sources.items()}, out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Path]:
    base = tmp_path_factory.mktemp("tokenizer")
    source = corpus(base / "x", prose(80))
    return base / "t", train(base / "t", {"x": source}), source


def test_special_tokens_are_reserved_once_after_the_vocabulary(
    made: tuple[Path, dict[str, Any], Path],
) -> None:
    folder, metrics, _ = made
    tokenizer = worker.load(folder)
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert len(tokenizer) == metrics["vocab"] == 400 and metrics["reserved"] == 0
    assert ids == list(range(400 - len(SPECIAL_TOKENS), 400))
    for token, token_id in zip(SPECIAL_TOKENS, ids, strict=True):
        assert tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"].count(token_id) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )
    assert tokenizer.image_token == "<|image_pad|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think></think><tool_call></tool_call>"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHATML and config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_little_text_is_filled_up_with_reserved_tokens(tmp_path: Path) -> None:
    metrics = train(tmp_path / "t", {"x": corpus(tmp_path / "x", ["ab ab ab"])}, vocab=500)
    assert metrics["vocab"] == 500 and 200 < metrics["reserved"] < 226
    tokenizer = worker.load(tmp_path / "t")
    assert tokenizer.convert_ids_to_tokens(499) == f"<|reserved_{metrics['reserved'] - 1}|>"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(made: tuple[Path, dict[str, Any], Path], text: str) -> None:
    """Lossless up to NFC: spaces, line ends, controls, every plane of Unicode."""
    tokenizer = _loaded(made[0])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


_CACHE: dict[Path, Any] = {}


def _loaded(folder: Path) -> Any:
    if folder not in _CACHE:
        _CACHE[folder] = worker.load(folder)
    return _CACHE[folder]


@pytest.mark.parametrize("text", worker.ODD)
def test_odd_text_comes_back(made: tuple[Path, dict[str, Any], Path], text: str) -> None:
    tokenizer = _loaded(made[0])
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_golden_marks_exactly_the_answers(made: tuple[Path, dict[str, Any], Path]) -> None:
    folder, _, _ = made
    golden = json.loads((folder / "golden.json").read_text())
    tokenizer = _loaded(folder)
    marked = [i for i, m in zip(golden["ids"], golden["assistant_mask"], strict=True) if m]
    answers = [m["content"] + "<|im_end|>" for m in worker.GOLDEN if m["role"] == "assistant"]
    assert tokenizer.decode(marked) == "".join(answers)
    assert tokenizer.decode(golden["ids"]) == golden["rendered"]
    assert golden["prompt"].endswith("<|im_start|>assistant\n")


def test_templates_that_mark_wrongly_are_refused(tmp_path: Path) -> None:
    source = {"x": corpus(tmp_path / "x", prose(20))}
    wrong = {
        "does not mark": CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
        "marks the wrong words": CHATML.replace(
            "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>"
        ),
        "fails on a conversation": "{{ raise_exception('no') }}{% generation %}{% endgeneration %}",
    }
    for index, (says, template) in enumerate(wrong.items()):
        with pytest.raises(StepFailed, match=says):
            train(tmp_path / str(index), source, template=template)


def test_bytes_and_weights_decide_what_is_read(tmp_path: Path) -> None:
    sources = {"a": corpus(tmp_path / "a", prose(200)), "b": corpus(tmp_path / "b", prose(200, 2))}
    metrics = train(tmp_path / "t", sources, bytes=40_000, weights={"a": 3.0, "b": 1.0})
    read = metrics["trained_bytes_by_source"]
    assert 28_500 <= read["a"] <= 30_000 and 9_000 <= read["b"] <= 10_000
    small = {"a": corpus(tmp_path / "c", prose(5)), "b": sources["b"]}
    read = train(tmp_path / "u", small, bytes=40_000)["trained_bytes_by_source"]
    assert read["a"] == sum(len(t) for t in prose(5)), "all of it"
    assert read["a"] + read["b"] >= 39_000, "what one can't give comes from the other"


def test_held_out_text_is_never_read(tmp_path: Path) -> None:
    secret = "zyxwzyxw " * 300
    sources = {
        "x": corpus(tmp_path / "x", prose(30), heldout=[secret]),
        "y": corpus(tmp_path / "y", prose(9), messages=True),
    }
    metrics = train(tmp_path / "t", sources)
    assert not [t for t in worker.load(tmp_path / "t").get_vocab() if "zyx" in t]
    assert metrics["bytes_per_token_by_source"]["x"] < 1.5 < metrics["bytes_per_token_by_source"]["y"]


def test_same_bytes_twice(made: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    folder, metrics, source = made
    assert train(tmp_path / "again", {"x": source}) == metrics
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_user_mistakes_are_told(tmp_path: Path) -> None:
    source = {"x": corpus(tmp_path / "x", prose(5))}
    wrong: dict[str, dict[str, Any]] = {
        "raise arch.vocab_pad": {"rows": 399},
        "raise tokenizer.vocab": {"vocab": 270},
        "kind: bbpe": {"kind": "unigram"},
        "write x": {"weights": {"x.high": 1}},
    }
    for index, (hint, more) in enumerate(wrong.items()):
        with pytest.raises(StepFailed) as error:
            train(tmp_path / str(index), source, **more)
        assert hint in error.value.hint


def test_an_adopted_tokenizer_is_copied_and_checked(
    made: tuple[Path, dict[str, Any], Path], tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(made[0], theirs)
    (theirs / "model.safetensors").write_bytes(b"weights")
    config = json.loads((theirs / "tokenizer_config.json").read_text())
    (theirs / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    del config["chat_template"]
    (theirs / "tokenizer_config.json").write_text(json.dumps(config))

    def adopt(name: str, **more: Any) -> dict[str, Any]:
        params = {
            "adopt": "theirs",
            "files": "0",
            "bytes": 0,
            "rows": 512,
            "template": None,
            "kind": "bbpe",
        } | more
        (tmp_path / name).mkdir()
        return worker.run(
            Job.for_test("tokenizer", "tokenizer", params, runtime={"folder": str(theirs)}),
            {},
            tmp_path / name,
        )

    metrics = adopt("a")
    assert metrics["vocab"] == 400 and metrics["assistant_mask"] == "none" and metrics["lossy_texts"] == 0
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "golden.json",
    }
    assert worker.load(tmp_path / "a").chat_template.startswith("{% for m")
    assert adopt("b", template=CHATML)["assistant_mask"] == "yes"
    with pytest.raises(StepFailed, match="400 entries"):
        adopt("c", rows=256)
    (theirs / "tokenizer.json").write_text("{}")
    with pytest.raises(StepFailed, match="can be read"):
        adopt("d")
