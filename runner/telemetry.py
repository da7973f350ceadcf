"""Reports on their users that libraries send unless they are told not to: told not to.

Whoever wants to send them sets the variable themselves; what is set stays.
"""

from __future__ import annotations

import os

OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "GRADIO_ANALYTICS_ENABLED": "False",  # trackio's
    "DO_NOT_TRACK": "1",
}


def telemetry_off() -> None:
    """For this process and what it starts; before the libraries are imported."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
