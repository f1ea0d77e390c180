"""The simulated scheduler: units at their rates, latencies that warps hide, loops written out."""

import pytest

pytest.importorskip("triton")

from . import schedule
from .sass import Code, Instruction


def instruction(name, address=0, operands="", stall=1, write_barrier=7, waits=0):
    return Instruction(address, name, operands, stall, write_barrier, 7, waits)


def test_exponentials_take_eight_cycles_whatever_the_warps():
    body = [instruction("MUFU.EX2")] * 20
    for warps in (1, 3):
        assert schedule.cycles(body, warps) == pytest.approx(160 * warps, rel=0.02)


def test_one_instruction_a_cycle_and_scheduler():
    assert schedule.cycles([instruction("FFMA")] * 100, 2) == pytest.approx(200, rel=0.02)
    assert schedule.cycles([instruction("FFMA", stall=4)] * 100, 1) == pytest.approx(400, rel=0.02)
    assert schedule.cycles([instruction("FFMA", stall=4)] * 100, 4) == pytest.approx(400, rel=0.02)


def test_other_warps_hide_a_loads_latency():
    body = [instruction("LDG.E", write_barrier=0), *[instruction("FFMA", waits=1)] * 30]
    alone, among_four = schedule.cycles(body, 1), schedule.cycles(body, 4)
    assert alone > 60
    assert among_four / 4 < 0.7 * alone


def test_inner_loops_are_written_out():
    names = ["MOV", "FADD", "MUFU.EX2", "BRA", "FMUL", "BRA"]
    targets = ["", "", "", "0x10", "", "0x0"]
    code = Code(tuple(instruction(n, 16 * i, t) for i, (n, t) in enumerate(zip(names, targets, strict=True))), 32, 0)
    assert [i.name for i in code.innermost()] == ["FADD", "MUFU.EX2", "BRA"]
    body = schedule.outermost(code, lambda loop: 2)
    assert [i.name for i in body] == ["MOV", *["FADD", "MUFU.EX2", "BRA"] * 2, "FMUL", "BRA"]


def test_registers_limit_the_warps_of_a_scheduler():
    assert [schedule.resident_warps(registers) for registers in (255, 168, 128, 32)] == [2, 3, 4, 16]


def test_waves_add_up():
    body = [instruction("FFMA")] * 100
    one = schedule.microseconds(10, 132 * 4 * 3, body, 168)
    assert schedule.microseconds(10, 132 * 4 * 6, body, 168) == pytest.approx(2 * one, rel=0.02)
