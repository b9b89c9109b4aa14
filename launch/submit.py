"""`drpo submit`: check a job on the login node, write its script into the run's directory, and hand it to SLURM."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import yaml

from drpo_megatron.config import ConfigError, RunConfig, dump_config, load_config, notes
from drpo_megatron.rollout.errors import ServerStartError
from drpo_megatron.rollout.fleet import fleet_of
from launch.checks import check_job
from launch.cluster import ClusterConfig, load_cluster
from launch.jobs import RECORD, active_jobs
from launch.local import move_aside
from launch.node import KEY_FILE
from launch.slurm import STATE, Job, SlurmError, render, slurm, submit

_MAX_RUNS = 1000


def run(parsed: argparse.Namespace) -> int:
    """Returns the exit code. Raises ConfigError for what is refused."""
    cluster = load_cluster(parsed.cluster)
    job = Job(_runs(parsed), cluster)
    if parsed.chain < 1:
        raise ConfigError([f"--chain: {parsed.chain} jobs are none; give 1 or more"])
    if parsed.chain > 1 and len(job.runs) > 1:
        raise ConfigError(["--chain: does not go with --sweep; raise requeue_limit in the cluster file instead"])
    if parsed.chain > 1 and job.runs[0].save.every is None:
        raise ConfigError(["save.every: is null, and the jobs of a chain go on from checkpoints; set it"])
    if len(job.runs) > 1 and cluster.rollout:
        raise ConfigError(["--sweep: SLURM has no arrays of heterogeneous jobs; remove rollout from the cluster file"])
    for each in job.runs:
        _make_model(each, parsed.dry_run)
    check_job(job)
    try:
        fleet_of(job.runs[0])
    except ServerStartError as error:
        raise ConfigError([f"rollout.server: {error}"]) from error
    script = render(job)
    if parsed.dry_run:
        print(script)
        return 0
    for note in notes(job.runs[0]):
        print(f"note: {note}")
    try:
        slurm("sbatch", "--version")
        for each in job.runs:
            if active := active_jobs(each.run_directory):
                said = f"job {', '.join(active)} of {each.run_directory} has not ended"
                raise ConfigError([f"name: {said}; wait for it, cancel it with `drpo cancel`, or choose another name"])
        return _submit(job, script, parsed)
    except SlurmError as error:
        raise ConfigError([str(error)]) from error


def _runs(parsed: argparse.Namespace) -> list[RunConfig]:
    """The runs of the job, as its nodes find them."""
    resume = ["save.resume=true"] if parsed.resume else []
    overrides = parsed.overrides + resume
    if parsed.sweep is None:
        return [_resumable(load_config(parsed.config, overrides))]
    name = load_config(parsed.config, overrides).name
    return [
        _resumable(load_config(parsed.config, [*overrides, override, f"name={name}-{index}"]))
        for index, override in enumerate(_sweep(parsed.sweep))
    ]


def _sweep(text: str) -> Iterator[str]:
    key, _, values = text.partition("=")
    given = values.split(",")
    if not re.fullmatch(r"[a-z0-9_.]+", key) or not all(given) or len(given) < 2:
        raise ConfigError([f"--sweep: {text!r} is not a setting with values; write for example seed=0,1,2"])
    if len(given) > _MAX_RUNS:
        raise ConfigError([f"--sweep: {len(given)} runs are more than {_MAX_RUNS}; give fewer values"])
    if key == "name" or key.startswith("tracking.directory"):
        raise ConfigError([f"--sweep: {key} is where a run lives, which its number decides; sweep another setting"])
    for value in given:
        yield f"{key}={value}"


def _resumable(config: RunConfig) -> RunConfig:
    """A job may start again at any time. The directory of a run that is new holds no checkpoint."""
    if config.save.every is None:
        return config
    return config.model_copy(update={"save": config.save.model_copy(update={"resume": True})})


def _make_model(config: RunConfig, dry_run: bool) -> None:
    if config.model.recipe is None or config.model.path.exists():
        return
    from drpo_megatron.models.recipes import ensure_model

    print(
        f"making {config.model.path} with the recipe {config.model.recipe}", file=sys.stderr if dry_run else sys.stdout
    )
    try:
        ensure_model(config.model.recipe, config.model.path)
    except (ValueError, OSError) as error:
        raise ConfigError([f"model.recipe: {error}"]) from error


def _submit(job: Job, script: str, parsed: argparse.Namespace) -> int:
    for config in job.runs:
        _prepare(config, job.cluster, parsed.resume)
    state = job.runs[0].run_directory / STATE
    path = state / "job.sbatch"
    path.write_text(script)
    scripts = [path] * parsed.chain
    if parsed.chain > 1:
        path.write_text(render(replace(job, chained=True)))
        scripts[-1] = state / "last.sbatch"
        scripts[-1].write_text(script)
    ids: list[str] = []
    try:
        for each in scripts:
            ids.append(submit(each, f"afterany:{ids[-1]}" if ids else None))
    except SlurmError:
        if ids:
            slurm("scancel", *ids)  # a part of a chain is nothing that was asked for
        raise
    for index, config in enumerate(job.runs):
        task = f"_{index}" if len(job.runs) > 1 else ""
        jobs = [f"{one}{task}" for one in ids]
        record = {"jobs": jobs, "submitted": time.time(), "command": shlex.join(sys.argv)}
        (config.run_directory / STATE / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        print(f"job {', '.join(jobs)}: {config.run_directory}")
    print(f"`drpo status {job.runs[0].run_directory}` says how it is")
    return 0


def _prepare(config: RunConfig, cluster: ClusterConfig, resume: bool) -> None:
    """The run's directory with what the job reads. An earlier run of that name is moved aside, or gone on with."""
    directory = config.run_directory
    state = directory / STATE
    if directory.exists() and not resume:
        print(f"an earlier run of this name is now {move_aside(directory)}")
    elif state.exists():
        move_aside(state)
    state.mkdir(parents=True)
    (state / "config.yaml").write_text(dump_config(config))
    (state / "cluster.yaml").write_text(yaml.safe_dump(cluster.model_dump(mode="json"), sort_keys=False))
    if cluster.rollout:
        with os.fdopen(os.open(state / KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            # Letters and digits alone: SGLang takes a key that begins with "-" for an argument.
            file.write(secrets.token_hex(32) + "\n")
