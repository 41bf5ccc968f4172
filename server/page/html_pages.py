"""Two pages for browsers: the chat page and the reference of the API. Neither loads anything from other servers."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from fastapi.responses import HTMLResponse, Response

from ..schemas.api_error import APIError

MEDIA_TYPES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "api.js": "text/javascript",
    "markdown.js": "text/javascript",
    "chats.js": "text/javascript",
    "page.js": "text/javascript",
}
"""Files of the chat page."""

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the chat page."""

REFERENCE_STYLE = """:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;width:100%}td,th{border:1px solid #8886;
padding:.3rem .5rem;text-align:left;vertical-align:top}code{font-family:ui-monospace,monospace}h2{margin-top:2.5rem}
td:nth-child(2){overflow-wrap:anywhere}"""

LIMITS = {
    "minimum": "at least",
    "maximum": "at most",
    "exclusiveMinimum": "above",
    "maxLength": "number of characters at most",
    "pattern": "pattern",
}
"""JSON schema keywords that the reference shows, and their text."""


def page_file(name: str) -> Response:
    """Return a file of the chat page. APIError 404 for any other name."""
    if name not in MEDIA_TYPES:
        raise APIError(404, f"the page has no file {name!r}")
    content = resources.files("efficientllm.server.page").joinpath("assets", name).read_bytes()
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response(content, media_type=f"{MEDIA_TYPES[name]}; charset=utf-8", headers=headers)


# FastAPI's own pages (Swagger UI, ReDoc) load their scripts from a CDN and need inline scripts. They do not work
# offline or under a strict policy, and a copy of Swagger UI would add more than 1 MB to the package.
def reference_page(document: Mapping[str, Any]) -> HTMLResponse:
    """Return the OpenAPI document as a page: every path with its request's fields, its answers and its errors."""
    schemas = document["components"]["schemas"]
    paths = "".join(_path(path, operations, schemas) for path, operations in document["paths"].items())
    objects = "".join(f"<h3 id={name}>{name}</h3>{_fields(schema)}" for name, schema in sorted(schemas.items()))
    title = html.escape(document["info"]["title"])
    text = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{REFERENCE_STYLE}</style><h1>{title}</h1>"
        f"<p>The same as JSON: <a href=openapi.json>openapi.json</a>. The chat page: <a href='.'>/</a>.</p>"
        f"{paths}<h2>Objects</h2>{objects}</html>"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


def _path(path: str, operations: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    parts = []
    for method, operation in operations.items():
        parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
        if "requestBody" in operation:
            reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            parts.append(_fields(schemas[reference.rpartition("/")[2]]))
        parts.append("<table><tr><th>status<th>answer</tr>")
        for status, response in operation["responses"].items():
            schemas_sent = [media["schema"] for media in response.get("content", {}).values() if media.get("schema")]
            answer = ", ".join([html.escape(response["description"]), *map(_value, schemas_sent)])
            parts.append(f"<tr><td>{status}<td>{answer}</tr>")
        parts.append("</table>")
    return "".join(parts)


def _fields(schema: Mapping[str, Any]) -> str:
    """Return the description of an object and a table of its fields."""
    required = schema.get("required", [])
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else html.escape(json.dumps(field.get("default")))
        rows.append(f"<tr><td><code>{html.escape(name)}</code><td>{_value(field)}<td><code>{default}</code></tr>")
    table = f"<table><tr><th>field<th>value<th>default</tr>{''.join(rows)}</table>" if rows else ""
    description = html.escape(schema.get("description", ""))
    return f"<p>{description}</p>{table}" if description else table


def _value(field: Mapping[str, Any]) -> str:
    """Return the values that a field may have."""
    return " or ".join(dict.fromkeys(_alternatives(field))) or "any"


def _alternatives(field: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in field:
        name = html.escape(field["$ref"].rpartition("/")[2])
        yield f"<a href='#{name}'>{name}</a>"
    elif "anyOf" in field:
        for alternative in field["anyOf"]:
            yield from _alternatives(alternative)
    elif "enum" in field or "const" in field:
        values = field.get("enum", [field.get("const")])
        yield " or ".join(f"<code>{html.escape(json.dumps(value))}</code>" for value in values)
    elif field.get("type") == "array":
        yield f"list of {_value(field.get('items', {}))}"
    elif "type" in field:
        limits = ", ".join(f"{text} {field[keyword]}" for keyword, text in LIMITS.items() if keyword in field)
        yield html.escape(field["type"] + (f" ({limits})" if limits else ""))
