"""What a job runs on each of its nodes: `python -m launch.node check|reach|serve|train`, once a node, by srun.

Nodes speak through files in the attempt's directory, which appear complete or not at all (`publish`):

    bad/NODE            this node is not well, and why; the job is queued again without it
    servers/NODE.json   addresses of a rollout node's servers, once they generate
    meet-*.json         where the first node of a group waits for the others
    done, again, cause  what became of the run: it is complete, it goes on later, it failed (the first cause counts)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo_megatron.config import RunConfig, load_config
from drpo_megatron.observability.watchdog import EXIT_STALLED
from drpo_megatron.platform.ports import free_port, in_use
from launch import local
from launch.cluster import ClusterConfig, load_cluster

KEY_VARIABLE = "DRPO_SERVER_KEY"
"""Environment variable with the API key of a job's servers, which comes from a file that only the user can read."""
KEY_FILE = "api_key"
_POLL_S = 0.3


@dataclass(frozen=True)
class Node:
    """This node of a component of the job, number `index` of those of `addresses`. `run`, `attempt`: directories."""

    name: str
    index: int
    addresses: dict[str, str]
    run: Path
    attempt: Path

    @classmethod
    def here(cls) -> Node:
        """From the environment that srun and the job's script give."""
        addresses = dict(pair.split("=", 1) for pair in os.environ["DRPO_ADDRESSES"].split())
        return cls(
            name=os.environ["SLURMD_NODENAME"],
            index=int(os.environ["SLURM_NODEID"]),
            addresses={name: addresses[name] for name in os.environ["DRPO_NODES"].split()},
            run=Path(os.environ["DRPO_RUN"]),
            attempt=Path(os.environ["DRPO_ATTEMPT"]),
        )

    @property
    def names(self) -> list[str]:
        return list(self.addresses)

    @property
    def address(self) -> str:
        return self.addresses[self.name]

    def publish(self, name: str, content: Any) -> None:
        """A file of the attempt, as JSON."""
        self._write(name, json.dumps(content))

    def is_bad(self, name: str, why: str) -> None:
        self._write(f"bad/{name}", why)

    def outcome(self, name: str, text: str) -> None:
        """done, again or cause. The first cause stays: what follows from it may come later and say less."""
        if name != "cause" or not (self.attempt / name).exists():
            self._write(name, text)

    def _write(self, name: str, text: str) -> None:
        path = self.attempt / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{self.name}")
        partial.write_text(text + "\n")
        partial.rename(path)

    def wait_for(self, name: str, seconds: float, what: str) -> Any:
        """The content of a file that another node publishes. Raises TimeoutError."""
        path = self.attempt / name
        deadline = time.monotonic() + seconds
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} waited {seconds:g} s in vain for {what}")
            os.listdir(path.parent if path.parent.exists() else self.attempt)  # a network file system looks again
            time.sleep(_POLL_S)
        return json.loads(path.read_text())

    def meeting_point(self, what: str, seconds: float) -> tuple[str, int]:
        """Address and port of the first node, which chooses them."""
        if self.index == 0:
            self.publish(f"meet-{what}.json", [self.address, free_port(self.address)])
        address, port = self.wait_for(f"meet-{what}.json", seconds, f"the first node, {self.names[0]}")
        return address, port


def settings_of(run: Path) -> tuple[RunConfig, ClusterConfig]:
    """As they were submitted."""
    return load_config(run / "slurm" / "config.yaml"), load_cluster(run / "slurm" / "cluster.yaml")


def with_servers(config: RunConfig, addresses: Sequence[str], trainer_address: str) -> RunConfig:
    """The run with the servers of a rollout group. With no addresses, what is known before they have any."""
    server = config.rollout.server.model_copy(
        update={"addresses": list(addresses), "count": 1, "api_key_env": KEY_VARIABLE, "port": None, "devices": None}
    )
    rollout = config.rollout.model_copy(update={"server": server})
    sync = config.sync.model_copy(update={"address": trainer_address})
    return config.model_copy(update={"rollout": rollout, "sync": sync})


