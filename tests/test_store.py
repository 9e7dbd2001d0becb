"""An artifact is whole or it is not there, and nobody can change one unnoticed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_build import write_spec

from famc.errors import StoreError
from famc.store import RECORD, Store, canonical, digest, read_record

KEY, OTHER = "a" * 64, "b" * 64
NAME = "s/instruct/export.onnx-int4"
FILES = {"config.json": b"{}\n", "onnx/model.onnx": bytes(range(64)), "empty": b""}


def made(
    store: Store, name: str = NAME, key: str = KEY, files: dict[str, bytes] = FILES, **record: Any
) -> Path:
    fill(store, name, key, files)
    return store.commit(
        name, key, {"name": name, "key": key, "content": "c", "metrics": {"loss": 0.5}, **record}
    )


def fill(store: Store, name: str = NAME, key: str = KEY, files: dict[str, bytes] = FILES) -> Path:
    folder = store.partial(name, key)
    for relative, data in files.items():
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_bytes(data)
    return folder


# --- one folder an artifact -------------------------------------------------------------------------------


def test_a_nested_address_is_a_nested_folder_with_the_keys_first_twelve_digits(tmp_path):
    store = Store(tmp_path)
    assert made(store) == tmp_path / "s" / "instruct" / f"export.onnx-int4-{KEY[:12]}"
    assert store.scan() == {NAME: [store.path(NAME, KEY)]}
    assert store.record(NAME, KEY)["files"].keys() == FILES.keys()
    assert list(store.partials()) == []


def test_the_record_says_what_it_was_given_and_hashes_every_file(tmp_path):
    store = Store(tmp_path)
    record = read_record(made(store))
    assert record["name"] == NAME
    assert record["metrics"] == {"loss": 0.5}
    assert record["files"]["config.json"] == {
        "sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
        "bytes": 3,
    }


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    store = Store(tmp_path)
    folder = made(store, metrics={"loss": math.nan, "scores": [math.inf, 1.0]})
    strict = json.loads((folder / RECORD).read_text(), parse_constant=pytest.fail)
    assert strict["metrics"] == {"loss": None, "scores": [None, 1.0]}
    assert store.verify(folder) == []


def test_a_folder_without_a_record_is_no_artifact(tmp_path):
    store = Store(tmp_path)
    folder = made(store)
    (folder / RECORD).unlink()
    assert not store.has(NAME, KEY)
    assert store.scan() == {}
    with pytest.raises(StoreError, match="its record can't be read"):
        store.record(NAME, KEY)


def test_scan_passes_over_partials_half_folders_files_and_links(tmp_path):
    store = Store(tmp_path)
    fill(store)
    (store.partial(NAME, KEY) / RECORD).write_text("{}")
    (tmp_path / "data" / f"half-{KEY[:12]}").mkdir(parents=True)
    (tmp_path / f"file-{KEY[:12]}").write_text("")
    whole = made(store, "data/code", OTHER)
    (tmp_path / f"link-{KEY[:12]}").symlink_to(whole)
    assert store.scan() == {"data/code": [whole]}
    assert list(store.partials()) == [store.partial(NAME, KEY)]


def test_scan_of_no_store_is_empty(tmp_path):
    assert Store(tmp_path / "none").scan() == {}


def test_scan_tells_the_newest_first(tmp_path):
    store = Store(tmp_path)
    old, new = made(store, "data/code", KEY), made(store, "data/code", OTHER)
    os.utime(old / RECORD, (1, 1))
    assert store.scan() == {"data/code": [new, old]}


def test_a_size_may_be_called_like_an_artifact(tmp_path):
    store = Store(tmp_path)
    folder = made(store, "m-0123456789ab/pretrain")
    assert store.scan() == {"m-0123456789ab/pretrain": [folder]}


def test_commit_replaces_a_folder_whose_record_was_lost(tmp_path):
    store = Store(tmp_path)
    folder = made(store)
    (folder / RECORD).unlink()
    (folder / "junk").write_text("")
    assert store.verify(made(store)) == []
    assert not (folder / "junk").exists()


def test_everything_is_on_disk_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    store, synced = Store(tmp_path), []
    partial = fill(store)
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").readlink()))
    folder = store.commit(NAME, KEY, {})
    order = [Path(p).relative_to(partial).as_posix() for p in synced[:-1]]
    assert order == ["config.json", "empty", "onnx/model.onnx", f"{RECORD}.tmp", "onnx", "."]
    assert Path(synced[-1]) == folder.parent


def test_commit_refuses_a_link_to_what_may_change(tmp_path):
    store = Store(tmp_path)
    (fill(store) / "weights").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="weights is a link"):
        store.commit(NAME, KEY, {})


# --- a crash at any moment --------------------------------------------------------------------------------


class Crash(BaseException):
    """The machine stops here: no handler for Exception sees it."""


class Clock:
    """Counts what is done to files in a folder, by Python's audit events; stops the machine at the n-th."""

    def __init__(self) -> None:
        self.root, self.left = "\0", -1
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.left < 0 or not event.startswith(("open", "os.", "shutil.")):
            return
        if any(isinstance(a, str | os.PathLike) and str(a).startswith(self.root) for a in args):
            if self.left == 0:
                self.left = -1
                raise Crash(event)
            self.left -= 1

    def crashes(self, root: Path, steps: int, action: Any) -> bool:
        """Do it, and stop before its step number `steps`; False if it was done before that."""
        self.root, self.left = str(root), steps
        try:
            action()
        except Crash:
            return True
        finally:
            self.left = -1
        return False


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


