"""A source is read whole or not at all, cleaned in order, and split so that all sources agree."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from famc.errors import StepFailed
from famc.job import Job
from famc.work import corpus
from famc.work.text import draw

PLAIN = {"text_field": "text", "group_field": None}
CLEAN = [
    ["normalize", {"form": "NFC", "ftfy": True}],
    ["length", {"min": 3, "max": 10_000}],
    ["dedup", {"exact": True, "minhash": None}],
]


def make(
    out: Path,
    path: Path | None = None,
    *,
    filters: list[Any] | None = None,
    fraction: float = 0.2,
    by: str = "group",
    **more: Any,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Run the worker: its metrics, both sides, its stats."""
    params = (
        {"format": "text", "origin": "path", "n": None, "seed": 7, "filters": filters or []} | PLAIN | more
    )
    params["heldout"] = {"by": by, "fraction": fraction}
    out.mkdir(parents=True)
    job = Job.for_test("data/x", "corpus", params, runtime={"path": str(path)})
    metrics = corpus.run(job, {}, out)
    sides = {side: pq.read_table(out / f"{side}.parquet").to_pylist() for side in ("train", "heldout")}
    assert sorted(p.name for p in out.iterdir()) == ["heldout.parquet", "stats.json", "train.parquet"]
    return metrics, sides, json.loads((out / "stats.json").read_text())


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_groups_are_never_split_and_two_sources_agree(tmp_path: Path) -> None:
    """The same group is on the same side in every source, whatever else the source holds."""
    a = [{"text": f"a {i}", "module": f"m{i % 50}"} for i in range(300)]
    b = [{"text": f"b {i}", "module": f"m{i % 70}"} for i in range(200)]
    held = {}
    for name, rows in (("a", a), ("b", b)):
        _, sides, stats = make(tmp_path / name, lines(tmp_path / f"{name}.jsonl", rows), group_field="module")
        groups = {side: {row["group"] for row in sides[side]} for side in sides}
        assert not groups["train"] & groups["heldout"]
        assert groups["heldout"] == {row["module"] for row in rows if draw(7, row["module"]) < 0.2 * 2**64}
        assert stats["fallback"] is None
        held[name] = groups
    assert held["a"]["heldout"] == held["b"]["heldout"] & {f"m{i}" for i in range(50)}


def test_a_larger_fraction_holds_out_a_superset_and_the_seed_moves_the_split(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"text": f"document {i}"} for i in range(400)])

    def held(name: str, **more: Any) -> set[str]:
        return {row["id"] for row in make(tmp_path / name, path, **more)[1]["heldout"]}

    small, large, other = held("s", fraction=0.1), held("l", fraction=0.3), held("o", fraction=0.1, seed=8)
    assert small < large and 20 <= len(small) <= 60
    assert small != other
    assert held("none", fraction=0.0) == set()


def test_one_group_falls_back_to_documents_and_says_so(tmp_path: Path) -> None:
    rows = [{"text": f"document {i}", "g": "only"} for i in range(100)]
    metrics, sides, stats = make(tmp_path / "o", lines(tmp_path / "x.jsonl", rows), group_field="g")
    assert "documents" in stats["fallback"] and metrics["fallback"] == stats["fallback"]
    assert 5 < len(sides["heldout"]) < 40
    _, sides, stats = make(tmp_path / "two", lines(tmp_path / "y.jsonl", rows[:2]), fraction=0.001)
    assert [len(sides[s]) for s in ("train", "heldout")] == [1, 1] and stats["fallback"]


def test_filters_count_what_they_drop(tmp_path: Path) -> None:
    rows = ["schÃ¶n und gut", "schön und gut", "e\u0301te\u0301", "ab", "kept “as is” ｆｕｌｌ &amp;"]
    path = lines(tmp_path / "x.jsonl", [{"text": text} for text in rows])
    metrics, sides, stats = make(tmp_path / "o", path, filters=CLEAN)
    assert {r["text"] for side in sides.values() for r in side} == {"schön und gut", "été", rows[4]}
    assert metrics["dropped_length"] == metrics["dropped_dedup"] == 1 and metrics["dropped_normalize"] == 0
    by_name = {entry["name"]: entry for entry in stats["filters"]}
    assert by_name["length"] | {"samples": 0} == {
        "name": "length", "in": 5, "out": 4, "dropped_documents": 1, "dropped_bytes": 2, "samples": 0,
    }  # fmt: skip
    assert by_name["length"]["samples"] == [{"id": "x.jsonl:4", "text": "ab"}]
    assert by_name["dedup"]["samples"][0]["id"] == "x.jsonl:2"
    assert stats["bytes_in"] == sum(len(t.encode()) for t in rows)


