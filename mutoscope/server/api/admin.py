"""/api/v1/accounts, /keys: for keys with the scope "admin"."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from mutoscope.jobs import accounts, ledger, workers
from mutoscope.jobs.accounts import Key
from mutoscope.jobs.database import Tx
from mutoscope.jobs.model import Account, Caller
from mutoscope.jobs.service import need_scope
from mutoscope.jobs.spec import Strict
from mutoscope.jobs.view import iso
from mutoscope.server import edge
from mutoscope.server.api import schemas
from mutoscope.server.api.shape import DIALECT, gives, nothing, parsed, takes
from mutoscope.server.context import Context
from mutoscope.server.edge import Reply


class AccountBody(Strict):
    """A new account."""

    name: str = Field(min_length=1, max_length=200)
    plan: str = "unlimited"
    weight: float = 1.0
    limits: dict[str, Any] = Field(default_factory=dict)


class AccountChange(Strict):
    """What is given is changed."""

    plan: str | None = None
    weight: float | None = Field(None, gt=0, le=1000)
    limits: dict[str, Any] | None = None
    disabled: bool | None = None


class KeyBody(Strict):
    """A new key; `value` imports an existing one."""

    name: str = Field(min_length=1, max_length=200)
    account: str = accounts.DEFAULT
    scopes: tuple[str, ...] = ("jobs",)
    value: str | None = None


class GrantBody(Strict):
    """Credits to give."""

    amount: int = Field(gt=0, le=10**12)
    note: str = ""


def account_json(account: Account) -> dict[str, Any]:
    times = {"created_at": iso(account.created_at), "disabled_at": iso(account.disabled_at)}
    return {**vars(account), "object": "account", **times}


def key_json(key: Key) -> dict[str, Any]:
    times = {name: iso(getattr(key, name)) for name in ("created_at", "last_used_at", "revoked_at")}
    return {**vars(key), "object": "key", "scopes": list(key.scopes), **times}


def add(api: APIRouter, ctx: Context) -> None:
    @api.post(
        "/accounts",
        openapi_extra=takes(AccountBody),
        status_code=201,
        responses=gives(schemas.ACCOUNT, 201),
        summary="Make an account",
    )
    async def create(request: Request) -> Response:
        def act(tx: Tx, caller: Caller, body: AccountBody) -> Reply:
            need_scope(caller, "admin")
            made = accounts.create(tx, body.name, plan=body.plan, weight=body.weight, limits=body.limits)
            return Reply(201, account_json(made))

        return await edge.write(ctx, request, lambda body: parsed(AccountBody, body), act, DIALECT)

    @api.get("/accounts", responses=gives(schemas.listing(schemas.ACCOUNT)), summary="All accounts")
    async def listing(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            need_scope(caller, "admin")
            return Reply(200, {"object": "list", "data": [account_json(a) for a in accounts.listing(tx)]})

        return await edge.read(ctx, request, act, DIALECT)

    @api.patch(
        "/accounts/{name}",
        openapi_extra=takes(AccountChange),
        responses=gives(schemas.ACCOUNT),
        summary="Change an account",
    )
    async def change(request: Request, name: str) -> Response:
        def act(tx: Tx, caller: Caller, body: AccountChange) -> Reply:
            need_scope(caller, "admin")
            made = accounts.change(tx, accounts.named(tx, name).id, **body.model_dump())
            return Reply(200, account_json(made))

        return await edge.write(ctx, request, lambda body: parsed(AccountChange, body), act, DIALECT)

    @api.post(
        "/accounts/{name}/credits",
        openapi_extra=takes(GrantBody),
        responses=gives(schemas.ACCOUNT),
        summary="Give credits",
    )
    async def grant(request: Request, name: str) -> Response:
        def act(tx: Tx, caller: Caller, body: GrantBody) -> Reply:
            need_scope(caller, "admin")
            account = accounts.named(tx, name)
            ledger.grant(tx, account.id, body.amount, body.note)
            return Reply(200, account_json(accounts.get(tx, account.id)))

        return await edge.write(ctx, request, lambda body: parsed(GrantBody, body), act, DIALECT)

    @api.post(
        "/keys",
        openapi_extra=takes(KeyBody),
        status_code=201,
        responses=gives(schemas.with_secret(schemas.KEY), 201),
        summary="Make a key; shown once",
    )
    async def create_key(request: Request) -> Response:
        def act(tx: Tx, caller: Caller, body: KeyBody) -> Reply:
            need_scope(caller, "admin")
            account = accounts.named(tx, body.account)
            key, secret = accounts.create_key(tx, account.id, body.name, scopes=body.scopes, value=body.value)
            return Reply(201, key_json(key) | {"secret": secret})

        return await edge.write(ctx, request, lambda body: parsed(KeyBody, body), act, DIALECT)

    @api.get(
        "/keys", responses=gives(schemas.listing(schemas.KEY)), summary="All keys, without their secrets"
    )
    async def keys(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            need_scope(caller, "admin")
            return Reply(200, {"object": "list", "data": [key_json(k) for k in accounts.keys(tx)]})

        return await edge.read(ctx, request, act, DIALECT)

    @api.delete("/keys/{key_id}", responses=gives(schemas.KEY), summary="Revoke a key")
    async def revoke(request: Request, key_id: str) -> Response:
        def act(tx: Tx, caller: Caller, _: None) -> Reply:
            need_scope(caller, "admin")
            return Reply(200, key_json(accounts.revoke(tx, key_id)))

        return await edge.write(ctx, request, nothing, act, DIALECT)

    @api.get("/workers", responses=gives(schemas.listing(schemas.WORKER)), summary="The workers")
    async def worker_list(request: Request) -> Response:
        def act(tx: Tx, caller: Caller) -> Reply:
            need_scope(caller, "admin")
            shown = [vars(w) | {"started_at": iso(w.started_at), "beat_at": iso(w.beat_at)}
                     for w in workers.listing(tx)]  # fmt: skip
            return Reply(200, {"object": "list", "data": shown})

        return await edge.read(ctx, request, act, DIALECT)
