"""Rows go through their own language's module, by key, in any grouping, and languages without rows still take part."""

import pytest
import torch
from torch import Tensor, nn

from mlinterf_ds.errors import UserError
from mlinterf_ds.model.routing import Routed, Router

LENGTH, WIDTH = 3, 4
AWKWARD = ["te", "pt", "da", "as", "to", "keys", "type", "half", "items", "training", "zh-cn", "sr_latn"]


class Scale(nn.Module):
    """Multiplies by its own weight and adds its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        assert rows is None or len(rows) == len(hidden)
        return hidden * self.weight + (0 if rows is None else rows) + self.bias


def built(codes: list[str]) -> tuple[Router, Routed]:
    router = Router(codes)
    module = Routed(router, Scale)
    with torch.no_grad():
        for index, code in enumerate(codes):
            module.language(code).weight.fill_(index + 1)  # type: ignore[union-attr, operator]
            module.language(code).bias.fill_(100 * index)  # type: ignore[union-attr, operator]
    return router, module


def test_awkward_codes_are_keys_like_any_other() -> None:
    router, module = built(AWKWARD)
    hidden = torch.ones(len(AWKWARD), LENGTH, WIDTH)
    route, order = router.plan(torch.arange(len(AWKWARD)), range(len(AWKWARD)))
    assert order is None
    with router.following(route):
        output = module(hidden)
    assert output[:, 0, 0].tolist() == [index + 1 + 100 * index for index in range(len(AWKWARD))]


@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2], [2, 0, 1, 0, 2], [1, 1, 1], [2], []])
def test_rows_meet_their_own_module(rows: list[int]) -> None:
    router, module = built(["te", "to", "keys"])
    route, order = router.plan(torch.tensor(rows, dtype=torch.long), (0, 1, 2))
    grouped = rows if order is None else [rows[row] for row in order]
    assert grouped == sorted(rows) and (order is None) == (rows == sorted(rows))
    hidden = torch.randn(len(rows), LENGTH, WIDTH)
    extra = torch.randn(len(rows), 1, 1)
    with router.following(route):
        output = module(hidden, rows=extra)
    languages = torch.tensor(grouped, dtype=torch.float).view(-1, 1, 1)
    torch.testing.assert_close(output, hidden * (languages + 1) + extra + 100 * languages)


def test_grouping_keeps_the_order_of_a_languages_rows() -> None:
    _, order = Router(["a", "b"]).plan(torch.tensor([1, 0, 1, 0, 1]), (0, 1))
    assert order == [1, 3, 0, 2, 4]


def test_step_languages_without_rows_get_zero_gradients_and_others_none() -> None:
    router, module = built(["te", "to", "keys"])
    route, _ = router.plan(torch.tensor([1, 1]), (0, 1))
    hidden = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    with router.following(route):
        output = module(hidden)
    output.sum().backward()
    assert torch.equal(module.language("te").weight.grad, torch.zeros(()))
    assert torch.equal(module.language("te").bias.grad, torch.zeros(WIDTH))
    torch.testing.assert_close(module.language("to").weight.grad, hidden.sum().detach())
    assert module.language("keys").weight.grad is None and module.language("keys").bias.grad is None


def test_one_language_is_a_direct_call() -> None:
    router, module = built(["te", "to"])
    route, _ = router.plan(torch.tensor([1, 1]), (1,))
    hidden = torch.randn(2, LENGTH, WIDTH)
    seen: list[Tensor] = []
    module.language("to").register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with router.following(route):
        output = module(hidden)
    assert seen[0] is hidden and torch.equal(output, module.language("to")(hidden))


@pytest.mark.parametrize("language", [3, -1])
def test_a_language_without_a_module_names_the_known_ones(language: int) -> None:
    router, _ = built(["te", "to", "keys"])
    with pytest.raises(UserError, match=rf"language {language}: .*0 = te, 1 = to, 2 = keys"):
        router.plan(torch.tensor([0, language]), (0, language))


def test_rows_outside_the_step_are_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="the step has"):
        Router(["te", "to"]).plan(torch.tensor([0, 1]), (0,))


def test_the_route_ends_with_the_context_and_nests() -> None:
    router, module = built(["te", "to"])
    first, _ = router.plan(torch.tensor([0]), (0,))
    second, _ = router.plan(torch.tensor([1]), (1,))
    with pytest.raises(AssertionError, match="outside"):
        module(torch.ones(1, LENGTH, WIDTH))
    with router.following(first):
        with pytest.raises(RuntimeError), router.following(second):
            raise RuntimeError
        assert router.route is first
    assert router.route is None
