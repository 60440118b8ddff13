"""Gates of real and handwritten networks: found by what is computed, read and replaced without trace."""

import copy

import pytest
import timm
import torch
import torch.distributed
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from stripe.gates import explain_gates, find_gates, read_gates, replace_gates
from stripe.gates.trace import trace
from stripe.models import create_model
from tests.conftest import randomize, relative_error

# name, gates, form, layout, whether a module's output is the gate; torchvision's networks begin with "tv:"
NETWORKS = [
    ("seresnet18", 8, "multiplicative", "NCHW", True),
    ("tv:efficientnet_b0", 16, "multiplicative", "NCHW", True),
    ("tv:mobilenet_v3_small", 9, "multiplicative", "NCHW", True),
    ("lcnet_050", 2, "multiplicative", "NCHW", True),
    ("regnety_002", 13, "multiplicative", "NCHW", True),
    ("ghostnet_050", 7, "multiplicative", "NCHW", True),
    ("ese_vovnet19b_slim_dw", 4, "multiplicative", "NCHW", True),
    ("legacy_seresnet18", 8, "multiplicative", "NCHW", True),
    ("test_nfnet", 4, "multiplicative", "NCHW", True),
    ("eca_resnext26ts", 8, "multiplicative", "NCHW", True),
    ("resnest14d", 4, "radix", "NRCHW", True),
    ("skresnet18", 8, "radix", "NRCHW", True),
    ("convnextv2_atto", 12, "affine", "NCHW", False),
    ("gcresnet33ts", 10, "additive", "NCHW", True),
]
PLAIN = ["resnet10t", "test_convnext", "mobilenetv4_conv_small_035", "test_vit", "edgenext_xx_small", "mobilevitv2_050"]
PLAIN += ["efficientvit_b0", "starnet_s050", "focalnet_tiny_srf"]


def network(name, images):
    """A network of random weights, none of them zero, with batch-norm statistics of `images`: all gates matter."""
    model = torchvision.models.get_model(name[3:]) if name.startswith("tv:") else timm.create_model(name)
    for parameter in model.parameters():
        if parameter.count_nonzero() == 0:
            nn.init.normal_(parameter, 0.3, 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def collect(model, images, gates, **options):
    """What one forward hands to the sink, by kind and gate name."""
    values = {"attention": {}, "squeeze": {}}
    with torch.no_grad(), read_gates(model, gates, lambda g, kind, v: values[kind].update({g.name: v}), **options):
        model(images)
    return values


def replayed_error(model, images, gates, values):
    """How far the output is off when the products take `values`."""
    with torch.no_grad():
        expected = model(images)
        with replace_gates(model, gates, values):
            return relative_error(model(images), expected)


def assert_reproduces(model, images, gates):
    attention = collect(model, images, gates)["attention"]
    assert attention.keys() == {gate.name for gate in gates}
    assert all(attention[gate.name].shape == (len(images), gate.channels) for gate in gates)
    assert replayed_error(model, images, gates, attention) < 1e-6
    assert replayed_error(model, images, gates, {name: value * 1.5 for name, value in attention.items()}) > 1e-3


def hooks_left(model):
    from torch.nn.modules import module as globals_

    own = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return own + len(globals_._global_forward_hooks) + len(globals_._global_forward_pre_hooks)


# ---- networks of others ----
@pytest.mark.parametrize(("name", "count", "form", "layout", "hooked"), NETWORKS, ids=[row[0] for row in NETWORKS])
def test_known_networks_have_their_gates_and_the_values_reproduce_them(name, count, form, layout, hooked):
    images = torch.randn(3, 3, 96, 128)
    model = network(name, images)
    gates = find_gates(model, images)
    assert [(g.form, g.layout, g.source is not None) for g in gates] == [(form, layout, hooked)] * count
    assert len({g.name for g in gates}) == count
    assert_reproduces(model, images, gates)


@pytest.mark.parametrize("name", PLAIN)
def test_networks_without_channel_attention_have_no_gates(name):
    images = torch.randn(2, 3, *((160, 160) if name == "test_vit" else (96, 128)))
    assert find_gates(network(name, images), images) == []


def test_a_gate_is_named_after_its_site_and_knows_its_neighbours():
    images = torch.randn(3, 3, 96, 128)
    gates = find_gates(network("seresnet18", images), images)
    assert (gates[0].name, gates[0].site, gates[0].source) == ("layer1.0.se", "layer1.0.se", "layer1.0.se.gate")
    assert (gates[0].before, gates[0].after) == ("layer1.0.bn2", ("layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"))
    own = find_gates(create_model("resnet", depth=11, module="senet"), torch.randn(3, 3, 32, 40))
    assert [(g.name, g.source) for g in own] == [(f"layer{i}.0", f"layer{i}.0.attention_module") for i in (1, 2, 3)]
    assert find_gates(create_model("resnet", depth=11), torch.randn(3, 3, 32, 40)) == []
