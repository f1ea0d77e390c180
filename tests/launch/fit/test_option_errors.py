"""Wrong options become one line with the nearest right one, whatever jsonargparse writes."""

import pytest

from evmamba.launch.fit.option_errors import short_error

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'evmamba.tasks.module.TaskModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'evmamba.tasks.classification.ClassificationModule':
        {problem}
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='x', val='y')"""

WRONG_TYPE = """Parser key "optimizer.lr":
          Expected a <class 'float'>. Got value: x"""
OF_MODULE = "unknown option of ClassificationModule"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("unrecognized arguments: --trainer.max_epoch=3", "unknown option '--trainer.max_epoch'; did you mean"),
        ("Subcommand 'fit' does not accept option 'dat'", "unknown option 'dat'; did you mean data?"),
        (NESTED.format(problem="Option 'backbon' is not accepted"), f"{OF_MODULE} 'backbon'; did you mean backbone"),
        (NESTED.format(problem="unrecognized arguments: --schedule.kin=3"), f"{OF_MODULE} 'schedule.kin'; did you"),
        (NESTED.format(problem=WRONG_TYPE), "optimizer.lr: Expected a float. Got value: x"),
        ("the following arguments are required: fit.data", "nothing says which data to use; name a recipe"),
        ("Expected a dot import path string: Foo", "unknown class 'Foo'"),
        (
            "No module named 'evmamba.tasks.detection.Detector'",
            "unknown class 'evmamba.tasks.detection.Detector'; write it like evmamba.tasks.detection.Detection",
        ),
    ],
)  # fmt: skip
def test_the_explanation_shrinks_to_what_is_wrong(message: str, line: str):
    error = str(short_error(message, ["--trainer.max_epochs", "--data"]))
    assert error.startswith(line)
    assert "\n" not in error
    assert len(error) < 160
