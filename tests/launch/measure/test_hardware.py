"""Floors follow the device; predictions stand beside what is measured."""

from types import SimpleNamespace

import pytest
import torch

from evmamba.launch.measure.hardware import KNOWN, cpu_scan_floor_us, hardware_of, predicted_us, scan_floor_us

T_STAGE_1 = 128 * 56 * 56 * 96  # token-channels


def test_floors_follow_the_device():
    assert scan_floor_us(hardware_of("NVIDIA H200"), T_STAGE_1, 16, training=False) == pytest.approx(165.8, abs=0.1)
    times = [scan_floor_us(hardware, T_STAGE_1, 16, training=True) for hardware in KNOWN]
    assert times[0] == times[1] < times[2]  # the scan is bound by exponentials, of which H100 and H200 have as many
    assert hardware_of("NVIDIA GeForce GTX 1080") is None


def test_a_cpus_floor_counts_instructions(monkeypatch):
    """301 056 token-channels of 16 states, 17 instructions each, two a clock of 3 GHz, on one core: 0.85 ms."""
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=3000.0))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    image = 4 * 28 * 28 * 96
    assert cpu_scan_floor_us(image, 16, 1) == pytest.approx(853, abs=1)
    assert cpu_scan_floor_us(image, 16, 2) == pytest.approx(853 / 2, abs=1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert cpu_scan_floor_us(image, 16, 1) == pytest.approx(2 * 853, abs=1)
    monkeypatch.setattr(psutil, "cpu_freq", lambda: None)
    assert cpu_scan_floor_us(image, 16, 1) is None


def test_predictions_stand_beside_measurements():
    h200, a100 = hardware_of("NVIDIA H200"), hardware_of("NVIDIA A100-SXM4-80GB")
    for kernel in ("scan_forward_kernel, inference", "scan_forward_kernel, training", "scan_backward_kernel"):
        predicted = predicted_us(h200, "T-s1 classification", kernel)
        assert predicted > scan_floor_us(h200, T_STAGE_1, 16, training=False)
        assert predicted_us(a100, "T-s1 classification", kernel) > predicted
    assert predicted_us(h200, "another shape", "scan_backward_kernel") is None