def test_a_duplicate_across_the_split_stays_held_out(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(60)]
    held = [n for n in names if draw(7, n) < 0.2 * 2**64]
    kept = [n for n in names if n not in held]
    rows = [{"text": f"own text of {n}", "g": n} for n in names]
    rows = [
        {"text": "the planted copy", "g": kept[0]},
        *rows,
        {"text": "the planted copy", "g": held[0], "id": "evil"},
    ]
    metrics, sides, _ = make(
        tmp_path / "o", lines(tmp_path / "x.jsonl", rows), filters=CLEAN, group_field="g"
    )
    assert [r["id"] for r in sides["heldout"] if "planted" in r["text"]] == ["evil"]
    assert not [r for r in sides["train"] if "planted" in r["text"]]
    assert metrics["dropped_dedup"] == 1


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [{"id": f"d{i}", "text": f"é {i}"} for i in range(12)]
    folder = tmp_path / "in"
    folder.mkdir()
    table = pa.Table.from_pylist(rows)
    lines(folder / "a.jsonl", rows)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    (folder / "c.json").write_text(json.dumps(rows))
    pq.write_table(table, folder / "d.parquet")
    with pa.ipc.new_stream(str(folder / "e.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(str(folder / "f.arrow"), table.schema) as writer:
        writer.write_table(table)
    found = [make(tmp_path / p.name, p, fraction=0.3)[1] for p in sorted(folder.iterdir())]
    assert all([r["id"] for r in f["train"]] == [r["id"] for r in found[0]["train"]] for f in found)
    assert {r["id"] for s in found[0].values() for r in s} == {f"d{i}" for i in range(12)}


def test_a_folder_of_text_files_is_one_document_and_group_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for i in range(20):
        (folder / "sub" / f"{i}.md").write_text(f"# {i}\n\nbody")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    _, sides, stats = make(tmp_path / "o", folder)
    assert {r["group"] for s in sides.values() for r in s} == {f"sub/{i}.md" for i in range(20)}
    assert [Path(p).name for p in stats["skipped_files"]] == ["picture.png"]
    _, sides, _ = make(tmp_path / "glob", folder / "**" / "*.md")
    assert {r["id"] for s in sides.values() for r in s} == {f"sub/{i}.md" for i in range(20)}


def test_n_takes_a_sample_that_the_seed_decides(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"text": f"document {i}"} for i in range(200)])

    def ids(name: str, **more: Any) -> list[str]:
        _, sides, _ = make(tmp_path / name, path, fraction=0.0, **more)
        return [row["id"] for row in sides["train"]]

    first = ids("a", n=30)
    assert len(first) == 30 and first == ids("b", n=30) and first != ids("c", n=30, seed=8)
    assert first == sorted(first, key=lambda i: int(i.partition(":")[2])), "the source's order is kept"
    assert max(int(i.partition(":")[2]) for i in first) > 100, "not only its beginning"


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("fmt", "line", "says"),
    [
        ("text", b'{"text": "x"', "x.jsonl:2:13: not JSON"),
        ("text", b'{"text": "\xff"}', "x.jsonl:2: not UTF-8: byte 0xff"),
        ("text", b'{"txt": "x"}', "x.jsonl:2: no field 'text'"),
        ("text", b'{"text": 5}', "x.jsonl:2: field 'text' is a number"),
        ("text", b'["text"]', "x.jsonl:2: a list instead of an object"),
        ("text", b'{"text": "\\ud800"}', "x.jsonl:2: half a surrogate pair"),
        ("messages", b'{"messages": []}', "x.jsonl:2: 'messages' is an empty list"),
        ("messages", b'{"messages": [{"content": "x"}]}', "x.jsonl:2: messages[0] has no role"),
        (
            "messages",
            b'{"messages": [{"role": "user", "content": null}]}',
            "x.jsonl:2: messages[0] has null as content",
        ),
        (
            "messages",
            b'{"messages": [{"role": "human", "content": "x"}]}',
            "messages[0]: unknown role 'human'",
        ),
        ("messages", b'{"messages": [{"role": "user", "content": "x"}]}', "without a turn of the assistant"),
        ("preference", b'{"prompt": "p", "chosen": "c"}', "x.jsonl:2: no field 'rejected'"),
        ("preference", b'{"prompt": "p", "chosen": "c", "rejected": 3}', "'rejected' is a number"),
    ],
)
def test_a_malformed_line_is_located(tmp_path: Path, fmt: str, line: bytes, says: str) -> None:
    good = {"text": "x", "messages": MESSAGES, "prompt": "p", "chosen": "c", "rejected": "r"}
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n")
    with pytest.raises(StepFailed) as error:
        make(tmp_path / "o", path, format=fmt)
    assert says in error.value.message


