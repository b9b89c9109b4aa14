"""Weights as what changed since the last push, against a copy of it that trainer and servers keep in host memory.

Each bucket is a file in a private directory, removed once the servers have it; a request names the file. One carrier
serves all servers: where they share the trainer's host a file that is read at once is memory (the page cache, or all
of it with `sync.directory` under /dev/shm), and elsewhere only a directory is common to both. Host memory that both map
would save one copy of the few bytes that changed, and would need the directory besides for the servers' answers.

The first push to a server goes whole and makes its base, as does the first after an error, after a restart of a server,
or after a push by another trainer in this way. Which base a server has is asked before each push, and the server checks
it for each bucket. Damage in a delta shows in its checksums, damage in a whole bucket in those of `verify`.

A block of a delta goes whole when coding its changes would take longer than carrying its bytes. Both are measured: the
one when the transport connects, the other in the last whole push.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerRequestError
from drpo_megatron.rollout.server_args import DELTA_LOADER
from drpo_megatron.sync.buckets import Bucket
from drpo_megatron.sync.delta_codec import coding_seconds, encode
from drpo_megatron.sync.delta_loader import Answer, Header, Layout, Mark
from drpo_megatron.sync.disk import remove
from drpo_megatron.sync.loader_call import payload
from drpo_megatron.sync.receivers import Answers, Receivers
from drpo_megatron.sync.transport import Deadline, weight_update

log = logging.getLogger(__name__)

_HOST = torch.device("cpu")


class DeltaTransport:
    """Implements `Transport`. `directory`: a path that trainer and servers have."""

    def __init__(self, receivers: Receivers, directory: Path) -> None:
        self._receivers = receivers
        self._directory = directory
        self._private: Path | None = None
        self._files = itertools.count()
        self._base: list[tuple[Layout, torch.Tensor]] = []
        self._mark: Mark | None = None
        self._coding_s = 0.0  # a byte
        self._carry_s = 0.0  # a byte

    def connect(self) -> None:
        """Raises ServerRequestError when a server was started without our loader, or the directory cannot be made."""
        for loaders in self._receivers.each(lambda server: server.custom_weight_loaders(30.0)):
            if DELTA_LOADER not in loaders:
                raise ServerRequestError(
                    f"sync.transport delta needs servers that were started with --custom-weight-loader {DELTA_LOADER}"
                )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._private = Path(tempfile.mkdtemp(prefix="delta-", dir=self._directory))  # for this user alone
        except OSError as error:
            raise ServerRequestError(f"no weights can be written to {self._directory}: {error}") from error
        self._coding_s = coding_seconds()

    def send(self, buckets: Iterator[Bucket], deadline: Deadline) -> int:
        """Returns the bytes of the bucket files."""
        if self._private is None:
            raise RuntimeError("connect() before send()")
        # Until the last bucket is in, neither side has a base that the other could name.
        base, self._mark = self._mark, None
        push = _Push(secrets.token_hex(16))
        with weight_update(self._receivers, deadline, abandon=self.forget):
            after = base if self._all_have(base, deadline) else None
            if after is None:
                self._base.clear()
            loading: _Loading | None = None
            for index, bucket in enumerate(buckets):
                mark = Mark(push.name, index + 1)
                path = self._write(index, bucket, mark, after, push)
                if loading is not None:
                    push.read_s += loading.finish()
                loading = self._start(path, deadline.left())
                after = mark
            if loading is not None:
                push.read_s += loading.finish()
                self._mark = mark
        del self._base[index + 1 :]
        if push.whole_buckets == index + 1:
            self._carry_s = (push.write_s + push.read_s) / push.nbytes
        elif push.whole_blocks:
            log.info("%d of %d blocks of the delta went whole: coding takes longer", push.whole_blocks, push.blocks)
        return push.nbytes

    def close(self, *, servers_alive: bool) -> None:
        self.forget()
        if self._private is not None:
            remove(self._private)
            self._private = None

    def forget(self) -> None:
        """Drop the base: the next push goes whole."""
        self._base, self._mark = [], None

    def _all_have(self, base: Mark | None, deadline: Deadline) -> bool:
        """Whether every rank of every server has `base`. Drops the servers' prefix caches."""
        # the cache of the former weights: nothing runs until the push is complete
        asked = self._request(None, deadline.left(), flush_cache=True)
        others = {answer.mark for _, answer in asked.answers()} - {base}
        if base is None:
            log.info("the weights go whole: there is no earlier push to these servers to start from")
        elif others:
            log.info("the weights go whole: a server restarted or was pushed to by another trainer since the last push")
        return base is not None and not others

    def _write(self, index: int, bucket: Bucket, mark: Mark, after: Mark | None, push: _Push) -> Path:
        """A file with the bucket as a delta, or whole; the trainer's base then has it."""
        assert self._private is not None
        layout = Layout(tuple(bucket.names), tuple(map(tuple, bucket.shapes)), bucket.dtypes[0])
        flat = bucket.flatten(_HOST)
        path = self._private / f"bucket-{next(self._files)}"
        parts: list[bytes | memoryview]
        if index < len(self._base) and self._base[index][0] == layout:
            worth = self._carry_s / self._coding_s if self._coding_s else float("inf")
            encoded = encode(self._base[index][1].numpy(), flat.numpy(), layout.item_bytes, worth)
            parts = [Header(mark, after).to_bytes(), *encoded.parts]
            push.blocks += encoded.blocks
            push.whole_blocks += encoded.whole
        else:
            parts = [Header(mark, after, layout).to_bytes(), memoryview(flat.numpy())]
            push.whole_buckets += 1
        start = time.perf_counter()
        try:
            with path.open("wb") as file:
                file.writelines(parts)
        except OSError as error:
            raise ServerRequestError(
                f"the weights could not be written to {self._directory}: {error}; "
                "make room, or set sync.directory to another path that the servers have"
            ) from error
        push.write_s += time.perf_counter() - start
        push.nbytes += sum(len(part) for part in parts)
        self._base[index : index + 1] = [(layout, flat)]
        return path

    def _start(self, path: Path, timeout_s: float) -> _Loading:
        return self._request(path, timeout_s, flush_cache=False)

    def _request(self, bucket: Path | None, timeout_s: float, *, flush_cache: bool) -> _Loading:
        assert self._private is not None
        number = next(self._files)
        paths = {
            server.url: [self._private / f"answer-{number}-{i}-{rank}" for rank in range(self._receivers.ranks)]
            for i, server in enumerate(self._receivers.admins)
        }

        def ask(server: ServerAdmin) -> None:
            server.update_weights_from_tensor(
                payloads=[_payload(bucket, answer) for answer in paths[server.url]],
                flush_cache=flush_cache,
                timeout_s=timeout_s,
                load_format=DELTA_LOADER,
            )

        return _Loading(bucket, paths, self._receivers.start(ask))


