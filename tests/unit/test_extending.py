"""The code of docs/extending.md, taken out of the page and run against the interfaces that a run uses."""

from __future__ import annotations

import base64
import hashlib
import http.server
import importlib
import importlib.util
import io
import json
import pickle
import re
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from drpo_megatron import cli
from drpo_megatron.algorithms import LossInputs, evaluate, loss_parameters, make_loss
from drpo_megatron.config.schema import DataConfig, RewardConfig, SyncConfig
from drpo_megatron.data import load_prompts
from drpo_megatron.models import families
from drpo_megatron.records import Prompt
from drpo_megatron.rewards.verifiers import checked_reward, make_verifier
from drpo_megatron.sync.verify import ServerLayout, SyncMismatch
from drpo_megatron.vocab_parallel import fused_policy_loss
from tests.unit.test_turns import Letters, run, scripted

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
MODULES = ("my_losses", "my_rewards", "my_data", "my_rollouts")
TWO_SIDED = {"delta_up": 0.3, "delta_down": 0.1}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def file_of(name: str) -> str:
    (code,) = [block for block in blocks("python") if block.startswith(f"# {name}\n")]
    return code


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With the page's modules in files of their names, as a user has them."""
    for module in MODULES:
        (tmp_path / f"{module}.py").write_text(file_of(f"{module}.py"))
        sys.modules.pop(module, None)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in MODULES:
        sys.modules.pop(module, None)


def test_every_block_of_code_is_run() -> None:
    names = {block.splitlines()[0] for block in blocks("python")}
    assert names == {f"# {module}.py" for module in MODULES} | {"# drpo_megatron/sync/one_by_one.py"}
    assert (len(blocks("yaml")), len(blocks("diff"))) == (4, 2)


# --- a loss -----------------------------------------------------------------------------------------------------------


def token_inputs(n: int = 400) -> LossInputs:
    g = torch.Generator().manual_seed(0)
    logmu_T = -3 * torch.rand(n, generator=g, dtype=torch.float64)
    logp_T = (logmu_T + torch.randn(n, generator=g)).clamp(max=-1e-3).requires_grad_()
    mask_T = torch.rand(n, generator=g) > 0.2
    return LossInputs(
        logp_T=logp_T,
        logmu_T=torch.where(mask_T, logmu_T, torch.inf),  # a masked-out token's log μ means nothing
        advantages_T=torch.randn(n, generator=g, dtype=torch.float64),
        mask_T=mask_T,
        sequence_ids_T=torch.zeros(n, dtype=torch.int64),
        num_sequences=1,
    )


def test_the_loss_has_the_gradient_of_its_closed_form() -> None:
    x = token_inputs()
    outputs = evaluate(make_loss("my_losses:drpo_two_sided", TWO_SIDED), x)
    m = x.mask_T
    p, mu, A = x.logp_T[m].detach().exp(), x.logmu_T[m].exp(), x.advantages_T[m]
    delta = torch.where(p > mu, 0.3, 0.1)
    w = 1 - torch.sign(A * (p / mu - 1)) * (p - mu).abs() / delta
    assert torch.allclose(outputs.coefficient_T[m], -A * (p / mu) * w, rtol=1e-9)
    assert torch.allclose(outputs.weight_T[m], w, rtol=1e-9)
    assert (w < 0).any(), "tokens beyond both boundaries"
    assert not outputs.loss_T[~m].any()


def test_its_parameters_are_checked_as_those_of_any_loss() -> None:
    name = "my_losses:drpo_two_sided"
    assert loss_parameters(name) == {"delta_up": None, "delta_down": 0.2}
    with pytest.raises(ValueError, match="needs delta_up"):
        make_loss(name, {})
    with pytest.raises(ValueError, match="did you mean 'delta_up'"):
        make_loss(name, {"delta_u": 0.2})
    with pytest.raises(ValueError, match="has no function 'drpo_to_sided'"):
        make_loss("my_losses:drpo_to_sided", {})


