"""The emulator itself: what it must tell, on kernels of a few lines."""

import random
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from . import machine, ptx
from . import tensor_cores as tensor_cores  # registers its instructions
from .memory import Fault, GlobalMemory


def run(body, tensors, threads=64, grid=(1, 1, 1), order=None, values=()):
    """A kernel whose parameters %rd0, %rd1, ... are the tensors' addresses; %r0 is the thread, %r1 the CTA."""
    names = [f"k_param_{i}" for i in range(len(tensors) + len(values))]
    loads = "".join(f"ld.param.b64 %rd{i}, [{name}];\n" for i, name in enumerate(names))
    text = (
        f".visible .entry k(\n{', '.join(f'.param .u64 {name}' for name in names)}\n)\n.reqntid {threads}\n{{\n"
        f"{loads}mov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\nmul.wide.u32 %rd9, %r0, 4;\n{body}\nret;\n}}\n"
    )
    memory = GlobalMemory({f"tensor {i}": t for i, t in enumerate(tensors)})
    parameters = [*(t.data_ptr() for t in tensors), *values]
    machine.Launch(ptx.parse(text), grid, parameters, memory, 1024, order and random.Random(order)).run()


def test_threads_read_compute_and_write():
    x, y = torch.arange(64.0), torch.zeros(64)
    run(
        """
        add.s64 %rd2, %rd0, %rd9;
        ld.global.b32 {%r2}, [%rd2 + 0];
        fma.rn.f32 %r3, %r2, 0f40000000, 0f3F800000;
        add.s64 %rd3, %rd1, %rd9;
        st.global.b32 [%rd3], {%r3};
        """,
        [x, y],
    )
    assert torch.equal(y, 2 * x + 1)


def test_loops_end_where_their_warps_say():
    out = torch.zeros(64, dtype=torch.int32)
    run(
        """
        mov.b32 %r2, 0;
        shr.u32 %r4, %r0, 5;
        $again:
        add.s32 %r2, %r2, 3;
        setp.gt.s32 %p1, %r2, 10;
        setp.eq.b32 %p2, %r4, 0;
        or.pred %p3, %p1, %p2;
        @!%p3 bra $again;
        add.s64 %rd3, %rd0, %rd9;
        st.global.b32 [%rd3], {%r2};
        """,
        [out],
    )
    assert out.tolist() == [3] * 32 + [12] * 32


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("add.s64 %rd2, %rd0, 256;", "has 256 bytes"),
        ("sub.s64 %rd2, %rd0, 4;", "has 256 bytes"),
        ("add.s64 %rd2, %rd0, 2;", "not a multiple of 4"),
    ],
)
def test_reads_outside_of_a_tensor_are_refused(address, message):
    with pytest.raises(Fault, match=message):
        run(f"{address}\nld.global.b32 {{%r2}}, [%rd2 + 0];", [torch.zeros(64)])


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""], ids=["barrier", "none"])
@pytest.mark.parametrize("order", [None, 1])
def test_missing_barriers_between_warps_are_told(barrier, order):
    out = torch.zeros(64, dtype=torch.int32)
    exchange = f"""
        mul.lo.s32 %r2, %r0, 4;
        st.shared.b32 [%r2 + 0], %r0;
        {barrier}
        xor.b32 %r3, %r2, 128;
        ld.shared.b32 %r4, [%r3 + 0];
        add.s64 %rd3, %rd0, %rd9;
        st.global.b32 [%rd3], {{%r4}};
        """
    if barrier:
        run(exchange, [out], order=order)
        assert out.tolist() == [*range(32, 64), *range(32)]
    else:
        with pytest.raises(Fault, match="without a barrier"):
            run(exchange, [out], order=order)


def test_a_barrier_of_the_warp_orders_its_lanes_only():
    exchange = """
        mul.lo.s32 %r2, %r0, 4;
        st.shared.b32 [%r2 + 0], %r0;
        bar.warp.sync -1;
        xor.b32 %r3, %r2, {};
        ld.shared.b32 %r4, [%r3 + 0];
        """
    run(exchange.format(4), [])
    with pytest.raises(Fault, match="without a barrier"):
        run(exchange.format(128), [])


def test_overwriting_what_another_warp_may_still_read_is_told():
    with pytest.raises(Fault, match="without a barrier"):
        run(
            """
            mul.lo.s32 %r2, %r0, 4;
            st.shared.b32 [%r2 + 0], %r0;
            bar.sync 0;
            xor.b32 %r3, %r2, 128;
            ld.shared.b32 %r4, [%r3 + 0];
            st.shared.b32 [%r2 + 0], %r4;
            """,
            [],
        )


def test_ctas_must_not_share_what_they_write():
    out = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(Fault, match="different values"):
        run("add.s64 %rd3, %rd0, %rd9;\nst.global.b32 [%rd3], {%r1};", [out], grid=(2, 1, 1))


def test_threads_that_store_different_values_to_one_place_are_told():
    with pytest.raises(Fault, match="different values"):
        run("st.global.b32 [%rd0 + 0], {%r0};", [torch.zeros(1, dtype=torch.int32)], threads=32)
    run("mov.b32 %r2, 7;\nst.global.b32 [%rd0 + 0], {%r2};", [torch.zeros(1, dtype=torch.int32)], threads=32)


