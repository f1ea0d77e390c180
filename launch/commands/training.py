"""`evmamba fit`, `validate`, `test` and `predict`."""

import contextlib
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from evmamba.launch.commands.shared import need_extra

TRAINING = {
    "fit": "train",
    "validate": "evaluate on the validation data",
    "test": "evaluate and write result.json",
    "predict": "predict images with a checkpoint, or a recipe's validation data",
}
TRAINING_HELP = """\
usage: evmamba {command} --config RECIPE [--option value ...]

{what}, by Lightning's command line:

  --config conf/detection/tiny.yaml      a recipe: a file, or one of the package
  --data.init_args.data_dir DIR          the data set; layouts in docs/data.md
  --model.init_args.backbone NAME        ours or timm's (evmamba models)
  --model.init_args.checkpoint pretrained   or a file, URL, hf-hub:USER/NAME
  --trainer.max_epochs N                 and all of Lightning's Trainer
  --ckpt_path FILE                       to test, or to continue from
  --print_config                         the whole configuration
{more}
recipes:
{recipes}

evmamba {command} --help-all [--config RECIPE] has every option and recipe."""

MORE_HELP = {
    "fit": """\
  --fresh                                begin anew; without it an interrupted
                                         training goes on
""",
    "predict": """\
or, for any images:
  evmamba predict IMAGE_OR_FOLDER ... --checkpoint best.ckpt [--output DIR]
""",
}


def main(command: str, arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_short_help(command))
        return 0 if arguments else 2
    if "--help-all" in arguments:
        need_extra()
        return _whole_help(command, [argument for argument in arguments if argument != "--help-all"])
    need_extra()
    # A recipe may name a user's own classes, in a module where the command was given, as for ``python -m``.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    from evmamba.launch.fit.cli import train

    train([command, *arguments])
    return 0


def _short_help(command: str) -> str:
    """What fits a screen of 24 lines."""
    from evmamba.launch.fit.recipes import recipes

    families: dict[str, dict[str, list[str]]] = {}  # folder -> name without the variant's letter -> letters
    for recipe in recipes():
        folder, _, name = recipe.removesuffix(".yaml").rpartition("/")
        common = re.sub(r"_[bst]$", "_", name)
        families.setdefault(folder, {}).setdefault(common, []).append(name.removeprefix(common))
    names = {
        folder: [f"{common}{{{','.join(own)}}}" if own[1:] else common + own[0] for common, own in found.items()]
        for folder, found in families.items()
    }
    lines = (
        textwrap.wrap(f"{folder}/ {' '.join(sorted(found, key=len))}", 79, initial_indent="  ", subsequent_indent="   ")
        for folder, found in names.items()
    )
    text = "\n".join(line for wrapped in lines for line in wrapped)
    return TRAINING_HELP.format(
        command=command, what=TRAINING[command].capitalize(), recipes=text, more=MORE_HELP.get(command, "")
    )


def _whole_help(command: str, arguments: Sequence[str]) -> int:
    """Every recipe, every option of Lightning's command line, and those of the recipe's model and data."""
    from evmamba.launch.fit.cli import EvmambaCLI, configs_in, resolve_configs
    from evmamba.launch.fit.recipes import recipes
    from evmamba.tasks.plain_files import read_yaml

    print("recipes:", *recipes(), sep="\n  ", end="\n\n")
    asked = ["--help"]
    resolved, _ = resolve_configs(arguments)
    for path in configs_in(resolved)[-1:]:
        content = read_yaml(Path(path))
        parts = {part: content[part]["class_path"] for part in ("model", "data") if part in content}
        asked += [f"--{part}.help={class_path}" for part, class_path in parts.items()]
    for option in asked:
        with contextlib.suppress(SystemExit):
            EvmambaCLI([command, option])
    return 0
