"""The description of the HTTP API, made from the same records that decode it.

In: the endpoints. Out: an OpenAPI 3.1 document as plain data, served at ``/openapi.json``::

    describe_api(ENDPOINTS)["paths"]["/embed"]["post"]["requestBody"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from turbotx import __version__
from turbotx.serving import schemas

REFUSALS = {
    "401": "no or a wrong API key",
    "413": "body, batch or input too large",
    "422": "bad input",
    "424": "the model failed for this input",
    "429": "overloaded: see Retry-After",
    "503": "not ready, or timed out",
}


@dataclass(frozen=True)
class Endpoint:
    """One path. ``body`` is None for GET; ``returns`` a JSON schema, or a record's name."""

    path: str
    summary: str
    handler: Any
    body: Any = None
    returns: Any = None
    openai: bool = False  # refusals in OpenAI's shape


def array_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def record(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def describe_api(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The whole document."""
    records = [
        getattr(schemas, name)
        for name in sorted(vars(schemas))
        if isinstance(getattr(schemas, name), type)
        and issubclass(getattr(schemas, name), msgspec.Struct)
    ]
    _, components = msgspec.json.schema_components(
        records, ref_template="#/components/schemas/{name}"
    )
    for name, field in (("EmbeddingsRequest", "input"), ("EmbedRequest", "inputs")):
        components[name]["properties"][field] = _inputs_schema()
    components["PredictRequest"]["properties"]["inputs"] = _pairs_schema()
    return {
        "openapi": "3.1.0",
        "info": {"title": "turbotx", "version": __version__},
        "paths": {e.path: {_method(e): _operation(e)} for e in endpoints},
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _method(endpoint: Endpoint) -> str:
    return "get" if endpoint.body is None else "post"


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    refusal = record("OpenAIErrorResponse" if endpoint.openai else "ErrorResponse")
    answer = {"description": "done"}
    if endpoint.returns is not None:
        answer = {"description": "done", "content": {"application/json": {"schema": endpoint.returns}}}  # type: ignore[dict-item]  # fmt: skip  # noqa: E501
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": endpoint.path.strip("/").replace("/", "_").replace(".", "_"),
        "responses": {"200": answer},
    }
    if endpoint.body is not None:
        content = {"application/json": {"schema": record(endpoint.body.__name__)}}
        operation["requestBody"] = {"required": True, "content": content}
        for status, text in REFUSALS.items():
            operation["responses"][status] = {
                "description": text,
                "content": {"application/json": {"schema": refusal}},
            }
    elif endpoint.path == "/ready":
        operation["responses"]["503"] = {"description": "starting, draining or failed"}
    return operation


def _inputs_schema() -> dict[str, Any]:
    text, ids = {"type": "string", "minLength": 1}, array_of({"type": "integer", "minimum": 0})
    some = {"minItems": 1}
    return {"anyOf": [text, {**array_of(text), **some}, {**ids, **some}, {**array_of({**ids, **some}), **some}]}  # fmt: skip  # noqa: E501


def _pairs_schema() -> dict[str, Any]:
    text = {"type": "string", "minLength": 1}
    pair = {**array_of(text), "minItems": 1, "maxItems": 2}
    return {"anyOf": [text, pair, {**array_of(pair), "minItems": 1}]}
