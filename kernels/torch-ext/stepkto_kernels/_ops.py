"""The torch.library namespace of this copy of the package: the name it was imported under.

Several copies may live in one process, such as the installed one and one from the Kernel Hub, whose loader gives each
build a name of its own. Hugging Face's kernel-builder puts a file with the same two names in the place of this one.
"""

import torch

_NAMESPACE = (__package__ or "").replace(".", "_")

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{_NAMESPACE}::{op_name}"
