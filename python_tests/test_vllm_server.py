"""A vLLM server, its engine in another process, over HTTP; run by `make test-engines`."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from test_vllm import BOUND, GREEDY, loaded, prompts, put_back, same_answers, vllm

from vcr1_fast.demo.settings import WARM_START
from vcr1_fast.engines.parity import Forward, ParityError, check_parity
from vcr1_fast.engines.vllm_server import VllmServer
from vcr1_fast.model.checkpoint import policy_weights
from vcr1_fast.model.rollout import SamplingConfig

__all__ = ["loaded", "prompts", "vllm"]  # fixtures

pytestmark = pytest.mark.vllm

# As docs/engines.md has it, for the CPU.
COMMAND = (
    "--host 127.0.0.1 --served-model-name policy --dtype float32 --enforce-eager "
    "--max-model-len 2048 --max-num-seqs 64 --block-size 32 --kv-cache-memory-bytes 268435456 "
    "--enable-mm-embeds --skip-mm-profiling --enable-scale-out --generation-config vllm "
    "--logprobs-mode raw_logprobs --disable-uvicorn-access-log "
    "--worker-extension-cls vcr1_fast.engines.vllm_worker.Extension"
)


@pytest.fixture(scope="module")
def url(vllm, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *COMMAND.split()]
    command += ["--model", str(WARM_START), "--port", str(port)]
    command += ["--weight-transfer-config", '{"backend": "vcr1_shm"}']
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 600  # seconds where nothing else runs
        while time.monotonic() < until:
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield address
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def engine(url, loaded):
    with VllmServer(*loaded, url) as engine:
        yield engine


def test_a_server_answers_as_ours_before_and_after_a_change(engine, loaded, prompts):
    model, _ = loaded
    with pytest.raises(ValueError, match="sync the weights"):
        engine.rollout(prompts[:1], 1, GREEDY, None)
    engine.sync(policy_weights(model), 0)
    same_answers(engine, loaded, prompts)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
    with pytest.raises(AssertionError):
        same_answers(engine, loaded, prompts[:16])
    engine.sync(policy_weights(model), 1)
    same_answers(engine, loaded, prompts[:48])
    assert engine.get("/weight_info") == {"weight_version": "1"}
    put_back(model, before)
    engine.sync(policy_weights(model), 2)
    again = engine.rollout(prompts[:3], 4, SamplingConfig(max_new_tokens=8), torch.Generator())
    assert [len(group) for group in again.tokens] == [4] * 3


def test_the_guard_over_http(engine, loaded, prompts, monkeypatch):
    model, processor = loaded
    forward = Forward(model, processor, SamplingConfig(max_new_tokens=8))

    def sync(version):
        engine.sync(policy_weights(model), version)

    sync(10)
    assert check_parity(engine, forward, prompts[:2], sync=sync).max < BOUND
    send = engine._send

    def stale(part, save_file):
        send({name: t for name, t in part.items() if "layers.0.input" not in name}, save_file)

    monkeypatch.setattr(engine, "_send", stale)
    with pytest.raises(ValueError, match=r"1 were not given.*layers.0.input_layernorm"):
        sync(11)
    monkeypatch.undo()
    sync(12)
    post = engine.post
    skipped = ("/pause", "/resume", "/reset_prefix")  # a pause empties the cache, too
    monkeypatch.setattr(
        engine, "post", lambda path, body: path.startswith(skipped) or post(path, body)
    )
    with pytest.raises(ParityError, match="weights: a prompt without clips"):
        check_parity(engine, forward, prompts[:2], sync=sync)
    monkeypatch.undo()
    sync(13)


def test_answers_of_another_version_are_refused(engine, loaded, prompts):
    engine.sync(policy_weights(loaded[0]), 20)
    engine.post("/update_weight_version", {"new_version": "someone's"})
    with pytest.raises(ValueError, match=r"version someone's, the run asked for 20"):
        engine.rollout(prompts[:1], 1, GREEDY, None)
