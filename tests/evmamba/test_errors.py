"""What is said about users' mistakes."""

import pytest

from evmamba.errors import UserError, first_few, unknown_name


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (range(5), "0, 1, 2, 3, 4"),
        (range(6), "0, 1, 2, 3, 4 and 1 more"),
        (iter("abcdefgh"), "a, b, c, d, e and 3 more"),
    ],
)
def test_of_many_offenders_a_few_are_named_and_the_others_counted(items, text: str):
    assert first_few(items) == text


def test_phrases_are_told_apart_by_more_than_a_comma():
    assert first_few(["a is torn", "b, too", "c"], 2, "; ") == "a is torn; b, too; and 1 more"


def test_a_mistake_in_a_loading_process_stays_one_line():
    """torch re-raises it with the whole traceback of that process as the message."""
    message = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "loader.py", line 1, in f\nevmamba.errors.UserError: image not found: a.jpg; mend it\n'
    )
    assert str(UserError(message)) == "image not found: a.jpg; mend it"


@pytest.mark.parametrize(
    ("name", "valid", "hint"),
    [
        ("resnet8", ["resnet18", "vgg11"], "did you mean resnet18?"),
        ("x", ["b", "a", "a"], "valid: a, b"),
        ("zzz", [f"name{k}" for k in range(13)], "13 names are valid, none of them is similar"),
    ],
)
def test_an_unknown_name_is_answered_with_what_would_be_right(name: str, valid: list[str], hint: str):
    assert str(unknown_name("model", name, valid)) == f"unknown model '{name}'; {hint}"
