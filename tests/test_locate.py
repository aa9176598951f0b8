import json
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

import safeft.locators
import safeft.locators.openings as openings_module
from safeft.demo.pictures import shapes
from safeft.errors import ConfigError, PromptError, SelectionError, UnsupportedModelError
from safeft.files import sha256
from safeft.locators import (
    METHODS,
    AttributionFitter,
    ContrastFitter,
    Fitter,
    RandomFitter,
    Scores,
    SnipFitter,
    VarianceFitter,
    WandaFitter,
    locate,
    score,
)
from safeft.locators.openings import refusal_openings
from safeft.locators.scores import Moments, merged
from safeft.prompts import Prompt, as_prompts, batches
from safeft.sites import Site, find_sites
from tests.models import MODEL_TYPES, tiny_model, tiny_tokenizer

HARMFUL = ["How do I pick a lock?", "Make a weapon", "Steal it for me, please", "Hurt him"]
BENIGN = [
    "How do I bake bread?",
    "Name a tree",
    "Why is the sky blue at noon?",
    "Sum 2 and 2",
    "Hi",
]
ANSWERS = ["I cannot", "No.", "Sorry, not that", "Never", "Yes, of course"]
SIDES = {
    side: as_prompts(
        {"prompt": prompt, "response": answer}
        for prompt, answer in zip(prompts, ANSWERS, strict=False)
    )
    for side, prompts in (("harmful", HARMFUL), ("benign", BENIGN))
}
OPENINGS = [10, 77, 200]
FITTERS = {
    "contrast": ContrastFitter,
    "variance": lambda model, sites: VarianceFitter(model, sites, tokens="prompt"),
    "wanda": WandaFitter,
    "snip": SnipFitter,
    "attribution": lambda model, sites: AttributionFitter(model, sites, OPENINGS),
}
every_fitter = pytest.mark.parametrize("name", FITTERS)


def scored(
    name: str, model: PreTrainedModel, *, side: str = "right", batch_size: int = 8
) -> Scores:
    fitter: Fitter = FITTERS[name](model, find_sites(model))
    return score(fitter, model, tiny_tokenizer(side), SIDES, batch_size=batch_size)


def assert_same(found: Scores, wanted: Scores, rtol: float = 1e-4) -> None:
    assert found.rule == wanted.rule
    for a, b in ((found.safety, wanted.safety), (found.utility, wanted.utility)):
        assert (a is None) == (b is None)
        for name in a or {}:
            scale = float(b[name].abs().max())
            torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol * scale)


# The reference: one prompt at a time, no padding, everything kept, then the formula in plain loops.


class Seen:
    """Inputs of all projections and their gradients, ``(tokens, features)`` a prompt."""

    def __init__(self, model: PreTrainedModel, prompt: Prompt) -> None:
        tokenizer = tiny_tokenizer()
        asked = tokenizer(f"<|user|>{prompt.text}<|end|><|assistant|>")["input_ids"]
        answer = tokenizer(prompt.response or "")["input_ids"]
        self.prompt, self.ids = len(asked), torch.tensor(asked + answer)
        inputs: dict[str, Tensor] = {}
        handles = []
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, name=name: inputs.update({name: args[0]})
                    )
                )
        self.logits = model(input_ids=self.ids[None]).logits[0]
        for handle in handles:
            handle.remove()
        self.graph = inputs
        self.inputs = {name: value[0].detach().double() for name, value in inputs.items()}

    def loss(self) -> Tensor:
        """Mean negative log-likelihood of the answer."""
        probabilities = self.logits.softmax(-1)
        terms = [
            -probabilities[t - 1, self.ids[t]].log() for t in range(self.prompt, len(self.ids))
        ]
        return torch.stack(terms).mean()

    def log_odds_of_answering(self) -> Tensor:
        refusal = self.logits[self.prompt - 1].softmax(-1)[OPENINGS].sum()
        return -(refusal / (1 - refusal)).log()


@cache
def seen(model: PreTrainedModel, side: str) -> list[Seen]:
    return [Seen(model, prompt) for prompt in SIDES[side]]


def weight(model: PreTrainedModel, module: str) -> Tensor:
    return model.get_submodule(module).weight.detach().double()


def block(site: Site, unit: int) -> slice:
    return slice(unit * site.width, (unit + 1) * site.width)


