# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The vLLM plugin (entry point `vllm.general_plugins`): artifacts as models, masks by request.

vLLM calls `register` in each of its processes. What has no hook in vLLM is wrapped there, and does
nothing for models that are not ours.
"""

from __future__ import annotations

import inspect
import json
import os
import uuid
import warnings
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import wraps
from typing import Any

from firstlm.errors import ConfigError, FirstWarning
from firstlm.vllm_folder import ARCHITECTURES, choices_in, folder_for, is_artifact, prefill_of

REPORT = "first"  # name, in an answer's kv_transfer_params, of which layers ran
PRIVATE = "first-private"  # begins the salt of requests that share nothing with others
MADE = "first_made"  # attribute of a step's output: request id -> layers that run


def register() -> None:
    """Make vLLM know our models; may be called any number of times."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models import config as model_configs

    if ARCHITECTURES[0] in model_configs.MODELS_CONFIG_MAP:
        return
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"firstlm.vllm_models:{name}")
        model_configs.MODELS_CONFIG_MAP[name] = _Config  # type: ignore[assignment]
    _wrap_engine()
    _wrap_requests()
    _wrap_runner()
    _wrap_scheduler()
    _wrap_streams()


class _Config:
    """What vLLM's own settings must be for a routed model."""

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """Refuse what would drop or mix masks, and switch off what would chunk prompts."""
        parallel, scheduler = config.parallel_config, config.scheduler_config
        barred = {
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "speculative decoding": config.speculative_config is not None,
            "LoRA requests (an artifact's own LoRA is merged)": config.lora_config is not None,
            "dual batch overlap": getattr(parallel, "enable_dbo", False),
            "context parallelism": any(
                getattr(parallel, f"{part}_context_parallel_size", 1) > 1
                for part in ("prefill", "decode")
            ),
            "KV transfer (routers read whole prompts)": config.kv_transfer_config is not None,
        }
        if found := [what for what, asked in barred.items() if asked]:
            raise ConfigError(f"The FiRST plugin does not go with {', '.join(found)}.")
        from vllm.config import CUDAGraphMode

        # A captured step would replay the masks of the batch that it was captured with.
        config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # masks ride on the first model runner
        if prefill_of(config.model_config.hf_config) == "skip":
            scheduler.enable_chunked_prefill = False
            scheduler.long_prefill_token_threshold = 0  # chunks prompts all the same
            length = config.model_config.max_model_len
            scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, length)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Change nothing."""


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function around a method."""
    before = getattr(owner, name)
    setattr(owner, name, wraps(before)(make(before)))


def _ours(config: Any) -> bool:
    """Whether vLLM's model config is of one of our models."""
    return bool(set(config.model_config.architectures or ()) & set(ARCHITECTURES))


def _wrap_engine() -> None:
    """Let an artifact stand for the folder that is made of it."""
    from vllm.engine import arg_utils

    def create(before: Callable[..., Any]) -> Callable[..., Any]:
        def create_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            if is_artifact(self.model):
                name, dtype = self.model, str(self.dtype).removeprefix("torch.")
                self.model = str(folder_for(name, dtype))
                self.served_model_name = self.served_model_name or name
                if self.tokenizer == name:
                    self.tokenizer = None
            return before(self, *args, **kwargs)

        return create_config

    def path(before: Callable[..., Any]) -> Callable[..., Any]:
        def get_model_path(model: Any, *args: Any, **kwargs: Any) -> Any:
            return model if is_artifact(str(model)) else before(model, *args, **kwargs)

        return get_model_path

    # The first looks names up in a hub, offline its cache; the second may be called by itself.
    for name in ("create_engine_config", "create_model_config"):
        _wrap(arg_utils.EngineArgs, name, create)
    _wrap(arg_utils, "get_model_path", path)


