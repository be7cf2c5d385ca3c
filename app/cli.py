"""The command `theriac`.

Knows: names of commands and how each process of the product is started.
Refuses to know: what they do; groups of commands live in `app.commands`, processes in `workers`.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from app import setup, telemetry
from app.commands import base_models, files, jobs, keys, models, policies, sets
from app.commands.output import fail
from app.commands.up import up as run_up
from app.settings import Settings, get_settings

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tuning that repairs and proves the safety of every model before it releases it.",
)
cli.add_typer(files.commands, name="files")
cli.add_typer(jobs.commands, name="jobs")
cli.add_typer(models.commands, name="models")
cli.add_typer(base_models.commands, name="base-models")
cli.add_typer(sets.commands, name="sets")
cli.add_typer(policies.commands, name="policies")
cli.add_typer(keys.commands, name="keys")

Host = Annotated[str | None, typer.Option(help="address to listen on; default THERIAC_GATEWAY__HOST or 127.0.0.1")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one; default THERIAC_GATEWAY__PORT")]


@cli.command()
def up(
    host: Host = None,
    port: Port = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="written as JSON (url and first keys) when the service answers; mode 0600")
    ] = None,
) -> None:
    """Run the whole service: gateway, worker and side process. Ctrl-C stops it."""
    run_up(_settings(host, port), ready_file)


@cli.command()
def gateway(
    host: Host = None,
    port: Port = None,
    fd: Annotated[int | None, typer.Option(hidden=True, help="an inherited listening socket")] = None,
) -> None:
    """Run the HTTP gateway alone."""
    import uvicorn

    settings = _settings(host, port)
    telemetry.configure(settings.log_level)
    config = uvicorn.Config(
        "app.main:create_app",
        factory=True,
        host=settings.gateway.host,
        port=settings.gateway.port,
        log_config=None,
        access_log=False,
        server_header=False,
        # reliability.md A3b: uvicorn alone has no limit on any of these, and one stalled upload would keep
        # SIGTERM from ever finishing.
        limit_concurrency=1000,
        timeout_graceful_shutdown=20,
        timeout_keep_alive=5,
        h11_max_incomplete_event_size=65536,
    )
    server = uvicorn.Server(config)
    server.run(sockets=[socket.socket(fileno=fd)] if fd is not None else None)
    if not server.started:
        raise typer.Exit(3)


@cli.command()
def worker() -> None:
    """Run one worker: by polling, or as a Celery worker where Redis is configured."""
    settings = get_settings()
    if settings.redis_url is None:
        _become("-m", "workers.agent")
    _become(
        "-m", "celery", "-A", "workers.celery_app", "worker", "-Q", settings.worker.queue, "-c", "1",
        "--without-gossip", "--without-mingle",
    )  # fmt: skip


@cli.command()
def side() -> None:
    """Run the side process: validation, webhooks, sweeps."""
    _become("-m", "workers.side")


@cli.command()
def migrate() -> None:
    """Bring schema, bundled base model and policy up to date; the first time, make and print the first keys."""
    made = setup.prepare(get_settings())
    typer.echo("The database is up to date.")
    if made is not None:
        typer.echo(f"API key (shown once):      {made.api_key}\noperator key (shown once): {made.operator_key}")


@cli.command()
def demo() -> None:
    """Run the main job on a throwaway service and print its tables."""
    if importlib.util.find_spec("demo") is None:
        fail("the demo is part of the repository, not of the installed package: run `make demo` there")
    _become("-m", "demo")


def _settings(host: str | None, port: int | None) -> Settings:
    settings = get_settings()
    chosen = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    return settings.model_copy(update={"gateway": settings.gateway.model_copy(update=chosen)})


def _become(*arguments: str) -> NoReturn:
    """Turns this process into another, so that signals and exit code are its own."""
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - no shell is wanted


def main() -> None:
    cli()


if __name__ == "__main__":
    main()
