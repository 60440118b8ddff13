"""Read the energy that a card has consumed, where its driver reports it."""

import functools
import math
from typing import Any


def joules() -> float:
    """Return the joules that the first NVIDIA card has used since its driver was loaded; NaN where they are unknown."""
    driver = _driver()
    if driver is None:
        return math.nan
    try:
        return float(driver.nvmlDeviceGetTotalEnergyConsumption(driver.nvmlDeviceGetHandleByIndex(0)) / 1000)
    except driver.NVMLError:
        return math.nan


@functools.cache
def _driver() -> Any:
    """Return NVIDIA's management library, initialised, or None where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # a missing package, library or driver: each raises an exception of its own
        return None
    return pynvml