def serve(node: Node, config: RunConfig, cluster: ClusterConfig) -> None:
    """Start this node's servers, say where they are once all generate, and start one that ends again at its address.

    Ends with SIGTERM. Raises ServerStartError when one does not come up, RuntimeError when its restarts are used up.
    """
    from drpo_megatron.rollout.experts import RoutedExpertsFormat
    from drpo_megatron.rollout.server import SGLangServer
    from drpo_megatron.rollout.server_args import with_delta_loader

    key = os.environ[KEY_VARIABLE]
    server = config.rollout.server
    count = cluster.servers(server.tensor_parallel)
    settings = server.model_copy(
        update={"host": node.address, "port": _free_ports(node.address, count), "count": count, "devices": None}
    )
    servers = [
        SGLangServer(
            with_delta_loader(settings) if config.sync.transport == "delta" else settings,
            config.model.path,
            config.model.dtype,
            config.seed + node.index * count,
            node.attempt / f"server-{node.name}-{index}.log",
            index=index,
            routed_experts=RoutedExpertsFormat.load(config.model.path) is not None,
            api_key=key,
            deterministic=config.training.deterministic,
        )
        for index in range(count)
    ]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        for each in servers:
            each.start()
        urls = [each.wait_ready() for each in servers]
        node.publish(f"servers/{node.name}.json", urls)
        print(f"{node.name} serves at {' '.join(urls)}", flush=True)
        restarts = dict.fromkeys(urls, 0)
        while True:
            for each in servers:
                if ended := each.ended():
                    url = each.url
                    if restarts[url] == server.max_restarts:
                        raise RuntimeError(f"the server {url} {ended}, and its restarts are used up; {each.log_tail()}")
                    restarts[url] += 1
                    print(f"{node.name}: the server {url} {ended}: it is started again", flush=True)
                    each.stop()
                    each.start()
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        pass
    finally:
        for each in servers:
            each.stop()


def _free_ports(host: str, count: int) -> int:
    """The first of `count` consecutive free ports."""
    while True:
        first = free_port(host)
        if first + count <= 65536 and not any(in_use(host, first + i) for i in range(1, count)):
            return first


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def train(node: Node, config: RunConfig, cluster: ClusterConfig) -> int:
    """Run this node's ranks and record what became of the run. Returns 0 unless something failed here."""
    told: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: told.append(number))
    limit_s = config.rollout.server.start_timeout_s + 120
    if node.index == 0:
        if cluster.rollout:
            config = with_servers(config, _addresses(node, cluster, limit_s), node.address)
        local.prepare_run_directory(config, keep=True)
    address, port = node.meeting_point("train", 2 * limit_s)
    if told:
        node.outcome("again", "told to stop before the first step")
        return 0
    place = local.Place(len(node.names), node.index, address, port)
    code = local.run(config, config.layout, place)
    if stopped := local.read_stop(config):
        node.outcome("again", stopped)
        return 0
    if code == 0 or (
        code == local.EXIT_INTERRUPTED and node.index
    ):  # the first node knows whether there is a checkpoint
        if node.index == 0:
            node.outcome("done", "done")
        return 0
    failure = local.read_failure(config)
    if failure and failure.code == EXIT_STALLED:
        node.outcome("again", failure.message.splitlines()[0])
    elif failure:
        node.outcome("cause", f"{node.name}: rank {failure.rank}: {failure.message}")
    else:
        node.outcome("cause", f"{node.name}: torchrun ended with code {code}")
    return 1


def _addresses(node: Node, cluster: ClusterConfig, limit_s: float) -> list[str]:
    """Of all servers of the rollout group, in the order of its nodes. Raises TimeoutError."""
    assert cluster.rollout is not None
    directory = node.attempt / "servers"
    directory.mkdir(exist_ok=True)
    deadline = time.monotonic() + limit_s
    while len(ready := sorted(directory.glob("[!.]*.json"))) < cluster.rollout.nodes:
        if time.monotonic() > deadline:
            names = ", ".join(path.stem for path in ready) or "none"
            raise TimeoutError(
                f"the servers of {cluster.rollout.nodes} nodes were not ready after {limit_s:g} s, of {names} they "
                f"were; their logs are in {node.attempt}"
            )
        time.sleep(_POLL_S)
    return [url for path in ready for url in json.loads(path.read_text())]


def main(what: str) -> int:
    node = Node.here()
    config, cluster = settings_of(node.run)
    if cluster.rollout:
        os.environ[KEY_VARIABLE] = (node.run / "slurm" / KEY_FILE).read_text().strip()
    try:
        if what == "serve":
            serve(node, config, cluster)
            return 0
        if what == "train":
            return train(node, config, cluster)
        from launch import preflight

        return preflight.check(node, cluster) if what == "check" else preflight.reach(node, cluster)
    except Exception as error:
        node.outcome("cause", f"{node.name}: {type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