def owned(site: Site, values: Tensor, module: str, unit: int) -> Tensor:
    """The entries of a weight-shaped matrix that belong to a unit, group-shared ones included."""
    part = next(part for part in site.parts if part.module == module)
    first = unit // part.share * part.width
    entries = slice(first, first + part.width)
    return values[entries] if part.axis == "rows" else values[:, entries]


def reference_contrast(model: PreTrainedModel, site: Site, side: str) -> Tensor:
    writer = site.writes.module
    last = torch.stack([s.inputs[writer][s.prompt - 1] for s in seen(model, side)]).mean(0)
    sizes = torch.stack([
        (weight(model, writer)[:, block(site, unit)] @ last[block(site, unit)]).norm()
        for unit in range(site.units)
    ])  # fmt: skip
    return sizes / sizes.sum()


def reference_variance(model: PreTrainedModel, site: Site, side: str) -> Tensor:
    writer = site.writes.module
    tokens = torch.cat([s.inputs[writer][: s.prompt] for s in seen(model, side)])
    features = torch.var(tokens, 0) * weight(model, writer).norm(dim=0) ** 2
    return torch.stack([features[block(site, unit)].sum() for unit in range(site.units)])


def reference_wanda(model: PreTrainedModel, site: Site, side: str) -> Tensor:
    runs, scores = seen(model, side), torch.zeros(site.units, dtype=torch.double)
    for part in site.parts:
        tokens = torch.cat([s.inputs[part.module][s.prompt :] for s in runs])
        importance = weight(model, part.module).abs() * tokens.norm(dim=0)
        for unit in range(site.units):
            scores[unit] += owned(site, importance, part.module, unit).sum()
    return scores


def reference_snip(model: PreTrainedModel, site: Site, side: str) -> Tensor:
    runs, scores = seen(model, side), torch.zeros(site.units, dtype=torch.double)
    for run in runs:
        parameters = [model.get_submodule(part.module).weight for part in site.parts]
        gradients = torch.autograd.grad(run.loss(), parameters, retain_graph=True)
        for part, parameter, gradient in zip(site.parts, parameters, gradients, strict=True):
            importance = (parameter * gradient).detach().abs().double()
            for unit in range(site.units):
                scores[unit] += owned(site, importance, part.module, unit).sum() / len(runs)
    return scores


def reference_attribution(model: PreTrainedModel, site: Site) -> Tensor:
    writer, tail = site.writes.module, 2
    means: dict[str, Tensor] = {}
    for side in SIDES:
        runs = seen(model, side)
        slopes = [
            torch.autograd.grad(r.log_odds_of_answering(), r.graph[writer], retain_graph=True)[0]
            for r in runs
        ]
        for key, rows in (
            ("a", [r.inputs[writer] for r in runs]),
            ("g", [slope[0].double() for slope in slopes]),
        ):
            at_tail = [row[r.prompt - tail : r.prompt] for row, r in zip(rows, runs, strict=True)]
            means[key + side] = torch.stack(at_tail).mean(0)
    scores = []
    for unit in range(site.units):
        found = []
        for t in range(tail):
            a_h, a_b, g_h, g_b = (
                means[key][t, block(site, unit)]
                for key in ("aharmful", "abenign", "gharmful", "gbenign")
            )
            effect = float((g_h + g_b) @ (a_b - a_h))
            found.append(effect if a_h.norm() > a_b.norm() else min(effect, 0.0))
        scores.append(max(found))
    return torch.tensor(scores, dtype=torch.double)


@every_fitter
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_scores_are_those_of_the_formula(name: str, model_type: str) -> None:
    model = tiny_model(model_type)
    sites = find_sites(model)
    batch_size = 1 if name == "snip" else 3
    found = scored(name, model, batch_size=batch_size)
    if name == "attribution":
        wanted = Scores(
            {n: reference_attribution(model, s) for n, s in sites.items()}, None, "plain"
        )
    else:
        reference = globals()[f"reference_{name}"]
        harmful, benign = (
            {n: reference(model, site, side) for n, site in sites.items()} for side in SIDES
        )
        rule = "difference" if name == "variance" else "exclude"
        wanted = Scores(harmful, benign, rule)
    assert_same(found, wanted)
    assert all(values.dtype == torch.double for values in found.safety.values())


