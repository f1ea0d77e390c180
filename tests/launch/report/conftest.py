"""One table, and its page."""

import pytest

from evmamba.launch.report.build import report_from
from evmamba.launch.report.page import to_html
from evmamba.launch.report.table import Table

from ..conftest import write_two_models


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return report_from([write_two_models(tmp_path_factory.mktemp("report") / "results")])


@pytest.fixture(scope="module")
def page(table: Table) -> str:
    return to_html(table)
