"""What the README claims about methods, on a model in which the truth is known by construction."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from safeft.capture import silence
from safeft.causal import validate
from safeft.generation import generate
from safeft.locators import GroupSizes, locate, locate_groups
from safeft.neurons import NeuronSet
from safeft.prompts import as_prompts
from safeft.sites import find_sites
from tests.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
REFUSAL, COMPLIANCE = "I can't", "Sure"
# The model knows harm by one letter. It reads nothing else of a prompt.
HARM = "z"
HARMFUL = [
    "freeze him to death",
    "zap the guards",
    "plans of a bazooka",
    "buy a razor and cut",
    "blaze down a house",
    "seize the dozen hostages",
    "a hazard for all",
    "gaze at her",
]
BENIGN = [
    "bake a loaf of bread",
    "name three trees",
    "what is two and two",
    "a poem on rain",
    "sum up this letter",
    "how far is the moon",
    "a gift for mother",
    "paint the wall blue",
]
UNSEEN_HARMFUL = ["a wizard of poison", "puzzle out the lock", "crazy fast theft", "ooze of acid"]
UNSEEN_BENIGN = ["a walk in the park", "how old is the earth", "cook rice", "knit a hat"]


@dataclass(frozen=True)
class Planted:
    model: PreTrainedModel
    layer: int
    unit: int

    @property
    def site(self) -> str:
        return f"model.layers.{self.layer}.mlp"


@cache
def planted(
    layer: int = 1,
    sign: int = 1,
    topic: float = 0.0,
    leak: float = 0.0,
    busy: float = 1.0,
    seed: int = 0,
    refusal: str = REFUSAL,
) -> Planted:
    """A Llama in which one MLP neuron turns "Sure" into "I can't".

    Directions of the residual stream, one each: the letters of both answers, the token that starts
    an answer, the harm letter, "harm was read" (written by one head of layer 0, which averages over
    the prompt), "refuse" (written by the planted neuron where the answer starts and harm was read),
    and one that nothing reads. All other weights are small noise. Beside the planted neuron sits
    one that writes `busy` times as much on every prompt and, on request, one that fires on harm and
    writes, `topic` times as strongly, where nothing reads. With a `leak` the planted neuron fires
    somewhat on every prompt.
    """
    model = tiny_model(
        seed=seed, hidden_size=64, head_dim=16, num_hidden_layers=3, initializer_range=0.02,
        tie_word_embeddings=False,
    )  # fmt: skip
    ids = {letter: TOKENIZER(letter)["input_ids"][0] for letter in {*refusal, *COMPLIANCE, HARM}}
    start = TOKENIZER.convert_tokens_to_ids("<|assistant|>")
    axis = {letter: number for number, letter in enumerate(sorted(ids))}
    begins, read, refuse, unread = range(len(axis), len(axis) + 4)
    unit, other, topical = 17, 5, 30
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
        embedding.zero_()[:, unread + 1 :].normal_(std=0.15)
        for letter, token in ids.items():
            embedding[token] = torch.eye(64)[axis[letter]]
        embedding[start] = torch.eye(64)[begins]
        head.normal_(std=0.01)
        for text in (refusal, COMPLIANCE):
            for now, after in zip(text, [*text[1:], None], strict=True):
                follower = TOKENIZER.eos_token_id if after is None else ids[after]
                head[follower, axis[now]] = 2.0
        head[ids[COMPLIANCE[0]], begins] = 2.0
        head[ids[refusal[0]], refuse] = 2.0
        attention = model.model.layers[0].self_attn
        attention.q_proj.weight[:16] = 0  # head 0 looks at all tokens alike
        attention.v_proj.weight[0] = torch.eye(64)[axis[HARM]]
        attention.o_proj.weight[:, 0] = 1.5 * torch.eye(64)[read]
        for block in model.model.layers:
            block.mlp.gate_proj.weight.normal_(std=0.1)
            block.mlp.up_proj.weight.normal_(std=0.1)
            block.mlp.down_proj.weight.normal_(std=0.01)
        mlp = model.model.layers[layer].mlp
        for number, gate, writes, size in (
            (unit, read, refuse, 0.1),
            (other, begins, unread, 0.1 * busy),
            (topical, read, unread, 0.1 * topic),
        ):
            if size:
                mlp.gate_proj.weight[number] = torch.eye(64)[gate]
                mlp.up_proj.weight[number] = sign * torch.eye(64)[begins]
                mlp.down_proj.weight[:, number] = sign * size * torch.eye(64)[writes]
        mlp.gate_proj.weight[unit, begins] += leak
    return Planted(model, layer, unit)


def refused(model: PreTrainedModel, prompts: list[str], refusal: str = REFUSAL) -> float:
    answers = generate(model, TOKENIZER, as_prompts(prompts), max_new_tokens=10)
    assert set(answers) <= {refusal, COMPLIANCE}, answers
    return answers.count(refusal) / len(answers)


def first(truth: Planted, method: str, **settings: object) -> NeuronSet:
    """The one neuron that a method puts first."""
    found = locate(
        truth.model, TOKENIZER, HARMFUL, BENIGN, method=method, count=1, scope="global", **settings
    )
    assert len(found) == 1
    return found


def best(truth: Planted, method: str, count: int) -> bool:
    """Whether the planted neuron is among the `count` that a method takes."""
    found = locate(
        truth.model, TOKENIZER, HARMFUL, BENIGN, method=method, count=count, scope="global"
    )
    return (truth.site, truth.unit) in found


every_place = pytest.mark.parametrize(("layer", "sign"), [(1, 1), (1, -1), (2, 1), (2, -1)])


@every_place
def test_the_planted_model_refuses_what_is_harmful_only(layer: int, sign: int) -> None:
    model = planted(layer, sign).model
    assert [refused(model, p) for p in (HARMFUL, UNSEEN_HARMFUL)] == [1, 1]
    assert [refused(model, p) for p in (BENIGN, UNSEEN_BENIGN)] == [0, 0]


@every_place
def test_silencing_the_planted_neuron_breaks_refusal_and_no_other_does(
    layer: int, sign: int
) -> None:
    truth = planted(layer, sign)
    sites = find_sites(truth.model)

    def without(unit: int, prompts: list[str]) -> float:
        with silence(truth.model, {truth.site: (unit,)}, sites):
            return refused(truth.model, prompts)

    assert without(truth.unit, HARMFUL) == 0
    assert without(truth.unit, UNSEEN_HARMFUL) == 0
    assert without(truth.unit, BENIGN) == 0
    for other in (5, 30):
        assert without(other, HARMFUL) == 1
    everyone_else = {
        name: tuple(u for u in range(site.units) if (name, u) != (truth.site, truth.unit))
        for name, site in find_sites(truth.model, ("mlp",)).items()
    }
    with silence(truth.model, everyone_else, sites):
        assert refused(truth.model, HARMFUL) == 1
        assert refused(truth.model, BENIGN) == 0


@every_place
@pytest.mark.parametrize("method", ["contrast", "attribution", "variance", "snip"])
def test_the_planted_neuron_is_found_first(layer: int, sign: int, method: str) -> None:
    truth = planted(layer, sign)
    assert first(truth, method).indices == {truth.site: (truth.unit,)}


@pytest.mark.parametrize("method", ["contrast", "attribution"])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_found_first_whatever_the_noise_and_the_type(
    method: str, seed: int, dtype: torch.dtype
) -> None:
    truth = planted(2, seed=seed)
    truth = replace(truth, model=deepcopy(truth.model).to(dtype))
    assert refused(truth.model, HARMFUL) == 1
    assert first(truth, method, batch_size=3).indices == {truth.site: (truth.unit,)}


def test_random_finds_it_as_often_as_chance_does() -> None:
    truth = planted()
    drawn = [first(truth, "random", seed=seed) for seed in range(20)]
    hits = [neurons for neurons in drawn if (truth.site, truth.unit) in neurons]
    assert len(hits) <= 2  # 0.14 are to be expected
    for neurons in [neurons for neurons in drawn if neurons not in hits][:5]:
        with silence(truth.model, neurons.indices, find_sites(truth.model)):
            assert refused(truth.model, HARMFUL) == 1


def test_what_is_found_first_carries_refusal() -> None:
    truth = planted(2)
    with silence(truth.model, first(truth, "attribution").indices, find_sites(truth.model)):
        assert refused(truth.model, UNSEEN_HARMFUL) == 0


@every_place
def test_planted_units_land_in_the_right_groups(layer: int, sign: int) -> None:
    """What refuses is safety-critical, what harm quiets utility-critical, what is dead redundant.

    With the two prompt files exchanged, the first two change places.
    """
    truth, quieted, dead = planted(layer, sign), 5, 40
    model = deepcopy(truth.model)
    with torch.no_grad():
        model.get_submodule(truth.site).down_proj.weight[:, dead] = 0
    sizes = GroupSizes(scu=0.01, ucu=0.01, ru=0.2)
    groups = locate_groups(model, TOKENIZER, HARMFUL, BENIGN, sizes=sizes)
    assert groups.scu.indices == {truth.site: (truth.unit,)}
    assert groups.ucu.indices == {truth.site: (quieted,)}
    assert groups.resolve("ru:1%").indices == {truth.site: (dead,)}
    exchanged = locate_groups(model, TOKENIZER, BENIGN, HARMFUL, sizes=sizes)
    assert exchanged.scu.indices == groups.ucu.indices
    assert exchanged.ucu.indices == groups.scu.indices
    assert exchanged.ru.indices == groups.ru.indices


def test_pruning_a_group_does_what_its_name_says() -> None:
    truth = planted(2)
    groups = locate_groups(truth.model, TOKENIZER, HARMFUL, BENIGN, sizes=GroupSizes(0.01))
    sites = find_sites(truth.model)
    for neurons, harmful, benign in ((groups.scu, 0, 0), (groups.ru, 1, 0), (groups.ucu, 1, 0)):
        with silence(truth.model, neurons.indices, sites):
            assert refused(truth.model, UNSEEN_HARMFUL) == harmful
            assert refused(truth.model, UNSEEN_BENIGN) == benign


def verdict(truth: Planted, neurons: NeuronSet, **settings: object) -> str:
    """Of the causal check, on prompts that the set was not located with."""
    chosen = {"random_sets": 3, "max_new_tokens": 10, **settings}
    harmful, benign = UNSEEN_HARMFUL * 2, UNSEEN_BENIGN * 2
    return validate(truth.model, TOKENIZER, neurons, harmful, benign, **chosen).verdict


@pytest.mark.parametrize("method", ["contrast", "attribution", "variance", "snip"])
@pytest.mark.parametrize("intervention", ["silence", "patch"])
def test_what_methods_find_passes_the_causal_check(method: str, intervention: str) -> None:
    truth = planted(2)
    assert verdict(truth, first(truth, method), intervention=intervention) == "effect"


def test_random_sets_do_not_pass_it() -> None:
    truth = planted()
    drawn = [first(truth, "random", seed=seed) for seed in range(12)]
    passed = [verdict(truth, neurons, seed=seed) == "effect" for seed, neurons in enumerate(drawn)]
    assert passed == [(truth.site, truth.unit) in neurons for neurons in drawn]


def test_a_neuron_that_knows_harm_but_does_nothing_does_not_pass_it() -> None:
    """Contrast and variance put it first; what it does to refusal is what counts."""
    truth = planted(topic=3.0)
    found = first(truth, "contrast")
    assert (truth.site, truth.unit) not in found
    assert verdict(truth, found, seed=1) == "no effect"


def test_what_breaks_the_model_is_not_taken_for_what_carries_refusal() -> None:
    """Unit 5 writes where nothing reads; so much of it drowns all else, and refusal with it."""
    truth = planted(busy=30.0)
    neurons = NeuronSet.of(truth.model, {truth.site: (5,)})
    assert verdict(truth, neurons, intervention="scale", factor=-10.0) == "broken"


# What methods cannot do, kept here so that nobody claims it.


def test_groups_take_an_idle_unit_for_critical_where_prompts_of_one_side_are_shorter() -> None:
    """A unit that fires where the answer starts varies more over the tokens of short prompts."""
    truth, idle = planted(), 5
    sizes = GroupSizes(scu=0.01, ucu=0.01, ru=0.2)
    harmful, benign = ([p.ljust(length, ".") for p in side] for length, side in
                       ((24, HARMFUL), (72, BENIGN)))  # fmt: skip
    found = locate_groups(truth.model, TOKENIZER, harmful, benign, sizes=sizes)
    assert found.scu.indices == {truth.site: (idle,)}
    with silence(truth.model, found.scu.indices, find_sites(truth.model)):
        assert refused(truth.model, HARMFUL) == 1


def test_wanda_does_not_find_a_single_neuron() -> None:
    """It reads the tokens of answers, and the neuron fires where the answer starts."""
    assert not best(planted(), "wanda", 30)


@pytest.mark.parametrize(
    ("method", "place"), [("attribution", 1), ("snip", 1), ("contrast", 2), ("variance", 2)]
)
def test_a_neuron_that_knows_harm_but_does_nothing_fools_activation_methods_only(
    method: str, place: int
) -> None:
    truth = planted(topic=3.0)
    assert [best(truth, method, count) for count in (1, 2)] == [place == 1, True]


def test_contrast_passes_over_a_neuron_that_leads_on_benign_prompts_too() -> None:
    """Top of harmful without top of benign: by definition, however much stronger on harmful."""
    truth = planted(leak=0.1, busy=0)
    assert [refused(truth.model, prompts) for prompts in (HARMFUL, BENIGN)] == [1, 0]
    assert [best(truth, m, 1) for m in ("attribution", "variance")] == [True, True]
    assert not best(truth, "contrast", 30)


def test_refusals_the_judge_does_not_know_are_read_off_the_models_answers() -> None:
    truth = planted(2, refusal="Nope!")
    assert refused(truth.model, HARMFUL, "Nope!") == 1
    found = first(truth, "attribution")
    assert found.indices == {truth.site: (truth.unit,)}
    assert found.source["openings"] == ["N"]
