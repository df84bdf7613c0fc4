"""One of DDP's ranks: the runs of the callback tests, with more than one replica; writes what it saw as JSON.

Usage: torchrun ... ddp_runs.py huggingface | lightning FOLDER ENDPOINT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def huggingface(folder: Path, endpoint: str) -> dict[str, Any]:
    """A run without nowcasting, one straight through with it, and one that is resumed."""
    from tests.integration.workers.huggingface_runs import straight_and_resumed, train

    plain = train(folder / "plain", None)
    straight, resumed = straight_and_resumed(folder, endpoint, None)
    return {"plain": plain, "straight": straight, "resumed": resumed}


def lightning(folder: Path, endpoint: str) -> dict[str, Any]:
    """The same with Lightning."""
    from tests.integration.workers.lightning_runs import SAVE_STEP, section, train

    def told(run: tuple[Any, Any, Any]) -> dict[str, Any]:
        losses, events, weights = run
        return {"losses": losses, "events": events, "weights": weights.tolist()}

    settings, checkpoint = section(endpoint), folder / "middle.ckpt"
    straight = told(train(settings, strategy="ddp"))
    train(settings, num_steps=SAVE_STEP, save=checkpoint, strategy="ddp")
    return {
        "plain": told(train(None, strategy="ddp")),
        "straight": straight,
        "resumed": told(train(settings, load=checkpoint, strategy="ddp")),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, folder, endpoint = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    seen = {"huggingface": huggingface, "lightning": lightning}[kind](folder, endpoint)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
