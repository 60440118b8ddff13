"""The energy that a card has taken, where its driver tells."""

import functools
import math
from typing import Any


def joules() -> float:
    """Return the joules that the first NVIDIA card has taken since its driver was loaded; NaN where nothing tells."""
    driver = _driver()
    if driver is None:
        return math.nan
    try:
        return float(driver.nvmlDeviceGetTotalEnergyConsumption(driver.nvmlDeviceGetHandleByIndex(0)) / 1000)
    except driver.NVMLError:
        return math.nan


@functools.cache
def _driver() -> Any:
    """Return NVIDIA's management library, started; None where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no library, no driver: each has an exception of its own
        return None
    return pynvml
