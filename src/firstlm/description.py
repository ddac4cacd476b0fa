# SPDX-License-Identifier: Apache-2.0
"""What the server's OpenAPI description says beyond the types of its fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from firstlm.model import FirstModel


def _given(*names: str, **values: Any) -> dict[str, Any]:
    """Return a schema of bodies that give some fields, and others with some values."""
    found = {name: {"not": {"type": "null"}} for name in names}
    return {"required": [*names, *values], "properties": found | values}


RATED = {"enum": ["majority", "unified", "random"]}  # policies that need a skip rate
CONTRADICTIONS = [  # that `Choices.asked` refuses
    _given("keep", "skip_layers"),
    *(_given(mask, other) for mask in ("keep", "skip_layers") for other in ("policy", "skip_rate")),
    _given(policy={"const": "run_all"}, skip_rate={"exclusiveMinimum": 0, "type": "number"}),
    _given(policy=RATED, skip_rate={"type": "null"}),
    _given(policy=RATED) | {"not": {"required": ["skip_rate"]}},
]


def describe(schemas: dict[str, Any], model: FirstModel) -> None:
    """Put into schemas of requests what no type says.

    That is a model's numbers, that null is no value at all, and what contradicts itself.

    Args:
        schemas: of OpenAPI, by name; changed in place.
        model: the one that is asked.
    """
    rates = [row.rate for row in model.thresholds.table.get("skip", [])]
    tokens = {"minimum": 0, "maximum": model.config.get_text_config().vocab_size - 1}
    limits = {
        ("skip_rate", "number"): {"maximum": max(rates, default=0.0)},
        ("keep", "array"): {"minItems": model.layer_count, "maxItems": model.layer_count},
        ("skip_layers", "integer"): {"minimum": 0, "maximum": model.layer_count - 1},
        ("prompt", "array"): {"minItems": 1},
        ("prompt", "integer"): tokens,
    }
    for name in ("CompletionRequest", "ChatRequest"):
        schemas[name]["not"] = {"anyOf": CONTRADICTIONS}
        fields = schemas[name]["properties"]
        for field, about in fields.items():
            for part in _parts_of(about):
                part |= limits.get((field, str(part.get("type"))), {})
            nullable = {"type": "null"} in about.get("anyOf", ())
            if not nullable and field not in schemas[name]["required"]:
                told = about.keys() & {"title", "description", "default"}
                outer = {key: about.pop(key) for key in told}
                fields[field] = {"anyOf": [about, {"type": "null"}], **outer}


def _parts_of(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a schema and what it is made of."""
    yield schema
    for part in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())):
        yield from _parts_of(part)
