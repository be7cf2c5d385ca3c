"""What "auto" becomes, and that every choice comes with its reason."""

import pytest

from workers.ml.errors import InvalidSetting
from workers.ml.settings import LoraSettings
from workers.ml.tuning.hyperparameters import BaseDefaults, RequestedHyperparameters, resolve_auto

DEFAULTS = BaseDefaults(
    learning_rate=2e-4, context_limit=2048, lora=LoraSettings(rank=8, alpha=16, target_modules=("q_proj",))
)


@pytest.mark.parametrize(
    ("trained_tokens", "epochs"),
    [(1, 10), (9_999, 10), (25_000, 4), (25_001, 4), (33_333, 4), (100_000, 1), (10**9, 1)],
)
def test_epochs_aim_at_a_hundred_thousand_trained_tokens(trained_tokens: int, epochs: int) -> None:
    found = resolve_auto(RequestedHyperparameters(), rows=500, trained_tokens=trained_tokens, base_defaults=DEFAULTS)
    assert found.settings.n_epochs == epochs
    assert "100,000 trained tokens" in found.reasons["n_epochs"]


@pytest.mark.parametrize(
    ("rows", "batch_size"), [(1, 1), (10, 1), (16, 2), (64, 8), (1_000, 8), (7_473, 15), (32_000, 64), (10**6, 64)]
)
def test_batches_hold_a_share_of_the_rows_and_leave_several_steps_an_epoch(rows: int, batch_size: int) -> None:
    found = resolve_auto(RequestedHyperparameters(), rows=rows, trained_tokens=10**5, base_defaults=DEFAULTS)
    assert found.settings.batch_size == batch_size
    assert f"of {rows:,} rows" in found.reasons["batch_size"]


def test_the_multiplier_multiplies_the_rate_of_the_base_model() -> None:
    auto = resolve_auto(RequestedHyperparameters(), rows=10, trained_tokens=10, base_defaults=DEFAULTS)
    double = resolve_auto(
        RequestedHyperparameters(learning_rate_multiplier=2.0), rows=10, trained_tokens=10, base_defaults=DEFAULTS
    )
    assert auto.settings.learning_rate == 2e-4
    assert double.settings.learning_rate == 4e-4
    assert double.reasons["learning_rate"] == "requested multiplier: 2 times the base model's rate of 0.0002"


def test_what_was_requested_is_taken_as_it_is() -> None:
    wishes = RequestedHyperparameters(n_epochs=3, batch_size=5, learning_rate_multiplier=1.5, seed=11)
    found = resolve_auto(wishes, rows=10**6, trained_tokens=10**9, base_defaults=DEFAULTS)
    settings = found.settings
    assert (settings.n_epochs, settings.batch_size, settings.seed) == (3, 5, 11)
    assert found.reasons["n_epochs"] == "3 as requested"


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        (RequestedHyperparameters(n_epochs=0), "n_epochs"),
        (RequestedHyperparameters(n_epochs=51), "n_epochs"),
        (RequestedHyperparameters(batch_size=257), "batch_size"),
        (RequestedHyperparameters(learning_rate_multiplier=0.0), "learning_rate_multiplier"),
        (RequestedHyperparameters(learning_rate_multiplier=float("nan")), "learning_rate_multiplier"),
        (RequestedHyperparameters(learning_rate_multiplier=1e6), "learning_rate"),
        (RequestedHyperparameters(seed=-1), "seed"),
    ],
)
def test_wishes_out_of_range_are_refused_by_name(wishes: RequestedHyperparameters, param: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        resolve_auto(wishes, rows=10, trained_tokens=10, base_defaults=DEFAULTS)
    assert caught.value.param == param


def test_data_without_a_trained_token_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="nothing to train on"):
        resolve_auto(RequestedHyperparameters(), rows=3, trained_tokens=0, base_defaults=DEFAULTS)
