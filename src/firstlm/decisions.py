# SPDX-License-Identifier: Apache-2.0
"""The decisions of one batch: which layers each of its prompts runs, and how that came about."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from firstlm.errors import ConfigError, FirstError
from firstlm.policies import Policy, SteppedPolicy


class PromptStates:
    """View of the prompts in a batch at one layer; what policies look at."""

    def __init__(self, mean: torch.Tensor, batch: RoutingState, missed: int) -> None:
        self.count = len(mean)
        self._mean, self._batch, self._missed = mean, batch, missed

    @property
    def mean(self) -> torch.Tensor:
        """Mean over each prompt's own tokens [prompts, hidden], float32."""
        if self._missed:
            raise FirstError(
                f"A layer is to be decided from whole prompts, and {self._missed} of their tokens "
                "never entered it: they came out of a cache."
            )
        return self._mean

    @property
    def keys(self) -> list[int]:
        """A number per prompt that depends on its tokens alone."""
        return self._batch.keys

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each prompt [prompts]."""
        return self._batch.lengths


class RoutingState:
    """The decisions of one batch, and how they came about.

    Args:
        policy: decides for each layer when the prompt first reaches it.
        prompt_mask: [prompts, tokens] bool, True on the prompt's own tokens: no padding, no answer.
        layers: number of layers.
        prefill: "skip" (a skipped layer does not run the prompt either) or "full".
        gate: "hard" (skip for real), or "straight_through" / "soft" to train routers.
        locked: layers that always run.
        prompt_ids: [prompts, tokens], for policies that draw by prompt.
        unit: what is switched; where that is mlp, attention stores every row.
    """

    def __init__(
        self,
        policy: Policy,
        prompt_mask: torch.Tensor,
        layers: int,
        prefill: str = "skip",
        gate: str = "hard",
        locked: frozenset[int] = frozenset(),
        prompt_ids: torch.Tensor | None = None,
        unit: str = "block",
    ) -> None:
        self.policy = policy
        self.unit = unit
        self.stepped = policy if isinstance(policy, SteppedPolicy) else None
        self.prompt_ids = prompt_ids
        self._keys: list[int] | None = None
        self._steps: torch.Tensor | None = None
        self.prompt_mask = prompt_mask.bool()
        self.prompt_length = prompt_mask.shape[1]
        self.layers = layers
        self.prefill = prefill
        self.gate = gate
        self.locked = locked
        self.traced = False
        self._padded = not bool(self.prompt_mask.all())
        self._lengths = self.prompt_mask.sum(1, keepdim=True).clamp_min(1)
        self.reset()

    def reset(self) -> None:
        """Forget all decisions."""
        self.scores: list[torch.Tensor | None] = [None] * self.layers
        self.layer_calls = {"prefill": 0, "decode": 0}
        self.row_count = 0
        self.in_prefill = True
        self.first_token_at: float | None = None
        # Plain bools: a tensor operation on a handful of rows costs more than it computes.
        self._keep: list[list[bool] | None] = [None] * self.layers
        self._row_keep: list[list[bool] | None] = [None] * self.layers
        self._rows: list[torch.Tensor | None] = [None] * self.layers
        self._means: list[torch.Tensor | None] = [None] * self.layers
        self._pooled = [0] * self.layers  # tokens of the prompt that the means hold
        self._missed = [0] * self.layers  # tokens of it that never came

    def begin(self, prompt_length: int) -> None:
        """Count a further call that starts with `prompt_length` tokens; decisions stay."""
        self.prompt_length = prompt_length
        self.layer_calls = {"prefill": 0, "decode": 0}
        self.first_token_at = None

    @property
    def keep(self) -> torch.Tensor:
        """[prompts, layers] bool, True = the layer runs. Complete after prefill."""
        if not self.complete:
            raise ConfigError("The prompt has not passed all layers yet, so there is no mask.")
        return torch.tensor(self._keep).T

    @property
    def complete(self) -> bool:
        """Whether every layer has been decided."""
        return all(keep is not None for keep in self._keep)

    @property
    def rho(self) -> torch.Tensor | None:
        """[prompts, layers] router outputs with gradient, or None where no router decided."""
        if any(score is None for score in self.scores):
            return None
        return torch.sigmoid(torch.stack([s.float() for s in self.scores if s is not None], dim=1))

    @property
    def keys(self) -> list[int]:
        """A number per prompt from its token ids: the same alone, in a batch and padded."""
        if self._keys is None:
            if self.prompt_ids is None:
                raise ConfigError("This policy draws by prompt; give new_state the input_ids.")
            mask = self.prompt_mask.to(self.prompt_ids.device)
            rows = zip(self.prompt_ids, mask, strict=True)
            self._keys = [prompt_key(ids[real].tolist()) for ids, real in rows]
        return self._keys

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each prompt [prompts], padding left out."""
        return self._lengths.squeeze(1)

    def decided(self, layer: int) -> bool:
        """Whether the layer's decision has been taken."""
        return self._keep[layer] is not None

    def rows(self, layer: int) -> torch.Tensor | None:
        """Indices of the rows that run the layer; None where all do."""
        return self._rows[layer]

    def stored_rows(self, layer: int) -> torch.Tensor | None:
        """Indices of the rows whose keys and values the layer stores; None where all are."""
        return None if self.unit == "mlp" else self._rows[layer]

    def row_keep(self, layer: int) -> list[bool]:
        """Which rows run the layer."""
        keep = self._row_keep[layer]
        assert keep is not None, "read before the layer was decided"
        return keep

    def observe(self, layer: int, hidden: torch.Tensor, first: int) -> bool:
        """Pool a (chunk of a) prompt that enters a layer; True once the prompt is whole.

        Args:
            layer: index of the layer.
            hidden: [rows, tokens, hidden], starting at token `first` of the padded prompt.
            first: tokens of the prompt that passed this layer before.
        """
        prompts, length = self.prompt_mask.shape
        if self.row_count == 0:
            self.row_count = hidden.shape[0]
        last = first + hidden.shape[1]
        self._missed[layer] += max(first - self._pooled[layer], 0)  # no matter to fixed masks
        begin = max(first, self._pooled[layer])  # what is read anew, after a preemption, is known
        if begin < last:
            part = hidden[:, begin - first :]
            if self.row_count != prompts:
                part = part[:: self.row_count // prompts]
            mean = self._mean(part, begin)
            before = self._means[layer]
            self._means[layer] = mean if before is None else before + mean
            self._pooled[layer] = last
        return last >= length

    def _mean(self, part: torch.Tensor, begin: int) -> torch.Tensor:
        """Return what a part of the prompts, from a token on, adds to their means."""
        end = begin + part.shape[1]
        if self._padded:
            mask = self.prompt_mask[:, begin:end].to(part.device)
            part = torch.where(mask.unsqueeze(-1), part, 0)
            return part.sum(1, dtype=torch.float32) / self._lengths.to(part.device)
        mean = part.mean(1, dtype=torch.float32)
        length = self.prompt_mask.shape[1]
        return mean if part.shape[1] == length else mean * (part.shape[1] / length)

    def decide(self, layer: int, device: torch.device) -> None:
        """Ask the policy about a layer and fix the answer for every row."""
        mean = self._means[layer]
        assert mean is not None, "decide before observe"
        states = PromptStates(mean, self, self._missed[layer])
        self._means[layer], self._pooled[layer], self._missed[layer] = None, 0, 0
        answer = self.policy.decide(layer, states)
        if self.decided(layer):  # a checkpointed layer replayed in backward: the answer stands
            score = self.scores[layer]
            if score is not None and answer.requires_grad and not score.requires_grad:
                raise ConfigError(
                    "Reentrant gradient checkpointing gives routers no gradient; enable it with "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}.'
                )
            return
        keep = answer.tolist()
        if answer.dtype != torch.bool:
            self.scores[layer] = answer
            keep = [score >= 0 for score in keep]
        if layer in self.locked:
            keep = [True] * len(keep)
        self._keep[layer] = keep
        beams = self.row_count // len(keep)
        self._set_rows(layer, [k for k in keep for _ in range(beams)], device)

    def _set_rows(self, layer: int, row_keep: list[bool], device: torch.device) -> None:
        self._row_keep[layer] = row_keep
        picked = [row for row, keep in enumerate(row_keep) if keep]
        whole = len(picked) == len(row_keep)
        self._rows[layer] = None if whole else torch.tensor(picked, dtype=torch.long, device=device)

    def select_rows(self, index: torch.Tensor) -> None:
        """Make row j of the batch what row index[j] was (beam search)."""
        order = index.tolist()
        for layer, keep in enumerate(self._row_keep):
            if keep is not None:
                rows = self._rows[layer]
                device = rows.device if rows is not None else index.device
                self._set_rows(layer, [keep[row] for row in order], device)
        self.row_count = len(index)

    def retire(self, layer: int, step: int, device: torch.device) -> bool:
        """Let a layer go for the rest of the answer, if it is time; True where it just went.

        Args:
            layer: index of the layer.
            step: of decoding, from 0.
            device: of the layer.
        """
        if self.stepped is None or step < self.stepped.lifetime(layer):
            return False
        if not any(self.row_keep(layer)):
            return False
        self._set_rows(layer, [False] * self.row_count, device)
        return True

    def runs_at(self, layer: int) -> torch.Tensor:
        """Return where in whole sequences [prompts, tokens] a layer runs, for a stepped policy."""
        assert self.stepped is not None, "asked of a policy that keeps to one mask"
        if self._steps is None:
            tokens = torch.arange(self.prompt_mask.shape[1], device=self.prompt_mask.device)
            ends = torch.where(self.prompt_mask, tokens, -1).amax(1, keepdim=True)
            self._steps = tokens - ends - 1
        return self._steps < self.stepped.lifetime(layer)

    def keep_after(self, steps: Sequence[int]) -> torch.Tensor:
        """Return keep [prompts, layers] at the last of so many decode steps of each prompt."""
        if self.stepped is None:
            return self.keep
        lives = [self.stepped.lifetime(layer) for layer in range(self.layers)]
        return self.keep & torch.tensor([[n - 1 < life for life in lives] for n in steps])

    def skip_rates(self, steps: Sequence[int]) -> list[float]:
        """Return each prompt's skip rate over so many decode steps; 0 where there was none."""
        if self.stepped is None:
            return (1 - self.keep.double().mean(1)).tolist()
        lives = [self.stepped.lifetime(layer) for layer in range(self.layers)]
        gone = [sum(max(n - life, 0) for life in lives) for n in steps]
        return [g / (n * self.layers) if n else 0.0 for g, n in zip(gone, steps, strict=True)]

    def count_call(self) -> None:
        """Count one unit that really runs."""
        self.layer_calls["prefill" if self.in_prefill else "decode"] += 1


def prompt_key(ids: Sequence[int]) -> int:
    """Return a number that depends on a prompt's token ids alone."""
    return zlib.crc32(" ".join(map(str, ids)).encode())
