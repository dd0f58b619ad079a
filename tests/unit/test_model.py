"""The encoder on one rank: routing, replay, recomputation, partial gradients, precision."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mlinterf_ds.errors import UserError
from mlinterf_ds.model.encoder import SHARED, Encoder, partition_dim
from mlinterf_ds.model.layers import at_positions
from mlinterf_ds.model.routing import MOST_DIVISIONS, Compiled, regions
from mlinterf_ds.sections import ModelConfig
from tests.model_batches import CODES, LENGTH, ROUTED, VARIANTS, VOCABULARY, batch, encoder, gradients
from tests.model_batches import hidden as hidden_states

pytestmark = pytest.mark.usefixtures("one_rank")


def close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("extra", [{}, {"language_embeddings": True}])
def test_a_mixed_batch_equals_its_languages_apart(variant: str, extra: dict[str, Any]) -> None:
    model = encoder(variant, **extra)
    mixed = batch([2, 0, 1, 0, 2])
    loss, nll = model(mixed)
    loss.backward()
    together = gradients(model)
    total = 0.0
    for language in (0, 1, 2):
        rows = (mixed.languages == language).nonzero().flatten()
        part, part_nll = model(mixed.rows(rows, (language,)))
        part.backward()
        total += float(part.detach())
        torch.testing.assert_close(part_nll, nll[rows], rtol=1e-5, atol=1e-5)
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    close(together, gradients(model))


@pytest.mark.parametrize("variant", ROUTED)
def test_a_language_changes_only_with_its_own_module(variant: str) -> None:
    model = encoder(variant)
    rows = batch([0, 1, 2, 1])
    _, before = model(rows)
    own = model.parameter_groups()
    assert all(own[code] for code in CODES)
    with torch.no_grad():
        for parameter in own["to"].values():
            parameter.add_(0.1)
    _, after = model(rows)
    changed = (before != after).any(dim=1)
    assert changed.tolist() == [False, True, False, True]


@pytest.mark.parametrize("variant", ROUTED)
def test_a_step_language_without_rows_gets_zero_gradients(variant: str) -> None:
    model = encoder(variant, dropout=0.1)
    for rows in ([1, 1], []):
        loss, _ = model(batch(rows, step_languages=(0, 1)))
        loss.backward()
        after = gradients(model)
        groups = model.parameter_groups()
        for name in groups["te"]:
            assert torch.count_nonzero(after[name]) == 0
        assert not after.keys() & groups["keys"].keys()
        assert after.keys() >= groups[SHARED].keys() and torch.isfinite(loss)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_either_shared_or_one_languages(variant: str) -> None:
    model = encoder(variant)
    groups, parameters = model.parameter_groups(), dict(model.named_parameters())
    assert list(groups) == [SHARED, *(CODES if variant in ROUTED else ())]
    assert sorted(name for group in groups.values() for name in group) == sorted(parameters)
    assert all(parameters[name] is parameter for group in groups.values() for name, parameter in group.items())
    counts = {"ffn": 4, "attn": 4, "adpt": 8}  # tensors a layer: two linear layers, or two adapters of two
    assert all(len(own) == 2 * counts[variant] for code, own in groups.items() if code != SHARED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_is_replayed_bit_for_bit_and_off_in_eval(variant: str) -> None:
    model = encoder(variant, dropout=0.2)
    rows = batch([0, 1, 0])
    ambient = torch.get_rng_state()
    first, _ = model(rows)
    first.backward()
    once = gradients(model)
    torch.rand(7)
    second, _ = model(rows)
    second.backward()
    assert torch.equal(first, second)
    again = gradients(model)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(first, model(replace(rows, dropout_seed=6))[0])
    torch.set_rng_state(ambient)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(rows)[0], model(replace(rows, dropout_seed=6))[0])
    assert torch.equal(torch.get_rng_state(), ambient)


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_each_dropout_acts(kind: str) -> None:
    plain, dropped = encoder("adpt"), encoder("adpt", **{kind: 0.3})
    assert not torch.allclose(plain(batch([0, 1]))[0], dropped(batch([0, 1]))[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_changes_nothing(variant: str) -> None:
    results = []
    for recompute in (False, True):
        model = encoder(variant, dropout=0.2, recompute=recompute)
        loss, _ = model(batch([1, 0, 2, 1]))
        loss.backward()
        results.append({"loss": loss.detach()} | gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("variant", ROUTED)
@pytest.mark.parametrize("recompute", [False, True])
def test_partial_gradients(variant: str, recompute: bool) -> None:
    model = encoder(variant, dropout=0.1, recompute=recompute)
    rows = batch([1, 1, 1])
    model(rows)[0].backward()
    whole = gradients(model)
    groups = model.parameter_groups()
    for wanted in (groups["to"], groups[SHARED]):
        model.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        model(rows)[0].backward()
        partial = gradients(model)
        assert partial.keys() == wanted.keys()
        close(partial, {name: whole[name] for name in wanted}, 1e-6)


def test_a_pass_for_one_language_computes_no_shared_weight_gradient() -> None:
    model, rows = encoder("adpt"), batch([1, 1])
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(rows)
    flops = []
    for wanted in (model.parameter_groups()["to"].values(), model.parameters()):
        for parameter in wanted:
            parameter.requires_grad_(True)
        loss, _ = model(rows)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        flops.append(backward.get_total_flops() / forward.get_total_flops())
    assert flops[0] < 1.35 and flops[1] > 1.8  # inputs' gradients alone cost one forward, weights' another


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_working_precision(dtype: torch.dtype) -> None:
    model = encoder("adpt", dropout=0.1, spread=0.02)
    reference, _ = model(batch([0, 2, 1]))
    model.to(dtype)
    loss, nll = model(batch([0, 2, 1]))
    loss.backward()
    assert loss.dtype == nll.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients(model).values()} == {dtype}
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=0.02)
    assert partition_dim(model.head.bias) == 0


def test_loss_is_the_weighted_sum_over_the_true_vocabulary() -> None:
    model = encoder("joint").eval()
    rows = batch([0, 1])
    loss, nll = model(rows)
    hidden = hidden_states(model, rows)
    picked = torch.stack([hidden[row, rows.positions[row]] for row in range(2)])
    logits = model.logits(picked)
    assert logits.shape == (2, 3, VOCABULARY) and model.embeddings.word.weight.shape[0] == 128
    expected = F.cross_entropy(logits.flatten(0, 1), rows.labels.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(loss, (expected * rows.weights).sum())
    loss.backward()
    assert torch.count_nonzero(model.embeddings.word.weight.grad[VOCABULARY:]) == 0
    assert torch.count_nonzero(model.head.bias.grad[VOCABULARY:]) == 0


def test_padding_is_not_attended() -> None:
    for variant in ("joint", "attn"):
        model = encoder(variant).eval()
        rows = batch([1, 0, 1])
        padding = torch.zeros(3, LENGTH, dtype=torch.bool)
        padding[0, 8:] = padding[2, 5:] = True
        other = torch.where(padding, (rows.tokens + 1) % VOCABULARY, rows.tokens)
        one = model.hidden(rows.tokens, rows.languages, rows.step_languages, padding)
        two = model.hidden(other, rows.languages, rows.step_languages, padding)
        torch.testing.assert_close(one[~padding], two[~padding])
        alone = model.hidden(rows.tokens[2:, :5], rows.languages[2:], (1,))
        torch.testing.assert_close(one[2:, :5], alone, rtol=1e-5, atol=1e-5)


def test_the_oracle_mode_is_the_same_function_and_twice_differentiable() -> None:
    model = encoder("adpt").double()
    rows = batch([0, 1])
    shared = list(model.parameter_groups()[SHARED].values())
    plain = torch.autograd.grad(model(rows)[0], shared)
    model.twice_differentiable = True
    exact = torch.autograd.grad(model(rows)[0], shared, create_graph=True)
    for left, right in zip(plain, exact, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    weight = model.block.layers[0].self_attention.linear_qkv.weight
    index = next(i for i, parameter in enumerate(shared) if parameter is weight)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = torch.autograd.grad((exact[index] * direction).sum(), weight)[0]
    step, sides = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
        sides.append(torch.autograd.grad(model(rows)[0], weight)[0])
        with torch.no_grad():
            weight.sub_(sign * step * direction)
    torch.testing.assert_close(product, (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "silu"])
def test_adapters_are_residual_and_sit_before_the_sum(activation: str) -> None:
    layer = encoder("share_adpt", adapter_activation=activation).block.layers[1]
    residual = layer.mlp_bda
    source = torch.Generator().manual_seed(0)
    total, before = (torch.randn(2, LENGTH, 32, generator=source) for _ in range(2))
    adapted, adapter = residual(total, before, layer.pre_mlp_layernorm), residual.adapter
    inner = getattr(torch, activation, getattr(F, activation))(F.linear(total, adapter.down.weight, adapter.down.bias))
    torch.testing.assert_close(adapted, before + total + F.linear(inner, adapter.up.weight, adapter.up.bias))


@pytest.mark.parametrize("variant", ["adpt", "share_adpt"])
def test_adapters_that_add_nothing_leave_the_joint_model(variant: str) -> None:
    joint, adapted = encoder("joint", dropout=0.2), encoder(variant, dropout=0.2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "adapter" in name and ".up." in name:
                parameter.zero_()
    rows = batch([0, 1, 2])
    torch.testing.assert_close(adapted(rows)[0], joint(rows)[0])


def test_head_width_of_the_paper() -> None:
    model = encoder("adpt", heads=6, head_width=8)  # like 12 x 64 over 512: wider inside than outside
    assert model.block.layers[0].self_attention.linear_proj.weight.shape == (32, 48)
    loss, _ = model(batch([0, 1]))
    loss.backward()
    assert torch.isfinite(loss)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    def build(variant: str, languages: list[str], seed: int) -> dict[str, Tensor]:
        config = ModelConfig(layers=1, heads=2, width=8, ffn=16)
        ambient = torch.get_rng_state()
        model = Encoder(config, variant=variant, languages=languages, vocabulary=70, positions=9, seed=seed)
        assert torch.equal(ambient, torch.get_rng_state())
        return model.state_dict()

    joint, adapted, more, other = (
        build("joint", ["en"], 0),
        build("adpt", ["en", "te"], 0),
        build("adpt", ["sw", "te", "en"], 0),
        build("joint", ["en"], 1),
    )
    assert all(torch.equal(value, adapted[name]) for name, value in joint.items())
    assert all(torch.equal(value, more[name]) for name, value in adapted.items())
    matrices = [name for name, value in joint.items() if value.ndim > 1]
    assert all(not torch.equal(joint[name], other[name]) for name in matrices)
    for name in matrices:  # XLM's: embeddings width^-0.5, matrices (3 fan-in)^-0.5
        fan_in = joint[name].shape[1] * (1 if name.startswith("embeddings.") else 3)
        assert abs(float(joint[name].std()) * fan_in**0.5 - 1) < 0.3, name
    assert not any("_extra_state" in name for name in joint)


@pytest.mark.parametrize("other", ["ffn", "attn", "share_adpt", "adpt"])
def test_what_two_variants_share_starts_alike(other: str) -> None:
    """Common random numbers: models that are compared seed by seed differ in the modules alone that one of them lacks."""
    joint, compared = (
        Encoder(
            ModelConfig(layers=2, heads=2, width=8, ffn=16),
            variant=v,
            languages=["en", "te"],
            vocabulary=70,
            positions=9,
            seed=3,
        )
        for v in ("joint", other)
    )
    ours, theirs = joint.state_dict(), compared.state_dict()
    common = ours.keys() & theirs.keys()
    routed = {"ffn": ".mlp.", "attn": ".self_attention."}.get(other, "nothing")
    assert ours.keys() - common <= {name for name in ours if routed in name} and bool(ours.keys() - common) == (
        routed != "nothing"
    )
    assert len(common) > 10 and all(torch.equal(ours[name], theirs[name]) for name in common)


def test_state_dict_loads_strictly() -> None:
    model, other = encoder("adpt"), encoder("adpt", spread=0.1)
    other.load_state_dict(model.state_dict())
    rows = batch([0, 1])
    assert torch.equal(model(rows)[0], other(rows)[0])


def test_mistakes_are_named() -> None:
    model = encoder("adpt")
    with pytest.raises(UserError, match=r"language 3: .*0 = te, 1 = to, 2 = keys"):
        model(batch([0, 3]))
    tokens = torch.zeros(1, LENGTH + 1, dtype=torch.long)
    with pytest.raises(UserError, match=f"{LENGTH + 1} tokens, the model has {LENGTH} positions"):
        model.hidden(tokens, torch.tensor([0]), (0,))
    with pytest.raises(AssertionError, match="bogus"):
        encoder("bogus")


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_equals_torchs_kernel(masked: bool) -> None:
    """16 bits take the written-out products on a CPU: within their round-off of float64, as torch's kernel is."""
    from mlinterf_ds.model.layers import attend

    query, key, value = torch.randn(3, 2, 4, 12, 16, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, 12) < 0.7 if masked else None
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    mixed = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, 0.0)
    assert mixed.dtype is torch.bfloat16 and (mixed.double() - wanted).abs().max() < 0.03


