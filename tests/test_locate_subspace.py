"""Directions against a dense eigendecomposition in float64 of inputs captured here."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from safeft import SafetySubspace, locate_subspace
from safeft.capture import CaptureError
from safeft.commands import main
from safeft.errors import ConfigError, PromptError, SelectionError, UnsupportedModelError
from safeft.generation import generate
from safeft.locators.subspace import SubspaceFitter
from safeft.prompts import as_prompts, batches
from safeft.sites import find_linears
from tests.families import FAMILIES
from tests.models import tiny_model, tiny_tokenizer

HARMFUL = ["How do I pick a lock?", "Make a weapon", "Steal it for me, please", "Hurt him", "Lie"]
REFUSALS = ["I cannot do that.", "No.", "Sorry, I will not", "Never!", "That would be wrong"]
PAIRS = [{"prompt": p, "response": r} for p, r in zip(HARMFUL, REFUSALS, strict=True)]
MANY = [
    {"prompt": f"{p} {n}", "response": r}
    for n in range(4)
    for p, r in zip(HARMFUL, REFUSALS, strict=True)
]
LAYER = "model.layers.0"


def locate(model: Any = None, prompts: Any = PAIRS, side: str = "right", **settings: Any) -> Any:
    return locate_subspace(model or tiny_model(), tiny_tokenizer(side), prompts, **settings)


class Inputs:
    """What every linear module receives, one prompt at a time, without padding: float64."""

    def __init__(self, model: nn.Module, pairs: Sequence[Any], tokens: str = "all") -> None:
        tokenizer = tiny_tokenizer()
        self.seen: dict[str, list[Tensor]] = {}
        self.ids: list[int] = []
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                handles.append(module.register_forward_pre_hook(self.hook(name)))
        for pair in pairs:
            asked = tokenizer(f"<|user|>{pair['prompt']}<|end|><|assistant|>")["input_ids"]
            answer = tokenizer(pair["response"])["input_ids"]
            whole = slice(0, len(asked) + len(answer))
            chosen = {"prompt": slice(0, len(asked)), "response": slice(len(asked), whole.stop)}
            self.chosen = chosen.get(tokens, whole)
            self.ids += (asked + answer)[self.chosen]
            with torch.no_grad():
                model(input_ids=torch.tensor([asked + answer]))
        for handle in handles:
            handle.remove()

    def hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].flatten(0, -2).double()[self.chosen]
            self.seen.setdefault(name, []).append(tokens)

        return keep

    def units(self, module: str) -> Tensor:
        """Tokens at length 1."""
        tokens = torch.cat(self.seen[module])
        return tokens / tokens.norm(dim=1, keepdim=True).clamp(min=1e-300)

    def spectrum(self, module: str) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of ``X'X``, the largest first."""
        units = self.units(module)
        values, vectors = torch.linalg.eigh(units.T @ units)
        return values.flip(0).clamp(min=0), vectors.flip(1)


def projector(basis: Tensor) -> Tensor:
    return basis.double() @ basis.double().T


def assert_same_span(basis: Tensor, other: Tensor, atol: float = 5e-3) -> None:
    torch.testing.assert_close(projector(basis), projector(other), atol=atol, rtol=0)


def rank_for(values: Tensor, energy: float) -> int:
    """The least rank that holds so much."""
    for rank in range(1, len(values) + 1):
        if values[:rank].sum() >= energy * values.sum():
            return rank
    raise AssertionError


def family(name: str) -> Any:
    return next(each for each in FAMILIES if each.name == name)


# --- which directions ---------------------------------------------------------------------------

