"""Whether a device that was lost answers: `--device JSON` (see runtime/control.py for how a process is started).

It imports what computes there, multiplies once, says "started", and waits for its commands to end.
"""

from __future__ import annotations

import argparse
import json
import os

from llmpq.runtime.control import Control
from llmpq.spec import Device, WorkerLostError, one_line

_NICENESS = 5  # others compute meanwhile, and it is to start within START_S of party.py
_SIZE = 64


def main(control: Control, argv: list[str]) -> None:
    os.nice(_NICENESS)
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    device = Device.from_dict(json.loads(parser.parse_args(argv).device))
    control.status.doing = "importing"
    import torch

    from llmpq import hardware

    control.status.doing = "multiplying"
    try:
        x = torch.ones(_SIZE, _SIZE, device=hardware.use(device))
        found = float((x @ x).sum())
    except RuntimeError as error:
        raise WorkerLostError(f"{device.name} does not multiply: {one_line(str(error))}") from None
    if found != _SIZE**3:
        raise WorkerLostError(f"{device.name} multiplies wrong")
    control.started()
    control.receive()