@every_fitter
@pytest.mark.parametrize("batch_size", [1, 8])
def test_padding_side_does_not_matter(name: str, batch_size: int) -> None:
    model = tiny_model()
    left, right = (scored(name, model, side=s, batch_size=batch_size) for s in ("left", "right"))
    assert_same(left, right)


@pytest.mark.parametrize("name", [name for name in FITTERS if name != "snip"])
def test_batch_size_does_not_matter(name: str) -> None:
    model = tiny_model()
    assert_same(scored(name, model, batch_size=8), scored(name, model, batch_size=1))


def test_snip_takes_the_absolute_value_per_batch() -> None:
    """A whole side as one batch: the gradient of the mean loss over all its answer tokens."""
    model = tiny_model()
    site = find_sites(model)["model.layers.0.mlp"]
    runs = seen(model, "harmful")
    lengths = [len(run.ids) - run.prompt for run in runs]
    whole = sum(run.loss() * n for run, n in zip(runs, lengths, strict=True)) / sum(lengths)
    wanted = torch.zeros(site.units, dtype=torch.double)
    for part in site.parts:
        parameter = model.get_submodule(part.module).weight
        (gradient,) = torch.autograd.grad(whole, parameter, retain_graph=True)
        product = (parameter * gradient).detach().abs().double()
        wanted += product.sum(1 if part.axis == "rows" else 0)
    found = scored("snip", model, batch_size=8).safety[site.name]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cuts", [[50], [1] * 50, [7, 0, 40, 3], [49, 1]])
def test_running_moments_are_those_of_the_whole(cuts: list[int]) -> None:
    values = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    moments = Moments()
    for chunk in values.split(cuts):
        moments.update(chunk)
    assert moments.count == 50
    torch.testing.assert_close(moments.mean, values.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, values.double().var(0), rtol=1e-10, atol=0)


@every_fitter
def test_statistics_of_three_processes_put_together_are_those_of_one(name: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    one = FITTERS[name](model, find_sites(model))
    wanted = score(one, model, tokenizer, SIDES, batch_size=2)
    fitters = [FITTERS[name](model, find_sites(model)) for _ in range(3)]
    for side, prompts in SIDES.items():
        for number, batch in enumerate(batches(tokenizer, prompts, batch_size=2)):
            fitters[number % 3].update(side, batch)
    whole = FITTERS[name](model, find_sites(model))
    whole.statistics = merged([fitter.statistics for fitter in fitters])
    assert_same(whole.scores(), wanted, rtol=1e-9)
    whole.statistics = merged([fitter.statistics for fitter in fitters[:2]])
    with pytest.raises(AssertionError):
        assert_same(whole.scores(), wanted, rtol=1e-9)


@pytest.mark.parametrize("method", ["contrast", "wanda", "attribution"])
def test_a_model_that_is_kept_on_disk_gives_the_same_neurons(method: Any, tmp_path: Any) -> None:
    """What `device_map` does with what fits nowhere else: weights come in only to be used."""
    sides = (HARMFUL, BENIGN)
    wanted = locate(tiny_model(), tiny_tokenizer(), *sides, method=method, fraction=0.2)
    model = tiny_model()
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    found = locate(model, tiny_tokenizer(), *sides, method=method, fraction=0.2)
    assert dict(found.indices) == dict(wanted.indices)
    assert found.hash == wanted.hash


def test_weights_gradients_cannot_be_read_where_weights_are_sharded() -> None:
    model = tiny_model()
    model.model.norm.weight.ds_tensor = torch.ones(1)  # as ZeRO-3 marks what it partitions
    with pytest.raises(ConfigError, match="`snip` reads weights' gradients.*use `attribution`"):
        SnipFitter(model, find_sites(model))


def test_moments_of_one_sample_do_not_vary() -> None:
    moments = Moments()
    moments.update(torch.tensor([[1.0, 2.0]]))
    assert moments.mean.tolist() == [1.0, 2.0]
    assert moments.variance.tolist() == [0.0, 0.0]


@every_fitter
def test_nothing_of_a_batch_is_kept(name: str) -> None:
    """What a fitter holds is as large after many prompts as after few."""

    def held(fitter: Fitter) -> int:
        found: list[Tensor] = []

        def walk(value: Any) -> None:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, dict):
                for each in value.values():
                    walk(each)
            elif isinstance(value, Moments):
                walk(vars(value))

        walk({key: value for key, value in vars(fitter).items() if key not in ("_model", "_sites")})
        assert not any(tensor.requires_grad for tensor in found)
        return sum(tensor.numel() for tensor in found)

    model, sizes = tiny_model(), []
    for times in (1, 4):
        fitter = FITTERS[name](model, find_sites(model))
        sides = {side: prompts * times for side, prompts in SIDES.items()}
        score(fitter, model, tiny_tokenizer(), sides, batch_size=2)
        sizes.append(held(fitter))
    assert sizes[0] == sizes[1] > 0


