"""`evmamba verify`."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from evmamba.errors import UserError
from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import need_extra
from evmamba.tasks import TASKS

DESCRIPTION = """Evaluate published weights, a checkpoint or somebody's result file, and print a certificate: measured
beside published, the difference and its 95 % interval over the images. Exit status 0: they agree, 1: they do not."""


def main(arguments: Sequence[str]) -> int:
    parser = Parser("evmamba verify", DESCRIPTION)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks whose published weights are evaluated")
    for task in TASKS:
        parser.add_argument(f"--{task}", type=Path, metavar="DIR", help=f"data folder for {task}")
    parser.add_argument(
        "--weights", metavar="SOURCE", help="file, URL or hf-hub:USER/NAME in place of the published ones"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint of evmamba fit or bench instead")
    parser.add_argument("--result", type=Path, metavar="FILE", help="a result.json instead, with the files beside it")
    parser.add_argument(
        "--published",
        action="append",
        default=[],
        metavar="METRIC=NUMBER",
        help="as printed, e.g. top1=76.5; may be repeated (default: the paper's, on the paper's data)",
    )
    parser.add_argument(
        "--tolerance", type=float, metavar="POINTS", help="agree within so much (default: the 95 %% interval decides)"
    )
    parser.add_argument("--output", type=Path, default=Path("verified"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="32-true", help="Lightning's name (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="loading processes (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of evmamba test; may be repeated"
    )
    given = parser.parse_args(arguments)
    folders = {task: folder for task in TASKS if (folder := getattr(given, task)) is not None}
    what = [bool(given.names), given.checkpoint is not None, given.result is not None]
    if sum(what) != 1:
        raise UserError("say what to verify: NAME ..., --checkpoint FILE or --result FILE")
    if len(folders) > 1 or (given.result is None and not folders):
        raise UserError(f"give the folder of one task's data: {', '.join(f'--{task} DIR' for task in TASKS)}")
    if len(given.names) > 1 and (given.weights or given.published):
        raise UserError("--weights and --published are of one network; name one")
    need_extra()

    from rich.console import Console

    from evmamba.launch.bench import verification
    from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings
    from evmamba.launch.report.certificate import print_certificate

    quiet_warnings()
    quiet_logs()
    settings = verification.Settings(
        given.output,
        given.device,
        given.precision,
        given.batch_size,
        given.jobs,
        given.set,
        given.published,
        given.tolerance,
        shlex.join(["evmamba", "verify", *arguments]),
    )
    certificates = []
    if given.result is not None:
        certificates.append(verification.verify_result(given.result, settings, next(iter(folders.values()), None)))
    elif given.checkpoint is not None:
        (folder,) = folders.values()
        certificates.append(verification.verify_checkpoint(given.checkpoint, folder, settings))
    else:
        ((task, folder),) = folders.items()
        certificates += [
            verification.verify_weights(name, task, folder, settings, given.weights) for name in given.names
        ]
    console = Console()
    for certificate in certificates:
        print_certificate(certificate.facts, certificate.comparisons, console)
        for fault in certificate.faults:
            console.print(f"fault: {fault}", markup=False, highlight=False, soft_wrap=True)
        console.print("agrees" if certificate.agrees else "DOES NOT AGREE", style="bold", highlight=False)
    return 0 if all(certificate.agrees for certificate in certificates) else 1
