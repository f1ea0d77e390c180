"""Holds the kernels to the registers, spills and instructions they were tuned to; compiling needs no GPU.

An instruction more in an inner loop is a slower kernel: at EfficientVMamba-T, stage 1, batch 128, each of the 124 a
token costs in the forward is 1.2 us of an H200. Figures and what they mean: docs/kernels.md.
"""

import os
import re
import subprocess
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has no compiler", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from evmamba.kernels import (  # noqa: E402  # noqa: E402
    triton_backward,
    triton_batch_norm,
    triton_depthwise,
    triton_forward,
    triton_norm,
    triton_project,
    triton_selective_scan,
    triton_squeeze,
)
from evmamba.kernels.paths import PATTERNS  # noqa: E402
from evmamba.kernels.triton_math import GROUP_TOKENS  # noqa: E402
from evmamba.kernels.tuning import Tuning  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HALF = ("x", "dx", "dx_scan", "dproj", "z", "dz", "out", "dout", "u", "v", "du", "dv", "dpre", "factor")
POINTERS = dict.fromkeys(HALF, "*bf16") | {
    "bc": "*i64",
    "table": "*i32",
}
SCALARS = dict.fromkeys(
    ("B", "H", "W", "HW", "L", "LP", "NC", "M", "segments", "tokens", "rows", "chunks", "z_stride", "x_stride"), "i32"
)
SCALARS |= dict.fromkeys(triton_selective_scan.VARYING, "i32")

FORWARD = {"K": 4, "N": 16, "START": False, "PER_GROUP": False, "DTYPE": tl.bfloat16, "IN_REGISTERS": True}
T_STAGE_1 = {**FORWARD, "D": 96, "R": 3, "S": 36}
BACKWARD = {name: value for name, value in T_STAGE_1.items() if name != "START"} | {"SG": 40}

SEQUENCES = {"N": 16, "NP": 16, "T": 64, "B_t": 1, "C_t": 1}  # of mamba_ssm's layout

DOTS = {"BM": 64, "BS": 64, "BD": 64}


def compile_for(target, kernel, constants, num_warps=1, **options):
    is_amd = target == "gfx942"
    if "NVIDIA" in kernel.arg_names:
        constants = {**constants, "NVIDIA": not is_amd}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else SCALARS.get(name, POINTERS.get(name, "*fp32"))
        if name == "eps":
            signature[name] = "fp32"
        if signature[name].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("hip", "gfx942", 64) if is_amd else GPUTarget("cuda", target, 32)
    return triton.compile(source, target=gpu, options={"num_warps": num_warps, **options})


def disassemble(compiled, tmp_path):
    """(registers, bytes of stack, the innermost loop with exponentials as a count of instructions by name)."""
    if not CUOBJDUMP.exists():
        pytest.skip("this Triton ships no cuobjdump")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def dump(what):
        return subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True).stdout

    resources = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    assert resources
    line = re.compile(r"^\s*/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", re.MULTILINE)
    code = [(int(at, 16), name, operands) for at, name, operands in line.findall(dump("-sass"))]
    loops = []
    for at, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            loop = Counter(n for a, n, _ in code if int(target[1], 16) <= a <= at)
            if loop["MUFU.EX2"]:
                loops.append(loop)
    return int(resources[1]), int(resources[2]), min(loops, key=lambda loop: loop.total(), default=Counter())


# Registers and instructions are the compiler's as much as ours: 3.6 takes up to ten registers, eight instructions more.
reached_with_triton_3_8 = pytest.mark.skipif(
    not triton.__version__.startswith("3.8."), reason=f"figures of Triton 3.8's compiler, this is {triton.__version__}"
)


@reached_with_triton_3_8
@pytest.mark.parametrize(
    ("capability", "save", "registers", "instructions"),
    [
        pytest.param(80, True, 112, 494, id="sm_80"),
        pytest.param(90, False, 96, 497, id="sm_90, inference"),
        pytest.param(90, True, 96, 497, id="sm_90, training"),
        pytest.param(100, True, 96, 493, id="sm_100"),
    ],
)
def test_forward_spends_its_loop_on_exponentials(capability, save, registers, instructions, tmp_path):
    constants = {**T_STAGE_1, "SAVE": save}
    used, stack, loop = disassemble(compile_for(capability, triton_forward.scan_forward_kernel, constants), tmp_path)
    assert stack == 0
    assert used <= registers
    assert loop["MUFU.EX2"] == 17 * GROUP_TOKENS  # one a state and one for the softplus
    assert loop["MUFU.LG2"] == GROUP_TOKENS
    assert loop["LDS.128"] == 8 * GROUP_TOKENS  # a token's 16 pairs (B, C)
    assert loop.total() <= instructions


