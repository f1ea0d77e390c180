"""Modules of ours that register something in a library, imported as soon as that library is and no earlier.

``import evmamba`` promises that timm's registry has our models and that torch knows the scan's operator (exported
programs need it). Importing both libraries for that would take seconds from whoever asks for neither, the command line
above all. Python offers no event for "timm has been imported"; a finder on `sys.meta_path` is its documented way to be
asked first, and here it finds what the other finders find and only adds an import at the end.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def follow(library: str, module: str) -> None:
    """Import `module` now if `library` is imported already, else right after it is."""
    if library in sys.modules:
        importlib.import_module(module)
    else:
        sys.meta_path.insert(0, _Follower(library, module))


class _Follower(MetaPathFinder):
    def __init__(self, library: str, module: str) -> None:
        self.library = library
        self.module = module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.library:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_follow(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    importlib.import_module(self.module)

            spec.loader.exec_module = execute_and_follow  # type: ignore[method-assign]
        return spec