def test_unreadable_files_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    for name, raw in (("a.parquet", b"PAR1 no"), ("b.arrow", b"no"), ("c.jsonl.gz", b"no"),
                      ("d.json", b'{"text": "x"}'),
                      ("e.xyz", b"x"), ("f.txt", b"\xfe\xff")):  # fmt: skip
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(StepFailed, match=name):
            make(tmp_path / f"out-{name}", tmp_path / name)
    with pytest.raises(StepFailed, match="image_text"):
        make(tmp_path / "o1", tmp_path / "f.txt", format="image_text")
    with pytest.raises(StepFailed, match="no document is left of 1"):
        path = lines(tmp_path / "g.jsonl", [{"text": "ab"}])
        make(tmp_path / "o2", path, filters=CLEAN)


def test_preferences_are_stored_as_lists_of_messages(tmp_path: Path) -> None:
    conversational = {
        "prompt": MESSAGES[:1],
        "chosen": MESSAGES,
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    path = lines(tmp_path / "x.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}, conversational])
    _, sides, _ = make(tmp_path / "o", path, format="preference", fraction=0.0)
    first, second = [{k: json.loads(r[k]) for k in ("prompt", "chosen", "rejected")} for r in sides["train"]]
    assert (
        first
        == second
        == {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": conversational["rejected"]}
    )


def test_a_hub_dataset_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, count in (("train", 20), ("test", 5)):
        rows = [{"content": f"{split} {i}", "repo": f"r{i % 4}"} for i in range(count)]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    more = {
        "origin": "hf",
        "hf": str(folder),
        "revision": None,
        "text_field": "content",
        "group_field": "repo",
    }
    _, sides, _ = make(tmp_path / "o", split="test", fraction=0.0, **more)
    assert [r["text"] for r in sides["train"]] == [f"test {i}" for i in range(5)]
    assert sides["train"][1]["id"] == "test:2" and sides["train"][1]["group"] == "r1"
    with pytest.raises(StepFailed, match="split nope"):
        make(tmp_path / "p", split="nope", **more)


def test_the_standard_librarys_products_agree_on_groups(tmp_path: Path) -> None:
    """Code, its documentation and questions about it never straddle the split."""
    groups: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for product, fmt in (("source", "text"), ("questions", "messages"), ("preferences", "preference")):
        more = {"origin": "pystdlib", "pystdlib": product, "format": fmt}
        metrics, sides, _ = make(tmp_path / product, filters=CLEAN[:1], fraction=0.1, **more)
        assert metrics["documents_in"] == metrics["documents_out"] > 300
        for side, rows in sides.items():
            groups[side] |= {row["group"] for row in rows}
    assert groups["heldout"] and not groups["train"] & groups["heldout"]


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    rows = [{"text": f"schön {i % 40}", "g": f"m{i % 9}"} for i in range(100)]
    path = lines(tmp_path / "x.jsonl", rows)
    code = (
        "import sys; from pathlib import Path; from tests.work.test_corpus import make, CLEAN;"
        "make(Path(sys.argv[1]), Path(sys.argv[2]), filters=CLEAN, group_field='g')"
    )
    for seed in ("1", "2"):
        env = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]),
        }
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed), str(path)], env=env, check=True)
    for name in ("train.parquet", "heldout.parquet", "stats.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
