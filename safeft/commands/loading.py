"""Models and tokenizers by name, for the commands; what goes wrong is said in a sentence."""

import json
import os
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from safeft.errors import ConfigError
from safeft.progress import launched


def join_processes() -> None:
    """Join the other processes of an ``accelerate launch`` or torchrun; alone, do nothing."""
    if launched() == 1:
        return
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())


def on_any_device(arguments: Sequence[str]) -> list[str]:
    """Arguments of a training that several processes run, also where there is no accelerator.

    There, accelerate takes each process for one alone unless it is told to talk over gloo.
    """
    import torch

    given = list(arguments)
    if launched() == 1 or torch.accelerator.is_available():
        return given
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    elif "--ddp_backend" not in given:
        given += ["--ddp_backend", "gloo"]
    return given


def shard(model: Any) -> None:
    """Where the launch asks for FSDP or ZeRO-3, spread the weights over the processes in place.

    Reading activations needs no optimizer, so torch's own sharding does for both.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from safeft.processes import ranks
    from safeft.sites import blocks_of

    zero3 = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    if ranks() == 1 or not (zero3 or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        return
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (ranks(),))
    for block in blocks_of(model).values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def load_model(
    name: str, dtype: str = "auto", device: str | None = None, device_map: str | None = None
) -> tuple[Any, Any]:
    """A chat model (adapter folders included) and its tokenizer; a processor if it sees images.

    Args:
        name: Folder or hub name.
        dtype: ``auto`` or a torch dtype's name.
        device: Where to put it whole; by default the process's GPU, or the CPU.
        device_map: Spread it over devices instead, as transformers does (``auto``).

    Raises:
        ConfigError: It is not there or cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if device_map is not None and device is not None:
        raise ConfigError("Give `device` or `device_map`, not both.")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    spread: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype={dtype!r} is none; use auto, float32, bfloat16 or float16.")
    try:
        base = _base_of(name)
        sees = sees_images(base or name)
        if base is None:
            kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
            model: Any = kind.from_pretrained(name, dtype=dtype, **spread)
        elif sees:
            from peft import PeftModel

            plain = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, **spread)
            model = PeftModel.from_pretrained(plain, name)
        else:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=dtype, **spread)
        tokenizer = load_processor(name, base) if sees else load_tokenizer(name, model)
        return (model if spread else model.to(device)).eval(), tokenizer
    except ConfigError:
        raise
    except Exception as error:  # Loading fails in many ways below us; all mean: not this model.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"The model {name!r} cannot be loaded: {first} Give the folder of a saved model, or "
            "the name of one on the hub."
        ) from error


def load_backbone(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A model to be read and its tokenizer: a chat model, or an encoder, as its config says.

    Raises:
        ConfigError: It is not there or cannot be read.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    try:
        kinds = AutoConfig.from_pretrained(_base_of(name) or name).architectures or []
    except (OSError, ValueError):
        kinds = []  # What is missing shows below.
    writes = any("CausalLM" in kind or "ConditionalGeneration" in kind for kind in kinds)
    if writes or not kinds:
        return load_model(name, dtype, device)
    import torch

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype={dtype!r} is none; use auto, float32, bfloat16 or float16.")
    try:
        model = AutoModel.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # Loading fails in many ways below us; all mean: not this model.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"The model {name!r} cannot be loaded: {first}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def _base_of(name: str) -> str | None:
    """The model that an adapter's folder names as its base; of anything else none."""
    path = Path(name) / "adapter_config.json"
    return json.loads(path.read_text())["base_model_name_or_path"] if path.is_file() else None


def sees_images(name: str) -> bool:
    """Whether a folder or hub name is a vision-language model's, by its config."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):  # An adapter on the hub has none; what is missing shows later.
        return False
    known = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return known and getattr(config, "vision_config", None) is not None


def load_processor(name: str, base: str | None = None) -> Any:
    """The processor beside a model that sees images; without its video part if that cannot be made.

    transformers makes video processors by torchvision only, and refuses the whole without it.

    Args:
        name: Folder or hub name.
        base: The base of an adapter; its processor is used where the adapter's folder has none.
    """
    import transformers
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoProcessor,
        AutoTokenizer,
        ProcessorMixin,
    )
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    from safeft.images import images_only

    files = ("processor_config.json", "preprocessor_config.json")
    if base and not any((Path(name) / file).is_file() for file in files):
        name = base
    try:
        return AutoProcessor.from_pretrained(name)
    except (ImportError, OSError, ValueError):
        own = PROCESSOR_MAPPING_NAMES.get(AutoConfig.from_pretrained(name).model_type)
        kind = getattr(transformers, own or "", None)
        if kind is None or "video_processor" not in signature(kind).parameters:
            raise
    settings, _ = ProcessorMixin.get_processor_dict(name)
    return images_only(kind)(
        AutoImageProcessor.from_pretrained(name),
        AutoTokenizer.from_pretrained(name),
        chat_template=settings.get("chat_template"),
    )


def load_tokenizer(name: str, model: Any) -> Any:
    """The tokenizer beside a model; an adapter without one uses its base's."""
    from transformers import AutoTokenizer

    base = getattr(getattr(model, "active_peft_config", None), "base_model_name_or_path", None)
    local = Path(name)
    if base and local.is_dir() and not (local / "tokenizer_config.json").is_file():
        name = base
    return AutoTokenizer.from_pretrained(name)


def read_template(path: str | None) -> str | None:
    """A Jinja chat template from a file.

    Raises:
        ConfigError: It cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path!r} cannot be read: {error}.") from error
