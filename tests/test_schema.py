"""What famc reads, the schema allows; what it refuses, an editor underlines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_build import SPEC
from ruamel.yaml import YAML

from famc.schema import json_schema
from famc.steps import STAGES

SPECS = sorted((Path(__file__).parent.parent / "specs").glob("*.yaml"))
SCHEMA = json.loads(json.dumps(json_schema()))
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": (int, float),
}


ANNOTATIONS = {"$schema", "$defs", "title", "description", "default"}
OF_OTHER_TYPES = {
    "required",
    "properties",
    "patternProperties",
    "additionalProperties",
    "items",
    "prefixItems",
}


def faults(value: Any, schema: dict[str, Any], at: str = "") -> list[str]:
    """The part of JSON Schema that famc's uses. A word that is not known here raises."""
    found: list[str] = []
    for word, wanted in schema.items():
        if word == "$ref":
            found += faults(value, SCHEMA["$defs"][wanted.removeprefix("#/$defs/")], at)
        elif word == "type":
            right = isinstance(value, TYPES[wanted]) and (wanted == "boolean" or not isinstance(value, bool))
            if not right or (wanted == "integer" and value != int(value)):
                found.append(f"{at}: {value!r} is no {wanted}")
        elif word in ("enum", "const"):
            if value not in (wanted if word == "enum" else [wanted]):
                found.append(f"{at}: {value!r} is not in {wanted}")
        elif word == "anyOf":
            if all(faults(value, part, at) for part in wanted):
                found.append(f"{at}: {value!r} is none of {[p.get('type', p) for p in wanted]}")
        elif word == "allOf":
            for part in wanted:
                if not faults(value, part["if"], at):
                    found += faults(value, part["then"], at)
        elif word == "required" and isinstance(value, dict):
            found += [f"{at}: lacks {key}" for key in wanted if key not in value]
        elif word in ("properties", "patternProperties", "additionalProperties") and isinstance(value, dict):
            if word == "properties":
                for key in value.keys() & wanted.keys():
                    found += faults(value[key], wanted[key], f"{at}.{key}")
            elif word == "patternProperties":
                for key in value:
                    for pattern, part in wanted.items():
                        if re.search(pattern, key):
                            found += faults(value[key], part, f"{at}.{key}")
            else:
                known = schema.get("properties", {})
                extra = [
                    k
                    for k in value
                    if k not in known
                    and not any(re.search(p, k) for p in schema.get("patternProperties", {}))
                ]
                for key in extra:
                    found += (
                        [f"{at}: unknown {key}"]
                        if wanted is False
                        else faults(value[key], wanted, f"{at}.{key}")
                        if wanted is not True
                        else []
                    )
        elif word in ("items", "prefixItems") and isinstance(value, list):
            for index, item in enumerate(value):
                part = wanted if word == "items" else wanted[index] if index < len(wanted) else {}
                found += faults(item, part, f"{at}[{index}]")
        elif word in (
            "minimum",
            "maximum",
            "exclusiveMinimum",
            "exclusiveMaximum",
            "pattern",
            "minItems",
            "maxItems",
            "minProperties",
        ):
            checks = {
                "minimum": lambda v, w: v >= w,
                "maximum": lambda v, w: v <= w,
                "exclusiveMinimum": lambda v, w: v > w,
                "exclusiveMaximum": lambda v, w: v < w,
                "pattern": lambda v, w: re.search(w, v) is not None,
                "minItems": lambda v, w: len(v) >= w,
                "maxItems": lambda v, w: len(v) <= w,
                "minProperties": lambda v, w: len(v) >= w,
            }
            try:
                held = checks[word](value, wanted)
            except TypeError:
                held = True  # a word about another type
            found += [] if held else [f"{at}: {value!r} breaks {word} {wanted}"]
        else:
            assert word in ANNOTATIONS | OF_OTHER_TYPES, word
    return found


def read(text: str) -> Any:
    return json.loads(json.dumps(YAML(typ="safe").load(text)))


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.name)
def test_the_schema_allows_every_example(path):
    assert faults(read(path.read_text(encoding="utf-8")), SCHEMA) == []


SHORTHANDS = [
    ("lr: 1e-3", "lr: {peak: 1e-3, schedule: wsd}"),
    ("quant: [fp32, int4]", "quant: int4"),
    ("target: cpu", "target: [cpu, cuda]"),
    ("s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}", "s: qwen3-0.6b"),
    ("s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}", "s: {params: 1.5B}"),
    ("bytes: 100kB", "bytes: 100000"),
    ("sizes: all, eval: lm", "sizes: [s], eval: lm"),
]


@pytest.mark.parametrize(("old", "new"), [("famc: 1", "famc: 1"), *SHORTHANDS])
def test_the_schema_allows_every_way_to_write_a_value(old, new):
    assert SPEC.count(old) == 1
    assert faults(read(SPEC.replace(old, new)), SCHEMA) == []


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("seed: 7", "sed: 7", ".family: unknown sed"),
        ("seed: 7", "seed: seven", ".family.seed: 'seven' is no integer"),
        ("kind: sft", "kind: sftt", ".stages.sft.kind: 'sftt' is not in"),
        ("epochs: 1}", "epoch: 1}", ".stages.sft: unknown epoch"),
        ("lr: 1e-3", "lr: {peek: 1}", ".stages.pretrain.lr: {'peek': 1} is none of"),
        ("layers: 3", "layers: 0", ".sizes.m: "),
        ("  sft:", "  -sft:", ".stages: unknown -sft"),
    ],
)
def test_the_schema_refuses_mistakes(old, new, what):
    found = faults(read(SPEC.replace(old, new, 1)), SCHEMA)
    assert any(line.startswith(what) for line in found), found


def test_every_reference_leads_somewhere_and_every_kind_is_there():
    refs = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(SCHEMA)))
    assert refs <= SCHEMA["$defs"].keys()
    assert {f"stage_{kind}" for kind in STAGES} <= refs


def test_every_value_of_a_section_is_described():
    for name, part in SCHEMA["properties"].items():
        assert part.get("description"), name
