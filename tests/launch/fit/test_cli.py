"""The parser of trainings: a whole number stays one."""

from typing import Optional, Union, get_args

import lightning as L
import pytest

from evmamba.launch.fit.cli import settings_of, whole_numbers_first
from evmamba.launch.fit.recipes import find_recipe


@pytest.mark.parametrize("union", [Optional[Union[float, int]], Optional[Union[int, float]]])  # noqa: UP007, UP045
def test_a_union_of_numbers_begins_with_int_whatever_the_cache_of_typing_made_of_it(union):
    annotations = {"limit": union, "name": Optional[str]}  # noqa: UP045
    whole_numbers_first(annotations)
    assert get_args(annotations["limit"]) == (int, float, type(None))
    assert annotations["name"] == Optional[str]  # noqa: UP045


def test_one_batch_is_not_all_batches():
    options = [("trainer.limit_test_batches", "1"), ("trainer.limit_train_batches", "1.0")]
    trainer = settings_of(find_recipe("classification/tiny"), options)["trainer"]
    assert type(trainer["limit_test_batches"]) is int
    assert type(trainer["limit_train_batches"]) is float
    assert get_args(L.Trainer.__init__.__annotations__["limit_test_batches"])[0] is int
