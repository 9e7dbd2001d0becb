"""A built variant, tried: a search by an embedder or reranker, an answer of a language model, a word for a gap.

In: a Plan and which variant. Out: a Request (which artifacts are needed, all of them built), and answers to texts as
plain data. The model runs in a process of its own (`python -m famc.work.attempt`) that loads it once and answers line
by line; nothing is trained. An answer: `{"variant", "query"}` with `"results": [{"rank", "score", "id", "source",
"text"}]` (a reranker's with `"before"`, the rank that it found), or with `"answer"`.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from famc.backend import detect_cpu
from famc.bench import chosen
from famc.checks import Names
from famc.errors import StepFailed, UsageError, did_you_mean
from famc.graph import Node
from famc.plan import Plan
from famc.steps.exports import (
    CONVERTING,
    FILLING,
    ONNX_FILES,
    RANKING,
    TEXT,
    VECTORS,
    task_in,
    task_of,
)
from famc.store import Store, digest

K, DEPTH, MAX_NEW_TOKENS = 5, 50, 128
BY = ("bm25", "embedder", "fused")
WORKER = "famc.work.attempt"
END = ":q"  # ends the prompt
CACHE_SCHEMA = 1  # rises when the vectors of equal keys change
# what each option is for
SEARCHING = (VECTORS, RANKING)
OPTIONS = {
    "by": SEARCHING, "dims": (VECTORS,), "export": SEARCHING, "k": (*SEARCHING, FILLING),
    "max_new_tokens": (TEXT, CONVERTING),
}  # fmt: skip
DOES = {
    VECTORS: "an embedder", RANKING: "a reranker", FILLING: "a masked language model",
    CONVERTING: "an encoder and decoder", TEXT: "a language model",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What the worker loads, and how it answers."""

    variant: str  # m/embedding
    task: str
    model: Path
    context: int
    threads: int = 1
    k: int = K
    chat: bool = False  # a conversation; else the text is continued
    max_new_tokens: int = MAX_NEW_TOKENS
    by: str = "fused"  # how passages are found
    dims: int = 0  # of a vector; 0: all
    depth: int = DEPTH  # passages that each method finds, and that a reranker reads
    corpora: Mapping[str, Path] = field(default_factory=dict)  # by source
    retriever: Path | None = None  # the embedder that finds passages
    graph: Path | None = None  # an export that runs in place of the model's weights
    cache: Path | None = None  # file of the passages' vectors

    def to_dict(self) -> dict[str, Any]:
        """What the worker reads."""
        paths = {name: None if p is None else str(p) for name in _PATHS for p in [getattr(self, name)]}
        return {**self.__dict__, **paths, "corpora": {name: str(p) for name, p in self.corpora.items()}}


_PATHS = ("model", "retriever", "graph", "cache")


# --- what is needed -----------------------------------------------------------------------------------------


def request(
    plan: Plan, text: str, *, by: str | None = None, k: int | None = None, dims: int | None = None,
    max_new_tokens: int | None = None, export: str | None = None, threads: int = 0, spec: str = "SPEC",
) -> Request:  # fmt: skip
    """What `m/embedding` needs to be tried, or `embedding` if it is made at one size.

    UsageError for what is not built, with the command that makes it, and for an option that says nothing to it.
    """
    size, variant = _one(plan, text)
    name = f"{size}/{variant}"
    graph = plan.graph
    release = next(
        n for n in graph.nodes.values() if n.kind == "release" and (n.size, n.variant) == (size, variant)
    )
    model = graph.nodes[release.inputs["model"]]
    task = _task(plan, model)
    if task not in DOES:
        raise UsageError(f"{name} reads more than text ({task}), which famc try can't give it")
    given = {"by": by, "dims": dims, "export": export, "k": k, "max_new_tokens": max_new_tokens}
    _refuse(name, task, given)
    if threads < 0:
        raise UsageError("--threads must be at least 1")
    threads = threads or detect_cpu().cores
    context = int(model.params["shape"]["context"])
    needed = [model]
    if task not in SEARCHING:
        _built(plan, name, needed, spec)
        return Request(
            name, task, _folder(plan, model), context, threads, k or K, _converses(plan, model),
            max_new_tokens or MAX_NEW_TOKENS,
        )  # fmt: skip

    corpora = _corpora(plan, model, size, variant)
    if not corpora:
        raise UsageError(
            f"{name} has nothing to search: no source of pairs that it learnt from, or that its evaluation reads"
        )
    finder, usual = (model, "fused") if task == VECTORS else _first_stage(plan, model, size)
    by = by or usual
    if by == "bm25":
        if dims:
            raise UsageError("--dims says nothing to --by bm25: it has no vectors")
        finder = None
    elif finder is None:
        raise UsageError(f"{name} has no embedder in front of it", "--by bm25 finds passages without one")
    elif dims and dims > int(finder.params["shape"]["hidden"]):
        raise UsageError(f"--dims {dims}: vectors of {name} have {finder.params['shape']['hidden']}")
    exported = _exported(plan, size, variant, export) if export else None
    needed += [*corpora.values(), *(node for node in (finder, exported) if node is not None)]
    _built(plan, name, needed, spec, without=finder if task == RANKING else None)
    made = {source: _folder(plan, node) for source, node in corpora.items()}
    runs = exported if exported is not None and task == VECTORS else finder
    return Request(
        name, task, _folder(plan, model), context, threads, k or K, by=by, dims=dims or 0, corpora=made,
        retriever=None if finder is None else _folder(plan, finder),
        graph=None if exported is None else _folder(plan, exported) / ONNX_FILES[exported.params["quant"]],
        cache=None if runs is None else _cache(plan, runs, corpora),
    )  # fmt: skip


