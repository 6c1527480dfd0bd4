"""Which device a name means."""

import torch

from rush_bench.errors import BadInput


def choose_device(name: str) -> torch.device:
    """The torch device of a name; `auto` is CUDA where there is one. A device that cannot be used is a BadInput."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r} cannot be used here; --device auto takes what there is") from error
    return device
