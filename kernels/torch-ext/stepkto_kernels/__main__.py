"""`python -m stepkto_kernels`: which op runs on which backend here and, if not, why not."""

import torch

from . import __version__, backends, native


def table() -> str:
    width = max(map(len, backends.ops()))
    lines = [
        f"stepkto_kernels {__version__}, torch {torch.__version__}, "
        f"CUDA {'available' if torch.cuda.is_available() else 'not available'}, "
        f"{backends.ENVIRONMENT_VARIABLE}={backends.requested()}",
        "",
        "  ".join([f"{'op':<{width}}", *(f"{name:<9}" for name in backends.BACKENDS)]).rstrip(),
    ]
    reasons: dict[str, list[str]] = {}
    for op in backends.ops():
        cells = []
        for name in backends.BACKENDS:
            reason = backends.why_not(op, name)
            cells.append(f"{'-' if reason else 'yes':<9}")
            if reason and not reason.startswith("it needs "):  # else its parts say it
                reasons.setdefault(f"{name}: {reason}", []).append(op)
        lines.append("  ".join([f"{op:<{width}}", *cells]).rstrip())
    if native.missing() is None:
        lines += ["", f"native: {native.functions().instruction_set()}"]
    if reasons:
        lines += ["", "Why not, and the remedy:"]
        for reason, names in sorted(reasons.items()):
            lines += [f"  {reason}", f"      {', '.join(names)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
