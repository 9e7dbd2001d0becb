"""What a user writes. family.py: the language. quantity.py: `20GB`, `3M`. text.py: YAML with places. load.py: text -> Spec.
smoke.py: the rehearsal's small numbers."""

from famc.spec.family import Family, StageSpec, Strict
from famc.spec.load import Spec, load, loads

__all__ = ["Family", "Spec", "StageSpec", "Strict", "load", "loads"]