def test_attention_dropout_keeps_the_mean() -> None:
    from mlinterf_ds.model.layers import attend

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 512, 1, 8, 4)
    query[:], key[:], value[:] = query[:1].clone(), key[:1].clone(), value[:1].clone()  # one row, many draws
    whole, dropped = (attend(query, key, value, None, p) for p in (0.0, 0.5))
    assert (dropped.mean(0) - whole.mean(0)).abs().max() < 0.15 and not torch.equal(dropped[0], dropped[1])


def test_an_untrained_head_can_start_at_given_frequencies() -> None:
    """With hidden states of zero the logits are the bias: log frequencies, and nothing on the padding."""
    from mlinterf_ds.model.encoder import MaskedHead

    frequencies = torch.rand(70, dtype=torch.float64) + 0.1
    frequencies /= frequencies.sum()
    head = MaskedHead(8, 70, 1e-5)
    head.start_at(frequencies.log())
    predicted = head(torch.zeros(3, 8), torch.zeros(128, 8)).softmax(-1)
    torch.testing.assert_close(predicted[:, :70].double(), frequencies.expand(3, -1))
    assert not predicted[:, 70:].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("norm", "kind"), [("pre", "learned"), ("post", "rotary")])
def test_the_last_layer_computes_only_what_the_loss_reads(variant: str, norm: str, kind: str) -> None:
    model, rows = encoder(variant, norm=norm, position_kind=kind).double(), batch([1, 0, 2])
    whole = hidden_states(model, rows)
    expected = model.logits(at_positions(whole, rows.positions)).log_softmax(-1)
    nll = -expected.gather(2, rows.labels[:, :, None])[:, :, 0]
    _, own = model(rows)
    torch.testing.assert_close(own.double(), nll.double(), rtol=1e-5, atol=1e-6)
    counted: list[int] = []
    model.block.layers[-1].self_attention.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda _module, _inputs, output: counted.append(output.shape[1])
    )
    model(rows)
    assert counted[0] == rows.positions.shape[1] < LENGTH


