"""Models and tokenizers by name, for the commands; what goes wrong is said in a sentence."""

from pathlib import Path
from typing import Any

from safeft.errors import ConfigError


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A causal language model (adapter folders included) and its tokenizer, on ``device``.

    Raises:
        ConfigError: It is not there or cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype={dtype!r} is none; use auto, float32, bfloat16 or float16.")
    try:
        if (Path(name) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            model: Any = AutoPeftModelForCausalLM.from_pretrained(name, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = load_tokenizer(name, model)
        return model.to(device).eval(), tokenizer
    except ConfigError:
        raise
    except Exception as error:  # Loading fails in many ways below us; all mean: not this model.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"The model {name!r} cannot be loaded: {first} Give the folder of a saved model, or "
            "the name of one on the hub."
        ) from error


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