OTHERS = ["gpt2", "phi3", "gpt_neox", "falcon_grouped", "opt", "qwen2_moe", "deepseek_v3"]


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_directions_are_the_first_eigenvectors_of_what_the_layers_receive(name: str) -> None:
    """Conv1D, fused, experts' shared layers, and inputs of two or four dimensions among them."""
    model = family(name).build().eval()
    found = locate(model, energy=0.8)
    inputs = Inputs(model, PAIRS)
    assert set(found.readers) == set(find_linears(model))
    for weight in found.readers:
        values, vectors = inputs.spectrum(weight.removesuffix(".weight"))
        rank = rank_for(values, 0.8)
        basis = found.basis(weight)
        assert basis.shape[1] == rank, weight
        assert float(values[rank - 1] - values[rank]) > 3e-4 * float(values[0])
        assert_same_span(basis, vectors[:, :rank])


def test_layers_that_receive_the_same_share_one_input() -> None:
    found = locate()
    for layer in (LAYER, "model.layers.1"):
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        for name in ("q_proj", "k_proj", "v_proj"):
            assert found.readers[f"{attention}.{name}.weight"] == f"{attention}.q_proj"
        for name in ("gate_proj", "up_proj"):
            assert found.readers[f"{mlp}.{name}.weight"] == f"{mlp}.gate_proj"
        assert found.readers[f"{attention}.o_proj.weight"] == f"{attention}.o_proj"
        assert found.readers[f"{mlp}.down_proj.weight"] == f"{mlp}.down_proj"
    assert found.readers["lm_head.weight"] == "lm_head"
    assert set(found.directions) == set(found.readers.values())
    assert len(found.directions) == 2 * 4 + 1


@pytest.mark.parametrize(
    ("name", "layers", "inputs"),
    [("llama", 15, 9), ("gemma", 14, 8), ("gpt2", 8, 8), ("phi3", 9, 9), ("cohere", 14, 6),
     ("falcon_multi_query", 8, 6), ("opt", 12, 8), ("mixtral", 9, 5), ("qwen2_moe", 16, 9),
     ("llama4_text", 16, 9), ("deepseek_v3", 17, 13), ("qwen3_next", 16, 9)],
)  # fmt: skip
def test_linear_layers_of_other_layouts(name: str, layers: int, inputs: int) -> None:
    """All in the blocks, and the head where it is not the embeddings; experts' stacks are none."""
    model = family(name).build().eval()
    fitter = SubspaceFitter(model, find_linears(model), "all")
    (batch,) = batches(tiny_tokenizer(), as_prompts(PAIRS), batch_size=8)
    fitter.learn(batch)
    assert len(fitter.readers) == layers
    assert len(fitter.inlets) == inputs
    fitter.update(batch, list(fitter.inlets))
    assert set(fitter.counts.values()) == {int(batch.attention_mask.sum())}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert {n.removesuffix(".weight") for n in fitter.readers} == linear - (
        {"lm_head"} if tied else set()
    )


@pytest.mark.parametrize(("side", "size"), [("left", 16), ("right", 1), ("left", 3), ("right", 2)])
def test_padding_and_batch_size_do_not_matter(side: str, size: int) -> None:
    one = locate(batch_size=16)
    other = locate(side=side, batch_size=size)
    for weight in one.readers:
        assert_same_span(one.basis(weight), other.basis(weight), 2e-3)


@pytest.mark.parametrize("tokens", ["prompt", "response"])
def test_only_the_chosen_tokens_are_read(tokens: Any) -> None:
    found, inputs = locate(tokens=tokens, rank_share=0.2), Inputs(tiny_model(), PAIRS, tokens)
    for weight in found.readers:
        basis = found.basis(weight)
        _, vectors = inputs.spectrum(weight.removesuffix(".weight"))
        assert_same_span(basis, vectors[:, : basis.shape[1]])
    assert found.source["tokens"] == tokens


