"""What libraries say in every run is left out, what matters is not."""

import logging
import warnings
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings


@pytest.fixture(autouse=True)
def levels():
    """Loggers as they were before."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, list(logger.filters)) for logger in loggers]
    yield
    for logger, (level, filters) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.filters = filters


def test_advice_is_silenced_and_other_warnings_are_heard():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_warnings()
        warnings.warn("The 'val_dataloader' does not have many workers which may be a bottleneck", stacklevel=1)
        warnings.warn("3 of 10 images cannot be read", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["3 of 10 images cannot be read"]


def test_advertisements_are_left_out_and_filters_do_not_pile_up(caplog: pytest.LogCaptureFixture):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    quiet_warnings()
    once = len(logger.filters)
    quiet_warnings()
    assert len(logger.filters) == once
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("try installing [litlogger](https://pypi.org)")
        logger.info("continuing the training")
    assert [record.getMessage() for record in caplog.records] == ["continuing the training"]


def test_a_benchmarks_runs_leave_out_lightnings_remarks_and_keep_ours_and_warnings(caplog: pytest.LogCaptureFixture):
    quiet_logs()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning = Path(L.__file__).parent / "pytorch" / "trainer.py"
    with caplog.at_level(logging.INFO, logger.name):
        for level, path, said in (
            (logging.INFO, lightning, "GPU available: False"),
            (logging.WARNING, lightning, "this is odd"),
        ):
            logger.handle(logger.makeRecord(logger.name, level, str(path), 1, said, (), None))
        rank_zero_info("continuing the training")  # by its place in the code it is this file's
    assert [record.getMessage() for record in caplog.records] == ["this is odd", "continuing the training"]
