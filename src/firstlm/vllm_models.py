# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Routed models for vLLM: its own Llama, and any model of its Transformers backend.

Loaded by vLLM alone (`vllm_plugin.register`). The loop over layers is never compiled: traced once,
it would hold the first batch's masks for good. Llama's layers are compiled one by one instead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from firstlm.layers import LIST_NAMES
from firstlm.vllm_folder import RETURNS, choices_in, prefill_of
from firstlm.vllm_routing import LayerRouting
from firstlm.vllm_wishes import Decisions


def routing_of(config: VllmConfig, layers: Any) -> LayerRouting:
    """Return what routes a model's layers by the artifact in its folder."""
    choices = choices_in(config.model_config)
    device = torch.device(config.device_config.device or "cpu")
    choices.routers.to(device).requires_grad_(False)
    agree = _as_rank_0 if config.parallel_config.tensor_parallel_size > 1 else None
    return LayerRouting(
        Decisions(choices, prefill_of(config.model_config.hf_config), agree), list(layers), device
    )


def _as_rank_0(answer: torch.Tensor) -> torch.Tensor:
    """Return rank 0's answer [prompts] on every rank."""
    return get_tp_group().broadcast(answer.float().contiguous(), src=0)


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0, "residual": 0})
class _CompiledLayer(LlamaDecoderLayer):
    """A layer as a unit of compilation of its own."""


class RoutedLlamaLayer(_CompiledLayer):
    """A Llama layer that runs for just the requests that keep it."""

    routing: LayerRouting | None = None

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.layer = extract_layer_index(prefix)

    def __call__(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer; see `LayerRouting.fused`."""
        run = super().__call__
        assert self.routing is not None
        return self.routing.fused(self.layer, run, positions, hidden_states, residual)


class FirstLlamaForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with routers."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=RoutedLlamaLayer)
        self.model.do_not_compile = True
        self.first_routing = routing_of(vllm_config, self.model.layers)
        for layer in self.model.layers:
            layer.routing = self.first_routing


class FirstTransformersForCausalLM(TransformersForCausalLM):
    """Any model of vLLM's Transformers backend with routers; its layers run eagerly."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        decoder: Any = self.model.get_decoder()
        layers = next(
            found
            for name in LIST_NAMES
            if isinstance(found := getattr(decoder, name, None), nn.ModuleList)
        )
        self.first_routing = routing_of(vllm_config, layers)
        sizes = getattr(vllm_config.model_config.hf_config, RETURNS)
        for i, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
            layer.forward = partial(self.first_routing.packed, i, size, layer.forward)

    def _decorate_for_torch_compile(self) -> None:
        """Compile nothing."""
