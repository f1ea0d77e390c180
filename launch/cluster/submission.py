"""`evmamba submit`: a graph of runs as SLURM jobs with dependencies, or here, one after the other.

What is finished or still on its way is never submitted twice. Every run's folder gets its spec and its job script,
which can be submitted by hand too.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
from rich.console import Console
from rich.markup import escape

from evmamba.errors import UserError, unknown_name
from evmamba.files import write_text
from evmamba.launch.bench.graph import batch_of, build_graph, is_trial, kind_of, placed, tree, with_exported
from evmamba.launch.bench.plan import BenchOptions, plan
from evmamba.launch.cluster import slurm
from evmamba.launch.cluster.jobs import JOBS_FILE, JobBook, read_specs
from evmamba.launch.cluster.queueing import Queue
from evmamba.launch.cluster.settings import Cluster, JobConfig, warned_in_time
from evmamba.launch.cluster.slurm import SCRIPT_FILE, JobId
from evmamba.launch.store.progress import PROGRESS_FILE, read_progress
from evmamba.launch.store.results import FILE_NAME, read_result
from evmamba.launch.store.spec import RUNS_FOLDER, SPEC_FILE, CostSpec, Resources, Spec, TrainingSpec, finished_before
from evmamba.tasks import TASKS
from evmamba.tasks.trust import check_backbone, check_trusted, named_in

REPORT_SCRIPT = "report.sbatch"
LOCK_FILE = ".submit.lock"


def plan_graph(options: BenchOptions, cluster: Cluster) -> list[Spec]:
    """Plan a benchmark for a cluster.

    Raises:
        UserError: see `plan` and `build_graph`.
    """
    _check_strategies(cluster)
    with_gpus = any(cluster[task].gpus_per_node or cluster[task].gres for task in TASKS)
    device = {"auto": "cuda" if with_gpus else "cpu"}.get(options.device, options.device)
    specs = plan(dataclasses.replace(options, device=device, chained=True, elsewhere=True))
    graph = build_graph(specs, cluster.resources)
    if options.exported:
        graph = with_exported(graph)
    _check_recipes(graph)
    return graph


def _check_recipes(specs: Sequence[Spec]) -> None:
    """Refuse now what `check_strategy` would refuse in the job, in the night."""
    from jsonargparse import Namespace

    from evmamba.launch.fit.settings import setting
    from evmamba.launch.fit.strategies import check_sharding

    for spec in specs:
        strategy = spec.resources.strategy
        if strategy is None or not isinstance(spec, TrainingSpec):
            continue
        names = ("precision", "gradient_clip_algorithm", "gradient_clip_val", "sync_batchnorm", "callbacks")
        trainer = Namespace(**{name: setting(spec.settings, f"trainer.{name}") for name in names})
        trainer.callbacks = [Namespace(**item) for item in trainer.callbacks or [] if isinstance(item, dict)]
        try:
            check_sharding(strategy, trainer, on_gpu=spec.device == "cuda")
        except UserError as error:
            raise UserError(f"{spec.task}: {error} (--strategy {spec.task}=NAME is for its runs alone)") from None


def _check_strategies(cluster: Cluster) -> None:
    from evmamba.launch.fit.strategies import strategy_names

    for job in cluster.jobs.values():
        if job.strategy is not None and job.strategy not in strategy_names():
            raise unknown_name("strategy", job.strategy, strategy_names())


def plan_here(options: BenchOptions, cluster: Cluster) -> list[Spec]:
    """Plan the same graph for this machine: on all its GPUs that a node may use, or in one process without any."""
    import torch

    specs = plan(dataclasses.replace(options, chained=True))
    gpus = torch.cuda.device_count() if any(spec.device == "cuda" for spec in specs) else 0

    def resources(kind: str) -> Resources:
        return Resources(devices=max(1, min(gpus, cluster[kind].tasks)))

    graph = build_graph(specs, resources)
    return with_exported(graph) if options.exported else graph


def graph_of(output: Path, cluster: Cluster) -> list[Spec]:
    """The graph that was submitted before, under the present resources.

    Raises:
        UserError: there is none, one names a class that the user has not, or other resources would make other runs.
    """
    if not (output / JOBS_FILE).is_file():
        raise UserError(f"nothing was submitted to {output} yet; leave out --resume (or check --output)")
    specs = read_specs(output)
    for name, spec in specs.items():
        where = str(output / RUNS_FOLDER / name / SPEC_FILE)
        check_backbone(spec.model, where)
        for named in [] if isinstance(spec, CostSpec) else named_in(spec.settings):
            check_trusted(named, where)
        if spec.name != name:
            raise UserError(
                f"the runs of {output} are of another version of evmamba, or their spec.json was edited: all would be "
                "repeated; use another --output"
            )
        specs[name] = spec = placed(spec, cluster.resources(kind_of(spec)))
        if spec.name != name:
            raise UserError(
                f"{spec.resources.processes} processes would change the global batch of {name} (its batch is given by "
                "--set); keep its nodes and GPUs, or use another --output"
            )
    _check_recipes(list(specs.values()))
    return list(specs.values())


def check_same(specs: Sequence[Spec], output: Path, order: Sequence[str], search: bool) -> None:
    """See that a graph which is planned anew is the one that was submitted to a folder before.

    A search goes on from its trials to what they chose; trials that failed are then left out.

    Raises:
        UserError: it is another one.
    """
    now, before = {spec.name for spec in specs}, set(order)
    new, lost = now - before, before - now
    if search:
        searched = {name for name, spec in read_specs(output).items() if is_trial(spec) or _is_chosen(spec)}
        new, lost = set(), lost - searched
    if new or lost:
        raise UserError(
            f"these options make other runs than those in {output}; to resume leave them out, "
            "for other runs use another --output"
        )


def _is_chosen(spec: Spec) -> bool:
    """Whether a run has the settings that a search chose for its network."""
    return not isinstance(spec, CostSpec) and bool(spec.trials)


@dataclass(frozen=True)
class Step:
    """What `submit` does about one run.

    Attributes:
        spec: the run.
        action: "submit", or why not: "finished", "queued as job 12", "running as job 12", "measured by RUN".
        needs: of those it needs, the runs that are not finished yet.
        measured_by: the run that is submitted and measures this one too: its job is this one's.
    """

    spec: Spec
    action: str
    needs: tuple[str, ...] = ()
    measured_by: str | None = None


def steps(
    specs: Sequence[Spec], output: Path, book: JobBook, only_new: bool = False
) -> tuple[list[Step], dict[str, list[JobId]]]:
    """What is to be done about every run, and the jobs that are on their way, by run (the report's too).

    Args:
        specs: the graph.
        output: its folder.
        book: of that folder.
        only_new: leave alone what was submitted before, however it ended, and what needs that.
    """
    told = book.ask()
    if told is None:
        raise UserError("squeue does not answer, so nobody knows what is on its way already; try again later")
    live = {
        name: ids
        for name in book.submitted
        if (ids := [number for number in book.jobs_of(name) if number in told and told[number].live])
    }
    actions = []
    finished = set()
    anew: set[str] = set()
    for spec in specs:
        first_live = live[spec.name][0] if spec.name in live else None
        waits = first_live is not None and told[first_live].state == "PENDING"
        if finished_before(spec, output / RUNS_FOLDER / spec.name):
            finished.add(spec.name)
            actions.append(Step(spec, "finished"))
        # A job that waits for one that has failed never starts; SLURM may take a while to cancel it.
        elif spec.name in live and not (waits and anew.intersection(spec.needs)):
            actions.append(Step(spec, f"{'queued' if waits else 'running'} as job {first_live}"))
        elif isinstance(spec, CostSpec) and (first := anew.intersection(spec.needs)):
            actions.append(Step(spec, f"measured by {min(first)}", measured_by=min(first)))
        elif only_new and (book.submitted.get(spec.name) or not {*finished, *live, *anew}.issuperset(spec.needs)):
            actions.append(Step(spec, "left alone"))
        else:
            anew.add(spec.name)
            actions.append(Step(spec, "submit", tuple(name for name in spec.needs if name not in finished)))
    return actions, live


def check_alone(output: Path) -> None:
    """See that no job is at work in a folder, before its runs are run here.

    Raises:
        UserError: one is, or waits to be.
    """
    book = JobBook.read(output)
    live = [job.id for job in (book.ask() or {}).values() if job.live]
    if live:
        raise UserError(
            f"jobs are on their way in {output} ({', '.join(sorted(map(str, live)))}); wait for them, scancel them, "
            "or use another --output"
        )


def check_slurm() -> None:
    """Say what to do where no jobs can be submitted.

    Raises:
        UserError: there is no sbatch.
    """
    if not slurm.available():
        raise UserError(
            "there is no sbatch here; on a login node of a SLURM cluster there is one. "
            "--dry-run shows scripts and graph without it, --local runs the graph here"
        )


def submit(
    specs: Sequence[Spec], output: Path, cluster: Cluster, resume: bool, console: Console, only_new: bool = False
) -> None:
    """Submit what is neither finished nor on its way, and the report after all of it; print the graph.

    Args:
        specs: the graph, see `build_graph`.
        output: absolute folder that all nodes see.
        cluster: settings of the jobs.
        resume: whether jobs may have been submitted to this folder before.
        console: where to print.
        only_new: see `steps`.

    Raises:
        UserError: there is no sbatch or it refuses; the folder is in use already. Jobs submitted until then stay noted
            in ``jobs.json``, and the files of all others are there.
    """
    try:
        with filelock.FileLock(output / LOCK_FILE, timeout=0):
            _submit(specs, output, cluster, resume, console, only_new)
    except filelock.Timeout:
        raise UserError(f"another 'evmamba submit' is at work in {output}") from None


def _submit(
    specs: Sequence[Spec], output: Path, cluster: Cluster, resume: bool, console: Console, only_new: bool
) -> None:
    book = JobBook.read(output)
    if book.submitted and not resume:
        raise UserError(
            f"jobs were submitted to {output} before; --resume submits what is missing, or use another --output"
        )
    actions, live = steps(specs, output, book, only_new)
    # All files first: whatever sbatch refuses then, the folder knows the whole graph, and --resume submits the rest.
    jobs = {}
    for step in actions:
        if step.action == "submit":
            jobs[step.spec.name] = _write_run(step.spec, output, cluster)
        elif step.measured_by:
            prepare(step.spec, output / RUNS_FOLDER / step.spec.name)
    write_text(output / REPORT_SCRIPT, slurm.report_script(output, cluster["report"]))
    book.order, book.cluster = [spec.name for spec in specs], dict(cluster.given)
    book.write()
    runs = [(step.spec, step.needs) for step in actions if step.action == "submit"]
    queue = Queue(output, book, jobs, cluster.max_jobs, live, runs)
    done = {}
    try:
        for step in actions:
            name = step.spec.name
            done[name] = step.action
            if step.action == "submit":
                done[name] = queue.put(step.spec)
            elif step.measured_by:
                queue.share(name, step.measured_by)
        report = queue.put_report(output / REPORT_SCRIPT)
    except UserError as error:
        raise UserError(f"{error}; {queue.count} jobs were submitted before that, --resume goes on") from error
    console.print(tree(specs, lambda spec: describe(spec, done[spec.name]), f"report  [dim]{report}[/]"))
    console.print(f"\nevmamba status {output}", style="dim", markup=False, highlight=False, soft_wrap=True)


def show(specs: Sequence[Spec], output: Path, cluster: Cluster, console: Console) -> None:
    """Print the scripts that `submit` would submit, and the graph; write nothing."""
    actions, _ = steps(specs, output, JobBook.read(output))
    for step in actions:
        if step.action == "submit":
            folder = output / RUNS_FOLDER / step.spec.name
            command = slurm.sbatch(folder / SCRIPT_FILE, [f"<job of {name}>" for name in step.needs])
            _show_script(command, slurm.run_script(step.spec, folder, cluster[kind_of(step.spec)]), console)
    command = slurm.sbatch(output / REPORT_SCRIPT, ["<all jobs>"], "afterany")
    _show_script(command, slurm.report_script(output, cluster["report"]), console)
    done = {step.spec.name: _intention(step, cluster) for step in actions}
    last = "report  [dim]after all others have ended[/]"
    if cluster.max_jobs is not None:
        last += f"  [dim]no more than {cluster.max_jobs} jobs at once, the others when one has ended[/]"
    console.print(tree(specs, lambda spec: describe(spec, done[spec.name]), last))


def _intention(step: Step, cluster: Cluster) -> str:
    """What `submit` would do about a run, where that is more than a job."""
    job = cluster[kind_of(step.spec)]
    if step.action == "submit" and job.chain > 1:
        return f"submit as {job.chain} jobs, each if none before it ends well"
    if step.action == "submit" and job.array and isinstance(step.spec, TrainingSpec):
        return f"submit, as one array with other seeds of it, {job.array} at once"
    return step.action


def _show_script(command: Sequence[str], script: str, console: Console) -> None:
    console.rule(style="dim")
    console.print(f"$ {' '.join(command)}\n", style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(script, markup=False, highlight=False, soft_wrap=True)


def describe(spec: Spec, action: str) -> str:
    """A run of the graph in one line: name, what is done about it, processes, and how its batch comes about."""
    own = spec.resources
    where = f"{own.nodes} node{'s' if own.nodes > 1 else ''} x {own.devices} process{'es' if own.devices > 1 else ''}"
    batch = batch_of(spec) if isinstance(spec, TrainingSpec) else None
    search = "trial; " if is_trial(spec) else "own best; " if _is_chosen(spec) else ""
    details = f"{search}{where}; {batch}" if batch else f"{search}{where}"
    return f"[bold]{escape(spec.name)}[/]  {escape(action)}  [dim]{escape(details)}[/]"


def _write_run(spec: Spec, output: Path, cluster: Cluster) -> JobConfig:
    """Write a run's files; return what its job asks for."""
    folder = output / RUNS_FOLDER / spec.name
    # Before what an earlier attempt measured is taken away.
    job = warned_in_time(cluster[kind_of(spec)], kind_of(spec), saving_seconds(folder))
    prepare(spec, folder)
    write_text(folder / SCRIPT_FILE, slurm.run_script(spec, folder, job))
    return job


def saving_seconds(folder: Path) -> float | None:
    """How long a checkpoint of the run in a folder took, as far as an earlier attempt told; None if it did not."""
    progress = read_progress(folder)
    if progress is not None and progress.checkpoint_seconds is not None:
        return progress.checkpoint_seconds
    try:
        return read_result(folder / FILE_NAME).training.get("checkpoint_seconds")
    except UserError:
        return None


def prepare(spec: Spec, folder: Path) -> None:
    """Write what a run starts from into its folder and take away what a failed attempt left, but no checkpoints.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (FILE_NAME, PROGRESS_FILE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot prepare {folder}: {error.strerror or error}") from error
    spec.write(folder)
