"""Devices and rates that a plan is made with: data-sheet peaks, and assumptions that are stated beside every result."""

import math
from dataclasses import dataclass
from typing import Literal

from .errors import RunError
from .settings import setting

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """memory_gib: what torch sees, about. bandwidth_tb: TB/s. Peaks in TFLOP/s, dense: bf16 on tensor cores, fp32
    without them (the loop never rounds fp32 products to TF32). link_gb: GB/s to the other GPUs of the machine, each way
    (NVLink; PCIe where there is none)."""

    memory_gib: float
    bandwidth_tb: float
    bf16_tflops: float
    fp32_tflops: float
    link_gb: float


# NVIDIA's data sheets; a CPU here is two cores of a server.
DEVICES = {
    "b300": Device(267.0, 8.0, 2250, 75, 900),
    "b200": Device(178.0, 7.7, 2250, 75, 900),
    "h200": Device(139.8, 4.8, 989, 67, 450),
    "h100": Device(79.1, 3.35, 989, 67, 450),
    "a100": Device(79.2, 2.04, 312, 19.5, 300),
    "l40s": Device(44.4, 0.864, 362, 91.6, 32),
    "cpu": Device(16.0, 0.02, 0.15, 0.1, 10),
}


@dataclass
class Rates:
    """What a plan assumes. Everything here is a guess to be replaced by your own measurement."""

    gpu: Literal["b300", "b200", "h200", "h100", "a100", "l40s", "cpu"] = setting("h200", "device that the run is for")
    memory_gib: float | None = setting(None, "its memory in GiB; none: as torch reports for this device")
    bandwidth_tb: float | None = setting(None, "its memory bandwidth in TB/s; none: the data sheet's")
    bf16_tflops: float | None = setting(None, "its dense bf16 peak in TFLOP/s; none: the data sheet's")
    fp32_tflops: float | None = setting(None, "its fp32 peak in TFLOP/s, without TF32; none: the data sheet's")
    gpus: int = setting(1, "GPUs of each machine, one rank of the trainer each (torchrun --nproc-per-node)")
    nodes: int = setting(1, "machines (torchrun --nnodes)")
    server_gpus: int = setting(1, "GPUs of the same kind behind vllm_server_url (vllm_mode: server)")
    link_gb: float | None = setting(
        None, "GB/s between GPUs of a machine, each way; none: the data sheet's NVLink, or PCIe"
    )
    network_gb: float = setting(50.0, "GB/s of each GPU's network card, each way (400 Gb/s)")
    link_efficiency: float = setting(0.7, "share of links and network that collectives reach")
    overlap: float = setting(0.5, "share of the time in collectives that hides behind products")
    utilisation: float = setting(0.3, "share of the peak that forwards and backwards of the trainer reach")
    prefill_utilisation: float = setting(0.4, "share of the peak that the engine reaches on prompts")
    bandwidth_efficiency: float = setting(0.6, "share of the bandwidth that decoding and the optimizer reach")
    launch_ms: float = setting(0.25, "least time of a decoding step, in ms a layer (kernels are launched one by one)")
    max_sequences: int | None = setting(
        None, "sequences that the engine decodes together, at most; none: vLLM's default for the device"
    )
    prompt_tokens: int = setting(200, "mean length of a prompt")
    completion_share: float = setting(0.3, "mean length of a completion, as a share of max_completion_length")
    steps: int = setting(8, "mean number of steps of a completion")
    labelled_completions: int = setting(10_000, "completions in labelled_dataset or prm_dataset")
    kept_pairs: float = setting(0.05, "share of (token, vocabulary tile) pairs that the head's backward visits (rho)")
    kept_blocks: float = setting(0.1, "the same by blocks of 128 tokens (rho_blocks)")
    disk_gb: float = setting(1.0, "GB/s at which checkpoints are written")
    reserve_gib: float = setting(2.0, "GiB for the CUDA context, cuBLAS and fragmentation")
    engine_reserve_gib: float = setting(3.0, "GiB of vLLM's share for its own activations")

    def __post_init__(self) -> None:
        for key in (
            "utilisation",
            "prefill_utilisation",
            "bandwidth_efficiency",
            "completion_share",
            "link_efficiency",
        ):
            if not 0 < getattr(self, key) <= 1:
                raise RunError(f"{key} is {getattr(self, key)}: give a share above 0, at most 1")
        for key in ("kept_pairs", "kept_blocks", "overlap"):
            if not 0 <= getattr(self, key) <= 1:
                raise RunError(f"{key} is {getattr(self, key)}: give a share from 0 to 1")
        for key in ("max_sequences", "prompt_tokens", "steps", "labelled_completions", "gpus", "nodes", "server_gpus"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise RunError(f"{key} is {getattr(self, key)}: give at least 1")
        for key in ("memory_gib", "bandwidth_tb", "bf16_tflops", "fp32_tflops", "disk_gb", "link_gb", "network_gb"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise RunError(f"{key} is {getattr(self, key)}: give a positive one")
        for key in ("launch_ms", "reserve_gib", "engine_reserve_gib"):
            if not getattr(self, key) >= 0:
                raise RunError(f"{key} is {getattr(self, key)}: give 0 or more")

    @property
    def device(self) -> Device:
        """The data sheet's numbers with the given ones over them."""
        sheet = DEVICES[self.gpu]
        return Device(*(getattr(self, name) or getattr(sheet, name) for name in Device.__annotations__))

    @property
    def sequences(self) -> int:
        """max_sequences, or vLLM's default: 1024 from 70 GiB but for the A100, else 256."""
        return self.max_sequences or (1024 if self.device.memory_gib >= 70 and self.gpu != "a100" else 256)

    @property
    def ranks(self) -> int:
        """Ranks of the trainer, one a GPU."""
        return self.gpus * self.nodes

    @property
    def devices(self) -> str:
        """The devices in words."""
        return self.gpu if self.ranks == 1 else f"{self.ranks} x {self.gpu}"

    @property
    def collective(self) -> float:
        """Bytes a second and rank that rings of collectives are assumed to move. Of several machines every card of one
        carries a ring of its own, so that all together bound them, or the links within."""
        between = self.gpus * self.network_gb if self.nodes > 1 else math.inf
        return 1e9 * min(self.device.link_gb, between) * self.link_efficiency

    @property
    def memory(self) -> float:
        """Bytes of the device's memory."""
        return self.device.memory_gib * GIB

    @property
    def bandwidth(self) -> float:
        """Bytes a second that decoding and the optimizer are assumed to reach."""
        return self.device.bandwidth_tb * 1e12 * self.bandwidth_efficiency

    def flops(self, bf16: bool) -> float:
        """Peak operations a second."""
        return 1e12 * (self.device.bf16_tflops if bf16 else self.device.fp32_tflops)
