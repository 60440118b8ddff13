"""What counts as a gate: functions that are bounded and those that are not, maps constant by chance, odd inputs."""

import numpy as np
import pytest
import timm
import torch
import torch.distributed
import torchvision
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.nn import functional as F

from stripe.folding import fold
from stripe.gates import explain_gates, find_gates, read_gates, replace_gates
from tests.conftest import randomize, relative_error


class Scaled(nn.Module):
    """A convolution, then `form(map, z)` with z (N, 8, 1, 1) of its average, then a convolution."""

    def __init__(self, form):
        super().__init__()
        self.first, self.fc, self.last, self.form = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1), form

    def z(self, x):
        return self.fc(x.mean((2, 3), keepdim=True))

    def forward(self, images):
        x = self.first(images)
        return self.last(self.form(x, self.z(x)))


def spread(z, mode):
    return F.interpolate(z, (18, 26), mode=mode, align_corners=False if mode == "bilinear" else None)


def shared(e):
    return e / e.sum(1, keepdim=True)


def standardised(z):
    return (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True) + 1e-5).sqrt()


# how a network may write it, and the same function written out once more in NumPy: the right values
BOUNDED = {
    "1 / (1 + exp(-z))": (lambda x, z: x * (1 / (1 + torch.exp(-z))), lambda z: 1 / (1 + np.exp(-z))),
    "(1 + exp(-z)) ** -1": (lambda x, z: x * (1 + torch.exp(-z)) ** -1, lambda z: 1 / (1 + np.exp(-z))),
    "tensors for numbers": (
        lambda x, z: x * (torch.tensor(1.0) / (torch.tensor(1.0) + torch.exp(-z))), lambda z: 1 / (1 + np.exp(-z))
    ),
    "x / (1 + exp(-z))": (lambda x, z: x / (1 + torch.exp(-z)), lambda z: 1 / (1 + np.exp(-z))),
    "lerp": (lambda x, z: torch.lerp(torch.zeros_like(x), x, z.sigmoid()), lambda z: 1 / (1 + np.exp(-z))),
    "bilinear": (lambda x, z: x * spread(z.sigmoid(), "bilinear"), lambda z: 1 / (1 + np.exp(-z))),
    "logsigmoid().exp()": (lambda x, z: x * F.logsigmoid(z).exp(), lambda z: 1 / (1 + np.exp(-z))),
    "clamp_min().clamp_max()": (lambda x, z: x * z.clamp_min(0).clamp_max(1), lambda z: z.clip(0, 1)),
    "minimum, maximum": (
        lambda x, z: x * torch.minimum(torch.maximum(z, torch.tensor(0.0)), torch.tensor(1.0)), lambda z: z.clip(0, 1)
    ),
    "log_softmax().exp()": (
        lambda x, z: x * z.log_softmax(1).exp(), lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)
    ),
    "exp() by its sum": (lambda x, z: x * shared(z.exp()), lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)),
    "erf": (lambda x, z: x * torch.erf(z), lambda z: np.vectorize(__import__("math").erf)(z)),
    "atan": (lambda x, z: x * torch.atan(z), np.arctan),
    "softsign": (lambda x, z: x * F.softsign(z), lambda z: z / (1 + np.abs(z))),
    "Gaussian": (lambda x, z: x * torch.exp(-(z**2) / 2), lambda z: np.exp(-np.square(z) / 2)),
    "Gaussian, squared by hand": (lambda x, z: x * torch.exp(-(z * z) / 2), lambda z: np.exp(-np.square(z) / 2)),
    "Gaussian context": (
        lambda x, z: x * torch.exp(-(standardised(z) ** 2) / 2 * 2),
        lambda z: np.exp(-np.square(z - z.mean(1, keepdims=True)) / (z.var(1, ddof=1, keepdims=True) + 1e-5)),
    ),
    "hard mask": (lambda x, z: x * (z > 0), lambda z: (z > 0) * 1.0),
}  # fmt: skip


@pytest.fixture
def images():
    return torch.rand(3, 3, 20, 28)


def read(model, gates, images):
    values = {}
    with torch.no_grad(), read_gates(model, gates, lambda gate, kind, rows: values.update({gate.name: rows})):
        model(images)
    return values


