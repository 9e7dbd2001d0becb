"""The shipped accelerators hold what hardware can do, and a calibration is used where it holds and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from famc.backend import (
    Accelerator,
    cpu_model,
    load_accelerator,
    local_cpu,
    packaged_dir,
    read_accelerator,
    user_dir,
)
from famc.backend.cpu import CALIBRATED

NAMES = sorted(p.stem for p in packaged_dir().glob("*.yaml"))
PROMISED = (
    "v100-16g", "v100-32g", "a100-40g", "a100-80g", "a100-pcie-80g", "a10g", "l4", "l40s", "rtx3090", "rtx4090", "rtx5090",
    "h100-80g", "h100-pcie", "h100-nvl", "h100-hbm2e-96g", "h200-141g", "b200", "gb200", "b300", "gb300", "mi250x", "mi300x",
    "mi325x", "mi355x", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "gaudi2", "gaudi3", "apple-m1", "apple-m2-ultra",
    "apple-m3-max", "apple-m4-pro", "xeon-8480", "jetson-agx-orin", "iphone-16-pro", "oneplus-12", "raspberry-pi-5",
)  # fmt: skip
CPUINFO = """processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Test CPU
stepping\t: 8
flags\t\t: fpu avx2 fma avx512f avx512_bf16 amx_bf16

processor\t: 1
model name\t: Another
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads the developer's own backends."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "famc" / "backends"


# --- shipped files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMISED)
def test_what_was_promised_is_there(name: str) -> None:
    assert load_accelerator(name).name == name


@pytest.mark.parametrize(
    ("name", "figures"),
    [  # by the vendors' data sheets: dense peaks, GB/s, GB, W
        ("a100-80g", {"bf16": 312, "int8": 624, "bandwidth": 2039, "memory": 80, "tdp": 400}),
        ("h100-80g", {"bf16": 989, "fp8": 1979, "bandwidth": 3350, "memory": 80, "tdp": 700}),
        ("h200-141g", {"bf16": 989, "bandwidth": 4800, "memory": 141, "tdp": 700}),
        ("mi300x", {"bf16": 1307, "bandwidth": 5300, "memory": 192, "tdp": 750}),
        ("tpu-v5p", {"bf16": 459, "bandwidth": 2765, "memory": 95}),
        ("l4", {"bf16": 121, "fp8": 242, "bandwidth": 300, "memory": 24, "tdp": 72}),
    ],
)
def test_data_sheets(name: str, figures: dict[str, float]) -> None:
    chip = load_accelerator(name)
    known: dict[str, float] = {
        **chip.peak_tflops,
        "bandwidth": chip.bandwidth_gbs,
        "memory": chip.memory_gb,
        "tdp": chip.tdp_w,
    }
    assert {key: known[key] for key in figures} == figures


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_can_be_believed(name: str) -> None:
    """Whatever the file says twice agrees, and what is from memory or assumed is called so."""
    chip = load_accelerator(name)
    narrow = [chip.peak_tflops.get(p) for p in ("fp4", "fp8", "bf16", "fp32")]
    peaks = [peak for peak in narrow if peak]
    assert peaks == sorted(peaks, reverse=True), "fewer bits are never slower"
    for precision, best in chip.matmul_tflops.items():
        assert 0.4 < best / chip.peak_tflops[precision] <= 1
    if chip.capacity_gib:
        assert 0.93 < chip.capacity_gib * 2**30 / (chip.memory_gb * 1e9) < 1.08
    assert chip.device.usable <= chip.memory_gb * 1e9
    for figure in ("matmul_tflops", "capacity_gib", "usable_share"):
        assert bool(getattr(chip, figure)) == (figure in chip.sources), figure
    if chip.usd_per_hour and chip.usd_per_hour.spot:
        assert chip.usd_per_hour.spot < 1.5 * chip.usd_per_hour.on_demand
    assert not any("/" + "work" in text or "../" in text for text in chip.sources.values())


def test_nvlink_joins_a_rack_of_gb200_and_a_node_of_b200() -> None:
    assert load_accelerator("gb200").per_node == 72
    assert load_accelerator("b200").per_node == 8


