import doctest
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import safeft.weights
from safeft.blocks import Axis
from safeft.errors import ArtefactError
from safeft.sites import find_sites
from safeft.weights import (
    CheckpointWeights,
    DistributedCheckpointWeights,
    ModelWeights,
    digests,
    runs_of,
    take,
)
from tests.models import MODEL_TYPES, tiny_model

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def bfloat16_model(model_type: str = "llama", **overrides: object) -> PreTrainedModel:
    """fp32 whose numbers bf16 holds as they are, biases not zero."""
    model = tiny_model(model_type, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.linspace(-1, 1, len(parameter)))
            parameter.copy_(parameter.bfloat16())
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases, in one file."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    bfloat16_model(attention_bias=True, mlp_bias=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "model"
    model = bfloat16_model(attention_bias=True, mlp_bias=True)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["saved", "sharded"])
@pytest.mark.parametrize("block_bytes", [1, 1000, 2**26])
def test_model_and_checkpoint_give_the_same_slices(
    kind: str, block_bytes: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safeft.weights, "_BLOCK_BYTES", block_bytes)
    model = bfloat16_model(attention_bias=True, mlp_bias=True)
    whole = model.state_dict()
    here = ModelWeights(model)
    with CheckpointWeights(request.getfixturevalue(kind)) as there:
        assert here.names() == there.names() == sorted(whole)
        for name, tensor in whole.items():
            assert here.shape(name) == there.shape(name) == tuple(tensor.shape)
            for axis in ("rows", "columns")[: tensor.ndim]:
                size = tensor.shape[0 if axis == "rows" else 1]
                for entries in ([], [0], [size - 1], [0, 1, 2, 5, size - 1], list(range(size))):
                    chosen = torch.tensor(entries, dtype=torch.long)
                    wanted = tensor[chosen] if axis == "rows" else tensor[:, chosen].T
                    for weights in (here, there):
                        found = weights.read(name, axis, chosen)
                        assert found.dtype == tensor.dtype
                        assert found.is_contiguous()
                        assert torch.equal(found, wanted), (name, axis, entries)


def test_a_read_is_a_copy_and_needs_no_gradient() -> None:
    model = tiny_model()
    found = ModelWeights(model).read(UP, "rows", torch.arange(48))
    assert not found.requires_grad
    found.zero_()
    assert model.get_parameter(UP).any()


def test_under_an_adapter_the_base_weights_are_read() -> None:
    plain = tiny_model()
    config = LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    tuned = ModelWeights(get_peft_model(tiny_model(), config))
    for name in (UP, DOWN):
        assert torch.equal(
            tuned.read(name, "rows", torch.arange(3)), plain.get_parameter(name)[:3].detach()
        )
        assert tuned.shape(name) == tuple(plain.get_parameter(name).shape)


def test_a_name_that_is_not_there_has_no_shape_and_cannot_be_read(saved: Path) -> None:
    with CheckpointWeights(saved) as weights:
        for each in (weights, ModelWeights(tiny_model())):
            assert each.shape("model.layers.9.mlp.up_proj.weight") is None
            assert each.shape("model.norm.bias") is None
            with pytest.raises(ArtefactError, match=r"model\.layers\.9\.mlp"):
                each.read("model.layers.9.mlp.up_proj.weight", "rows", torch.tensor([0]))


@pytest.mark.parametrize("axis", ["rows", "numbers"])
def test_a_weight_of_a_single_number_is_read(tmp_path: Path, axis: Axis) -> None:
    model = torch.nn.Module()
    model.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with CheckpointWeights(tmp_path) as there:
        found = [
            w.read("logit_scale", axis, torch.tensor([0])) for w in (there, ModelWeights(model))
        ]
    assert found[0].shape == found[1].shape
    assert found[0].item() == found[1].item() == 2.5


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_entries_beyond_the_weight_are_never_dropped_in_silence(saved: Path, axis: str) -> None:
    with CheckpointWeights(saved) as there:
        for weights in (there, ModelWeights(tiny_model())):
            with pytest.raises(ArtefactError, match="but .* 0 to 48"):
                weights.read(UP, axis, torch.tensor([0, 46, 47, 48]))