@pytest.mark.parametrize("kind", BOUNDED)
def test_a_bounded_function_makes_a_gate_however_it_is_written(kind, images):
    form, right = BOUNDED[kind]
    model = randomize(Scaled(form)).eval().double()
    images = images.double()
    [gate] = find_gates(model, images)
    with torch.no_grad():
        expected = right(model.z(model.first(images)).flatten(1).numpy())
        rows = read(model, [gate], images)["model"]
        assert rows.is_floating_point()
        assert np.allclose(rows, expected, rtol=1e-6 if kind == "hard mask" else 1e-12)
        constant = torch.linspace(0.2, 0.9, 8, dtype=torch.float64)
        at_constant = model.last(model.first(images) * constant[:, None, None])
        with replace_gates(model, [gate], {gate: constant}):
            assert relative_error(model(images), at_constant) < 1e-12
        folded, report = fold(model, {gate: constant}, images)
        assert report.table.direction[0] != "kept"
        assert (
            relative_error(folded(images.flip(3)), model.last(model.first(images.flip(3)) * constant[:, None, None]))
            < 1e-12
        )
        assert relative_error(model(images), at_constant) > 1e-3


def test_a_gate_that_divides_may_be_closed(images):
    model = Scaled(BOUNDED["x / (1 + exp(-z))"][0]).eval()
    [gate] = find_gates(model, images)
    closed = torch.tensor([0.0, *[0.5] * 7])
    folded, _ = fold(model, {gate: closed}, images)
    with torch.no_grad():
        expected = model.last(model.first(images) * closed[:, None, None])
        assert relative_error(folded(images), expected) < 1e-6
        with replace_gates(model, [gate], {gate: closed}):
            assert relative_error(model(images), expected) < 1e-6