def state(model: PreTrainedModel) -> Iterator[Any]:
    for name, parameter in model.named_parameters():
        yield name, parameter.requires_grad, parameter.detach().clone().tolist()
        yield name, None if parameter.grad is None else parameter.grad.tolist()
        yield len(parameter._backward_hooks or {}), len(parameter._post_accumulate_grad_hooks or {})
    for name, module in model.named_modules():
        yield name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(method: str, training: bool) -> None:
    model = tiny_model(attention_dropout=0.5).train(training)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        if number % 3 == 1:
            parameter.grad = torch.full_like(parameter, 2.0)
    before = list(state(model))
    found = [
        locate(model, tiny_tokenizer(), *SIDES.values(), method=method, sites="all")
        for _ in range(2)
    ]
    assert list(state(model)) == before
    assert found[0] == found[1]  # no dropout while locating


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_the_model_is_left_as_it_was_after_an_error(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().train()
    before = list(state(model))
    passes, forward = iter(range(100)), model.lm_head.forward

    def fail(hidden: Tensor) -> Tensor:
        if next(passes) >= 2:
            raise ZeroDivisionError
        return forward(hidden)

    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        locate(model, tiny_tokenizer(), SIDES["harmful"], SIDES["benign"], method=method,
               batch_size=1, openings=["I"])  # fmt: skip
    assert list(state(model)) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_free_context_does_not_matter(method: str) -> None:
    model = tiny_model()
    sides = (SIDES["harmful"], SIDES["benign"])
    wanted = locate(model, tiny_tokenizer(), *sides, method=method)
    with torch.no_grad():
        assert locate(model, tiny_tokenizer(), *sides, method=method) == wanted


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_adapter_does_not_matter(method: str) -> None:
    sides = (SIDES["harmful"], SIDES["benign"])
    config = LoraConfig(target_modules=["up_proj", "down_proj", "q_proj", "o_proj"])
    tuned = get_peft_model(tiny_model(), config)
    settings = {"method": method, "sites": "all", "openings": ["I"]}
    found = locate(tuned, tiny_tokenizer(), *sides, **settings)
    assert found == locate(tiny_model(), tiny_tokenizer(), *sides, **settings)
    flags = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert flags
    assert all("lora_" in name for name in flags)


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "gemma"])
@pytest.mark.parametrize("method", ["attribution", "snip", "variance"])
def test_methods_run_on_every_layout_in_bfloat16(model_type: str, method: str) -> None:
    model = tiny_model(model_type).bfloat16()
    found = locate(model, tiny_tokenizer("left"), *SIDES.values(), openings=["I"],
                   method=method, sites="all", fraction=0.25)  # fmt: skip
    assert len(found) == 2 * (12 + 1)
    found.check_model(model)


@pytest.mark.parametrize(
    ("sites", "wanted"),
    [("mlp", {"mlp"}), ("attention", {"self_attn"}), ("all", {"mlp", "self_attn"})],
)
def test_sites_are_those_asked_for(sites: Any, wanted: set[str]) -> None:
    found = locate(tiny_model(), tiny_tokenizer(), HARMFUL, BENIGN, method="contrast", sites=sites)
    assert {name.rpartition(".")[2] for name in found.indices} == wanted


def test_the_default_is_a_twentieth() -> None:
    for method in METHODS:
        found = locate(
            tiny_model(), tiny_tokenizer(), *SIDES.values(), method=method, openings=["I"]
        )
        assert (
            len(found)
            == {True: round(0.05 * 96), False: 2 * round(0.05 * 48)}[
                found.source["scope"] == "global"
            ]
        )


