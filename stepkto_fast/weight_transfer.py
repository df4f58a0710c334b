"""A policy's weights to a vLLM server over NCCL, from GPU to GPU, by vLLM's own weight transfer.

Rank 0 of the trainer is rank 0 of the transfer's group, the server's workers are the ranks behind it. vLLM's engine for
the trainer packs tensors into buffers and broadcasts them; what it asks of the server by HTTP goes through
`TransferClient`, since vLLM's own client sends no key, and follows proxies and redirects.
"""

import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from . import ranks
from .adapters import merged_state
from .errors import RunError
from .vllm_server import REMEDY, VLLMServer, malformed
from .watchdog import watchdog

DEVICE = "cuda"


class NCCLTransfer:
    """Weights on their way to one server. Made on every rank; only rank 0 talks to the server."""

    def __init__(self, server: VLLMServer, timeout: float):
        """timeout: seconds without a tensor or an answer after which this process ends."""
        self._server, self._timeout = server, timeout
        self._source: PolicySource | None = None
        self._engine: NCCLTrainerWeightTransferEngine | None = None

    def send(self, model: PreTrainedModel) -> None:
        """Loads the policy's weights into the server. A collective under torchrun.

        Raises RunError on all ranks where that fails; the server is to be started again then.
        """
        if self._source is None:
            # vLLM wants all shapes announced first. They stay as they are through a run.
            self._source = PolicySource([ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in merged_state(model)])
        named, failed = merged_state(model), None
        if ranks.is_main():
            failed = self._send(named)
        deque(named, maxlen=0)  # to its end, also after a failure: every tensor is a collective
        ranks.from_main(lambda: _raise(failed))

    def _send(self, named: Iterator[tuple[str, Tensor]]) -> RunError | None:
        assert self._source is not None
        try:
            with watchdog(self._timeout, f"the transfer of weights to the vLLM server {self._server.url}") as alive:
                self._source.named, self._source.alive = named, alive
                if self._engine is None:
                    self._engine = self._join(self._source)
                if DEVICE == "cuda":
                    torch.cuda.synchronize()  # vLLM reads the weights on streams of its own
                self._engine.send_weights()
        except Exception as error:
            self._engine = None  # its group may be stuck: `close` must not wait for the server
            if isinstance(error, RunError):
                return error
            return RunError(
                f"the vLLM server {self._server.url} did not get the weights over NCCL ({type(error).__name__}: "
                f"{error}): {REMEDY}; vllm_sync reload does without NCCL"
            )
        return None

    def _join(self, source: "PolicySource") -> NCCLTrainerWeightTransferEngine:
        """Opens the group of this rank and all workers of the server."""
        answer = self._server.get("/get_world_size")
        workers = answer.get("world_size") if isinstance(answer, dict) else None
        if type(workers) is not int or workers < 1:
            raise malformed(f"its number of workers is {workers!r}")
        address, port = meeting_point(self._server)
        place = NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=1 + workers)
        return NCCLTrainerWeightTransferEngine.trainer_init(place, client=TransferClient(self._server), source=source)

    def close(self) -> None:
        """Ends the group on both sides, so that the server can meet another run."""
        if self._engine is not None:
            with suppress(RunError):  # a server that is gone has no group either
                self._server.post("/shutdown_weight_transfer_engine")
            self._engine.shutdown()
            self._engine = None


class PolicySource(WeightSource):
    """The policy's tensors, as vLLM's engine takes them: what is to come, then each in turn.

    `named` and `alive` are set before each transfer: the tensors, and what to call as they go.
    """

    named: Iterator[tuple[str, Tensor]]
    alive: Callable[[], None]

    def __init__(self, announced: list[ParamMeta]):
        self._announced = announced

    def metadata(self) -> list[ParamMeta]:
        return self._announced

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.named:
            self.alive()
            yield name, tensor.to(DEVICE)


class TransferClient:
    """vLLM's VLLMWeightSyncClient: the server's side of a transfer, step by step."""

    def __init__(self, server: VLLMServer):
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._server.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._server.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._server.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._server.post("/finish_weight_update")


def meeting_point(server: VLLMServer) -> tuple[str, int]:
    """This host's address as the server's host reaches it, and a free port there. Raises RunError without a route."""
    try:
        # Nothing is sent: connecting a UDP socket only looks up the route. vLLM's group is IPv4's.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((server.host, server.port))
            address = probe.getsockname()[0]
        with socket.socket(socket.AF_INET) as listening:
            listening.bind((address, 0))
            return address, listening.getsockname()[1]
    except OSError as error:
        raise RunError(f"there is no way to the vLLM server {server.url} ({error}): {REMEDY}") from error


def _raise(failed: RunError | None) -> None:
    if failed is not None:
        raise failed
