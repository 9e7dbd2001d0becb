"""What is released is what was built and passed its gates: whole folders, and an index that tells of every
variant.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_build import Fake, toy_plan

from famc.errors import UsageError
from famc.plan import Plan
from famc.publish import MARK, publish
from famc.run import run
from famc.store import Store

FOLDERS = ["toy-m", "toy-m-instruct", "toy-s", "toy-s-instruct"]
LR = ("lr: 1e-3", "lr: 2e-3")


def released(
    folder: Path, *edits: tuple[str, str], names=None, fail=(), metrics=None
) -> tuple[Plan, list[Path]]:
    made = toy_plan(folder, *edits, names=names)
    report = run(made, execute=Fake(made, fail=fail, metrics=metrics))
    return made, publish(made, report.failed)


def index(folder: Path) -> dict[str, dict]:
    found = json.loads((folder / "out" / "release" / "family.json").read_text(), parse_constant=pytest.fail)
    assert found["family"]["name"] == "toy"
    return {entry["repo"]: entry for entry in found["variants"]}


def folders(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "out" / "release").iterdir() if p.is_dir())


def content(folder: Path) -> dict[str, int]:
    return {
        p.relative_to(folder).as_posix(): p.stat().st_size
        for p in folder.rglob("*")
        if p.is_file() and p.name != MARK
    }


def test_every_variant_has_a_folder_with_its_artifacts_files(tmp_path):
    _made, paths = released(tmp_path)
    assert sorted(p.name for p in paths) == folders(tmp_path) == FOLDERS
    for path in paths:
        assert content(path) == {"output.txt": 64, "onnx/model.onnx": 1_200_000}, (
            "famc's own files are no part of a release"
        )


def test_the_index_lists_every_variant_with_files_and_scores(tmp_path):
    made, paths = released(tmp_path, metrics={"bits_per_byte": 1.5, "kl": float("nan")})
    entries = index(tmp_path)
    assert sorted(entries) == FOLDERS
    for path in paths:
        entry = entries[path.name]
        assert entry["files"] == content(path)
        assert entry["folder"] == path.name
        assert entry["key"] == made.steps[f"{entry['size']}/{entry['variant']}/release"].key
        assert "not_released" not in entry
    assert entries["toy-s"]["scores"].keys() == {"lm", "chat"}
    assert entries["toy-s-instruct"]["scores"] == {"chat": {"score": 1.0, "bits_per_byte": 1.5, "kl": None}}
    assert entries["toy-s-instruct"]["exports"].keys() == {"onnx-fp32", "onnx-int4"}


def test_a_variant_whose_gate_failed_has_no_folder_and_the_reason(tmp_path):
    _, _paths = released(tmp_path, fail=["s/instruct/gate.onnx-int4"])
    assert folders(tmp_path) == ["toy-m", "toy-m-instruct", "toy-s"]
    entry = index(tmp_path)["toy-s-instruct"]
    assert entry["not_released"] == [
        "s/instruct/gate.onnx-int4: s/instruct/gate.onnx-int4: it was told to fail"
    ]
    assert "folder" not in entry
    assert entry["scores"], "what was measured is told all the same"


def test_what_an_older_build_released_goes_when_its_gate_fails(tmp_path):
    released(tmp_path)
    released(tmp_path, LR, fail=["s/instruct/gate.onnx-int4"])
    assert folders(tmp_path) == ["toy-m", "toy-m-instruct", "toy-s"]


def test_a_stricter_gate_takes_back_what_was_released_before(tmp_path):
    """Without a card the release's key knows nothing of the gate: the gate itself is asked."""
    no_card = ("profiles:", "release: {card: none}\nprofiles:")
    released(tmp_path, no_card)
    made, _ = released(tmp_path, no_card, ("{max: 9.0}", "{max: 1.0}"), fail=["s/base/gate.limits"])
    assert made.steps["s/base/release"].status == "cached"
    assert folders(tmp_path) == ["toy-m", "toy-m-instruct"]
    assert index(tmp_path)["toy-s-instruct"]["not_released"][0].startswith("s/base/gate.limits: ")


def test_a_folder_is_swapped_whole_when_its_artifact_is_another(tmp_path):
    _, paths = released(tmp_path)
    (paths[0] / "left-over").write_text("")
    before = (paths[0] / "output.txt").read_text()
    released(tmp_path, LR)
    assert (paths[0] / "output.txt").read_text() != before
    assert not (paths[0] / "left-over").exists()
    assert folders(tmp_path) == FOLDERS, "nothing of the swap is left"


