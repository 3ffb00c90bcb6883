"""How many jobs of a batch there are by now, and what is held for those that are still to come."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("batches", sa.Column("made", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("batches", sa.Column("held", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE batches SET made = total WHERE confirmed_at IS NOT NULL")
