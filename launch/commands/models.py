"""`evmamba models`."""

from collections.abc import Sequence

from evmamba.errors import unknown_name
from evmamba.launch.commands.parser import Parser


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="evmamba models", description="List backbones: ours, then timm's whose name matches.")
    parser.add_argument("filter", nargs="?", help="pattern of timm's names, e.g. 'resnet*'")
    given = parser.parse_args(arguments)

    import timm

    import evmamba

    ours = evmamba.list_models()
    others = [name for name in timm.list_models(given.filter) if name not in ours] if given.filter else []
    if given.filter and not others:
        raise unknown_name("backbone", given.filter, [*ours, *timm.list_models()])
    print("\n".join(others or ours))
    if not given.filter:
        print(f"and {len(timm.list_models()) - len(ours)} of timm: evmamba models 'resnet*'")
    return 0
