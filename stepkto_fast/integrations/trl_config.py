"""The options of `trl_trainer`: TRL's `KTOConfig` and those of the steps."""

from dataclasses import dataclass, field

from . import require
from .trl import SUPPORTED

require("trl", SUPPORTED, "stepkto_fast.integrations.trl_config")

from trl import KTOConfig  # noqa: E402

WEIGHTS = ("desirable_weight", "undesirable_weight", "step_desirable_weight", "step_undesirable_weight")
CHOICES = {
    "loss_type": ("kto", "apo_zero_unpaired"),
    "step_reduction": ("mean", "sum"),
    "after_first_error": ("keep", "mask"),
    "reference_points": ("lagged", "zero"),
    "class_weights": ("none", "balanced"),
}


@dataclass
class StepKTOConfig(KTOConfig):
    """`KTOConfig` and the options of the steps; docs/objective.md has the formula they are in.

    step_beta, step_desirable_weight, step_undesirable_weight: for steps what beta and the weights are for completions.
    outcome_weight, step_weight: how much each of the two losses counts.
    step_reduction: "mean" or "sum" over a completion's labelled steps.
    after_first_error: "mask" takes steps behind the first wrong one for unlabelled, "keep" does not.
    reference_points: "lagged" or "zero"; loss_type "apo_zero_unpaired" needs "zero".
    class_weights: "balanced" replaces the four weights, which must be 1, so that right and wrong weigh the same.
    step_separator: what joins the steps of a row to its completion.
    filter_eps: share of a token's probability mass whose gradient may be dropped; None: none in fp32, 2^-9 in 16 bits.

    Raises ValueError for a value that is none of these and for what cannot work with packing.
    """

    step_beta: float = field(default=0.1, metadata={"help": "How sharply the steps' value function bends."})
    step_desirable_weight: float = field(default=1.0, metadata={"help": "Weight of right steps."})
    step_undesirable_weight: float = field(default=1.0, metadata={"help": "Weight of wrong steps."})
    outcome_weight: float = field(default=1.0, metadata={"help": "Weight of the completions' loss."})
    step_weight: float = field(default=1.0, metadata={"help": "Weight of the steps' loss; 0 is KTO."})
    step_reduction: str = field(
        default="mean", metadata={"help": "Over a completion's labelled steps.", "choices": ["mean", "sum"]}
    )
    after_first_error: str = field(
        default="keep", metadata={"help": "What labels behind a wrong step mean.", "choices": ["keep", "mask"]}
    )
    reference_points: str = field(
        default="lagged", metadata={"help": "How z and z_s are estimated.", "choices": ["lagged", "zero"]}
    )
    class_weights: str = field(
        default="none", metadata={"help": "Whether right and wrong weigh the same.", "choices": ["none", "balanced"]}
    )
    step_separator: str = field(default="\n", metadata={"help": "Joins the steps of a row."})
    filter_eps: float | None = field(default=None, metadata={"help": "Gradient filter of the LM head's backward."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {allowed}")
        for name in ("beta", "step_beta", "outcome_weight", "step_weight", *WEIGHTS):
            value, positive = getattr(self, name), name.endswith("beta")
            if not value >= 0 or (positive and not value):
                raise ValueError(f"{name} is {value!r}; expected {'a positive number' if positive else '0 or more'}")
        if self.loss_type == "apo_zero_unpaired" and self.reference_points != "zero":
            raise ValueError("loss_type='apo_zero_unpaired' has no reference points: set reference_points='zero'")
        if self.class_weights == "balanced" and any(getattr(self, name) != 1 for name in WEIGHTS):
            raise ValueError(f"class_weights='balanced' sets {', '.join(WEIGHTS)}: leave them at 1, or set 'none'")
        refused = {
            "use_liger_kernel": (self.use_liger_kernel, "our kernels stand in for its loss: leave it False"),
            "pad_to_multiple_of": (self.pad_to_multiple_of is not None, "packed rows have no padding: set it to None"),
            "torch_compile": (self.torch_compile, "every packed batch has a shape of its own: leave it False"),
            "label_smoothing_factor": (self.label_smoothing_factor != 0, "labels are right or wrong: leave it 0"),
            "neftune_noise_alpha": (
                self.neftune_noise_alpha is not None,
                "its noise grows with the row: unset it",
            ),
            "train_sampling_strategy='group_by_length'": (
                self.train_sampling_strategy == "group_by_length",
                "nothing is padded, so lengths need not be alike: use 'sequential' or 'random'",
            ),
            "dispatch_batches": (
                self.accelerator_config.dispatch_batches,
                "packed batches cannot be cut up for processes: unset it in accelerator_config",
            ),
            "parallelism_config": (
                self.parallelism_config is not None,
                "a packed row is not split over processes: use data parallelism",
            ),
        }
        for name, (found, remedy) in refused.items():
            if found:
                raise ValueError(f"{name} does not work with packed completions; {remedy}")
