"""Which checkpoint a killed run may go on from: the last whole one, on processes that can read it.

A trainer writes a checkpoint file by file, so a run killed meanwhile leaves a folder that looks
like one. The certificate is written last, after every process has come back from saving: a
checkpoint without it is not accepted.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from safeft.errors import ArtefactError, FreezeError
from safeft.freeze.certificate import CERTIFICATE_NAME

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_WHOLE = ("single", "ddp")
"""Engines that save weights and optimizer state whole, so any of them can go on with them."""


def last_complete(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None: then a run starts anew.

    Half-written ones are named in a warning and passed over.
    """
    found = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := _CHECKPOINT.search(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        try:
            read_run(path)
        except ArtefactError as error:
            logger.warning("Passed over: %s", error)
        else:
            return path
    return None


def read_run(checkpoint: str | Path) -> dict[str, Any]:
    """What the certificate of a checkpoint says about the run that wrote it.

    Raises:
        ArtefactError: There is none, it is damaged, or it is not exact.
    """
    path = Path(checkpoint) / CERTIFICATE_NAME
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        exact, run = said["exact"], dict(said["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"The checkpoint {str(checkpoint)!r} has no readable {CERTIFICATE_NAME} "
            f"({type(error).__name__}), so it was not written to its end, or not by safeft. Go on "
            "from an earlier one (`--resume_from_checkpoint last` finds it)."
        ) from error
    if exact is not True:
        raise ArtefactError(
            f"The certificate of {str(checkpoint)!r} says that its neurons had moved. Go on from "
            "an earlier checkpoint."
        )
    return run


def check_resumable(checkpoint: str | Path, engine: str, processes: int) -> None:
    """Demand that this engine on this many processes can read what is there.

    Raises:
        ArtefactError: The checkpoint is not whole.
        FreezeError: Another engine wrote it, or ZeRO on another number of processes.
    """
    run = read_run(checkpoint)
    wrote, on = str(run.get("engine")), run.get("processes")
    if wrote != engine and not (wrote in _WHOLE and engine in _WHOLE):
        raise FreezeError(
            f"{str(checkpoint)!r} was written under {wrote} and this run is {engine}: each keeps "
            "the optimizer's state in a form of its own. Resume under the same engine, or start "
            "anew from the weights (`--model_name_or_path`)."
        )
    if engine.startswith("zero") and on != processes:
        raise FreezeError(
            f"{str(checkpoint)!r} was written by {on} processes and this run has {processes}: "
            "ZeRO's optimizer state is cut for its number of processes. Run on as many, or convert "
            "the checkpoint (python -m deepspeed.checkpoint.ds_to_universal --input_folder ... "
            "--output_folder ..., and `load_universal: true` in the DeepSpeed configuration), or "
            "use FSDP2, whose checkpoints fit any number."
        )
