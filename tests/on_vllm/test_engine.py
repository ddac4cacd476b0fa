# SPDX-License-Identifier: Apache-2.0
"""What vLLM does to requests, masks outlive: arrivals, preemption, chunks, compilation, ranks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has it")

from test_masks import ASKS, MASK
from vllm.exceptions import VLLMValidationError
from vllm_answers import PROMPTS, answers, engine, make_artifact, same_as_reference

from firstlm import FirstModel


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, FirstModel]:
    return make_artifact("llama", tmp_path_factory.mktemp("artifact"))


def run(llm: Any, asked: dict[str, tuple[list[int], dict, int]], rng: random.Random) -> dict:
    """Send requests at random times; return what became of each."""
    from vllm import SamplingParams

    waiting, done = list(asked.items()), {}
    while len(done) < len(asked):
        while waiting and rng.random() < 0.6:
            name, (prompt, ask, tokens) = waiting.pop()
            params = SamplingParams(
                temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=dict(ask)
            )
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        for output in llm.llm_engine.step():
            if output.finished:
                done[output.request_id] = output
    return done


@pytest.mark.parametrize("ride", [0, 16])
def test_64_requests_that_come_at_random_times(
    made: tuple[str, FirstModel], ride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firstlm.vllm_routing.RIDE_ALONG", ride)
    rng = random.Random(0)
    asked = {
        f"r{i}": (
            [1, *(rng.randrange(5, 255) for _ in range(rng.randrange(1, 60)))],
            {**rng.choice(ASKS), "prefill": rng.choice(["skip", "skip", "full"])},
            rng.randrange(1, 30),
        )
        for i in range(64)
    }
    llm = engine(made[0])
    done = run(llm, asked, rng)
    masks = {
        same_as_reference(done[name], made[1], prompt, ask)
        for name, (prompt, ask, _) in asked.items()
    }
    assert len(masks) > 10
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    assert len(model.first_routing.decisions) <= 1  # of the last step, which no other followed


def test_several_answers_to_a_long_prompt_are_each_routed_by_all_of_it(
    made: tuple[str, FirstModel],
) -> None:
    """They are copies of one request, and find in no cache what another of them has read."""
    from vllm import SamplingParams

    llm = engine(made[0], block_size=32, long_prefill_token_threshold=64)
    rng = random.Random(2)
    asks = {"router": {"skip_rate": 0.4}, "mine": {"skip_layers": [1, 4], "prefill": "full"}}
    for name, ask in asks.items():
        prompt = [1, *(rng.randrange(5, 255) for _ in range(150))]
        options = {"temperature": 1.0, "top_k": 1, "max_tokens": 8, "ignore_eos": True}
        params = SamplingParams(n=3, **options, extra_args=ask)
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        found: list[Any] = []
        while not found:
            found = [output for output in llm.llm_engine.step() if output.finished]
        assert len({tuple(one.token_ids) for one in found[0].outputs}) == 1
        same_as_reference(found[0], made[1], prompt, ask)


def test_beam_search_is_refused(made: tuple[str, FirstModel]) -> None:
    from vllm.sampling_params import BeamSearchParams

    llm = engine(made[0])
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    with pytest.raises(VLLMValidationError, match="Beam search is not served"):
        llm.beam_search([{"prompt_token_ids": PROMPTS[0]}], params)


@pytest.mark.parametrize("caching", [False, True])
def test_masks_outlive_preemption(
    made: tuple[str, FirstModel], monkeypatch: pytest.MonkeyPatch, caching: bool
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    before = Scheduler._preempt_request

    def noted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return before(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    options = {"num_gpu_blocks_override": 14, "enable_prefix_caching": caching}
    llm = engine(made[0], block_size=32, **options)
    asked = {
        f"r{i}": (
            PROMPTS[i % 8],
            {**ASKS[i % 5], "prefill": "full" if i % 3 == 0 else "skip"},
            90,
        )
        for i in range(10)
    }
    done = run(llm, asked, random.Random(1))
    assert preempted
    for name, (prompt, ask, _) in asked.items():
        same_as_reference(done[name], made[1], prompt, ask)


def test_prompts_in_chunks_are_pooled_whole(made: tuple[str, FirstModel]) -> None:
    llm = engine(
        made[0],
        hf_overrides={"first_prefill": "full"},
        max_num_batched_tokens=32,
        enable_chunked_prefill=True,
        enable_prefix_caching=False,
    )
    prompts = [(prompt * 4)[:150] for prompt in PROMPTS[2:]]
    for output, prompt, ask in zip(answers(llm, prompts, ASKS[:6]), prompts, ASKS, strict=False):
        same_as_reference(output, made[1], prompt, {**ask, "prefill": "full"})
    with pytest.raises(VLLMValidationError, match="reads them in chunks"):
        answers(llm, prompts[:1], [{"prefill": "skip"}])


def test_with_all_layers_it_is_stock_vllm(made: tuple[str, FirstModel]) -> None:
    from firstlm.vllm_folder import folder_for

    ours = answers(engine(made[0]), PROMPTS, [{"policy": "run_all"}] * 8)
    folder = str(folder_for(made[0], "float32"))
    stock = engine(folder, hf_overrides={"architectures": ["LlamaForCausalLM"]})
    theirs = answers(stock, PROMPTS, [{}] * 8)
    for one, other in zip(ours, theirs, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert other.kv_transfer_params is None


def test_layers_are_compiled_and_masks_are_not(made: tuple[str, FirstModel]) -> None:
    llm = engine(made[0], enforce_eager=False)
    for asks in (ASKS, ASKS[::-1]):
        for output, prompt, ask in zip(answers(llm, PROMPTS, asks), PROMPTS, asks, strict=True):
            same_as_reference(output, made[1], prompt, ask)


def test_a_model_that_was_compiled_whole_is_refused(
    made: tuple[str, FirstModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(made[0])
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    # What a trace of the whole model would do: layers run, and nothing in Python does.
    monkeypatch.setattr(model.model, "forward", lambda ids, *rest: model.model.embed_tokens(ids))
    with pytest.raises(RuntimeError, match="6 of 6 layers ran without asking"):
        answers(llm, PROMPTS[:1], ASKS[:1])


@pytest.mark.parametrize("offline", [False, True])
def test_a_shipped_artifact_goes_by_its_name(
    made: tuple[str, FirstModel], monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    import huggingface_hub
    from vllm.engine.arg_utils import EngineArgs

    from firstlm import artifact_files
    from firstlm.vllm_folder import folder_for

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(artifact_files, "shipped", lambda: {"tiny": Path(made[0])})
    config = EngineArgs(model="tiny", max_model_len=64).create_engine_config()
    assert config.model_config.model == str(folder_for("tiny"))
    assert config.model_config.served_model_name == "tiny"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative"),
        ({"enable_lora": True}, "LoRA requests"),
        ({"hf_overrides": {"first_prefill": "half"}}, "first_prefill is 'half'"),
    ],
)
def test_settings_that_would_mix_masks_are_refused(
    made: tuple[str, FirstModel], options: dict[str, Any], why: str
) -> None:
    with pytest.raises(Exception, match=why):
        engine(made[0], **options)


def test_two_ranks_decide_as_one(made: tuple[str, FirstModel], tmp_path: Path) -> None:
    asks, prompts = ASKS, PROMPTS
    script = tmp_path / "ranks.py"
    script.write_text(
        "import json, sys\n"
        "from vllm_answers import answers, engine\n"
        "if __name__ == '__main__':\n"
        "    artifact, prompts, asks = json.loads(sys.argv[1])\n"
        "    llm = engine(artifact, tensor_parallel_size=2)\n"
        "    found = answers(llm, prompts, asks)\n"
        "    rows = [[list(o.outputs[0].token_ids), o.kv_transfer_params['first']['keep']]\n"
        "            for o in found]\n"
        "    print('FOUND', json.dumps(rows))\n"
    )
    here = Path(__file__).parent
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "PYTHONPATH": f"{here}:{here.parent}",
    }
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([made[0], prompts, asks])],
        capture_output=True,
        text=True,
        env=env,
        timeout=600,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("FOUND")), None)
    assert line is not None, done.stdout[-3000:] + done.stderr[-3000:]

    class Output:
        def __init__(self, tokens: list[int], keep: list[bool]) -> None:
            self.outputs = [type("Answer", (), {"token_ids": tokens})]
            report = {"keep": keep, "skip_rate": 1 - sum(keep) / len(keep)}
            self.kv_transfer_params = {"first": report}

    for (tokens, keep), prompt, ask in zip(json.loads(line[6:]), prompts, asks, strict=True):
        same_as_reference(Output(tokens, keep), made[1], prompt, ask)


def test_vllms_own_server_serves_an_artifact(made: tuple[str, FirstModel], tmp_path: Path) -> None:
    port = 8000 + os.getpid() % 1000
    words = ["--model", made[0], "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "256", "--max-num-seqs", "8", "--served-model-name", "first"]
    template = tmp_path / "template"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    words += ["--chat-template", str(template)]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
    )

    def send(body: dict[str, Any] | None, path: str) -> tuple[int, bytes]:
        data = None if body is None else json.dumps({"model": "first", **body}).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/{path}", data, head)
        try:
            with urllib.request.urlopen(request, timeout=60) as found:
                return found.status, found.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def ask(body: dict[str, Any] | None, path: str = "completions") -> tuple[int, Any]:
        status, found = send(body, path)
        return status, json.loads(found)

    def streamed(body: dict[str, Any], path: str) -> list[Any]:
        """Return what the events that end an answer say of its layers."""
        asked = {"stream": True, "stream_options": {"include_usage": True}}
        status, found = send({**body, **asked}, path)
        assert status == 200
        events = [line[6:] for line in found.decode().splitlines() if line]
        assert events.pop() == "[DONE]"
        bodies = [json.loads(event) for event in events]
        ends = [b for b in bodies if b["choices"] and b["choices"][0].get("finish_reason")]
        assert all("kv_transfer_params" not in b for b in bodies if b not in ends)
        return [b["kv_transfer_params"]["first"]["keep"] for b in ends]

    try:
        for _ in range(240):
            time.sleep(1)
            try:
                ask(None, "models")
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
        prompt = {"prompt": PROMPTS[3], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        status, found = ask({**prompt, "vllm_xargs": {"skip_rate": 0.4}})
        assert status == 200
        assert 0 < found["kv_transfer_params"]["first"]["skip_rate"] < 0.7
        status, found = ask({**prompt, "vllm_xargs": {"skip_layers": [1, 4]}})
        assert (status, found["kv_transfer_params"]["first"]["keep"]) == (200, MASK)
        status, found = ask({**prompt, "vllm_xargs": {"skip_rate": 0.85}})
        assert status == 400
        assert "outside what was calibrated" in json.dumps(found)
        assert ask(prompt)[0] == 200
        mine = {"vllm_xargs": {"skip_layers": [1, 4]}}
        assert streamed({**prompt, **mine}, "completions") == [MASK]
        two = {**prompt, "prompt": PROMPTS[3:5], "vllm_xargs": {"policy": "run_all"}}
        assert streamed(two, "completions") == [[True] * len(MASK)] * 2
        drawn = {**prompt, "n": 3, "temperature": 1, "ignore_eos": False, "max_tokens": 40}
        assert streamed({**drawn, "seed": 1, **mine}, "completions") == [MASK] * 3
        text = ask({**prompt, **mine})[1]["choices"][0]["text"]
        stopped = ask({**prompt, **mine, "stop": [text[3]]})[1]
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert stopped["kv_transfer_params"]["first"]["keep"] == MASK
        assert streamed({**prompt, **mine, "stop": [text[3]]}, "completions") == [MASK]
        said = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
        assert streamed({**said, **mine}, "chat/completions") == [MASK]
    finally:
        server.terminate()
        server.wait(60)
        log.close()
