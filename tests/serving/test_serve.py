"""`rayrlhf serve` itself: OpenAI's client, new weights under load, a killed engine, a followed run.

One endpoint for all tests, with two engines: `a`, and the stage `ppo` of the run, which it follows.
"""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayrlhf.data.records import read_records
from rayrlhf.data.tokenizer import encode_text
from rayrlhf.models.scalar_head import ScalarHeadModel, last_scores
from rayrlhf.training import checkpoint
from tests import toy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKEN = "correct horse battery"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "The movie"}]
PROMPT, TOKENS = "The film is", 16


def write_policy(source: Path, folder: Path, seed: int) -> Path:
    """Write a random model of the shape of `source`, which says something of its own."""
    shutil.copytree(source, folder)
    config = AutoModelForCausalLM.from_pretrained(source).config
    config.initializer_range = 0.3
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_reward(source: Path, folder: Path) -> Path:
    model = ScalarHeadModel.from_causal_lm(source, seed=3)
    model.shift = 0.25
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def greedy(folder: Path, prompt: str, tokens: int = TOKENS) -> tuple[str, list[float]]:
    """Return what transformers generates, and the log-probs of its tokens, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    done = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    with torch.no_grad():
        logits = model(done).logits.log_softmax(-1)
    start = ids.shape[1]
    new = done[0, start:]
    found = logits[0, start - 1 : -1].gather(1, new[:, None])[:, 0]
    return whole(tokenizer.decode(new, skip_special_tokens=True)), found.tolist()


def whole(text: str) -> str:
    """Leave out the half of a character that a text may end with."""
    return text.rstrip("\ufffd")


class Server:
    """`rayrlhf serve` in a process of its own."""

    def __init__(self, folder: Path, port: int, policies: dict[str, Path]) -> None:
        self.url, self.policies, self.run = f"http://127.0.0.1:{port}", policies, folder / "run"
        self.process = subprocess.Popen(
            toy.command("serve", "--follow", self.run / "ppo", f"serve.port={port}"),
            env={**toy.environment(), "RAYRLHF_SERVE_TOKEN": TOKEN},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # What a shell starts in the background ignores Ctrl-C, and so do its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stdout is not None
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if "Ctrl-C" in line:
                break
        assert "Ctrl-C" in self.said, self.said
        self.http = httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60
        )
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=60
        )
        self.until(lambda: self.http.get("/healthz").status_code == 200)

    def until(self, holds: Any, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it does not become true"
            time.sleep(0.1)

    def load(self, model: str, policy: str) -> dict[str, Any]:
        body = {"folder": str(self.policies[policy]), "model": model}
        answer = self.http.post("/admin/weights", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def live(self, model: str) -> dict[str, Any]:
        found = self.http.get("/admin/weights").json()
        return next(each for each in found if each["model"] == model)

    def engine_of(self, model: str) -> tuple[psutil.Process, list[psutil.Process]]:
        """Return the replica of a model, and the processes of its engine."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = [p for p in children if f":{model}-0" in " ".join(p.cmdline())]
        assert len(found) == 1, [p.cmdline() for p in children]
        return found[0], found[0].children(recursive=True)

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        rest, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, self.said + rest
        self.said += rest

    def kill(self) -> None:
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    policies = {name: write_policy(tiny_model, folder / name, i) for i, name in enumerate("ab")}
    run = folder / "run"
    place = checkpoint.begin(run / "ppo", 1)
    shutil.copytree(policies["a"], place, dirs_exist_ok=True)
    checkpoint.commit(place)
    tree = {
        "name": "toy",
        "run_dir": "elsewhere",  # where --follow finds the run counts
        "serve": {
            "models": {"a": {"path": str(policies["a"])}},
            "reward": str(write_reward(tiny_model, folder / "reward")),
            "memory_gib": 0.05,
            "votes": True,
            "limits": {"max_tokens": 48, "timeout_s": 30},
        },
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Server(folder, port, policies)
    try:
        yield found
        found.close()
    finally:
        found.kill() if found.process.poll() is None else None


def test_openais_client_chats(server: Server) -> None:
    assert TOKEN not in server.said and f"{server.url}/v1" in server.said
    assert [model.id for model in server.openai.models.list()] == ["toy", "a", "ppo"]
    text, log_probs = greedy(server.policies["a"], "user: The movie\n")
    done = server.openai.chat.completions.create(
        model="a", messages=CHAT, max_tokens=TOKENS, temperature=0, logprobs=True, top_logprobs=2
    )
    assert whole(done.choices[0].message.content or "") == text
    assert done.model == "a" and done.system_fingerprint == server.live("a")["fingerprint"]
    found = done.choices[0].logprobs
    assert found is not None and found.content is not None
    assert [each.logprob for each in found.content] == pytest.approx(log_probs, abs=1e-4)
    assert all(len(each.top_logprobs) == 2 for each in found.content)
    stream = server.openai.chat.completions.create(
        model="a", messages=CHAT, max_tokens=TOKENS, temperature=0, stream=True
    )
    assert whole("".join(part.choices[0].delta.content or "" for part in stream)) == text


def test_openais_client_completes(server: Server) -> None:
    text, log_probs = greedy(server.policies["a"], PROMPT)
    done = server.openai.completions.create(
        model="a", prompt=PROMPT, max_tokens=TOKENS, temperature=0, logprobs=1
    )
    assert whole(done.choices[0].text) == text and done.choices[0].logprobs is not None
    assert done.choices[0].logprobs.token_logprobs == pytest.approx(log_probs, abs=1e-4)
    parts = server.openai.completions.create(
        model="a", prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
    )
    assert whole("".join(part.choices[0].text for part in parts)) == text
    several = server.openai.completions.create(model="a", prompt=[PROMPT] * 3, max_tokens=2, n=2)
    assert len(several.choices) == 6


def test_openais_client_sees_errors(server: Server) -> None:
    ask = server.openai.chat.completions.create
    stranger = server.openai.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError, match="token is missing or wrong"):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        ask(model="gpt-4", messages=CHAT)
    for changes, param in (
        ({"max_tokens": 49}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"messages": [{"role": "user", "content": "The movie " * 60}]}, None),
        ({"messages": []}, None),
        ({"top_logprobs": 50, "logprobs": True}, "logprobs"),
    ):
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ask(**{"model": "a", "messages": CHAT, **changes})
        assert param is None or param in str(caught.value.param)
    with pytest.raises(openai.APIStatusError) as long:
        ask(model="a", messages=[{"role": "user", "content": "x" * 1_000_001}])
    assert long.value.status_code == 413
    for wrong in ({"messages": 3}, {"prompt": {}}, {"prompt": None}, {"logit_bias": {"x": 1}}):
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = server.http.post(path, json={"model": "a", **wrong})
            assert answer.status_code == 422, answer.text
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_scores_are_those_of_the_reward_model(server: Server) -> None:
    folder = server.run.parent / "reward"
    model, tokenizer = (
        ScalarHeadModel.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    prompt, responses = "The movie", [" is good.", " is a bad one, and long.", ""]
    chat = [{"role": "user", "content": prompt}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for asked, before in ((prompt, prompt), (chat, rendered)):
        wanted = []
        for text in responses:
            start = tokenizer.encode(before, add_special_tokens=False)
            row = torch.tensor([[*start, *encode_text(tokenizer, text), tokenizer.eos_token_id]])
            with torch.no_grad():
                outputs = model(row, torch.ones_like(row))
            wanted.append(float(last_scores(outputs, torch.tensor([row.shape[1]]))))
        answer = server.http.post("/v1/score", json={"prompt": asked, "responses": responses})
        assert answer.json()["scores"] == pytest.approx(wanted, abs=1e-5)
    last = [{"role": "assistant", "content": "x"}]
    said = server.http.post("/v1/score", json={"prompt": last, "responses": ["a"]})
    assert said.status_code == 422 and "must be from user" in said.json()["error"]["message"]
    long = {"prompt": prompt, "responses": ["a film " * 100]}
    refused = server.http.post("/v1/score", json=long)
    assert refused.status_code == 422 and "64" in refused.json()["error"]["message"]


def test_new_weights_under_load_mix_nothing(server: Server) -> None:
    """8 clients, streamed and not; every answer is wholly that of the version it names."""
    texts = {name: greedy(server.policies[name], PROMPT)[0] for name in "ab"}
    assert texts["a"] != texts["b"]
    first = int(server.live("a")["version"])
    done = threading.Event()
    wrong: list[object] = []
    seen: dict[str, int] = {}

    def ask(stream: bool) -> None:
        body = {
            "model": "a",
            "prompt": PROMPT,
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": stream,
        }
        with httpx.Client(base_url=server.url, headers=server.http.headers, timeout=60) as http:
            while not done.is_set():
                answer = http.post("/v1/completions", json=body)
                version = answer.headers.get("x-rayrlhf-version", "")
                if answer.status_code != 200:
                    wrong.append((answer.status_code, answer.text))
                    continue
                text = _streamed(answer.text) if stream else answer.json()["choices"][0]["text"]
                number = int(version.split("-")[1].removeprefix("v"))
                seen[version] = seen.get(version, 0) + 1
                if whole(text) != texts["ab"[(number - first) % 2]]:
                    wrong.append((version, text))

    clients = [threading.Thread(target=ask, args=(i % 2 == 0,), daemon=True) for i in range(8)]
    for client in clients:
        client.start()
    versions = [server.live("a")["fingerprint"]]
    for reload in range(6):
        time.sleep(0.5)
        versions.append(server.load("a", "ba"[reload % 2])["fingerprint"])
    time.sleep(0.5)
    done.set()
    for client in clients:
        client.join(60)
    assert wrong == []
    assert set(seen) == set(versions) and len(set(versions)) == 7 and sum(seen.values()) > 50


def _streamed(events: str) -> str:
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


def test_a_followed_run_goes_live(server: Server) -> None:
    before = server.live("ppo")
    place = checkpoint.begin(server.run / "ppo", 2)
    shutil.copytree(server.policies["b"], place, dirs_exist_ok=True)
    new = checkpoint.commit(place, keep=1)
    server.until(lambda: server.live("ppo")["version"] == before["version"] + 1)
    shutil.rmtree(new)  # as a later checkpoint does to it
    text, _ = greedy(server.policies["b"], PROMPT)
    done = server.openai.completions.create(
        model="ppo", prompt=PROMPT, max_tokens=TOKENS, temperature=0
    )
    assert whole(done.choices[0].text) == text
    assert done.system_fingerprint == server.live("ppo")["fingerprint"]


def test_users_meet_one_version_each_and_vote(server: Server) -> None:
    def ask(**body: Any) -> Any:
        raw = server.openai.chat.completions.with_raw_response.create(
            **{"model": "toy", "messages": CHAT, "max_tokens": 4, **body}
        )
        return raw.headers["x-rayrlhf-model"], raw.parse().id

    met = {user: {ask(user=user)[0] for _ in range(2)} for user in map(str, range(12))}
    assert all(len(models) == 1 for models in met.values())
    assert set().union(*met.values()) == {"a", "ppo"}
    pair = [ask(model=model, stop=None)[1] for model in ("a", "ppo")]
    body = {"completions": pair, "winner": pair[0], "user": "ann"}
    said = [server.http.post("/v1/votes", json=body).json() for _ in range(2)]
    assert [each["counted_before"] for each in said] == [False, True]


def test_the_engine_lets_the_ways_to_it_go_first(server: Server) -> None:
    replica, engine = server.engine_of("a")
    threads = [thread.id for process in engine for thread in process.threads()]
    niceness = Counter(os.getpriority(os.PRIO_PROCESS, thread) for thread in threads)
    # Helpers that end with Python's resource tracker stay as they were.
    assert niceness[19] > len(threads) / 2, niceness
    assert replica.nice() < 19 or os.nice(0) > 3  # Ray adds 15 to this process's own


def test_a_killed_engine_comes_back_with_what_was_live(server: Server) -> None:
    live = server.load("a", "b")
    text, _ = greedy(server.policies["b"], PROMPT)
    replica, engine = server.engine_of("a")
    assert engine, "the engine has a process of its own"
    body = {"model": "a", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    replica.kill()
    codes: set[int] = set()
    end = time.monotonic() + 300
    while True:
        started = time.monotonic()
        answer = server.http.post("/v1/completions", json=body)
        assert time.monotonic() - started < 10 and time.monotonic() < end
        codes.add(answer.status_code)
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "unavailable"
        elif codes == {200, 503}:
            break
        # The other model answers meanwhile.
        other = server.http.post("/v1/completions", json={**body, "model": "ppo"})
        assert other.status_code == 200, other.text
        time.sleep(0.2)
    assert whole(answer.json()["choices"][0]["text"]) == text
    assert answer.headers["x-rayrlhf-version"] == live["fingerprint"]
    assert not any(process.is_running() for process in engine)


def test_votes_are_written_when_it_closes(server: Server) -> None:
    server.close()
    file = server.run / "label" / "arena.comparisons.jsonl"
    (record,) = read_records(file, "comparison")
    assert record["prompt"] == "The movie" and record["labellers"] == ["ann"]
    best = record["models"][record["ranks"].index(1)]
    assert best.startswith("a-v")


def test_a_token_is_made_once_and_kept_private(tmp_path: Path) -> None:
    from rayrlhf.serving.serve import TOKEN as FILE
    from rayrlhf.serving.sessions import load_secret

    made, fresh = load_secret(tmp_path, "RAYRLHF_NOT_SET", FILE)
    assert fresh and load_secret(tmp_path, "RAYRLHF_NOT_SET", FILE) == (made, False)
    assert stat.S_IMODE(os.stat(tmp_path / FILE).st_mode) == 0o600
