"""A base model's weights before its alignment.

Revision 20261121_pretrained, after 20261120_initial.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "20261121_pretrained"
down_revision: str | None = "20261120_initial"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    with op.batch_alter_table("base_model") as table:
        table.add_column(sa.Column("pretrained_path", sa.String(length=1024), nullable=True))
        table.add_column(sa.Column("pretrained_digest", sa.String(length=64), nullable=True))
        table.add_column(sa.Column("pretrained_files", JSON, nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("base_model") as table:
        for name in ("pretrained_files", "pretrained_digest", "pretrained_path"):
            table.drop_column(name)
