"""vLLM's OpenAI layer around an engine whose weights change in place.

Requests are checked, run and put into OpenAI's form by vLLM's own serving classes, the ones behind
`vllm serve`. Beside them: one gate, so that an answer is wholly of one version, and weights that
are read from a folder. The engine runs in a process of its own, which ends with this one.
"""

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

from pydantic import ValidationError
from starlette.datastructures import State

from rayrlhf.config import ServeConfig
from rayrlhf.generation import ENVIRONMENT, check_cpu, engine_arguments, parameters
from rayrlhf.serving.answers import Answer, Kind
from rayrlhf.serving.gate import Gate
from rayrlhf.serving.refusals import error_body
from rayrlhf.serving.weights import Live

WORKER = "rayrlhf.serving.worker.FolderWorker"
SERVING = {
    "skip_tokenizer_init": False,
    "generation_config": "auto",  # temperature and the like as the folder has them
    "logprobs_mode": "raw_logprobs",  # what OpenAI's clients and `vllm serve` mean by them
    "worker_extension_cls": WORKER,
}
COALESCE_S = 0.02
"""Events of a stream that come within this time leave together: each way to a client costs."""


class OpenAIEngine:
    """One model with its engine; make it with `start`."""

    def __init__(self, client: Any, state: State, model: str, tied: Mapping[str, str]) -> None:
        self._client, self._state, self._model, self._tied = client, state, model, tied
        self._gate = Gate()
        self._version = ""
        self._is_broken = False

    @classmethod
    async def start(cls, model: str, live: Live, cfg: ServeConfig, *, gpus: float) -> Self:
        """Load a Hugging Face folder; `model` is its name in requests, `gpus` what Ray gave it."""
        os.environ.update(ENVIRONMENT)
        if not gpus:
            check_cpu()
            # Compiling its few functions takes half a minute, and saves nothing on CPUs.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(
            on_gpu=gpus > 0,
            memory_gib=cfg.memory_gib,
            tensor_parallel=max(1, int(gpus)),
            gpu_memory=cfg.gpu_memory,
        )
        engine_args = AsyncEngineArgs(
            model=live.folder,
            served_model_name=[model],
            dtype="float32" if cfg.dtype == "auto" and not gpus else cfg.dtype,
            max_model_len=cfg.max_length,
            # What a chat gets that names no number of tokens, as far as the context has room.
            override_generation_config={"max_new_tokens": cfg.limits.max_tokens},
            **{**arguments, **SERVING},
        )
        client = AsyncLLM.from_engine_args(engine_args)
        await client.collective_rpc("end_with", args=(os.getpid(),))
        if not gpus:
            await client.collective_rpc("yield_cores")
        state = State()
        await init_app_state(
            client,
            state,
            argparse.Namespace(**(vars(FrontendArgs()) | vars(engine_args))),
            supported_tasks=await client.get_supported_tasks(),
        )
        _, tied = parameters(live.folder)
        engine = cls(client, state, model, tied)
        engine._name(live)
        return engine

    def _name(self, live: Live) -> None:
        self._version = live.fingerprint(self._model)
        for serving in (self._state.openai_serving_chat, self._state.openai_serving_completion):
            serving.system_fingerprint = self._version

    @property
    def version(self) -> str:
        """Name of the weights that are live."""
        return self._version

    async def answer(self, kind: Kind, body: dict[str, Any]) -> Answer:
        """Answer a request of OpenAI's form that is not streamed."""
        async with self._gate.answer():
            result = await self._create(kind, body)
            if isinstance(result, Answer):
                return result
            return Answer(200, result.model_dump_json().encode(), self._version)

    async def stream(self, kind: Kind, body: dict[str, Any]) -> AsyncIterator[Answer | str]:
        """Yield an Answer, with a body where it is an error, and then server-sent events."""
        async with self._gate.answer():
            result = await self._create(kind, body)
            if isinstance(result, Answer):
                yield result
                return
            yield Answer(200, b"", self._version)
            async for events in _coalesced(result):
                yield events

    async def _create(self, kind: Kind, body: dict[str, Any]) -> Any:
        """Return vLLM's response or its stream of events; an Answer for what it refuses."""
        from jinja2 import TemplateError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        chat, completion = (
            self._state.openai_serving_chat,
            self._state.openai_serving_completion,
        )
        if not self.is_healthy:
            return self._refuse(503, "the model is being started again: try again soon", None)
        request: Any
        try:
            kinds = {"chat": ChatCompletionRequest, "completion": CompletionRequest}
            request = kinds["chat" if kind == "chat" else "completion"].model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            return self._refuse(422, f"{place}: {first['msg']}" if place else first["msg"], place)
        except Exception as error:  # vLLM's own checks trip over what they do not expect
            return self._refuse(422, f"the request is not valid: {error!r}"[:500], None)
        try:
            if kind == "chat":
                result = await chat.create_chat_completion(request)
            else:
                result = await completion.create_completion(request)
        except EngineDeadError:
            return self._refuse(503, "the model went down while it was answering", None)
        except (ValueError, TypeError, VLLMClientError) as error:
            result = chat.create_error_response(error)
        except (NotImplementedError, OverflowError, TemplateError) as error:
            return self._refuse(422, f"the request cannot be answered: {error}"[:500], None)
        if isinstance(result, ErrorResponse):
            said = result.error
            # What a body asks for in vain is 422 here, whoever finds it.
            return self._refuse(422 if said.code == 400 else said.code, said.message, said.param)
        return result

    def _refuse(self, status: int, message: str, param: str | None) -> Answer:
        return Answer(status, error_body(status, message, param or None), self._version)

    async def load(self, live: Live, wait_s: float) -> str:
        """Replace the weights when all answers that are being made are done; return their name.

        Raises TimeoutError when that takes longer than `wait_s`, and RuntimeError when the folder
        cannot be loaded; the engine then has no whole weights and is not `healthy` any more.
        """
        async with self._gate.change(wait_s):
            try:
                await self._client.collective_rpc("load_folder", args=(live.folder, self._tied))
                if not await self._client.reset_prefix_cache():
                    raise RuntimeError("vLLM did not reset its prefix cache")
            except BaseException:
                self._is_broken = True
                raise
            self._name(live)
        return self._version

    @property
    def is_healthy(self) -> bool:
        """Whether the engine lives and has whole weights; it never gets well again."""
        return not self._is_broken and not self._client.errored

    def give_up(self) -> None:
        """Let the engine count as unhealthy."""
        self._is_broken = True

    def close(self) -> None:
        """End the engine's process."""
        self._client.shutdown()


async def _coalesced(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the events of a stream, joined where they come within COALESCE_S of each other."""
    queue: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async for event in events:
                queue.put_nowait(event)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    task = asyncio.create_task(pump())
    try:
        while True:
            found = [await queue.get()]
            if found[0] is not None:
                await asyncio.sleep(COALESCE_S)
            while not queue.empty():
                found.append(queue.get_nowait())
            text = "".join(item for item in found if isinstance(item, str))
            if text:
                yield text
            last = found[-1]
            if isinstance(last, BaseException):
                raise last
            if last is None:
                return
    finally:
        task.cancel()
