"""The client of a vLLM server, `vcr1 parity` and rollouts ahead, against a recorded protocol."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from engine_server import State, decoded, serving
from tiny_run import configure, write_inputs

from vcr1_fast.cli import main
from vcr1_fast.config.section import ConfigError
from vcr1_fast.data.records import load_records
from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import read_clip
from vcr1_fast.engines import parity
from vcr1_fast.engines.inputs import media_of
from vcr1_fast.engines.parity import Forward, ParityError, check_parity
from vcr1_fast.engines.vllm_server import ServerError, VllmServer, encoded
from vcr1_fast.model.checkpoint import load, policy_weights
from vcr1_fast.model.forward import completion_logps, lm_head, prompt_features
from vcr1_fast.model.packing import Group
from vcr1_fast.model.rollout import SamplingConfig, rollout
from vcr1_fast.train import rollouts, setup
from vcr1_fast.train.loop import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def case(inputs, tmp_path_factory):
    """model, processor, all prompts of a step."""
    settings = configure(*inputs, tmp_path_factory.mktemp("run"))
    with setup.open_run(settings, reference=False) as run:
        samples = [s for batch in run.batches() for s in batch]
        return run.model.eval(), run.processor, [sample.prompt for sample in samples[:4]]


@pytest.fixture
def state(case):
    model, processor, prompts = case
    state = State(model, processor)
    with torch.no_grad():  # a server of other weights, until they are sent
        state.model.get_input_embeddings().weight.mul_(1.5)
    state.prompts = list(prompts)
    return state


@pytest.fixture
def server(case, state, tmp_path):
    with serving(state) as url, VllmServer(*case[:2], url, folder=str(tmp_path)) as server:
        yield server


def test_features_and_seconds_arrive_bit_for_bit(case, state, server):
    model, _, prompts = case
    server.sync(policy_weights(model), 3)
    server.rollout(prompts, 2, SamplingConfig(max_new_tokens=3), torch.Generator())
    with torch.no_grad():
        features = prompt_features(model, prompts)
    by_tokens = {str(body["token_ids"]): body for body in state.requests}
    for prompt, own in zip(prompts, features, strict=True):
        body = by_tokens[str(prompt.input_ids.tolist())]
        (item,) = body["features"]["kwargs_data"]["video"]
        got = decoded(item)
        assert torch.equal(got["video_embeds"], own)
        assert torch.equal(got["video_grid_thw"], prompt.video_grid_thw[0])
        assert got["second_per_grid_ts"].dtype == torch.float64
        assert float(got["second_per_grid_ts"]) == float(prompt.second_per_grid_ts[0])
        (place,) = body["features"]["mm_placeholders"]["video"]
        where = prompt.is_vision.nonzero()[:, 0]
        assert (place["offset"], place["length"]) == (int(where[0]), len(where))
        said = body["sampling_params"]
        banned = server.processor.banned_ids(len(lm_head(model)[0]))
        assert {int(token) for token in said["logit_bias"]} >= set(banned.tolist())
        assert said["n"] == 2 and said["ignore_eos"]
    assert len({body["sampling_params"]["seed"] for body in state.requests}) == len(prompts)


def test_answers_are_those_of_the_weights_sent(case, state, server, tmp_path):
    model, processor, prompts = case
    greedy = SamplingConfig(temperature=0, max_new_tokens=6)
    with pytest.raises(ValueError, match="sync the weights"):
        server.rollout(prompts, 1, greedy, None)
    server.sync(policy_weights(model), 0)
    own = rollout(model, processor, prompts, 1, greedy)
    got = server.rollout(prompts, 3, greedy, None)
    assert got.texts == [texts * 3 for texts in own.texts]
    assert got.finished == [one * 3 for one in own.finished]
    for ours, theirs in zip(own.full_logps, got.full_logps, strict=True):
        torch.testing.assert_close(theirs[2], ours[0], rtol=0, atol=1e-5)
    sampling = SamplingConfig(max_new_tokens=6)
    got = server.rollout(prompts[:1], 4, sampling, torch.Generator())
    seed = state.requests[-1]["sampling_params"]["seed"]
    own = rollout(model, processor, prompts[:1], 4, sampling, torch.Generator().manual_seed(seed))
    assert got.texts == own.texts and len(set(got.texts[0])) > 1
    order = [path for path in state.calls if "generate" not in path and path != "/version"]
    assert order == [
        "/pause?mode=wait",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/resume",
        "/collective_rpc",
    ]
    assert not list(tmp_path.iterdir())  # nothing is left in shared memory


def test_weights_go_in_chunks(case, state, server, monkeypatch):
    monkeypatch.setattr("vcr1_fast.engines.vllm_server.CHUNK", 20_000)
    server.sync(policy_weights(case[0]), 0)
    assert state.calls.count("/update_weights") > 5
    named = dict(state.model.named_parameters())
    assert all(torch.equal(named[name], p) for name, p in case[0].named_parameters())


def test_faults_of_the_server_are_named(case, state, server):
    model, processor, prompts = case
    greedy = SamplingConfig(temperature=0, max_new_tokens=4)
    server.sync(policy_weights(model), 0)
    state.version = "7"
    with pytest.raises(ValueError, match="answered by version 7, the run asked for 0"):
        server.rollout(prompts[:1], 1, greedy, None)
    state.missing = ["norm.weight"]
    with pytest.raises(ValueError, match=r"1 were not given and keep older values: norm\.weight"):
        server.sync(policy_weights(model), 1)
    state.missing = []
    state.dropped = {"model.language_model.layers.0.input_layernorm.weight"}
    server.sync(policy_weights(model), 2)
    forward = Forward(model, processor, SamplingConfig(max_new_tokens=6))
    state.prompts = [*prompts, *[p.prompt for p in parity._probes(model, prompts[:1])]]
    with pytest.raises(ParityError, match="weights: a prompt without clips"):
        check_parity(
            server, forward, prompts[:1], sync=lambda v: server.sync(policy_weights(model), v)
        )
    state.replies["/inference/v1/generate"] = {"prompt_token_ids": [1, 2], "choices": []}
    server.sync(policy_weights(model), 3)
    with pytest.raises(ValueError, match="tokens: the engine read 2 of a prompt"):
        server.rollout(prompts[:1], 1, greedy, None)
    state.replies["/inference/v1/generate"] = {"choices": []}
    with pytest.raises(ServerError, match="0 of 1 completions"):
        server.rollout(prompts[:1], 1, greedy, None)
    state.prompts, state.replies = [], {}
    with pytest.raises(ServerError, match="/inference/v1/generate: 500"):
        server.rollout(prompts[:1], 1, greedy, None)


def test_no_server_and_another_release(case, state):
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9/version: "):
        VllmServer(*case[:2], "http://127.0.0.1:9")
    state.replies["/version"] = {"version": "0.40.0"}
    with serving(state) as url, pytest.raises(ValueError, match=r"vLLM 0\.40\.0 is not among"):
        VllmServer(*case[:2], url)


def test_clips_with_text_between_their_frames_are_refused(tmp_path):
    folder, records = write_inputs(tmp_path, "qwen3_vl")
    model, _ = load(folder)
    with setup.open_run(configure(folder, records, tmp_path / "run"), reference=False) as run:
        prompt = next(iter(run.batches()))[0].prompt
    with torch.no_grad():
        (features,) = prompt_features(model, [prompt])
    with pytest.raises(ValueError, match="takes no clip with text between its frames"):
        encoded(media_of(prompt, features, model.config, 0))


def test_a_run_samples_ahead_of_its_updates(inputs, tmp_path, monkeypatch):
    """Each step's completions but the first are those of the weights one step before, as their
    log-probs show, and what is off-policy is corrected."""
    model, processor = load(inputs[0])
    state = State(model, processor)
    seen, weights = [], {}
    sample, sync = rollouts.sample_group, setup.Run.sync_sampler

    def synced(run, version):
        sync(run, version)
        weights[version] = copy.deepcopy(run.model)

    def noted(run, samples, *rest):
        state.prompts = [sample.prompt for sample in samples]
        got = sample(run, samples, *rest)
        seen.append((samples, got, run.sampler.version))
        return got

    monkeypatch.setattr(rollouts, "sample_group", noted)
    monkeypatch.setattr(setup.Run, "sync_sampler", synced)
    with serving(state) as url:
        settings = configure(
            *inputs,
            tmp_path / "run",
            "rollout.engine=vllm-server",
            f"rollout.url={url}",
            f"rollout.sync_folder={tmp_path}",
            "rollout.ahead=1",
            "rollout.parity_every=0",
            "loss.beta=0",
            "loss.entropy_coef=0.05",
            "loss.rollout_correction=token_truncate",
            "optim.steps=3",
            "optim.lr=1e-2",
        )
        train(settings)
    assert [version for _, _, version in seen] == [0, 0, 1]
    for samples, got, version in seen:
        groups = [Group(s.prompt, o.tokens[0]) for s, o in zip(samples, got, strict=True)]
        with torch.no_grad():
            own = completion_logps(weights[version].eval(), groups)
        theirs = torch.cat([torch.cat(one.full_logps[0]) for one in got])
        torch.testing.assert_close(theirs, own, rtol=0, atol=1e-4)
    rows = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert rows[0]["rollout_gap_max"] < 1e-4 < rows[1]["rollout_gap_max"]


def test_sampling_ahead_needs_a_server_and_a_correction(inputs, tmp_path):
    for options, said in (
        (("rollout.ahead=1",), "needs engine: vllm-server"),
        (
            ("rollout.ahead=1", "rollout.engine=vllm-server", "rollout.url=http://x"),
            "needs loss.rollout_correction",
        ),
        (("rollout.engine=vllm-server",), "url: goes with engine: vllm-server"),
        (("rollout.engine=vllm", "rollout.temperature=0.001"), "below 0.01"),
    ):
        with pytest.raises(ConfigError, match=said):
            configure(*inputs, tmp_path / "run", *options)


def test_parity_compares_an_endpoint_with_training(case, inputs, state, capsys):
    model, _, _ = case
    record = load_records(inputs[1])[0]
    clip = record.media
    question = "What happens?"

    def table(prompt_ids, tokens, logprobs):
        state.replies["/v1/models"] = {"data": [{"id": "policy"}]}
        state.replies["/v1/chat/completions"] = {
            "prompt_token_ids": prompt_ids,
            "usage": {"prompt_tokens": len(prompt_ids)},
            "choices": [
                {
                    "logprobs": {
                        "content": [
                            {"token": f"token_id:{t}", "logprob": p}
                            for t, p in zip(tokens, logprobs, strict=True)
                        ]
                    }
                }
            ],
        }
        arguments = ["parity", "--model", str(inputs[0]), "--clip", str(clip), "--frames", "4"]
        with serving(state) as url:
            status = main([*arguments, "--endpoint", url, "--question", question])
        return status, capsys.readouterr().out

    frames = FrameConfig(num_frames=4)
    own = load(inputs[0])[1].with_frames(frames)
    prompt = own.prompt(question, [read_clip(str(clip), frames, backend="pyav", fit=own.fit())])
    ids = prompt.input_ids.tolist()
    greedy = SamplingConfig(temperature=0, max_new_tokens=5)
    got = rollout(model, own, [prompt], 1, greedy)
    tokens, logps = got.tokens[0][0].tolist(), got.full_logps[0][0].tolist()
    status, text = table(ids, tokens, logps)
    assert status == 0 and "all equal" in text and "NO" not in text
    # One token less, and one vision token less.
    status, text = table(ids[1:], tokens, logps)
    assert status == 1 and "first difference at 0" in text
    place = int(prompt.is_vision.nonzero()[0, 0])
    status, text = table(ids[:place] + ids[place + 1 :], tokens, logps)
    count = int(prompt.is_vision.sum())
    assert status == 1 and str(count - 1) in text
    # An endpoint without M-RoPE.
    flat = replace(prompt, positions=torch.arange(len(prompt)).expand(3, -1))
    wrong = rollout(model, own, [flat], 1, greedy)
    tokens, logps = wrong.tokens[0][0].tolist(), wrong.full_logps[0][0].tolist()
    status, text = table(ids, tokens, logps)
    (line,) = [one for one in text.splitlines() if "explains the gap" in one]
    assert status == 1 and "M-RoPE lost" in line
