"""SGLang's control requests: pause, weight updates, checksums. Blocking, each with a time-out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import requests

from drpo_megatron.rollout.errors import ServerDied, ServerRequestError

MemoryTag = Literal["kv_cache", "weights"]


class ServerAdmin:
    """Sends control requests to the server at `url`, with `api_key` if there is one. Safe to use from several threads.

    Every method takes its limit in seconds. Raises ServerDied when there is no connection or it breaks,
    ServerRequestError with the server's message when the answer is not a success or does not come in time.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        self._headers = authorization(api_key)

    def pause_generation(self, mode: Literal["abort", "retract", "in_place"], timeout_s: float) -> None:
        """Stop generating. `retract`: running requests wait and go on, with recomputed KV, after the pause."""
        self._call("POST", "/pause_generation", {"mode": mode}, timeout_s)

    def continue_generation(self, timeout_s: float) -> None:
        self._call("POST", "/continue_generation", {}, timeout_s)

    def abort_all(self, timeout_s: float) -> None:
        """End every request; each is answered with the tokens it has, and finish reason `abort`."""
        self._call("POST", "/abort_request", {"abort_all": True}, timeout_s)

    def begin_weight_update(self, timeout_s: float) -> None:
        self._call("POST", "/begin_weight_update", {"selector": "all"}, timeout_s)

    def end_weight_update(self, timeout_s: float) -> None:
        self._call("POST", "/end_weight_update", {}, timeout_s)

    def init_weights_update_group(
        self,
        *,
        address: str,
        port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        timeout_s: float,
    ) -> None:
        """Let the tensor-parallel ranks of the server join a process group as ranks rank_offset, rank_offset + 1, …"""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._call("POST", "/init_weights_update_group", body, timeout_s)

    def destroy_weights_update_group(self, group_name: str, timeout_s: float) -> None:
        self._call("POST", "/destroy_weights_update_group", {"group_name": group_name}, timeout_s)

    def update_weights_from_distributed(
        self,
        *,
        names: list[str],
        dtypes: list[str],
        shapes: list[list[int]],
        group_name: str,
        flush_cache: bool,
        timeout_s: float,
    ) -> None:
        """Receive one flattened bucket by broadcast from rank 0 of the group and load it.

        `flush_cache` also drops the prefix cache, which the former weights computed; it fails while requests run.
        """
        body = {
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": flush_cache,
        }
        self._call("POST", "/update_weights_from_distributed", body, timeout_s)

    def update_weights_from_tensor(
        self, *, payloads: list[str], flush_cache: bool, timeout_s: float, load_format: str | None = None
    ) -> None:
        """Load tensors that lie in memory which the server can map: one serialized list of (name, tensor) a rank.

        With a `load_format`, one of the `custom_weight_loaders` gets them. An exception in it ends the server.
        """
        body = {"serialized_named_tensors": payloads, "flush_cache": flush_cache, "load_format": load_format}
        self._call("POST", "/update_weights_from_tensor", body, timeout_s)

    def update_weights_from_disk(self, *, model_path: str, timeout_s: float) -> None:
        """Load a Hugging Face directory, whatever the server started with. It must not stand in a weight update; it
        drops the prefix cache.

        The server's first rank answers: others may read the directory until `wait_for_ranks` has returned.
        """
        body = {"model_path": model_path, "load_format": "safetensors", "flush_cache": True}
        self._call("POST", "/update_weights_from_disk", body, timeout_s)

    def release_memory(self, tags: Sequence[MemoryTag], timeout_s: float) -> None:
        """Give back the device memory of `tags` and forget what it holds; released KV takes the prefix cache along.

        Nothing may run: a paused server may have requests that wait, any other must be idle, or its scheduler ends.
        """
        self._call("POST", "/release_memory_occupation", {"tags": list(tags)}, timeout_s)

    def resume_memory(self, tags: Sequence[MemoryTag], timeout_s: float) -> None:
        """Take back what `release_memory` gave: with other tags the scheduler ends. Weights are undefined until a
        push.
        """
        self._call("POST", "/resume_memory_occupation", {"tags": list(tags)}, timeout_s)

    def set_weight_version(self, version: int, timeout_s: float) -> None:
        """Stamp tokens sampled from now on with `version`."""
        body = {"new_version": str(version), "abort_all_requests": False}
        self._call("POST", "/update_weight_version", body, timeout_s)

    def weight_checksums(self, timeout_s: float) -> list[dict[str, str]]:
        """Parameter name → checksum, for each tensor-parallel rank in order, in the server's fused, sharded layout."""
        ranks = self._call("POST", "/weights_checker", {"action": "checksum"}, timeout_s).get("ranks")
        if not ranks:
            raise ServerRequestError("/weights_checker returned no checksums")
        return [r["checksums"] for r in sorted(ranks, key=lambda r: r["parallelism_info"][0]["tp_rank"])]

    def wait_for_ranks(self, timeout_s: float) -> None:
        """Return when every tensor-parallel rank of the server is done with the requests before this one.

        Most requests are answered by the first rank, when it is done itself. Checksums are gathered from all of them;
        here of no tensor, because every name contains the empty string.
        """
        self._call("POST", "/weights_checker", {"action": "checksum", "skip_tensor_list": [""]}, timeout_s)

    def score(self, token_ids: list[int], *, routed_experts: bool, timeout_s: float) -> dict[str, Any]:
        """`meta_info` of one prompt: the log-probs of its tokens, and its routed experts. No pause may be in effect."""
        body = {
            "input_ids": token_ids,
            # A request for no new token at all takes another way through the scheduler.
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
            "return_routed_experts": routed_experts,
        }
        meta_info: dict[str, Any] = self._call("POST", "/generate", body, timeout_s)["meta_info"]
        return meta_info

    def model_info(self, timeout_s: float) -> dict[str, Any]:
        """`weight_version`, `model_path` and more."""
        return self._call("GET", "/model_info", None, timeout_s)

    def custom_weight_loaders(self, timeout_s: float) -> list[str]:
        """Import paths of the functions that the server was started with for `load_format`."""
        return self._call("GET", "/server_info", None, timeout_s).get("custom_weight_loader") or []

    def load(self, timeout_s: float) -> tuple[int, int]:
        """Requests that it runs, and that wait in it."""
        loads = self._call("GET", "/v1/loads?include=core", None, timeout_s)["loads"]
        return sum(of["num_running_reqs"] for of in loads), sum(of["num_waiting_reqs"] for of in loads)

    def check_scheduler(self, timeout_s: float) -> None:
        """Return when the server's scheduler answers, paused or not; raise as above when it does not."""
        self._call("GET", "/server_info", None, timeout_s)

    def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        try:
            response = requests.request(
                method, self.url + path, json=body, headers=self._headers, timeout=max(timeout_s, 0.001)
            )
        except requests.Timeout as error:
            raise ServerRequestError(f"{path} did not answer within {timeout_s:.0f} s") from error
        except requests.ConnectionError as error:
            raise ServerDied(f"no connection to the rollout server for {path}: {error}") from error
        try:
            answer = response.json()
        except requests.JSONDecodeError:
            answer = response.text
        if response.status_code != 200:
            raise ServerRequestError(f"{path} failed with status {response.status_code}: {_message(answer)}")
        if isinstance(answer, dict):
            if answer.get("success") is False:
                raise ServerRequestError(f"{path} failed: {_message(answer)}")
            return answer
        return {"message": answer}


def authorization(api_key: str | None) -> dict[str, str]:
    """HTTP headers of a request to SGLang or its router."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _message(answer: Any) -> str:
    if isinstance(answer, dict):
        return str(answer.get("message") or answer.get("error") or answer.get("detail") or answer)
    return str(answer)
