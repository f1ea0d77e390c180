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
    "launch/fit/record.py",
    "launch/measure/profile_report.py",
    "launch/report/columns.py",
    "launch/report/formats.py",
    "launch/report/notes.py",
    "launch/use/interpret_figures.py",
    "tasks/classification/gallery.py",
    "tasks/classification/predictions.py",
    "tasks/classification/predictor.py",
    "tasks/detection/losses.py",
    "tasks/detection/predictions.py",
    "tasks/detection/predictor.py",
    "tasks/detection/whole.py",
    "tasks/inspection.py",
    "tasks/predictions.py",
    "tasks/predictor.py",
    "tasks/segmentation/predictions.py",
    "tasks/segmentation/predictor.py",
    "tasks/segmentation/whole.py",
    "tasks/whole.py",
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
