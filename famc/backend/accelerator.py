"""The fields of a backend's file, and the same in SI units.

In: parsed YAML. Out: Accelerator, and its Device for the arithmetic of famc.cost. Bears no identity.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from famc.cost.cpu_rates import CpuRates, ThreadRates
from famc.cost.device import GB, GIB, Device

Precision = Literal["bf16", "fp16", "fp8", "fp4", "int8", "fp32"]
Stack = Literal["cuda", "rocm", "xla", "synapse", "neuron", "metal", "cpu", "phone"]
RUNS_HERE = frozenset(
    {"cuda", "rocm", "cpu"}
)  # what torch, transformers and trl train on without another port


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Price(_Strict):
    """USD for one device and hour. Prices move: each has its date and where it was read."""

    on_demand: float = Field(gt=0)
    spot: float | None = Field(default=None, gt=0)
    date: str
    source: str
    spot_date: str | None = Field(default=None, description="default: as `date`")
    spot_source: str | None = Field(default=None, description="default: as `source`")

    @model_validator(mode="after")
    def _check(self) -> Price:
        if self.spot is None and (self.spot_date or self.spot_source):
            raise ValueError("spot_date and spot_source belong to a spot price, and there is none")
        return self

    def of(self, market: Literal["on_demand", "spot"]) -> tuple[float, str, str] | None:
        """(USD for a device and hour, date, source); None where no spot price is known."""
        if market == "on_demand":
            return self.on_demand, self.date, self.source
        if self.spot is None:
            return None
        return self.spot, self.spot_date or self.date, self.spot_source or self.source


class ThreadCurves(_Strict):
    """What a CPU was measured to do with this many threads. See famc.cost.cpu_rates.ThreadRates."""

    threads: int = Field(ge=1)
    matmul_gflops: dict[Precision, float] = Field(description="the best rate of plain matrix products")
    linear_gflops: dict[Precision, tuple[tuple[float, float, float], ...]] = Field(
        description="[width, rows, GFLOP/s] of a linear layer, forward and backward"
    )
    vector_gbs: tuple[tuple[float, float], ...] = Field(
        description="[MB of a tensor, GB/s] of an element-wise operation with a new result"
    )
    softmax_gbs: float = Field(gt=0, description="GB/s of softmax: read and written once")
    memory_gbs: float = Field(gt=0, description="copy of what no cache holds, GB/s read and written")
    matvec_gbs: dict[Precision, float] = Field(description="GB/s of weights in matrix x vector")
    fresh_ms: dict[Precision, tuple[tuple[float, float], ...]] = Field(
        default={},
        description="[width, ms] that a linear layer takes longer when it meets a number of rows first",
    )
    operation_us: float = Field(
        gt=0, description="one small operation with its part of autograd, microseconds"
    )


class CpuMeasured(_Strict):
    """A `famc calibrate`: of which machine, when, with what, and its figures."""

    date: str
    cpu_model: str
    cores: int = Field(ge=1)
    flags: tuple[str, ...] = Field(description="the instruction sets that decide which kernels run")
    torch: str
    step_overhead_ms: float = Field(gt=0, description="a step of Trainer beside its model and optimizer")
    startup_s: float = Field(gt=0, description="imports of torch, transformers and Trainer")
    residual: float | None = Field(
        default=None, gt=0, description="a real training step / what the figures predict for it"
    )
    disturbed: bool = Field(
        default=False, description="other programs ran: there are no curves of several threads"
    )
    curves: tuple[ThreadCurves, ...] = Field(min_length=1)

    def rates(self) -> CpuRates:
        """In SI units."""
        return CpuRates(
            threads=tuple(_thread_rates(c) for c in sorted(self.curves, key=lambda c: c.threads)),
            step_overhead=self.step_overhead_ms / 1e3,
            startup=self.startup_s,
            residual=self.residual or 1.0,
        )


def _thread_rates(curves: ThreadCurves) -> ThreadRates:
    return ThreadRates(
        threads=curves.threads,
        matmul=tuple((p, v * 1e9) for p, v in curves.matmul_gflops.items()),
        linear=tuple(
            (p, tuple((w, r, v * 1e9) for w, r, v in points)) for p, points in curves.linear_gflops.items()
        ),
        vector=tuple((mb * 1e6, v * GB) for mb, v in curves.vector_gbs),
        softmax=curves.softmax_gbs * GB,
        memory=curves.memory_gbs * GB,
        matvec=tuple((p, v * GB) for p, v in curves.matvec_gbs.items()),
        operation=curves.operation_us / 1e6,
        fresh=tuple((p, tuple((w, v / 1e3) for w, v in points)) for p, points in curves.fresh_ms.items()),
    )


class Accelerator(_Strict):
    """One accelerator, or one CPU host."""

    name: str
    aliases: tuple[str, ...] = ()
    kind: Literal["gpu", "cpu"] = Field(
        description="how its time is reckoned: one device, or cores that add up"
    )
    stack: Stack | None = Field(default=None, description="software that drives it; default: cuda, or cpu")
    peak_tflops: dict[Precision, float] = Field(description="dense TFLOP/s; of one core for a CPU")
    matmul_tflops: dict[Precision, float] = Field(
        default={}, description="the best rate that any large matrix product was measured to reach"
    )
    efficiency: dict[Precision, float] = Field(
        description="share of the peak that large training matmuls reach"
    )
    memory_gb: float = Field(gt=0, description="GB (1e9 bytes) of one device; of the host for a CPU")
    capacity_gib: float | None = Field(
        default=None,
        gt=0,
        description="GiB that the driver reports to PyTorch, where it differs from memory_gb",
    )
    usable_share: float | None = Field(
        default=None, gt=0, le=1, description="of the memory that a model may fill; default: by kind"
    )
    bandwidth_gbs: float = Field(gt=0, description="memory bandwidth, GB/s")
    intranode_gbs: float = Field(default=0.0, ge=0, description="GB/s one device can send inside its node")
    internode_gbs: float = Field(default=0.0, ge=0, description="GB/s one device can send to other nodes")
    per_node: int = Field(default=1, ge=1, description="devices that the fast links join")
    cores: int = Field(default=1, ge=1, description="CPU cores; 1 for a GPU")
    tdp_w: float = Field(gt=0)
    node_power_factor: float = Field(
        default=1.28, ge=1, description="wall power of a busy node / its devices' TDP"
    )
    usd_per_hour: Price | None = None
    basis: Literal["measured", "datasheet", "assumed"] = "datasheet"
    measured: CpuMeasured | None = Field(default=None, description="figures of `famc calibrate`")
    sources: dict[str, str] = Field(description="figure -> where it was read")

    @model_validator(mode="after")
    def _check(self) -> Accelerator:
        for figure in self.sources:
            if figure not in type(self).model_fields:
                raise ValueError(f"sources names `{figure}`, which is no figure of an accelerator")
        if not self.peak_tflops or not self.efficiency:
            raise ValueError("peak_tflops and efficiency need at least one precision each")
        for precision, share in self.efficiency.items():
            if not 0 < share <= 1:
                raise ValueError(f"efficiency {precision} is {share}: it is a share between 0 and 1")
        for precision, best in self.matmul_tflops.items():
            if not 0 < best <= self.peak_tflops.get(precision, 0.0):
                raise ValueError(
                    f"matmul_tflops {precision} is {best}: it is at most the peak of {precision}"
                )
        if (self.basis == "measured") != (self.measured is not None):
            raise ValueError("basis `measured` and the block `measured` belong together")
        if self.measured is not None and self.kind != "cpu":
            raise ValueError("`measured` holds a CPU's figures, and this is none")
        return self

    @cached_property
    def device(self) -> Device:
        """The same in SI units, for the arithmetic of famc.cost."""
        return Device(
            name=self.name,
            kind=self.kind,
            peaks=tuple((p, v * 1e12) for p, v in self.peak_tflops.items()),
            efficiencies=tuple(self.efficiency.items()),
            memory=self.memory_gb * GB,
            bandwidth=self.bandwidth_gbs * GB,
            intranode=self.intranode_gbs * GB,
            internode=self.internode_gbs * GB,
            power=self.tdp_w,
            node_power_factor=self.node_power_factor,
            cores=self.cores,
            matmuls=tuple((p, v * 1e12) for p, v in self.matmul_tflops.items()),
            capacity=self.capacity_gib * GIB if self.capacity_gib else None,
            share=self.usable_share,
            rates=self.measured.rates() if self.measured else None,
        )

    def with_cores(self, cores: int) -> Accelerator:
        """This CPU host seen by a job that may use `cores` of it: its compute, all of the memory."""
        seen = self.model_copy(update={"cores": cores, "tdp_w": self.tdp_w * cores / self.cores})
        seen.__dict__.pop("device", None)  # the copy's own, not what the original has cached
        return seen

    def training_precision(self) -> tuple[str, str]:
        """The precision to train in where the spec names none, and why."""
        for precision in ("bf16", "fp16"):
            if precision in self.peak_tflops:
                return precision, f"{self.name} multiplies {precision} in hardware"
        return "fp32", f"{self.name} has no 16-bit matrix units"

    def no_training(self) -> str | None:
        """Why famc can plan for this device but not train on it; None where it can."""
        stack = self.stack or ("cpu" if self.kind == "cpu" else "cuda")
        if stack in RUNS_HERE:
            return None
        return f"famc trains with PyTorch on CUDA, ROCm and CPUs; {self.name} needs {stack}: it can only be planned"
