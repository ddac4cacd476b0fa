# SPDX-License-Identifier: Apache-2.0
"""Errors that firstlm raises for its users. The command line turns them into exit code 2."""


class FirstError(Exception):
    """Base of all errors that say what was wrong, what was expected and how to mend it."""


class ConfigError(FirstError):
    """An option or a combination of options that cannot work."""


class DataError(FirstError):
    """A data file or a row in it that cannot be used."""


class ArtifactError(FirstError):
    """A saved FiRST artifact that is missing, damaged, too new, or made for another model."""


class UnsupportedModelError(FirstError):
    """A model whose layers firstlm cannot route or cut, or its fast engine cannot run."""


class FirstWarning(UserWarning):
    """What works, but maybe not as its user expects."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kind_and_line(error: BaseException) -> str:
    """Return an error's type and the first line of its text, for what others raise."""
    return f"{type(error).__name__}: {first_line(error)}"
