"""What a step needs and what it costs, as pure arithmetic on plain numbers: no torch, no clock, no disk but famc's own tables.

Reading order: `shape` (a model's dimensions, and finding them for a parameter count), `parameters` (exact counts),
`anatomy` (what a model is made of; `of_shape` and `hf/` make it; `models` are published ones), `sums` (weights, FLOPs, caches over it), `device`
(what a backend can do), `layout` and `setup` (how a step is spread, and by what software), `step_memory` (bytes a device),
`step_time` (seconds on GPUs), `cpu_time` (seconds on a CPU, by its `cpu_rates`), `search` (the layout that is fastest or
cheapest; `spreads`, `bounds`, `priced` and `reasons` are its parts), `cases/` (rows of a table), `generate` and `decode` (writing text), `money` (price, energy, CO2e).

Times on GPUs are **modelled**, with constants fitted to published measurements (data/fitted.json); on a CPU they rest on what
`famc calibrate` measured there, or else on **assumed** curves (`cpu_assumed`).
"""
