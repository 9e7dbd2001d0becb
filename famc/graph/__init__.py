"""Spec -> Graph: only the steps that some variant, teacher, gate or generated source needs, each once.

In: a checked Spec. Out: Graph, whose nodes carry every concrete value and where it came from. Pure, but
for reading the names, sizes and times of local data files. `inputs` bear identity; `after` is order only
(a gate before a release).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from famc.checks import check
from famc.errors import SpecError
from famc.graph.node import Graph, Node, ordered
from famc.graph.published import Published, unmatched
from famc.spec.load import Spec, draft, rehearsal
from famc.steps import STAGES


def open_family(
    file: Path, *, profile: str | None = None, sets: Sequence[str] = (), smoke: bool = False
) -> Graph:
    """A spec's file -> its graph. Raises SpecError with every mistake in it at once."""
    return resolve(draft(file, STAGES, profile=profile, sets=sets, smoke=smoke))


def resolve(spec: Spec) -> Graph:
    """The graph of a spec, mistakes and all as `draft` left it. Raises SpecError with every mistake.

    For a rehearsal the spec is checked as it is written, and made small afterwards.
    """
    problems = check(spec)
    if problems:
        raise SpecError(problems)
    if spec.smoke and spec.full is None:
        spec = rehearsal(spec, STAGES)
    builder = Published(spec)
    builder.build()
    problems = unmatched(spec, builder.nodes, builder.gated)
    if problems:
        raise SpecError(problems)
    return Graph(ordered(builder.nodes), spec)


__all__ = ["Graph", "Node", "open_family", "resolve"]
