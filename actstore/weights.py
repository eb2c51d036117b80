"""How large the weights of a model folder are, from the headers of its files."""

from __future__ import annotations

import math
import re
from pathlib import Path

HEAD = re.compile(r"^(?:lm_head|embed_out)\.")  # the unembedding, where it is not the embedding
LAYER = re.compile(r"(?:^|\.)(?:h|layers?|blocks?)\.(\d+)\.")  # how checkpoints name the tensors of a layer


def elements_up_to(folder: Path, layers: int, head: bool = True) -> int:
    """Return how many numbers the tensors of a model folder hold, leaving out layers from `layers` on; loads none.

    Args:
        folder: holds *.safetensors.
        layers: how many layers count.
        head: whether the unembedding does.

    Raises: OSError, safetensors.SafetensorError: a file cannot be read.
    """
    from safetensors import safe_open

    elements = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                layer = LAYER.search(name)
                if (layer is None or int(layer[1]) < layers) and (head or not HEAD.match(name)):
                    elements += math.prod(file.get_slice(name).get_shape())
    return elements
