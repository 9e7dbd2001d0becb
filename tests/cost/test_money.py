"""Price, energy, CO2e."""

import pytest

from famc.backend import load_accelerator
from famc.cost.money import co2e_kg, energy_kwh, usd


def test_a_busy_h100_server_draws_what_was_measured() -> None:
    """Eight H100 for an hour: 7.1-7.3 kWh at the wall."""
    assert 7.0 < energy_kwh(3600, 8, load_accelerator("h100-80g").device) < 7.4


def test_price_is_by_device_hour() -> None:
    assert usd(1800, 8, 3.0) == pytest.approx(12.0)


def test_emissions_follow_the_grid() -> None:
    assert co2e_kg(10, grid=0.05) == pytest.approx(0.5)
    assert co2e_kg(10) > co2e_kg(10, grid=0.05)