@reached_with_triton_3_8
@pytest.mark.parametrize(
    ("capability", "tensor", "stack", "instructions"),
    [
        pytest.param(80, True, 208, 287, id="sm_80"),
        pytest.param(90, True, 152, 274, id="sm_90"),
        pytest.param(90, False, 104, 361, id="sm_90, float32's sums"),
        pytest.param(100, True, 160, 253, id="sm_100"),
    ],
)
def test_backward_keeps_three_warps_a_scheduler(capability, tensor, stack, instructions, tmp_path):
    constants = {**BACKWARD, "TENSOR": tensor}
    compiled = compile_for(
        capability, triton_backward.scan_backward_kernel, constants, maxnreg=Tuning().backward_registers
    )
    used, spilled, loop = disassemble(compiled, tmp_path)
    shuffles, products = (sum(n for name, n in loop.items() if name.startswith(kind)) for kind in ("SHFL", "HMMA"))
    assert used <= 168
    assert spilled <= stack
    assert loop["MUFU.EX2"] <= 17  # 16 tokens; nothing is exponentiated twice
    assert loop["LDS.128"] == 8  # their B and C
    assert not loop["STL"]  # what is spilled is written once a chunk
    assert (shuffles, products) == ((7, 8) if tensor else (31, 0))  # 32 sums over 32 lanes
    assert loop.total() <= instructions


def test_amd_compiles_without_spills():
    for kernel, constants in (
        (triton_forward.scan_forward_kernel, {**T_STAGE_1, "SAVE": True}),
        (triton_backward.scan_backward_kernel, {**BACKWARD, "TENSOR": False}),
    ):
        assembly = compile_for("gfx942", kernel, constants).asm["amdgcn"]
        assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly) == ["0", "0"]


TAIL = {"C": 48, "BM": 64, "BD": 64}
BATCH_NORM = {"C": 96, "ACTIVATION": "relu", "BM": 32, "BD": 32}
DEPTHWISE = {"C": 96, "ACTIVATION": "silu", "DTYPE": tl.bfloat16, "BM": 32, "BD": 32}
SIZES = {"D": 96, "N": 16, "R": 3, "S": 36}
OTHER_KERNELS = {
    "segments": (
        triton_forward.segment_state_kernel,
        {name: T_STAGE_1[name] for name in T_STAGE_1 if name not in ("START", "PER_GROUP")} | {"REVERSE": True},
    ),
    "projections": (triton_project.project_kernel, {**SIZES, "BM": 128, "BS": 64, "BK": 32, "HALF_DOT": True}),
    "input gradient": (
        triton_project.input_gradient_kernel,
        {**SIZES, **DOTS, "K": 4, "SG": 40, "NB": 3, "PER_GROUP": False, "DTYPE": tl.bfloat16},
    ),
    "weight gradient": (triton_project.weight_gradient_kernel, {**SIZES, **DOTS, "K": 4, "SG": 40, "NB": 3, "NS": 1}),
    "sequences": (triton_selective_scan.forward_kernel, {**SEQUENCES, "SAVE": True}),
    "sequences backward": (triton_selective_scan.backward_kernel, {**SEQUENCES, "CHANNELS": 16}),
    "norm": (triton_norm.norm_gate_kernel, {"D": 96, "BM": 16, "BD": 128}),
    "norm backward": (triton_norm.norm_gate_backward_kernel, {"D": 96, "BM": 16, "BD": 128}),
}
AROUND_THE_SCAN = {
    "squeeze": (triton_squeeze.squeeze_kernel, {**TAIL, "ROWS": 256}),
    "excite": (triton_squeeze.excite_kernel, {"C": 48, "HIDDEN": 6, "BD": 64}),
    "gated add": (triton_squeeze.gated_add_kernel, TAIL),
    "gate gradient": (triton_squeeze.gate_gradient_kernel, {**TAIL, "ROWS": 256}),
    "branch gradient": (triton_squeeze.branch_gradient_kernel, TAIL),
    "depthwise": (triton_depthwise.depthwise_kernel, {**DEPTHWISE, "FLIP": False}),
    "depthwise gradient": (triton_depthwise.depthwise_gradient_kernel, DEPTHWISE),
    "statistics": (triton_batch_norm.statistics_kernel, {"C": 96, "BM": 32, "BD": 32}),
    "batch norm pool": (triton_batch_norm.batch_norm_pool_kernel, {**BATCH_NORM, "ROWS": 256}),
    "batch norm sums": (triton_batch_norm.batch_norm_sums_kernel, BATCH_NORM),
    "batch norm gradient": (triton_batch_norm.batch_norm_gradient_kernel, BATCH_NORM),
}


