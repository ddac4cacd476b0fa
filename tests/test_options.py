# SPDX-License-Identifier: Apache-2.0
"""One declaration serves flags, YAML and saved runs, with the same refusals everywhere."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from firstlm import command_config, config
from firstlm.config import RouterConfig, TrainConfig
from firstlm.errors import ConfigError
from firstlm.options import (
    REQUIRED,
    check,
    from_dict,
    load_yaml,
    option,
    read_yaml,
    resolve,
    to_dict,
    to_yaml,
)


@dataclass(frozen=True, kw_only=True)
class Parent:
    """Things all of them have."""

    rate: float = option(0.5, help="a share")
    note: str | None = option(None, help="100% free text")


@dataclass(frozen=True, kw_only=True)
class Sample(Parent):
    """One of everything.

    With a second paragraph.
    """

    place: str = option(REQUIRED, positional=True, path=True, help="where")
    count: int = option(3, help="how many")
    kind: str = option("red", choices=("red", "green"), help="which colour")
    loud: bool = option(True, help="be loud")
    rates: list[float] | None = option(None, help="several shares")
    kinds: list[str] = option(["red"], choices=("red", "green"), help="several colours")
    sizes: tuple[int, ...] = option((1, 2), help="several counts")


def test_what_stands_twice_or_is_positional_is_said(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("count: 1\nplace: a\ncount: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml is not YAML: .*'count' stands twice"):
        load_yaml(Sample, file)
    file.write_text("base: &b {count: 1, loud: no}\nother: {<<: *b, count: 2}\n")
    assert read_yaml(file)["other"] == {"count": 2, "loud": False}
    with pytest.raises(ConfigError, match=r"--place is given without a flag: prog PLACE"):
        resolve(Sample, ["--place", "here"], "prog")


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text("place: ~/here\nnote: ~/text\n")
    assert load_yaml(Sample, file) == Sample(place=str(tmp_path / "here"), note="~/text")
    assert resolve(Sample, ["~/here"], "t").place == str(tmp_path / "here")
    with pytest.raises(ConfigError, match="PLACE is '~nobody-here/x', but no user"):
        resolve(Sample, ["~nobody-here/x"], "t")


def test_a_saved_run_finds_the_data_of_another_machine(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    monkeypatch.setenv("FIRSTLM_DATA", "/here/data")
    file.write_text(
        to_yaml(Sample(place="/here/data/qa/a.jsonl", note="/here/data/note")), encoding="utf-8"
    )
    assert "/here/data/qa" not in file.read_text()
    monkeypatch.setenv("FIRSTLM_DATA", "/there")
    assert load_yaml(Sample, file) == Sample(place="/there/qa/a.jsonl", note="/here/data/note")


COMMAND_OPTIONS = [
    getattr(file, name)
    for file in (config, command_config)
    for name in dir(file)
    if name.endswith("Config") and isinstance(getattr(file, name), type)
]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
# The word none means None, and argparse takes "--" out wherever it stands.
notes = st.none() | texts.filter(lambda text: text not in ("none", "--"))
floats = st.floats(allow_nan=False, allow_infinity=False)
samples = st.builds(
    Sample,
    rate=floats,
    note=notes,
    # In intermixed parsing "--" does not guard what begins with "-"; such a path is written "./-".
    place=texts.filter(lambda text: not text.startswith(("~", "-")) and "$" not in text),
    count=st.integers(),
    kind=st.sampled_from(["red", "green"]),
    loud=st.booleans(),
    rates=st.none() | st.lists(floats, max_size=4),
    kinds=st.lists(st.sampled_from(["red", "green"]), max_size=3),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
)


def parse(*argv):
    return resolve(Sample, argv, "firstlm sample")


@given(samples)
@example(Sample(place="\x85 and \u2028"))  # PyYAML writes these as line ends
def test_dict_and_yaml_give_back_what_was_saved(tmp_path_factory, sample):
    assert from_dict(Sample, to_dict(sample)) == sample
    file = tmp_path_factory.mktemp("options") / "run.yaml"
    file.write_text(to_yaml(sample), encoding="utf-8")
    assert load_yaml(Sample, file) == sample
    assert resolve(Sample, ["--config", str(file)], "firstlm sample") == sample


@given(samples)
def test_flags_give_every_value(sample):
    argv = [f"--rate={sample.rate}", f"--count={sample.count}", f"--kind={sample.kind}"]
    argv += ["--loud" if sample.loud else "--no-loud"]
    argv += [f"--note={'none' if sample.note is None else sample.note}"]
    for name in ("rates", "kinds", "sizes"):
        argv += [f"--{name}={value}" for value in getattr(sample, name) or ()]
    result = parse(*argv, "--", sample.place)
    for field in fields(Sample):
        expected = getattr(sample, field.name)
        if expected in ([], ()):  # a flag can't say "nothing"
            continue
        assert getattr(result, field.name) == expected


def test_flag_wins_over_yaml_and_yaml_over_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("count: 7\nkind: green\nrates: [0.1, 1e-3]\n")
    result = parse("here", "--count", "8", "--config", str(file))
    assert (result.count, result.kind, result.rates) == (8, "green", [0.1, 1e-3])
    assert (result.rate, result.loud, result.place) == (0.5, True, "here")


def test_yaml_may_name_the_positional(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("place: there\nnote: none\nloud: no\n")
    assert parse("--config", str(file)) == Sample(place="there", note=None, loud=False)


def test_lists_and_none_on_the_command_line():
    result = parse("here", "--rates", "0.1", "0.2", "--note", "none", "--kinds", "green", "red")
    assert (result.rates, result.note, result.kinds) == ([0.1, 0.2], None, ["green", "red"])
    assert parse("here", "--rates", "none").rates is None
    assert parse("--rates", "0.1", "--rates", "0.2", "--loud", "here").rates == [0.1, 0.2]


def test_defaults_are_not_shared():
    first, second = Sample(place=""), Sample(place="")
    first.kinds.append("green")
    assert second.kinds == ["red"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["x", "--cuont", "3"], ["--cuont", "did you mean --count"]),
        (["x", "--cuont=3"], ["--cuont", "did you mean --count"]),
        (["x", "--coun", "3"], ["--coun", "did you mean --count"]),  # no silent abbreviations
        (["x", "y"], ["unexpected argument 'y'"]),
        ([], ["PLACE is missing", "where"]),
        (["x", "--count"], ["--count", "expected one argument"]),
        (["x", "--count", "1.5"], ["--count", "'1.5'", "a whole number"]),
        (["x", "--count", "none"], ["--count", "a whole number"]),
        (["x", "--rate", "lots"], ["--rate", "'lots'", "a number"]),
        (["x", "--rate", "nan"], ["--rate", "'nan'", "a number"]),
        (["x", "--rate", "inf"], ["--rate", "'inf'", "a number"]),
        (["x", "--rates", "0.1", "b"], ["--rates", "'b'", "a number"]),
        (["x", "--kind", "gren"], ["--kind", "red, green", "did you mean green"]),
        (["x", "--kinds", "red", "blue"], ["--kinds", "'blue'", "red, green"]),
        (["x", "--loud=maybe"], ["--loud"]),
        (["x", "--config", "/nowhere/run.yaml"], ["/nowhere/run.yaml", "No such file"]),
    ],
)
def test_wrong_flags_name_the_option_and_what_is_legal(argv, says):
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    for part in says:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cuont: 3", ["cuont", "did you mean count", "run.yaml"]),
        ("zzz: 3", ["zzz", "expected one of rate, note"]),
        ("count: many", ["count in ", "'many'", "a whole number"]),
        ("count: 1.5", ["count in ", "1.5"]),
        ("count: true", ["count in ", "True"]),
        ("count: null", ["count in ", "None"]),
        ("rate: .nan", ["rate in ", "nan"]),
        ("loud: 1", ["loud in ", "true or false"]),
        ("loud: 'yes'", ["loud in ", "true or false"]),
        ("note: 2024", ["note in ", "put it in quotes"]),
        ("kind: blue", ["kind in ", "red, green"]),
        ("rates: 0.5", ["rates in ", "a list"]),
        ("rates: [x]", ["rates in ", "'x'"]),
        ("- 1", ["run.yaml", "list"]),
        ("count: [", ["run.yaml", "not YAML"]),
    ],
)
def test_wrong_yaml_names_the_key_the_file_and_what_is_legal(tmp_path, text, says):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("here", "--config", str(file))
    for part in says:
        assert part in str(caught.value)


def test_flags_may_stand_anywhere():
    @dataclass(frozen=True, kw_only=True)
    class Many:
        """Two kinds of words."""

        action: str = option(REQUIRED, positional=True, help="")
        files: list[str] = option(REQUIRED, positional=True, help="")
        rate: float = option(1.0, help="")

    words = ["run", "--rate", "2", "a", "b"]
    for order in (words, [*words[1:3], "run", "a", "b"], ["run", "a", "--rate", "2", "b"]):
        assert resolve(Many, order, "t") == Many(action="run", files=["a", "b"], rate=2.0)


def test_an_empty_yaml_changes_nothing(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("# nothing\n")
    assert parse("here", "--config", str(file)) == Sample(place="here")


def test_from_dict_refuses_unknown_names_and_check_finds_wrong_values():
    with pytest.raises(ConfigError, match="did you mean count"):
        from_dict(Sample, {"place": "x", "cout": 1})
    check(Sample(place="x"))
    with pytest.raises(ConfigError, match="kind is 'blue'"):
        check(Sample(place="x", kind="blue"))


def test_help_shows_usage_defaults_choices_and_percent_signs(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for part in ("usage: firstlm sample PLACE", "(default: 3)", "{red,green}", "100% free text"):
        assert part in shown
    assert "Things all of them have:" in shown
    assert "--loud, --no-loud" in shown
    assert "second paragraph" not in shown


@pytest.mark.parametrize("cls", COMMAND_OPTIONS, ids=lambda cls: cls.__name__)
def test_every_option_of_firstlm_has_help_and_a_legal_default(cls, capsys):
    required = {
        "artifact": "x",
        "data": ["y", "z"] if cls is command_config.BalanceConfig else "y",
        "action": "run",
        "files": ["z"],
        "results": "r",
        "output": "o",
    }
    given_fields = {f.name: required[f.name] for f in fields(cls) if f.default is REQUIRED
                    and f.name in required}  # fmt: skip
    made = cls(**given_fields)
    check(made)
    assert from_dict(cls, yaml.safe_load(yaml.safe_dump(to_dict(made)))) == made
    assert all(field.metadata.get("help") for field in fields(cls))
    with pytest.raises(SystemExit):
        resolve(cls, ["--help"], "firstlm x")
    assert "--config" in capsys.readouterr().out


@pytest.mark.parametrize("rate", ["0.99", "-1", "nan", "inf", "x"])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ConfigError, match=r"skip.rate"):
        resolve(TrainConfig, ["--skip-rate", rate], "firstlm train")


def test_units_are_choices():
    with pytest.raises(ConfigError, match="block, attention, mlp"):
        from_dict(RouterConfig, {"unit": "blok"})


@dataclass(frozen=True, kw_only=True)
class Bounded:
    """Numbers that must lie somewhere."""

    count: int | None = option(None, at_least=1, help="")
    rate: float = option(1.0, above=0, help="")
    share: float = option(0.0, at_least=0, below=1, help="")
    parts: list[float] = option([0.5], above=0, at_most=1, help="")


@pytest.mark.parametrize(
    ("name", "wrong", "right", "says"),
    [
        ("count", (0, -3), (None, 1), "expected 1 or more"),
        ("rate", (0, -1.0), (1e-9,), "expected more than 0"),
        ("share", (1, -0.1), (0, 0.99), "expected 0 up to below 1"),
        ("parts", ([0.5, 0], [1.5]), ([0.1, 1],), "expected above 0 up to 1"),
    ],
)
def test_numbers_lie_within_their_bounds(name, wrong, right, says):
    for value in wrong:
        with pytest.raises(ConfigError, match=f"^{name} is .*; {says}"):
            from_dict(Bounded, {name: value})
        with pytest.raises(ConfigError, match=says):
            check(Bounded(**{name: value}))
    for value in right:
        assert getattr(from_dict(Bounded, {name: value}), name) == value


def test_options_from_python_are_checked_too():
    for wrong in ({"unit": "layer"}, {"init_bias": "high"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            RouterConfig(**wrong)
    with pytest.raises(ConfigError, match=r"skip_rates is 0\.95"):
        TrainConfig(skip_rates=[0.1, 0.95])