def test_the_loss_trains() -> None:
    """In the fused projection of the trainer: its gradients are those of autograd over whole logits, and the policy
    stops where they vanish, at π = μ + δ of its direction.
    """
    T, H, V = 6, 16, 11
    g = torch.Generator().manual_seed(1)
    hidden_TH = torch.randn(T, H, generator=g, dtype=torch.float64)
    weight_VH = (0.1 * torch.randn(V, H, generator=g, dtype=torch.float64)).requires_grad_()
    targets_T, advantages_T = torch.arange(T), torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)
    rows = torch.arange(T)

    def probabilities(weight: torch.Tensor) -> torch.Tensor:
        return torch.softmax(hidden_TH @ weight.T, -1)[rows, targets_T]

    mu_T = probabilities(weight_VH).detach()
    loss_function = make_loss("my_losses:drpo_two_sided", {"delta_up": 0.3, "delta_down": 0.04})
    optimizer = torch.optim.Adam([weight_VH], lr=0.05)
    for step in range(400):
        fused = fused_policy_loss(
            hidden_TH,
            weight_VH,
            targets_T,
            mask_T=torch.ones(T, dtype=torch.bool),
            group=None,
            vocab_size=V,
            temperature=1.0,
            loss_function=loss_function,
            logmu_T=mu_T.log(),
            advantages_T=advantages_T,
            weights_T=torch.full((T,), 1 / T, dtype=torch.float64),
        )
        optimizer.zero_grad()
        fused.loss.backward()
        if step == 10:
            p, r = probabilities(weight_VH), probabilities(weight_VH) / mu_T
            delta = torch.where(r.detach() > 1, 0.3, 0.04)
            dense = (-advantages_T * r + advantages_T.abs() * (p - mu_T) ** 2 / mu_T / (2 * delta)).mean()
            (expected,) = torch.autograd.grad(dense, weight_VH)
            assert torch.allclose(weight_VH.grad, expected, rtol=1e-7, atol=1e-12)
        optimizer.step()
    moved_T = probabilities(weight_VH).detach() - mu_T
    assert torch.allclose(moved_T, torch.where(advantages_T > 0, 0.3, -0.04).double(), atol=1e-3), moved_T


# --- a reward, a data source, a rollout function ----------------------------------------------------------------------


def test_the_reward_scores() -> None:
    """In the processes of a run's pool: tests/slow/test_extending_processes.py."""
    data = DataConfig.model_validate({"source": {"type": "function", "function": "my_data:products"}})
    verifier = make_verifier(RewardConfig(type="function", function="my_rewards:short_and_right"), data)
    texts = {"12": 1.0, "= 12": 1.0, "so 12": 1 - 0.5 / 4, "so we get 12": 0.1, "13": 0.0, "": 0.0}
    scored = [checked_reward(verifier, text, "12", {"characters": 4}) for text in texts]
    assert [reward for reward, _ in scored] == pytest.approx(list(texts.values()))
    reward, error = checked_reward(verifier, "12", "12", {})
    assert reward == 0 and "KeyError" in (error or "")


def test_the_data_source_makes_prompts() -> None:
    config = DataConfig.model_validate(
        {
            "source": {"type": "function", "function": "my_data:products", "size": 50},
            "chat_template": False,
            "shuffle": False,
        }
    )

    class Tokenizer(Letters):
        chat_template = None

    prompts = load_prompts(config, Tokenizer(), seed=3).next(50)
    assert [p.token_ids for p in prompts] == [p.token_ids for p in load_prompts(config, Tokenizer(), seed=3).next(50)]
    for index, prompt in enumerate(prompts):
        a, b = map(int, re.fullmatch(r"(\d+) \* (\d+) =", prompt.text).groups())  # type: ignore[union-attr]
        assert prompt.answer == str(a * b) and len(str(a)) == 1 + index % 2
        assert prompt.metadata == {"characters": 4 * (1 + index % 2)}


def test_the_policy_tries_again() -> None:
    function = importlib.import_module("my_rollouts").try_again
    handler, asked = scripted("11\n", "12\n", "never asked\n")

    async def with_answer(prompt: Prompt, session: Any) -> Any:
        assert prompt.answer is None
        trajectory = await function(Prompt(prompt.id, prompt.token_ids, prompt.text, "12"), session)
        trajectory.prompt = prompt
        return trajectory

    (rollout,) = run(handler, with_answer).rollouts
    assert Letters().decode(rollout.response_ids) == "11\nWrong, try again:12\n"
    assert len(asked) == 2 and asked[0]["sampling_params"][0]["stop"] == ["\n"]
    assert rollout.response_mask == [1] * 3 + [0] * len("Wrong, try again:") + [1] * 3
    handler, asked = scripted("1\n", "2\n", "3\n", "4\n")
    (rollout,) = run(handler, with_answer, max_new_tokens=60).rollouts
    assert len(asked) == 3 and rollout.response_mask[-2:] == [1, 1]
    handler, asked = scripted("1\n", "2\n")
    assert len(run(handler, with_answer, max_new_tokens=8).rollouts) == len(asked) == 1


