"""What launchers of several processes start: the ``evmamba`` command as a file and as a module.

``srun python -m evmamba.launch.train fit ...``, ``torchrun --nproc-per-node 2 -m evmamba.launch.train fit ...``,
``fabric run --devices=2 launch/train.py fit ...``. How the processes find each other is told in
`evmamba.launch.fit.launchers`.
"""

import sys

from evmamba.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
