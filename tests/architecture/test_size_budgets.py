"""The tree keeps its size budgets, and the measuring is right."""

from pathlib import Path

from scripts.size_budgets import EXCEPTIONS, Allowance, judge, measure_file, measure_tree

ROOT = Path(__file__).resolve().parents[2]


def sizes(path: str, source: str) -> dict[tuple[str, str], int]:
    return {(m.key, m.kind): m.size for m in measure_file(path, source)}


def test_the_tree_keeps_its_budgets() -> None:
    assert judge(measure_tree(ROOT), EXCEPTIONS) == []


def test_lines_are_counted_without_the_docstring_and_parameters_without_self() -> None:
    source = 'class A:\n    def f(self, a, *, b):\n        """One.\n\n        Two.\n        """\n        return a\n'
    measured = sizes("app/x.py", source)
    assert measured[("app/x.py::A.f", "lines")] == 2
    assert measured[("app/x.py::A.f()", "parameters")] == 2


def test_a_nested_function_is_measured_too() -> None:
    assert ("app/x.py::f.g", "lines") in sizes("app/x.py", "def f():\n    def g():\n        return 1\n    return g\n")


def test_too_long_too_wide_and_unneeded_exceptions_are_said() -> None:
    measures = list(measure_file("app/x.py", "def f(a, b, c, d, e, f, g):\n" + "    a()\n" * 70))
    assert len(judge(measures, {})) == 2
    allowed = {"app/x.py::f": Allowance(80, "the one training loop"), "app/x.py::f()": Allowance(7, "seven facts")}
    assert judge(measures, allowed) == [
        "app/x.py::f: 71 lines, the hard limit is 60",
        "app/x.py::f(): 7 parameters, the hard limit is 6",
    ]
    allowed = {key: Allowance(a.limit, a.reason, beyond=True) for key, a in allowed.items()}
    assert judge(measures, allowed) == []
    assert judge([], allowed) == [f"{key}: named as an exception and needs none" for key in sorted(allowed)]


def test_lists_of_fields_have_no_length_budget() -> None:
    source = "x = 1\n" * 700
    assert judge(list(measure_file("app/jobs/schemas.py", source)), {}) == []
    assert len(judge(list(measure_file("app/jobs/service.py", source)), {})) == 1
