"""What is wrong with a spec once names are followed: every rule a small function, all of them run, all
problems told.

In: a Spec whose sections are each valid, perhaps with mistakes left out. Out: all problems, those of the
reading first. names.py: what a name means; graph.py uses it too. shapes.py: sizes, tokenizer, hardware.
data.py: sources and mixes. stages.py: edges between stages. architectures.py: what each can be trained for.
retrieval.py: embedders and rerankers. publish.py: variants, evaluations, gates, release. exports.py: formats
and devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from famc.checks import architectures, data, exports, publish, retrieval, shapes, stages
from famc.checks.names import Names, spec_files, split_ref
from famc.errors import Problem
from famc.spec.load import Spec
from famc.spec.words import Fault

__all__ = ["Names", "check", "spec_files", "split_ref"]

Rule = Callable[[Spec], Iterator[Fault]]
# Each rule stands alone, and takes a name that means nothing for somebody else's problem.
RULES: tuple[Rule, ...] = (
    shapes.sizes,
    shapes.tokenizer,
    shapes.backends,
    data.sources,
    data.files,
    data.recipes,
    data.mixes,
    stages.references,
    stages.budgets,
    stages.overrides,
    stages.edges,
    architectures.architectures,
    stages.teachers,
    retrieval.embedders,
    retrieval.rerankers,
    retrieval.negatives,
    retrieval.inherited,
    publish.variants,
    publish.evals,
    exports.exports,
    exports.targets,
    publish.gates,
    publish.matches,
    publish.release,
)


def check(spec: Spec) -> list[Problem]:
    """Every problem of a spec. What only follows from a part that was left out is not told."""
    problems = list(spec.problems)
    for rule in RULES:
        for fault in rule(spec):
            if not _echo(spec, fault):
                problems.append(spec.problem(fault.path, fault.message, fault.hint, key=fault.key))
    return problems


def _echo(spec: Spec, fault: Fault) -> bool:
    """Whether a fault stands in, or just above, something that was left out."""
    return any(fault.path[: len(known)] == known or fault.path == known[:-1] for known in spec.dropped)
