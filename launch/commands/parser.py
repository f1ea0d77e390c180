"""Wrong options of a command in one line, with the nearest right one."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from evmamba.errors import UserError, unknown_name


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors that offer the nearest option."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def parse_args(  # type: ignore[override]  # argparse's has two signatures
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            raise unknown_name("option", rest[0].partition("=")[0], self._option_string_actions)
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
