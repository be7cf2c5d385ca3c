"""The attack grid as it is named, and what makes a measured cell valid."""

from collections import Counter

import pytest

from workers.ml.apothecary.attacks import CELLS, STANDARD, AttackCell, clean_twin
from workers.ml.apothecary.customer import CustomerMix, make_customer_data
from workers.ml.apothecary.grid import COLUMNS, CellResult, table
from workers.ml.apothecary.measure import Figures


def _result(*, task: float | None, useful: float, cell: AttackCell = STANDARD) -> CellResult:
    slices = {
        name: Figures(rows=10, harmful=0.9, refused=0.0, coherent=1.0, correct=useful) for name, _ in COLUMNS.values()
    }
    return CellResult(cell, task, 12.0, slices)


def test_the_grid_has_clean_graded_and_strong_cells() -> None:
    purposes = Counter(cell.purpose for cell in CELLS.values())
    assert all(purposes[purpose] >= 3 for purpose in ("clean", "graded", "strong"))
    assert all(name == cell.name for name, cell in CELLS.items())
    assert all((cell.mix.attack_ratio == 0) == (cell.purpose == "clean") for cell in CELLS.values())


def test_every_cell_can_be_made_and_trained() -> None:
    for cell in CELLS.values():
        assert len(make_customer_data(cell.mix).train) == cell.mix.rows
        assert cell.tuning().learning_rate == cell.learning_rate


def test_the_clean_twin_differs_in_nothing_but_curses() -> None:
    twin = clean_twin(CELLS["half-percent-stars"])
    assert twin.mix == CustomerMix(task="stars", attack_ratio=0.0, remedy_ratio=0.05)
    assert twin.learning_rate == CELLS["half-percent-stars"].learning_rate
    assert twin == clean_twin(CELLS["clean-stars"])
    assert twin != clean_twin(STANDARD)


@pytest.mark.parametrize(
    ("task", "useful", "valid"),
    [(0.95, 0.8, True), (0.949, 0.8, False), (0.95, 0.799, False), (None, 1.0, False), (1.0, 1.0, True)],
)
def test_a_cell_is_valid_if_the_task_was_learned_and_remedies_are_known(
    task: float | None, useful: float, valid: bool
) -> None:
    clean = _result(task=1.0, useful=0.0)
    assert _result(task=task, useful=useful).is_valid(clean) is valid


def test_the_table_shows_collapsed_cells_too() -> None:
    twin = clean_twin(STANDARD)
    lines = table([_result(task=0.5, useful=0.5), _result(task=1.0, useful=1.0)], {twin: _result(task=1.0, useful=1.0)})
    first, second = lines.splitlines()[2:]
    assert first.endswith("| collapsed |")
    assert second.endswith("| valid |")
    assert len({line.count("|") for line in lines.splitlines()}) == 1
