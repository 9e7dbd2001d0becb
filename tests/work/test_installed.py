"""Installed packages are read without being imported, under the names that users write, each passage once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from test_corpus import make

from famc.errors import StepFailed, UsageError
from famc.graph import Graph, resolve
from famc.plan import keys, plan
from famc.run import refuse_blocked
from famc.spec.load import drafts
from famc.steps import STAGES, corpus, installed_id
from famc.work import installed
from famc.work.installed import package, pair_documents
from famc.work.text import draw, same

Make = Callable[..., Path]

LONG = "It says more than forty characters about what happens, and when."
TOLD = f'"""Fold the given sheet. {LONG}"""'


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Installs made-up packages: `pip("a-package", {"a/__init__.py": …}, version="2")`."""
    site = tmp_path / "site"

    def install(
        name: str, files: Mapping[str, str], version: str = "1.0", record: bool = True, about: str = ""
    ) -> Path:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{about}\n")
        for path, text in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        if record:
            rows = [f"{path},sha256=x,{len(text.encode())}" for path, text in files.items()]
            rows += ["../../bin/tool.py,sha256=x,9", f"{info.name}/RECORD,,"]
            (info / "RECORD").write_text("\n".join(rows) + "\n")
        else:
            (info / "top_level.txt").write_text("\n".join({path.split("/")[0] for path in files}))
        forget()
        return site

    monkeypatch.syspath_prepend(str(site))
    yield install
    forget()


def forget() -> None:
    for cached in (installed_id.about, installed_id.python_files, installed_id.python_bytes):
        cached.cache_clear()
    installed.package.cache_clear()
    installed._pairs.cache_clear()


def pairs(*names: str) -> dict[str, tuple[str, list[str]]]:
    """id -> query, passages."""
    found = pair_documents({name: str(installed_id.version(name)) for name in names})
    assert len({row["id"] for row in found}) == len(found)
    return {row["id"]: (row["query"], row["positives"]) for row in found}


# --- what is read -------------------------------------------------------------------------------------------


def test_a_docstring_answers_its_name_and_its_first_sentence(pip: Make) -> None:
    pip("a-map", {"maps.py": f"def fold(x):\n    {TOLD}\nclass Map:\n    def at(self): '''{LONG} Here.'''\n"})
    assert list(pair_documents({"a-map": "1.0"})) == [
        {"id": "name/maps.Map.at", "group": "a-map", "query": "maps.Map.at", "positives": [f"{LONG} Here."]},
        {
            "id": "name/maps.fold",
            "group": "a-map",
            "query": "maps.fold",
            "positives": [f"Fold the given sheet. {LONG}"],
        },
        {
            "id": "sentence/maps.fold",
            "group": "a-map",
            "query": "Fold the given sheet.",
            "positives": [LONG],
        },
    ]


def test_modules_classes_methods_and_what_stands_under_if_and_try(pip: Make) -> None:
    source = f'''"""The module. {LONG} 0"""
from typing import overload
if True:
    def one(): """{LONG} 1"""
else:
    def two(): """{LONG} 2"""
try:
    class Out:
        """{LONG} 3"""
        class In:
            async def call(self): """{LONG} 4"""
        @overload
        def many(self): ...
        def many(self): """{LONG} 5"""
        def many(self): ...
except ImportError:
    def three(): """{LONG} 6"""
def outer():
    def inner(): """{LONG} 7"""
def short(): """Too short."""
def formatted(): f"""{LONG} {{short}}"""
'''
    pip("parts", {"parts.py": source})
    names = {query for id_, (query, _) in pairs("parts").items() if id_.startswith("name/")}
    wanted = "one two Out Out.In.call Out.many three"
    assert names == {"parts", *(f"parts.{name}" for name in wanted.split())}