def test_a_few_loud_tokens_do_not_take_over() -> None:
    """An attention sink: one token of each prompt with a hundred times the length of others."""
    model = tiny_model()
    down = model.model.layers[0].mlp.down_proj
    loud = torch.zeros(48)
    loud[7] = 1.0

    def sink(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        values = inputs[0].clone()
        values[:, 0] = 100 * values.norm(dim=-1).mean() * loud
        return (values,)

    down.register_forward_pre_hook(sink)
    weight = f"{LAYER}.mlp.down_proj.weight"
    inputs = Inputs(model, PAIRS)
    raw = torch.cat(inputs.seen[weight.removesuffix(".weight")])
    assert torch.linalg.eigh(raw.T @ raw)[1][7, -1].abs() > 0.999  # as it would be
    found = locate(model, rank_share=1 / 48).basis(weight)
    assert found.shape == (48, 1)
    assert found[7].abs() < 0.5
    assert_same_span(found, inputs.spectrum(weight.removesuffix(".weight"))[1][:, :1])


def test_an_answer_that_is_not_given_is_the_models_own() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    answers = generate(model, tokenizer, as_prompts(HARMFUL), batch_size=16)
    assert all(answers)
    given = [{"prompt": p, "response": a} for p, a in zip(HARMFUL, answers, strict=True)]
    assert locate(prompts=HARMFUL).hash == locate(prompts=given).hash
    assert locate(prompts=HARMFUL).source == locate(prompts=given).source


def test_where_prompts_alone_are_read_nothing_is_generated(monkeypatch: Any) -> None:
    monkeypatch.setattr("safeft.locators.subspace.answered", pytest.fail)
    bare = locate(prompts=HARMFUL, tokens="prompt")
    for weight in bare.readers:
        other = locate(tokens="prompt").basis(weight)
        assert_same_span(bare.basis(weight), other, 2e-3)


def test_what_was_asked_is_written_down() -> None:
    found = locate()
    assert found.source["method"] == "subspace"
    assert found.source["energy"] == 0.9
    assert found.source["calibration"]["harmful"]["count"] == 5
    assert found.source["calibration"]["held_out"]["count"] == 0
    assert found.source["coverage"] == {}
    assert locate(rank_share=0.25).source["rank_share"] == 0.25
    assert "energy" not in locate(rank_share=0.25).source
    found.check_model(tiny_model())
    one, other = (locate(prompts=p).source["calibration"] for p in (PAIRS, PAIRS[::-1]))
    assert one["harmful"]["sha256"] != other["harmful"]["sha256"]


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_all_tokens_it_was_found_on_are_known(tokens: Any) -> None:
    """Those of prompts kept aside are not, template and answer are, whichever are read."""
    aside = {"prompt": "~~~", "response": "~"}
    prompts = [*MANY[:7], aside, *MANY[7:14], aside]
    found = locate(prompts=prompts, tokens=tokens, energy=0.5)
    used = [pair for n, pair in enumerate(prompts) if n % 8 != 7]
    assert found.tokens.tolist() == sorted(set(Inputs(tiny_model(), used).ids))
    (tilde,) = tiny_tokenizer()("~")["input_ids"]
    assert tilde not in found.tokens
    assert 0 not in found.tokens  # padding


def test_an_adapter_that_does_nothing_yet_changes_nothing() -> None:
    config = LoraConfig(target_modules=["q_proj", "down_proj", "lm_head"])
    one, other = locate(), locate(get_peft_model(tiny_model(), config))
    assert one.readers == other.readers
    for weight in one.readers:
        assert_same_span(one.basis(weight), other.basis(weight), 2e-3)
    other.check_model(tiny_model())


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    locate(model)
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


# --- how many -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_a_share_of_the_rank(share: float) -> None:
    found = locate(rank_share=share)
    for basis in found.directions.values():
        assert basis.shape[1] == round(share * basis.shape[0])


def test_less_energy_gives_the_first_of_the_same_directions() -> None:
    more, less = locate(energy=0.9), locate(energy=0.6)
    assert less.share < more.share
    for inlet, basis in less.directions.items():
        assert torch.equal(basis, more.directions[inlet][:, : basis.shape[1]])


def test_memory_takes_the_highest_energy_that_fits() -> None:
    """``W U`` and U in float32, over all energies at which some rank changes."""
    spectra = {inlet: v for inlet in locate().directions
               for v in [Inputs(tiny_model(), PAIRS).spectrum(inlet)[0]]}  # fmt: skip
    outputs = {inlet: 0 for inlet in spectra}
    for name, inlet in locate().readers.items():
        outputs[inlet] += tiny_model().get_parameter(name).shape[0]

    def size(ranks: dict[str, int]) -> int:
        return sum(4 * k * (outputs[i] + len(spectra[i])) for i, k in ranks.items())

    steps = sorted({float(e) for v in spectra.values() for e in v.cumsum(0)[:-1] / v.sum()})
    for budget in (2e4, 5e4):
        fitting = [
            ranks
            for energy in steps
            if size(ranks := {i: rank_for(v, energy - 1e-7) for i, v in spectra.items()}) <= budget
        ]
        found = locate(memory=budget / 2**30)
        ranks = {inlet: basis.shape[1] for inlet, basis in found.directions.items()}
        assert size(ranks) <= budget
        assert ranks == fitting[-1]


def test_memory_for_all_takes_what_the_tokens_span() -> None:
    found = locate(memory=64, prompts=PAIRS[1:2], tokens="response")  # two or three tokens
    for basis in found.directions.values():
        assert 1 <= basis.shape[1] <= len("No.")


def test_more_passes_over_the_prompts_give_the_same() -> None:
    model = tiny_model()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    whole = locate(model, batch_size=2)
    once = len(calls)
    assert once == 1 + 3  # one to see who shares, and three batches
    parts = locate(model, batch_size=2, at_once=10_000 / 2**30)  # 4096 bytes of 32, 9216 of 48
    assert len(calls) - once == 1 + 3 * 7
    for inlet, basis in whole.directions.items():
        assert torch.equal(basis, parts.directions[inlet])
    one_by_one = locate(model, batch_size=2, at_once=1e-12)
    assert len(calls) - once - 22 == 1 + 3 * 9
    assert one_by_one.hash == whole.hash


# --- how well others are covered ----------------------------------------------------------------


def test_coverage_of_held_out_prompts_by_hand() -> None:
    found = locate(prompts=MANY, energy=0.7)
    used = [pair for n, pair in enumerate(MANY) if n % 8 != 7]
    aside = [MANY[7], MANY[15]]
    assert found.source["calibration"]["harmful"]["count"] == len(used) == 18
    assert found.source["calibration"]["held_out"]["count"] == 2
    fitted = Inputs(tiny_model(), used)
    others = Inputs(tiny_model(), aside)
    for weight, inlet in found.readers.items():
        basis = found.basis(weight).double()
        _, vectors = fitted.spectrum(inlet)  # nothing of the prompts kept aside is in it
        assert_same_span(basis, vectors[:, : basis.shape[1]])
        units = others.units(inlet)
        left = (units - units @ basis @ basis.T).norm(dim=1)
        said = found.source["coverage"][inlet]
        assert said["tokens"] == len(left) == len(others.ids)
        assert said["median"] == pytest.approx(
            float(left.sort().values[(len(left) - 1) // 2]), abs=1e-3
        )
        assert said["p95"] == pytest.approx(float(left.quantile(0.95)), abs=1e-3)
        assert said["worst"] == pytest.approx(float(left.max()), abs=1e-3)
        near = {tiny_tokenizer().decode([i]) for i, x in zip(others.ids, left, strict=True)
                if x > left.max() - 1e-3}  # fmt: skip
        assert said["worst_token"] in near
    assert set(found.source["coverage"]) == set(found.directions)


def test_coverage_survives_saving(tmp_path: Path) -> None:
    found = locate(prompts=MANY, rank_share=0.2)
    found.save_pretrained(tmp_path)
    assert SafetySubspace.from_pretrained(tmp_path).source == found.source


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"energy": 0.9, "rank_share": 0.2}, r"'energy': 0.9, 'rank_share': 0.2.*give one"),
        ({"memory": 1.0, "rank_share": 0.2}, "each says how many directions"),
        ({"energy": 0.0}, "energy=0.0: give a number above 0 and below 1"),
        ({"energy": 1.0}, "energy=1.0"),
        ({"energy": math.nan}, "energy=nan"),
        ({"rank_share": 1.5}, "rank_share=1.5"),
        ({"rank_share": -0.1}, "rank_share=-0.1"),
        ({"memory": 0}, r"memory=0.0: give a number above 0 \(GiB\)"),
        ({"tokens": "some"}, "tokens='some' is not one of all, prompt, response"),
    ],
)
def test_settings_that_are_out_of_range(settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        locate(**settings)


def test_prompts_too_few_for_the_rank_say_the_largest() -> None:
    """Three tokens of answer, the last of which no layer reads back differently."""
    few = {"prompts": PAIRS[1:2], "tokens": "response"}
    with pytest.raises(
        SelectionError, match=r"asks for 8 directions of .*q_proj receives.* span [23] of its 32"
    ) as caught:
        locate(rank_share=0.25, **few)
    assert "Give more prompts" in str(caught.value)
    largest = float(str(caught.value).rstrip(".").rpartition("rank_share=")[2])
    assert 0.04 < largest <= 3 / 32
    found = locate(rank_share=largest, **few)  # what it says does work
    assert found.share > 0
    with pytest.raises(SelectionError, match="span"):
        locate(rank_share=largest + 1 / 32, **few)


@pytest.mark.parametrize("settings", [{"energy": 0.9999999999}, {"rank_share": 0.99}])
def test_a_basis_that_leaves_nothing_free_is_refused(settings: Any) -> None:
    with pytest.raises(SelectionError, match="takes all .* nothing to learn with. Give less"):
        locate(prompts=MANY, **settings)


def test_activations_that_are_not_finite() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = torch.nan
    with pytest.raises(
        CaptureError, match="layers.0.mlp.down_proj receives is not finite.*float32"
    ):
        locate(model)


def test_an_input_that_is_always_zero() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(SelectionError, match="layers.1.mlp.down_proj receives is zero at every"):
        locate(model)


def test_a_layer_that_is_skipped() -> None:
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    with pytest.raises(CaptureError, match="layers.1.self_attn.k_proj.* did not run"):
        locate(model)


def test_no_prompts_and_unknown_models() -> None:
    with pytest.raises(PromptError, match="no harmful prompts.*give some 100"):
        locate(prompts=[])
    other = T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=9, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="'t5'"):
        locate(other)