def test_files_are_closed_at_the_end(sharded: Path) -> None:
    with CheckpointWeights(sharded) as weights:
        weights.read(UP, "rows", torch.tensor([0]))
        assert len(weights._open) == 1
    assert not weights._open


def test_a_folder_of_pickles_or_of_nothing_is_refused(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ArtefactError, match=r"holds no model\.safetensors .*\.bin"):
            CheckpointWeights(tmp_path)
        torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match="holds no adapter_model"):
        CheckpointWeights(tmp_path / "nowhere", "adapter_model")


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(
    saved: Path, length: int, copy_of: Callable[[Path], Path]
) -> None:
    path = copy_of(saved) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ArtefactError, match=r"model\.safetensors' cannot be read.*truncated"):
        CheckpointWeights(path.parent)


def test_a_missing_or_truncated_shard_is_named(
    sharded: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(sharded)
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][UP]
    content = (folder / shard).read_bytes()
    (folder / shard).unlink()
    with CheckpointWeights(folder) as weights, pytest.raises(ArtefactError, match=shard):
        weights.read(UP, "rows", torch.tensor([0]))
    (folder / shard).write_bytes(content[:-1])
    with CheckpointWeights(folder) as weights, pytest.raises(ArtefactError, match=shard):
        weights.shape(UP)


def test_a_shard_without_the_weight_its_index_names(
    sharded: Path, copy_of: Callable[[Path], Path]
) -> None:
    index = copy_of(sharded) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    places[UP] = next(name for name in places.values() if name != places[UP])
    index.write_text(json.dumps(content))
    with CheckpointWeights(index.parent) as weights:
        with pytest.raises(ArtefactError, match=r"up_proj\.weight.* does not hold it"):
            weights.read(UP, "columns", torch.tensor([0]))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": "ab"}', '{"weight_map": [1]}'],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ArtefactError, match="is not a shard index"):
        CheckpointWeights(tmp_path)


def test_an_index_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtefactError, match="is not a shard index"):
        CheckpointWeights(tmp_path)


@pytest.mark.parametrize(
    ("entries", "runs"),
    [
        ([], []),
        ([4], [(4, 4)]),
        ([1, 2, 5], [(1, 2), (5, 5)]),
        ([0, 1, 2, 3], [(0, 3)]),
        ([0, 2, 4], [(0, 0), (2, 2), (4, 4)]),
    ],
)
def test_runs(entries: list[int], runs: list[tuple[int, int]]) -> None:
    assert runs_of(torch.tensor(entries, dtype=torch.long)) == runs


def test_take() -> None:
    weight = torch.arange(6).reshape(2, 3)
    assert take(weight, "rows", torch.tensor([1])).tolist() == [[3, 4, 5]]
    assert take(weight, "columns", torch.tensor([0, 2])).tolist() == [[0, 3], [2, 5]]


def test_part_tensors_take_the_bias_of_rows_only() -> None:
    model = tiny_model(attention_bias=True, mlp_bias=True)
    site = find_sites(model)["model.layers.0.self_attn"]
    names = [name for part in site.parts for name, _ in part.tensors]
    assert [name.removeprefix("model.layers.0.self_attn.") for name in names] == [
        "q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias",
        "v_proj.weight", "v_proj.bias", "o_proj.weight",
    ]  # fmt: skip


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_digests_do_not_depend_on_where_and_in_which_type_weights_are_held(
    model_type: str, tmp_path: Path
) -> None:
    model = bfloat16_model(model_type)
    model.save_pretrained(tmp_path)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.get_parameter(UP).dtype == torch.bfloat16
    with CheckpointWeights(tmp_path) as stored:
        for site in find_sites(model).values():
            units = list(range(0, site.units, 2))
            wanted = digests(ModelWeights(model), site, units)
            assert len(set(wanted)) == len(units)
            assert digests(ModelWeights(narrow), site, units) == wanted
            assert digests(stored, site, units) == wanted
            # A unit's digest does not depend on which others are asked for.
            assert [digests(ModelWeights(model), site, [unit])[0] for unit in units] == list(wanted)
            assert all(-(2**63) <= value < 2**63 for value in wanted)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "olmo2"])
