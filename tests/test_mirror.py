"""Tests mirror the folders file by file: `tests/tasks/detection/test_data.py` tests `tasks/detection/data.py`."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "evmamba", "tasks", "launch")

# Still tested under another file's name, mostly through the command or the module that uses them. It only shrinks.
ELSEWHERE = {
    "kernels/numba_backward.py",
    "kernels/numba_forward.py",
    "kernels/triton_backward.py",
    "kernels/triton_es2d.py",
    "kernels/triton_forward.py",
    "kernels/triton_math.py",
    "kernels/triton_project.py",
}


def lacking() -> set[str]:
    files = [path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    mirrored = {
        file: ROOT / "tests" / file.parent / f"test_{file.name}" for file in files if file.name != "__init__.py"
    }
    return {file.as_posix() for file, test in mirrored.items() if not test.is_file()}


def test_every_new_file_has_a_test_of_its_name():
    assert lacking() - ELSEWHERE == set()


def test_what_has_one_by_now_leaves_the_list():
    assert ELSEWHERE - lacking() == set()