def moments(clock: Clock, tmp_path: Path, prepare: Any, action: Any) -> Iterator[Store]:
    """The store after a crash at every moment of an action."""
    for count in range(200):
        store = Store(tmp_path / f"at-{count}")
        prepare(store)
        crashed = clock.crashes(store.root, count, lambda store=store: action(store))
        yield store
        if not crashed:
            assert count > 3, "the clock counts nothing"
            return
    raise AssertionError("no end")


def half(store: Store) -> None:
    fill(store)
    (store.path(NAME, KEY)).mkdir(parents=True)
    (store.path(NAME, KEY) / "config.json").write_text("half")


def damaged(store: Store) -> None:
    (made(store) / "config.json").write_text("damaged")
    fill(store)


@pytest.mark.parametrize("before", [fill, half, damaged])
def test_a_crash_during_commit_leaves_no_artifact_or_a_whole_one(tmp_path, clock, before):
    for store in moments(clock, tmp_path, before, lambda s: s.commit(NAME, KEY, {"content": "c"})):
        folder = store.path(NAME, KEY)
        if store.has(NAME, KEY) and before is not damaged:
            assert store.verify(folder) == []
        elif store.has(NAME, KEY):  # the old one, as damaged as it was, or the new one
            assert store.verify(folder) == [] or (folder / "config.json").read_text() == "damaged"
            assert all((folder / name).is_file() for name in FILES)
        assert store.verify(made(store)) == []  # the next build makes it, whatever was left


def test_a_crash_during_reuse_leaves_no_artifact_or_a_whole_one(tmp_path, clock):
    def action(store: Store) -> None:
        store.reuse(NAME, OTHER, store.path(NAME, KEY), {"content": "c"})

    for store in moments(clock, tmp_path, made, action):
        assert store.verify(store.path(NAME, KEY)) == []
        assert not store.has(NAME, OTHER) or store.verify(store.path(NAME, OTHER)) == []
        action(store)
        assert store.verify(store.path(NAME, OTHER)) == []


def test_a_crash_during_remove_leaves_a_whole_artifact_or_none(tmp_path, clock):
    for store in moments(clock, tmp_path, made, lambda s: s.remove(s.path(NAME, KEY))):
        assert not store.has(NAME, KEY) or store.verify(store.path(NAME, KEY)) == []


# --- nobody changes one unnoticed -------------------------------------------------------------------------


def test_verify_finds_one_flipped_bit_in_any_byte_of_any_file(tmp_path):
    store = Store(tmp_path)
    folder = made(store, metrics={"loss": 1e-05})
    assert store.verify(folder) == []
    for path in (p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        for index in range(len(data)):
            # 1E-05 is the same number as 1e-05, but not the same record
            for bit in (index % 8, 5) if data[index] == ord("e") else (index % 8,):
                path.write_bytes(data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :])
                faults = store.verify(folder)
                assert faults, f"{path.name}: bit {bit} of byte {index} ({chr(data[index])!r})"
        path.write_bytes(data)
    assert store.verify(folder) == []


@pytest.mark.parametrize(
    ("change", "file", "what"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json", "is missing"),
        (lambda f: (f / "config.json").write_bytes(b"{}"), "config.json", "has 2 bytes, the record says 3"),
        (
            lambda f: (f / "config.json").write_bytes(b"[]\n"),
            "config.json",
            "has other content than the record says",
        ),
        (lambda f: (f / "onnx/more").write_bytes(b""), "onnx/more", "is not in the record"),
        (lambda f: (f / "dangling").symlink_to("nowhere"), "dangling", "is not in the record"),
        (
            lambda f: (f / RECORD).unlink(),
            RECORD,
            "its record can't be read: [Errno 2] No such file or directory",
        ),
        (lambda f: (f / RECORD).write_text("[]"), RECORD, "its record is damaged"),
        (lambda f: (f / RECORD).write_text('{"files": {"a": 3}}'), RECORD, "its record is damaged"),
    ],
)
def test_verify_names_the_file_and_what_is_wrong(tmp_path, change, file, what):
    store = Store(tmp_path)
    change(made(store))
    faults = store.verify(store.path(NAME, KEY))
    assert [(f.artifact, f.file) for f in faults] == [(f"{NAME}-{KEY[:12]}", file)]
    assert faults[0].what.startswith(what)


