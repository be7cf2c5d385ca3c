"""Every name a doorbell may ring leads to a task, and no task is there that nobody rings."""

import ast
from pathlib import Path

from app.doorbell import TaskName
from workers.celery_app import app

ROOT = Path(__file__).resolve().parents[2]
LONGEST_BODY = 15


def test_the_registered_tasks_are_exactly_the_named_ones() -> None:
    app.loader.import_default_modules()
    ours = {name for name in app.tasks if not name.startswith("celery.")}
    assert ours == {name.value for name in TaskName}


def test_every_scheduled_and_routed_task_is_a_named_one() -> None:
    scheduled = {entry["task"] for entry in app.conf.beat_schedule.values()}
    assert scheduled | set(app.conf.task_routes) <= {name.value for name in TaskName}


def test_a_message_carries_json_only_and_is_gone_before_its_work() -> None:
    assert app.conf.accept_content == ["json"]
    assert app.conf.task_serializer == "json"
    assert app.conf.task_acks_late is False


def test_a_task_is_a_few_lines_around_a_plain_function() -> None:
    long = [
        f"{path.name}:{node.name}"
        for path in (ROOT / "workers" / "tasks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > LONGEST_BODY
    ]
    assert long == []
