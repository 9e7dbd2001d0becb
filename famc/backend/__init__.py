"""What backends/*.yaml may say: one accelerator a file, each figure with its source. And this CPU.

accelerator.py: the fields of a file. files.py: where files are found. cpu.py: what this machine is, and whether a
`famc calibrate` of it still holds.
"""

from famc.backend.accelerator import Accelerator, CpuMeasured, Precision, Price, ThreadCurves
from famc.backend.cpu import cpu_flags, cpu_model, cpu_precision, detect_cpu, find_calibration, local_cpu
from famc.backend.files import UnknownAccelerator, load_accelerator, packaged_dir, read_accelerator, user_dir

__all__ = [
    "Accelerator",
    "CpuMeasured",
    "Precision",
    "Price",
    "ThreadCurves",
    "UnknownAccelerator",
    "cpu_flags",
    "cpu_model",
    "cpu_precision",
    "detect_cpu",
    "find_calibration",
    "load_accelerator",
    "local_cpu",
    "packaged_dir",
    "read_accelerator",
    "user_dir",
]
