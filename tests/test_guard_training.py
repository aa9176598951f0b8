import torch

from safeft.guard.training import (
    FILE_BYTES,
    Network,
    loss_of,
    outputs,
    recipes,
    searched,
    train,
    widest,
)

ALIKE = torch.ones(1200)


def data(texts: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """The first label is a product of signs, which no linear head can tell."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(texts, 6, generator=draw)
    truth = (inputs[:, 0] * inputs[:, 1] > 0).float()
    other = (inputs[:, 2] > 0).float()
    other[::2] = float("nan")
    return inputs, torch.stack([truth, other], 1)


def test_a_network_learns_what_a_line_cannot_and_the_same_again() -> None:
    inputs, targets = data(1200)
    rows, stop, test = torch.arange(0, 900), torch.arange(900, 1000), torch.arange(1000, 1200)
    recipe = recipes(1, 0)[0]
    net, loss = train(inputs, targets, ALIKE, rows, stop, recipe, 3)
    again, same = train(inputs, targets, ALIKE, rows, stop, recipe, 3)
    other, _ = train(inputs, targets, ALIKE, rows, stop, recipe, 4)
    assert loss == same
    assert torch.equal(net.first, again.first)
    assert not torch.equal(net.first, other.first)
    found = outputs(net, inputs, test) > 0
    assert (found[:, 0] == (targets[test, 0] > 0.5)).float().mean() > 0.85
    assert (found[:, 1] == (inputs[test, 2] > 0)).float().mean() > 0.85


def test_training_leaves_the_global_generator_alone() -> None:
    inputs, targets = data(60)
    state = torch.get_rng_state()
    train(inputs, targets, ALIKE, torch.arange(40), torch.arange(40, 60), recipes(1, 0)[0], 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_best_weights_are_kept_and_not_the_last() -> None:
    inputs, targets = data(80)
    rows, stop = torch.arange(40), torch.arange(40, 80)
    net, loss = train(inputs, targets, ALIKE, rows, stop, recipes(1, 0)[0], 0)
    assert float(loss_of(net.logits(inputs[stop]), targets[stop], ALIKE[:40])) == loss


def test_members_are_one_network() -> None:
    inputs, targets = data()
    folds = list(torch.arange(300).split(100))
    net, about = searched(inputs, targets, ALIKE, folds, 2, 0)
    assert about["tried"] == len(about["losses"]) == 2
    best = recipes(2, 0)[about["losses"].index(min(about["losses"]))]
    members = [
        train(inputs, targets, ALIKE, torch.cat(others), folds[n], best, n)[0]
        for n, others in enumerate(folds[:n] + folds[n + 1 :] for n in range(3))
    ]
    expected = torch.stack([member.logits(inputs) for member in members]).mean(0)
    torch.testing.assert_close(net.logits(inputs), expected, atol=1e-5, rtol=1e-4)
    assert net.first.shape == (3 * best.hidden, 6)
    assert torch.equal(Network.mean([members[0]]).first, members[0].first)


def test_a_line_is_half_of_the_first_logit() -> None:
    inputs, targets = data()
    rows = torch.arange(300)
    net, _ = train(inputs, targets, ALIKE, rows[:200], rows[200:], recipes(1, 0)[0], 0)
    line = torch.tensor([1.0, 0, 0, -2, 0, 0])
    both = outputs(net.beside(line, 0.5, inputs, rows), inputs, rows)
    alone = outputs(net, inputs, rows)
    said = inputs @ line
    expected = (alone[:, 0] + (said + 0.5) * alone[:, 0].std() / said.std()) / 2
    torch.testing.assert_close(both[:, 0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[:, 1:], alone[:, 1:])


def test_unknown_labels_do_not_count() -> None:
    logits = torch.tensor([[0.3, 5.0], [-0.2, -5.0]], requires_grad=True)
    targets = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    loss_of(logits, targets, torch.tensor([1.5, 0.5])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert logits.grad[1, 1] != 0
    nothing = torch.tensor([[1.0, float("nan")], [0.0, float("nan")]])
    assert bool(loss_of(logits, nothing, ALIKE[:2]).isfinite())


def test_a_text_that_counts_for_two_is_as_two() -> None:
    logits, targets = torch.tensor([[0.3], [-0.2]]), torch.ones(2, 1)
    twice = loss_of(logits[[0, 0, 1]], targets[[0, 0, 1]], ALIKE[:3])
    counted = loss_of(logits, targets, torch.tensor([4 / 3, 2 / 3]))
    torch.testing.assert_close(counted, twice)


def test_over_many_units_hidden_ones_are_fewer() -> None:
    assert widest(1000, 5) > 256
    for units in (50_000, 400_000):
        most = widest(units, 5)
        assert 2 * units * 5 * most <= FILE_BYTES
        assert all(recipe.hidden <= most for recipe in recipes(20, 0, most))
    assert widest(10**8, 5) == 8
    assert recipes(5, 1) == recipes(5, 1) != recipes(5, 2)
