"""`evmamba fit`, `validate`, `test` and `predict`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from evmamba.launch.commands.shared import need_extra

TRAINING = {
    "fit": "train",
    "validate": "evaluate on the validation data",
    "test": "evaluate and write result.json",
    "predict": "predict images or folders with a checkpoint, or a recipe's validation data",
}
TRAINING_HELP = """\
usage: evmamba {command} --config RECIPE [--option value ...]

{what}, by Lightning's command line: every argument of the trainer, the model and the data is an option.

  --config conf/detection/tiny.yaml        a recipe: a file, or one of the package (listed below)
  --data.init_args.data_dir DIR            the data set; the layouts are in docs/data.md
  --model.init_args.backbone NAME          one of ours or timm's (evmamba models)
  --trainer.max_epochs N                   and all of Lightning's Trainer
  --ckpt_path FILE                         weights to test, or training to continue
  --print_config                           the whole configuration, to look at or to keep

recipes:
  {recipes}

all options: evmamba {command} --config RECIPE --print_config"""

MORE_HELP = {
    "fit": """

The same command continues a training that was interrupted; with --fresh it begins anew and keeps the old one aside.""",
    "predict": """

or, for any images:

  evmamba predict IMAGE_OR_FOLDER ... --checkpoint best.ckpt [--output DIR] [--min-score 0.3] [--device auto]""",
}


def main(command: str, arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        from evmamba.launch.fit.recipes import recipes

        text = TRAINING_HELP.format(command=command, what=TRAINING[command], recipes="\n  ".join(recipes()))
        print(text + MORE_HELP.get(command, ""))
        return 0 if arguments else 2
    need_extra()
    # A recipe may name a user's own classes, in a module where the command was given, as for ``python -m``.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    from evmamba.launch.fit.cli import train

    train([command, *arguments])
    return 0
