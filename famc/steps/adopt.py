"""`adopt`: an existing checkpoint enters the family as a stage that others start from.

In: a folder or a pinned hub revision. Out: a model folder, its shape and vocabulary checked against the size.
Identity: the folder's files, or repository and revision.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from famc.spec.family import StageSpec


class Adopt(StageSpec):
    """An existing checkpoint."""

    VERSION: ClassVar[int] = 1

    path: str | None = Field(None, description="Hugging Face model folder")
    hf: str | None = Field(None, description="repository on the hub; needs revision")
    revision: str | None = Field(None, description="commit of the hub repository")
    license: str | None = Field(
        None, description="licence of the checkpoint; must be given if its card has none"
    )

    @classmethod
    def references(cls) -> dict[str, str]:
        return {}
