"""One classifier at several image sizes: how far its accuracy carries beyond the size that it was trained at."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from evmamba.launch.measure import sweep
from evmamba.launch.run import RunSpec
from evmamba.launch.train import EvmambaCLI

MULTIPLE = 16


def accuracy_at_scales(spec: RunSpec, model: nn.Module, training_size: int) -> list[dict[str, Any]]:
    """Test a trained classifier at `spec.test_scales` times its training size, with its run's own options.

    Returns:
        Rising sizes (multiples of 16 pixels, at least 32), each with the metrics there.
    """
    sizes = {max(32, MULTIPLE * round(scale * training_size / MULTIPLE)) for scale in spec.test_scales}

    def at_size(side: int) -> dict[str, Any]:
        # In a folder of its own: a second logger would take the training's log for its own and empty it.
        with tempfile.TemporaryDirectory() as folder:
            options = [*spec.cli_arguments(Path(folder)), f"--data.init_args.image_size={side}"]
            cli = EvmambaCLI(options, run=False)
            cli.model.load_state_dict(model.state_dict())
            cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
            return dict(cli.model.exact_metrics)

    return sweep("input_size", sorted(sizes), at_size)
