"""Holds jsonargparse to the modules that a recipe may name (`tasks.trust`), whatever way a recipe names them."""

import jsonargparse

from evmamba.tasks.trust import trusted

# Below a trusted name, but there to load or build code.
LOADERS = (
    "torch.classes",
    "torch.hub",
    "torch.jit",
    "torch.load",
    "torch.multiprocessing",
    "torch.ops",
    "torch.package",
    "torch.serialization",
    "torch.utils.cpp_extension",
)


def limit_imports() -> None:
    """Call it before a recipe is read; a module that the user trusts later needs another call."""
    jsonargparse.set_parsing_settings(
        import_path_denylist=["*", *LOADERS], import_path_allowlist=trusted(), instantiate_subclass_spec_in_any=False
    )
