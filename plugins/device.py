"""The GPU of this machine, asked through CUDA's driver alone."""

from __future__ import annotations

import ctypes

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
MAJOR, MINOR = 75, 76


def has_gpu() -> bool:
    """Whether CUDA's driver is here and finds a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return found and count.value > 0


def compute_capability() -> int:
    """The first device's, major times ten plus minor; only where ``has_gpu`` finds one."""
    driver = ctypes.CDLL("libcuda.so.1")
    numbers = []
    for attribute in (MAJOR, MINOR):
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        numbers.append(value.value)
    return 10 * numbers[0] + numbers[1]
