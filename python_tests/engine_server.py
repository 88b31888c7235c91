"""A server with the recorded protocol of vLLM 0.32, answering by our own rollout."""

import base64
import copy
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file

from vcr1_fast.model.rollout import SamplingConfig, rollout

DTYPES = {"float32": np.float32, "float64": np.float64, "int64": np.int64}


def decoded(item):
    """The tensors of a message-packed item, by name."""
    raw = msgspec.msgpack.decode(
        base64.b64decode(item), ext_hook=lambda code, data: (code, bytes(data))
    )
    found = {}
    for name, value in raw.items():
        dtype, shape, (code, data) = value["data"]
        assert code == 3
        found[name] = torch.from_numpy(np.frombuffer(data, DTYPES[dtype]).reshape(shape).copy())
    return found


class State:
    """A separate model under a weight version; `calls`: paths in order; `requests`: bodies of
    generate; `prompts`: what is answered, since a request holds no positions."""

    def __init__(self, model, processor):
        self.model, self.processor = copy.deepcopy(model), processor
        self.version, self.calls, self.requests, self.prompts = "none", [], [], []
        self.dropped, self.missing, self.replies = (), [], {}
        self.lock = threading.Lock()

    def generate(self, body):
        self.requests.append(body)
        (prompt,) = [p for p in self.prompts if p.input_ids.tolist() == body["token_ids"]][:1]
        features = None
        if "features" in body:
            kinds = body["features"]["kwargs_data"]
            parts = [(kind, decoded(one)) for kind, items in kinds.items() for one in items]
            features = torch.cat([part[f"{kind}_embeds"] for kind, part in parts])
        said = body["sampling_params"]
        sampling = SamplingConfig(
            temperature=said["temperature"],
            top_p=said["top_p"],
            top_k=said["top_k"],
            max_new_tokens=said["max_tokens"],
            stop=tuple(said["stop"]),
        )
        seed = torch.Generator().manual_seed(said["seed"])
        with self.lock:
            got = rollout(
                self.model, self.processor, [prompt], said["n"], sampling, seed, vision=[features]
            )
        return {
            "prompt_token_ids": body["token_ids"],
            "choices": [
                {
                    "index": i,
                    "token_ids": got.tokens[0][i].tolist(),
                    "finish_reason": "stop" if got.finished[0][i] else "length",
                    "logprobs": {
                        "content": [
                            {"token_id": t, "logprob": p}
                            for t, p in zip(
                                got.tokens[0][i].tolist(),
                                got.full_logps[0][i].tolist(),
                                strict=True,
                            )
                        ]
                    },
                    "weight_versions": [{"version": self.version, "start": 0, "end": 1}],
                }
                for i in reversed(range(said["n"]))  # any order
            ],
        }

    def update(self, body):
        for name, tensor in load_file(body["update_info"]["path"]).items():
            if name not in self.dropped:
                with torch.no_grad():
                    self.model.get_parameter(name).copy_(tensor)

    def answer(self, path, body):
        self.calls.append(path)
        if path in self.replies:
            return self.replies[path]
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/update_weights":
            self.update(body)
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
        if path == "/collective_rpc":
            return {"results": [self.missing]}
        return {"version": "0.32.0"} if path == "/version" else {}


@contextmanager
def serving(state):
    """The address at which the state answers."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            try:
                answer, status = state.answer(self.path, body), 200
            except Exception as error:
                answer, status = {"error": repr(error)}, 500
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = reply

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
