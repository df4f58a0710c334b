"""A PRM on the disk: the head's tensors and settings, and its trunk where that is not the model beside them.

prm_head/head.safetensors  the head: weights, standardisation, calibration
prm_config.json            pooling, sizes, temperature, where the trunk is, a checksum of it, whether calibrated
prm_trunk/                 the trunk as save_pretrained writes it, unless it is the model in the same directory

The head has a folder of its own because vLLM takes every *.safetensors file beside a model for weights of the model.
"""

import json
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .atomic import replacing
from .errors import RunError
from .policy import load_policy
from .prm import PRM
from .prm_head import HEADS

HEAD, CONFIG, TRUNK = "prm_head/head.safetensors", "prm_config.json", "prm_trunk"


@dataclass(frozen=True)
class PRMConfig:
    """prm_config.json. `trunk`: "." for the model in the same directory, or prm_trunk."""

    pooling: str
    hidden_size: int
    temperature: float
    trunk: str
    trunk_checksum: int
    calibrated: bool = True


def save_prm(
    prm: PRM, folder: Path, tokenizer: PreTrainedTokenizerBase, *, beside: PreTrainedModel | None = None
) -> None:
    """Writes the PRM into `folder`. `beside`: the model that lies there; as the trunk it is not stored once more."""
    own_trunk = prm.trunk is not beside
    if own_trunk:
        unfinished = folder / f".unfinished-{TRUNK}"
        shutil.rmtree(unfinished, ignore_errors=True)
        prm.trunk.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder / TRUNK, ignore_errors=True)
        unfinished.rename(folder / TRUNK)
    config = PRMConfig(
        pooling=prm.head.pooling, hidden_size=prm.trunk.config.get_text_config().hidden_size,
        temperature=prm.temperature, trunk=TRUNK if own_trunk else ".", trunk_checksum=checksum(prm.trunk),
        calibrated=prm.calibrated,
    )  # fmt: skip
    (folder / HEAD).parent.mkdir(exist_ok=True)
    with replacing(folder / HEAD) as unfinished:
        save_file({k: v.detach().cpu().contiguous() for k, v in prm.head.state_dict().items()}, unfinished)
    with replacing(folder / CONFIG) as unfinished:
        unfinished.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def load_prm(folder: Path | str, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None) -> PRM:
    """The PRM of a directory that `save_prm` or `train_prm` wrote, on `device`.

    With a `tokenizer`, the one whose tokens it shall score. Raises RunError where a file is missing, damaged or of
    another model, and where the vocabularies differ.
    """
    prm, own = load_prm_and_tokenizer(folder, device)
    if tokenizer is not None and tokenizer.get_vocab() != own.get_vocab():
        raise RunError(
            f"the PRM in {str(folder)!r} reads another vocabulary ({len(own)} tokens) than the policy writes "
            f"({len(tokenizer)}): train one on a model of the policy's family (python -m stepkto_fast.train_prm)"
        )
    return prm


def load_prm_and_tokenizer(folder: Path | str, device: torch.device) -> tuple[PRM, PreTrainedTokenizerBase]:
    """As `load_prm`, with the trunk's tokenizer."""
    folder = Path(folder)
    config = _read_config(folder)
    head = HEADS[config.pooling](config.hidden_size)
    try:
        head.load_state_dict(load_file(folder / HEAD))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{folder / HEAD} cannot be read as a {config.pooling!r} head for {config.hidden_size} hidden units: "
            f"{error}; fit it again (python -m stepkto_fast.train_prm)"
        ) from error
    trunk, tokenizer = load_policy(str(folder / config.trunk))
    size = trunk.config.get_text_config().hidden_size
    if size != config.hidden_size or checksum(trunk) != config.trunk_checksum:
        raise RunError(
            f"the model in {str(folder / config.trunk)!r} ({size} hidden units) is not the one that {folder / HEAD} "
            f"was fitted on ({config.hidden_size} hidden units, other weights): fit the head again "
            "(python -m stepkto_fast.train_prm), or put its own model back"
        )
    return PRM(trunk.to(device).eval(), head.to(device), config.temperature, config.calibrated), tokenizer


def _read_config(folder: Path) -> PRMConfig:
    path = folder / CONFIG
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(
            f"{str(folder)!r} holds no PRM: {CONFIG} is not there; give a directory that train_prm wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}; fit the head again") from error
    try:
        config = PRMConfig(**saved)
    except TypeError as error:
        raise RunError(f"{path} is not a PRM's: {error}; fit the head again") from error
    for key, values in {"pooling": tuple(HEADS), "trunk": (".", TRUNK)}.items():
        if getattr(config, key) not in values:
            raise RunError(f"{path}: {key} is {getattr(config, key)!r}, expected one of {', '.join(values)}")
    for key, kinds in {"hidden_size": (int,), "trunk_checksum": (int,), "temperature": (int, float)}.items():
        value = getattr(config, key)
        if type(value) not in kinds or value < 0 or (value == 0 and key != "trunk_checksum"):
            raise RunError(f"{path}: {key} is {value!r}, expected a positive number")
    if not isinstance(config.calibrated, bool):
        raise RunError(f"{path}: calibrated is {config.calibrated!r}, expected true or false")
    return config


def checksum(trunk: PreTrainedModel) -> int:
    """A CRC-32 over the first values of each of the trunk's tensors: other weights, another number."""
    found = 0
    for name, tensor in sorted(trunk.get_decoder().state_dict().items()):
        first = tensor.detach().flatten()[:256].float().cpu().contiguous()
        found = zlib.crc32(first.numpy().tobytes(), zlib.crc32(name.encode(), found))
    return found