def test_a_digest_follows_each_of_its_units_weights_and_no_other(model_type: str) -> None:
    model = bfloat16_model(model_type)
    weights = ModelWeights(model)
    for site in find_sites(model).values():
        units = list(range(site.units))
        before = digests(weights, site, units)
        for part in site.parts:
            for name, _ in part.tensors:
                tensor = model.get_parameter(name).data
                axis = 0 if part.axis == "rows" else 1
                for entry in (0, 9, tensor.shape[axis] - 1):
                    cell = tensor.select(axis, entry).view(-1) if axis == 0 else tensor[:, entry]
                    old = cell[-1].clone()
                    cell[-1] = old + 1
                    after = digests(weights, site, units)
                    cell[-1] = old
                    users = [u for u in units if entry in part.entries(torch.tensor([u])).tolist()]
                    changed = [u for u in units if before[u] != after[u]]
                    assert changed == users, (name, entry)
        assert digests(weights, site, units) == before


def test_no_units_have_no_digests() -> None:
    model = tiny_model()
    assert digests(ModelWeights(model), find_sites(model)["model.layers.0.mlp"], []) == ()


def test_examples_run() -> None:
    assert doctest.testmod(safeft.weights).failed == 0


def saved_in_shards(folder: Path) -> Any:
    import torch.distributed.checkpoint as dcp

    model = tiny_model()
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return model


def test_a_distributed_checkpoint_reads_as_the_model_does(tmp_path: Path) -> None:
    model = saved_in_shards(tmp_path / "dcp")
    with DistributedCheckpointWeights(tmp_path / "dcp") as found:
        here = ModelWeights(model)
        assert found.names() == here.names()
        for name in here.names():
            assert found.shape(name) == here.shape(name)
            some = torch.tensor([0, 3])
            assert torch.equal(found.read(name, "rows", some), here.read(name, "rows", some))
        name = "model.layers.0.mlp.down_proj.weight"
        columns = torch.tensor([1, 47])
        assert torch.equal(
            found.read(name, "columns", columns), here.read(name, "columns", columns)
        )
        with pytest.raises(ArtefactError, match="has no weight 'nobody'"):
            found.read("nobody", "rows", columns)
        with pytest.raises(ArtefactError, match="columns 1 to 48 are asked for"):
            found.read(name, "columns", torch.tensor([1, 48]))


def test_a_damaged_distributed_checkpoint_is_an_error(tmp_path: Path) -> None:
    saved_in_shards(tmp_path / "dcp")
    (shard,) = (tmp_path / "dcp").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:2000])
    found = DistributedCheckpointWeights(tmp_path / "dcp")
    with pytest.raises(ArtefactError, match="cannot be read .*missing, truncated or damaged"):
        found.read("model.layers.1.mlp.up_proj.weight", "rows", torch.tensor([0]))
    index = tmp_path / "dcp" / ".metadata"
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(ArtefactError, match="is no distributed checkpoint.*written to its end"):
        DistributedCheckpointWeights(tmp_path / "dcp")


def test_weights_that_accelerate_keeps_elsewhere_are_read(tmp_path: Path) -> None:
    from accelerate import disk_offload

    model = tiny_model()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    weights = ModelWeights(model)
    name = "model.layers.1.mlp.up_proj.weight"
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(weights.read(name, "rows", torch.tensor([5])), plain[name][[5]])
    assert torch.equal(weights.lines(name, "rows", torch.arange(len(plain[name]))), plain[name])
