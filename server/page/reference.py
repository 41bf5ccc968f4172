"""The OpenAPI document as a plain page that needs nothing from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.responses import HTMLResponse

STYLE = """:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;
padding:0 1rem}table{border-collapse:collapse;width:100%}td,th{border:1px solid #8886;padding:.3rem .5rem;
text-align:left;vertical-align:top}code{font-family:ui-monospace,monospace}h2{margin-top:2.5rem}
td:nth-child(2){overflow-wrap:anywhere}"""


def reference_page(document: Mapping[str, Any]) -> HTMLResponse:
    """Every path with its request's fields, its answers and its errors."""
    schemas = document["components"]["schemas"]
    body = "".join(_path(path, operations, schemas) for path, operations in document["paths"].items())
    used = "".join(_schema(name, schema) for name, schema in sorted(schemas.items()))
    title = html.escape(document["info"]["title"])
    text = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
        f"<p>The same as JSON: <a href=openapi.json>openapi.json</a>. The chat page: <a href='.'>/</a>.</p>"
        f"{body}<h2>Objects</h2>{used}</html>"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


def _path(path: str, operations: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    parts = []
    for method, operation in operations.items():
        parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if content:
            name = content["schema"]["$ref"].rpartition("/")[2]
            parts.append(_description(schemas[name]) + _fields(schemas[name]))
        parts.append("<table><tr><th>status<th>answer</tr>")
        for status, response in operation["responses"].items():
            kinds = [_kind(media["schema"]) for media in response.get("content", {}).values() if media.get("schema")]
            shown = ", ".join([html.escape(response.get("description", "")), *kinds])
            parts.append(f"<tr><td>{status}<td>{shown}</tr>")
        parts.append("</table>")
    return "".join(parts)


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    return f"<h3 id={html.escape(name)}>{html.escape(name)}</h3>{_description(schema)}{_fields(schema)}"


def _description(schema: Mapping[str, Any]) -> str:
    return f"<p>{html.escape(schema['description'])}</p>" if schema.get("description") else ""


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else html.escape(json.dumps(field.get("default")))
        rows.append(f"<tr><td><code>{html.escape(name)}</code><td>{_kind(field)}<td><code>{default}</code></tr>")
    return f"<table><tr><th>field<th>value<th>default</tr>{''.join(rows)}</table>" if rows else ""


def _kind(field: Mapping[str, Any]) -> str:
    return " or ".join(dict.fromkeys(_kinds(field))) or "any"


def _kinds(field: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in field:
        name = html.escape(field["$ref"].rpartition("/")[2])
        yield f"<a href='#{name}'>{name}</a>"
    elif "anyOf" in field:
        for kind in field["anyOf"]:
            yield from _kinds(kind)
    elif "enum" in field or "const" in field:
        values = field.get("enum", [field.get("const")])
        yield " or ".join(f"<code>{html.escape(json.dumps(value))}</code>" for value in values)
    elif field.get("type") == "array":
        yield f"list of {_kind(field.get('items', {}))}"
    elif "type" in field:
        yield html.escape(str(field["type"]) + _limits(field))


LIMITS = {
    "minimum": "at least",
    "maximum": "at most",
    "exclusiveMinimum": "above",
    "maxLength": "at most that many characters:",
    "pattern": "like",
}


def _limits(field: Mapping[str, Any]) -> str:
    found = [f"{words} {field[name]}" for name, words in LIMITS.items() if name in field]
    return f" ({', '.join(found)})" if found else ""