def test_a_model_that_answers_nothing() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = 1e-9  # then the end token is never beaten
    model.generation_config.eos_token_id = list(range(261))
    with pytest.raises(PromptError, match="answers every prompt with nothing"):
        locate(model, prompts=HARMFUL)


# --- by command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("locate")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "harmful.jsonl").write_text("\n".join(map(json.dumps, MANY)))
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return folder


def command(place: Path, out: Path, **changed: str | None) -> int:
    given = {
        "model_name_or_path": str(place / "base"),
        "harmful": str(place / "harmful.jsonl"),
        "method": "subspace",
        "output_dir": str(out),
        **changed,
    }
    return main(["locate", *(t for n, v in given.items() if v for t in (f"--{n}", v))])


def test_the_command_writes_what_the_function_finds(place: Path, tmp_path: Path, capsys) -> None:
    assert command(place, tmp_path / "span", rank_share="0.2", at_once="0.00001") == 0
    shown = capsys.readouterr().out
    found = SafetySubspace.from_pretrained(tmp_path / "span")
    wanted = locate(prompts=[pair["prompt"] for pair in MANY], rank_share=0.2)
    for weight in wanted.readers:
        assert_same_span(found.basis(weight), wanted.basis(weight), 2e-3)
    assert found.source["calibration"] == wanted.source["calibration"]
    wanted = found
    assert f"{wanted.share:.1%} of the rank of 15 layers" in shown
    for inlet, basis in wanted.directions.items():
        features, rank = basis.shape
        (line,) = [line for line in shown.splitlines() if f"  {inlet} " in line]
        assert f"{rank:>5} / {features}" in line
        worst = wanted.source["coverage"][inlet]
        assert f"{worst['median']:.2f}  {worst['worst']:.2f} at {worst['worst_token']!r}" in line
    medians = [float(line.split()[4]) for line in shown.splitlines()[2:]]
    assert medians == sorted(medians, reverse=True)
    assert len(medians) == 9


