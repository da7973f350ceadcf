"""What a figure depends on besides the code: processor, versions, threads. No names, no paths."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from trimpot.kernels import native


def environment(device: str) -> dict[str, Any]:
    state = native.state()
    found: dict[str, Any] = {
        "device": device,
        "cpu": cpu_name(),
        "cpu_features": list(state.cpu_features),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "native": state.available,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["hip"] = torch.version.hip
    return found


def cpu_name() -> str:
    """As the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
