"""An estimate is kept beside its run and compared with the truth."""

from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.launch.report.run_details import facts_of
from evmamba.launch.store.estimates import FILE, Estimate, read_estimate
from evmamba.launch.store.results import write_result

from ..handmade import made_result


def test_the_report_puts_the_truth_beside_the_estimate(tmp_path: Path):
    Estimate(7200.0, 8, "900 images/s (given)").write(tmp_path)
    assert read_estimate(tmp_path) == Estimate(7200.0, 8, "900 images/s (given)")
    assert read_estimate(tmp_path).gpu_hours == 16
    result = made_result("classification", "efficientvmamba_t", training={"steps": 3, "seconds": 9000.0})
    assert "estimate" not in facts_of(result)
    write_result(result, tmp_path)
    assert facts_of(result)["estimate"] == "estimated 2.0 h, took 2.5 h (+25%); 900 images/s (given)"


@pytest.mark.parametrize("content", ["{", "[]", '{"seconds": -1, "processes": 1, "basis": ""}', '{"hours": 3}'])
def test_another_file_of_that_name_is_named(tmp_path: Path, content: str):
    assert read_estimate(tmp_path) is None
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match="no estimate of a run"):
        read_estimate(tmp_path)
