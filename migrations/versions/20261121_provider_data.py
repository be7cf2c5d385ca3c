"""What a provider set holds, and who imported it or published a policy.

Revision 20261121_provider_data, after 20261121_pretrained.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "20261121_provider_data"
down_revision: str | None = "20261121_pretrained"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    with op.batch_alter_table("provider_set") as table:
        table.add_column(sa.Column("groups", sa.Integer(), nullable=True))
        table.add_column(sa.Column("categories", JSON, nullable=True))
        table.add_column(sa.Column("imported_by", sa.String(length=128), nullable=True))
    with op.batch_alter_table("policy") as table:
        table.add_column(sa.Column("published_by", sa.String(length=128), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("policy") as table:
        table.drop_column("published_by")
    with op.batch_alter_table("provider_set") as table:
        for name in ("imported_by", "categories", "groups"):
            table.drop_column(name)