def test_a_price_says_when_and_where_for_each_market() -> None:
    price = load_accelerator("h100-80g").usd_per_hour
    assert price is not None
    on_demand, spot = price.of("on_demand"), price.of("spot")
    assert on_demand is not None and spot is not None
    assert on_demand[0] == 3.0 and on_demand[1] == "2026-07" and "nanochat" in on_demand[2]
    assert spot[0] == 1.28 and spot[1] == "2025-H2" and "skypilot" in spot[2]
    only = load_accelerator("l4").usd_per_hour
    assert only is not None and only.of("spot") is None
    both = load_accelerator("a10g").usd_per_hour
    assert both is not None and both.of("spot") == (0.3, both.date, both.source)


@pytest.mark.parametrize(
    ("name", "reason"), [("tpu-v5e", "xla"), ("iphone-16-pro", "phone"), ("apple-m3-max", "metal")]
)
def test_what_famc_cannot_train_on_says_why(name: str, reason: str) -> None:
    said = load_accelerator(name).no_training()
    assert said is not None and reason in said
    assert load_accelerator("h100").no_training() is None
    assert load_accelerator("mi300x").no_training() is None
    assert load_accelerator("cpu").no_training() is None


def test_a_phone_gives_an_app_half_of_its_memory() -> None:
    assert load_accelerator("iphone-16-pro").device.usable == pytest.approx(4e9)


@pytest.mark.parametrize(
    "more",
    [
        {"matmul_tflops": {"bf16": 11}},
        {"matmul_tflops": {"fp8": 1}},
        {"basis": "measured"},
        {"usd_per_hour": {"on_demand": 1, "date": "2026", "source": "x", "spot_date": "2025"}},
        {"usable_share": 1.2},
    ],
)
def test_what_contradicts_itself_is_refused(more: dict[str, Any]) -> None:
    plain = {
        "name": "x", "kind": "gpu", "peak_tflops": {"bf16": 10}, "efficiency": {"bf16": 0.5}, "memory_gb": 1,
        "bandwidth_gbs": 1, "tdp_w": 1, "sources": {},
    }  # fmt: skip
    Accelerator.model_validate(plain)
    with pytest.raises(ValidationError):
        Accelerator.model_validate(plain | more)


def test_fewer_cores_do_not_keep_the_others_device() -> None:
    cpu = load_accelerator("cpu")
    assert cpu.device.cores == 4
    assert cpu.with_cores(1).device.cores == 1


# --- calibrations -------------------------------------------------------------------------------------------


def machine(root: Path) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(CPUINFO)
    (root / "proc/meminfo").write_text("MemTotal:  16000000 kB\n")
    (root / "proc/self/cgroup").write_text("0::/\n")
    return root