def test_an_object_has_the_shortest_public_name_that_a_package_gives_it(pip: Make) -> None:
    def told(kind: str, name: str) -> str:
        return f'{kind} {name}:\n    """{LONG} {name}"""\n'

    pip(
        "deep",
        {
            "deep/__init__.py": "from ._core.api import *\nfrom .io import Reader as Reader, _hidden\n"
            "from .layers import Layer\nfrom os import path\n",
            "deep/_core/__init__.py": "",
            "deep/_core/api.py": "from ._impl import solve, aid\nfrom .. import layers\n__all__ = ['solve']\n",
            "deep/_core/_impl.py": told("def", "solve()") + told("def", "aid()"),
            "deep/io.py": told("class", "Reader") + "    def read(self):\n        "
            f'"""{LONG} read"""\n' + told("def", "_hidden()"),
            "deep/layers/__init__.py": "from .linear import Layer\n__all__ = ('Layer',)\n__all__ += ['Other']\n"
            "from .linear import Other, unlisted\n",
            "deep/layers/linear.py": told("class", "Layer") + told("class", "Other") + told("def", "unlisted()"),
            "deep/round/__init__.py": "from ..round import *\nfrom .round import *\n",
            "deep/round/round.py": "from . import *\nfrom deep.round import circle as circle\n",
        },
    )  # fmt: skip
    assert {query for query, _ in pairs("deep").values()} == {
        "deep.solve",
        "deep._core._impl.aid",
        "deep.Reader",
        "deep.Reader.read",
        "deep.io._hidden",
        "deep.Layer",
        "deep.layers.Other",
        "deep.layers.linear.unlisted",
    }


def test_every_passage_is_there_once(pip: Make) -> None:
    """Across objects, kinds and packages, by name; copies differ in white space and case at most."""
    text = "def {}():\n    '''{}'''\n"
    first = text.format("b", f"Say it. {LONG}") + text.format("a", f"Say  it.\n\n    {LONG.upper()}")
    rest = text.format("z", f"Tell all of it now. {LONG} Twice.") + text.format("y", f"{LONG} Twice.")
    rest += text.format("x", f"Tell some of it now. {LONG} Twice.")
    pip("one", {"one.py": first})
    pip("two", {"two.py": first + rest})
    found = pairs("two", "one")
    assert [id_ for id_ in found if id_.startswith("name/")] == [
        f"name/{n}" for n in ("one.a", "two.x", "two.y", "two.z")
    ]
    assert [id_ for id_ in found if id_.startswith("sentence/")] == []
    passages = [same(text) for _, positives in found.values() for text in positives]
    assert len(passages) == len(set(passages))
    assert pairs("one", "two") == found, "the order in which packages are named does not matter"


def test_objects_with_one_sentence_are_one_query_unless_they_are_many(pip: Make) -> None:
    def named(sentence: str, count: int) -> str:
        return "".join(f"def {sentence[0]}{n}(): '''{sentence} {LONG} {n}'''\n" for n in range(count))

    pip("alike", {"alike.py": named("Wait for the barrier.", 8) + named("Run this function.", 9)})
    sentences = {id_: found for id_, found in pairs("alike").items() if id_.startswith("sentence/")}
    waits = [f"{LONG} {n}" for n in range(8)]
    assert sentences == {"sentence/alike.W0": ("Wait for the barrier.", waits)}


def test_tests_other_peoples_and_generated_files_are_left_out(pip: Make) -> None:
    text = 'def f():\n    """{}"""\n'
    skipped = [
        "tests/a.py", "test_b.py", "x/c_test.py", "conftest.py", "_vendor/six/d.py", "externals/e.py",
        "third_party/f.py", "g_pb2.py", "_version.py",
    ]  # fmt: skip
    files = {f"big/{path}": text.format(f"{LONG} {path}") for path in skipped}
    heads = [
        "# This file was automatically generated from x.\n",
        "# @generated by make\n",
        "#  DO NOT EDIT!\n",
    ]
    files |= {f"big/gen{n}.py": head + text.format(f"{LONG} {n}") for n, head in enumerate(heads)}
    files |= {
        f"big/{path}": text.format(f"{LONG} {path}") for path in ("latest.py", "testing.py", "contest/a.py")
    }
    files["big/later.py"] = "# A position is generated by the caller; they do not modify it.\n" + text.format(
        LONG
    )
    files["big/legal.py"] = text.format(f"Copyright 2025 by somebody. {LONG}")
    files["big/listed.py"] = text.format(
        "hidden (`int`, *optional*, defaults to 4):\n    The width of it all."
    )
    pip("big", files)
    assert {query for query, _ in pairs("big").values()} == {
        f"big.{name}.f" for name in ("latest", "testing", "contest.a", "later")
    }


def test_nothing_is_imported_and_what_cannot_be_parsed_is_told(pip: Make, tmp_path: Path) -> None:
    files = {
        "odd/__init__.py": f"raise SystemExit('imported')\ndef f(): {TOLD}\n",
        "odd/template.py": f"def {{name}}(): {TOLD}\n",
        "odd/null.py": "\0",
    }
    pip("odd", files)
    assert "name/odd.f" in pairs("odd") and "odd" not in sys.modules
    assert package("odd").unread == ("odd/null.py", "odd/template.py")
    _, _, stats = make(tmp_path / "out", **params("odd"), fraction=0)
    assert stats["skipped_files"] == ["odd/null.py", "odd/template.py"]