def test_a_record_that_was_edited_with_care_is_found(tmp_path):
    store = Store(tmp_path)
    folder = made(store)
    record = read_record(folder)
    record["metrics"]["loss"] = 0.1
    (folder / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    assert [(f.file, f.what) for f in store.verify(folder)] == [(RECORD, "is not as it was signed")]


# --- early cut-off, removal -------------------------------------------------------------------------------


def test_reuse_makes_a_new_artifact_of_the_same_files(tmp_path):
    store = Store(tmp_path)
    old = made(store)
    new = store.reuse(NAME, OTHER, old, {"content": "d"})
    assert store.verify(new) == []
    assert read_record(new)["output"] == read_record(old)["output"]
    assert (new / "onnx/model.onnx").stat().st_ino == (old / "onnx/model.onnx").stat().st_ino


def test_reuse_copies_where_links_can_not_be_made(tmp_path, monkeypatch):
    store = Store(tmp_path)
    old = made(store)

    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    new = store.reuse(NAME, OTHER, old, {})
    assert store.verify(new) == []
    assert (new / "config.json").stat().st_ino != (old / "config.json").stat().st_ino


def test_the_output_digest_is_of_names_and_contents_only(tmp_path):
    store = Store(tmp_path)
    output = read_record(made(store))["output"]
    assert read_record(made(store, "data/code", OTHER, seconds=3))["output"] == output
    assert read_record(made(store, "data/qa", files={**FILES, "empty": b"x"}))["output"] != output
    assert read_record(made(store, "data/zh", files={"config": b"{}\n"}))["output"] != output


def test_twins_are_whole_and_of_the_same_content(tmp_path):
    store = Store(tmp_path)
    first, second = made(store, key="1" * 64), made(store, key="2" * 64)
    other, broken = made(store, key="3" * 64, content="d"), made(store, key="4" * 64)
    (broken / RECORD).write_text("{}")
    (first / "config.json").write_bytes(b"[]\n")
    assert list(store.twins("c", [other, broken, first, second])) == [second]


def test_remove_gives_bytes_back_and_leaves_no_empty_folders(tmp_path):
    store = Store(tmp_path)
    one, two = made(store), made(store, "s/sft")
    assert store.remove(one) > 64
    assert not (tmp_path / "s" / "instruct").exists()
    assert store.scan() == {"s/sft": [two]}
    store.remove(two)
    assert tmp_path.is_dir()


def test_remove_deletes_the_record_first(tmp_path, monkeypatch):
    store = Store(tmp_path)
    folder = made(store)
    monkeypatch.setattr("famc.store.shutil.rmtree", lambda *_, **__: None)
    store.remove(folder)
    assert (folder / "config.json").is_file()
    assert not store.has(NAME, KEY)


# --- keys -------------------------------------------------------------------------------------------------


class Odd:
    """A type without a stable form."""


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Odd(), "Odd"),
        ({1, 2}, "set"),
        (Path("x"), "Path"),
        (b"x", "bytes"),
        (math.nan, "nan"),
        ({"a": [math.inf]}, "inf"),
        ({1: "a"}, "int"),
        ({None: 1}, "NoneType"),
        ({"a": (Odd(),)}, "Odd"),
    ],
)
def test_what_has_no_stable_form_is_refused_by_name(value, named):
    with pytest.raises(TypeError, match=named):
        digest(value)


def test_one_value_has_one_spelling():
    assert canonical({"b": 1, "a": (1, 2.5, None, True, "é")}) == canonical(
        {"a": [1, 2.5, None, True, "é"], "b": 1}
    )
    assert canonical({"a": 1}) != canonical({"a": "1"})
    assert canonical([1]) != canonical([True])


def test_keys_do_not_depend_on_the_hash_seed(tmp_path):
    spec = write_spec(tmp_path)
    code = (
        "from famc.graph import open_family; from famc.plan import keys; from pathlib import Path\n"
        f"print(keys(open_family(Path({str(spec)!r}))))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "77")
    }
    assert len(seen) == 1
