"""What a step needs and what it costs, as pure arithmetic on plain numbers: no torch, no files, no clock.

Reading order: `shape` (a model's dimensions, and finding them for a parameter count), `parameters` (exact
counts), `flops` (work), `device` (what a backend can do), `layout` (how a model is spread over devices, and
the search for it), `memory` (bytes a device), `roofline` (seconds), `money` (price, energy, CO2e).

Every time here is **modelled**: a plain roofline with stated constants, not a measurement.
"""
