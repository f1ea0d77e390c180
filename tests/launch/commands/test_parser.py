"""Wrong options of a command become one line with the nearest right one."""

import pytest

from evmamba.errors import UserError
from evmamba.launch.commands.parser import Parser


def test_an_abbreviated_option_is_a_mistake_not_a_guess():
    parser = Parser(prog="evmamba bench")
    parser.add_argument("--backbones")
    with pytest.raises(UserError, match=r"unknown option '--backbone'; did you mean --backbones\?"):
        parser.parse_args(["--backbone=resnet18"])


def test_a_missing_value_points_to_the_help():
    parser = Parser(prog="evmamba bench")
    parser.add_argument("--output")
    with pytest.raises(UserError, match="expected one argument; see evmamba bench --help"):
        parser.parse_args(["--output"])