def _one(plan: Plan, text: str) -> tuple[str, str]:
    """A name that is made at several sizes needs one of them."""
    found = list(dict.fromkeys(chosen(plan, text)))
    if len(found) > 1:
        names = [f"{size}/{variant}" for size, variant in found]
        raise UsageError(f"{text} is made at several sizes", f"name one of them: {', '.join(names)}")
    return found[0]


def _task(plan: Plan, model: Node) -> str:
    """By the plan; an adopted checkpoint is what its files say, once they are there."""
    folder = _folder(plan, model)
    if model.kind == "adopt":
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return task_in(config, (folder / "modules.json").is_file())
        except (OSError, ValueError):  # not built, which is told later
            pass
    return task_of(model.kind, str(model.params["shape"]["arch"]))


def _refuse(name: str, task: str, given: Mapping[str, Any]) -> None:
    """Options that say nothing to such a variant, or have no such value."""
    for option, value in given.items():
        if value is None:
            continue
        said = f"--{option.replace('_', '-')}" if len(option) > 1 else f"-{option}"
        if task not in OPTIONS[option]:
            kinds = " and ".join(f"{DOES[t].split(' ', 1)[1]}s" for t in OPTIONS[option])
            raise UsageError(f"{said} is for {kinds}; {name} is {DOES[task]}")
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{said} must be at least 1")
    if given["by"] is not None and given["by"] not in BY:
        raise UsageError(f"--by {given['by']}: no such way to search", did_you_mean(given["by"], BY))


def _corpora(plan: Plan, model: Node, size: str, variant: str) -> dict[str, Node]:
    """Sources of pairs, in the graph's order: what the variant learnt from, and what its evaluations read."""
    nodes = plan.graph.nodes
    starts = [
        model,
        *(n for n in nodes.values() if n.kind == "eval" and (n.size, n.variant) == (size, variant)),
    ]
    todo, above = [n.name for n in starts], set()
    while todo:
        name = todo.pop()
        if name not in above:
            above.add(name)
            # `eval.…`: a mix is kept apart from it; it is no part of the mix
            todo += [need for role, need in nodes[name].inputs.items() if not role.startswith("eval.")]
    return {
        node.name.removeprefix("data/"): node
        for node in nodes.values()
        if node.kind == "corpus" and node.params["format"] == "pairs" and node.name in above
    }


def _first_stage(plan: Plan, model: Node, size: str) -> tuple[Node | None, str]:
    """(embedder, how passages are found) in front of a reranker: as the negatives were mined that it learnt from; else
    the family's embedder, else BM25."""
    nodes = plan.graph.nodes
    miner = next((nodes[need] for need in model.inputs.values() if nodes[need].kind == "mine"), None)
    if miner is not None and "model" in miner.inputs:
        both = set(miner.params["methods"]) == {"embedder", "bm25"}
        return nodes[miner.inputs["model"]], "fused" if both else "embedder"
    found = Names(plan.graph.spec).embedder(size)
    embedder = nodes.get("/".join(found)) if found else None
    if miner is not None:  # BM25 alone: its errors are what the reranker has learnt to mend
        return embedder, "bm25"
    return (embedder, "fused") if embedder is not None else (None, "bm25")


def _exported(plan: Plan, size: str, variant: str, label: str) -> Node:
    """The node of an ONNX export."""
    found = {
        node.name.rpartition("/export.")[2]: node
        for node in plan.graph.nodes.values()
        if node.kind == "export" and (node.size, node.variant) == (size, variant)
        and node.params["format"] == "onnx"
    }  # fmt: skip
    if label not in found:
        hint = did_you_mean(label, found) or "the spec exports none: exports: [{format: onnx, …}]"
        raise UsageError(f"{size}/{variant} has no ONNX export '{label}'", hint)
    return found[label]


