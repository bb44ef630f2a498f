"""What can be known of a model without loading it: where its files are, who it is, what shapes it has."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

_WHOLE_FILE_BYTES = 64 << 20
_EDGE_BYTES = 1 << 20


class ModelError(ValueError):
    """The folder or name is no causal language model in safetensors that can be used. One line, with the remedy."""


@cache
def resolve_model(model: str, revision: str | None = None) -> Path:
    """The local folder of a model: itself, or the hub's snapshot (fetched if need be, safetensors only)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not is_hub_name(model):
        raise ModelError(f"{model}: no such model folder; give a folder with config.json, or a hub name like org/model")
    return fetch(model, revision, ("*.json", "*.safetensors", "*.model", "*.jinja"))


def fetch(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of the hub's snapshot with the files of these patterns; raises `ModelError` where it has none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{model}: not fetched from the hub ({reason}); give a local folder instead") from error


def find_model(model: str, revision: str | None = None) -> Path | None:
    """The model's folder, or the hub's snapshot of it, if it is on this machine; nothing is fetched."""
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder.resolve()
    if not is_hub_name(model):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def is_hub_name(model: str) -> bool:
    """Whether the text can be the name of a model on the hub, org/model, and is no path."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a causal language model with safetensors weights; raises `ModelError` otherwise."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json; this is not a model folder, name one that holds it")
    config = _read_json(path)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise ModelError(
            f"{path}: architectures {architectures} is no causal language model (…ForCausalLM); take another"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: no *.safetensors; pickled weights are not loaded, convert them to safetensors")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); fetch the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds no mapping; fetch the model again")
    return content


def check_whole(folder: Path) -> None:
    """Raises `ModelError` where a weight file is missing or cut off, as an interrupted download leaves them."""
    index = folder / "model.safetensors.index.json"
    weight_map = _read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: its weight_map names no files; fetch the model again")
    for name in sorted({*weight_map.values(), *(path.name for path in folder.glob("*.safetensors"))}):
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path}: missing, though {index.name} names it; fetch the model again")
        ends = [entry["data_offsets"][1] for key, entry in _read_header(path).items() if key != "__metadata__"]
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if path.stat().st_size < 8 + header_bytes + max(ends, default=0):
            raise ModelError(f"{path}: is cut off; fetch the model again")


def context_length(folder: Path) -> int:
    """The most tokens that the model's positions allow."""
    config = read_config(folder)
    length = config.get("max_position_embeddings")
    if type(length) is not int or length < 1:  # `true` is an int too
        raise ModelError(
            f"{folder / 'config.json'}: no max_position_embeddings; set engine.max_model_len in the recipe"
        )
    return length


@cache
def model_digest(folder: Path) -> str:
    """The model's identity, 64 hex digits: over config, tokenizer and weights.

    Small files count whole. Of a large weight file its size, header, and first and last MiB count: reading 15 GB at
    every start would cost more than it tells, and a finetuned copy differs everywhere.
    """
    digest = hashlib.sha256()
    files = [p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model", ".jinja") and p.is_file()]
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                digest.update(file.read())
            else:
                header_bytes = struct.unpack("<Q", file.read(8))[0] if path.suffix == ".safetensors" else 0
                file.seek(0)
                digest.update(file.read(min(header_bytes, _WHOLE_FILE_BYTES) + _EDGE_BYTES))
                file.seek(-_EDGE_BYTES, 2)
                digest.update(file.read())
    return digest.hexdigest()


def weights_digest(folder: Path) -> str:
    """sha256 over the safetensors files of an adapter or a finetuned student: its name everywhere."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(8 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def linear_modules(folder: Path) -> list[str]:
    """Last names of the matrices inside the model's layers (q_proj, down_proj, ...): no embedding, no output head."""
    shapes = tensor_shapes(folder)
    inside = (name.split(".") for name, shape in shapes.items() if ".layers." in name and len(shape) == 2)
    return sorted({parts[-2] for parts in inside if parts[-1] == "weight"})


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder's safetensors files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = _read_header(path)
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"})
    return shapes


def _read_header(path: Path) -> dict[str, Any]:
    """A safetensors file begins with its header's size, eight bytes, and the header, JSON."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size < path.stat().st_size:
            raise ModelError(f"{path}: is cut off or no safetensors file; fetch or train it again")
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path}: its header cannot be read ({error}); fetch or train it again") from error
    entries = (
        [entry for name, entry in header.items() if name != "__metadata__"] if isinstance(header, dict) else [None]
    )
    if not all(map(_is_tensor, entries)):
        raise ModelError(f"{path}: its header is no list of tensors; fetch or train it again")
    return dict(header)


def _is_tensor(entry: Any) -> bool:
    """Whether the entry of a header has a shape, and the two places in the file between which the values are."""
    shape, places = (entry.get("shape"), entry.get("data_offsets")) if isinstance(entry, dict) else (None, None)
    if not isinstance(shape, list) or not isinstance(places, list) or len(places) != 2:
        return False
    return all(type(one) is int for one in (*shape, *places))
