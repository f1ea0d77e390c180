"""Training, evaluation and prediction through LightningCLI: `evmamba fit|validate|test|predict`.

Adds to LightningCLI: the number of classes goes from the data to the model, recipes are found by name inside the
installed package too, every run has one stable folder, ``test`` writes a result, ``predict`` its predictions, and wrong
options are one line.
"""

import contextlib
import functools
import itertools
import json
import operator
import os
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from evmamba.errors import UserError
from evmamba.launch.fit import failures, launchers
from evmamba.launch.fit.checkpoint_folders import restore_previous
from evmamba.launch.fit.checkpoint_metadata import CheckpointMetadata
from evmamba.launch.fit.held_signals import deliver_signals
from evmamba.launch.fit.launchers import process_rank
from evmamba.launch.fit.option_errors import short_error
from evmamba.launch.fit.quiet import quiet_warnings
from evmamba.launch.fit.recipe_imports import limit_imports
from evmamba.launch.fit.recipes import find_recipe, is_shipped
from evmamba.launch.fit.record import Background, ResultWriter, add_callbacks
from evmamba.launch.fit.resume import find_continuation, is_restarted, move_aside, write_config
from evmamba.launch.fit.settings import TRAINER_DEFAULTS, beyond_defaults
from evmamba.launch.fit.signals import requeue_on_signals
from evmamba.launch.fit.strategies import build_strategy, check_strategy, spell_out
from evmamba.launch.store.results import check_writable
from evmamba.launch.store.spec import Settings
from evmamba.tasks import TASKS
from evmamba.tasks.data import TaskDataModule
from evmamba.tasks.module import TaskModule
from evmamba.tasks.plain_files import is_file, read_yaml
from evmamba.tasks.training.agreed_start import AgreedStart, Continuation, TrainingFinished
from evmamba.tasks.training.checkpoint_safety import Torn, check_folder, holds, load_plain
from evmamba.tasks.training.heartbeat import TIMEOUT_SECONDS
from evmamba.tasks.training.lease import Lease, claim, held, release
from evmamba.tasks.training.metrics_log import MetricsLog
from evmamba.tasks.training.progress_watch import ProgressWatch, record_collectives
from evmamba.tasks.trust import check_backbone, named_by_user, trust

# Errors are raised, not printed; and max_epoch is a mistake, not max_epochs.
PARSER_OPTIONS: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
# Every checkpoint of Lightning has it; it is what Lightning itself looks for first.
CHECKPOINT_KEY = b"pytorch-lightning_version"
# What Lightning takes for a checkpoint besides a file; behind "registry" a colon and a name.
NAMED_CHECKPOINTS = ("best", "last", "hpc", "registry")


def whole_numbers_first(annotations: dict[str, Any]) -> None:
    """Let jsonargparse try int before float where an argument takes both: 1 is one batch, 1.0 is all of them.

    It tries a union's types in their order. `typing` caches unions without regard to the order, so what Lightning wrote
    as ``Union[int, float]`` may be somebody else's ``Union[float, int]``; the operator ``|`` caches nothing.
    """
    for name, annotation in annotations.items():
        types = typing.get_args(annotation)
        if int in types and float in types:
            others = [kind for kind in types if kind not in (int, float)]
            annotations[name] = functools.reduce(operator.or_, others, int | float)


whole_numbers_first(L.Trainer.__init__.__annotations__)


