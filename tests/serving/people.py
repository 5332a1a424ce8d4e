"""People and what they judge: items, a section of the recipe, clients of the page."""

from fastapi.testclient import TestClient

from rayrlhf.config import ArenaConfig, LabelConfig
from rayrlhf.config.label import PromptFormat
from rayrlhf.serving.api import create_app
from rayrlhf.serving.arena import Reply, Silent
from rayrlhf.serving.store import Store

SECRET = "correct horse battery"
PEOPLE = ("Ann", "Bob", "Cem")
RESPONSES = ("one", "two", "three", "four", "five", "six")


def items(count: int, num_responses: int = 6) -> list[dict[str, object]]:
    return [
        {
            "prompt": f"Prompt {i}",
            "responses": [f"{word} {i}" for word in RESPONSES[:num_responses]],
            "source": "toy",
        }
        for i in range(count)
    ]


def section(**changes: object) -> LabelConfig:
    return LabelConfig.model_validate(
        {"labellers": PEOPLE, "items": "items.jsonl", "overlap": 1.0, **changes}
    )


async def echo(model: str, prompt: str, seed: int) -> Reply:
    """Answer like a model that repeats the prompt, can't take long ones and may be away."""
    if prompt == "silence":
        raise Silent("a model does not answer now (ActorDiedError): ask again in a while")
    if len(prompt) > 1000:
        return Reply("", f"the prompt has {len(prompt)} tokens, but 1000 fit: shorten it")
    return Reply(f"{prompt}: an answer of the model called {model[::-1]}")


def anonymous(
    store: Store, *, prompt_format: PromptFormat = "text", **changes: object
) -> TestClient:
    models = {"sft": "a", "ppo": "b", "base": "c"}
    arena = ArenaConfig(models=models, prompt_format=prompt_format)
    return TestClient(create_app(store, section(arena=arena, **changes), SECRET, echo))


def sign_in(client: TestClient, name: str) -> None:
    answer = client.post("/api/session", json={"name": name, "secret": SECRET})
    assert answer.status_code == 200, answer.text
