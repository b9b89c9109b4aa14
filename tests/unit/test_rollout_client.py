"""The generation client against a scripted HTTP server in the same event loop, and SGLang's arguments."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig
from drpo_megatron.records import Prompt
from drpo_megatron.rollout import client as client_module
from drpo_megatron.rollout.client import GenerationJob, RolloutClient, parse_answer, request_body, token_versions
from drpo_megatron.rollout.errors import GenerationError, ServerDied, ServerStartError
from drpo_megatron.rollout.server_args import check_arguments, command_line, installed_arguments

SAMPLING = SamplingConfig(temperature=0.7, max_new_tokens=3)
PROMPTS = [Prompt(f"p{i}", [10 + i, 20], "text") for i in range(6)]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.01)
    monkeypatch.setattr(client_module, "_DEATH_GRACE_S", 0.05)


def config(**changes: Any) -> RolloutConfig:
    return RolloutConfig(
        **{"prompts_per_step": 6, "samples_per_prompt": 2, "sampling": SAMPLING, "request_retries": 2} | changes
    )


def answer(ids: list[int], version: str = "3") -> dict[str, Any]:
    spans = [{"version": version, "start": 0, "end": len(ids)}]
    meta = {
        "output_token_logprobs": [[-0.5 * i, token, None] for i, token in enumerate(ids)],
        "finish_reason": {"type": "length", "length": len(ids)},
        "weight_version": version,
        "weight_versions": spans,
    }
    return {"output_ids": ids, "meta_info": meta}


async def echo(request: web.Request) -> web.Response:
    """Answers each sample with the first token of its prompt, three times."""
    body = await request.json()
    return web.json_response([answer([ids[0]] * 3) for ids in body["input_ids"]])


def serve(handler: Handler, job: GenerationJob, settings: RolloutConfig, alive: bool = True) -> None:
    """Run `job` against a server that answers /generate with `handler`."""

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/generate", handler)
        app.router.add_get("/health_generate", lambda request: healthy())
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            await RolloutClient(f"http://127.0.0.1:{port}", settings, lambda: alive).run(job)
        finally:
            await runner.cleanup()

    async def healthy() -> web.Response:
        return web.json_response({})

    asyncio.run(main())


def test_groups_come_in_order_with_all_samples() -> None:
    job = GenerationJob(PROMPTS, 2, SAMPLING)
    with pytest.raises(RuntimeError, match="6 of 6"):
        job.groups()
    serve(echo, job, config())
    groups = job.groups()
    assert [g.prompt.id for g in groups] == [p.id for p in PROMPTS]
    for group in groups:
        assert [r.response_ids for r in group.rollouts] == [[group.prompt.token_ids[0]] * 3] * 2
        assert all(r.logmu == [0.0, -0.5, -1.0] and r.weight_versions == [3, 3, 3] for r in group.rollouts)
        assert all(r.truncated for r in group.rollouts)


def test_concurrency_is_bounded() -> None:
    running = most = 0

    async def slow(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return await echo(request)

    serve(slow, GenerationJob(PROMPTS, 2, SAMPLING), config(concurrency=2))
    assert most == 2


def test_a_failure_of_a_living_server_is_retried() -> None:
    asked: list[int] = []

    async def second_time(request: web.Request) -> web.StreamResponse:
        first = (await request.json())["input_ids"][0][0]
        asked.append(first)
        return await echo(request) if asked.count(first) == 2 else web.Response(status=503, text="busy")

    job = GenerationJob(PROMPTS, 2, SAMPLING)
    serve(second_time, job, config())
    assert len(job.groups()) == 6 and len(asked) == 12 and job.retries == 6


def test_retries_are_bounded_and_the_other_groups_are_kept() -> None:
    asked: list[int] = []

    async def never_the_last(request: web.Request) -> web.StreamResponse:
        first = (await request.json())["input_ids"][0][0]
        asked.append(first)
        return web.Response(status=500, text="out of luck") if first == 15 else await echo(request)

    job = GenerationJob(PROMPTS, 2, SAMPLING)
    with pytest.raises(GenerationError, match=r"3 times although the server lives.*out of luck"):
        serve(never_the_last, job, config())
    assert asked.count(15) == 3 and job.missing == [5]


def test_a_refusal_is_not_retried() -> None:
    asked = 0

    async def refuse(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        return web.Response(status=400, text="the prompt is too long")

    with pytest.raises(GenerationError, match="too long"):
        serve(refuse, GenerationJob(PROMPTS[:1], 2, SAMPLING), config())
    assert asked == 1


def test_a_slow_answer_times_out() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5)
        return await echo(request)

    with pytest.raises(GenerationError, match="no answer within"):
        serve(hang, GenerationJob(PROMPTS[:1], 2, SAMPLING), config(request_timeout_s=0.05))


def test_after_a_death_only_the_missing_groups_are_asked_for() -> None:
    job = GenerationJob(PROMPTS, 2, SAMPLING)

    async def die_at_the_fourth(request: web.Request) -> web.StreamResponse:
        if (await request.json())["input_ids"][0][0] >= 13:
            assert request.transport is not None
            request.transport.abort()
        return await echo(request)

    with pytest.raises(ServerDied):
        serve(die_at_the_fourth, job, config(concurrency=1), alive=False)
    assert job.missing == [3, 4, 5]
    kept = dict(job.completed)
    asked: list[int] = []

    async def record(request: web.Request) -> web.StreamResponse:
        asked.append((await request.json())["input_ids"][0][0])
        return await echo(request)

    serve(record, job, config())
    assert sorted(asked) == [13, 14, 15]
    assert all(job.completed[i] is group for i, group in kept.items()) and len(job.groups()) == 6


def test_a_broken_connection_to_a_living_server_is_retried() -> None:
    broken = 0

    async def break_once(request: web.Request) -> web.StreamResponse:
        nonlocal broken
        if not broken:
            broken += 1
            assert request.transport is not None
            request.transport.abort()
        return await echo(request)

    job = GenerationJob(PROMPTS[:1], 2, SAMPLING)
    serve(break_once, job, config())
    assert broken == 1 and job.retries == 1 and len(job.groups()) == 1


def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for alive in (False, True):  # a process that does not accept connections is as good as dead
            client = RolloutClient(url, config(), lambda alive=alive: alive)
            with pytest.raises(ServerDied):
                asyncio.run(client.run(GenerationJob(PROMPTS, 2, SAMPLING)))


def test_only_the_temperature_shapes_the_distribution() -> None:
    body = request_body(PROMPTS[0], 2, SAMPLING)
    assert body["input_ids"] == [[10, 20], [10, 20]] and body["return_logprob"] is True
    parameters = body["sampling_params"]
    assert parameters["temperature"] == 0.7 and parameters["max_new_tokens"] == 3
    assert (parameters["top_p"], parameters["top_k"], parameters["min_p"]) == (1.0, -1, 0.0)
    assert "stop" not in parameters
    stop = SamplingConfig(max_new_tokens=3, stop=["\n"])
    assert request_body(PROMPTS[0], 2, stop)["sampling_params"]["stop"] == ["\n"]


def test_a_version_a_token() -> None:
    spans = [{"version": "4", "start": 0, "end": 2}, {"version": "5", "start": 2, "end": 5}]
    assert token_versions({"weight_versions": spans}, 5) == [4, 4, 5, 5, 5]
    assert token_versions({"weight_version": "7"}, 2) == [7, 7]
    with pytest.raises(GenerationError, match="cover 5 of 6"):
        token_versions({"weight_versions": spans}, 6)
    with pytest.raises(GenerationError, match="gap or overlap"):
        token_versions({"weight_versions": spans[1:]}, 5)


def test_answers_that_do_not_fit_are_refused() -> None:
    other_token, nan, missing, unknown = (answer([7, 8]) for _ in range(4))
    other_token["meta_info"]["output_token_logprobs"][1][1] = 9
    nan["meta_info"]["output_token_logprobs"][0][0] = float("nan")
    missing["meta_info"]["output_token_logprobs"][0][0] = None
    unknown["meta_info"]["finish_reason"] = {"type": "tired"}
    for wrong, message in (
        (other_token, "other tokens"),
        (nan, "not finite"),
        (missing, "not finite"),
        (unknown, "tired"),
    ):
        with pytest.raises(GenerationError, match=message):
            parse_answer(PROMPTS[0], wrong)


def test_arguments_are_checked_against_the_installed_sglang() -> None:
    assert {"model_path", "tp_size", "max_total_tokens", "skip_server_warmup"} <= installed_arguments().keys()
    check_arguments({"max_total_tokens": 10, "enable_metrics": True}, {})
    with pytest.raises(ServerStartError, match="did you mean max_total_tokens"):
        check_arguments({"max_totl_tokens": 10}, {})
    with pytest.raises(ServerStartError, match=r"set rollout\.server\.port"):
        check_arguments({"port": 3}, {"port": "rollout.server.port"})


def test_command_line() -> None:
    arguments = {"max_total_tokens": 10, "enable_metrics": True, "skip_server_warmup": False, "revision": None}
    assert command_line(arguments) == ["--max-total-tokens", "10", "--enable-metrics"]
    assert command_line({"json_model_override_args": {"a": 1}}) == ["--json-model-override-args", '{"a": 1}']
    assert command_line({"lora_paths": ["a", "b"]}) == ["--lora-paths", "a", "b"]
