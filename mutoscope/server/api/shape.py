"""What the routes of our API have in common: the shape of errors, reading bodies, OpenAPI of what they take."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from mutoscope.errors import MutoscopeError
from mutoscope.jobs.errors import InvalidRequest
from mutoscope.server import edge
from mutoscope.server.edge import Dialect, Reply

PREFIX = "/api/v1"
_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR = {
    "type": "object", "required": ["error"], "additionalProperties": False,
    "properties": {"error": {
        "type": "object", "required": ["code", "message", "hint", "field"], "additionalProperties": False,
        "properties": {
            "code": {"type": "string"}, "message": {"type": "string"}, "hint": _TEXT_OR_NULL, "field": _TEXT_OR_NULL,
        },
    }},
}  # fmt: skip
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {"application/json": {"schema": _ERROR}}}
    for status, what in (("4XX", "Refused"), ("5XX", "Something went wrong; nothing was changed"))
}
"""OpenAPI of what every route may answer besides."""
M = TypeVar("M", bound=BaseModel)


def error(exc: Exception) -> Reply:
    """{"error": {"code", "message", "hint", "field"}}; hint and field are null where there is none."""
    told = exc if isinstance(exc, MutoscopeError) else None
    body = {
        "code": getattr(exc, "code", "invalid_request" if told else "internal"),
        "message": told.message if told else edge.sentence(exc),
        "hint": (told.hint if told else "") or None,
        "field": getattr(exc, "field", "") or None,
    }
    return Reply(edge.status_of(exc), {"error": body})


DIALECT = Dialect("api", error)


def parsed(kind: type[M], value: Any, where: str = "") -> M:
    """A body as a model.

    Raises:
        InvalidRequest: names the first field that is wrong, what was got and what was expected.
    """
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where or 'The body'} must be a JSON object.", field=where)
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        path = ".".join(str(part) for part in (*filter(None, [where]), *first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "is not a field here."
        got = first.get("input")
        shown = f" (got {got!r:.80})" if isinstance(got, (str, int, float, bool)) and first["loc"] else ""
        raise InvalidRequest(f"{path + ': ' if path else ''}{message}{shown}", field=path) from e


def nothing(_: Any) -> None:
    """For requests without a body."""


def takes(kind: type[BaseModel], media_type: str = "application/json") -> dict[str, Any]:
    """OpenAPI of a body that is parsed by hand."""
    return {
        "requestBody": {
            "required": True,
            "content": {media_type: {"schema": inlined(kind.model_json_schema())}},
        }
    }


def query(**names: str) -> dict[str, Any]:
    """OpenAPI of query parameters that are read by hand: what each is; "int: ..." for whole numbers."""
    parameters = []
    for name, what in names.items():
        kind = "integer" if what.startswith("int: ") else "string"
        about = {"description": what.removeprefix("int: "), "required": False}
        parameters.append({"name": name, "in": "query", "schema": {"type": kind}, **about})
    return {"parameters": parameters}


def answers(media_type: str, json: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """OpenAPI of an answer that is not JSON, or only if it is asked for."""
    content = {media_type: {"schema": {"type": "string"}}}
    return {
        200: {
            "description": "Done",
            "content": content | ({"application/json": {"schema": json}} if json else {}),
        }
    }


def gives(schema: dict[str, Any], status: int = 200) -> dict[int | str, dict[str, Any]]:
    """OpenAPI of an answer in JSON; `schemas.py` has them."""
    return {status: {"description": "Done", "content": {"application/json": {"schema": schema}}}}


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without references: each $ref replaced by what it means."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(definitions[node["$ref"].rsplit("/", 1)[1]])
            return {k: resolve(v) for k, v in node.items()}
        return [resolve(v) for v in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def integer(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A whole number of the query.

    Raises:
        InvalidRequest: not one, or out of range.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,12}", text) or not low <= int(text) <= high:
        raise InvalidRequest(f"{name} = {text!r:.40}, expected {low} to {high}.", field=name)
    return int(text)


def one_of(request: Request, name: str, known: tuple[str, ...]) -> str:
    """A word of the query; the first of `known` if it is not there.

    Raises:
        InvalidRequest: it is another one.
    """
    text = request.query_params.get(name, known[0])
    if text not in known:
        raise InvalidRequest(f"{name} = {text!r:.40}, expected one of {', '.join(known)}.", field=name)
    return text


def several(request: Request, name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Values of the query, repeated or separated by commas.

    Raises:
        InvalidRequest: one that is not known.
    """
    values = [v for text in request.query_params.getlist(name) for v in text.split(",") if v]
    for value in values:
        if value not in known:
            raise InvalidRequest(f"{name} = {value!r:.40}, expected some of {', '.join(known)}.", field=name)
    return tuple(values)
