"""Price, energy and CO2e of a job."""

from __future__ import annotations

from famc.cost.device import Device

GRID_KG_PER_KWH = 0.473
"""World average of 2024 (Ember, Global Electricity Review 2025: 473 gCO2/kWh). Assumed; grids span 0.02 to
0.7."""


def usd(seconds: float, devices: int, price: float) -> float:
    """`price` is USD for one device and hour."""
    return seconds / 3600 * devices * price


def energy_kwh(seconds: float, devices: int, device: Device, pue: float = 1.0) -> float:
    """TDP x node factor x time. A busy 8xH100 server draws 1.28 x its GPUs' TDP at the wall (7.1-7.3 kW
    published); `pue` adds the building's cooling, 1.0 leaves it out."""
    return device.power * device.node_power_factor * devices * seconds / 3.6e6 * pue


def co2e_kg(kwh: float, grid: float = GRID_KG_PER_KWH) -> float:
    """`grid` is kg CO2e for a kWh."""
    return kwh * grid
