"""Use of the processors, memory, disk, network and GPUs of rank 0's host, under MLflow's own names: `system/...`."""

from __future__ import annotations

import contextlib
import os
from typing import Any

SAMPLED = 30.0  # seconds between two samples


class SystemMetrics:
    """MLflow's monitors, read at once by the caller: MLflow's own thread would send to the server past the spool."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = []
        self.samples = 0
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() not in ("false", "0"):
            for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
                with contextlib.suppress(Exception):  # no GPU, no /proc, or a package that reads them is missing
                    self._monitors.append(kind())

    def sample(self) -> dict[str, float]:
        """The present values; what cannot be read is left out."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            with contextlib.suppress(Exception):  # drivers raise errors of any kind, and training must not feel them
                monitor.collect_metrics()
                values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
        self.samples += 1
        return values
