# SPDX-License-Identifier: Apache-2.0
"""A routed model for lm-evaluation-harness, so that its suites run with the layers really skipped.

    import lm_eval
    from firstlm.harness import FirstHarness

    lm = FirstHarness("path/or/id", skip_rate=0.25)
    lm_eval.simple_evaluate(lm, tasks=["arc_easy"])

The context of a request is the prompt that decides; its continuation obeys. Needs the extra
`firstlm[harness]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm

from firstlm.data import Collator, Encoded, encode_prompt
from firstlm.decisions import RoutingState
from firstlm.errors import ConfigError
from firstlm.evaluate import decode_steps
from firstlm.inputs import pad_left
from firstlm.losses import answer_logits, answer_rows, row_losses
from firstlm.model import FirstModel
from firstlm.policies import Policy


@register_model("firstlm")
class FirstHarness(TemplateLM):
    """Answers lm-evaluation-harness's requests with a routed model.

    Args:
        artifact: a folder or hub id, or a loaded `FirstModel`.
        skip_rate: share of layers to skip; None is what the artifact was trained for, 0 none.
        policy: decides in place of the artifact's own; it brings its rate with it.
        prefill: "skip" or "full".
        batch_size: requests per forward pass.
        max_new_tokens: longest answer where a task sets no bound.
        options: for `FirstModel.from_pretrained`.

    Attributes:
        skip_rates: measured share of skipped layers of every request so far.
        layer_calls: {"prefill": ..., "decode": ...}, layers that really ran so far.
    """

    def __init__(
        self,
        artifact: str | FirstModel,
        skip_rate: float | None = None,
        policy: Policy | None = None,
        prefill: str = "skip",
        batch_size: int = 16,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> None:
        super().__init__()
        if policy is not None and skip_rate is not None:
            raise ConfigError("policy and skip_rate both decide what is skipped; give one of them.")
        loaded = isinstance(artifact, FirstModel)
        self.model = artifact if loaded else FirstModel.from_pretrained(artifact, **options)
        self.model.eval()
        self.policy = policy or self.model.policy_for(skip_rate, prefill)
        self.prefill, self.batch_size = prefill, int(batch_size)
        self.max_new_tokens = int(max_new_tokens)
        self._tokenizer: Any = self.model.need_tokenizer()
        self.skip_rates: list[float] = []
        self.layer_calls = {"prefill": 0, "decode": 0}

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that stands in for an empty context."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness keeps what it tokenized."""
        return str(self._tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return a text's token ids; without word on it, with the BOS that prompts have."""
        if add_special_tokens is None:
            return encode_prompt(string, self._tokenizer)
        return self._tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as the text that the model goes on from."""
        return self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding gives it."""
        rows = [self._fit(context, answer) for _, context, answer in requests]
        asked = [i for i, row in enumerate(rows) if row.answer_ids]
        order = sorted(asked, key=lambda i: -len(rows[i].prompt_ids))
        found = [(0.0, True)] * len(rows)  # nothing at all is sure to follow
        with tqdm(total=len(order), desc="scoring", disable=disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                picked = order[start : start + self.batch_size]
                for i, scored in zip(picked, self._score([rows[i] for i in picked]), strict=True):
                    found[i] = scored
                bar.update(len(picked))
        return found

    def _fit(self, context: list[int], answer: list[int]) -> Encoded:
        """Leave out the start of a context that would not fit."""
        longest = self.model.context_length
        room = len(context) if longest is None else longest - len(answer)
        if room < 1:
            raise ConfigError(
                f"A continuation has {len(answer)} tokens, which leave no room for its context in "
                f"the model's {longest}; choose a task with shorter ones."
            )
        return Encoded(context[-room:], answer)

    @torch.no_grad()
    def _score(self, rows: list[Encoded]) -> list[tuple[float, bool]]:
        """Run one batch of contexts with their continuations."""
        inputs = Collator(self.model.pad_id, self.model.device)(rows)
        state = self.model.new_state(
            inputs["prompt_mask"], self.policy, prefill=self.prefill, input_ids=inputs["input_ids"]
        )
        logits, labels = answer_logits(self.model, inputs, state)
        losses, _ = row_losses(logits, labels, inputs)
        others = answer_rows(inputs)[logits.argmax(-1) != labels]
        greedy = torch.ones(len(rows), dtype=torch.bool).index_fill(0, others.cpu(), False)
        # The first token of a continuation comes from the prompt.
        self._count(state, [len(row.answer_ids) - 1 for row in rows], state.layer_calls)
        return list(zip((-losses).tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, window by window."""
        rows: list[tuple[Any, list[int], list[int]]] = []
        ends: list[int] = []
        for text in (request.args[0] for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=(self.model.context_length or 2048) - 1,
                context_len=1,
            )
            for context, answer in map(make_disjoint_window, windows):
                rows.append((None, list(context), list(answer)))
            ends.append(len(rows))
        scored = [value for value, _ in self._loglikelihood_tokens(rows, disable_tqdm)]
        return [sum(scored[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts until one of their stop texts."""
        arguments: list[Any] = [request.args for request in requests]
        asked = [(self.tok_encode(text), options) for text, options in arguments]
        # One batch has one set of stops and one way to draw.
        kinds = [repr(sorted(options.items())) for _, options in asked]
        order = sorted(range(len(asked)), key=lambda i: (kinds[i], -len(asked[i][0])))
        answers = [""] * len(asked)
        with tqdm(total=len(asked), desc="answering", disable=disable_tqdm) as bar:
            while order:
                same = [i for i in order[: self.batch_size] if kinds[i] == kinds[order[0]]]
                texts = self._answer([asked[i][0] for i in same], asked[same[0]][1])
                for i, text in zip(same, texts, strict=True):
                    answers[i] = text
                order = order[len(same) :]
                bar.update(len(same))
        return answers

    def _answer(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Generate for one batch."""
        wanted: dict[str, Any] = {**normalize_gen_kwargs(options, self.max_new_tokens)}
        stops, tokens = wanted.pop("until"), wanted.pop("max_gen_toks")
        if not wanted["do_sample"]:
            wanted |= {"temperature": None, "top_p": None, "top_k": None}
        if stops:
            wanted |= {"stop_strings": stops, "tokenizer": self._tokenizer}
        longest = self.model.context_length
        if longest is not None:
            prompts = [ids[-max(longest - tokens, 1) :] for ids in prompts]
        ids, mask = pad_left(prompts, self.model.pad_id)
        output = self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            policy=self.policy,
            prefill=self.prefill,
            max_new_tokens=tokens,
            pad_token_id=self.model.pad_id,
            **wanted,
        )
        new = output.sequences[:, ids.shape[1] :]
        texts = self._tokenizer.batch_decode(new.tolist(), skip_special_tokens=True)
        ended = [any(stop in text for stop in stops) for text in texts]
        steps = decode_steps(new, ended, self.model)
        self._count(output.cache.state, steps, output.layer_calls)
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _count(
        self, state: RoutingState, steps: Sequence[int], layer_calls: dict[str, int]
    ) -> None:
        """Add a batch, of so many decode steps of each row, to what was skipped so far."""
        self.skip_rates += state.skip_rates(steps)
        for phase, calls in layer_calls.items():
            self.layer_calls[phase] += calls
