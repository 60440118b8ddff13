import pytest
import torch

from stripe.attention import ATTENTION, create_attention

NAMES = [*ATTENTION, "timm:se", "timm:ese", "timm:eca", "timm:gc"]


@pytest.mark.parametrize("name", NAMES)
def test_gate_has_one_value_per_sample_and_channel(name):
    attention = create_attention(name, 32)
    gate = attention(torch.randn(3, 32, 6, 5))
    assert gate.shape == (3, 32, 1, 1)
    assert ((gate > 0) & (gate < 1)).all() or name == "timm:ese"


@pytest.mark.parametrize("name", NAMES)
def test_gate_depends_on_its_own_sample_alone(name):
    attention = create_attention(name, 256).eval()
    x = torch.randn(3, 256, 6, 5) * 3
    changed = x.clone()
    changed[1] += 2
    before, after = attention(x), attention(changed)
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_through_a_single_pixel_is_finite_and_nowhere_all_zero(name):
    attention = create_attention(name, 256).eval()
    psi = torch.full((1, 256, 1, 1), 0.1, requires_grad=True)
    attention(psi).sum().backward()
    assert torch.isfinite(psi.grad).all()
    assert psi.grad.abs().max() > 0


def test_squeeze_and_excitation_is_its_formula():
    attention = create_attention("senet", 32)
    x = torch.randn(2, 32, 4, 4)
    hidden = (x.mean((2, 3)) @ attention.fc1.weight.T + attention.fc1.bias).clamp_min(0)
    expected = 1 / (1 + torch.exp(-(hidden @ attention.fc2.weight.T + attention.fc2.bias)))
    torch.testing.assert_close(attention(x).flatten(1), expected)
    assert not torch.allclose(attention(x + 1).flatten(1), expected)


@pytest.mark.parametrize(("channels", "kernel"), [(16, 3), (64, 3), (128, 5), (256, 5), (512, 5)])
def test_efficient_channel_kernel_grows_with_channels(channels, kernel):
    assert create_attention("eca", channels).conv.kernel_size == (kernel,)


def test_cbam_sees_the_maximum_where_se_does_not():
    x = torch.zeros(1, 32, 4, 4)
    spread = x.clone()
    spread[..., 0, 0], spread[..., 1, 1] = 4.0, -4.0  # same mean, other maximum
    cbam, se = create_attention("cbam", 32), create_attention("senet", 32)
    assert not torch.allclose(cbam(x), cbam(spread))
    torch.testing.assert_close(se(x), se(spread))


def test_srm_sees_the_spread_where_ge_does_not():
    x = torch.zeros(1, 32, 4, 4)
    spread = x.clone()
    spread[..., 0, 0], spread[..., 1, 1] = 4.0, -4.0
    srm, ge = create_attention("srm", 32).eval(), create_attention("ge", 32)
    assert not torch.allclose(srm(x), srm(spread))
    torch.testing.assert_close(ge(x), ge(spread))


def test_unknown_name_lists_the_right_ones():
    with pytest.raises(ValueError, match=r"'sent'; expected one of senet, eca, srm.*timm:NAME"):
        create_attention("sent", 32)


@pytest.mark.parametrize("name", ["timm:nothing", "timm:gca", "timm:cbam"])
def test_timm_layers_without_a_channel_gate_are_refused(name):
    with pytest.raises(ValueError, match="timm"):
        create_attention(name, 32)