def calibration(folder: Path, **changes: Any) -> Path:
    """A file as `famc calibrate` writes it for `machine` with two cores."""
    from ruamel.yaml import YAML

    curves = {
        "threads": 1, "matmul_gflops": {"bf16": 900, "fp32": 100}, "softmax_gbs": 10, "memory_gbs": 9,
        "linear_gflops": {p: [[64, 128, r], [512, 128, 4 * r], [64, 1024, 2 * r], [512, 1024, 8 * r]] for p, r in (("bf16", 50), ("fp32", 10))},
        "vector_gbs": [[1, 40], [64, 5]], "matvec_gbs": {"bf16": 12, "fp32": 12}, "operation_us": 5,
    }  # fmt: skip
    measured = {
        "date": "2026-01-02", "cpu_model": "Test CPU (family 6, model 143, stepping 8)", "cores": 2, "torch": "2.13",
        "flags": ["amx_bf16", "avx512_bf16", "avx512f", "avx2", "fma"], "step_overhead_ms": 1, "startup_s": 3, "curves": [curves],
    }  # fmt: skip
    data = {
        "name": CALIBRATED, "kind": "cpu", "peak_tflops": {"bf16": 0.9, "fp32": 0.1}, "efficiency": {"bf16": 0.2, "fp32": 0.5},
        "memory_gb": 999, "bandwidth_gbs": 12, "cores": 2, "tdp_w": 10, "basis": "measured", "sources": {},
        "measured": measured | changes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{CALIBRATED}.yaml"
    with path.open("w") as file:
        YAML().dump(data, file)
    return path


def test_the_cpu_is_named_with_what_tells_its_kinds_apart(tmp_path: Path) -> None:
    assert cpu_model(machine(tmp_path)) == "Test CPU (family 6, model 143, stepping 8)"
    assert cpu_model(tmp_path / "nothing") == ""


def test_a_calibration_that_holds_is_used_with_the_memory_of_now(tmp_path: Path, home: Path) -> None:
    root = machine(tmp_path / "root")
    calibration(home)
    cpu, why = local_cpu(None, root, affinity=2)
    assert why == ()
    assert cpu.name == "cpu" and cpu.basis == "measured" and cpu.peak_tflops["bf16"] == 0.9
    assert cpu.memory_gb == pytest.approx(16.384)
    assert cpu.device.rates is not None and cpu.device.memory == pytest.approx(16.384e9)
    assert cpu.device.rates.at(1).linear_rate("bf16", 512, 1024) == pytest.approx(4e11)
    assert cpu.with_cores(1).device.rates is not None


def test_one_beside_the_spec_wins(tmp_path: Path, home: Path) -> None:
    root = machine(tmp_path / "root")
    calibration(home)
    calibration(tmp_path / "specs" / "backends", startup_s=9)
    spec = tmp_path / "specs" / "family.yaml"
    spec.write_text("")
    cpu, _ = local_cpu(spec, root, affinity=2)
    assert cpu.measured is not None and cpu.measured.startup_s == 9


@pytest.mark.parametrize(
    ("changes", "cores", "reason"),
    [
        ({"cpu_model": "Other CPU"}, 2, "measured on Other CPU, and this is Test CPU"),
        ({}, 4, "measured with 2 cores, and 4 can be used"),
        ({"flags": ["avx2"]}, 2, "other instruction sets"),
    ],
)
def test_one_of_another_machine_is_named_and_passed_over(
    tmp_path: Path, home: Path, changes: dict[str, Any], cores: int, reason: str
) -> None:
    root = machine(tmp_path / "root")
    path = calibration(home, **changes)
    cpu, why = local_cpu(None, root, affinity=cores)
    assert cpu.basis == "assumed" and cpu.cores == cores
    assert len(why) == 1 and reason in why[0] and str(path) in why[0] and "famc calibrate" in why[0]


@pytest.mark.parametrize("text", ["name: [", "name: this-cpu\n", "just text", "", "\x00"])
def test_one_that_cannot_be_read_is_named_and_the_next_is_used(tmp_path: Path, home: Path, text: str) -> None:
    root = machine(tmp_path / "root")
    calibration(home)
    broken = tmp_path / "specs" / "backends" / f"{CALIBRATED}.yaml"
    broken.parent.mkdir(parents=True)
    broken.write_text(text)
    cpu, why = local_cpu(tmp_path / "specs", root, affinity=2)
    assert cpu.basis == "measured"
    assert len(why) == 1 and str(broken) in why[0] and "can't be read" in why[0]


def test_one_that_was_disturbed_is_used_and_says_so(tmp_path: Path, home: Path) -> None:
    root = machine(tmp_path / "root")
    calibration(home, disturbed=True)
    cpu, why = local_cpu(None, root, affinity=2)
    assert cpu.basis == "measured" and "one thread only" in why[0]


def test_without_one_the_machine_is_looked_at(tmp_path: Path) -> None:
    cpu, why = local_cpu(tmp_path, machine(tmp_path / "root"), affinity=2)
    assert (cpu.basis, why) == ("assumed", ())


def test_the_users_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert user_dir() == home
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert user_dir() == tmp_path / "me" / ".config" / "famc" / "backends"
    calibration(user_dir())
    (user_dir() / "mine.yaml").write_text(
        (packaged_dir() / "l4.yaml").read_text().replace("name: l4", "name: mine").replace('"l4-24g"', "")
    )
    assert load_accelerator("mine").memory_gb == 24


def test_name_and_file_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text((packaged_dir() / "l4.yaml").read_text())
    with pytest.raises(ValueError, match="must agree"):
        read_accelerator(path)
