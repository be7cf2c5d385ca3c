"""The library's command line.

Knows: argv, standard streams, exit codes.
Refuses to know: anything a function of the library could know instead.

    python -m workers.ml run FOLDER     walk training, recovering, gating for FOLDER/job.json
    python -m workers.ml methods        recovery methods with their needs, dials and papers (--json: with all knobs)
    python -m workers.ml recover …      repair one PEFT adapter with one method, or search the least change that passes
    python -m workers.ml bench …        every method's dial on one adapter, as a table

Exit codes: 0 done (of `run`: with any verdict; of `recover`: a candidate was written), 3 nothing passed, 42 the data or
settings are at fault, 75 a fault of ours that may pass (memory, a missing file), 143 stopped as asked, 1 a bug, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workers.ml.errors import Cancelled, InvalidSetting, LibraryError, NumericError, UserError
from workers.ml.jsonlines import JsonLines
from workers.ml.recovery.specs import SPECS, MethodSpec, method_name
from workers.ml.types import Silent

DONE, BUG, USAGE, NOTHING_PASSED, USER_ERROR, RETRY, STOPPED = 0, 1, 2, 3, 42, 75, 143


def main(arguments: list[str]) -> int:
    parser = _parser()
    if not arguments:
        print(__doc__, file=sys.stderr)
        return USAGE
    try:
        given = parser.parse_args(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    if given.command == "run":
        return run(given.folder)
    if given.command == "methods":
        return methods(as_json=given.json)
    return _guarded(given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workers.ml", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="walk the pipeline for a folder").add_argument("folder", type=Path)
    listing = commands.add_parser("methods", help="list the recovery methods")
    listing.add_argument("--json", action="store_true", help="with the JSON schema of every knob")
    recover = commands.add_parser("recover", help="repair one adapter")
    bench = commands.add_parser("bench", help="measure every method's dial on one adapter")
    for command in (recover, bench):
        command.add_argument("--base", type=Path, required=True, help="folder of the base model")
        command.add_argument("--adapter", type=Path, required=True, help="folder of the PEFT adapter")
        command.add_argument(
            "--sets", type=Path, required=True, help="folder of the provider's sets, <role>.jsonl each"
        )
        command.add_argument("--task", type=Path, help="held-out rows of the customer's task, OpenAI chat JSONL")
        command.add_argument("--pretrained", type=Path, help="the base model's weights before its alignment")
        command.add_argument("--judge", default="apothecary", help="which judge reads the answers")
        command.add_argument("--max-answer-tokens", type=int, default=256)
        command.add_argument("--device", help="cpu or cuda; the default is what there is")
        command.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    recover.add_argument("--method", default="auto", help='"auto", a method\'s name, or a spec as JSON')
    recover.add_argument("--strength", type=float, help="the dial; without it the spec's own")
    bench.add_argument("--methods", nargs="+", metavar="NAME", help="only these; the default is every method")
    return parser


def run(folder: Path) -> int:
    # What libraries print would corrupt the protocol, so they get the error stream and we keep the real one.
    lines = JsonLines(sys.stdout)
    sys.stdout = sys.stderr
    lines.cancel_on_signals()
    try:
        from workers.ml.pipeline import run as walk  # room: lazy-import `methods` must not load torch

        outcome = walk(folder, lines)
    except Cancelled:
        return STOPPED
    except LibraryError as error:
        lines.write(
            "error", code=error.code, message=error.message, param=error.param, line=getattr(error, "line", None)
        )
        return _code_of(error)
    except Exception as error:
        traceback.print_exc()
        lines.write("error", code="system_bug", message=f"{type(error).__name__}: {error}", param=None)
        return BUG
    lines.write("result", **asdict(outcome))
    return DONE


def _code_of(error: LibraryError) -> int:
    return USER_ERROR if isinstance(error, UserError | NumericError) else RETRY


def methods(*, as_json: bool) -> int:
    if as_json:
        table = [
            {
                "method": method_name(spec),
                "needs": sorted(spec.needs),
                "paper": spec.paper,
                "family": spec.family,
                "schema": spec.model_json_schema(),
            }
            for spec in SPECS
        ]
        print(json.dumps(table, indent=2))
        return DONE
    for spec in SPECS:
        said = (spec.__doc__ or "").strip().partition("\n")[0]
        print(f"{method_name(spec):16} {said}")
        needs = ", ".join(sorted(spec.model_validate({}).required_inputs())) or "nothing"
        dial = ", ".join(f"{strength:g}" for strength in spec.grid)
        print(f"{'':16} {spec.family} · needs {needs} · dial {dial} · {spec.paper}")
    return DONE


def _guarded(given: argparse.Namespace) -> int:
    """`recover` and `bench`, with what went wrong in one line on the error stream."""
    try:
        if given.out.exists():
            raise InvalidSetting(f"{given.out} exists already; name a folder that does not.", "out")
        return bench(given) if given.command == "bench" else recover(given)
    except (KeyboardInterrupt, Cancelled):
        return STOPPED
    except LibraryError as error:
        print(f"{error.code}: {error.message}" + (f" [{error.param}]" if error.param else ""), file=sys.stderr)
        return _code_of(error)
    except OSError as error:
        print(f"system_file: {error}", file=sys.stderr)
        return RETRY
    except Exception:
        traceback.print_exc()
        return BUG


def recover(given: argparse.Namespace) -> int:
    from workers.ml.evals.measure import AnswerSettings  # room: lazy-import `methods` must not load torch
    from workers.ml.recovery import library  # room: lazy-import `methods` must not load torch

    method: str | MethodSpec = given.method
    if method == library.AUTO and given.strength is not None:
        raise InvalidSetting(
            "A search finds the strength by itself; leave --strength out, or name a method.", "strength"
        )
    if method != library.AUTO:
        method = library.method_of(_json_or_name(given.method))
        if given.strength is not None:
            method = library.method_of({**method.model_dump(), "strength": given.strength})
    tuned = library.load(given.base, given.adapter, device=given.device)
    data = library.read_data(given.sets, task=given.task, pretrained=given.pretrained, judge=given.judge)
    answers = AnswerSettings(max_answer_tokens=given.max_answer_tokens)
    result = library.recover(tuned, data, method, answers=answers, progress=Spoken())
    library.save(tuned, result, given.out)
    if result.report is not None:
        change = result.report.relative_change
        print(f"{result.report.method} at {result.report.strength:g}: relative change {change or 0:.3g}, not measured")
    elif result.found is not None and result.found.winner is not None:
        winner = result.found.winner
        print(f"{winner.label} at {winner.strength:g}, KL {winner.kl or 0:.3g}: {result.verdict}")
    else:
        print("nothing that was tried passes; the trace says why")
    print(f"written: {given.out}")
    return DONE if result.usable else NOTHING_PASSED


def _json_or_name(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidSetting(f"The method is neither a name nor JSON: {error}", "method") from error


def bench(given: argparse.Namespace) -> int:
    from workers.ml.evals.measure import AnswerSettings, Examiner  # room: lazy-import `methods` must not load torch
    from workers.ml.recovery import library  # room: lazy-import `methods` must not load torch
    from workers.ml.recovery.sweep import sweep, write  # room: lazy-import `methods` must not load torch
    from workers.ml.recovery.trace import CandidateRecord  # room: lazy-import `methods` must not load torch

    specs = [library.method_of(name) for name in given.methods or [method_name(spec) for spec in SPECS]]
    tuned = library.load(given.base, given.adapter, device=given.device)
    data = library.read_data(given.sets, task=given.task, pretrained=given.pretrained, judge=given.judge)
    library.require_measuring_sets(data)
    examiner = Examiner(data.judge, AnswerSettings(max_answer_tokens=given.max_answer_tokens), Spoken())
    records: list[CandidateRecord] = []
    try:
        for record in sweep(tuned, specs, inputs=data.inputs, sets=data.selection, examiner=examiner):
            records.append(record)
            outcome = "passes" if record.passed else record.why
            print(f"{record.label:40} {record.strength:<6g} {outcome}", flush=True)
    finally:
        write(given.out, records)  # what was measured before an interruption is worth having
    print(f"written: {given.out}")
    return DONE


class Spoken(Silent):
    """Progress for a person at a terminal: the part and its percentage on one line of the error stream."""

    def __init__(self) -> None:
        self._said = 0.0

    def step(self, step: int, total_steps: int, **values: float | int | str | None) -> None:
        if sys.stderr.isatty() and time.monotonic() - self._said > 0.2:
            self._said = time.monotonic()
            print(f"\r\033[K{values.get('part', '')} {step}/{total_steps}", end="\r", file=sys.stderr, flush=True)

    def event(self, message: str, *, level: str = "info", **data: Any) -> None:
        if message == "candidate":
            outcome = "passes" if data.get("passed") else data.get("why")
            print(f"{data.get('method')} at {data.get('strength'):g}: {outcome}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
