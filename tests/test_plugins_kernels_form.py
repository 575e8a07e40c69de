"""Which device runs a kernel: the rule in Python, in the host layer, and as NVIDIA has it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ingot.plugins.kernels.form import COMPUTE_CAPABILITIES, runs_on
from ingot.plugins.kernels.link import SOURCES

# Every compute capability that CUDA 13 knows, and some before.
DEVICES = (70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)

# What is compiled -> the devices it runs on. From 9.0 on the targets end in "a", which is one
# device; sm_80 to sm_89 are not, and run within their major version.
RUNS_ON = {
    80: {80, 86, 87, 88, 89},
    86: {86, 87, 88, 89},
    89: {89},
    90: {90},
    100: {100},
    120: {120},
}


def test_a_cubin_runs_where_nvidia_says() -> None:
    assert RUNS_ON.keys() == set(COMPUTE_CAPABILITIES)
    for compiled, devices in RUNS_ON.items():
        assert {device for device in DEVICES if runs_on(compiled, device)} == devices


def test_the_host_layer_has_the_same_rule(tmp_path: Path) -> None:
    (tmp_path / "pairs.cpp").write_text("""
#include <cstdio>
#include <forms.h>
int main() {
    for (int compiled = 50; compiled < 140; ++compiled)
        for (int device = 50; device < 140; ++device)
            if (ingot::runs_on(compiled, device)) std::printf("%d %d\\n", compiled, device);
}
""")
    program = tmp_path / "pairs"
    subprocess.run(
        ["g++", "-std=c++17", f"-I{SOURCES}", tmp_path / "pairs.cpp", "-o", program], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    found = {tuple(map(int, line.split())) for line in done.stdout.splitlines()}
    every = range(50, 140)
    assert found == {(c, d) for c in every for d in every if runs_on(c, d)}