def test_a_run_takes_all_of_them(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`drpo train --dry-run` of the quickstart with the page's settings."""
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    for block in blocks("yaml"):
        for section, values in yaml.safe_load(block).items():
            settings[section] |= values
    (working_directory / "mine.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(working_directory)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "mine.yaml", "--dry-run"])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    for name in ("my_losses:drpo_two_sided", "my_rewards:short_and_right", "my_data:products", "my_rollouts:try_again"):
        assert name in said.out


# --- a family ---------------------------------------------------------------------------------------------------------


def test_the_example_of_a_family_is_the_tables_entry() -> None:
    """What the entry makes is compared with transformers by the tests that weights/README.md lists."""
    page = (ROOT / "drpo_megatron" / "weights" / "README.md").read_text()
    (entry,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert eval(f"{{{entry}}}", vars(families)) == {"mixtral": families.FAMILIES["mixtral"]}


# --- a transport ------------------------------------------------------------------------------------------------------


class StandIn:
    """An SGLang server as far as a push goes: what it was asked for, and the weights that it holds."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.globals: set[tuple[str, str]] = set()
        self.weights: dict[str, torch.Tensor] = {}
        self.damage = False
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = json.dumps(stand_in.answer(self.path, json.loads(body))).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def do_GET(self) -> None:  # whether it lives
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, path: str, body: Any) -> dict[str, Any]:
        self.calls.append(path)
        if path == "/update_weights_from_tensor":
            (payload,) = body["serialized_named_tensors"]
            ((name, tensor),) = self._unpickler(io.BytesIO(base64.b64decode(payload))).load()
            self.weights[name] = tensor.clone()
            self.calls.append(f"flush_cache={body['flush_cache']}, load_format={body['load_format']}")
        if path == "/weights_checker":
            if self.damage:
                self.weights["model.norm.weight"].view(torch.int32)[0] ^= 1
            sums = {
                name: hashlib.sha256(t.contiguous().numpy().tobytes()).digest()[:8].hex()
                for name, t in self.weights.items()
            }
            return {"ranks": [{"parallelism_info": [{"tp_rank": 0}], "checksums": sums}]}
        return {"success": True}

    def _unpickler(self, file: io.BytesIO) -> pickle.Unpickler:
        seen = self.globals

        class Noting(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                seen.add((module, name))
                return super().find_class(module, name)

        return Noting(file)

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def edited(diff: str) -> str:
    """The text of the file in the first line with the page's edit, which must fit exactly one place."""
    heading, *lines = diff.splitlines()
    path = heading.removeprefix("--- ")
    before = "\n".join(line[1:] for line in lines if line[:1] in (" ", "-"))
    after = "\n".join(line[1:] for line in lines if line[:1] in (" ", "+"))
    text = (ROOT / path).read_text()
    assert text.count(before) == 1, f"{path} has not, or more than once:\n{before}"
    return text.replace(before, after)


def module_of(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, name, "exec"), vars(module))
    return module


def test_the_transport_pushes_by_its_two_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    of_schema, of_push = blocks("diff")
    with pytest.raises(ValueError, match="transport"):
        SyncConfig.model_validate({"transport": "one_by_one"})
    schema = module_of("schema_edited", edited(of_schema), monkeypatch)
    transport = module_of("drpo_megatron.sync.one_by_one", file_of("drpo_megatron/sync/one_by_one.py"), monkeypatch)
    push = module_of("push_edited", edited(of_push), monkeypatch)
    push.OneByOneTransport = transport.OneByOneTransport  # type: ignore[attr-defined]

    whole = torch.randn(100_000)
    named = [
        ("model.norm.weight", whole[:50]),  # a view, as a parameter is of Megatron's buffers
        ("model.layers.0.input_layernorm.weight", torch.randn(7, 3).t()),
        ("model.layers.1.input_layernorm.weight", torch.randn(40)),
        ("model.layers.1.mlp.down_proj.weight", torch.randn(8, 5)),
    ]
    config = schema.SyncConfig.model_validate({"transport": "one_by_one", "bucket_mb": 250 / 2**20, "timeout_s": 20})
    server = StandIn()
    try:
        weights = push.WeightSync(config, ServerLayout(1, torch.float32, 1), tmp_path, tmp_path)
        weights.connect([server.url])
        report = weights.push(iter(named), version=3)
        assert {n: t.tolist() for n, t in server.weights.items()} == {n: t.tolist() for n, t in named}
        assert (report.verified, report.buckets, report.bytes) == (4, 3, sum(t.nbytes for _, t in named))
        assert [r.message for r in caplog.records if "layernorm" in r.message] == [
            "model.layers.0.input_layernorm.weight [3, 7] torch.float32",
            "model.layers.1.input_layernorm.weight [40] torch.float32",
        ]
        assert not whole.is_shared(), "the trainer's own memory stays where it is"
        sent = "/update_weights_from_tensor"
        first, later = "flush_cache=True, load_format=None", "flush_cache=False, load_format=None"
        assert server.calls == [
            "/pause_generation",
            "/begin_weight_update",
            *(sent, first, sent, later, sent, later, sent, later),
            "/end_weight_update",
            "/weights_checker",
            "/update_weight_version",
            "/continue_generation",
        ]
        server.damage = True
        with pytest.raises(SyncMismatch, match=r"values differ: model\.norm\.weight"):
            weights.connect([server.url])
            weights._pushes = 0
            weights.push(iter(named), version=4)
    finally:
        server.close()
    # SGLang refuses a pickle with other names than those in its list.
    package = importlib.util.find_spec("sglang")
    assert package is not None and package.origin is not None
    reader = (Path(package.origin).parent / "srt" / "utils" / "common.py").read_text()
    assert server.globals and all(f'("{module}", "{name}")' in reader for module, name in server.globals)
