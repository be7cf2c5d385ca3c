"""Everything a deployment can choose, read from the environment once.

Knows: names (`THERIAC_*`, nested with two underscores), defaults and units.
Refuses to know: what the values are used for. Nobody else reads the environment.
"""

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class GatewaySettings(BaseModel):
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="0 takes a free port")
    max_body_bytes: int = Field(1 << 20, description="limit of ordinary JSON bodies; uploads have their own")
    max_file_bytes: int = Field(512 << 20, description="OpenAI's limit for POST /files")
    docs: bool = Field(True, description="serve /docs and /openapi.json")


class WorkerSettings(BaseModel):
    """Lease figures are argued in docs/decisions/0002: L = 30 s, heartbeat L/6, self-fencing before the lease ends."""

    lease_seconds: float = Field(30.0, description="a claim without a heartbeat is given away after this long")
    heartbeat_seconds: float = Field(5.0, description="how often a claim is renewed; a sixth of the lease")
    self_fence_seconds: float = Field(20.0, description="kill our trainer when no heartbeat was confirmed this long")
    poll_seconds: float = Field(0.5, description="how often a worker looks for work without being rung")
    reap_seconds: float = Field(2.0, description="how often a worker looks for expired leases")
    slots: int = Field(1, ge=1, description="trainings at a time on this machine; cores are divided among them")
    cancel_grace_seconds: float = Field(10.0, description="SIGTERM to SIGKILL")
    max_attempts: int = Field(3, description="claims of one work item before it fails for good")
    backoff_seconds: float = Field(30.0, description="wait before the second attempt; doubles with each")
    stage_timeout_seconds: float = Field(6 * 3600.0, description="a stage that takes longer fails the job")
    memory_limit_bytes: int | None = Field(None, description="RLIMIT_AS of a trainer; None leaves it to the host")
    queue: str = Field("tuning", description="Celery queue rung for fine-tuning work")
    side_queue: str | None = Field(None, description="Celery queue rung for side work; unset: the side process polls")
    trainer_command: tuple[str, ...] | None = Field(
        None,
        description="runs one training, the job folder is appended; to wrap `python -m workers.ml run` in a sandbox",
    )


class WebhookSettings(BaseModel):
    allow_private: bool = Field(False, description="deliver to private and loopback addresses (never metadata ones)")
    allow_http: bool = Field(False, description="accept http:// endpoints; for tests and closed networks")
    timeout_seconds: float = Field(20.0, description="one deadline for name, connection and answer")
    retry_schedule_seconds: tuple[float, ...] = Field(
        (0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400), description="wait before each attempt"
    )
    disable_after_seconds: float = Field(5 * 86400.0, description="an endpoint that fails this long is switched off")
    poll_seconds: float = Field(1.0, description="how often the side process looks for due deliveries")


class StorageSettings(BaseModel):
    """Objects live under `home`/objects unless a bucket is named."""

    bucket: str | None = Field(
        None, description="S3 bucket, with a rule that aborts incomplete uploads; unset: a local folder"
    )
    endpoint_url: str | None = Field(None, description="of an S3-compatible store; unset means Amazon's")
    region: str = Field("us-east-1", description="of the bucket")
    access_key_id: str | None = Field(None, description="with rights on this bucket only")
    secret_access_key: SecretStr | None = Field(None, description="shown in no log")
    path_style: bool = Field(True, description="bucket in the path instead of the host name")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="THERIAC_", env_nested_delimiter="__", extra="ignore")

    home: Path = Field(Path.home() / ".theriac", description="data folder of the embedded mode")
    database_url: str | None = Field(None, description="default: SQLite in `home`; postgresql:// for many machines")
    redis_url: str | None = Field(None, description="set: ring Celery workers; unset: workers poll")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of every process, on stderr")
    gateway: GatewaySettings = GatewaySettings()
    worker: WorkerSettings = WorkerSettings()
    webhooks: WebhookSettings = WebhookSettings()
    storage: StorageSettings = StorageSettings()

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'theriac.db'}"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings; tests clear the cache or pass their own object."""
    return Settings()