UNBOUNDED = {
    "softplus": (lambda x, z: x * F.softplus(z), "not normalised"),
    "relu": (lambda x, z: x * z.relu(), "not normalised"),
    "exp": (lambda x, z: x * z.exp(), "not normalised"),
    "1 / exp(-z)": (lambda x, z: x / torch.exp(-z), "not normalised"),
    "1 / (1 - exp(-z))": (lambda x, z: x / (1 - torch.exp(-z)), "not normalised"),
    "odd power": (lambda x, z: x * torch.exp(z**3), "not normalised"),
    "product of two different": (lambda x, z: x * torch.exp(-(z * (z + 1))), "not normalised"),
    "L2 norm": (lambda x, z: x / x.norm(dim=(2, 3), keepdim=True).clamp_min(1e-6), "not normalised"),
    "normalize": (lambda x, z: F.normalize(x.flatten(2), dim=2).view_as(x), "not normalised"),
    "instance norm": (
        lambda x, z: (x - x.mean((2, 3), True)) / (x.var((2, 3), keepdim=True) + 1e-5).sqrt(), "not normalised"
    ),
    "a mixture of two maps": (lambda x, z: torch.lerp(x.flip(3), x, z.sigmoid()), "lerp mixes two maps"),
    "matrix product": (
        lambda x, z: torch.bmm(torch.diag_embed(z.sigmoid().flatten(1)), x.flatten(2)).view_as(x), "a matrix product"
    ),
    "dynamic convolution": (
        lambda x, z: F.conv2d(x.view(1, -1, 18, 26), z.sigmoid().view(-1, 1, 1, 1), groups=24).view_as(x),
        "a matrix product or convolution",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:no gates:UserWarning")
@pytest.mark.parametrize("kind", UNBOUNDED)
def test_what_is_not_bounded_is_named_with_the_reason(kind, images):
    form, reason = UNBOUNDED[kind]
    model = randomize(Scaled(form)).eval()
    assert find_gates(model, images) == []
    assert any(reason in candidate.reason for candidate in explain_gates(model, images))


def test_an_empty_answer_tells_the_most_frequent_reason(images):
    with pytest.warns(UserWarning, match="of 1 products that depend on the input 1 were rejected.* not normalised"):
        assert find_gates(Scaled(lambda x, z: x * z).eval(), images) == []
    assert find_gates(Scaled(lambda x, z: x + x.flip(3)).eval(), images) == []  # no product: nothing to warn of


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min:UserWarning")
def test_a_gate_behind_fake_quantisation_is_found(images):
    """A network prepared for quantisation-aware training rounds the gate, and what it is made of, between layers."""
    network = randomize(Scaled(lambda x, z: x * z.sigmoid()))
    prepared = prepare_qat_fx(network.train(), get_default_qat_qconfig_mapping("fbgemm"), (images,))
    with torch.no_grad():
        prepared(images)
    [gate] = find_gates(prepared.eval(), images)
    rows = read(prepared, [gate], images)["model"]
    with torch.no_grad():
        assert (rows - network.eval().z(network.first(images)).sigmoid().flatten(1)).abs().max() < 0.05
    assert len(np.unique(rows)) <= 256


# ---- maps that are constant by chance, or pooled over a part ----
@pytest.mark.filterwarnings("ignore:no gates:UserWarning")
def test_residuals_of_norms_with_zero_gamma_are_no_gates():
    model = torchvision.models.resnet18(zero_init_residual=True).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bn2.bias"):
            nn.init.normal_(parameter)
    assert find_gates(model, torch.rand(2, 3, 64, 96)) == []


def test_blocks_of_a_network_without_norms_are_no_gates():
    model, generator = timm.create_model("eca_nfnet_l0").eval(), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 and not parameter.any():
            shift = 0.3 if "gain" in name else 0
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + shift
    gates = find_gates(model, torch.rand(3, 3, 96, 64))
    assert [gate.form for gate in gates] == ["multiplicative"] * 12


class Calibrated(nn.Module):
    """sigmoid(x + the map pooled by 4, through a layer, spread again): a spatial gate, whatever the size."""

    def __init__(self):
        super().__init__()
        self.first, self.low, self.own = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )

    def forward(self, images):
        x = self.first(images)
        low = F.interpolate(self.low(F.avg_pool2d(x, 4)), x.shape[2:])
        return self.own(x) * torch.sigmoid(x + low)


@pytest.mark.filterwarnings("ignore:no gates:UserWarning")
@pytest.mark.parametrize("size", [5, 7, 8, 14])
def test_what_is_pooled_over_a_part_of_the_map_is_no_gate(size):
    model, images = randomize(Calibrated()).eval(), torch.rand(2, 3, size, size)
    assert find_gates(model, images) == []
    parts = [c.reason for c in explain_gates(model, images) if "is pooled over" in c.reason]
    said = f"it is pooled over 4x4 of {size}x{size} of the map, not over all of it"
    assert parts == ([said] if size < 8 else [])


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(7), nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(7), nn.Conv2d(8, 8, 7, groups=8)]
)
def test_what_is_pooled_over_all_of_the_map_is_a_gate(pool):
    class Net(Scaled):
        def z(self, x):
            return self.fc(pool(x))

    [gate] = find_gates(Net(lambda x, z: x * z.sigmoid()).eval(), torch.rand(2, 3, 9, 9))
    assert gate.channels == 8


# ---- functions named as bounded ----
def test_a_function_named_as_bounded_is_taken_so_where_gates_are_found_and_folded(images):
    model = randomize(Scaled(lambda x, z: x * F.softplus(z))).eval()
    constants = {"model": torch.linspace(0.2, 0.9, 8)}
    with pytest.warns(UserWarning, match="not normalised"), pytest.raises(ValueError, match="no gates to fold"):
        fold(model, constants, images)
    folded, report = fold(model, constants, images, normalisers=["softplus"])
    assert report.table.direction[0] != "kept"
    with torch.no_grad():
        expected = model.last(model.first(images) * constants["model"][:, None, None])
        assert relative_error(folded(images), expected) < 1e-6


# ---- inputs that are no single batch ----
class Detector(Scaled):
    """Takes a list of images, as torchvision's detectors do."""

    def forward(self, images, targets=None):
        assert isinstance(images, list)
        return [{"boxes": each} for each in super().forward(torch.stack(images))]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_list_of_images_is_a_batch_of_its_length(count, wrapped):
    model = randomize(Detector(lambda x, z: x * z.sigmoid())).eval()
    images = [torch.rand(3, 20, 28) for _ in range(count)]
    [gate] = find_gates(model, (images,) if wrapped else images)
    values = {}
    with torch.no_grad(), read_gates(model, [gate], lambda gate, kind, rows: values.update({kind: rows})):
        model(images)
    expected = model.z(model.first(torch.stack(images))).sigmoid().flatten(1)
    assert torch.allclose(values["attention"], expected)


