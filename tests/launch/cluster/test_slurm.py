"""Job scripts and SLURM's answers."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.launch.cluster import slurm
from evmamba.launch.cluster.settings import JobConfig, read_cluster

from ..handmade import made_spec
from .fake_slurm import install

SPEC = made_spec("classification", device="cuda")


def header(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def script_of(folder: Path = Path("/out/runs/x"), **options: list[str]) -> str:
    return slurm.run_script(SPEC, folder, read_cluster(None, options)["classification"])


@pytest.mark.parametrize("name", ["single_node", "multi_node", "array", "report"])
def test_a_template_is_a_script_that_bash_understands(name: str):
    subprocess.run(["bash", "-n", str(slurm.TEMPLATES / f"{name}.sbatch")], check=True)


@pytest.mark.parametrize("name", ["single_node", "multi_node", "array"])
def test_the_signal_goes_to_the_processes_and_a_requeued_job_appends_to_its_log(name: str):
    text = (slurm.TEMPLATES / f"{name}.sbatch").read_text()
    assert {"--requeue", "--open-mode=append", "--signal=SIGUSR1@90"} <= set(header(text))  # not B:, the shell's
    assert "\nsrun --export=ALL --kill-on-bad-exit=1 " in text


def test_a_rendered_script_differs_from_the_persons_in_header_and_settings_only():
    text = script_of(nodes=["2"], gpus_per_node=["8"])
    template = (slurm.TEMPLATES / "multi_node.sbatch").read_text()
    assert text.partition("# End of settings")[2] == template.partition("# End of settings")[2]
    comments = [line for line in template.partition("# Settings")[0].splitlines() if not line.startswith("#SBATCH")]
    assert [line for line in text.partition("# Settings")[0].splitlines() if not line.startswith("#SBATCH")] == comments


def test_what_is_asked_for_stands_in_the_header_and_nothing_else_does():
    text = script_of(
        account=["proj"],
        partition=["gpu"],
        qos=["high"],
        time=["2-00:00:00"],
        nodes=["4"],
        gpus_per_node=["8"],
        cpus_per_task=["12"],
        mem=["0"],
        sbatch=["--constraint=a100"],
        exclusive=["true"],
    )
    assert set(header(text)) == {
        f"--job-name={SPEC.name}", "--account=proj", "--partition=gpu", "--qos=high", "--time=2-00:00:00", "--nodes=4",
        "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=0", "--output=/out/runs/x/run.log",
        "--constraint=a100", "--exclusive", "--requeue", "--open-mode=append", "--signal=SIGUSR1@90",
    }  # fmt: skip
    bare = header(script_of(gpus_per_node=["0"]))
    assert not any(re.match("--(account|partition|qos|time|gpus|gres|mem|cpus)", line) for line in bare)
    assert "--ntasks-per-node=1" in bare


def test_gpus_in_the_clusters_own_words_replace_the_common_option():
    cluster = read_cluster(None, {"gres": ["gpu:a100:8"], "gpus_per_node": ["8"]})
    lines = header(slurm.run_script(SPEC, Path("/x"), cluster["classification"]))
    assert "--gres=gpu:a100:8" in lines
    assert not any(line.startswith("--gpus-per-node") for line in lines)
    assert "--gres=gpu:a100:1" in header(slurm.run_script(SPEC, Path("/x"), cluster["cost"]))
    assert "--gres" not in slurm.report_script(Path("/x"), cluster["report"])


# How every run's srun begins, and what it starts: signals are ignored until the run can obey them.
OPTIONS = "<--export=ALL><--kill-on-bad-exit=1>"
BEGIN = '<sh><-c><trap "" TERM USR1; exec "$@"><sh>'


def run_shell(script: str, tmp_path: Path, **variables: str) -> str:
    """Run a script with an srun that says what it was called with."""
    fake = tmp_path / "bin" / "srun"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(
        '#!/bin/sh\nprintf "<%s>" "$@"; echo; echo nccl=$NCCL_SOCKET_IFNAME omp=$OMP_NUM_THREADS '
        "cpus=$SRUN_CPUS_PER_TASK mine=$MINE\n"
    )
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", **variables}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    return done.stdout


def test_the_script_starts_the_run_in_its_environment_and_container(tmp_path: Path):
    folder = tmp_path / "with space"
    text = script_of(
        folder,
        nodes=["2"],
        container=["apptainer exec --nv img.sif"],
        environment=["export MINE=1", "export OMP_NUM_THREADS=3"],
        interface=["ib0"],
    )
    assert run_shell(text, tmp_path, SLURM_CPUS_PER_TASK="12") == (
        f"{OPTIONS}{BEGIN}<apptainer><exec><--nv><img.sif><python><-m><evmamba.launch.bench.run><{folder}/spec.json>\n"
        "nccl=ib0 omp=3 cpus=12 mine=1\n"
    )
    plain = run_shell(script_of(folder, python=["/venv/bin/python"]), tmp_path)
    assert plain.startswith(f"{OPTIONS}{BEGIN}</venv/bin/python><-m>")
    assert plain.endswith("nccl= omp= cpus= mine=\n")


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_signal_ahead_of_the_run_does_not_kill_it(tmp_path: Path, name: str):
    begin = re.search(r"^begin=\((.*)\)$", script_of(tmp_path), re.MULTILINE)
    assert begin is not None
    command = f"{begin[1]} sh -c 'kill -{name} $$; echo alive'"
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout == "alive\n"


def test_the_report_records_what_slurm_ended_before_it_writes_the_table(tmp_path: Path):
    python = tmp_path / "my venv" / "python"
    python.parent.mkdir()
    python.symlink_to("/bin/echo")
    text = slurm.report_script(tmp_path / "my out", JobConfig(python=str(python)))
    first, second = [line for line in run_shell(text, tmp_path).splitlines() if line.startswith("<")]
    start = f"<--export=ALL><{python}><-m><evmamba.launch.cli>"
    assert first == f"{start}<status><{tmp_path}/my out><--record-failures>"
    assert second == f"{start}<report><{tmp_path}/my out/runs><--output><{tmp_path}/my out>"


def test_the_reports_script_submits_what_was_held_back_without_srun(tmp_path: Path):
    text = slurm.report_script(tmp_path / "my out", JobConfig(python="/bin/echo"))
    assert (
        run_shell(f"set -- rest\n{text}", tmp_path)
        == f"-m evmamba.launch.cli submit --rest --output {tmp_path}/my out\n"
    )


@pytest.mark.parametrize("container", ["container", "apptainer", "pyxis"])
def test_what_was_held_back_is_submitted_from_outside_of_the_container(container: str):
    job = read_cluster(None, {container: ["img.sif"]})["report"]
    text = slurm.report_script(Path("/out"), job)
    assert f"\npython=python\nsubmitter={shlex.quote(sys.executable)}\n" in text


def started(tmp_path: Path, kind: str = "classification", **options: list[str]) -> str:
    """How srun is called for a kind of run, up to the interpreter."""
    text = slurm.run_script(SPEC, Path("/out/runs/x"), read_cluster(None, options)[kind])
    return run_shell(text, tmp_path).partition("<-m>")[0]


def test_options_of_srun_and_ways_into_a_container_stand_before_the_command(tmp_path: Path):
    options = {"srun": ["--cpu-bind=cores", "--label"], "python": ["python"]}
    assert started(tmp_path, **options) == f"{OPTIONS}<--cpu-bind=cores><--label>{BEGIN}<python>"
    image = {"apptainer": ["/img/e.sif"], "mounts": ["/data", "/scratch/me:/me"]}
    mounts = "/data:/data,/scratch/me:/me,/out/runs:/out/runs"  # runs start from others beside them
    assert (
        started(tmp_path, **image) == f"{OPTIONS}{BEGIN}<apptainer><exec><--nv><--bind><{mounts}></img/e.sif><python>"
    )
    assert "<--nv>" not in started(tmp_path, **image, gpus_per_node=["0"])
    image["pyxis"] = image.pop("apptainer")
    assert (
        started(tmp_path, **image)
        == f"{OPTIONS}<--container-image=/img/e.sif><--container-mounts={mounts}>{BEGIN}<python>"
    )


def test_a_gpu_for_every_process_and_its_neighbourhood(tmp_path: Path):
    bound = started(tmp_path, gpus_per_node=["8"], gpus_per_task=["1"], numa=["true"], python=["python"])
    assert bound.removeprefix(OPTIONS) == (
        f"<--gpu-bind=none><--cpu-bind=cores><--mem-bind=local><--distribution=block:block>{BEGIN}<python>"
    )
    lines = header(script_of(gpus_per_node=["8"], gpus_per_task=["1"]))
    assert {"--gpus-per-task=1", "--ntasks-per-node=8"} <= set(lines)
    assert not any(line.startswith("--gpus-per-node") for line in lines)


def test_modules_of_the_submitter_are_imported_by_the_job_whatever_it_inherits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EVMAMBA_IMPORT", "my_task,my backbone")
    assert "\nexport EVMAMBA_IMPORT='my_task,my backbone'\n" in script_of()
    monkeypatch.delenv("EVMAMBA_IMPORT")
    assert "EVMAMBA_IMPORT" not in script_of()


def test_a_measurement_has_its_node_alone_and_a_report_none_of_the_gpus_options():
    options = {"mem": ["0"], "time": ["2-00:00:00"], "gpus_per_node": ["8"], "sbatch": ["--constraint=a100"]}
    cluster = read_cluster(None, options)
    cost = header(slurm.run_script(SPEC, Path("/x/runs/y"), cluster["cost"]))
    assert {"--exclusive", "--gpus-per-node=1", "--time=4:00:00", "--constraint=a100"} <= set(cost)
    assert "--mem=0" not in cost
    report = header(slurm.report_script(Path("/x"), cluster["report"]))
    assert "--time=30:00" in report
    assert not any(re.match("--(constraint|exclusive|gpus|mem)", line) for line in report)
    short = read_cluster(None, {"time": ["10:00"], "mem": ["cost=20G"], "exclusive": ["cost=false"]})
    assert (short["cost"].time, short["report"].time) == ("10:00", "10:00")
    assert (short["cost"].mem, short["cost"].exclusive) == ("20G", False)


@pytest.mark.parametrize("task", range(3))
def test_the_arrays_runs_have_folders_of_their_tasks_even_where_recipes_are_called_alike(tmp_path: Path, task: int):
    text = (slurm.TEMPLATES / "array.sbatch").read_text()
    text = re.sub(r"/(imagenet|coco|ade20k)\w+\n", "/tiny\n", text)
    said = run_shell(f"cd {tmp_path}\n{text}", tmp_path, SLURM_ARRAY_TASK_ID=str(task))
    name = ("classification", "detection", "segmentation")[task]
    assert f"<--config><{name}/tiny><--trainer.default_root_dir><{tmp_path}/runs/{name}>" in said


@pytest.mark.parametrize(("state", "calls"), [("RUNNING", 1), ("COMPLETING", 0)], ids=["stopped", "cancelled"])
def test_the_shell_queues_the_job_again_for_a_run_that_has_no_scontrol(tmp_path: Path, state: str, calls: int):
    programs = tmp_path / "bin"
    programs.mkdir()
    scontrol = f'#!/bin/sh\n[ "$1" = show ] && echo JobState={state} || echo "$@" >> {tmp_path}/calls\n'
    for name, text in (("srun", '#!/bin/sh\ntouch "$EVMAMBA_REQUEUE_FILE"\nexit 143\n'), ("scontrol", scontrol)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    variables = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "9"}
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    for more in ({}, array):
        done = subprocess.run(["bash", "-c", script_of(tmp_path)], env=variables | more, check=False)
        assert done.returncode == 75  # saved
        assert not list(tmp_path.glob(".requeue*"))
    said = (tmp_path / "calls").read_text().splitlines() if calls else []
    assert said == ["requeue 9", "requeue 7_2"][: 2 * calls]


def test_dependencies_and_numbers_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = install(tmp_path / "slurm", monkeypatch)
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\n")
    assert slurm.submit(slurm.sbatch(script)) == 100
    assert slurm.submit(slurm.sbatch(script, [100, "7_3"])) == 101
    assert slurm.submit(slurm.sbatch(script, [100], "afterany", arguments=["rest"])) == 102
    assert slurm.submit(slurm.sbatch(script, [100, 101], one_of=True)) == 103
    assert fake.calls("sbatch") == [
        f"--parsable {script}",
        f"--parsable --dependency=afterok:100:7_3 --kill-on-invalid-dep=yes {script}",
        f"--parsable --dependency=afterany:100 {script} rest",
        f"--parsable --dependency=afterok:100?afterok:101 --kill-on-invalid-dep=yes {script}",
    ]
    fake.refuse_from(104)
    with pytest.raises(UserError, match=r"sbatch --parsable .*: sbatch: error: invalid partition specified: gpu"):
        slurm.submit(slurm.sbatch(script))


def test_a_job_that_is_submitted_from_a_job_inherits_none_of_its_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = install(tmp_path / "slurm", monkeypatch)
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\n")
    sbatch = fake.folder / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\nenv > {tmp_path}/seen\n"))
    for name, value in (("SLURM_MEM_PER_NODE", "0"), ("SLURM_CONF", "/etc/slurm.conf"), ("SBATCH_ACCOUNT", "mine")):
        monkeypatch.setenv(name, value)
    slurm.submit(slurm.sbatch(script))
    seen = (tmp_path / "seen").read_text().splitlines()
    assert not any(line.startswith("SLURM_MEM") for line in seen)
    assert {"SLURM_CONF=/etc/slurm.conf", "SBATCH_ACCOUNT=mine"} <= set(seen)


def test_the_controller_is_asked_first_and_accounting_for_what_it_forgot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = install(tmp_path / "slurm", monkeypatch)
    fake.set(
        5, JobState="RUNNING", Reason="None", NodeList="n[1-2]", RunTime="00:01:02", Restarts="2", TimeLimit="1:00"
    )
    fake.account(
        "7_1|TIMEOUT|None|n1|01:00:01|0:0|01:00:00", "8|CANCELLED by 1000|None|None assigned|00:00:00|0:0|10:00"
    )
    found = slurm.jobs([5, "7_1", 8, 9])
    assert set(found) == {5, "7_1", 8}
    assert (found[5].live, found[5].nodes, found[5].elapsed, found[5].restarts) == (True, "n[1-2]", "00:01:02", 2)
    assert (found["7_1"].live, found["7_1"].state, found["7_1"].limit) == (False, "TIMEOUT", "01:00:00")
    assert (found[8].state, found[8].nodes, found[8].reason) == ("CANCELLED", "", "")
    assert fake.calls("scontrol") == ["show job --oneliner 5"]


def test_a_job_in_the_queue_of_which_the_controller_says_nothing_is_not_taken_for_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = install(tmp_path / "slurm", monkeypatch)
    fake.set(5, JobState="RUNNING")
    fake.set(6)  # a query that fails
    assert slurm.jobs([5, 6]) is None
    assert set(slurm.jobs([5])) == {5}


def test_without_slurm_and_without_accounting_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = install(tmp_path / "slurm", monkeypatch)
    assert slurm.jobs([5]) == {}  # sacct fails: no accounting
    assert fake.calls("sacct")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.jobs([5]) is None
    assert not slurm.available()
