# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer for FiRST: what one optimizer step computes, logs and saves.

Checkpoints hold only what trains (routers or LoRA) and the rate driver, besides what Trainer
writes itself, so they are small and resume exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from firstlm import processes
from firstlm.decisions import RoutingState
from firstlm.errors import DataError, FirstError
from firstlm.lora import swapped
from firstlm.losses import (
    FullDepth,
    answer_cross_entropy,
    answer_pass,
    non_skip_penalty,
    row_losses,
)
from firstlm.model import FirstModel
from firstlm.policies import Policy
from firstlm.rates import RateDriver
from firstlm.results import to_json, write_text

WEIGHTS_FILE = "trainable.safetensors"
DRIVER_FILE = "driver.json"


class EpochSampler(LengthGroupedSampler):
    """Groups rows of similar length; an epoch's order depends on seed and epoch alone.

    It asks for the epoch: Trainer's call of `set_epoch` does not reach through all that wraps a
    sampler when a run of several processes is resumed.
    """

    def __init__(
        self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]
    ) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        """Yield row numbers."""
        self.generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch())
        return super().__iter__()


class FirstTrainer(Trainer):
    """Trains routers (phase 1) or LoRA (phase 2) of a `FirstModel`.

    Args:
        first: the model; what requires gradients is trained.
        driver: chooses rates and holds alpha; None where there is but one way to train.
        policy_at: what decides about a batch that is trained at a rate.
        gate: gate mode of the forward pass.
        prefill: "skip" or "full".
        router_lr: learning rate of routers, where they train; everything else has that of `args`.
        l2: weight of the squared router weights.
        distill: weight of the distance to what all layers compute (`FullDepth`); 0 leaves it out.
        teacher: parameters, and the values with which all layers are to compute that; those that
            are not named compute with what they have learnt so far.
        log_path: JSON lines with every logged step, per-layer skip rates included.
        kwargs: as for transformers' Trainer; datasets are lists of `Encoded`.
    """

    def __init__(
        self,
        first: FirstModel,
        driver: RateDriver | None,
        policy_at: Callable[[float | None], Policy],
        gate: str,
        prefill: str,
        router_lr: float,
        l2: float,
        distill: float,
        teacher: Sequence[tuple[nn.Parameter, torch.Tensor]],
        log_path: Path,
        **kwargs: Any,
    ) -> None:
        self.first, self.driver, self.gate = first, driver, gate
        self.policy_at = policy_at
        self.prefill, self.log_path = prefill, log_path
        self.router_lr, self.l2 = router_lr, l2
        self.distill, self.teacher = distill, teacher
        self._sums: dict[str, float] = {}
        self._skipped = torch.zeros(first.layer_count)
        self._batches = 0
        super().__init__(model=first, **kwargs)
        self.model_accepts_loss_kwargs = False

    def _run(
        self,
        inputs: dict[str, torch.Tensor],
        rate: float | None,
        gate: str,
        scope: ExitStack,
        train: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, RoutingState]:
        """Return a batch's answer logits, their labels, its distance to full depth, decisions."""
        full = None
        if train and self.distill:
            with mixed_precision(self.first), swapped(self.teacher):
                full = FullDepth.of(self.first, inputs)
        state = self.first.new_state(
            inputs["prompt_mask"],
            self.policy_at(rate),
            prefill=self.prefill,
            gate=gate,
            input_ids=inputs["input_ids"],
        )
        # Checkpointed layers are replayed in backward, so the scope must outlast the forward.
        scope.enter_context(self.first.routing.tracing(state))
        scope.enter_context(mixed_precision(self.first))
        output, labels = answer_pass(
            self.first,
            inputs,
            state,
            self.model_wrapped,
            output_hidden_states=full is not None,
        )
        logits, distance = output.logits, None
        if full is not None:
            states, mask = output.hidden_states[-1], inputs["attention_mask"]
            weights = processes.weight(mask), processes.weight(torch.ones_like(labels))
            distance = full.distance(states, logits, mask, weights)
        return logits, labels, distance, state

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do one forward and backward pass within the scope of its decisions."""
        with ExitStack() as self._scope:
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return CE + lambda * ||w||^2 + alpha * sum_i rho_i (the paper's equation 4).

        The last term is left out where offsets hold the rates (`RateDriver.penalty`). `distill`
        adds the distance to what all layers compute. The mean of several processes' losses is that
        of one with all their rows.
        """
        rate = self.driver.sample() if self.driver else None
        logits, labels, distance, state = self._run(
            inputs, rate, self.gate, self._scope, train=True
        )
        ce = processes.weight(torch.ones_like(labels)) * answer_cross_entropy(logits, labels)
        loss = ce if distance is None else ce + self.distill * distance
        terms = {"ce": ce} if distance is None else {"ce": ce, "distance": distance}
        rho = state.rho
        if self.driver is not None and rho is not None:
            if self.driver.penalty:
                loss = loss + self.driver.penalty * non_skip_penalty(rho)
            terms["mean_rho"] = rho.mean()
            if self.l2:
                loss = loss + self.l2 * self.first.routers.squared_norm()
        found, skip = self._mean({**terms, "loss": loss}, 1 - state.keep.float().mean(0))
        if self.driver is not None and rho is not None:
            self.driver.update(rate, float(skip.mean()))
        if not math.isfinite(found["loss"]):
            raise FirstError(
                f"Training diverged: the loss is {found['loss']} at step "
                f"{self.state.global_step + 1}. Lower the learning rate, and start over from the "
                "last checkpoint or with --no-resume."
            )
        self._note(rate, found, skip)
        if not loss.requires_grad:  # every row of the batch skips every layer that has LoRA
            loss = loss + 0.0 * sum(p.sum() for p in self.first.parameters() if p.requires_grad)
        return loss

    def _mean(
        self, terms: dict[str, torch.Tensor], skip: torch.Tensor
    ) -> tuple[dict[str, float], torch.Tensor]:
        """Return a step's terms and its skip rates [layers] as means over all processes."""
        values = torch.stack([term.detach().float() for term in terms.values()])
        values = torch.cat([values, skip.to(values.device)])
        values = (processes.total(values) / processes.count()).cpu()
        return dict(zip(terms, values.tolist(), strict=False)), values[len(terms) :]

    def _note(self, rate: float | None, terms: dict[str, float], skip: torch.Tensor) -> None:
        primary = self.driver is None or rate == self.driver.primary
        name = "" if primary else f"_at_{rate}"
        values = {f"ce{name}": terms["ce"], f"skip_rate{name}": float(skip.mean())}
        if primary:
            values |= {name: terms[name] for name in ("mean_rho", "distance") if name in terms}
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
            self._sums[f"#{key}"] = self._sums.get(f"#{key}", 0.0) + 1
        if primary:
            self._skipped += skip
            self._batches += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add cross-entropy, skip rate, mean rho and alpha to what Trainer logs."""
        if "loss" in logs and self._sums:
            for key in [k for k in self._sums if not k.startswith("#")]:
                logs[key] = round(self._sums[key] / self._sums[f"#{key}"], 4)
            if self.driver is not None:
                logs["alpha"] = round(self.driver.penalty, 5)
            by_layer = self._skipped / max(self._batches, 1)
            mostly = [i for i, share in enumerate(by_layer.tolist()) if share > 0.5]
            line = {
                "step": self.state.global_step,
                **logs,
                "mostly_skipped": mostly,
                "skip_rate_by_layer": [round(x, 3) for x in by_layer.tolist()],
            }
            if processes.is_first():
                with self.log_path.open("a", encoding="utf-8") as file:
                    file.write(to_json(line) + "\n")
                if self.driver is not None and not self.args.disable_tqdm:
                    self._say(f"layers mostly skipped: {mostly}")
            self._sums.clear()
            self._skipped.zero_()
            self._batches = 0
        super().log(logs, *args, **kwargs)

    @staticmethod
    def _say(text: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(text)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure the hard cross-entropy and skip rate at the primary rate."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        found: list[list[torch.Tensor]] = []
        self.first.eval()
        rate = self.driver.primary if self.driver else None
        with torch.no_grad():
            for inputs in dataloader:
                inputs = self._prepare_inputs(inputs)
                with ExitStack() as scope:
                    logits, labels, _, state = self._run(inputs, rate, "hard", scope)
                skipped = 1 - state.keep.float().mean(1)
                row = (*row_losses(logits, labels, inputs), skipped.to(logits.device))
                # Of all processes, without rows that fill up the last batch.
                found.append([part.cpu() for part in self.accelerator.gather_for_metrics(row)])
        sums, tokens, skips = (torch.cat(parts).double() for parts in zip(*found, strict=True))
        self.first.train()
        metrics = {
            f"{prefix}_loss": float(sums.sum() / tokens.sum()),
            f"{prefix}_skip_rate": float(skips.mean()),
        }
        from transformers.trainer_utils import EvalLoopOutput

        nothing = np.empty(0)
        return EvalLoopOutput(nothing, label_ids=None, metrics=metrics, num_samples=len(sums))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW; a router's weights step such that its logit moves by about the rate."""
        if self.optimizer is None:
            lora_lr, router_lr = self.args.learning_rate, self.router_lr
            width = self.first.routers[0].weight.numel()
            groups: dict[float, list[nn.Parameter]] = {}
            for name, parameter in self.first.named_parameters():
                if parameter.requires_grad:
                    rate = lora_lr
                    if name.startswith("routers."):
                        rate = router_lr / width**0.5 if name.endswith("weight") else router_lr
                    groups.setdefault(rate, []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [{"params": found, "lr": rate} for rate, found in groups.items()],
                lr=lora_lr,
                weight_decay=0.0,
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(item.prompt_ids) + len(item.answer_ids) for item in data]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        batch *= processes.count()  # the rows of a step, however many processes share them
        seed = self.args.data_seed or 0
        return EpochSampler(batch, lengths, seed, lambda: int(self.state.epoch or 0))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains, whole and once, however many processes have shards of it."""
        trained = [(name, p) for name, p in self.first.named_parameters() if p.requires_grad]
        tensors = processes.on_cpu(trained)
        folder = Path(output_dir or str(self.args.output_dir))
        with processes.first_alone() as first:
            if not first:
                return
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / WEIGHTS_FILE)
            if self.driver is not None:
                (folder / DRIVER_FILE).write_text(json.dumps(self.driver.state_dict()))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        self._forget_after(int(folder.name.rpartition("-")[2]))
        self._load_weights(folder)
        if self.driver is not None:
            self.driver.load_state_dict(json.loads((folder / DRIVER_FILE).read_text()))

    def _forget_after(self, step: int) -> None:
        """Drop what an interrupted run logged of steps that come again."""
        with processes.first_alone() as first:
            if not first or not self.log_path.exists():
                return
            lines = self.log_path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [
                line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step
            ]
            write_text(self.log_path, "".join(kept))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            self._load_weights(Path(best))

    def take_up(self, checkpoint: Path) -> None:
        """Be as after the last step, of which this is the checkpoint."""
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end:
            self._load_best_model()

    def _load_weights(self, folder: Path) -> None:
        take_weights(self.first, read_weights(folder))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return what was trained, from a checkpoint's folder.

    Raises:
        DataError: the file is damaged.
    """
    file = folder / WEIGHTS_FILE
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{file} is damaged ({error}). Remove {folder} and give the same command again to go "
            "on from what came before it, or start over with --no-resume."
        ) from error


def take_weights(first: FirstModel, tensors: dict[str, torch.Tensor]) -> None:
    """Put saved tensors into the model's parameters of the same names."""
    parameters = dict(first.named_parameters())
    for name, tensor in tensors.items():
        processes.put(parameters[name], tensor)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a folder; one that was cut off is passed over."""
    many = processes.count()
    states = [f"rng_state_{i}.pth" for i in range(many)] if many > 1 else ["rng_state.pth"]
    numbered = [(int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*")]
    for _, path in sorted(numbered, reverse=True):
        if not all((path / state).is_file() for state in states):
            continue
        try:  # the first process writes this file last
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


@contextmanager
def mixed_precision(first: FirstModel) -> Iterator[None]:
    """Compute in bfloat16 where the base is held in it; routers and LoRA stay float32 masters.

    Done here rather than by Trainer, which would leave a wrapped forward on the model.
    """
    if first.base.dtype != torch.bfloat16:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(first.device.type, torch.bfloat16))
        if first.has_adapter:  # peft would take every input to float32 and autocast back again
            stack.enter_context(disable_input_dtype_casting(first.base))
        yield