class Conditioned(Scaled):
    """Takes more than images, and not first."""

    def forward(self, extra, images, flag=True, lengths=None):
        assert flag
        assert lengths is None or len(lengths) == len(images)
        return super().forward(images) + (extra.sum() if isinstance(extra, torch.Tensor) else extra)


OTHERS = {
    "one temperature": torch.ones(1), "a scalar": torch.tensor(2.0), "a number": 2.0, "a mask": torch.ones(1, 20, 28),
    "a table": torch.ones(7, 5), "of three": torch.ones(2, 3),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("by_name", [False, True])
def test_the_batch_need_not_be_the_first_input(other, by_name):
    model, images = randomize(Conditioned(lambda x, z: x * z.sigmoid())).eval(), torch.rand(4, 3, 20, 28)
    inputs = (OTHERS[other], images, True, torch.tensor([9, 8, 7, 6]))
    named = dict(zip(("extra", "images", "flag", "lengths"), inputs, strict=True))
    [gate] = find_gates(model, named if by_name else inputs)
    folded, report = fold(model, {gate: torch.linspace(0.2, 0.9, 8)}, named if by_name else inputs)
    with torch.no_grad(), replace_gates(model, [gate], {gate: torch.linspace(0.2, 0.9, 8)}):
        assert relative_error(folded(*inputs), model(*inputs)) < 1e-6


class Video(Scaled):
    """Folds the frames of (N, T, 3, H, W) into the batch."""

    def forward(self, clips):
        return super().forward(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])


class Shuffled(Scaled):
    """Folds the groups of its channels into the batch, as shuffle attention does."""

    def forward(self, images):
        x = self.first(images)
        x = x.view(-1, 4, *x.shape[2:])
        g = torch.sigmoid(x.mean((2, 3), keepdim=True) * self.fc.weight[:1, :4])
        return self.last((x * g).view(len(images), 8, *x.shape[2:]))


def test_groups_of_channels_folded_into_the_batch_are_refused_in_words(images):
    model = randomize(Shuffled(None)).eval()
    with pytest.warns(UserWarning, match="not the batch of 3 but 2 times it"):
        assert find_gates(model, images) == []


def test_frames_folded_into_the_batch_are_refused_in_words():
    model, clips = randomize(Video(lambda x, z: x * z.sigmoid())).eval(), torch.rand(2, 4, 3, 20, 28)
    with pytest.warns(UserWarning, match="not the batch of 2 but 4 times it, as where frames, crops or windows"):
        assert find_gates(model, clips) == []
    assert len(find_gates(model, torch.rand(4, 1, 3, 20, 28))) == 1, "one frame a sample is one row a sample"


class OneByOne(Scaled):
    """Runs the samples one after another."""

    def forward(self, images):
        return torch.cat([super(OneByOne, self).forward(image[None]) for image in images])


class TimeFirst(Scaled):
    """Turns maps into (time, sample, channel), as recurrent layers take it."""

    def forward(self, images):
        x = self.first(images).flatten(2).permute(2, 0, 1)
        return x * torch.sigmoid(F.linear(x.mean(0, keepdim=True), self.fc.weight[:, :, 0, 0]))


@pytest.mark.parametrize("network", [OneByOne, TimeFirst])
def test_samples_that_are_no_first_dimension_are_refused_in_words(network, images):
    model = randomize(network(lambda x, z: x * z.sigmoid())).eval()
    with pytest.warns(UserWarning, match="not the batch of 3, as where samples run one after another or stand along"):
        assert find_gates(model, images) == []


# ---- networks of other kinds ----
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


def sequence():
    return randomize(nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.Conv2d(8, 4, 1))).eval()


def inside(function):
    model = sequence()
    model[1] = function(model[1])
    return model


