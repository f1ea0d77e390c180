"""The `evmamba` command. Each subcommand is a file of `launch/commands`, imported only when it is called."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from evmamba.errors import UserError, unknown_name
from evmamba.launch.commands import training
from evmamba.launch.commands.predict import shows_images
from evmamba.launch.fit.held_signals import deliver_signals, hold_signals
from evmamba.launch.fit.light_imports import import_lightly

# Name, what it does; the file is `commands/<name>.py`.
COMMANDS = {
    "bench": "train briefly, evaluate, measure; ends in one table",
    "profile": "latency, throughput and memory of networks, side by side",
    "traffic": "bytes, kernels and memory of networks on a GPU, counted without one",
    "cluster": "try what trainings rely on in a job of two minutes; settings that fit",
    "submit": "bench as SLURM jobs: a graph that ends in one table",
    "status": "what runs, waits, failed",
    "verify": "published weights, a checkpoint or a result file: measured beside published",
    "report": "the table again, from any result files",
    "consolidate": "make one file of a sharded checkpoint",
    "explain": "pictures of what a network does with an image",
    "export": "write a network as ONNX, torch.export program or safetensors",
    "push": "publish a network in the Hugging Face hub's format",
    "pull": "fetch a published network",
    "models": "list backbones",
    "data": "check a data set, pack it into shards, make the embedded ones",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 good, 1 a run failed, 2 the user can mend it, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "fit" in arguments[:1]:
        hold_signals()
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()  # here, where a closed pipe is known
        return status
    except UserError as error:
        print(f"evmamba: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evmamba: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (evmamba models | head): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as leaving:
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        return 0  # rich, which prints the tables, has met the closed pipe
    except (OSError, MemoryError, RuntimeError) as error:
        from evmamba.launch.fit.failures import machine_error

        if (known := machine_error(error)) is None:
            raise
        print(f"evmamba: {known}", file=sys.stderr)
        return 2
    finally:
        deliver_signals()


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        _parser().print_help()
        return 0
    if any(argument.startswith("-") for argument in arguments[1:]):
        arguments = _import_modules(arguments)
    import_lightly()
    command = arguments[0]
    if command == "--version":
        print(f"evmamba {metadata.version('evmamba')}")
        return 0
    if command in training.TRAINING and not (command == "predict" and shows_images(arguments[1:])):
        return training.main(command, arguments[1:])
    if command not in (*COMMANDS, "predict"):
        names = ["--help", "--version"] if command.startswith("-") else [*training.TRAINING, *COMMANDS]
        raise unknown_name("option" if command.startswith("-") else "command", command, names)
    return importlib.import_module(f"evmamba.launch.commands.{command}").main(arguments[1:])


def _import_modules(arguments: list[str]) -> list[str]:
    """Import what ``--import`` names, let files name what other options name; return the arguments without it."""
    from evmamba.tasks.registry import import_modules
    from evmamba.tasks.trust import named_by_user, trust

    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        option, equals, value = argument.partition("=")
        if option == "--import":
            import_modules((value if equals else next(waiting, "")).split(","))
        else:
            rest.append(argument)
    trust(named_by_user(rest[1:]))
    return rest


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:13}{what}" for name, what in (COMMANDS | training.TRAINING).items())
    return argparse.ArgumentParser(
        prog="evmamba",
        usage="evmamba COMMAND [options]",
        description="EfficientVMamba: train it, measure it, compare it on three tasks.",
        epilog=f"commands:\n{commands}\n\nevmamba COMMAND --help says more. --version prints the version; "
        "--import NAME,NAME imports modules of\nyour own; recipes and checkpoints may then name what is in them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )


if __name__ == "__main__":
    sys.exit(main())
