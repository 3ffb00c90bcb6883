"""/api/v1/models, /loras, /prompts, /ping: what there is to ask for."""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from mutoscope import __version__
from mutoscope.digests import sha256_of
from mutoscope.jobs.database import Tx
from mutoscope.jobs.errors import NotFound
from mutoscope.jobs.model import Caller
from mutoscope.jobs.registry import AUTO, Model, OfferedLora
from mutoscope.jobs.spec import Strict
from mutoscope.jobs.view import iso
from mutoscope.server import edge
from mutoscope.server.api import schemas
from mutoscope.server.api.shape import DIALECT, gives, parsed, takes
from mutoscope.server.context import Context
from mutoscope.server.edge import Reply


class PromptBody(Strict):
    """A prompt to be looked at."""

    prompt: str = Field(max_length=20_000)
    model: str = AUTO


def shown(model: Model) -> dict[str, Any]:
    """A model as the API shows it."""
    m = model.manifest
    return {
        "id": model.name,
        "object": "model",
        "title": m.title,
        "notes": m.notes,
        "licence": m.licence,
        "tasks": list(model.tasks),
        "quality": model.quality,
        "sizes": [list(size) for size in m.sizes],
        "defaults": vars(m.defaults),
        "max_frames": model.most_frames,
        "has_vocabulary": m.files.vocabulary is not None,
    }


def shown_lora(lora: OfferedLora, *, digest: bool = False) -> dict[str, Any]:
    """A LoRA as the API shows it. Its hash means reading the whole file, once."""
    info = lora.info
    return {
        "id": info.name,
        "object": "lora",
        "title": info.title,
        "trigger": info.trigger,
        "models": list(lora.models),
        "strength": lora.strength,
        "settings": dict(lora.settings),
        "rank": info.rank,
        "size_bytes": info.size_bytes,
        "changed_at": iso(info.changed_at),
        "problem": info.problem or None,
    } | ({"sha256": sha256_of(info.path)} if digest else {})


def add(api: APIRouter, ctx: Context) -> None:
    @api.get(
        "/loras",
        responses=gives(schemas.listing(schemas.LORA)),
        summary="The LoRAs that can be named, and the models that take them",
    )
    async def loras(request: Request) -> Response:
        def act(_tx: Tx, _caller: Caller) -> Reply:
            data = [shown_lora(lora) for lora in ctx.registry.loras()]
            return Reply(200, {"object": "list", "data": data})

        return await edge.read(ctx, request, act, DIALECT)

    @api.get(
        "/loras/{name}",
        responses=gives(schemas.with_fields(schemas.LORA, sha256=schemas.TEXT)),
        summary="One LoRA, with the SHA-256 of its file",
    )
    async def lora(request: Request, name: str) -> Response:
        def act(_tx: Tx, _caller: Caller) -> Reply:
            for found in ctx.registry.loras():
                if found.info.name == name:
                    return Reply(200, shown_lora(found, digest=True))
            raise NotFound(f"No LoRA {name!r}.", hint="GET /api/v1/loras lists them.")

        return await edge.read(ctx, request, act, DIALECT)

    @api.get("/models", responses=gives(schemas.MODELS), summary="The models that are installed")
    async def listing(request: Request) -> Response:
        def act(_tx: Tx, _caller: Caller) -> Reply:
            return Reply(200, {"object": "list", "data": [shown(m) for m in ctx.registry.models()],
                               "aliases": ctx.registry.aliases})  # fmt: skip

        return await edge.read(ctx, request, act, DIALECT)

    @api.post(
        "/prompts",
        openapi_extra=takes(PromptBody),
        responses=gives(schemas.PROMPT_REPORT),
        summary="Words that a model does not know",
    )
    async def prompts(request: Request) -> Response:
        def act(_tx: Tx, _caller: Caller, body: PromptBody) -> Reply:
            name = ctx.registry.target(body.model)
            model = ctx.registry.models()[0] if name == AUTO else ctx.registry.get(name)
            return Reply(
                200, {"object": "prompt_report", "model": model.name, **diagnose(model, body.prompt)}
            )

        return await edge.write(ctx, request, lambda body: parsed(PromptBody, body), act, DIALECT)

    @api.get("/ping", responses=gives(schemas.PING), summary="Is my key good?")
    async def ping(request: Request) -> Response:
        def act(_tx: Tx, caller: Caller) -> Reply:
            return Reply(200, {"message": "pong", "version": __version__, "account": caller.account.name})

        return await edge.read(ctx, request, act, DIALECT)


def diagnose(model: Model, prompt: str) -> dict[str, Any]:
    """Words outside of the model's vocabulary, with near ones that it knows; nothing for models without a list."""
    file = model.manifest.files.vocabulary
    if file is None:
        return {"known_vocabulary": False, "unknown": []}
    words = json.loads(file.path.read_text("utf-8"))
    asked = list(dict.fromkeys(re.findall(r"[a-z]+", prompt.lower())))
    unknown = [
        {"word": word, "near": difflib.get_close_matches(word, words, n=3, cutoff=0.6)}
        for word in asked
        if word not in words
    ]
    return {"known_vocabulary": True, "unknown": unknown}
