"""The generation client against a scripted HTTP server in the same event loop, and SGLang's arguments."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig
from drpo_megatron.records import Prompt, RolloutGroup
from drpo_megatron.rollout import client as client_module
from drpo_megatron.rollout.client import REPEATED, Completion, RolloutClient, parse_answer, request_body, token_versions
from drpo_megatron.rollout.errors import GenerationError, ServerDied, ServerStartError, Stopped
from drpo_megatron.rollout.sampler import GroupSampler
from drpo_megatron.rollout.server_args import check_arguments, command_line, installed_arguments

SAMPLING = SamplingConfig(temperature=0.7, max_new_tokens=3)
PROMPTS = [Prompt(f"p{i}", [10 + i, 20], "text") for i in range(6)]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.01)


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
    return web.json_response([answer([ids[0]] * 3) for ids in inputs_of(await request.json())])


def inputs_of(body: dict[str, Any]) -> list[list[int]]:
    """Of each sample that is asked for."""
    parameters, inputs = body["sampling_params"], body["input_ids"]
    return inputs if isinstance(parameters, list) else [ids for ids in inputs for _ in range(parameters.get("n", 1))]


@dataclass
class Fleet:
    """What the client sees of the servers."""

    url: str
    alive: bool = True
    api_key: str | None = None
    checks: int = 0

    def serving(self) -> int:
        return int(self.alive)

    def check_soon(self) -> None:
        self.checks += 1


Work = Callable[[RolloutClient, Fleet], Awaitable[Any]]


def serve(handler: Handler, work: Work, settings: RolloutConfig, alive: bool = True) -> Any:
    """What `work` returns with a client of a server that answers /generate with `handler`."""

    async def main() -> Any:
        app = web.Application()
        app.router.add_post("/generate", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fleet = Fleet(f"http://127.0.0.1:{runner.addresses[0][1]}", alive)
        try:
            async with RolloutClient(fleet, settings) as client:
                return await work(client, fleet)
        finally:
            await runner.cleanup()

    return asyncio.run(main())


async def one(client: RolloutClient, fleet: Fleet) -> tuple[list[Completion], int]:
    """A request for two samples of one prompt: what came, after how many retries."""
    return await client.complete([[10, 20]] * 2, SAMPLING), client.retries


async def group(client: RolloutClient, fleet: Fleet) -> RolloutGroup:
    return await GroupSampler(PROMPTS[0], 2, SAMPLING).run(client)


def test_a_group_has_all_samples() -> None:
    made = serve(echo, group, config())
    assert made.prompt is PROMPTS[0]
    assert [r.response_ids for r in made.rollouts] == [[10] * 3] * 2
    assert all(r.logmu == [0.0, -0.5, -1.0] and r.weight_versions == [3, 3, 3] for r in made.rollouts)
    assert all(r.truncated for r in made.rollouts)


def test_concurrency_is_bounded() -> None:
    running = most = 0

    async def slow(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return await echo(request)

    async def six(client: RolloutClient, fleet: Fleet) -> None:
        await asyncio.gather(*(one(client, fleet) for _ in range(6)))

    serve(slow, six, config(concurrency=2))
    assert most == 2


@pytest.mark.parametrize("failure", ["status", "connection"])
def test_a_failure_is_retried_while_a_server_lives(failure: str) -> None:
    asked = 0

    async def second_time(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked == 2:
            return await echo(request)
        if failure == "connection":
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=503, text="busy")

    completions, retries = serve(second_time, one, config())
    assert len(completions) == 2 and retries == 1


def test_retries_are_bounded() -> None:
    asked = 0

    async def never(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        return web.Response(status=500, text="out of luck")

    with pytest.raises(GenerationError, match=r"3 times although a server lives.*out of luck"):
        serve(never, one, config())
    assert asked == 3
    with pytest.raises(ServerDied, match="out of luck"):
        serve(never, one, config(), alive=False)
    assert asked == 4, "with no server left there is nobody to ask again"


def test_a_refusal_is_not_retried() -> None:
    asked = 0

    async def refuse(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        return web.Response(status=400, text="the prompt is too long")

    with pytest.raises(GenerationError, match="too long"):
        serve(refuse, one, config())
    assert asked == 1


def test_a_slow_answer_times_out() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5)
        return await echo(request)

    with pytest.raises(GenerationError, match="no answer within"):
        serve(hang, one, config(request_timeout_s=0.05))


def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"

        async def ask(alive: bool) -> None:
            async with RolloutClient(Fleet(url, alive), config()) as client:
                await client.complete([[1]], SAMPLING)

        with pytest.raises(ServerDied):
            asyncio.run(ask(False))
        with pytest.raises(GenerationError, match="3 times"):
            asyncio.run(ask(True))


def test_old_weights_are_never_accepted() -> None:
    """A server that came back with the weights of its start: its answer is asked for again, and it is looked at."""
    versions = ["3", "4", "6"]

    async def catch_up(request: web.Request) -> web.StreamResponse:
        version = versions.pop(0)
        return web.json_response([answer([7, 8], version)] * 2)

    async def at_five(client: RolloutClient, fleet: Fleet) -> tuple[list[Completion], int]:
        client.version = 5
        return (await one(client, fleet))[0], fleet.checks

    completions, checks = serve(catch_up, at_five, config())
    assert all(c.weight_versions == [6, 6] for c in completions)
    assert checks == 2 and not versions


def test_an_aborted_sample_goes_on_where_it_was() -> None:
    asked: list[Any] = []

    async def abort_the_second(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        asked.append(body)
        answers = [answer([7, 8, 9][: 3 - len(ids) + 2], str(len(asked))) for ids in inputs_of(body)]
        if len(asked) == 1:
            answers[1] = answer([5], "1")
            answers[1]["meta_info"]["finish_reason"] = {"type": "abort"}
        return web.json_response(answers)

    made = serve(abort_the_second, group, config())
    assert asked[1]["input_ids"] == [[10, 20, 5]]
    assert [p["max_new_tokens"] for p in asked[1]["sampling_params"]] == [2]
    first, second = made.rollouts
    assert first.response_ids == [7, 8, 9] and first.weight_versions == [1, 1, 1]
    assert second.response_ids == [5, 7, 8] and second.weight_versions == [1, 2, 2]
    assert second.logmu == [0.0, 0.0, -0.5] and second.finish_reason == "length"


def test_what_was_sampled_is_kept_over_a_stop_and_dropped_when_too_old() -> None:
    asked: list[Any] = []
    stopped = asyncio.Event()

    async def abort_first(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        asked.append(inputs_of(body))
        await stopped.wait()
        aborted = answer([5], "1")
        aborted["meta_info"]["finish_reason"] = {"type": "abort"}
        ended = answer([7, 8], "4")
        return web.json_response([aborted if len(asked) == 1 else ended for _ in inputs_of(body)])

    async def stop_and_go_on(client: RolloutClient, fleet: Fleet) -> RolloutGroup:
        sampler = GroupSampler(PROMPTS[0], 2, SAMPLING)
        running = asyncio.create_task(sampler.run(client))
        while not asked:
            await asyncio.sleep(0.001)
        client.stopped = True
        stopped.set()
        with pytest.raises(Stopped):
            await running
        assert sampler.tokens == 2
        sampler.drop_older_than(1)
        assert sampler.tokens == 2
        with pytest.raises(Stopped):
            await sampler.run(client)
        client.stopped = False
        kept = await sampler.run(client)
        sampler.drop_older_than(2)
        assert sampler.tokens == 0
        return kept

    made = serve(abort_first, stop_and_go_on, config())
    assert asked == [[[10, 20]] * 2, [[10, 20, 5]] * 2]
    assert [r.response_ids for r in made.rollouts] == [[5, 7, 8]] * 2


def test_only_the_temperature_shapes_the_distribution() -> None:
    prompt = list(range(10, 10 + REPEATED // 2 + 1))
    body = request_body([prompt] * 2, SAMPLING)
    assert body["input_ids"] == [prompt] and body["return_logprob"] is True
    parameters = body["sampling_params"]
    assert parameters["n"] == 2
    short = request_body([prompt[1:]] * 2, SAMPLING)
    assert short["input_ids"] == [prompt[1:]] * 2 and "n" not in short["sampling_params"]
    assert parameters["temperature"] == 0.7 and parameters["max_new_tokens"] == 3
    assert (parameters["top_p"], parameters["top_k"], parameters["min_p"]) == (1.0, -1, 0.0)
    assert "stop" not in parameters
    stop = SamplingConfig(max_new_tokens=3, stop=["\n"])
    seeded = request_body([[10, 20]] * 2, SAMPLING, [3, 4], [7, 8])
    assert seeded["input_ids"] == [[10, 20]] * 2
    assert [(one["max_new_tokens"], one["sampling_seed"]) for one in seeded["sampling_params"]] == [(3, 7), (4, 8)]
    other = request_body([[10, 20], [10, 21]], SAMPLING)
    assert other["input_ids"] == [[10, 20], [10, 21]] and "n" not in other["sampling_params"]
    assert request_body([[10, 20]], stop)["sampling_params"]["stop"] == ["\n"]


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
            parse_answer([10, 20], wrong)


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
