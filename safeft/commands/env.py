"""``safeft env``: what a bug report needs."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from safeft.commands.parsing import parse
from safeft.sites import TOWERS, WHOLES

_PACKAGES = ("safeft", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
_MORE = ("safetensors", "tokenizers", "deepspeed", "bitsandbytes", "scikit-learn")


def main(arguments: Sequence[str]) -> int:
    """Print versions, devices and supported model types."""
    parse([], arguments, "env", "Versions and devices.")
    import torch

    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in (*_PACKAGES, *_MORE):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        print(f"{package:<13} {found}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices       {', '.join(gpus) or 'cpu'}")
    print(f"model types   {', '.join(sorted({*TOWERS, *WHOLES}))}")
    return 0