def quantised():
    mapping = get_default_qconfig_mapping("fbgemm")
    prepared = prepare_fx(sequence(), mapping, (torch.rand(3, 3, 20, 28),))
    prepared(torch.rand(3, 3, 20, 28))
    return convert_fx(prepared)


FOLDED_BEFORE = {
    "scripted": (lambda: torch.jit.script(sequence()), "the network is scripted or traced.*before torch.jit"),
    "scripted inside": (lambda: inside(torch.jit.script), "^1 is scripted or traced.*before torch.jit"),
    "traced inside": (
        lambda: inside(lambda block: torch.jit.trace(block, torch.rand(1, 8, 9, 9))), "^1 is scripted or traced"
    ),
    "int8": (quantised, "quantised to int8: fold the network before"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", FOLDED_BEFORE)
def test_what_can_be_read_and_not_rewritten_is_refused_by_fold_alone(kind, images):
    make, said = FOLDED_BEFORE[kind]
    model = make()
    [gate] = find_gates(model, images)
    assert read(model, [gate], images)[gate.name].shape == (3, 8)
    with pytest.raises(ValueError, match=said):
        fold(model, {gate: torch.ones(8)}, images)


def test_an_exported_network_is_folded(images):
    model = sequence()
    exported = torch.export.export(model, (images,)).module()
    [gate] = find_gates(exported, images)
    constant = torch.linspace(0.2, 0.9, 8)
    folded, _ = fold(exported, {gate: constant}, images)
    with torch.no_grad():
        expected = model[2](model[0](images) * constant[:, None, None])
        assert relative_error(folded(images), expected) < 1e-6
        assert relative_error(model(images), expected) > 1e-3


def test_gates_are_found_on_the_meta_device_and_folded_once_the_weights_are_there(images):
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.Conv2d(8, 4, 1)).eval()
    gates = find_gates(model, images.to("meta"))
    with pytest.raises(ValueError, match=r"^0\.weight is on the meta device .* load the weights first"):
        fold(model, {"1": torch.ones(8)}, images)
    assert gates == find_gates(sequence(), images)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 shards networks on a GPU only")
@pytest.mark.equal_bits
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_sharded_networks_are_read_by_gates_found_before(images, tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = sequence()
    gates = find_gates(model, images)
    expected = read(model, gates, images)["1"]
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fsdp.fully_shard(model[1], mesh=mesh)
        with pytest.raises(ValueError, match="find the gates before fully_shard"):
            find_gates(model, images)
        with pytest.raises(ValueError, match="^1 is sharded by FSDP: load its full state dict"):
            fold(model, {"1": torch.ones(8)}, images)
        assert torch.equal(read(model, gates, images)["1"], expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.equal_bits
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("part", ["", "1"])
def test_networks_compiled_in_place_are_read_and_folded(part, called, images):
    model, constants = sequence(), {"1": torch.linspace(0.2, 0.9, 8)}
    expected = read(model, find_gates(model, images), images)["1"]
    plain, _ = fold(model, constants, images)
    model.get_submodule(part).compile(backend="eager")
    with torch.no_grad():
        if called:
            model(images)
        assert torch.equal(read(model, find_gates(model, images), images)["1"], expected)
        assert torch.equal(fold(model, constants, images)[0](images), plain(images))


@pytest.mark.equal_bits
@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
def test_a_part_that_was_compiled_while_its_gate_is_read_tells_how_to_go_on(images):
    model = sequence()
    gates = find_gates(model, images)
    expected = read(model, gates, images)["1"]

    def compiled_meanwhile(stance):
        block, values = model[1], {}
        try:
            with torch.no_grad(), read_gates(model, gates, lambda gate, kind, rows: values.update({gate.name: rows})):
                model[1] = torch.compile(block, backend="eager")
                with torch.compiler.set_stance(stance):
                    model(images)
        finally:
            model[1] = block
        return values["1"]

    if torch.__version__ < "2.7":  # where a compiled part runs the hooks within it
        assert torch.equal(compiled_meanwhile("default"), expected)
        return
    with pytest.raises(RuntimeError, match=r'did not pass 1: .* call the network under .*set_stance\("force_eager"\)'):
        compiled_meanwhile("default")
    assert torch.equal(compiled_meanwhile("force_eager"), expected)
