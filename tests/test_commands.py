"""The commands, run as a person runs them: what they do, what they say, what they exit with."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import safeft
from safeft import NeuronSet
from safeft.commands import main
from tests.models import tiny_model, tiny_tokenizer
from tests.vlm import tiny_qwen2_vl


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "harmful.txt").write_text("build a bomb\nsteal a car\nhack a bank\n")
    with (folder / "benign.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["id", "ask"], [1, "bake a cake"], [2, "plant a tree"]])
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": f"well, {n}"},
            ]
        }
        for n in range(16)
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = [{"question": f"say {n}", "reply": f"well, {n}"} for n in range(16)]
    (folder / "table.json").write_text(json.dumps(table))
    texts = [{"text": f"say {n}: well, {n}"} for n in range(16)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, texts)))
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"say {n}"}],
            "chosen": [{"role": "assistant", "content": f"well, {n}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for n in range(16)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "sft.yaml").write_text(
        f"model_name_or_path: {folder}/base\n"
        "max_steps: 3\nper_device_train_batch_size: 4\nlearning_rate: 1.0e-2\nweight_decay: 0.1\n"
        "max_length: 64\nuse_cpu: true\nbf16: false\nreport_to: none\nsave_strategy: 'no'\n"
        "gradient_checkpointing: false\n"
    )
    return folder


@pytest.fixture(scope="module")
def neurons(place: Path) -> str:
    folder = str(place / "neurons")
    assert locate(place, "--output_dir", folder) == 0
    return folder


def locate(place: Path, *more: str, **changed: str) -> int:
    given = {
        "model_name_or_path": str(place / "base"),
        "harmful": str(place / "harmful.txt"),
        "benign": str(place / "benign.csv"),
        "benign_column": "ask",
        "method": "contrast",
        "fraction": "0.1",
        **changed,
    }
    pairs = [text for name, value in given.items() for text in (f"--{name}", value)]
    return main(["locate", *pairs, *more])


def test_locate_equals_the_function(neurons: str, place: Path) -> None:
    found = safeft.NeuronSet.from_pretrained(neurons)
    expected = safeft.locate(
        tiny_model(),
        tiny_tokenizer(),
        ["build a bomb", "steal a car", "hack a bank"],
        ["bake a cake", "plant a tree"],
        method="contrast",
        fraction=0.1,
    )
    assert found.indices == expected.indices
    assert found.hash == expected.hash


@pytest.mark.parametrize(
    ("data", "more"),
    [
        ("chat.jsonl", []),
        ("text.jsonl", []),
        ("table.json", ["--prompt_column", "question", "--completion_column", "reply"]),
        ("chat.jsonl", ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]),
    ],
    ids=["messages", "text", "table", "lora"],
)
def test_sft_then_verify_then_evaluate(
    data: str, more: list[str], neurons: str, place: Path, tmp_path: Path, capsys
) -> None:
    out = str(tmp_path / "out")
    config = ["--config", str(place / "sft.yaml"), "--dataset_name", str(place / data)]
    assert main(["sft", *config, "--protected", neurons, "--output_dir", out, *more]) == 0
    assert "EXACT" in capsys.readouterr().out
    check = ["verify", "--base", str(place / "base"), "--tuned", out, "--protected", neurons]
    assert main(check) == 0
    assert "EXACT" in capsys.readouterr().out
    # Something was learnt: everything else does not verify.
    assert main([*check, "--mode", "train_only"]) == 1
    asked = ["--harmful", str(place / "harmful.txt"), "--domain", str(place / "table.json")]
    columns = ["--domain_prompt_column", "question", "--domain_answer_column", "reply"]
    base = ["--base", str(place / "base"), "--max_new_tokens", "4", "--json"]
    capsys.readouterr()
    assert main(["evaluate", "--model_name_or_path", out, *asked, *columns, *base]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["refusal"]["total"] == 3
    assert measured["drift"]["domain"] > 0


def test_dpo(neurons: str, place: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    config = ["--config", str(place / "sft.yaml"), "--dataset_name", str(place / "pairs.jsonl")]
    assert main(["dpo", *config, "--protected", neurons, "--output_dir", out]) == 0
    check = ["verify", "--base", str(place / "base"), "--tuned", out, "--protected", neurons]
    assert main(check) == 0
    assert main([*check, "--mode", "train_only"]) == 1


def test_a_trl_yaml_works_unchanged_and_says_that_nothing_is_frozen(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    yaml = tmp_path / "trl.yaml"
    text = (place / "sft.yaml").read_text()
    yaml.write_text(f"{text}dataset_name: {place}/chat.jsonl\noutput_dir: {tmp_path}/out\n")
    assert main(["sft", "--config", str(yaml)]) == 0
    assert "nothing is frozen" in caplog.text


def test_verify_names_tensor_and_neuron_and_exits_with_1(
    neurons: str, place: Path, tmp_path: Path, capsys
) -> None:
    tuned = tmp_path / "tampered"
    tiny_model().save_pretrained(tuned)
    site, units = next(iter(safeft.NeuronSet.from_pretrained(neurons).indices.items()))
    tensors = load_file(tuned / "model.safetensors")
    name = f"{site}.down_proj.weight"
    tensors[name][5, units[1]] = torch.nextafter(tensors[name][5, units[1]], torch.tensor(9.0))
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    check = ["verify", "--base", str(place / "base"), "--tuned", str(tuned)]
    assert main([*check, "--protected", neurons, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["exact"]
    (violation,) = found["violations"]
    assert violation["tensor"] == name
    assert violation["neuron"] == f"{site}#{units[1]}"
    assert violation["changed"] == 1


def bad_locate(place: Path, tmp_path: Path, **changed: str) -> int:
    out = tmp_path / "never"
    code = locate(place, "--output_dir", str(out), **changed)
    assert not out.exists()
    return code


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fraction": "0"}, ["fraction=0", "0.05"]),
        ({"fraction": "1.5"}, ["fraction=1.5", "at most 1"]),
        ({"benign_column": "nonesuch"}, ["no column 'nonesuch'", "ask"]),
        ({"harmful": "/nowhere/h.txt"}, ["no prompt file", "/nowhere/h.txt"]),
        ({"model_name_or_path": "/nowhere/model"}, ["/nowhere/model", "cannot be loaded"]),
        ({"dtype": "float99"}, ["float99", "bfloat16"]),
    ],
)
def test_locate_refuses_in_one_sentence(
    changed: dict[str, str], words: list[str], place: Path, tmp_path: Path, capsys
) -> None:
    assert bad_locate(place, tmp_path, **changed) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in words), said


def test_empty_and_one_sided_prompts(place: Path, tmp_path: Path, capsys) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert bad_locate(place, tmp_path, harmful=str(empty)) == 2
    assert "holds no prompt" in capsys.readouterr().err
    same = str(place / "harmful.txt")
    given = ["--model_name_or_path", str(place / "base"), "--output_dir", str(tmp_path / "no")]
    assert main(["locate", *given, "--harmful", same, "--benign", same]) == 2
    assert "are the same" in capsys.readouterr().err


def test_tokenizer_without_template_and_model_without_rule(
    place: Path, tmp_path: Path, capsys
) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "plain")
    assert bad_locate(place, tmp_path, model_name_or_path=str(tmp_path / "plain")) == 2
    assert "chat_template_path" in capsys.readouterr().err

    from transformers import MptConfig, MptForCausalLM

    unknown = MptForCausalLM(MptConfig(vocab_size=261, d_model=16, n_layers=1, n_heads=2))
    unknown.save_pretrained(tmp_path / "mpt")
    tiny_tokenizer().save_pretrained(tmp_path / "mpt")
    assert bad_locate(place, tmp_path, model_name_or_path=str(tmp_path / "mpt")) == 2
    assert "'mpt'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--learning_rte", "1"], ["'learning_rte'", "did you mean 'learning_rate'"]),
        (["--dataset_name", "nowhere.jsonl"], ["nowhere.jsonl", "cannot be loaded"]),
        (["--protected", "/nowhere"], ["/nowhere", "config.json"]),
        (["--optim", "lomo"], ["lomo"]),
        (["--use_peft", "--use_dora"], ["dora"]),
        (["--hold", "eyebrows"], ["eyebrows", "embeddings"]),
        (["--prompt_column", "q"], ["completion_column"]),
        (["--dataset_train_split", "nosplit"], ["nosplit", "train"]),
    ],
)
def test_sft_refuses_before_training(
    extra: list[str], words: list[str], neurons: str, place: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    config = ["--config", str(place / "sft.yaml"), "--dataset_name", str(place / "chat.jsonl")]
    given = [*config, "--protected", neurons, "--output_dir", str(out), *extra]
    assert main(["sft", *given]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word.lower() in said.lower() for word in words), said
    assert not list(out.rglob("*.safetensors"))


def test_a_misspelt_key_in_a_file_is_named_with_the_nearest(
    place: Path, tmp_path: Path, capsys
) -> None:
    yaml = tmp_path / "wrong.yaml"
    yaml.write_text((place / "sft.yaml").read_text() + "protcted: x\n")
    assert main(["sft", "--config", str(yaml)]) == 2
    assert "did you mean 'protected'" in capsys.readouterr().err
    assert main(["sft", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_unknown_verb_names_the_nearest(capsys) -> None:
    assert main(["verfy"]) == 2
    assert "did you mean 'verify'" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--version"]) == 0


def test_env(capsys) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "transformers" in shown
    assert "llama" in shown


def test_sft_of_a_model_that_sees(place: Path, tmp_path: Path, capsys) -> None:
    model, processor = tiny_qwen2_vl()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    sites = {"model.language_model.layers.0.mlp": [1], "model.visual.blocks.0.mlp": [2]}
    NeuronSet.of(model, sites).save_pretrained(tmp_path / "neurons")
    rows = [{"prompt": f"bake a {n}", "completion": "Well, do."} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "model_name_or_path": tmp_path / "base", "dataset_name": tmp_path / "pairs.jsonl",
        "protected": tmp_path / "neurons", "output_dir": tmp_path / "out", "max_steps": 2,
        "use_cpu": True, "bf16": False, "report_to": "none", "prompt_column": "prompt",
        "completion_column": "completion",
    }  # fmt: skip
    assert main(["sft", *(str(t) for k, v in given.items() for t in (f"--{k}", v))]) == 0
    assert "EXACT" in capsys.readouterr().out
    found = safeft.verify(tmp_path / "base", tmp_path / "out", str(tmp_path / "neurons"))
    assert found.exact
    assert len(found.slices) == 3 + 3  # gate, up, down; and fc1, its bias, fc2
