"""A fold is the hook up to rounding, in every family; and it can be undone to the bit."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from safeft import Dampener, NeuronSet, find_sites
from safeft.detox.certificate import certify_fold
from safeft.detox.folding import MARK, Fold, FoldError, fold, unfold
from safeft.detox.hooks import dampened
from safeft.detox.saving import save_folded, undo_fold
from safeft.errors import ArtefactError, FingerprintError
from tests.families import FAMILIES
from tests.models import tiny_model, tiny_tokenizer
from tests.truth import Truth

IDS = torch.arange(5, 17).view(2, 6)


def dampener_of(model: nn.Module) -> Dampener:
    """Silent, halved and weaker units in every site, the last unit among them."""
    gains = {
        name: {0: 0.0, site.units // 2: 0.5, site.units - 1: 0.71}
        for name, site in find_sites(model).items()
    }
    return Dampener.of(model, gains)


@torch.no_grad()
def output(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**(inputs or {"input_ids": IDS}))[0]


def bit_identical(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_folded_is_hooked_to_rounding_and_only_written_lines_move(family: Any) -> None:
    """The lines are those of the hand-written layouts, not of the code that folds."""
    model, inputs = family.build(), family.inputs()
    dampener = dampener_of(model)
    before = deepcopy(model)
    plain = output(model, **inputs)
    with dampened(model, dampener):
        hooked = output(model, **inputs)
    done = fold(model, dampener)
    assert not torch.allclose(plain, hooked)
    assert (output(model, **inputs) - hooked).abs().max() < 3e-6 * plain.abs().max()
    certificate = certify_fold(before, model, dampener)
    assert certificate.exact, certificate.summary()
    assert_only_written_moved(before, model, dampener, family.truths())
    unfold(model, done)
    assert bit_identical(model, before)


def assert_only_written_moved(
    before: nn.Module, after: nn.Module, dampener: Dampener, truths: tuple[Truth, ...]
) -> None:
    wanted = {name: weight.clone() for name, weight in before.named_parameters()}
    with torch.no_grad():
        for truth in truths:
            units = dampener.neurons.indices.get(truth.site, ())
            for unit, gain in zip(units, dampener.gains.get(truth.site, ()), strict=True):
                wanted[truth.writer.parameter][truth.writer.index(unit)] *= gain
    for name, weight in after.named_parameters():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    model: Any = tiny_model()
    model.to(dtype)
    before, dampener = deepcopy(model), dampener_of(model)
    done = fold(model, dampener)
    weight, was = (m.model.layers[0].mlp.down_proj.weight for m in (model, before))
    assert torch.equal(weight[:, 24], (was[:, 24].double() * 0.5).to(dtype))
    assert torch.equal(weight[:, 47].float(), (was[:, 47].float() * 0.71).to(dtype).float())
    assert not weight[:, 0].any()
    assert certify_fold(before, model, dampener).exact
    unfold(model, done)
    assert bit_identical(model, before)


def test_a_folded_checkpoint_runs_in_plain_transformers_and_comes_back(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "base")
    before, dampener = deepcopy(model), dampener_of(model)
    save_folded(model, tokenizer, fold(model, dampener), tmp_path / "folded")
    certificate = certify_fold(tmp_path / "base", tmp_path / "folded", dampener)
    assert certificate.exact
    assert certificate.untouched["sha256_base"] == certificate.untouched["sha256_now"]
    assert all(each["sha256_base"] != each["sha256_now"] for each in certificate.scaled)
    code = (
        "import sys\nsys.modules['safeft'] = None\n"
        "import torch, json\nfrom transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(tmp_path / 'folded')!r})\n"
        f"print(json.dumps(model(torch.tensor({IDS.tolist()})).logits.tolist()))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    found = torch.tensor(json.loads(shown.strip().splitlines()[-1]))
    with dampened(before, dampener):
        torch.testing.assert_close(found, output(before), rtol=1e-5, atol=1e-5)
    again = type(model).from_pretrained(tmp_path / "folded")
    undo_fold(again, tokenizer, tmp_path / "folded", tmp_path / "undone")
    undone = type(model).from_pretrained(tmp_path / "undone")
    assert bit_identical(undone, before)
    assert not hasattr(undone.config, MARK)
    assert not (tmp_path / "undone/safeft_fold.json").exists()


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "qwen2_vl", "llava", "gpt_oss"])
def test_families_that_are_saved_under_other_names(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    base, inputs = family.build(), family.inputs()
    base.save_pretrained(tmp_path / "base")
    model, dampener = deepcopy(base), dampener_of(base)
    save_folded(model, tiny_tokenizer(), fold(model, dampener), tmp_path / "folded")
    certificate = certify_fold(tmp_path / "base", tmp_path / "folded", dampener)
    assert certificate.exact, certificate.summary()
    loaded = type(base).from_pretrained(tmp_path / "folded", attn_implementation="eager")
    torch.testing.assert_close(output(loaded.eval(), **inputs), output(model, **inputs))
    undo_fold(loaded, tiny_tokenizer(), tmp_path / "folded", tmp_path / "undone")
    assert bit_identical(type(base).from_pretrained(tmp_path / "undone"), base)


def test_a_second_fold_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    done = fold(model, Dampener.of(model, {"model.layers.0.mlp": {3: 0.0}}))
    other = Dampener.of(tiny_model(), {"model.layers.1.mlp": {5: 0.5}})
    with pytest.raises(FoldError, match="folded into this model already"):
        fold(model, other)
    save_folded(model, tiny_tokenizer(), done, tmp_path / "folded")
    loaded = type(model).from_pretrained(tmp_path / "folded")
    with pytest.raises(FoldError, match="folded into this model already"):
        fold(loaded, other)
    unfold(loaded, Fold.load(tmp_path / "folded"))
    fold(loaded, other)


def test_refused_where_it_would_not_be_exact() -> None:
    site = "model.layers.0.mlp"
    capped = Dampener.of(tiny_model(), {}, ceilings={site: {3: 1.0}})
    with pytest.raises(FoldError, match="no weight does that"):
        fold(tiny_model(), capped)
    dampener = Dampener.of(tiny_model(), {site: {3: 0.0}})
    adapted: Any = get_peft_model(tiny_model(), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(FoldError, match="carries an adapter"):
        fold(adapted, dampener)
    tied = tiny_model()
    tied.model.layers[1].mlp.down_proj.weight = tied.model.layers[0].mlp.down_proj.weight
    with pytest.raises(FoldError, match="read in several places"):
        fold(tied, Dampener.of(tied, {site: {3: 0.0}}))
    coded = tiny_model()
    dampener = Dampener.of(coded, {site: {3: 0.0}})
    codes = coded.model.layers[0].mlp.down_proj
    parametrize.register_parametrization(codes, "weight", nn.Identity())
    with pytest.raises(FoldError, match="no plain parameter"):
        fold(coded, dampener)
    with pytest.raises(FingerprintError):
        fold(tiny_model(seed=1), dampener)


def test_codes_of_quantised_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    dampener = Dampener.of(model, {"model.layers.0.mlp": {3: 0.0}})
    layer = model.model.layers[0].mlp.down_proj
    codes = torch.zeros(layer.weight.shape, dtype=torch.float8_e4m3fn)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    # Codes that stand for the weights the dampener was made for pass this check.
    monkeypatch.setattr(NeuronSet, "check_model", lambda *_, **__: None)
    with pytest.raises(FoldError, match="codes of a quantised layer"):
        fold(model, dampener)


def test_nothing_is_changed_by_a_fold_that_is_refused() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(
        model.model.layers[1].mlp.down_proj.weight.detach().T.contiguous().T
    )
    before = deepcopy(model)
    dampener = Dampener.of(model, {f"model.layers.{n}.mlp": {3: 0.0} for n in (0, 1)})
    with pytest.raises(FoldError, match="a view of something else"):
        fold(model, dampener)
    assert bit_identical(model, before)
    assert not hasattr(model.config, MARK)


def test_undoing_what_was_tuned_or_never_folded_is_refused() -> None:
    model = tiny_model()
    dampener = Dampener.of(model, {"model.layers.0.mlp": {3: 0.5}})
    done = fold(model, dampener)
    with pytest.raises(FoldError, match="nothing is folded in"):
        unfold(tiny_model(), done)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 3] += 1
    with pytest.raises(FoldError, match="tuned since"):
        unfold(model, done)


def test_damaged_records_and_taken_folders(tmp_path: Path) -> None:
    model = tiny_model()
    done = fold(model, dampener_of(model))
    save_folded(model, tiny_tokenizer(), done, tmp_path / "folded")
    with pytest.raises(ArtefactError, match="is there already"):
        save_folded(model, tiny_tokenizer(), done, tmp_path / "folded")
    originals = tmp_path / "folded/safeft_fold.safetensors"
    originals.write_bytes(originals.read_bytes()[:-8])
    with pytest.raises(ArtefactError, match="cannot be undone"):
        Fold.load(tmp_path / "folded")
    with pytest.raises(ArtefactError, match="cannot be undone"):
        Fold.load(tmp_path)
    assert not list(tmp_path.glob(".*"))
