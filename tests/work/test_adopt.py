"""A checkpoint is adopted whole, as if famc had trained it, or refused with all reasons at once."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_artifacts import content, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from famc.errors import StepFailed
from famc.job import Job
from famc.work import adopt

SHAPE = {
    "arch": "qwen3", "vocab": 384, "layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2,
    "head_dim": 32,
    "tie": True, "context": 256, "rope_theta": 1e6, "moe": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.set_num_threads(1)
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def original(tmp_path_factory, tokenizer):
    return make_model(tmp_path_factory.mktemp("original"), tokenizer)


@pytest.fixture
def checkpoint(tmp_path, original):
    shutil.copytree(original, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def take(tmp_path, checkpoint, tokenizer, **params):
    out = Path(tempfile.mkdtemp(dir=tmp_path))
    params = {
        "path": "x",
        "files": "f",
        "hf": None,
        "revision": None,
        "license": "mit",
        "shape": SHAPE,
    } | params
    runtime = {"folder": str(checkpoint)} if checkpoint else {}
    job = Job.for_test("xs/base", "adopt", params, runtime=runtime)
    return adopt.run(job, {"tokenizer": tokenizer}, out), out


def edit(folder, name, change):
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[5, 6, 7, 100]])).logits


def test_an_adopted_model_is_the_checkpoint_with_the_familys_tokenizer(tmp_path, checkpoint, tokenizer):
    """Sharded and in bf16, as checkpoints come; one file in fp32 afterwards."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(checkpoint).to(torch.bfloat16).save_pretrained(
        half, max_shard_size="100KB"
    )
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(half)
    facts, out = take(tmp_path, half, tokenizer)
    assert torch.equal(logits(half), logits(out))
    assert set(content(out)) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert all(t.dtype == torch.float32 for t in load_file(out / "model.safetensors").values())
    assert content(out)["tokenizer.json"] == content(tokenizer)["tokenizer.json"]
    assert (
        AutoTokenizer.from_pretrained(out).chat_template
        == AutoTokenizer.from_pretrained(tokenizer).chat_template
    )
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert facts["license"] == "mit"


def test_every_difference_of_shape_is_listed_at_once(tmp_path, checkpoint, tokenizer):
    wrong = SHAPE | {
        "layers": 3,
        "tie": False,
        "kv_heads": 4,
        "rope_theta": 1e4,
        "context": 512,
        "vocab": 500,
    }
    with pytest.raises(StepFailed) as caught:
        take(tmp_path, checkpoint, tokenizer, shape=wrong)
    lines = caught.value.message.splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [
        "vocab", "layers", "kv_heads", "tie", "rope_theta", "context",
    ]  # fmt: skip
    assert "the checkpoint has 2, the spec says 3" in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda t: t.update({"model.extra": torch.zeros(2)}), r"model\.extra belongs to no qwen3"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"is \[3\], config\.json promises \[64\]",
        ),
    ],
)
def test_tensors_must_be_those_that_the_configuration_promises(
    tmp_path, checkpoint, tokenizer, change, message
):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepFailed, match=message):
        take(tmp_path, checkpoint, tokenizer)


def test_pickled_weights_are_refused_by_name_and_left_behind_beside_safetensors(
    tmp_path, checkpoint, tokenizer
):
    (checkpoint / "pytorch_model.bin").write_bytes(b"never read")
    facts, out = take(tmp_path, checkpoint, tokenizer)
    assert facts["ignored"] == "pytorch_model.bin"
    assert "pytorch_model.bin" not in content(out)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(StepFailed, match=r"pytorch_model\.bin"):
        take(tmp_path, checkpoint, tokenizer)


def test_custom_code_is_refused(tmp_path, checkpoint, tokenizer):
    edit(checkpoint, "config.json", lambda c: c | {"auto_map": {"AutoModel": "modeling.X"}})
    with pytest.raises(StepFailed, match="auto_map"):
        take(tmp_path, checkpoint, tokenizer)


def test_a_shard_outside_the_folder_is_refused(tmp_path, checkpoint, tokenizer):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StepFailed, match="elsewhere"):
        take(tmp_path, checkpoint, tokenizer)


def test_another_vocabulary_is_refused_with_examples(tmp_path, checkpoint, tokenizer):
    def swap(config):
        vocab = config["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        return config

    edit(checkpoint, "tokenizer.json", swap)
    with pytest.raises(StepFailed, match="2 tokens have other ids: 'a' is 68, the family's 67"):
        take(tmp_path, checkpoint, tokenizer)


def test_the_same_vocabulary_with_other_merges_is_refused(tmp_path, checkpoint, tokenizer):
    def unmerge(config):
        config["model"]["merges"] = []
        return config

    edit(checkpoint, "tokenizer.json", unmerge)
    with pytest.raises(StepFailed, match="is split otherwise"):
        take(tmp_path, checkpoint, tokenizer)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path, checkpoint, tokenizer):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(StepFailed, match="has no tokenizer"):
        take(tmp_path, checkpoint, tokenizer)


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: apache-2.0\n---\n# M\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: qwen\n---\n", "qwen"),
        ("# no front matter\nlicense: mit\n", None),
        ("---\nlanguage: en\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_the_specs_or_the_cards_or_adoption_stops(
    tmp_path, checkpoint, tokenizer, card, license_
):
    if card:
        (checkpoint / "README.md").write_text(card)
    if license_:
        assert take(tmp_path, checkpoint, tokenizer, license=None)[0]["license"] == license_
    else:
        with pytest.raises(StepFailed, match="states no licence"):
            take(tmp_path, checkpoint, tokenizer, license=None)
    assert take(tmp_path, checkpoint, tokenizer, license="mit")[0]["license"] == "mit"


def test_a_hub_revision_that_is_not_here_is_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(StepFailed, match="no/such at 0123") as caught:
        take(tmp_path, None, tokenizer, hf="no/such", revision="0123")
    assert "offline" in caught.value.hint


def test_a_hub_revision_that_is_here_is_adopted(tmp_path, checkpoint, tokenizer, monkeypatch):
    """The cache's own layout: what `hf download` leaves behind."""
    from huggingface_hub import constants

    commit = "0" * 40
    snapshot = tmp_path / "hub/models--no--such/snapshots" / commit
    shutil.copytree(checkpoint, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _, out = take(tmp_path, None, tokenizer, hf="no/such", revision=commit)
    assert torch.equal(logits(out), logits(checkpoint))
