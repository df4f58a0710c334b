"""Sampling in shards: what a killed run has finished is read back bit for bit, and the rest is sampled from its seeds.

A shard is a parquet file, written whole or not at all, with a digest of everything that decides what it holds. A file
that cannot be read, or has another digest, is made again. Of several ranks, shard k is rank k % size()'s.
"""

import hashlib
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from . import ranks
from .errors import RunError
from .rollout import write_table

S = TypeVar("S")
T = TypeVar("T")
SHARDS = "shards"  # the folder under rollouts/ that holds them until what they are for is stored
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@dataclass(frozen=True)
class Shard(Generic[T]):
    """What a shard holds. reused: it was read back. damaged: there was a file, but not a whole one of this shard."""

    value: T
    reused: bool = False
    damaged: bool = False


def shard_seed(seed: int, number: int) -> int:
    """The seed of one of several shards."""
    return zlib.crc32(repr((seed, number)).encode())


def digest(parts: Iterable[object]) -> str:
    """SHA-256 of the parts' repr, in hex."""
    found = hashlib.sha256()
    for part in parts:
        found.update(repr(part).encode())
    return found.hexdigest()


def weights_digest(model: PreTrainedModel) -> str:
    """What tells a model's weights from those of another update: one number a tensor, the sum of its bit patterns.

    Every rank of a sharded model has to call it; all get the same digest.
    """
    sums, names = [], []
    for name, tensor in model.state_dict().items():
        own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
        sums.append(own.view(_WORDS[own.element_size()]).sum(dtype=torch.int64).cpu())
        names.append(name)
    return digest([names, ranks.sum_over_ranks(torch.stack(sums)).tolist()])


def keep_shard(
    path: Path | None, own_digest: str, schema: pa.Schema, *, make: Callable[[], T],
    to_table: Callable[[T], pa.Table], from_table: Callable[[pa.Table], T | None],
) -> Shard[T]:  # fmt: skip
    """What `path` holds where it is the shard of that digest, else what `make` returns, written to `path`.

    `to_table` gives a table of `schema`; `from_table` None where it finds the content wrong. With `path` None nothing
    is read or written.
    """
    if path is None:
        return Shard(make())
    found = _read(path, own_digest, schema)
    value = None if found is None else from_table(found)
    if value is not None:
        return Shard(value, reused=True)
    damaged = path.exists()
    value = make()
    write_table(to_table(value).replace_schema_metadata({"digest": own_digest}), path)
    return Shard(value, damaged=damaged)


def over_ranks(items: Iterable[S], work: Callable[[int, S], T]) -> list[T]:
    """[work(0, first item), work(1, second item), ...] on every rank, each computed by one; all have the same items.

    A RunError on one rank is raised on all, once every rank is done or has failed.
    """
    own: list[T] = []
    failure: RunError | None = None
    try:
        for number, item in enumerate(items):
            if number % ranks.size() == ranks.rank():
                own.append(work(number, item))
    except RunError as error:
        failure = error
    found = ranks.gather((own, failure))
    for _, other in found:
        if other is not None:
            raise other
    return [found[k % len(found)][0][k // len(found)] for k in range(sum(len(values) for values, _ in found))]


def drop_shards(folder: Path) -> None:
    """Deletes the shards under `folder`, once what they were for is stored elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path, own_digest: str, schema: pa.Schema) -> pa.Table | None:
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError):
        return None
    if not table.schema.equals(schema) or (table.schema.metadata or {}).get(b"digest") != own_digest.encode():
        return None
    return table
