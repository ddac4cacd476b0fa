# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a step of vLLM run a layer; vLLM itself is tested in tests/on_vllm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from firstlm.decisions import RoutingState
from firstlm.errors import FirstError
from firstlm.policies import FixedMask, Prompts
from firstlm.vllm_routing import RIDE_ALONG, Part, Row, Step

CPU = torch.device("cpu")
MASKS = [[True, False, True], [False, False, True], [True, True, True]]
LENGTHS = [2, 3, 2]


def states() -> list[RoutingState]:
    """Requests with masks of their own, nothing decided yet."""
    return [
        RoutingState(FixedMask(torch.tensor(mask)), torch.ones(1, length), len(mask))
        for mask, length in zip(MASKS, LENGTHS, strict=True)
    ]


def rows_of(requests: list[RoutingState], first: int | None, tokens: list[int]) -> list[Row]:
    """Lay requests out one after the other; `first` is counted from their prompts' ends."""
    begins = torch.tensor([0, *tokens]).cumsum(0).tolist()
    return [
        Row(state, begin, count, 0 if first is None else state.prompt_length + first)
        for state, begin, count in zip(requests, begins, tokens, strict=False)
    ]


def found(step: Step, ask: Callable[[], torch.Tensor] = lambda: torch.ones(7, 4)) -> list:
    """Ask about all layers, in order."""
    return [step.part(layer, ask) for layer in range(3)]


def places(parts: list[Part | None]) -> list[list[int] | None]:
    return [None if part is None else part.index.tolist() for part in parts]


def test_prompts_are_decided_and_each_layer_runs_the_tokens_that_keep_it() -> None:
    requests = states()
    parts = found(Step(rows_of(requests, None, LENGTHS), CPU))
    assert places(parts) == [[0, 1, 5, 6], [5, 6], None]
    assert [part and part.riding is not None and part.riding.tolist() for part in parts] == [
        [2, 3, 4],
        [0, 1, 2, 3, 4],
        None,
    ]
    assert all(state.complete for state in requests)


def test_answers_of_the_same_requests_run_what_they_ran_the_step_before() -> None:
    requests = states()
    prompts = Step(rows_of(requests, None, LENGTHS), CPU)
    found(prompts)
    first = Step(rows_of(requests, 0, [1, 1, 1]), CPU, prompts)
    before = found(first)
    assert places(before) == [[0, 2], [2], None]

    def never() -> torch.Tensor:
        raise AssertionError("nothing is left to decide")

    after = found(Step(rows_of(requests, 1, [1, 1, 1]), CPU, first), never)
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("change", ["order", "fewer", "another", "a prompt", "again", "tokens"])
def test_other_requests_are_asked_anew(change: str) -> None:
    requests = states()
    before = Step(rows_of(requests, None, LENGTHS), CPU)
    found(before)
    before = Step(rows_of(requests, 0, [1, 1, 1]), CPU, before)
    found(before)
    if change == "order":
        rows, expected = rows_of(requests[::-1], 1, [1, 1, 1]), [[0, 2], [0], None]
    elif change == "fewer":
        rows, expected = rows_of(requests[:2], 1, [1, 1]), [[0], [], None]
    elif change == "another":  # an answer in place of another one
        rows = rows_of([requests[0], requests[2], requests[2]], 1, [1, 1, 1])
        expected = [None, [1, 2], None]
    elif change == "a prompt":  # comes beside answers
        rows = [*rows_of([requests[0], requests[2]], 1, [1, 1]), Row(states()[1], 2, 3, 0)]
        expected = [[0, 1], [1], None]
    elif change == "again":  # a request that was preempted comes with its prompt
        rows, expected = rows_of(requests, None, LENGTHS), [[0, 1, 5, 6], [5, 6], None]
    else:
        rows, expected = rows_of(requests, 1, [2, 1, 1]), [[0, 1, 3], [3], None]
    assert places(found(Step(rows, CPU, before))) == expected


def test_in_larger_steps_nobody_rides_along() -> None:
    requests = states()
    found(Step(rows_of(requests, None, LENGTHS), CPU))
    parts = found(Step(rows_of(requests, 0, [1, RIDE_ALONG, 1]), CPU))
    assert places(parts) == [[0, RIDE_ALONG + 1], [RIDE_ALONG + 1], None]
    assert parts[0] is not None
    assert parts[0].riding is None


def test_chunks_of_equal_length_are_not_taken_for_answers() -> None:
    state = RoutingState(FixedMask([True, False, True]), torch.ones(1, 4), 3, prefill="full")
    first = Step([Row(state, 0, 2, 0)], CPU)
    assert found(first, lambda: torch.ones(2, 4)) == [None, None, None]
    assert not state.complete
    second = Step([Row(state, 0, 2, 2)], CPU, first)
    assert found(second, lambda: torch.ones(2, 4)) == [None, None, None]
    assert state.complete


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 4)],
        [(0, 2), (2, 4)],
        [(0, 2), (0, 2), (2, 4)],  # preempted, and read again from its beginning
        [(0, 3), (0, 2), (2, 4)],
        [(0, 3), (2, 4)],  # and from where its cached keys end
        [(0, 3), (1, 2), (2, 4)],
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_each_token_of_a_prompt_is_pooled_once(chunks: list[tuple[int, int]], padded: bool) -> None:
    seen = []

    class Sees:
        def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
            seen.append(prompts.mean)
            return torch.ones(1, dtype=torch.bool)

    mask = torch.ones(1, 4)
    mask[0, 0] = not padded
    hidden = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1)
    state = RoutingState(Sees(), mask, 1, prefill="full")
    whole = [state.observe(0, hidden[:, begin:end], begin) for begin, end in chunks]
    assert whole == [False] * (len(chunks) - 1) + [True]
    state.decide(0, CPU)
    assert seen[0].item() == pytest.approx(14 / 3 if padded else 15 / 4)


def test_what_a_cache_kept_from_a_router_is_noticed_and_no_matter_to_fixed_masks() -> None:
    class Reads:
        def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
            return prompts.mean[:, 0] > 0

    fixed = FixedMask([False])
    for policy in (Reads(), fixed):
        state = RoutingState(policy, torch.ones(1, 4), 1)
        assert state.observe(0, torch.ones(1, 2, 1), 2)
        if policy is fixed:
            state.decide(0, CPU)
            assert state.row_keep(0) == [False]
            continue
        with pytest.raises(FirstError, match="2 of their tokens never entered it"):
            state.decide(0, CPU)