class EvmambaCLI(LightningCLI):
    """LightningCLI for the three tasks.

    Args:
        args: command-line arguments, e.g. ``["fit", "--config", "conf/detection/tiny.yaml"]``.
        run: whether the first argument is a subcommand that is run at once; otherwise only model, data and trainer are
            built.
        named: modules that recipes may name besides; None: those that the arguments name, which are a user's own words.

    Raises:
        UserError: unknown option or recipe (the nearest one is offered), a value of the wrong type, and whatever the
            data and the model complain about.
    """

    def __init__(self, args: Sequence[str], run: bool = True, named: Sequence[str] | None = None) -> None:
        TASKS.find()
        trust(named_by_user(args) if named is None else named)
        limit_imports()
        args, self.recipe = resolve_configs(spell_out(args))
        self.fresh = args[:1] == ["fit"] and "--fresh" in args
        if self.fresh:
            args.remove("--fresh")
        super().__init__(
            TaskModule,
            TaskDataModule,
            save_config_callback=None,  # Lightning's would replace a training's configuration by a test's
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs=PARSER_OPTIONS | {name: PARSER_OPTIONS.copy() for name in self.subcommands()},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--timeout",
            type=float,
            default=TIMEOUT_SECONDS,
            help="seconds without progress after which several processes are ended, from the first step on; 0: never",
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            short = short_error(error.message or str(error), set(_options(parser)))
            own = [path for path in configs_in(args) if not is_shipped(Path(path))]
            raise UserError(f"{short} (with {', '.join(own)})" if own else str(short)) from error
        subcommand = self.config.get("subcommand")
        options = self.config[subcommand] if subcommand else self.config
        if subcommand and options.get("weights_only") is None:
            options.weights_only = True
        checkpoint = options.get("ckpt_path") if subcommand else None
        if checkpoint is not None and str(checkpoint).partition(":")[0] not in NAMED_CHECKPOINTS:
            restore_previous(Path(checkpoint))
            if os.path.isdir(checkpoint):  # noqa: PTH112 (Path.is_dir raises for names that are too long)
                check_folder(Path(checkpoint))
            else:
                _check_checkpoint(Path(checkpoint), unpickle=not options.weights_only)

    def before_instantiate_classes(self) -> None:
        check_backbone(str(self._get(self.config, "model").get("init_args", {}).get("backbone")), "the recipe")
        trainer = self._get(self.config, "trainer")
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(Path("runs", self.recipe or "unnamed"))
        launchers.set_topology(trainer)
        check_strategy(trainer, self._get(self.config, "ckpt_path"), fitting=self.subcommand == "fit")
        if self.subcommand == "predict":
            # They are on the disk already; Lightning would keep those of all images in memory.
            self.config.predict.return_predictions = False

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise _behind(error) from None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        folder = Path(self._get(self.config, "trainer").default_root_dir)
        check_writable(folder, "--trainer.default_root_dir")
        options = self._get(self.config_init, "trainer")
        kwargs.setdefault("strategy", build_strategy(options["strategy"], options["precision"]))
        if options["logger"] in (None, True):
            # Only trainings are logged: evaluations have their result.
            kwargs["logger"] = MetricsLog(str(folder)) if self.subcommand == "fit" else False
        trainer = super().instantiate_trainer(**kwargs)
        add_callbacks(trainer, CheckpointMetadata(self.plain_config()))
        if self.subcommand in ("fit", None):
            record_collectives(folder)
            add_callbacks(trainer, ProgressWatch(folder, self._get(self.config, "timeout")))
        if self.subcommand == "test":
            background = Background(self.recipe or folder.name, self.plain_config())
            add_callbacks(trainer, ResultWriter(folder, background))
        elif self.subcommand == "predict":
            add_callbacks(trainer, TASKS[self.model.task].load("prediction_writer")(folder))
        return trainer

    def fit(self, **options: Any) -> None:
        """Train, or continue where a training in the run's folder stands; a finished one is left alone."""
        begun = self.begin(options.get("ckpt_path"), leave_finished=True)
        if begun is not None and begun.finished and launchers.find_launch() is None:
            return  # the other processes, if any, are not started yet
        with contextlib.suppress(TrainingFinished):
            self.trainer.fit(**options)
            if not self.trainer.interrupted:
                self.tell_checkpoints()

    def tell_checkpoints(self) -> None:
        """Say where the trained network is, and which commands take it."""
        folder = Path(self.trainer.default_root_dir, "checkpoints")
        if kept := [name for name in ("best.ckpt", "last.ckpt") if (folder / name).exists()]:
            rank_zero_info(
                f"trained: {' and '.join(kept)} in {folder}, for evmamba predict, explain, export, push, test"
            )

    def begin(self, checkpoint: Any = None, leave_finished: bool = False) -> Continuation | None:
        """Claim the run's folder and decide how the training begins: on rank 0, which tells the others when they meet.

        Args:
            checkpoint: of ``--ckpt_path``, which leaves nothing to decide.
            leave_finished: have the trainer's fit raise `TrainingFinished` where nothing is left to train.

        Returns:
            What was decided, on rank 0 and unless that is left to Lightning.

        Raises:
            UserError: somebody else writes there; see `find_continuation` and `check_strategy`. Where rank 0 did not
                start the others, which wait for it, the trainer's fit raises it on all of them.
        """
        lease: Lease | None = None
        decided: Continuation | UserError | None = None
        if process_rank() == 0:
            try:
                lease = claim(Path(self.trainer.default_root_dir))
                deliver_signals()  # who is to leave knows by now whether to come back
                decided = self.continuation() if checkpoint is None else None
            except UserError as error:
                if launchers.find_launch() is None:
                    raise
                decided = error
        deliver_signals()

        def told(begun: Continuation | None) -> None:
            self.begun = begun
            if begun is not None and begun.finished and leave_finished:
                raise TrainingFinished(0)

        self.begun = None if isinstance(decided, UserError) else decided
        self.trainer.callbacks.insert(0, AgreedStart(lease, decided, told))  # type: ignore[attr-defined]
        return self.begun

    def continuation(self) -> Continuation:
        """Decide how the training begins, and keep its configuration in its folder.

        Raises:
            UserError: see `find_continuation` and `check_strategy`.
        """
        root = Path(self.trainer.default_root_dir)
        config = self.config[self.subcommand] if self.subcommand else self.config
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        if self.fresh and not is_restarted():
            move_aside(root)
            found = Continuation()
        else:
            found = find_continuation(root, yaml.safe_load(text))
            check_strategy(self._get(self.config, "trainer"), found.checkpoint, fitting=True)
        if not found.finished:
            write_config(root, text)
        elif (lease := held(root)) is not None:
            lease.advance()  # what is left has no steps
        return found

    def plain_config(self) -> dict[str, Any]:
        """Return the whole configuration as plain lists and mappings."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        return Namespace(**vars(config)).as_dict()


class _Parsed(EvmambaCLI):
    """Stops when it has read its arguments: nothing is built."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def settings_of(recipe: Path, options: Sequence[tuple[str, Any]] = ()) -> Settings:
    """What a recipe and options, of which the last wins, tell a run beyond its defaults.

    Raises:
        UserError: see `EvmambaCLI`.
    """
    texts = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options]
    return beyond_defaults(_Parsed([f"--config={recipe}", *texts], run=False).plain_config())


