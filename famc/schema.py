"""The JSON Schema of a spec, for editors: generated from the models that read it, so that it can't drift."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from famc.spec.family import Family
from famc.steps import STAGES

# What is also read, beside what the models hold: a word for a list of words, a rate for a schedule, a preset.
SHORT: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Export", "quant", {"type": "string"}),
    ("Export", "target", {"type": "string"}),
    ("Calibrate", "data", {"type": "string"}),
    *((f"stage_{kind}", "lr", {"type": "number", "exclusiveMinimum": 0}) for kind in STAGES),
)
PRESET = {"type": "string", "description": "a preset"}


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
        then = {"$ref": f"#/$defs/stage_{kind}"}
        alternatives.append({"if": {"properties": {"kind": {"const": kind}}}, "then": then})
    del definitions["StageSpec"]
    stage = {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": sorted(STAGES)}},
        "allOf": alternatives,
    }
    properties = schema["properties"]
    _named(properties["stages"], stage)
    _named(properties["sizes"], {"anyOf": [{"$ref": "#/$defs/Size"}, PRESET]})
    for owner, field, short in SHORT:
        fields = definitions[owner]["properties"]
        if field in fields:
            fields[field] = _or(fields[field], short)
    tidy: dict[str, Any] = _tidy(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tidy, "title": "famc family"}


def _named(section: dict[str, Any], value: dict[str, Any]) -> None:
    """Put a schema in the place of that of a section's values."""
    if "patternProperties" in section:
        (pattern,) = section["patternProperties"]
        section |= {"patternProperties": {pattern: value}, "additionalProperties": False}
    else:
        section["additionalProperties"] = value


def _tidy(part: Any) -> Any:
    """pydantic leaves `ge` beside an amount's alternatives: it belongs to the number among them."""
    if isinstance(part, list):
        return [_tidy(item) for item in part]
    if not isinstance(part, dict):
        return part
    tidy = {key: _tidy(value) for key, value in part.items() if not (key == "ge" and "anyOf" in part)}
    if "anyOf" in part and "ge" in part:
        number = {**tidy["anyOf"][0], "minimum": part["ge"]}
        tidy["anyOf"] = [number, *tidy["anyOf"][1:]]
    return tidy


def _or(field: dict[str, Any], short: dict[str, Any]) -> dict[str, Any]:
    words: tuple[str, ...] = ("description", "default", "title")
    about = {key: field.pop(key) for key in words if key in field}
    return {"anyOf": [field, short], **about}
