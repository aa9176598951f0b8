"""Folders of models that see images: model and processor, without hub and torchvision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from safeft.commands import main
from safeft.commands.loading import load_model
from safeft.demo.pictures import shapes
from safeft.errors import ConfigError
from safeft.generation import generate
from safeft.prompts import as_prompts
from tests.models import tiny_model, tiny_tokenizer
from tests.vlm import FAMILIES, tiny_llava, tiny_qwen2_vl

PROMPTS = as_prompts(["Hello", {"prompt": "What is this?", "image": shapes(1, (40, 30))}])


def saved(model: Any, processor: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_sees_images_comes_with_its_processor(family: str, tmp_path: Path) -> None:
    model, processor = FAMILIES[family]()
    wanted = generate(model, processor, PROMPTS, max_new_tokens=5)
    again, reader = load_model(saved(model, processor, tmp_path / "one"))
    assert type(again) is type(model)
    assert type(reader).__name__ == type(processor).__name__
    assert generate(again, reader, PROMPTS, max_new_tokens=5) == wanted
    twice = load_model(saved(again, reader, tmp_path / "two"))
    assert generate(*twice, PROMPTS, max_new_tokens=5) == wanted


def test_a_processor_saved_in_the_older_files(tmp_path: Path) -> None:
    """As Qwen2-VL is published: the image processor's file names the processor."""
    model, processor = tiny_qwen2_vl()
    wanted = generate(model, processor, PROMPTS, max_new_tokens=5)
    folder = tmp_path / "old"
    saved(model, processor, folder)
    whole = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    parts = {**whole["image_processor"], "processor_class": "Qwen2VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(parts))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert generate(*load_model(str(folder)), PROMPTS, max_new_tokens=5) == wanted


@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_of_such_a_model(own: bool, tmp_path: Path) -> None:
    model, processor = tiny_llava()
    base = saved(model, processor, tmp_path / "base")
    loaded, _ = load_model(base)
    targets = r".*language_model.*(q_proj|down_proj)"
    adapted = get_peft_model(loaded, LoraConfig(target_modules=targets, init_lora_weights=False))
    folder = saved(adapted, processor if own else None, tmp_path / "adapter")
    wanted = generate(adapted, processor, PROMPTS, max_new_tokens=5)  # pyright: ignore[reportArgumentType]
    again, reader = load_model(folder)
    assert isinstance(again, PeftModel)
    assert type(reader).__name__ == "LlavaProcessor"
    assert generate(again, reader, PROMPTS, max_new_tokens=5) == wanted  # pyright: ignore[reportArgumentType]


def test_models_of_text_load_as_before(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    again, reader = load_model(saved(model, tokenizer, tmp_path / "text"))
    assert type(again) is type(model)
    assert reader.get_vocab() == tokenizer.get_vocab()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "text")
    again, reader = load_model(saved(adapted, None, tmp_path / "adapter"))
    assert isinstance(again, PeftModel)
    assert reader.get_vocab() == tokenizer.get_vocab()
    pairs = zip(again.state_dict().values(), adapted.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_model_without_its_processor_is_named(tmp_path: Path) -> None:
    for family in ("llava", "qwen2_vl"):
        folder = saved(FAMILIES[family]()[0], None, tmp_path / family)
        with pytest.raises(ConfigError, match=f"{family}' cannot be loaded: "):
            load_model(folder)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="broken' cannot be loaded: "):
        load_model(str(tmp_path / "broken"))


def test_evaluate_reads_a_column_of_images(tmp_path: Path, capsys: Any) -> None:
    folder = saved(*tiny_llava(), tmp_path / "seeing")
    for number in range(3):
        shapes(number, (20, 20)).save(tmp_path / f"{number}.png")
    (tmp_path / "a.csv").write_text("prompt,image\nMake it,0.png\nBuild it,1.png\nHello,\n")
    (tmp_path / "b.csv").write_text("prompt,image\nBake it,2.png\nName a tree,\n")
    asked = ["--harmful", str(tmp_path / "a.csv"), "--benign", str(tmp_path / "b.csv")]
    run = ["evaluate", "--model_name_or_path", folder, "--max_new_tokens", "3", "--device", "cpu"]
    assert main([*run, *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["refusal"]["total"], found["over_refusal"]["total"]) == (3, 2)
    (tmp_path / "1.png").write_bytes(b"no picture")
    assert main([*run, *asked]) == 2
    said = capsys.readouterr().err
    assert "a.csv' holds what is no prompt" in said
    assert "1.png' cannot be read" in said


@pytest.mark.parametrize("verb", ["evaluate", "locate"])
def test_images_for_a_model_of_text_are_one_sentence(
    verb: str, tmp_path: Path, capsys: Any
) -> None:
    folder = saved(tiny_model(), tiny_tokenizer(), tmp_path / "text")
    shapes(0, (20, 20)).save(tmp_path / "0.png")
    (tmp_path / "a.csv").write_text("prompt,image\nMake it,0.png\n")
    (tmp_path / "b.txt").write_text("Name a tree\n")
    asked = ["--harmful", str(tmp_path / "a.csv"), "--benign", str(tmp_path / "b.txt")]
    kept = ["--output_dir", str(tmp_path / "set")] if verb == "locate" else []
    assert main([verb, "--model_name_or_path", folder, *asked, *kept, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "'Make it' comes with an image, and LlamaForCausalLM reads text only" in said
    assert "Traceback" not in said
    assert not (tmp_path / "set").exists()