def train(args: Sequence[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with LightningCLI's options.

    Raises:
        UserError: see `EvmambaCLI`.
    """
    quiet_warnings()
    if args[:1] == ["fit"]:
        requeue_on_signals()
    try:
        with failures.reported_once():
            EvmambaCLI(args)
    finally:
        try:
            deliver_signals()  # raises where one waits
        finally:
            release()


def configs_in(args: Sequence[str]) -> list[str]:
    """The recipes that arguments name, as `resolve_configs` leaves them."""
    return [value for option, value in itertools.pairwise(args) if option in ("--config", "-c")]


def resolve_configs(args: Sequence[str]) -> tuple[list[str], str | None]:
    """Replace the names behind ``--config`` by paths; return the arguments and the name of the last recipe."""
    resolved: list[str] = []
    recipe = None
    pending = False
    for arg in args:
        option, _, value = arg.partition("=")
        if pending or (option in ("--config", "-c") and value):
            path = find_recipe(arg if pending else value)
            _check_yaml(path)
            recipe = f"{path.resolve().parent.name}-{path.stem}"
            resolved += [str(path)] if pending else [option, str(path)]
            pending = False
        else:
            resolved.append(arg)
            pending = arg in ("--config", "-c")
    return resolved, recipe


def _check_yaml(path: Path) -> None:
    if not isinstance(read_yaml(path), dict):
        raise UserError(f"{path}: a recipe has 'model:', 'data:' and 'trainer:' at its top, this file has not")


def _check_checkpoint(path: Path, unpickle: bool) -> None:
    if not is_file(path):
        raise UserError(f"checkpoint not found: {path} (--ckpt_path)")
    weights = f"weights alone are given by --model.init_args.checkpoint={path}"
    try:
        training = holds(path, CHECKPOINT_KEY)
    except Torn as error:
        raise UserError(f"{path} is no checkpoint of Lightning, or it is truncated (--ckpt_path); {weights}") from error
    if not training:
        raise UserError(f"{path} holds weights only, no training to continue or test (--ckpt_path); {weights}")
    if not unpickle:
        load_plain(path)


def _options(parser: LightningArgumentParser) -> Iterator[str]:
    """Option strings of a parser and of its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                yield from _options(sub)


def _behind(error: BaseException) -> BaseException:
    """The exception that jsonargparse wrapped into an explanation."""
    while not isinstance(error, UserError) and error.__cause__ is not None:
        error = error.__cause__
    return error