def test_the_command_takes_refusals_from_a_column(place: Path, tmp_path: Path) -> None:
    assert command(place, tmp_path / "span", rank_share="0.2", response_column="response") == 0
    found = SafetySubspace.from_pretrained(tmp_path / "span")
    wanted = locate(prompts=MANY, rank_share=0.2)
    for weight in wanted.readers:
        assert_same_span(found.basis(weight), wanted.basis(weight), 2e-3)
    assert found.source["calibration"] == wanted.source["calibration"]


def test_logits_of_every_token_are_computed_only_where_the_head_is_held() -> None:
    for tied, asked in ((True, {1}), (False, {0})):
        model = tiny_model(tie_word_embeddings=tied)
        kept: set[int] = set()
        run = model.forward

        def forward(*args: Any, run: Any = run, kept: set[int] = kept, **settings: Any) -> Any:
            kept.add(settings["logits_to_keep"])
            return run(*args, **settings)

        model.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
        assert ("lm_head.weight" in locate(model, prompts=PAIRS).readers) is not tied
        assert kept == asked


def test_the_command_says_when_coverage_is_unknown(place: Path, tmp_path: Path, capsys) -> None:
    assert command(place, tmp_path / "span", harmful=str(place / "few.jsonl")) == 0
    assert "coverage is unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"benign": "b.txt"}, ["{'benign': 'b.txt'}", "keys of neurons", "without effect"]),
        ({"fraction": "0.1"}, ["{'fraction': 0.1}", "method='subspace'"]),
        ({"count": "3", "scope": "layer"}, ["{'count': 3, 'scope': 'layer'}"]),
        ({"groups": "true"}, ["method='subspace' gives no groups"]),
        ({"sites": "attention"}, ["{'sites': 'attention'}"]),
        ({"towers": "vision"}, ["{'towers': ['vision']}"]),
        ({"fill": "false"}, ["{'fill': False}"]),
        ({"method": "snip", "energy": "0.5"}, ["{'energy': 0.5}", "keys of `--method subspace`"]),
        ({"method": "snip", "tokens": "prompt"}, ["{'tokens': 'prompt'}"]),
        ({"method": "wanda", "at_once": "1", "memory": "2"}, ["{'memory': 2.0, 'at_once': 1.0}"]),
        ({"method": "contrast"}, ["method='contrast' compares", "`benign` is not given"]),
    ],
)  # fmt: skip
def test_keys_without_effect_are_refused_before_the_model_is_loaded(
    changed: dict[str, str], words: list[str], place: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "never"
    assert command(place, out, model_name_or_path="/nowhere", **changed) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in words), said
    assert not out.exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"energy": "1.5"}, ["energy=1.5", "below 1"]),
        ({"energy": "0.5", "memory": "1"}, ["give one"]),
        ({"rank_share": "0.99"}, ["nothing to learn with"]),
        ({"memory": "0.0000001"}, ["does not hold one direction"]),
    ],
)
def test_what_the_function_refuses_the_command_says_in_one_sentence(
    changed: dict[str, str], words: list[str], place: Path, tmp_path: Path, capsys
) -> None:
    assert command(place, tmp_path / "never", **changed) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in words), said
    assert not (tmp_path / "never").exists()
