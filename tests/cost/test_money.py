"""Price, energy, CO2e."""

import pytest

from famc.backend import load_accelerator
from famc.cost.money import co2e_kg, energy_kwh, grid, node_watts, usd


def test_a_busy_h100_server_draws_what_was_measured() -> None:
    """Eight H100 for an hour: 7.1-7.3 kWh at the wall."""
    assert 7.0 < energy_kwh(3600, 8, load_accelerator("h100-80g").device) < 7.4


def test_price_is_by_device_hour() -> None:
    assert usd(1800, 8, 3.0) == pytest.approx(12.0)


def test_emissions_follow_the_grid() -> None:
    assert co2e_kg(10, grid=0.05) == pytest.approx(0.5)
    assert co2e_kg(10) > co2e_kg(10, grid=0.05)


def test_a_busy_b200_server_draws_what_was_measured() -> None:
    """Eight B200: 9.75 kW at the wall."""
    assert node_watts(load_accelerator("b200").device, 8) == pytest.approx(9750, rel=0.01)


@pytest.mark.parametrize(("name", "grams"), [("france", 44), ("United Kingdom", 211), ("united_states", 384)])
def test_a_grid_is_found_by_name_and_says_where_its_figure_is_from(name: str, grams: int) -> None:
    found = grid(name)
    assert found.kg_per_kwh == pytest.approx(grams / 1000)
    assert found.date == "2024" and "Ember" in found.source
    assert co2e_kg(1000, found) == pytest.approx(grams)


def test_a_number_is_a_grid_and_nothing_is_the_world() -> None:
    assert grid(0.02).kg_per_kwh == 0.02
    assert grid(None).name == "world"
    assert co2e_kg(10) == pytest.approx(4.73)


@pytest.mark.parametrize("wrong", ["atlantis", 473, -0.1])
def test_a_wrong_grid_is_refused(wrong: str | float) -> None:
    with pytest.raises(ValueError, match="kg CO2e for a kWh"):
        grid(wrong)