@pytest.mark.parametrize(
    ("variant", "kind"),
    [("joint", "learned"), ("adpt", "learned"), ("ffn", "learned"), ("attn", "rotary")],
)
def test_one_compiled_region_serves_all_layers_and_languages(variant: str, kind: str) -> None:
    """Traced whole, without a break, and once for a shape; another language of a routed module is no reason to trace anew."""
    model = encoder(variant, layers=3, position_kind=kind)
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        traced.append(variant)
        return graph.forward

    compiled = Compiled({"backend": backend, "fullgraph": True})
    results = []
    for languages in ([0, 0], [1, 1], [2, 2]):
        model.router.regions = None
        expected = model(batch(languages))[0]
        model.router.regions = compiled
        torch.testing.assert_close(model(batch(languages))[0], expected)
        results.append(len(traced))
    assert results == [4, 4, 4], "embeddings, a layer, the last layer, head with loss"
    torch._dynamo.reset()


def test_divisions_of_rows_among_languages_are_compiled_up_to_a_number() -> None:
    """Each is compiled anew, and mixed batches may bring a new one in every step; where nothing is routed, they are all one."""
    of_model = {}
    for variant in ("joint", "adpt"):
        model, traced = encoder(variant), []

        def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor], traced: list = traced) -> Callable[..., Any]:
            traced.append(graph)
            return graph.forward

        counts = []
        plain = [model(batch([0] * first + [1] * (8 - first)))[0] for first in range(1, 8)]
        model.router.regions = Compiled({"backend": backend, "fullgraph": True})
        for first, expected in enumerate(plain, 1):
            torch.testing.assert_close(model(batch([0] * first + [1] * (8 - first)))[0], expected)
            counts.append(len(traced))
        of_model[variant] = counts
        torch._dynamo.reset()
    assert len(set(of_model["joint"])) == 1, of_model
    assert of_model["adpt"][MOST_DIVISIONS - 1] > of_model["adpt"][0], of_model
    assert len(set(of_model["adpt"][MOST_DIVISIONS - 1 :])) == 1, of_model


def test_what_cannot_be_compiled_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    assert regions("auto", torch.device("cpu")) is None and regions(False, torch.device("cpu")) is None
    monkeypatch.setattr(torch, "compile", broken)
    assert regions(True, torch.device("cpu")) is None
    assert "no compiler" in capsys.readouterr().err