def _built(plan: Plan, name: str, needed: list[Node], spec: str, without: Node | None = None) -> None:
    """UsageError for steps that have no artifact, with the command that makes them. `without`: an embedder that
    BM25 could stand in for."""
    store = Store(plan.out / "store")
    names = dict.fromkeys(node.name for node in needed)
    missing = [step for step in names if not store.has(step, plan.keys[step])]
    if not missing:
        return
    above = {up for step in missing for up in plan.graph.closure([step], up=True) - {step}}
    last = [step for step in missing if step not in above]  # the others come with these
    hint = f"make it first: famc build {spec} " + " ".join(f"--select +{step}" for step in last)
    if without is not None and missing == [without.name]:
        hint += "; or try it with --by bm25"
    are = "is" if len(missing) == 1 else "are"
    raise UsageError(f"{name} can't be tried: {', '.join(missing)} {are} not built", hint)


def _converses(plan: Plan, model: Node) -> bool:
    """Whether a language model learnt to answer, at any of its stages; a base goes on with a text."""
    nodes = plan.graph.nodes
    node: Node | None = model
    while node is not None:
        data = nodes.get(node.inputs.get("data", ""))
        if data is not None and data.params["format"] != "text":
            return True
        if node.kind == "adopt":
            return _has_template(_folder(plan, node))
        node = nodes.get(node.inputs.get("model", ""))
    return False


def _has_template(folder: Path) -> bool:
    """Whether an adopted checkpoint brings a chat template, which bases of today seldom do."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(settings.get("chat_template"))


def _folder(plan: Plan, node: Node) -> Path:
    return Store(plan.out / "store").path(node.name, plan.keys[node.name])


def _cache(plan: Plan, embedder: Node, corpora: Mapping[str, Node]) -> Path:
    """Where the passages' vectors are kept: a name of its own for every embedder and every set of corpora."""
    keys = {source: plan.keys[node.name] for source, node in corpora.items()}
    key = digest([CACHE_SCHEMA, plan.keys[embedder.name], keys])
    return plan.out / "cache" / "vectors" / f"{embedder.name.replace('/', '.')}-{key[:16]}.npy"


# --- asking -------------------------------------------------------------------------------------------------


class Session:
    """The worker with its model loaded: a text in, an answer out. Ends with its `with` block."""

    def __init__(self, wanted: Request, tell: Callable[[str], None] = lambda text: None) -> None:
        self.wanted = wanted
        self._tell = tell
        self._folder = tempfile.TemporaryDirectory(prefix="famc-try-")
        path = Path(self._folder.name) / "request.json"
        path.write_text(json.dumps(wanted.to_dict()), encoding="utf-8")
        self._log = Path(self._folder.name) / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, encoding="utf-8",
                start_new_session=True,  # Ctrl-C is this process's, which then ends that one
            )  # fmt: skip

    def __enter__(self) -> Session:
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, text: str) -> dict[str, Any]:
        """The answer to a text. UsageError for one that the model can't be asked; StepFailed if it fails."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # an argument may hold bytes that are no text
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it ended: its log says why
            self._process.stdin.write(json.dumps({"text": text}) + "\n")
            self._process.stdin.flush()
        return {"variant": self.wanted.variant, "query": text, **self._answer()}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found: dict[str, Any] = json.loads(line)
            if "doing" in found:
                self._tell(str(found["doing"]))
            elif "refused" in found:
                raise UsageError(str(found["refused"]), str(found["hint"]))
            elif "failed" in found:
                raise StepFailed(str(found["failed"]), str(found["hint"]))
            else:
                return found
        raise StepFailed(f"{self.wanted.variant} gave no answer: {self._end()}")

    def _end(self) -> str:
        """How the worker ended."""
        code = self._process.wait()
        if code < 0:
            try:
                return f"its process was killed by {signal.Signals(-code).name}"
            except ValueError:
                return f"its process was killed by signal {-code}"
        lines = [t for t in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if t.strip()]
        return lines[-1].strip() if lines else f"its process ended with exit code {code}"

    def close(self) -> None:
        """End the worker."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what it did not read
                    stream.close()
        self._folder.cleanup()


def texts(stream: TextIO, prompt: str = "") -> Iterator[str]:
    """What a user types until `:q` or the end, with `prompt` before each; without it the lines of a file. Blank lines
    ask nothing."""
    if prompt:
        with contextlib.suppress(ImportError):  # a line that can be edited, and the ones before it
            import readline  # noqa: F401
        while True:
            try:
                line = input(prompt)
            except EOFError:
                print()
                return
            if line.strip() == END:
                return
            if line.strip():
                yield line
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    for line in stream:
        if line.strip():
            yield line.rstrip("\r\n")
