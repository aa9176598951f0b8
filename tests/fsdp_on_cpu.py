"""accelerate shards on accelerators only; for tests, let it shard over CPU processes as well.

Without this, an FSDP launch on a CPU machine silently becomes DDP and tests nothing.
"""

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy


def allow() -> None:
    """Say MULTI_GPU where gloo processes run, which is all that accelerate asks."""
    original = PartialState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # pinned memory wants an accelerator
