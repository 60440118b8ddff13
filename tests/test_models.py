import pickle
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stripe import asr
from stripe.models import ResNet, create_model, load_checkpoint, read_checkpoint, read_epoch
from stripe.models.resnet import Block
from stripe.models.zoo import infer_config
from tests.conftest import randomize, relative_error

FORMS = {
    "plain": {},
    "se": {"module": "senet"},
    "asr": {"module": "senet", "asr": True},
    "both": {"module": "senet", "asr": True, "both": True},
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_are_the_published_ones():
    assert count(ResNet(164, num_classes=100)) == 1_727_284
    assert count(ResNet(164, module="senet", num_classes=100)) == 1_929_388


@pytest.mark.parametrize(
    ("block", "depth"), [("bottleneck", 20), ("bottleneck", 29), ("basicblock", 14), ("basicblock", 20)]
)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_both_blocks_gives_logits(block, depth, form):
    model = create_model("resnet", depth=depth, block=block, num_classes=7, **FORMS[form])
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert model.config == {
        "depth": depth, "block": block, "num_classes": 7, "module": None, "asr": False, "both": False, "repeats": 1,
    } | FORMS[form]  # fmt: skip


@pytest.mark.parametrize("form", ["se", "asr", "both"])
def test_the_same_seed_gives_every_form_the_same_plain_weights(form):
    torch.manual_seed(3)
    plain = ResNet(20)
    torch.manual_seed(3)
    other = ResNet(20, **FORMS[form])
    for name, weight in plain.state_dict().items():
        other_name = name.replace("bn3.", "bn3.bn.") if "asr" in FORMS[form] else name
        assert torch.equal(other.state_dict()[other_name], weight)
    assert not torch.equal(ResNet(20).conv1.weight, plain.conv1.weight)


def test_key_layout_is_the_reference_codes():
    keys = set(ResNet(11, module="senet", asr=True, both=True).state_dict())
    expected = {"conv1.weight", "bn1.weight", "layer1.0.conv3.weight", "layer1.0.downsample.0.weight"}
    expected |= {"layer1.0.downsample.1.running_mean", "layer3.0.bn3.bn.weight", "layer3.0.bn3.vector", "fc.bias"}
    expected |= {f"layer2.0.{place}attention_module.fc{i}.weight" for place in ("", "bn3.") for i in (1, 2)}
    assert expected <= keys
    assert not any("fused_bn" in key for key in keys)


@pytest.mark.parametrize("options", [
    {"depth": 21}, {"depth": 2}, {"depth": 20, "block": "basic"}, {"depth": 20, "asr": True},
    {"depth": 20, "module": "senet", "both": True}, {"depth": 20, "module": "sent"},
])  # fmt: skip
def test_impossible_networks_are_refused(options):
    with pytest.raises(ValueError, match="expected|needs"):
        create_model("resnet", **options)


def test_unknown_arch_lists_the_right_ones():
    with pytest.raises(ValueError, match="'vgg'; expected one of resnet"):
        create_model("vgg")


# ---- files ------------------------------------------------------------------------------------------------


def save_as_reference(model, path, *, prefix, deployed=False):
    """Write the ASR reference code's file for `model`: data-parallel prefix, merged norm beside its parts or alone."""
    state = {}
    if deployed:
        for key, value in asr.deploy(model).state_dict().items():
            state[key.replace(".bn3.", ".bn3.fused_bn.")] = value
    else:
        state.update(model.state_dict())
        for name, layer in asr.layers.asr_layers(model):
            for key in layer.bn.state_dict():
                state[f"{name}.fused_bn.{key}"] = torch.zeros_like(
                    layer.bn.state_dict()[key]
                )  # stale, as before merging
    state = {prefix + key: value for key, value in state.items()}
    torch.save({"epoch": 5, "state_dict": state, "acc": 71.2, "best_acc": 72.0, "optimizer": {"state": {}}}, path)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", FORMS)
def test_reference_files_load_with_the_same_logits(tmp_path, form, prefix):
    model = randomize(ResNet(20, num_classes=6, **FORMS[form])).eval()
    save_as_reference(model, tmp_path / "checkpoint.pth.tar", prefix=prefix)
    loaded = read_checkpoint(tmp_path / "checkpoint.pth.tar")
    x = torch.randn(2, 3, 32, 32)
    assert loaded.epoch == 5
    assert loaded.model.config == model.config
    torch.testing.assert_close(loaded.model(x), model(x))


@pytest.mark.parametrize("form", ["asr", "both"])
def test_deployed_reference_files_load_with_the_same_logits(tmp_path, form):
    model = randomize(ResNet(20, **FORMS[form])).eval()
    save_as_reference(model, tmp_path / "model_best.pth.tar", prefix="module.", deployed=True)
    loaded = load_checkpoint(tmp_path / "model_best.pth.tar")
    x = torch.randn(2, 3, 32, 32)
    assert not loaded.training
    assert loaded.config["asr"] is False
    assert loaded.config["module"] == ("senet" if form == "both" else None)
    assert relative_error(loaded(x), model(x)) < 1e-5
    assert relative_error(loaded(x), randomize(ResNet(20, **FORMS[form])).eval()(x)) > 1e-2


@pytest.mark.parametrize("module", ["eca", "srm", "spa", "ie"])
def test_the_module_is_read_from_the_keys(module):
    config = infer_config(ResNet(14, block="basicblock", module=module).state_dict())
    assert (config["module"], config["depth"], config["block"]) == (module, 14, "basicblock")


def test_repeated_insertion_is_read_from_the_keys(tmp_path):
    model = randomize(ResNet(11, module="eca", asr=True, repeats=3)).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded.config == model.config
    assert loaded.config["repeats"] == 3
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x))


