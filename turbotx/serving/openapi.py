"""OpenAPI description of the HTTP API, generated from the records that decode requests.

In: the endpoints. Out: an OpenAPI 3.1 document as plain data, served at ``/openapi.json``::

    describe_api(ENDPOINTS)["paths"]["/embed"]["post"]["requestBody"]
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import msgspec

from turbotx import __version__
from turbotx.serving import schemas as embedding_schemas

REFUSALS = {
    "401": "no or a wrong API key",
    "415": "the body's encoding is not read here",
    "413": "body, batch or input too large",
    "422": "bad input",
    "424": "the model failed for this input",
    "429": "overloaded: see Retry-After",
    "503": "not ready, or timed out",
    "504": "its deadline passed before its turn came",
}


@dataclass(frozen=True)
class Endpoint:
    """One path. body: the request record, None for GET. returns: a JSON schema or a record's
    name."""

    path: str
    summary: str
    handler: Any
    body: Any = None
    returns: Any = None
    kind: str | None = None  # head kind; selects the model if a request names none
    openai: bool = False  # errors in OpenAI's format
    aliases: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The endpoint's path and its aliases."""
        return (self.path, *self.aliases)


def array_of(item: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an array of items."""
    return {"type": "array", "items": item}


def record(name: str) -> dict[str, Any]:
    """Return a reference to a schema among the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def describe_api(
    endpoints: Sequence[Endpoint], prefix: str = "", schemas: ModuleType = embedding_schemas
) -> dict[str, Any]:
    """Return the OpenAPI document. prefix: of every path; schemas: the module of records."""
    records = [
        getattr(schemas, name)
        for name in sorted(vars(schemas))
        if isinstance(getattr(schemas, name), type)
        and issubclass(getattr(schemas, name), msgspec.Struct)
    ]
    _, components = msgspec.json.schema_components(
        records, ref_template="#/components/schemas/{name}"
    )
    _describe_unions(components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "turbotx", "version": __version__},
        "servers": [{"url": prefix or "/"}],
        "paths": {
            path.replace(":path}", "}"): {_method(e): _operation(e, path)}
            for e in endpoints
            for path in e.paths
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _describe_unions(components: dict[str, Any]) -> None:
    """Describe the items of mixed lists, which the records declare only as lists."""
    fields = {"EmbeddingsRequest": "input", "EmbedRequest": "inputs", "EmbedAllRequest": "inputs",
              "CompletionRequest": "prompt"}  # fmt: skip
    for name, field in fields.items():
        if name in components:
            components[name]["properties"][field] = _inputs_schema()
    if "PredictRequest" in components:
        components["PredictRequest"]["properties"]["inputs"] = _pairs_schema()
    if "DecodeRequest" in components:
        ids = array_of({"type": "integer", "minimum": 0})
        components["DecodeRequest"]["properties"]["ids"] = {"anyOf": [ids, array_of(ids)]}


def _method(endpoint: Endpoint) -> str:
    return "get" if endpoint.body is None else "post"


def _operation(endpoint: Endpoint, path: str) -> dict[str, Any]:
    refusal = record("OpenAIErrorResponse" if endpoint.openai else "ErrorResponse")
    answer: dict[str, Any] = {"description": "done"}
    if endpoint.returns is not None:
        answer["content"] = {"application/json": {"schema": endpoint.returns}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": re.sub(r"\W+", "_", path).strip("_") or "root",
        "responses": {"200": answer},
    }
    if "{model_id" in path:
        operation["parameters"] = [
            {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
        operation["responses"]["404"] = {"description": "another model"}
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


def describe_in_html(document: dict[str, Any]) -> str:
    """Return the document as an HTML page without scripts: paths, fields, errors."""
    parts = [f"<!doctype html><title>{document['info']['title']}</title><h1>HTTP API</h1>"]
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} {html.escape(path)}</h2><p>{operation['summary']}")
            if "requestBody" not in operation:
                continue
            content = operation["requestBody"]["content"]["application/json"]["schema"]
            body = schemas[content["$ref"].rpartition("/")[2]]
            rows = [
                f"<li><code>{html.escape(field)}</code>"
                f"{' (needed)' if field in body.get('required', ()) else ''}"
                for field in body["properties"]
            ]
            parts.append(f"<p>{html.escape(body.get('description', ''))}<ul>{''.join(rows)}</ul>")
    return "\n".join(parts)


def _inputs_schema() -> dict[str, Any]:
    text, ids = {"type": "string", "minLength": 1}, array_of({"type": "integer", "minimum": 0})
    some = {"minItems": 1}
    return {"anyOf": [text, {**array_of(text), **some}, {**ids, **some}, {**array_of({**ids, **some}), **some}]}  # fmt: skip  # noqa: E501


def _pairs_schema() -> dict[str, Any]:
    text = {"type": "string", "minLength": 1}
    pair = {**array_of(text), "minItems": 1, "maxItems": 2}
    return {"anyOf": [text, pair, {**array_of(pair), "minItems": 1}]}