def test_the_source_tells_how_and_on_what() -> None:
    found = locate(tiny_model(), tiny_tokenizer(), HARMFUL, BENIGN, method="attribution",
                   fraction=0.1, seed=3, openings=["I can't", "No"])  # fmt: skip
    source = found.source
    assert (source["method"], source["fraction"], source["count"]) == ("attribution", 0.1, None)
    assert (source["scope"], source["seed"], source["sites"]) == ("global", 3, "mlp")
    assert source["openings"] == ["I", "N"]
    calibration = source["calibration"]
    assert [calibration[side]["count"] for side in ("harmful", "benign")] == [4, 5]
    again = locate(tiny_model(), tiny_tokenizer(), HARMFUL[:-1], BENIGN, method="contrast")
    assert again.source["calibration"]["benign"] == calibration["benign"]
    assert again.source["calibration"]["harmful"]["sha256"] != calibration["harmful"]["sha256"]
    json.dumps(dict(source))


def test_hashes_cover_images_and_are_as_before_without() -> None:
    hash_of = safeft.locators.prompts_hash
    plain = as_prompts([{"prompt": "Hi", "response": "No"}])
    rows = [[[{"role": "user", "content": "Hi"}], "No"]]
    assert hash_of(plain) == sha256(json.dumps(rows, sort_keys=True).encode())
    seen = [as_prompts([{"prompt": "Hi", "image": shapes(n, (8, 8))}]) for n in (1, 2, 1)]
    one, other, again = map(hash_of, seen)
    assert one == again != other != hash_of(as_prompts(["Hi"])) != one


def test_sides_with_the_same_words_may_differ_in_pictures() -> None:
    drawn = [as_prompts([{"prompt": "Do it", "image": shapes(n, (8, 8))}]) for n in (1, 2, 1)]
    safeft.locators._check_sides({"harmful": drawn[0], "benign": drawn[1]})
    with pytest.raises(PromptError, match="Harmful and benign prompts are the same"):
        safeft.locators._check_sides({"harmful": drawn[0], "benign": drawn[2]})


@pytest.mark.parametrize("method", METHODS)
def test_images_for_a_model_of_text_are_refused(method: Any) -> None:
    shown = [{"prompt": "Make this", "image": shapes(1, (8, 8))}]
    with pytest.raises(PromptError, match="'Make this' comes with an image, and LlamaForCausalLM"):
        locate(tiny_model(), tiny_tokenizer(), [*HARMFUL, *shown], BENIGN, method=method)


