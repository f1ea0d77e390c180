"""Handing the jobs of a graph to SLURM: one by one, as chains, as arrays of seeds, and not more than a site takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evmamba.errors import UserError
from evmamba.files import write_text
from evmamba.launch.cluster import slurm
from evmamba.launch.cluster.jobs import REPORT, JobBook
from evmamba.launch.cluster.settings import MAX_JOBS, JobConfig
from evmamba.launch.cluster.slurm import SCRIPT_FILE, JobId
from evmamba.launch.store.spec import RUNS_FOLDER, Spec, TrainingSpec
from evmamba.tasks.training import slurm_job

# Scripts of arrays, and for each a folder with a link for every index, to its run's folder.
ARRAYS_FOLDER = "arrays"
HELD_BACK = f"held back by {MAX_JOBS}"
# SLURM's MaxArraySize is 1001 unless a site says otherwise.
MAX_INDEX = 1000


class Queue:
    """Submits runs whose files are written, and notes every job at once.

    Args:
        output: the benchmark's folder.
        book: of that folder.
        jobs: by run, what each of `runs` asks for.
        max_jobs: see `Cluster`.
        live: jobs that are on their way, by run; those of new ones are added.
        runs: all that will be put, and of those that each needs the ones that are not finished.

    Attributes:
        count: jobs submitted.
    """

    def __init__(
        self,
        output: Path,
        book: JobBook,
        jobs: Mapping[str, JobConfig],
        max_jobs: int | None,
        live: dict[str, list[JobId]],
        runs: Sequence[tuple[Spec, Sequence[str]]],
    ) -> None:
        self.count = 0
        self._output = output
        self._book = book
        self._jobs = jobs
        self._max_jobs = max_jobs
        self._report = live.pop(REPORT, None)
        self._live = live
        self._specs = [spec for spec, _ in runs]
        self._needs = {spec.name: needs for spec, needs in runs}
        self._done: dict[str, str] = {}
        self._held = False
        self._needs_report = False

    def put(self, spec: Spec) -> str:
        """Submit a run after those that it needs and that are not finished; return what was done.

        Raises:
            UserError: sbatch refuses.
        """
        if spec.name in self._done:  # as a task of an array
            return self._done[spec.name]
        job = self._jobs[spec.name]
        members = self._seeds_of(spec)
        if self._held or not self._has_room(max(len(members), job.chain)):
            self._held = True
            return HELD_BACK
        self._needs_report = True
        slurm.cancel([number for member in members or [spec] for number in self._live.pop(member.name, [])])
        if members:
            self._put_array(members)
            return self._done[spec.name]
        script = self._output / RUNS_FOLDER / spec.name / SCRIPT_FILE
        first = self._submit(slurm.sbatch(script, *self._after(self._needs[spec.name])))
        self._book.add(spec.name, first)
        self._live[spec.name] = [first]
        for _ in range(job.chain - 1):
            # After all before it: the one before may itself have been cancelled, as it was not needed any more.
            follow_up = self._submit(slurm.sbatch(script, self._live[spec.name], "afternotok"))
            self._book.add_follow_up(first, follow_up)
            self._live[spec.name].append(follow_up)
        more = f", {job.chain - 1} more follow while it does not end well" if job.chain > 1 else ""
        return f"submitted as job {first}{more}"

    def share(self, name: str, measured_by: str) -> None:
        """Note a run that another's job measures too."""
        for number in self._live.get(measured_by, [])[:1]:
            self._live[name] = [number]
            self._book.add(name, number)

    def put_report(self, script: Path) -> str:
        """Submit the report after all live jobs, unless there is one that waits for them; say what was done.

        Where jobs were held back, what is submitted submits those when any of the others has ended.

        Raises:
            UserError: sbatch refuses.
        """
        waiting = [number for number in self._report or [] if str(number) != slurm_job.job_id()]
        again = self._report != waiting and self._report is not None  # this is the report's job itself
        if waiting and not self._needs_report:
            return f"queued as job {waiting[0]}"
        if not self._live and not again and (script.parent / "report.md").is_file():
            return "finished"
        slurm.cancel(waiting)  # it does not know of the new jobs
        after = sorted({number for ids in self._live.values() for number in ids}, key=str)
        arguments = ["rest"] if self._held else []
        number = self._submit(slurm.sbatch(script, after, "afterany", one_of=self._held, arguments=arguments))
        self._book.add(REPORT, number)
        if self._held:
            return f"job {number} submits what was held back, when any of the others has ended"
        return f"submitted as job {number}, after all others have ended"

    def _submit(self, command: Sequence[str]) -> int:
        number = slurm.submit(command)
        self.count += 1
        return number

    def _after(self, needs: Sequence[str]) -> tuple[list[JobId], str, bool]:
        """Arguments of `slurm.sbatch` for what a run waits for: of a chain one job that ends well is enough."""
        groups = [self._live[name] for name in needs]
        chained = any(len(group) > 1 for group in groups)
        if chained and len(groups) > 1:
            raise UserError(f"SLURM cannot wait for several chains of jobs ({', '.join(needs)}); leave out chain")
        return [number for group in groups for number in group], "afterok", chained

    def _has_room(self, jobs: int) -> bool:
        most = self._max_jobs
        if most is None:
            return True
        if jobs + 2 > most:
            raise UserError(f"{MAX_JOBS} {most} is too small for {jobs} jobs of one run or array and 2 for the report")
        used = len({number for ids in self._live.values() for number in ids})
        own = 1 if self._report is not None and slurm_job.job_id() else 0
        return used + own + 1 + jobs <= most

    def _seeds_of(self, spec: Spec) -> list[Spec]:
        """The runs that differ from this one by their seed only and can be one array with it; [] for none."""
        job = self._jobs[spec.name]
        if job.array is None or job.chain > 1 or not isinstance(spec, TrainingSpec):
            return []
        members = [other for other in self._specs if (other.family, other.kind) == (spec.family, spec.kind)]
        if len(members) < 2 or not all(0 <= other.seed <= MAX_INDEX for other in members):
            return []
        waits = any(self._needs[member.name] for member in members)
        return members if not waits or self._array_before(members) is not None else []

    def _array_before(self, members: Sequence[Spec]) -> str | None:
        """The array whose tasks the members need, each the one of its own index; None if there is none."""
        arrays = set()
        for member in members:
            needed = [self._live.get(name, []) for name in self._needs[member.name]]
            if len(needed) != 1 or len(needed[0]) != 1:
                return None
            array, _, index = str(needed[0][0]).partition("_")
            if index != str(member.seed):
                return None
            arrays.add(array)
        return arrays.pop() if len(arrays) == 1 else None

    def _put_array(self, members: Sequence[Spec]) -> None:
        first = members[0]
        job = max((self._jobs[member.name] for member in members), key=lambda job: job.warning or 0)
        name = f"{first.name.rpartition('-')[0]}-{first.family[:6]}"
        folder = self._output / ARRAYS_FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        for member in members:
            link = folder / str(member.seed)
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..", "..", RUNS_FOLDER, member.name))
        script = folder.with_name(f"{name}.sbatch")
        indices = [member.seed for member in members]
        write_text(script, slurm.array_script(name, folder, indices, job, self._output / RUNS_FOLDER))
        before = self._array_before(members)
        number = self._submit(slurm.sbatch(script, [before] if before else [], "aftercorr"))
        for member in members:
            task = f"{number}_{member.seed}"
            self._book.add(member.name, task)
            self._live[member.name] = [task]
            self._done[member.name] = f"submitted as task {member.seed} of job {number}"
