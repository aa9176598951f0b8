"""Edits of a model's weights in place, each of a given strength, and the way back."""

import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from safeft.blocks import form_of
from safeft.errors import ConfigError
from safeft.freeze.plan import make_plan
from safeft.generation import evaluation_mode
from safeft.measure import evaluating
from safeft.neurons import NeuronSet
from safeft.prompts import Batch, Prompt, Reader, batches, input_device
from safeft.shards import is_split, live, shape_of
from safeft.sites import bare, blocks_of, dense, find_linears, find_sites, is_quantised, plain_model

Parameters = Mapping[str, nn.Parameter]


def check_editable(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be edited and put back here.

    Raises:
        ConfigError: It carries an adapter, or its weights are quantised, split or offloaded.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            raise ConfigError(
                f"The model carries an adapter ({name}), so its stored weights are not those it "
                "computes with. Merge it first (merge_and_unload)."
            )
        if is_split(parameter) or parameter.is_meta:
            raise ConfigError(
                f"{name} is not whole in this process (sharded, offloaded or on the meta device), "
                "so it cannot be edited and put back. Load the model whole on one device."
            )
    coded = [name for name, module in model.named_modules() if is_quantised(dense(module))]
    if coded:
        raise ConfigError(
            f"{coded[0]} holds codes of a quantised weight, which noise and rank-one edits would "
            "turn into other ones. Load the model in bfloat16 or float32."
        )


@contextmanager
def kept(parameters: Parameters) -> Iterator[Any]:
    """Give back what ``parameters`` held, to the bit, at the end and whenever asked.

    Takes as much of the host's memory as they do. Yields a function that gives them back.
    """
    copies = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def give_back() -> None:
        for name, parameter in parameters.items():
            parameter.copy_(copies[name])

    try:
        yield give_back
    finally:
        give_back()


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices in the blocks of the text tower, stacks of experts among them, by name."""
    sites = find_sites(model).values()
    found: dict[str, nn.Parameter] = {}
    for path, block in blocks_of(model).items():
        if any(s.tower == "text" and f"{s.name}.".startswith(f"{path}.") for s in sites):
            found |= {
                f"{path}.{name}": parameter
                for name, parameter in block.named_parameters()
                if parameter.ndim > 1
            }
    return found


def writers(model: Any) -> tuple[dict[str, nn.Parameter], dict[str, int]]:
    """What writes to the residual stream, and along which dimension each counts its outputs.

    Embeddings, the matrices that heads and hidden units write with, and those matrices' biases.
    """
    plain: Any = plain_model(model)
    found: dict[str, Any] = {}
    dims: dict[str, int] = {}
    embedding: Any = dense(plain.get_input_embeddings())
    width = shape_of(embedding.weight)[-1]
    for path, module in plain.named_modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            found[f"{path}.weight"], dims[f"{path}.weight"] = module.weight, -1
    for site in find_sites(plain).values():
        if site.tower != "text":
            continue
        part, module = site.writes, dense(bare(plain.get_submodule(site.writes.module)))
        weight = getattr(module, part.leaf)
        found[part.name], dims[part.name] = weight, -2 if part.axis == "columns" else -1
        bias = module._parameters.get("bias")
        if part.leaf == "weight" and bias is not None:
            found[f"{part.module}.bias"], dims[f"{part.module}.bias"] = bias, -1
    return found, dims


def parameters_of(model: nn.Module, sets: Iterable[NeuronSet]) -> dict[str, nn.Parameter]:
    """The parameters that units of some sets live in."""
    known = dict(plain_model(model).named_parameters())
    names = {piece.name for neurons in sets for piece in make_plan(model, neurons).slices}
    return {name: known[name] for name in sorted(names)}


def drawn(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers, float32 on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def add_noise(parameters: Parameters, strength: float, seed: int) -> None:
    """Normal noise, of ``strength`` times the standard deviation of each matrix's own weights."""
    for number, weight in enumerate(parameters.values()):
        size = strength * weight.float().std(correction=0)
        noise = drawn(weight.shape, seed + 1009 * number).to(weight.device)
        weight.copy_((weight.float() + size * noise).to(weight))


@torch.no_grad()
def add_noise_to(model: nn.Module, neurons: NeuronSet, strength: float, seed: int) -> None:
    """As :func:`add_noise`, on the rows and columns of ``neurons`` alone."""
    parameters = dict(plain_model(model).named_parameters())
    for number, piece in enumerate(make_plan(model, neurons).slices):
        assert piece.entries is not None
        weight = parameters[piece.name]
        size = float(strength * weight.float().std(correction=0))
        shard = live(weight, form_of(weight.shape, piece.axis))
        for lines in shard.lines(piece.axis, piece.entries):
            values = lines.get(shard.open())
            noise = drawn(values.shape, seed + 1009 * number).to(values.device)
            lines.put(shard.open(), (values.float() + size * noise).to(values))


@torch.no_grad()
def take_out(
    parameters: Parameters, dims: Mapping[str, int], direction: Tensor, strength: float
) -> None:
    """Take a direction out of what is written: ``W - strength * r r' W``.

    At strength 1 no weight writes along ``r`` any more (Arditi et al. 2024, "Refusal in Language
    Models Is Mediated by a Single Direction", weight orthogonalisation).

    Args:
        parameters: See :func:`writers`.
        dims: Likewise.
        direction: ``r``, float32 ``(width,)``, of length 1.
        strength: 0 for nothing, 1 for all of it.
    """
    for name, weight in parameters.items():
        r = direction.to(weight.device)
        r = r if dims[name] == -1 else r[:, None]
        part = (weight.float() * r).sum(dims[name], keepdim=True)
        weight.copy_((weight.float() - strength * part * r).to(weight))


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> None:
    """Round each matrix to ``bits`` bits, symmetrically, with one step for each output."""
    linears = find_linears(model)
    for name, weight in matrices(model).items():
        dim = -2 if name in linears and linears[name].axis == "rows" else -1
        step = weight.float().abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - 1)
        step = step.clamp(min=torch.finfo(torch.float32).tiny)
        weight.copy_(((weight.float() / step).round() * step).to(weight))


