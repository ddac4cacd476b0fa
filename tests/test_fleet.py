# SPDX-License-Identifier: Apache-2.0
"""The simulated fleet answers what it is asked, in the memory and the time its model says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from firstlm import cells

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
try:
    import fleet
    import step_model
    from replicas import Fleet, Lengths, Requests, draw
finally:
    sys.path.pop(0)

SHAPE = step_model.llama(6, 64, 128, 4, 2, 500)
MACHINE = step_model.Machine(1e9, 1e10, layer_overhead=1e-6, step_overhead=1e-5)
PROMPT, ANSWER = Lengths(20, 0.7, 100), Lengths(15, 0.7, 60)
WHOLE = 160 * SHAPE.layers * SHAPE.kv_bytes  # of the longest request, all layers
SMALL = [
    "--seconds",
    "2",
    "--warmup",
    "1",
    "--seeds",
    "1",
    "--skip-rates",
    "0.25",
    "--memory-gb",
    "25",
]


def asked(seed=0, rate=2000.0, skip_rate=0.34, masks="own", seconds=0.2) -> Requests:
    return draw(seed, rate, seconds, PROMPT, ANSWER, SHAPE.layers, skip_rate, masks)


def alone(prompt: int, answer: int, keep: list[bool], count: int = 1) -> Requests:
    many = np.full(count, 1)
    return Requests(0.0 * many, prompt * many, answer * many, np.array([keep] * count))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("slow", ["memory", "compute"])
def test_one_request_takes_what_the_roofline_says(overlap, slow):
    machine = replace(MACHINE, overlap=overlap, **({"flops": 1e8} if slow == "compute" else {}))
    keep = [True, False, True, True, False, True]
    found = Fleet(SHAPE, machine, 1, WHOLE, True).run(alone(30, 41, keep))
    weights = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    times = []
    for length in range(31, 71):
        read = (2 * weights + 2 * 2 * 32 * length) / machine.bandwidth
        compute = (2 * weights + 4 * 64 * length) / machine.flops
        rest = 2 * 64 * 500 / machine.bandwidth, 2 * 64 * 500 / machine.flops
        together = max if overlap else lambda a, b: a + b
        assert (read < compute) == (slow == "compute")
        times.append(4 * (together(read, compute) + 1e-6) + together(*rest) + 1e-5)
    assert found.last[0] - found.first[0] == pytest.approx(sum(times), rel=1e-9)
    compute = (2 * weights * 30 + 4 * 64 * 30 * 31 / 2) / machine.flops
    first = 4 * (together(2 * weights / machine.bandwidth, compute) + 1e-6) + together(*rest) + 1e-5
    assert found.first[0] == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize("freed", [True, False])
def test_every_request_gets_its_tokens(freed):
    requests = asked()
    served = Fleet(SHAPE, MACHINE, 3, 3 * WHOLE, freed)
    found = served.run(requests)
    assert (found.tokens == requests.answer).all()
    assert sum(tokens for _, tokens in found.steps) == requests.answer.sum()
    assert (found.first > requests.arrival).all()
    assert ((found.last > found.first) == (requests.answer > 1)).all()
    for replica in served.replicas:
        assert replica.load == replica.kv_bytes == 0
        assert not replica.rows.any()
        assert not replica.context.any()
        assert not replica.ends


class Watched(Fleet):
    """Looks at the memory of a replica at each step."""

    fullest = 0.0

    def _start(self, ends, number, now):
        super()._start(ends, number, now)
        replica = self.replicas[number]
        new = replica.starting
        stored = replica.context.sum() + self.asked.prompt[new] @ self.asked.keep[new].sum(1)
        assert stored * self.shape.kv_bytes <= replica.kv_bytes <= self.kv_limit
        self.fullest = max(self.fullest, replica.kv_bytes / self.kv_limit)


@pytest.mark.parametrize("freed", [True, False])
def test_memory_is_enough_for_what_runs(freed):
    served = Watched(SHAPE, MACHINE, 2, 2.5 * WHOLE, freed)
    found = served.run(asked(rate=20_000, seconds=0.02))
    assert served.fullest > 0.9
    assert found.most_kv_bytes == served.fullest * served.kv_limit
    with pytest.raises(ValueError, match="more memory"):
        Fleet(SHAPE, MACHINE, 2, 10.0, freed).run(asked())


def test_freed_memory_lets_more_run_at_once():
    requests = asked(rate=20_000, masks="one", seconds=0.05)
    most = {
        freed: Fleet(SHAPE, MACHINE, 1, 4 * WHOLE, freed).run(requests).most_running
        for freed in (True, False)
    }
    assert most[True] > 1.2 * most[False]
    whole = replace(requests, keep=np.ones_like(requests.keep))
    found = [Fleet(SHAPE, MACHINE, 1, 4 * WHOLE, freed).run(whole) for freed in (True, False)]
    assert found[0].most_running == found[1].most_running == most[False]
    assert (found[0].last == found[1].last).all()


def test_requests_go_to_the_replica_with_the_fewest():
    keep = [True] * 6
    one = Fleet(SHAPE, MACHINE, 1, 9 * WHOLE, True).run(alone(30, 41, keep)).last[0]
    spread = Fleet(SHAPE, MACHINE, 3, 9 * WHOLE, True).run(alone(30, 41, keep, 3))
    assert spread.most_running == 1
    assert (spread.last == one).all()


def test_limits_of_a_step_hold():
    requests = alone(30, 5, [True] * 6, 8)
    assert Fleet(SHAPE, MACHINE, 1, 9 * WHOLE, True, most_rows=3).run(requests).most_running == 3
    found = Fleet(SHAPE, MACHINE, 1, 9 * WHOLE, True, prompt_tokens=59).run(requests)
    assert len(set(found.first.tolist())) == 8  # a prompt a step
    assert (found.tokens == 5).all()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("partial", [1.0, 1.2])
def test_other_masks_never_beat_one(overlap, partial):
    rng = np.random.default_rng(0)
    slower = 0
    for trial in range(200):
        flops = 10 ** rng.uniform(8, 11)
        machine = replace(MACHINE, flops=flops, overlap=overlap, partial=partial)
        rows = int(rng.integers(1, 60))
        lengths = rng.integers(1, 3000, rows).tolist()
        keep = asked(trial, skip_rate=0.34, seconds=0.1).keep[:rows]
        one = np.tile(keep[0], (rows, 1))
        other, same = (step_model.decode_seconds(SHAPE, machine, x, lengths) for x in (keep, one))
        assert other >= same * (1 - 1e-12)
        slower += other > same * 1.001
    assert slower > (150 if partial > 1 or not overlap else 50)


def test_fewer_layers_and_one_mask_answer_more_at_saturation():
    more = ["--replicas", "1", "--seconds", "24", "--warmup", "8"]  # some answers take seconds
    options = fleet.parser().parse_args([*SMALL, *more])
    rows = {(row["masks"], row["kv"]): row for row in fleet.simulate(options)["rows"][1:]}
    assert len(rows) == 6
    for kv in ("freed", "reserved"):
        one, few, own = (rows[masks, kv]["tokens_per_s_ratio"] for masks in ("one", "few", "own"))
        assert one > max(few, own) > 1
        less = [rows[masks, kv]["tpot_ms_median_ratio"] for masks in ("one", "few", "own")]
        assert less[0] < min(less[1:]) < 1
    assert rows["own", "freed"]["most_running"] > rows["own", "reserved"]["most_running"]


def test_equal_seeds_give_equal_output(tmp_path):
    small = [*SMALL, "--replicas", "1", "--output", str(tmp_path / "fleet.json")]
    found = []
    for seeds in ("1", "1", "2"):
        fleet.main([*small, "--seeds", seeds])
        found.append(json.loads((tmp_path / "fleet.json").read_text()))
        assert found[-1].pop("provenance")["seed"] == int(seeds)
    assert found[0] == found[1]
    low, high = found[2]["rows"][0]["tokens_per_s_range"]
    assert low < found[2]["rows"][0]["tokens_per_s"] < high


def test_too_few_requests_are_no_saturation():
    options = fleet.parser().parse_args([*SMALL, "--step-overhead-ms", "0", "--replicas", "1"])
    trial = fleet.Trial(options)
    trial.machine = replace(trial.machine, bandwidth=1e16, layer_overhead=0.0)
    fleet.CROWD, before = 0.5, fleet.CROWD
    try:
        with pytest.raises(SystemExit, match="no saturation"):
            trial.saturation(0, 0.25, "one", True)
    finally:
        fleet.CROWD = before


def test_what_is_asked_is_as_stated():
    requests = asked(rate=500.0, seconds=20.0, masks="few")
    assert len(requests.arrival) / requests.arrival[-1] == pytest.approx(500, rel=0.05)
    assert np.std(np.diff(requests.arrival)) == pytest.approx(1 / 500, rel=0.1)  # Poisson
    assert np.median(requests.prompt) == pytest.approx(20, rel=0.05)
    assert requests.answer.min() >= 1
    assert requests.answer.max() == 60
    assert (requests.keep.sum(1) == 4).all()
    assert requests.keep[:, [0, -1]].all()
    for masks, distinct in (("one", 1), ("few", 8), ("own", 200)):
        keep = draw(0, 100.0, 2.0, PROMPT, ANSWER, 32, 0.25, masks).keep
        assert (keep.sum(1) == 24).all()
        assert len(np.unique(keep, axis=0)) == distinct
    other = asked(rate=500.0, seconds=20.0, masks="own", skip_rate=0.17)
    for name in ("arrival", "prompt", "answer"):
        assert (getattr(other, name) == getattr(requests, name)).all()
    more = asked(rate=700.0, seconds=20.0)
    for name in ("prompt", "answer"):  # fewer requests are the beginning of more
        assert (getattr(more, name)[: len(other.prompt)] == getattr(other, name)).all()


def test_llama_3_8b_has_its_size():
    trial = fleet.Trial(fleet.parser().parse_args([]))
    assert trial.shape.total_bytes == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert trial.shape.kv_bytes * trial.shape.layers == 128 * 1024  # bytes a token


# Next to what was measured


def test_masks_are_those_of_the_bench():
    for skipped in (8, 15):
        layers = range(30)
        assert (step_model.evenly(skipped, 30) == cells.evenly(skipped, layers, 30).numpy()).all()
        theirs = cells.at_random(skipped, layers, 30, 16, 0).numpy()
        assert (step_model.at_random(skipped, 30, 16, 0) == theirs).all()
    report = json.loads((ROOT / "results" / "bench_smollm2.json").read_text())
    rows = step_model.validation(report, overlap=True)
    assert [row["layers_run"] for row in rows] == [row["measured_layers"] for row in rows]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_machine_that_is_as_the_model_says_is_found(overlap):
    """Times made by the model itself are predicted, from rows with all layers alone."""
    report = json.loads((ROOT / "results" / "bench_smollm2.json").read_text())
    report["rows"] = [row for row in report["rows"] if row["engine"] == "fast"]
    overhead = 2e-4 if overlap else 0.0
    machine = step_model.Machine(1.2e10, 9e10, layer_overhead=overhead, overlap=overlap)
    for dtype in ("bfloat16", "int8", "int4"):
        rows = [row for row in report["rows"] if row["dtype"] == dtype]
        shape, length = step_model.smollm2(rows)
        if dtype == "bfloat16":
            plain = step_model.llama(30, 576, 1536, 9, 3, 49152, tied=True)
            assert shape.layer_bytes == pytest.approx(plain.layer_bytes, rel=1e-3)
            assert shape.rest_bytes == pytest.approx(plain.rest_bytes, rel=1e-3)
            assert length == pytest.approx(128 + 200 / 2, abs=1)
        seconds = {}
        for row in rows:
            batch, skipped = row["batch"], round(30 * row["skip_rate"])
            keep = np.tile(step_model.evenly(skipped, 30), (batch, 1))
            if row["masks"] == "mixed":
                keep = step_model.at_random(skipped, 30, batch, 0)
            time = step_model.decode_seconds(shape, machine, keep, [length] * batch)
            seconds.setdefault(batch, time)
            row |= {"tpot_ms": 1e3 * time, "tpot_ratio": time / seconds[batch]}
    for row in step_model.validation(report, overlap):
        if "predicted" in row:
            assert row["predicted"] == pytest.approx(row["measured"], rel=0.03), row
        else:
            assert row["over_measured"] == pytest.approx(1, abs=0.01)


def test_a_layer_that_some_rows_run_may_take_longer():
    keep = np.ones((4, 6), dtype=bool)
    keep[0, 2] = False
    slow = replace(MACHINE, partial=2.0)
    lengths = [100] * 4
    plain, more = (step_model.decode_seconds(SHAPE, m, keep, lengths) for m in (MACHINE, slow))
    tokens, context = np.array([3.0]), np.array([300.0])
    one = replace(SHAPE, layers=1, rest_bytes=0, rest_flops=0)
    bare = replace(MACHINE, step_overhead=0.0)
    layer = step_model.step_seconds(one, bare, tokens, context, context, 4, 4)
    assert more - plain == pytest.approx(layer)