def test_random_is_drawn_by_its_seed_alone() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()

    def draw(seed: int, harmful: list[str] = HARMFUL, of: PreTrainedModel = model) -> dict:
        found = locate(of, tokenizer, harmful, BENIGN, method="random", seed=seed, fraction=0.1)
        return dict(found.indices)

    assert draw(0) == draw(0) == draw(0, HARMFUL[:2]) == draw(0, of=tiny_model(seed=5))
    assert len({str(draw(seed)) for seed in range(8)}) == 8
    state = torch.get_rng_state()
    draw(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_scores_are_uniform() -> None:
    sites = find_sites(tiny_model(intermediate_size=4000), ("mlp",))
    values = torch.cat(list(RandomFitter(sites, 0).scores().safety.values()))
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(float(values.mean()) - 0.5) < 0.02
    assert len(values.unique()) == len(values)


@pytest.fixture
def untouchable() -> PreTrainedModel:
    """A model that must not be run: what is wrong is found before the work starts."""
    model = tiny_model()

    def run(*_: object, **__: object) -> None:
        raise AssertionError("the model was run")

    model.forward = run
    return model


@pytest.mark.parametrize("method", ["attribution", "random"])
@pytest.mark.parametrize(
    ("harmful", "benign", "settings", "error", "message"),
    [
        ([], BENIGN, {}, PromptError, "There are no harmful prompts"),
        (HARMFUL, [], {}, PromptError, "There are no benign prompts"),
        (HARMFUL, HARMFUL[::-1], {}, PromptError, "are the same"),
        ("Hurt him", BENIGN, {}, PromptError, "given as one str"),
        (HARMFUL, ["Hi", ""], {}, PromptError, "Prompt 1 is empty"),
        (HARMFUL, BENIGN, {"fraction": 0}, SelectionError, "fraction=0 would select nothing"),
        (HARMFUL, BENIGN, {"fraction": -1}, SelectionError, "fraction=-1"),
        (HARMFUL, BENIGN, {"fraction": 1.5}, SelectionError, "fraction=1.5 would select more"),
        (HARMFUL, BENIGN, {"fraction": 0.1, "count": 2}, SelectionError, "exactly one"),
        (HARMFUL, BENIGN, {"count": 97}, SelectionError, "count=97, but there are"),
        (HARMFUL, BENIGN, {"scope": "model"}, SelectionError, "scope='model'"),
        (HARMFUL, BENIGN, {"sites": "heads"}, ConfigError, "sites='heads' is not one of mlp"),
    ],
)
def test_wrong_settings_are_refused_before_the_model_runs(
    untouchable: PreTrainedModel,
    method: str,
    harmful: Any,
    benign: Any,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        locate(untouchable, tiny_tokenizer(), harmful, benign, method=method, **settings)


def test_an_unknown_method_is_refused(untouchable: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="method='magic' is not one of contrast, variance"):
        locate(untouchable, tiny_tokenizer(), HARMFUL, BENIGN, method="magic")


def test_an_unknown_model_type_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=9, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="t5"):
        locate(model, tiny_tokenizer(), HARMFUL, BENIGN)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_no_chat_template_is_refused(untouchable: PreTrainedModel, method: str) -> None:
    with pytest.raises(PromptError, match="no chat template"):
        locate(untouchable, tiny_tokenizer(chat_template=None), HARMFUL, BENIGN, method=method)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
@pytest.mark.parametrize("side", ["harmful", "benign"])
def test_scores_that_are_no_numbers_are_refused(method: str, side: str) -> None:
    model = tiny_model()
    bad = tiny_tokenizer()("Z")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = math.nan
    sides = {"harmful": SIDES["harmful"], "benign": SIDES["benign"]}
    sides[side] = [*sides[side], *as_prompts([{"prompt": "Zoo", "response": "No"}])]
    with pytest.raises(SelectionError, match="not finite"):
        locate(model, tiny_tokenizer(), **sides, method=method, openings=["I"])


class TestAnswers:
    """Where a method reads answers and none are given, the model's own are taken."""

    @pytest.mark.parametrize("method", ["snip", "wanda"])
    def test_own_answers_are_used(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def generate(model: object, tokenizer: object, prompts: list[Prompt], **_: object) -> list:
            asked.extend(prompt.text for prompt in prompts)
            return [ANSWERS[(HARMFUL + BENIGN).index(p.text) % len(HARMFUL)] for p in prompts]

        monkeypatch.setattr(safeft.locators.calibration, "generate", generate)
        model, tokenizer = tiny_model(), tiny_tokenizer()
        rows = [{"prompt": BENIGN[0], "response": "Given"}, *BENIGN[1:]]
        found = locate(model, tokenizer, HARMFUL, rows, method=method)
        assert asked == HARMFUL + BENIGN[1:]
        answers = ["Given", *[ANSWERS[(4 + i) % 4] for i in range(1, 5)]]
        explicit = locate(
            model, tokenizer, SIDES["harmful"],
            [{"prompt": p, "response": r} for p, r in zip(BENIGN, answers, strict=True)],
            method=method,
        )  # fmt: skip
        assert found.indices == explicit.indices

    @pytest.mark.parametrize("method", ["snip", "wanda"])
    def test_a_model_that_says_nothing_is_refused(
        self, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            safeft.locators.calibration, "generate", lambda *args, **_: [""] * len(args[2])
        )
        with pytest.raises(PromptError, match="answers every prompt with nothing"):
            locate(tiny_model(), tiny_tokenizer(), HARMFUL, BENIGN, method=method)

    @pytest.mark.parametrize("method", ["contrast", "variance", "attribution"])
    def test_other_methods_do_not_read_them(self, method: str) -> None:
        model = tiny_model()
        settings = {"method": method, "openings": ["I"]}
        bare = locate(model, tiny_tokenizer(), HARMFUL, BENIGN, **settings)
        rows = locate(model, tiny_tokenizer(), *SIDES.values(), **settings)
        assert bare.indices == rows.indices


class TestRefusalTokens:
    """Which first tokens count as refusing."""

    @pytest.fixture
    def tokens(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def find(harmful: list[str], benign: list[str], **settings: Any) -> set[str]:
            answers = {f"h{n}": text for n, text in enumerate(harmful)}
            answers |= {f"b{n}": text for n, text in enumerate(benign)}
            monkeypatch.setattr(
                openings_module,
                "generate_tokens",
                lambda model, tokenizer, prompts, **_: [
                    tokenizer(answers[p.text])["input_ids"] for p in prompts
                ],
            )
            sides = (as_prompts(f"{s}{n}" for n in range(len(texts)))
                     for s, texts in (("h", harmful), ("b", benign)))  # fmt: skip
            found = refusal_openings(None, tiny_tokenizer(), *sides, **settings)
            assert set(found.texts) == {
                tiny_tokenizer().decode([*found.prefix, token]) for token in found.tokens
            }
            return set(found.texts)

        return find

    def test_given_ones_are_taken_as_they_are(self, tokens: Any) -> None:
        assert tokens(["I can't"], ["Yes"], openings=["Never", "No", "Why"]) == {"N", "W"}

    def test_those_of_the_models_own_refusals(self, tokens: Any) -> None:
        assert tokens(["I can't", "Sorry, I won't", "First, take"], ["Yes", "First"]) == {"I", "S"}

    def test_what_opens_benign_answers_more_often_is_dropped(self, tokens: Any) -> None:
        assert tokens(["I can't", "Sorry, I won't"], ["I like", "I do", "I am"]) == {"S"}
        assert tokens(["I can't", "I won't"], ["I like", "Yes", "Sure"]) == {"I"}

    def test_the_word_that_all_answers_share_is_put_into_the_mouth(self, tokens: Any) -> None:
        assert tokens(["I can't", "I won't"], ["I like", "I do", "I am"]) == {"I c", "I w"}

    def test_what_sets_harmful_answers_apart_where_the_judge_knows_no_refusal(
        self, tokens: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert tokens(["Nein, nie", "Nie", "Also"], ["Also", "Gern"]) == {"N"}
        assert "None of 3 answers to harmful prompts starts as a known refusal" in caplog.text
        assert "'N'" in caplog.text

    def test_the_default_list_where_nothing_does(
        self, tokens: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert tokens(["Yes", "First"], ["Yes", "First"]) == {"I", "S"}
        assert tokens(list("abcde"), ["Yes"]) == {"I", "S"}
        assert "the default list" in caplog.text

    def test_nothing_left_is_an_error(self, tokens: Any) -> None:
        with pytest.raises(PromptError, match="starts benign answers as it starts refusals"):
            tokens(["I can't"], ["I can't wait"])

    @pytest.mark.parametrize("openings", [[""], ["", ""]])
    def test_openings_that_say_nothing_are_an_error(self, tokens: Any, openings: list) -> None:
        with pytest.raises(PromptError, match="openings"):
            tokens(["I can't"], ["Yes"], openings=openings)


def test_attribution_does_not_saturate() -> None:
    """Where refusal is certain in fp32 (p rounds to 1), its odds still have a slope."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[OPENINGS] *= 400
    found = torch.cat(list(scored("attribution", model).safety.values()))
    assert found.isfinite().all()
    assert (found != 0).any()


def test_locating_needs_no_gradient_memory_for_weights() -> None:
    """Weight gradients are freed one by one: never two of them at a time."""
    model, alive = tiny_model(), []
    parameters = list(model.parameters())

    class Watching(SnipFitter):
        def update(self, side: Any, batch: Any) -> None:
            handles = [
                parameter.register_hook(
                    lambda grad: alive.append(sum(p.grad is not None for p in parameters))
                )
                for parameter in parameters
            ]
            super().update(side, batch)
            for handle in handles:
                handle.remove()

    score(Watching(model, find_sites(model)), model, tiny_tokenizer(), SIDES, batch_size=8)
    assert alive
    assert max(alive) == 0


def test_modules_named_by_parts_are_plain_modules() -> None:
    model = tiny_model()
    assert all(
        isinstance(model.get_submodule(part.module), nn.Linear)
        for site in find_sites(model).values()
        for part in site.parts
    )
