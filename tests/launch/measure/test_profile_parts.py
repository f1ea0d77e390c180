"""Where the time goes: operators, and parts of the network."""

import contextlib
from types import SimpleNamespace

import torch
from torch.autograd import DeviceType

from evmamba.launch.measure import profile_parts


def test_a_gpus_kernels_count_once_with_the_operator_that_launched_them(monkeypatch):
    def event(key, device_type, microseconds):
        return SimpleNamespace(key=key, device_type=device_type, self_device_time_total=microseconds, count=5)

    events = [
        event("aten::mm", DeviceType.CPU, 300),
        event("evmamba::scan2d", DeviceType.CPU, 100),
        event("gemm_kernel", DeviceType.CUDA, 300),
        event("scan_forward_kernel", DeviceType.CUDA, 100),
    ]
    trace = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(profile_parts, "torch_profile", lambda **_: contextlib.nullcontext(trace))
    shares = profile_parts._operators("net", lambda: None, torch.device("cuda"), 4)
    assert [(share.name, share.share) for share in shares] == [("aten::mm", 0.75), ("evmamba::scan2d", 0.25)]