def test_safetensors_load(tmp_path):
    model = randomize(ResNet(11, module="senet")).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(load_checkpoint(tmp_path / "weights.safetensors")(x), model(x))


def test_accuracies_that_are_numpy_numbers_do_not_bar_a_file(tmp_path):
    torch.save(
        {"state_dict": ResNet(11).state_dict(), "epoch": 9, "best_acc": np.float64(71.5)}, tmp_path / "a.pth.tar"
    )
    assert read_checkpoint(tmp_path / "a.pth.tar").epoch == 9
    torch.save({"state_dict": ResNet(11).state_dict(), "other": np.zeros(3)}, tmp_path / "b.pth.tar")
    with pytest.raises(ValueError, match="refused"):
        read_checkpoint(tmp_path / "b.pth.tar")


def test_a_description_rebuilds_what_keys_cannot_tell(tmp_path):
    model = ResNet(11, module="ge").eval()
    torch.save(
        {"state_dict": model.state_dict(), "description": {"model": {"arch": "resnet", **model.config}}},
        tmp_path / "a.pt",
    )
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert load_checkpoint(tmp_path / "a.pt").config["module"] == "ge"
    assert load_checkpoint(tmp_path / "bare.pt").config["module"] is None


def test_hub_networks_by_name():
    assert load_checkpoint("torchvision:mobilenet_v3_small")(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert load_checkpoint("timm:lcnet_050")(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match="cannot build 'timm:no_such_net'"):
        load_checkpoint("timm:no_such_net")
    with pytest.raises(ValueError, match=r"unknown ending ':pretraind'"):
        load_checkpoint("timm:lcnet_050:pretraind")


def test_weights_of_a_named_arch(tmp_path):
    model = create_model("timm:lcnet_050")
    torch.save(model.state_dict(), tmp_path / "lcnet.pt")
    assert (
        load_checkpoint(tmp_path / "lcnet.pt", arch="timm:lcnet_050").state_dict().keys() == model.state_dict().keys()
    )
    with pytest.raises(ValueError, match=r"not a CIFAR ResNet.*--arch"):
        load_checkpoint(tmp_path / "lcnet.pt")
    with pytest.raises(ValueError, match="weights do not fit"):
        load_checkpoint(tmp_path / "lcnet.pt", arch="timm:mobilenetv3_small_050")


class Bomb:
    """A pickle that runs code when it is opened."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_pickle_with_code_is_refused_and_never_run(tmp_path):
    torch.save({"state_dict": {}, "extra": Bomb(tmp_path / "touched")}, tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "touched")))
    for name in ("bomb.pt", "plain.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "touched").exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes()).close()
    assert (tmp_path / "touched").exists()  # the bomb was live


def test_bad_files_are_named_in_one_line(tmp_path):
    torch.save(ResNet(11).state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "empty.pt")
    for name in ("cut.pt", "text.pt", "cut.safetensors", "list.pt", "empty.pt"):
        with pytest.raises(ValueError, match=name) as caught:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")


def test_weights_of_the_wrong_shape_are_refused(tmp_path):
    state = ResNet(11).state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="weights do not fit"):
        load_checkpoint(tmp_path / "odd.pt")


# ---- what a network wants to see, and factories -----------------------------------------------------------


def data_of(spec, arch=None):
    return read_checkpoint(spec, arch).description["data"]


def test_the_input_is_the_networks_own(tmp_path):
    imagenet = {"size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert data_of("timm:lcnet_050") == data_of("torchvision:mobilenet_v3_small") == imagenet
    half = {"size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert data_of("timm:tf_mobilenetv3_small_075") == half
    weights = create_model("timm:tf_mobilenetv3_small_075").state_dict()
    torch.save(weights, tmp_path / "bare.pt")
    assert data_of(tmp_path / "bare.pt", "timm:tf_mobilenetv3_small_075") == half
    torch.save({"state_dict": weights, "description": {"data": {"size": 32}}}, tmp_path / "told.pt")
    assert data_of(tmp_path / "told.pt", "timm:tf_mobilenetv3_small_075") == {"size": 32}


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's own in the current directory, which leaves a mark when it is imported."""
    code = "import pathlib, torch\npathlib.Path('imported').touch()\ndef build():\n    return torch.nn.Linear(2, 3)\n"
    code += "def elsewhere():\n    import os\n    os.chdir('/')\n    return build()\n"
    (tmp_path / "networks_of_mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "networks_of_mine", raising=False)
    return tmp_path


def test_a_factory_of_the_users_own(own_module):
    path = list(sys.path)
    checkpoint = read_checkpoint("networks_of_mine:build")
    assert checkpoint.model(torch.zeros(1, 2)).shape == (1, 3)
    assert not checkpoint.model.training
    assert checkpoint.description == {"model": {"arch": "networks_of_mine:build"}, "data": {}}
    torch.save(torch.nn.Linear(2, 3).state_dict(), "weights.pt")
    loaded = load_checkpoint("weights.pt", arch="networks_of_mine:build")
    assert torch.equal(loaded.weight, torch.load("weights.pt")["weight"])
    assert sys.path == path


def test_a_factory_may_change_the_directory(own_module):
    path = list(sys.path)
    assert load_checkpoint("networks_of_mine:elsewhere")(torch.zeros(1, 2)).shape == (1, 3)
    assert sys.path == path


def test_what_a_file_says_never_imports_code(own_module):
    state = torch.nn.Linear(2, 3).state_dict()
    torch.save({"state_dict": state, "description": {"model": {"arch": "networks_of_mine:build"}}}, "hostile.pt")
    with pytest.raises(ValueError, match="unknown arch 'networks_of_mine:build'"):
        load_checkpoint("hostile.pt")
    with pytest.raises(ValueError, match="unknown arch"):
        create_model("networks_of_mine:build")
    assert not (own_module / "imported").exists()
    load_checkpoint("hostile.pt", arch="networks_of_mine:build")
    assert (own_module / "imported").exists()  # the module was live


def test_an_epoch_is_what_the_file_says_or_else_its_name(tmp_path):
    state = create_model("resnet", depth=11).state_dict()
    for name, content in (("epoch=0012.pt", {}), ("epoch=0013.pt", {"epoch": 4}), ("last.pt", {})):
        torch.save({"state_dict": state, **content}, tmp_path / name)
    found = [read_epoch(tmp_path / name) for name in ("epoch=0012.pt", "epoch=0013.pt", "last.pt")]
    assert found == [12, 4, None]
    assert read_epoch("timm:seresnet18") is None


@pytest.mark.parametrize("block", ["bottleneck", "basicblock"])
def test_asr_starts_from_the_weights_of_a_network_with_gates(block):
    torch.manual_seed(0)
    model = create_model("resnet", depth={"bottleneck": 11, "basicblock": 8}[block], block=block, module="senet")
    asr = model.to_asr()
    assert asr.config == model.config | {"asr": True}
    for own, new in zip(modules_of(model), modules_of(asr), strict=True):
        norm = getattr(new, new.last_norm)
        assert new.attention_module is None
        pairs = ((getattr(own, own.last_norm), norm.bn), (own.attention_module, norm.attention_module))
        for before, after in pairs:
            for name, tensor in before.state_dict().items():
                torch.testing.assert_close(after.state_dict()[name], tensor, rtol=0, atol=0)
                assert after.state_dict()[name].data_ptr() != tensor.data_ptr()
    shared = model.state_dict().keys() & asr.state_dict().keys()
    assert "fc.weight" in shared
    assert all(torch.equal(model.state_dict()[key], asr.state_dict()[key]) for key in shared)
    with pytest.raises(ValueError, match="module=None, asr=False: expected gates"):
        create_model("resnet", depth=11).to_asr()
    with pytest.raises(ValueError, match="asr=True: expected gates, and no ASR"):
        asr.to_asr()


def modules_of(model):
    return [module for module in model.modules() if isinstance(module, Block)]
