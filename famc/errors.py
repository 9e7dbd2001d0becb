"""Every error that famc raises on purpose, drawn once. Each says where, what, and what to do.

    FamcError                exit 1
     ├─ SpecError            exit 2   problems in a spec: all of them, each with file:line:column
     ├─ UsageError           exit 2   a command line that can't be carried out
     ├─ FitError             exit 3   the plan can't fit its hardware
     └─ StepFailed           exit 1   a step or a gate failed while running
         └─ StoreError       exit 1   an artifact that isn't what its record says

A user's own mistake never shows a traceback: the command line catches FamcError and prints `render()`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Where:
    """A place that a user wrote: a file with a line and a column (both from 1), or `--set NAME=VALUE`."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it stands, what it is, and (when known) what to do."""

    where: Where | None
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}; {self.hint}" if self.hint else text


class FamcError(Exception):
    """The root of all errors that famc raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def render(self) -> str:
        """The text that the command line shows."""
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class SpecError(FamcError):
    """Mistakes in a spec. All that can be found at once, in the order of the file."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]) -> None:
        unique = dict.fromkeys(problems)
        self.problems = sorted(unique, key=lambda p: (p.where.line, p.where.column) if p.where else (0, 0))
        super().__init__("\n".join(str(p) for p in self.problems))


class UsageError(FamcError):
    """A command line that can't be carried out."""

    exit_code = 2


class FitError(FamcError):
    """Steps that do not fit the hardware that the spec gives them."""

    exit_code = 3


class StepFailed(FamcError):
    """A step failed while it ran."""


class StoreError(StepFailed):
    """An artifact in the store is missing files, or its files are not those that its record names."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for a misspelt word, else the words that would have been right."""
    names = sorted({str(name) for name in known})
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    if not names:
        return ""
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"known: {shown}"
