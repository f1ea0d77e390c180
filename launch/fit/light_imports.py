"""What a process's start leaves out: a quarter of its imports, for metrics that nothing here has.

torchmetrics, which Lightning imports, takes transformers, scipy.signal and matplotlib along wherever they are
installed, for metrics of texts and sounds and for plots. It does without where they are not; so they are hidden from
it while it is imported, and from nothing else. Both hooks are Python's documented ones of a finder on `sys.meta_path`.
Who wants all of it imports it first (``evmamba fit --import torchmetrics``).
"""

import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from types import ModuleType

HIDDEN = ("matplotlib", "scipy", "transformers")


def import_lightly(library: str = "torchmetrics", hidden: Iterable[str] = HIDDEN) -> None:
    """Hide packages from a library that is not imported yet, while it is."""
    known = any(isinstance(finder, _Hiding) and finder.library == library for finder in sys.meta_path)
    if library not in sys.modules and not known:
        sys.meta_path.insert(0, _Hiding(library, frozenset(hidden)))


class _Hiding(MetaPathFinder):
    def __init__(self, library: str, hidden: frozenset[str]) -> None:
        self.library = library
        self.hidden = hidden
        self.at_work = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.at_work and fullname in self.hidden:
            raise ModuleNotFoundError(f"{fullname} is not needed for {self.library}", name=fullname)
        if fullname != self.library or self.at_work:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_without(module: ModuleType) -> None:
                self.at_work = True
                try:
                    execute(module)
                finally:
                    self.at_work = False
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_without  # type: ignore[method-assign]
        return spec

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """Asked first for the version of a package; finds none, and says of hidden ones that nobody will."""
        if self.at_work and context is not None and context.name in self.hidden:
            raise PackageNotFoundError(context.name)
        return ()
