import copy
import pickle

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from stripe import asr, folding
from stripe.asr.layers import DRAWS, ASRLayer, asr_layers, wrap
from stripe.attention import ATTENTION, create_attention
from stripe.models import ResNet
from tests.conftest import randomize, relative_error

C = 32
LAYERS = {
    "BatchNorm1d": (lambda **k: nn.BatchNorm1d(C, **k), (6, C)),
    "BatchNorm2d": (lambda **k: nn.BatchNorm2d(C, **k), (6, C, 4, 5)),
    "BatchNorm3d": (lambda **k: nn.BatchNorm3d(C, **k), (6, C, 2, 3, 2)),
    "SyncBatchNorm": (lambda **k: nn.SyncBatchNorm(C, **k), (6, C, 4, 5)),
    "GroupNorm": (lambda **k: nn.GroupNorm(4, C, **k), (6, C, 4, 5)),
    "LayerNorm": (
        lambda affine=True, **k: nn.LayerNorm(C, elementwise_affine=affine, **k),
        (6, 7, C),
    ),
}
PLAIN = {
    "Conv2d": (lambda **k: nn.Conv2d(3, C, 3, padding=1, **k), (2, 3, 6, 5)),
    "Conv1d": (lambda **k: nn.Conv1d(3, C, 3, **k), (2, 3, 6)),
    "Linear": (lambda **k: nn.Linear(8, C, **k), (4, 8)),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def spread_channels(v, ndim, last):
    return v if last else v.view(1, -1, *[1] * (ndim - 2))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("module", ATTENTION)
def test_norms_scaled_by_v_and_deployed(module, kind, affine, eps, dtype):
    build, shape = LAYERS[kind]
    norm = randomize(build(affine=affine, eps=eps)).to(dtype).eval()
    if hasattr(norm, "running_var"):
        norm.running_var.fill_(1e-3)  # where a forgotten eps shows
    layer = wrap(norm, lambda: create_attention(module, C)).to(dtype)
    nn.init.normal_(layer.vector)
    x = torch.randn(shape, dtype=dtype)
    trained = layer(x)
    expected = norm(x) * spread_channels(layer.learned_vector(), x.ndim, kind == "LayerNorm")
    assert relative_error(trained, expected) < TOLERANCE[dtype]
    plain = copy.deepcopy(layer)
    assert plain.switch_to_deploy(delete=True) < TOLERANCE[dtype]
    assert type(plain) is type(norm)
    assert relative_error(plain(x), trained) < TOLERANCE[dtype]
    if eps == 1e-3 and hasattr(norm, "running_var"):  # the fault of copying everything but eps must show
        plain.eps = 1e-5
        assert relative_error(plain(x), trained) > 1e-2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", PLAIN)
def test_convolutions_and_linear_layers(kind, bias):
    build, shape = PLAIN[kind]
    inner = build(bias=bias).double()
    layer = wrap(inner, lambda: create_attention("eca", C))
    nn.init.normal_(layer.vector)
    x = torch.randn(shape, dtype=torch.float64)
    expected = inner(x) * spread_channels(layer.learned_vector(), inner(x).ndim, kind == "Linear")
    plain = copy.deepcopy(layer)
    plain.switch_to_deploy(delete=True)
    assert relative_error(layer(x), expected) < 1e-12
    assert relative_error(plain(x), expected) < 1e-12
    assert plain.state_dict().keys() == inner.state_dict().keys()


@pytest.mark.parametrize("module", ATTENTION)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_module_deploys_and_fuses_exactly(module, dtype):
    model = randomize(ResNet(11, module=module, asr=True)).to(dtype).eval()
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    expected = model(x)
    for convert in (asr.deploy, asr.fuse):
        assert relative_error(convert(model)(x), expected) < TOLERANCE[dtype]
    with torch.no_grad():
        model.layer1[0].bn3.vector.add_(1.0)
    if module != "ge":
        assert relative_error(asr.deploy(model)(x), expected) > TOLERANCE[dtype]


@pytest.mark.parametrize("module", ATTENTION)
def test_psi_gets_a_finite_gradient_that_is_not_zero(module):
    model = ResNet(11, module=module, asr=True)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    for name, layer in asr_layers(model):
        assert torch.isfinite(layer.vector.grad).all(), name
        assert layer.vector.grad.abs().max() > 0, name


def test_a_module_deaf_to_psi_is_drawn_again_or_refused():
    class Deaf(nn.Module):
        def forward(self, x):
            return torch.relu(x * 0 - 1) + 0.5

    draws = []

    def build():
        draws.append(Deaf() if len(draws) < 3 else create_attention("ge", C))
        return draws[-1]

    assert wrap(nn.BatchNorm2d(C), build).attention_module is draws[3]
    with pytest.raises(ValueError, match="psi gets no finite gradient from Deaf"):
        wrap(nn.BatchNorm2d(C), Deaf)
    assert DRAWS >= 4


def test_training_form_is_bn_times_v_and_updates_the_running_statistics():
    norm = nn.BatchNorm2d(C, momentum=0.3)
    twin = copy.deepcopy(norm)
    layer = wrap(norm, lambda: create_attention("senet", C))
    x = torch.randn(8, C, 4, 4)
    torch.testing.assert_close(layer(x), twin(x) * layer.learned_vector().view(1, C, 1, 1))
    assert torch.equal(norm.running_var, twin.running_var)
    assert norm.num_batches_tracked == 1
    assert not torch.equal(norm.running_var, torch.ones(C))


# ---- networks --------------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    return randomize(ResNet(11, module="senet", asr=True)).eval()


def test_deployed_is_the_plain_network(trained):
    deployed, plain = asr.deploy(trained), ResNet(11)
    assert list(deployed.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in deployed.modules()] == [type(m) for m in plain.modules()]
    assert sum(p.numel() for p in deployed.parameters()) == sum(p.numel() for p in plain.parameters())
    assert deployed.config == plain.config
    plain.load_state_dict(deployed.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(x), deployed(x))
    operators = [len(torch.export.export(m.eval(), (x,)).graph.nodes) for m in (deployed, plain)]
    assert operators[0] == operators[1] < len(torch.export.export(trained, (x,)).graph.nodes)


def test_conversions_leave_their_argument_alone(trained):
    before = copy.deepcopy(trained.state_dict())
    deployed = asr.deploy(trained)
    asr.fuse(trained)
    asr.insert(deployed, where="bn1")
    for key, value in trained.state_dict().items():
        assert torch.equal(value, before[key])
    deployed.layer1[0].bn3.running_mean.add_(1)
    assert torch.equal(trained.layer1[0].bn3.bn.running_mean, before["layer1.0.bn3.bn.running_mean"])
    assert asr.deploy(trained, inplace=True) is trained
    assert not list(asr_layers(trained))


def test_a_second_deploy_changes_nothing(trained):
    once = asr.deploy(trained)
    twice = asr.deploy(once)
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))
    layer = trained.layer1[0].bn3
    assert layer.switch_to_deploy() == layer.switch_to_deploy()


