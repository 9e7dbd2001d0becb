"""The JSON Schema of a spec, for editors: generated from the models that read it, so that it can't drift."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from famc.spec.family import Family
from famc.steps import STAGES


def json_schema() -> dict[str, Any]:
    """The shared sections, and one alternative a kind for the stages."""
    schema = Family.model_json_schema(by_alias=True)
    definitions: dict[str, Any] = schema["$defs"]
    alternatives = []
    for kind, model in STAGES.items():
        part = TypeAdapter(model).json_schema(by_alias=True)
        definitions.update(part.pop("$defs", {}))
        part["properties"]["kind"] = {"const": kind, "description": (model.__doc__ or "").strip()}
        definitions[f"stage_{kind}"] = part
        alternatives.append({"if": {"properties": {"kind": {"const": kind}}}, "then": {"$ref": f"#/$defs/stage_{kind}"}})
    definitions.pop("StageSpec", None)
    schema["properties"]["stages"]["additionalProperties"] = {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": sorted(STAGES)}},
        "allOf": alternatives,
    }
    sizes = schema["properties"]["sizes"]["additionalProperties"]
    schema["properties"]["sizes"]["additionalProperties"] = {"anyOf": [sizes, {"type": "string", "description": "a preset"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "famc family", **schema}