def test_copies_beside_the_instructions_have_to_be_waited_for():
    source, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = """
        mul.lo.s32 %r2, %r0, 4;
        add.s64 %rd2, %rd0, %rd9;
        cp.async.ca.shared.global [%r2 + 0], [%rd2 + 0], 0x4, 0x4;
        cp.async.commit_group;
        {}
        ld.shared.b32 %r4, [%r2 + 0];
        add.s64 %rd3, %rd1, %rd9;
        st.global.b32 [%rd3], {{%r4}};
        """
    run(body.format("cp.async.wait_group 0;"), [source, out])
    assert torch.equal(out, source)
    run(body.format("cp.async.wait_group 1;"), [source, out])
    assert (out == -1).all()  # the poison


def test_warps_of_a_cta_must_not_part_inside_and_must_meet_at_barriers():
    with pytest.raises(Fault, match="threads of a warp part"):
        run("setp.lt.u32 %p1, %r0, 5;\n@%p1 bra $end;\nmov.b32 %r2, 0;\n$end:", [])
    with pytest.raises(Fault, match="others have ended"):
        run("setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $end;\nbar.sync 0;\n$end:", [])


def test_undefined_registers_are_told():
    with pytest.raises(Fault, match="before it is written"):
        run("add.s32 %r2, %r7, 1;", [])


@pytest.mark.parametrize(("half", "expected"), [("{%r3, _}", 5), ("{_, %r3}", -1)])
def test_a_packed_half_that_nobody_wrote_is_garbage(half, expected):
    out = torch.zeros(64, dtype=torch.int32)
    store = "add.s64 %rd3, %rd0, %rd9;\nst.global.b32 [%rd3], {%r3};"
    run(f"mov.b32 %r2, 5;\nmov.b64 %rd5, {{%r2, %r7}};\nmov.b64 {half}, %rd5;\n{store}", [out])
    assert (out == expected).all()


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [("mul.hi.u16 %r3, %r2, -21845;", 33333 * 43691 >> 16), ("mul.hi.s16 %r3, %r2, 2;", -1)],
)
def test_upper_halves_of_products_of_16_bits(instruction, expected):
    out = torch.zeros(64, dtype=torch.int16)
    store = "mul.wide.u32 %rd8, %r0, 2;\nadd.s64 %rd3, %rd0, %rd8;\nst.global.b16 [%rd3], {%r3};"
    run(f"mov.b16 %r2, 33333;\n{instruction}\n{store}", [out])
    assert (out == expected).all()


def test_unknown_instructions_are_no_guesses():
    with pytest.raises(NotImplementedError, match="vote"):
        run("vote.sync.any.pred %p1, %p2, -1;", [])


def test_a_warp_multiplies_matrices():
    generator = np.random.default_rng(0)
    a, b = generator.integers(-8, 8, (16, 8)).astype(np.float32), generator.integers(-8, 8, (8, 8)).astype(np.float32)
    out = torch.zeros(16 * 8)
    lane = np.arange(32)
    row, column = lane // 4, lane % 4
    operands = [
        a[row, column],
        a[row + 8, column],
        a[row, column + 4],
        a[row + 8, column + 4],
        b[column, row],
        b[column + 4, row],
    ]
    places = np.stack(
        [row * 8 + 2 * column, row * 8 + 2 * column + 1, (row + 8) * 8 + 2 * column, (row + 8) * 8 + 2 * column + 1]
    )
    body = (
        "mul.wide.u32 %rd9, %r0, 4;\nadd.s64 %rd8, %rd0, %rd9;\nadd.s64 %rd7, %rd2, %rd9;\nmov.b32 %r30, 0f00000000;\n"
    )
    body += "".join(f"ld.global.b32 {{%r{10 + i}}}, [%rd8 + {128 * i}];\n" for i in range(6))
    body += (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, "
        "{%r14, %r15}, {%r30, %r30, %r30, %r30};\n"
    )
    for i in range(4):
        body += f"ld.global.b32 {{%r{40 + i}}}, [%rd7 + {128 * i}];\nmul.wide.u32 %rd{20 + i}, %r{40 + i}, 4;\n"
        body += f"add.s64 %rd{30 + i}, %rd1, %rd{20 + i};\nst.global.b32 [%rd{30 + i} + 0], {{%r{20 + i}}};\n"
    run(body, [torch.from_numpy(np.stack(operands)), out, torch.from_numpy(places.astype(np.int32))], threads=32)
    assert np.array_equal(out.numpy().reshape(16, 8), a @ b)


def test_scopes_of_inline_assembly_keep_their_labels():
    text = (
        ".entry k(\n)\n.reqntid 32\n{\n{\n.reg .pred done;\nagain:\nsetp.eq.b32 done, 1, 1;\n@!done bra.uni again;\n}\n"
        * 1
    )
    kernel = ptx.parse(text + "{\nagain:\nbra.uni again;\n}\nret;\n}\n")
    assert [i.operands[0].text for i in kernel.instructions if i.name == "bra"] == ["again@1", "again@2"]
    assert kernel.labels == {"again@1": 0, "again@2": 2}
    assert re.fullmatch(r"done@1", kernel.instructions[1].predicate)
