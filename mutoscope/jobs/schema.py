"""The tables. Migrations (`migrations/`) build exactly these; a test compares.

Times are unix seconds, credits are whole numbers, ids are text.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s", "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s", "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)  # fmt: skip

Serial = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only in a column of type INTEGER."""

accounts = Table(
    "accounts", metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("plan", Text, nullable=False),
    Column("weight", Float, nullable=False, default=1.0),
    Column("balance", BigInteger, nullable=False, default=0),
    Column("reserved", BigInteger, CheckConstraint("reserved >= 0", name="reserved_not_negative"),
           nullable=False, default=0),
    Column("limits", JSON, nullable=False, default=dict),
    Column("finish_high", Float, nullable=False, default=0.0),  # virtual times, see scheduling.py
    Column("finish_normal", Float, nullable=False, default=0.0),
    Column("finish_low", Float, nullable=False, default=0.0),
    Column("created_at", Float, nullable=False),
    Column("disabled_at", Float),
)  # fmt: skip

api_keys = Table(
    "api_keys", metadata,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("hash", Text, nullable=False, unique=True),  # SHA-256 of the key, hexadecimal
    Column("hint", Text, nullable=False),  # its first characters, to recognise it
    Column("scopes", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("last_used_at", Float),
    Column("revoked_at", Float),
)  # fmt: skip

jobs = Table(
    "jobs", metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False),
    Column("key_id", Text),
    Column("dialect", Text, nullable=False),
    Column("operation", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("stage", Text, nullable=False, default=""),
    Column("step", Integer, nullable=False, default=0),
    Column("steps", Integer, nullable=False, default=0),
    Column("progress", Float, nullable=False, default=0.0),
    Column("eta_at", Float),
    Column("model", Text, nullable=False),
    Column("model_asked", Text, nullable=False),
    Column("candidates", JSON, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("resolved", JSON, nullable=False),
    Column("vendor", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("priority", Text, nullable=False),
    Column("round", BigInteger, nullable=False, default=0),  # the order of dispatch, see scheduling.py
    Column("affinity", BigInteger, nullable=False, default=0),
    Column("vtime", Float, nullable=False, default=0.0),
    Column("cost", BigInteger, nullable=False),
    Column("cost_captured", BigInteger, nullable=False, default=0),
    Column("estimate_s", Float, nullable=False),
    Column("time_limit_s", Float, nullable=False),
    Column("attempt", Integer, nullable=False, default=0),
    Column("crashes", Integer, nullable=False, default=0),
    Column("fence", Integer, nullable=False, default=0),
    Column("worker_id", Text),
    Column("lease_until", Float),
    Column("cancel_asked_at", Float),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("deleted_at", Float),
    Column("failure", Text),
    Column("message", Text, nullable=False, default=""),
    Column("outputs", JSON, nullable=False, default=list),
    Column("result", JSON, nullable=False, default=dict),
    Column("webhook_url", Text),
    Column("dedupe", Text),  # hash of the request, for the opt-in window of seeded retries
    Column("batch_id", Text),
    Column("batch_index", Integer),
    Column("parent_id", Text),
    Index("ix_jobs_dispatch", "round", "affinity", "vtime", "seq", "estimate_s", "model",
          sqlite_where=text("state = 'queued'"), postgresql_where=text("state = 'queued'")),
    Index("ix_jobs_account_state", "account_id", "state", "seq"),
    Index("ix_jobs_account_created", "account_id", "created_at", "seq"),
    Index("ix_jobs_running", "lease_until", sqlite_where=text("state = 'running'"),
          postgresql_where=text("state = 'running'")),
    Index("ix_jobs_batch", "batch_id", "batch_index"),
    Index("ix_jobs_finished", "finished_at"),
    Index("ix_jobs_deleted", "deleted_at", sqlite_where=text("deleted_at IS NOT NULL"),
          postgresql_where=text("deleted_at IS NOT NULL")),
    Index("ix_jobs_dedupe", "account_id", "dedupe", sqlite_where=text("dedupe IS NOT NULL"),
          postgresql_where=text("dedupe IS NOT NULL")),
)  # fmt: skip

job_events = Table(
    "job_events", metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("job_id", Text, nullable=False),
    Column("account_id", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("type", Text, nullable=False),  # "state", "progress", "preview"
    Column("data", JSON, nullable=False),
    Index("ix_job_events_job", "job_id", "id"),
    sqlite_autoincrement=True,  # a number is never used twice, so Last-Event-ID always means the same
)  # fmt: skip

ledger = Table(
    "ledger", metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False),
    Column("job_id", Text),
    Column("key_id", Text),
    Column("model", Text, nullable=False, default=""),
    Column("kind", Text, nullable=False),  # "grant", "plan", "lapse", "reserve", "capture", "release"
    Column("debit", Text, nullable=False),  # book account that gives
    Column("credit", Text, nullable=False),  # book account that gets
    Column("amount", BigInteger, CheckConstraint("amount >= 0", name="amount_not_negative"), nullable=False),
    Column("note", Text, nullable=False, default=""),
    UniqueConstraint("job_id", "kind"),
    Index("ix_ledger_account_at", "account_id", "at"),
)  # fmt: skip

batches = Table(
    "batches", metadata,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False),
    Column("key_id", Text),
    Column("name", Text, nullable=False, default=""),
    Column("state", Text, nullable=False),  # "priced", "running", "finished", "cancelled"
    Column("priority", Text, nullable=False),
    Column("total", Integer, nullable=False),
    Column("estimate", JSON, nullable=False),
    Column("items", JSON, nullable=False),  # kept while only priced, or while their jobs are being made
    Column("made", Integer, nullable=False, default=0, server_default="0"),  # jobs that there are
    Column("held", BigInteger, nullable=False, default=0, server_default="0"),  # credits for those to come
    Column("webhook_url", Text),
    Column("metadata", JSON, nullable=False, default=dict),
    Column("created_at", Float, nullable=False),
    Column("confirmed_at", Float),
    Column("finished_at", Float),
    Index("ix_batches_account_created", "account_id", "created_at"),
)  # fmt: skip

assets = Table(
    "assets", metadata,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False),
    Column("purpose", Text, nullable=False, default=""),
    Column("state", Text, nullable=False),  # "pending" (no bytes yet), "ready"
    Column("filename", Text, nullable=False, default=""),
    Column("mime", Text, nullable=False, default=""),
    Column("size_bytes", BigInteger, nullable=False, default=0),
    Column("sha256", Text, nullable=False, default=""),
    Column("path", Text, nullable=False, default=""),  # relative to the data folder
    Column("info", JSON, nullable=False, default=dict),  # kind, width, height, frames, seconds
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("used_at", Float),
    Index("ix_assets_account_created", "account_id", "created_at"),
    Index("ix_assets_expires", "expires_at"),
)  # fmt: skip

webhook_endpoints = Table(
    "webhook_endpoints", metadata,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("url", Text, nullable=False),
    Column("events", JSON, nullable=False),  # empty: all
    Column("secrets", JSON, nullable=False),  # newest first, each with the time until which it signs
    Column("created_at", Float, nullable=False),
    Column("failing_since", Float),
    Column("disabled_at", Float),
    Column("disabled_why", Text, nullable=False, default=""),
)  # fmt: skip

deliveries = Table(
    "deliveries", metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),  # webhook-id, the same on every attempt
    Column("account_id", Text, nullable=False),
    Column("endpoint_id", Text),  # none: the url of a single job or batch
    Column("url", Text, nullable=False),
    Column("style", Text, nullable=False),  # "standard" (Standard Webhooks), "luma"
    Column("event", Text, nullable=False),
    Column("job_id", Text),
    Column("sequence", Integer, nullable=False, default=0),  # of the job's events: higher is newer
    Column("body", Text, nullable=False),
    Column("state", Text, nullable=False),  # "pending", "delivered", "failed"
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_at", Float, nullable=False),
    Column("lease_until", Float),
    Column("last_status", Integer),
    Column("last_error", Text, nullable=False, default=""),
    Column("created_at", Float, nullable=False),
    Column("delivered_at", Float),
    Index("ix_deliveries_due", "next_at", sqlite_where=text("state = 'pending'"),
          postgresql_where=text("state = 'pending'")),
    Index("ix_deliveries_account", "account_id", "created_at"),
    Index("ix_deliveries_job", "job_id", "sequence"),
)  # fmt: skip