def test_a_folder_that_is_as_it_should_be_is_not_touched(tmp_path):
    made, paths = released(tmp_path)
    (paths[0] / "mine.txt").write_text("a note")
    publish(made)
    assert (paths[0] / "mine.txt").read_text() == "a note"


@pytest.mark.parametrize("damage", ["delete", "cut"])
def test_a_released_file_that_is_missing_or_cut_comes_back(tmp_path, damage):
    made, paths = released(tmp_path)
    if damage == "delete":
        (paths[0] / "onnx" / "model.onnx").unlink()
    else:
        (paths[0] / "output.txt").write_text("")
    publish(made)
    assert content(paths[0]) == {"output.txt": 64, "onnx/model.onnx": 1_200_000}


def test_large_files_are_links_and_small_ones_may_be_edited(tmp_path):
    made, _paths = released(tmp_path)
    store = Store(made.out / "store")
    artifact = store.path("s/base/release", made.steps["s/base/release"].key)
    folder = tmp_path / "out" / "release" / "toy-s"
    assert (folder / "onnx" / "model.onnx").stat().st_ino == (artifact / "onnx" / "model.onnx").stat().st_ino
    (folder / "output.txt").write_text("edited")
    assert store.verify(artifact) == []


def test_a_crash_between_the_renames_is_mended_by_the_next(tmp_path, monkeypatch):
    _made, _paths = released(tmp_path)
    again = toy_plan(tmp_path, LR)
    run(again, execute=Fake(again))
    rename, count = Path.rename, iter(range(100))

    def crash(self: Path, target: Path) -> Path:
        if next(count) == 1:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        publish(again)
    monkeypatch.undo()
    publish(again)
    assert folders(tmp_path) == FOLDERS


def test_a_folder_that_famc_did_not_make_is_left_alone(tmp_path):
    mine = tmp_path / "out" / "release" / "toy-s"
    mine.mkdir(parents=True)
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="toy-s is in the way: famc did not make it"):
        released(tmp_path)
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_a_failed_variant_does_not_delete_a_folder_that_famc_did_not_make(tmp_path):
    mine = tmp_path / "out" / "release" / "toy-s-instruct"
    mine.mkdir(parents=True)
    released(tmp_path, fail=["s/sft"])
    assert mine.is_dir()


def test_release_path_and_repo_say_where_and_how_it_is_called(tmp_path):
    edit = ("profiles:", 'release: {path: out/models, repo: "{org}/{size}-{variant}-of-{family}"}\nprofiles:')
    _, paths = released(tmp_path, edit)
    root = tmp_path / "out" / "out" / "models"
    assert sorted(p.relative_to(root).as_posix() for p in paths) == [
        "me/m-base-of-toy", "me/m-instruct-of-toy", "me/s-base-of-toy", "me/s-instruct-of-toy",
    ]  # fmt: skip
    assert (root / "family.json").is_file()


def test_without_a_collection_there_is_no_index(tmp_path):
    released(tmp_path, ("profiles:", "release: {collection: false}\nprofiles:"))
    assert not (tmp_path / "out" / "release" / "family.json").exists()


def test_a_build_of_a_part_keeps_what_was_released_before(tmp_path):
    released(tmp_path)
    before = index(tmp_path)
    released(tmp_path, LR, names=["s/base/release"])
    after = index(tmp_path)
    assert folders(tmp_path) == FOLDERS
    assert after["toy-s"]["key"] != before["toy-s"]["key"]
    assert {k: v for k, v in after.items() if k != "toy-s"} == {
        k: v for k, v in before.items() if k != "toy-s"
    }


def test_a_build_of_a_part_lists_the_others_as_not_built(tmp_path):
    released(tmp_path, names=["s/base/release"])
    assert folders(tmp_path) == ["toy-s"]
    assert {repo: e.get("not_released") for repo, e in index(tmp_path).items()} == {
        "toy-s": None,
        "toy-m": ["not built"],
        "toy-m-instruct": ["not built"],
        "toy-s-instruct": ["not built"],
    }


def test_a_build_without_a_release_writes_none(tmp_path):
    released(tmp_path, names=["tokenizer"])
    assert not (tmp_path / "out" / "release").exists()