def _wrap_requests() -> None:
    """Check what requests ask for where they are admitted, and keep masks apart in the cache."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    from firstlm.vllm_wishes import wish

    def process(before: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = before(self, *args, **kwargs)
            if not _ours(self) or request.sampling_params is None:
                return request
            if not hasattr(self, "first_choices"):
                self.first_choices = choices_in(self.model_config)
            prefill = prefill_of(self.model_config.hf_config)
            try:
                found = wish(request.sampling_params.extra_args, self.first_choices, prefill)
            except ConfigError as error:
                raise VLLMValidationError(str(error)) from error
            request.cache_salt = f"{found.salt or PRIVATE} {request.cache_salt or ''}"
            return request

        return process_inputs

    def add(before: Callable[..., Any]) -> Callable[..., Any]:
        def preprocess_add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            # Here, as a request for several answers is copied in between.
            if _ours(self.vllm_config) and (request.cache_salt or "").startswith(PRIVATE):
                request.cache_salt = request.cache_salt.replace(PRIVATE, uuid.uuid4().hex, 1)
            return before(self, request, *args, **kwargs)

        return preprocess_add_request

    def beams(before: Callable[..., Any]) -> Callable[..., Any]:
        def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
            engine = getattr(self, "llm_engine", None) or self.engine_client
            if _ours(engine.vllm_config):
                # It asks anew for each token, without what was asked for.
                raise VLLMValidationError("Beam search is not served with skipped layers.")
            return before(self, *args, **kwargs)

        return beam_search

    _wrap(InputProcessor, "process_inputs", process)
    _wrap(EngineCore, "preprocess_add_request", add)
    for owner in (BeamSearchOfflineMixin, BeamSearchOnlineMixin):
        _wrap(owner, "beam_search", beams)


def _wrap_runner() -> None:
    """Tell the model which requests a step is of, and the scheduler what was decided."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def routing(runner: Any) -> Any:
        return getattr(getattr(runner, "model", None), "first_routing", None)

    def builders(before: Callable[..., Any]) -> Callable[..., Any]:
        def initialize_metadata_builders(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = before(self, *args, **kwargs)
            if routing(self) is not None:
                routing(self).watch([group for groups in self.attn_groups for group in groups])
            return found

        return initialize_metadata_builders

    def forward(before: Callable[..., Any]) -> Callable[..., Any]:
        def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if routing(self) is None:
                return before(self, *args, **kwargs)
            with routing(self).step(_rows(self, routing(self).decisions)):
                return before(self, *args, **kwargs)

        return _model_forward

    def removed(before: Callable[..., Any]) -> Callable[..., Any]:
        def _on_request_state_removed(self: Any, req_id: str, *args: Any, **kwargs: Any) -> Any:
            if routing(self) is not None:
                routing(self).decisions.forget(req_id)
            return before(self, req_id, *args, **kwargs)

        return _on_request_state_removed

    def sampled(before: Callable[..., Any]) -> Callable[..., Any]:
        def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = before(self, *args, **kwargs)
            if routing(self) is not None and output is not None:
                whole = getattr(output, "_model_runner_output", output)  # of a step still under way
                if getattr(whole, "req_ids", None):
                    made = routing(self).decisions.made
                    setattr(whole, MADE, {req: made(req) for req in whole.req_ids})
            return output

        return sample_tokens

    _wrap(GPUModelRunner, "initialize_metadata_builders", builders)
    _wrap(GPUModelRunner, "_model_forward", forward)
    _wrap(GPUModelRunner, "_on_request_state_removed", removed)
    _wrap(GPUModelRunner, "sample_tokens", sampled)


def _rows(runner: Any, decisions: Any) -> list[Any]:
    """Return the requests of the step that a runner has prepared."""
    from firstlm.vllm_routing import Row

    batch = runner.input_batch
    starts = runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
    rows = []
    for i, request in enumerate(batch.req_ids[: batch.num_reqs]):
        known = runner.requests[request]
        extra: Mapping[str, Any] | None = known.sampling_params and known.sampling_params.extra_args
        length = int(batch.num_prompt_tokens[i])
        state = decisions.of(request, extra, known.prompt_token_ids, length)
        tokens = starts[i + 1] - starts[i]
        rows.append(Row(state, starts[i], tokens, int(batch.num_computed_tokens_cpu[i])))
    return rows


def _wrap_scheduler() -> None:
    """Say in an answer which layers its request ran.

    Every output says it: whether one is the last, vLLM knows only where it reads the text.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    def update(before: Callable[..., Any]) -> Callable[..., Any]:
        def update_from_output(self: Any, scheduled: Any, output: Any, *args: Any) -> Any:
            found = before(self, scheduled, output, *args)
            made = getattr(output, MADE, {})
            for outputs in found.values():
                for one in outputs.outputs:
                    keep = made.get(one.request_id)
                    if keep is not None:
                        report = {"keep": keep, "skip_rate": 1 - sum(keep) / len(keep)}
                        one.kv_transfer_params = {**(one.kv_transfer_params or {}), REPORT: report}
            return found

        return update_from_output

    _wrap(Scheduler, "update_from_output", update)


def _wrap_streams() -> None:
    """Say the same in streams of completions and chats: in the chunk that ends an answer."""
    try:
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
        from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    except ImportError as error:
        text = f"Streams do not say which layers ran: {error}."
        warnings.warn(text, FirstWarning, stacklevel=2)
        return
    _wrap(OpenAIServingChat, "chat_completion_stream_generator", streamed)
    _wrap(OpenAIServingCompletion, "completion_stream_generator", streamed)


def streamed(before: Callable[..., AsyncGenerator[str]]) -> Callable[..., AsyncGenerator[str]]:
    """Put reports into what one of vLLM's functions streams.

    Args:
        before: takes `result_generator`, of outputs or of (prompt, output), and yields server-sent
            events; those of an output come before the next one is taken.
    """
    signature = inspect.signature(before)

    async def events(*args: Any, **kwargs: Any) -> AsyncGenerator[str]:
        report: Any = None

        async def noted(results: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
            nonlocal report
            async with aclosing(results):
                async for result in results:
                    output = result[1] if isinstance(result, tuple) else result
                    ends = any(one.finish_reason for one in output.outputs)
                    report = (output.kv_transfer_params or {}).get(REPORT) if ends else None
                    yield result

        bound = signature.bind(*args, **kwargs)
        results = noted(bound.arguments["result_generator"])
        bound.arguments["result_generator"] = results
        # Closed with the stream, so that vLLM drops a request whose client has gone.
        async with aclosing(results), aclosing(before(*bound.args, **bound.kwargs)) as inner:
            async for event in inner:
                yield event if report is None else _with_report(event, report)

    return events


def _with_report(event: str, report: Mapping[str, Any]) -> str:
    """Return a server-sent event with a report in it, if it ends an answer."""
    if not event.startswith("data: {"):
        return event
    body = json.loads(event.removeprefix("data: "))
    if not any(choice.get("finish_reason") for choice in body.get("choices") or ()):
        return event
    body["kv_transfer_params"] = {**(body.get("kv_transfer_params") or {}), REPORT: report}
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
