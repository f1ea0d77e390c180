"""The largest batch for which a device has memory: ``python -m evmamba.launch.fit.batch_size OPTIONS`` prints it.

Every power of two is a training of some steps, just as it would be, until memory does not suffice. It is a process of
its own, so that nothing of it is left in the training. (Lightning's BatchSizeFinder drives loops that this package
exchanges, and leaves a learning rate for another batch.)
"""

import contextlib
import gc
import sys
import tempfile
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.memory import is_oom_error

from evmamba.errors import UserError
from evmamba.launch.fit.cli import EvmambaCLI
from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings

# Images of detection differ in size: the largest of some steps counts.
STEPS = 6
LEAST, MOST = 2, 4096


def largest_batch(arguments: Sequence[str]) -> int:
    """Search for it.

    Args:
        arguments: options of `evmamba fit` of the training, its recipe among them.

    Returns:
        A power of two, not more than there are training images.

    Raises:
        UserError: not even two images fit, or what the options' own classes complain about.
    """
    found = None
    size = LEAST
    while size <= MOST:
        images = _images_if_it_fits(arguments, size)
        if images is None:
            break
        found, size = size, 2 * size
        if size > images:
            break
    if found is None:
        raise UserError(f"there is not even memory for {LEAST} images a step")
    return found


def _images_if_it_fits(arguments: Sequence[str], size: int) -> int | None:
    """Number of training images if some steps with so many of them fit into memory."""
    with tempfile.TemporaryDirectory() as folder:
        own = {
            "trainer.default_root_dir": folder,
            "trainer.logger": "false",
            "trainer.callbacks": "[]",
            "trainer.max_steps": STEPS,
            "trainer.limit_val_batches": 0,
            "trainer.accumulate_grad_batches": 1,
            "trainer.enable_checkpointing": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "data.init_args.batch_size": size,
        }
        try:
            return _train([*arguments, *(f"--{option}={value}" for option, value in own.items())])
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return None


def _train(arguments: Sequence[str]) -> int:
    """Train in a scope of its own, after which nothing is held; return the number of training images."""
    cli = EvmambaCLI(arguments, run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return len(cli.datamodule.train_set)


if __name__ == "__main__":
    quiet_warnings()
    quiet_logs()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            number = largest_batch(sys.argv[1:])
        print(number)
    except UserError as error:
        sys.exit(str(error))