@pytest.mark.equal_bits
def test_train_deploy_train_continues_exactly():
    x, y = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.arange(8)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), y).backward()
            optimizer.step()

    models = [ResNet(11, module="senet", asr=True).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, 2)
    errors = asr.switch_to_deploy(models[1])
    assert len(errors) == 3
    assert max(errors.values()) < 1e-12
    deployed = models[1].eval()(x)
    assert relative_error(deployed, models[0].eval()(x)) < 1e-10
    assert models[1].layer1[0].bn3.fused_bn is not None
    asr.switch_to_train(models[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, 2)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_copies_pickles_and_state_dicts_carry_each_form(trained):
    x = torch.randn(2, 3, 32, 32)
    kept = copy.deepcopy(trained)
    asr.switch_to_deploy(kept)
    for model in (trained, kept, asr.deploy(trained)):
        torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
    fresh = ResNet(11, module="senet", asr=True).eval()
    fresh.load_state_dict(kept.state_dict())  # the merged copy is derived, and dropped
    torch.testing.assert_close(fresh(x), trained(x))


def test_weights_of_the_other_form_say_which(trained):
    deployed, kept = asr.deploy(trained), copy.deepcopy(trained)
    asr.switch_to_deploy(kept)
    with pytest.raises(RuntimeError, match="weights of a deployed layer, this one is in training form"):
        trained.load_state_dict(deployed.state_dict())
    with pytest.raises(RuntimeError, match="weights are in ASR training form, this network is plain or deployed"):
        deployed.load_state_dict(trained.state_dict())
    with pytest.raises(RuntimeError, match="weights in training form, this layer is deployed"):
        kept.load_state_dict(trained.state_dict())


def test_a_merge_that_does_not_hold_is_refused(trained):
    with torch.no_grad():
        trained.layer1[0].bn3.vector[0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="merging BatchNorm2d gave relative error nan"):
        asr.deploy(trained)


def test_repeats_multiply_their_vectors():
    model = randomize(asr.insert(ResNet(11), "senet", where="bn3", repeats=3)).eval()
    layer = model.layer2[0].bn3
    single = [layer.attention_module(layer.vector), layer.bn.attention_module(layer.bn.vector)]
    single.append(layer.bn.bn.attention_module(layer.bn.bn.vector))
    torch.testing.assert_close(layer.learned_vector(), torch.stack(single).prod(0).flatten())
    x = torch.randn(2, 3, 32, 32)
    assert relative_error(asr.deploy(model)(x), model(x)) < 1e-5
    ResNet(11).load_state_dict(asr.deploy(model).state_dict())


@pytest.mark.parametrize("where", ["bn3", "layer3.*", "layer2.0.conv1"])
def test_where_chooses_layers_by_path_or_last_part(where):
    if where == "layer3.*":
        with pytest.raises(TypeError, match="Bottleneck cannot carry a vector"):
            asr.insert(ResNet(11), where=where)
        return
    paths = [name for name, _ in asr_layers(asr.insert(ResNet(11), where=where))]
    assert paths == ([f"layer{i}.0.bn3" for i in (1, 2, 3)] if where == "bn3" else [where])


def test_where_without_a_match_shows_candidates():
    with pytest.raises(ValueError, match=r"no layer matches where='bn9'.*bn1"):
        asr.insert(ResNet(11), where="bn9")


def test_fuse_leaves_no_norm_and_keeps_shared_outputs():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y  # the convolution has another consumer

    assert not any(isinstance(m, nn.BatchNorm2d) for m in asr.fuse(ResNet(11)).modules())
    shared = randomize(Shared()).eval()
    x = torch.randn(2, 3, 4, 4)
    assert isinstance(asr.fuse(shared).bn, nn.BatchNorm2d)
    torch.testing.assert_close(asr.fuse(shared)(x), shared(x))


class Branching(nn.Module):
    """Volumes, a branch that depends on the data, a norm without statistics, and one that does not run."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv3d(2, 4, 3, bias=False), nn.BatchNorm3d(4)
        self.last, self.batch = nn.Conv3d(4, 3, 1), nn.BatchNorm3d(3, track_running_stats=False)
        self.unused = nn.BatchNorm3d(3)

    def forward(self, volume, scale=None):
        y = F.relu(self.bn(self.conv(volume)))
        if y.sum() > -1:
            y = self.last(y) if scale is None else self.last(y) * scale
        return self.batch(y)


def test_networks_that_cannot_be_traced_by_fx_fuse_and_say_what_is_left():
    model, x = randomize(Branching()).eval(), torch.randn(2, 2, 6, 7, 8)
    for images in (None, x, {"volume": x, "scale": torch.tensor(2.0)}):
        fused, report = folding.fuse_norms(model, images)
        assert relative_error(fused(x), model(x)) < 1e-5
        assert relative_error(fused(x), fused(x * 1.1)) > 1e-3
        table = report.table.set_index("norm")
        assert table.direction.to_dict() == {"bn": "back", "batch": "kept", "unused": "kept"}
        assert table.into["bn"] == ("conv.weight", "conv.bias")
        assert table.reason["batch"] == "it has no running statistics, so that it depends on the batch"
        assert table.reason["unused"] == "the forward does not run it in eval mode"
        assert isinstance(fused.bn, nn.Identity)
        assert isinstance(fused.batch, nn.BatchNorm3d)
    assert isinstance(asr.fuse(model).bn, nn.Identity)
    assert isinstance(model.bn, nn.BatchNorm3d)


def test_fuse_asks_for_images_where_none_can_be_made():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.bn = nn.Embedding(5, 4), nn.BatchNorm1d(4)
            self.conv = nn.Conv1d(4, 4, 1)

        def forward(self, words):
            return self.bn(self.conv(self.table(words).transpose(1, 2)))

    model, words = randomize(Embedded()).eval(), torch.randint(5, (2, 7))
    with pytest.raises(ValueError, match="no batch that was tried passes through Embedded: give one as `images`"):
        asr.fuse(model)
    fused = asr.fuse(model, words)
    assert isinstance(fused.bn, nn.Identity)
    assert relative_error(fused(words), model(words)) < 1e-5


def test_norms_in_other_places_fuse():
    norm_first = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    shared = nn.BatchNorm2d(4)
    twice = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.ReLU(), nn.Conv2d(4, 4, 1), shared)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4))
    act = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 4, 4).double()
    for model, norms in ((norm_first, 0), (twice, 0), (dense, 0), (act, 1)):
        model = randomize(model).double().eval()
        fused, report = folding.fuse_norms(model, x)
        assert relative_error(fused(x), model(x)) < 1e-12
        assert set(report.table.direction) <= {"back", "forward"}
        assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules()) == norms


def test_fusing_in_place_changes_the_network_itself_and_any_mode_gives_eval_mode(trained):
    x = torch.randn(2, 3, 32, 32)
    expected = trained.eval()(x)
    fused = asr.fuse(trained.train(), inplace=True)
    assert fused is trained
    assert not any(module.training for module in fused.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert relative_error(fused(x), expected) < 1e-5


def test_timm_reparameterizes_asr_networks(trained):
    from timm.utils.model import reparameterize_model

    x = torch.randn(2, 3, 32, 32)
    plain = reparameterize_model(trained)
    assert not list(asr_layers(plain))
    assert relative_error(plain(x), trained(x)) < 1e-5


@pytest.mark.equal_bits
@pytest.mark.parametrize("module", ATTENTION)
def test_autocast_leaves_the_learned_vector_alone(module):
    """What is trained in mixed precision is what is deployed."""
    layer = wrap(nn.BatchNorm2d(C), lambda: create_attention(module, C), psi_init="normal", repeats=2).eval()
    exact = layer.learned_vector()
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer.learned_vector()
        control = F.linear(layer.vector.flatten(), torch.eye(C))
    assert cast.dtype == torch.float32
    assert torch.equal(cast, exact)
    assert control.dtype == torch.bfloat16, "autocast was on"


def test_half_precision_and_compile(trained):
    x = torch.randn(2, 3, 32, 32)
    half = copy.deepcopy(trained).bfloat16()
    assert asr.deploy(half)(x.bfloat16()).dtype == torch.bfloat16
    compiled = torch.compile(trained, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), trained(x))


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.LayerNorm((4, 4)), nn.ConvTranspose2d(3, 4, 3)])
def test_layers_that_cannot_carry_a_vector_are_refused(layer):
    with pytest.raises(TypeError, match="cannot carry a vector"):
        ASRLayer(layer, create_attention("ge", 4))


def vit():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=C, mlp_dim=64)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero: every output would be equal
    return model, "ln_2"


def convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(C, 64, 1), CNBlockConfig(64, None, 1)]
    return ConvNeXt(settings, layer_scale=1.0, num_classes=5), "features.*.block.2"  # 1e-6 would hide the blocks


def timm_network():
    import timm

    return timm.create_model("lcnet_050", num_classes=5), "bn1"


@pytest.mark.parametrize("build", [vit, convnext, timm_network])
def test_networks_of_others_take_vectors_and_give_them_back(build):
    model, where = build()
    model = randomize(model).eval()
    inserted = asr.insert(model, "eca", where=where)
    for _, layer in asr_layers(inserted):
        nn.init.normal_(layer.vector)
    x = torch.randn(2, 3, 32, 32)
    assert relative_error(inserted(x), model(x)) > 1e-3
    deployed = asr.deploy(inserted)
    assert relative_error(deployed(x), inserted(x)) < 1e-5
    assert [type(m) for m in deployed.modules()] == [type(m) for m in model.modules()]
    model.load_state_dict(deployed.state_dict())
    inserted.train()(x).square().sum().backward()
    assert all(layer.vector.grad.abs().max() > 0 for _, layer in asr_layers(inserted))


def test_averaged_copies_deploy(trained):
    from torch.optim.swa_utils import AveragedModel

    average = AveragedModel(trained)
    for _ in range(2):  # the first update copies
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.mul_(1.01)
        average.update_parameters(trained)
    x = torch.randn(2, 3, 32, 32)
    assert relative_error(asr.deploy(average.module)(x), average.module(x)) < 1e-5
    assert relative_error(asr.deploy(average.module)(x), trained(x)) > 1e-4


def test_distributed_data_parallel_trains_psi(trained):
    import torch.distributed as distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        network = nn.parallel.DistributedDataParallel(trained.train())
        F.cross_entropy(network(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        assert all(layer.vector.grad.abs().max() > 0 for _, layer in asr_layers(network.module))
        x = torch.randn(2, 3, 32, 32)
        network.eval()
        assert relative_error(asr.deploy(network.module)(x), network(x)) < 1e-5
    finally:
        distributed.destroy_process_group()


CONVERSIONS = {
    "insert": lambda model, images: asr.insert(model),
    "deploy": lambda model, images: asr.deploy(model),
    "anneal": lambda model, images: asr.anneal(model, images, begin=0, end=9),
}


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_pruned_network_whose_weights_are_made_of_others_is_converted(convert):
    model, images = randomize(ResNet(11, module="senet")), torch.randn(4, 3, 32, 32)
    conv = prune.random_unstructured(model.layer1[0].conv2, "weight", 0.5)
    model.train()(images).sum().backward()  # the weight that a forward pass made last is no leaf
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    converted = CONVERSIONS[convert](model.eval(), images).eval()
    new = converted.layer1[0].conv2
    assert torch.equal(new.weight_mask, conv.weight_mask)
    assert new.weight_orig is not conv.weight_orig
    with torch.no_grad():
        before = converted(images)
        new.weight_orig *= 2
        assert relative_error(converted(images), before) > 1e-3  # its weight is made anew by each forward pass
    assert torch.equal(conv.weight_orig * conv.weight_mask, conv.weight)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_networks_deploy_and_fuse_where_they_are(trained):
    model, x = trained.cuda(), torch.randn(2, 3, 32, 32, device="cuda")
    for convert in (asr.deploy, asr.fuse):
        assert relative_error(convert(model)(x), model(x)) < 1e-3
