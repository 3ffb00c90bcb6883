"""Our own API under /api/v1: the superset that all dialects map onto. docs/api.md has an example of each route.

Every error has one shape: {"error": {"code", "message", "hint", "field"}}, with the status of `edge.status_of`.
"""

from __future__ import annotations

from fastapi import APIRouter, Security
from fastapi.security import HTTPBearer

from mutoscope.server.api import account, admin, batches, files, jobs, models
from mutoscope.server.api.shape import DIALECT, ERRORS, PREFIX
from mutoscope.server.context import Context

__all__ = ["DIALECT", "PREFIX", "router"]


def router(ctx: Context) -> APIRouter:
    """All routes."""
    key = HTTPBearer(scheme_name="ApiKey", auto_error=False)  # for the description; `edge` looks at it
    api = APIRouter(prefix=PREFIX, responses=ERRORS, dependencies=[Security(key)])
    for module in (jobs, batches, models, files, account, admin):
        module.add(api, ctx)
    return api