@pytest.mark.parametrize("name", ["input gradient", "weight gradient"])
def test_gradients_of_the_projections_are_loaded_sixteen_bytes_at_a_time(name):
    kernel, constants = OTHER_KERNELS[name]
    ptx = compile_for(90, kernel, {**constants, "PRECISION": "tf32"}).asm["ptx"]
    loads = Counter(re.findall(r"ld\.global[\w.:]*\.(\w+) ", ptx))
    assert loads.keys() == {"b32"}  # of which the table's pixels one by one, all else by vectors of four
    assert len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)) >= 16


@reached_with_triton_3_8
@pytest.mark.parametrize(("name", "num_warps", "registers"), [("sequences", 4, 96), ("sequences backward", 8, 128)])
def test_the_scan_of_sequences_stays_in_registers(name, num_warps, registers, tmp_path):
    used, stack, _ = disassemble(compile_for(90, *OTHER_KERNELS[name], num_warps=num_warps), tmp_path)
    assert used <= registers
    assert stack == 0


@pytest.mark.parametrize("target", [80, 100, "gfx942"], ids=str)
def test_other_kernels_compile(target):
    groups = tuple(astuple(group) for group in PATTERNS["es2d"].groups)
    paths = {"paths": (triton_project.paths_kernel, {"GROUPS": groups, "STEP": 2, "BT": 256})}
    around = {} if target == 100 else AROUND_THE_SCAN  # no tensor cores: nothing is new there
    for name, (kernel, constants) in (OTHER_KERNELS | paths | around).items():
        precision = {"PRECISION": "ieee" if target == "gfx942" else "tf32"} if "PRECISION" in kernel.arg_names else {}
        num_warps = 1 if name == "segments" else 4
        assert compile_for(target, kernel, {**constants, **precision}, num_warps=num_warps).asm


BATCH_SIZED = {"%B", "%HW", "%M", "%rows", "%z_stride", "%x_stride"}


def sources_of_short_offsets(ttir):
    """For every pointer offset of 32 bits, except into the table of pixels: the arguments and loads it comes from."""
    sources, found = {}, []  # names are used again in other blocks: what was defined last is meant

    def from_all(names):
        return set().union(*(sources.get(name, {name}) for name in names))

    for line in ttir.splitlines():
        text = line.split(" loc(")[0]
        names = re.findall(r"%[\w.]+", text)
        if "scf.for" in text:
            carried = re.search(r"iter_args\((.*?)\) ->", text)
            counter, *bounds = re.findall(r"%[\w.]+", text.split("scf.for")[1])[:4]
            sources[counter] = from_all(bounds)
            for name, start in re.findall(r"(%[\w.]+) = (%[\w.]+)", carried[1] if carried else ""):
                sources[name] = from_all([start])
        elif match := re.match(r"\s*(%[\w.]+)(?::\d+)? = ([\w.]+)", text):
            sources[match[1]] = {"load"} if match[2] == "tt.load" else from_all(names[1:])
            if match[2] == "tt.addptr" and re.search(r"[ x]i32>?$", text) and "%table" not in from_all(names[1:2]):
                found.append((line, from_all(names[2:3])))
    return found


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param((triton_forward.scan_forward_kernel, {**T_STAGE_1, "SAVE": True}), id="forward"),
        pytest.param((triton_backward.scan_backward_kernel, {**BACKWARD, "TENSOR": True}), id="backward"),
        *(pytest.param(kernel, id=name) for name, kernel in (OTHER_KERNELS | AROUND_THE_SCAN).items()),
    ],
)
def test_offsets_that_grow_with_the_batch_have_64_bits(kernel):
    function, constants = kernel
    precision = {"PRECISION": "tf32"} if "PRECISION" in function.arg_names else {}
    offsets = sources_of_short_offsets(compile_for(90, function, {**constants, **precision}).asm["ttir"])
    assert offsets
    for line, sources in offsets:
        assert not sources & (BATCH_SIZED | {"load"}), line
