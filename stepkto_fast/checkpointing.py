"""Activation checkpointing: a layer keeps its input alone and computes the rest again in the backward."""

from transformers import PreTrainedModel

from .errors import RunError


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes every decoder layer of `model` keep only its input (T, D) for the backward, in training mode.

    The gradients stay the same to the bit on a CPU: nothing random is in a layer (attention dropout is refused), so no
    generator's state is stored either. Works with adapters, put in before or after. Raises RunError for an
    architecture that transformers cannot checkpoint.
    """
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    except ValueError as error:
        raise RunError(f"gradient_checkpointing: {error} Set it to false") from error
    # transformers makes the embeddings' output require a gradient, which only re-entrant checkpointing needs.
    model.disable_input_require_grads()
