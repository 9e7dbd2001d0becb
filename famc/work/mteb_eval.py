"""`mteb`: an embedder on tasks of MTEB by name, or on held-out pairs as a task of MTEB's kind.

In: an embedder's folder; the package mteb, which famc does not install by itself. Out: each task's main score, and of the
held-out pairs three scores, as the harness counts them: without errors, for it tells none by query. Data of named tasks
lie in the hub's cache; a job that may be online loads them into it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from famc.errors import StepFailed, did_you_mean
from famc.work.evaluate import Measured, Subject
from famc.work.likelihood import without_bars
from famc.work.retrieval_eval import Questions
from famc.work.scores import Score
from famc.work.search import Embedder

HELD_OUT = "held_out"  # what the task of a source's own pairs is called
SCORES = ("ndcg_at_10", "mrr_at_10", "recall_at_100")  # of it
_BATCH = 64


def mteb(subject: Subject, task: Mapping[str, Any], data: Path | None) -> Measured:
    """Named tasks, or one of the held-out pairs where none is named."""
    try:
        import mteb as harness
    except ImportError:
        raise StepFailed("the task 'mteb' needs the package mteb", "pip install 'famc[mteb]'") from None
    names = list(task["tasks"])
    if names:
        known = {one.metadata.name for one in harness.get_tasks()}
        for name in names:
            if name not in known:
                raise StepFailed(
                    f"mteb has no task {name!r}", did_you_mean(name, known) or "mteb available-tasks"
                )
    questions = None if names else Questions.read(data, task["n"])
    tasks = [_held_out(questions)] if questions else [harness.get_task(name) for name in names]
    asked = len(questions.queries) if questions else 0
    embedder = Embedder(
        subject.folder, subject.tokenizer_folder, subject.threads, subject.precision, context=subject.context
    )
    measured = Measured()
    for done, one in enumerate(tasks):
        for name, value in _run(harness, embedder.model, one, () if names else SCORES):
            measured.scores[name] = Score(value, math.nan, asked)
            measured.higher[name] = True
        subject.progress((done + 1) / len(tasks))
    return measured


def _run(harness: Any, model: Any, task: Any, scores: Sequence[str]) -> Iterator[tuple[str, float]]:
    """(metric, value): the mean over the task's subsets and splits."""
    name = str(task.metadata.name)
    try:
        with without_bars():
            made = harness.evaluate(
                model, task, cache=None, overwrite_strategy="always", co2_tracker=False,
                encode_kwargs={"batch_size": _BATCH}, show_progress_bar=False,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ConnectionError) as error:
        raise StepFailed(
            f"mteb can't run {name}: {error}", "its data must lie in the hub's cache: load them once online"
        ) from error
    for metric in scores or (str(task.metadata.main_score),):
        parts = [
            part[metric] for found in made.task_results for split in found.scores.values() for part in split
        ]
        yield f"{name}.{metric}", float(sum(parts) / len(parts))


def _held_out(questions: Questions) -> Any:
    from datasets import Dataset
    from mteb import TaskMetadata
    from mteb.abstasks import AbsTaskRetrieval

    class HeldOut(AbsTaskRetrieval):  # type: ignore[misc]
        """The pairs that a source keeps back."""

        metadata = TaskMetadata(
            name=HELD_OUT, description="held-out pairs of a source", type="Retrieval", main_score="ndcg_at_10",
            dataset={"path": HELD_OUT, "revision": "1"}, eval_splits=["test"], eval_langs=["eng-Latn"],
        )  # fmt: skip

    task = HeldOut()
    passages = [{"id": f"p{i}", "text": text} for i, text in enumerate(questions.corpus.passages)]
    queries = [{"id": f"q{i}", "text": text} for i, text in enumerate(questions.queries)]
    task.dataset = {
        "default": {
            "test": {
                "corpus": Dataset.from_list(passages),
                "queries": Dataset.from_list(queries),
                "relevant_docs": {
                    f"q{i}": {f"p{p}": 1 for p in right} for i, right in enumerate(questions.right)
                },
                "top_ranked": None,
            }
        }
    }
    task.data_loaded = True
    return task
