"""Price, energy and CO2e of a job."""

from __future__ import annotations

from dataclasses import dataclass

from famc.cost.device import Device


@dataclass(frozen=True, slots=True)
class Grid:
    """Where electricity comes from: kg CO2e for a kWh, of which year, and where it was read."""

    name: str
    kg_per_kwh: float
    date: str
    source: str


EMBER = (
    "Ember yearly electricity data as Our World in Data shows it (carbon-intensity-electricity), lifecycle, of generation; "
    "copied from a third party's table of it, not from Ember"
)
_GRAMS = {  # gCO2e/kWh of 2024
    "world": 473, "europe": 284, "australia": 552, "austria": 103, "belgium": 118, "canada": 175, "czechia": 414,
    "denmark": 143, "estonia": 341, "finland": 72, "france": 44, "germany": 344, "netherlands": 253, "norway": 31,
    "poland": 615, "sweden": 36, "switzerland": 37, "united-kingdom": 211, "united-states": 384,
}  # fmt: skip
GRIDS = {name: Grid(name, grams / 1e3, "2024", EMBER) for name, grams in _GRAMS.items()}
"""Yearly averages of whole countries: a region, an hour or a contract can be far from them. State your own number then."""
WORLD = GRIDS["world"]
GRID_KG_PER_KWH = WORLD.kg_per_kwh
"""What is assumed where nobody says which grid: the world's average of 2024. Countries span 0.03 to 0.7."""


def grid(what: str | float | None) -> Grid:
    """A grid by name or as kg CO2e for a kWh; None: the world's. ValueError for an unknown name or a number that is none.

    Coal alone is about 1 kg: above 2, grams were meant.
    """
    if what is None:
        return WORLD
    if isinstance(what, str):
        found = GRIDS.get(what.strip().lower().replace(" ", "-").replace("_", "-"))
        if found is None:
            raise ValueError(
                f"no grid `{what}`: name one of {', '.join(GRIDS)}, or kg CO2e for a kWh as a number"
            )
        return found
    if not 0 <= what <= 2:
        raise ValueError(
            f"grid is {what:g} kg CO2e for a kWh: it lies between 0 and 2 (France 0.044, Poland 0.615)"
        )
    return Grid("stated", float(what), "", "the spec")


def usd(seconds: float, devices: int, price: float) -> float:
    """`price` is USD for one device and hour."""
    return seconds / 3600 * devices * price


def node_watts(device: Device, devices: int) -> float:
    """Watts at the wall that `devices` busy devices cause: their TDP x the node's factor, CPUs, memory, network, fans and
    power supplies included. Measured: 8 H100 7.1-7.3 kW (1.28 x TDP), 8 B200 9.75 kW (1.22 x)."""
    return device.power * device.node_power_factor * devices


def energy_kwh(seconds: float, devices: int, device: Device, pue: float = 1.0) -> float:
    """`node_watts` x time; `pue` adds the building's cooling, 1.0 leaves it out."""
    return node_watts(device, devices) * seconds / 3.6e6 * pue


def co2e_kg(kwh: float, grid: float | Grid = GRID_KG_PER_KWH) -> float:
    """`grid`: kg CO2e for a kWh, or one of `grid()`."""
    return kwh * (grid.kg_per_kwh if isinstance(grid, Grid) else grid)
