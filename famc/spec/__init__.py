"""What a user writes. family.py: the language. quantity.py: `20GB`, `3M`. text.py: YAML with places.
validate.py: values -> Family, mistakes left out. words.py: what to call a mistake. load.py: a file -> Spec.
smoke.py: the rehearsal's small numbers."""

from famc.spec.family import Family, StageSpec, Strict
from famc.spec.load import Spec, draft, drafts, load, loads, rehearsal

__all__ = ["Family", "Spec", "StageSpec", "Strict", "draft", "drafts", "load", "loads", "rehearsal"]