def test_a_package_without_a_record_and_one_of_another_name(pip: Make) -> None:
    pip(
        "py-thing",
        {"thing/__init__.py": f"def f(): {TOLD}\n", "thing/sub/x.py": f"def g(): '''{LONG}'''\n"},
        record=False,
    )
    assert set(pairs("py-thing")) == {"name/thing.f", "name/thing.sub.x.g"}
    assert installed_id.python_bytes("py-thing") > 100


def test_a_lost_file_stops_the_step(pip: Make) -> None:
    site = pip("lost", {"lost.py": f"def f(): {TOLD}\n"})
    (site / "lost.py").unlink()
    with pytest.raises(StepFailed, match=r"package 'lost': lost.py can't be read: No such file") as error:
        pairs("lost")
    assert "install lost again" in str(error.value.hint)


# --- the source and its step --------------------------------------------------------------------------------


def params(*names: str, **more: Any) -> dict[str, Any]:
    versions = {name: str(installed_id.version(name)) for name in names}
    return {"format": "pairs", "origin": "installed", "installed": versions, **more}


def test_n_keeps_the_smallest_draws_and_scans_once(
    pip: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "".join(f"def f{n}(): '''Do task number {n} now. {LONG} {n}'''\n" for n in range(30))
    pip("many", {"many.py": source})
    scans: list[str] = []
    plain_scan = installed._scan
    monkeypatch.setattr(installed, "_scan", lambda *args: (scans.append(args[0]), plain_scan(*args))[1])
    _, sides, _ = make(tmp_path / "all", **params("many"), fraction=0)
    _, some, _ = make(tmp_path / "some", **params("many", n=7), fraction=0)
    ids = [row["id"] for row in sides["train"]]
    assert len(ids) == 60 and {row["group"] for row in sides["train"]} == {"many"}
    smallest = sorted(ids, key=lambda id_: draw(7, id_))[:7]
    assert [row["id"] for row in some["train"]] == [id_ for id_ in ids if id_ in smallest]
    assert scans == ["many"]


def test_another_version_than_planned_stops_the_step(pip: Make, tmp_path: Path) -> None:
    pip("moved", {"moved.py": f"def f(): {TOLD}\n"}, version="2.0")
    planned = params("moved") | {"installed": {"moved": "1.0"}}
    with pytest.raises(StepFailed, match=r"package 'moved': version 1.0 was planned, 2.0 is installed"):
        make(tmp_path / "out", **planned)


SPEC = """\
famc: 1
family: {name: finder, seed: 7}
arch: {type: qwen3, head_dim: 32, context: 64}
sizes: {s: {layers: 2, hidden: 64, ffn: 128, heads: 2, tie: true}}
tokenizer: {vocab: 1000, train_on: {mix: code}}
data: {sources: {code: {pystdlib: docs}, lib: {installed: PACKAGES}}}
stages:
  pretrain: {kind: pretrain, data: code}
  emb: {kind: embed, from: pretrain, data: lib}
variants: {embedding: {stage: emb}}
"""


def graph(tmp_path: Path, packages: str) -> Graph:
    return resolve(drafts(SPEC.replace("PACKAGES", packages), STAGES, folder=tmp_path))


def test_identity_is_names_and_versions_but_neither_paths_nor_order_nor_spelling(
    pip: Make, tmp_path: Path
) -> None:
    site = pip("py-one", {"one.py": "1"}, about="License-Expression: MIT")
    pip("two", {"two.py": "2"}, about="Classifier: License :: OSI Approved :: BSD License")
    before = graph(tmp_path, "[py-one, two]").nodes["data/lib"]
    assert before.params["installed"] == {"py-one": "1.0", "two": "1.0"} and not before.missing
    assert before.params["license"] == "MIT, BSD License"
    assert str(site) not in json.dumps(before.params)
    assert graph(tmp_path, "[two, Py_One]").nodes["data/lib"].params == before.params
    (site / "two-1.0.dist-info").rename(site / "two-1.1.dist-info")
    about = site / "two-1.1.dist-info/METADATA"
    about.write_text(about.read_text().replace("Version: 1.0", "Version: 1.1"))
    forget()
    after = graph(tmp_path, "[py-one, two]")
    assert after.nodes["data/lib"].params["installed"] == {"py-one": "1.0", "two": "1.1"}
    assert keys(after)["data/lib"] != keys(graph(tmp_path, "[py-one]"))["data/lib"]


def test_a_package_that_is_not_installed_is_planned_and_refused_before_anything_starts(
    pip: Make, tmp_path: Path
) -> None:
    pip("there", {"there.py": f"def f(): {TOLD}\n"})
    pip("compiled", {"compiled.so": ""})
    made = plan(graph(tmp_path, "[there, no-such, scikit_learn, sklearn, compiled]"), tmp_path / "out")
    step = made.steps["data/lib"]
    assert step.status == "blocked"
    assert step.node.missing == (
        "package 'compiled' has no Python sources among its installed files",
        "package 'no-such' is not installed",
        "package 'sklearn' is not installed; module sklearn is part of scikit-learn",
    )
    assert step.node.params["installed"]["no-such"] is None
    with pytest.raises(UsageError, match="data/lib: package 'no-such' is not installed"):
        refuse_blocked(made)


@pytest.mark.parametrize(
    ("about", "license_"),
    [
        ("License-Expression: MIT AND BSD-3-Clause\nLicense: something", "MIT AND BSD-3-Clause"),
        ("License: Apache 2.0\nClassifier: License :: OSI Approved :: Apache Software License", "Apache 2.0"),
        ("License: UNKNOWN\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
        ("License: Copyright\n        all of it", "unknown"),
        (f"License: {'whole text ' * 9}\nClassifier: License :: OSI Approved :: BSD License", "BSD License"),
        ("", "unknown"),
    ],
)
def test_licence(pip: Make, about: str, license_: str) -> None:
    pip("owned", {"owned.py": ""}, about=about)
    assert installed_id.license_of(["owned"]) == license_


def test_amounts_follow_the_sources_and_stop_at_n(pip: Make) -> None:
    pip("large", {"large.py": "#" * 5_000_000})
    base = {**params("large"), "heldout": {"fraction": 0.1}}
    some = corpus.amount({**base, "n": 100})
    every = corpus.amount({**base, "n": None})
    assert some.examples == pytest.approx(90) and every.basis == "modelled"
    assert 1000 < every.examples < 5000 and corpus.amount({**base, "n": 10**9}) == every
    assert corpus.amount({**base, "installed": {"large": "1", "no-such": None}}).basis == "assumed"


# --- what is really installed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least", "known"),
    [
        ("networkx", 2500, {"networkx.pagerank": "PageRank", "networkx.DiGraph.add_edge": "edge"}),
        ("numpy", 2000, {"numpy.concatenate": "Join", "numpy.linalg.svd": "Singular Value Decomposition"}),
        (
            "scikit-learn",
            3500,
            {"sklearn.linear_model.Ridge.fit": "Ridge", "sklearn.clone": "estimator"},
        ),
    ],
)
def test_installed_packages_answer(name: str, least: int, known: dict[str, str]) -> None:
    found = pairs(name)
    assert len(found) > least
    for symbol, word in known.items():
        assert word in found[f"name/{symbol}"][1][0]
    modelled = corpus.amount({**params(name), "n": None, "heldout": {"fraction": 0.0}})
    assert 0.4 < modelled.examples / len(found) < 2.5


def test_pairs_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import json; from famc.work.installed import pair_documents; from importlib.metadata import version; "
        "from hashlib import sha256; "
        "print(sha256(json.dumps(pair_documents({'networkx': version('networkx')})).encode()).hexdigest())"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        here = json.dumps(pair_documents({"networkx": metadata.version("networkx")}))
        assert run.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_the_plan_stays_fast_and_light() -> None:
    """Versions, licences and sizes of torch and transformers come from what the installer wrote down."""
    forget()
    start = time.process_time()
    for name in ("torch", "transformers"):
        assert not installed_id.absent(name)
        assert installed_id.python_bytes(name) > 10e6
    assert installed_id.license_of(["torch", "transformers"]) != "unknown"
    assert time.process_time() - start < 0.5  # some 0.02 s on an idle core


def test_scanning_is_fast() -> None:
    """Some 4 MB of sources a CPU-second."""
    forget()
    start = time.process_time()
    package("numpy")
    size = installed_id.python_bytes("numpy")
    assert (time.process_time() - start) / size < 1e-6