idempotency = Table(
    "idempotency", metadata,
    Column("account_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("route", Text, nullable=False),
    Column("body_hash", Text, nullable=False),
    Column("status", Integer, nullable=False, default=0),
    Column("headers", JSON, nullable=False, default=dict),
    Column("body", Text, nullable=False, default=""),
    Column("created_at", Float, nullable=False, index=True),
)  # fmt: skip

timings = Table(
    "timings", metadata,
    Column("id", Serial, primary_key=True, autoincrement=True),
    Column("model", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("shape", Text, nullable=False),  # Resolved.shape
    Column("work", Float, nullable=False),  # tokens x steps x passes, to scale between shapes
    Column("step_s", Float, nullable=False),
    Column("rest_s", Float, nullable=False),  # everything but the steps
    Column("load_s", Float, nullable=False, default=0.0),
    Column("at", Float, nullable=False),
    Index("ix_timings_key", "model", "device", "shape", "id"),
)  # fmt: skip

workers = Table(
    "workers", metadata,
    Column("id", Text, primary_key=True),
    Column("device", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("state", Text, nullable=False),  # "starting", "idle", "busy", "draining", "gone"
    Column("model", Text, nullable=False, default=""),  # loaded now
    Column("job_id", Text),
    Column("switches", Integer, nullable=False, default=0),  # times another model was loaded
    Column("started_at", Float, nullable=False),
    Column("beat_at", Float, nullable=False),
)  # fmt: skip

routers = Table(
    "routers", metadata,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False),
    Column("slug", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    UniqueConstraint("account_id", "slug"),
)  # fmt: skip

routing_decisions = Table(
    "routing_decisions", metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("account_id", Text, nullable=False),
    Column("router_id", Text),
    Column("job_id", Text, index=True),
    Column("at", Float, nullable=False),
    Column("chosen", Text, nullable=False),
    Column("data", JSON, nullable=False),  # what was asked, and each model with why it was taken or left
    Index("ix_routing_decisions_router", "router_id", "seq"),
)  # fmt: skip

settings_kept = Table(
    "settings_kept", metadata,
    Column("name", Text, primary_key=True),  # "url_secret": signs output and upload URLs
    Column("value", Text, nullable=False),
    Column("locked", Boolean, nullable=False, default=False),
)  # fmt: skip
