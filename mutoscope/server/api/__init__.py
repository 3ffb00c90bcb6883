"""Our own API under /api/v1: the superset that all dialects map onto. docs/api.md has an example of each route.

Every error has one shape: {"error": {"code", "message", "hint", "field"}}, with the status of `edge.status_of`.
"""

from __future__ import annotations

from fastapi import APIRouter

from mutoscope.server.api import account, admin, batches, files, jobs, models
from mutoscope.server.api.shape import DIALECT, PREFIX
from mutoscope.server.context import Context

__all__ = ["DIALECT", "PREFIX", "router"]


def router(ctx: Context) -> APIRouter:
    """All routes."""
    api = APIRouter(prefix=PREFIX)
    for module in (jobs, batches, models, files, account, admin):
        module.add(api, ctx)
    return api
