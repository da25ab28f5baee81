"""How many computations of a kind a device does side by side."""

import torch

SHARE = 0.5  # of a GPU's free memory


def at_once(size: float, device: torch.device, on_cpu: int) -> int:
    """As many as half of a GPU's free memory holds, at least one.

    Parameters
    ----------
    size
        Bytes that one of them takes.
    device
        Where they are computed.
    on_cpu
        How many on a CPU, where more cost memory and gain no time.
    """
    if device.type != "cuda":
        return on_cpu
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(SHARE * free / size))