@dataclass
class _Push:
    """What one push did. `whole_blocks`: of the `blocks` in delta buckets."""

    name: str
    nbytes: int = 0
    whole_buckets: int = 0
    blocks: int = 0
    whole_blocks: int = 0
    write_s: float = 0.0
    read_s: float = 0.0


@dataclass
class _Loading:
    """A request to every server, and the files of its answers by URL and rank."""

    bucket: Path | None
    paths: dict[str, list[Path]]
    requests: Answers[None]

    def finish(self) -> float:
        """Wait until every rank has loaded; the longest time to read the file, in seconds."""
        answers = self.answers()
        if self.bucket is not None:
            self.bucket.unlink()
        for url, answer in answers:
            if answer.refused:
                raise ServerRequestError(f"{url} did not take a weight bucket: {answer.refused}")
        return max(answer.read_s for _, answer in answers)

    def answers(self) -> list[tuple[str, Answer]]:
        self.requests.result()
        answers = []
        for url, path in ((url, path) for url, paths in self.paths.items() for path in paths):
            try:
                answers.append((url, Answer.read(path)))
                path.unlink()
            except (OSError, ValueError) as error:
                raise ServerRequestError(
                    f"no answer of {url} at {path} ({error}): set sync.directory to a path that the servers share and "
                    "may write to"
                ) from error
        return answers


def _payload(bucket: Path | None, answer: Path) -> str:
    return payload({"bucket": None if bucket is None else str(bucket.resolve()), "answer": str(answer.resolve())})