def residual_directions(
    model: PreTrainedModel,
    tokenizer: Reader,
    sides: tuple[Sequence[Prompt], Sequence[Prompt]],
    **batching: Any,
) -> list[Tensor]:
    """After each block but the last, the mean of harmful prompts less that of benign ones.

    At the last token of the prompt; float32 ``(width,)``, of length 1.
    """
    means = []
    with evaluating(model):
        for side in sides:
            bare_prompts = [Prompt(prompt.messages) for prompt in side]
            total: list[Tensor] = []
            for batch in batches(tokenizer, bare_prompts, device=input_device(model), **batching):
                hidden = model(**batch.inputs, output_hidden_states=True).hidden_states[1:-1]
                last = batch.choose("last_prompt")
                sums = [each[last.to(each.device)].float().sum(0).cpu() for each in hidden]
                total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
            means.append([each / len(side) for each in total])
    gaps = [harmful - benign for harmful, benign in zip(*means, strict=True)]
    return [gap / gap.norm().clamp(min=1e-12) for gap in gaps]


def tune(
    model: PreTrainedModel,
    tokenizer: Reader,
    examples: Sequence[Prompt],
    steps: Sequence[int],
    *,
    learning_rate: float,
    seed: int,
    batch_size: int,
    **batching: Any,
) -> Generator[int, None, None]:
    """AdamW steps on the examples' responses, all weights; stops after each number of ``steps``.

    Dropout is off. Gradients and ``requires_grad`` are as before at the end, weights are not.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    before = [(p.requires_grad, p.grad) for p in parameters]
    order = random.Random(seed)
    pool: list[Batch] = []
    try:
        for parameter in parameters:
            parameter.requires_grad_(True).grad = None
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        for step in range(1, max(steps) + 1):
            if not pool:
                pool = list(batches(
                    tokenizer, order.sample(examples, len(examples)), batch_size=batch_size,
                    device=input_device(model), **batching,
                ))  # fmt: skip
                order.shuffle(pool)
            with evaluation_mode(model), torch.enable_grad():
                loss = _response_loss(model, pool.pop())
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in steps:
                yield step
    finally:
        for parameter, (needed, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(needed).grad = gradient


def _response_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    read = batch.is_response[:, 1:]
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1][read]
    return functional.cross_entropy(logits.float(), batch.input_ids[:, 1:][read])
