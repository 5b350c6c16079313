"""The networks: sizes and widths, the ViT and its options, published names, saved backbones."""

import re

import pytest
import torch
from conftest import noise

import methods.simclr
from common import (
    RESNETS,
    VITS,
    Block,
    ViT,
    backbone,
    load_backbone,
    new_backbone,
    patch_side,
    sincos_positions,
)

META = torch.device("meta")


def parameters(net):
    return sum(w.numel() for w in net.parameters())


def images(n, side, seed=0):
    return noise(n, 3, side, side, seed=seed, dtype=torch.float32)


def error_of(capsys, function, *args):
    """The one sentence with which the call ends the program with exit code 1."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


# -------- ResNets ---------------------------------------------------------------------------------

WIDTHS = {  # features, millions of parameters (He et al. 2016; SimCLR, table 6: 24, 94 and 375)
    "resnet14": (768, 1.132),
    "resnet18": (512, 11.18),
    "resnet34": (512, 21.28),
    "resnet50": (2048, 23.51),
    "resnet50x2": (4096, 94),
    "resnet50x4": (8192, 375),
}


@pytest.mark.parametrize("arch", RESNETS)
def test_resnet_widths(arch):
    width, millions = WIDTHS[arch]
    with META:
        net = backbone(arch, 224)
        h = net.eval()(torch.empty(2, 3, 224, 224))
    assert h.shape == (2, width) and net.out_dim == width
    assert parameters(net) == pytest.approx(1e6 * millions, rel=0.01)


@pytest.mark.parametrize("arch, size, places", [
    ("resnet14", 32, 2),  # stem and max-pool of stride 2, then stages of 1, 2, 2, 1
    ("resnet18", 32, 4),
    ("resnet18", 64, 8),
    ("resnet18", 96, 3),
    ("resnet50x2", 64, 8),
    ("resnet50", 224, 7),
])  # fmt: skip
def test_resnet_resolution(arch, size, places):
    """Up to 64 pixels the stem has no stride; resnet14 always has its own."""
    seen = []
    with META:
        net = backbone(arch, size)
        net.layer4.register_forward_hook(lambda *args: seen.append(args[2].shape))
        net.eval()(torch.empty(2, 3, size, size))
    assert seen[0][2:] == (places, places)


def test_first_layer_sees_the_image_and_is_saved_once():
    with META:
        for arch, name in (("resnet14", "conv1"), ("vit_micro", "patch_embed.proj")):
            net = backbone(arch, 32)
            assert net.first_layer is net.get_submodule(name) and net.first_layer.in_channels == 3
            assert not [key for key in net.state_dict() if "first_layer" in key]


def test_unknown_arch_is_refused_with_one_sentence(capsys):
    error = error_of(capsys, backbone, "resnet19", 32)
    assert "--arch resnet19: choose one of resnet14" in error and "vit_large" in error


# -------- ViT -------------------------------------------------------------------------------------


def vit(size=16, arch="vit_micro", **options):
    torch.manual_seed(0)
    return ViT(arch, size, **options)


@pytest.mark.parametrize(
    "arch, millions", [("vit_tiny", 5.5), ("vit_small", 21.7), ("vit_base", 85.8)]
)
def test_vit_has_the_published_size(arch, millions):
    """DeiT's and DINO's networks (Touvron et al. 2021, table 1), without the classifier."""
    with META:
        net = backbone(arch, 224)
    assert parameters(net) == pytest.approx(1e6 * millions, rel=0.01)
    assert net.out_dim == VITS[arch][0]


def test_vit_has_timms_names():
    """So published weights of DINO, DeiT and MAE can be loaded by name."""
    with META:
        shapes = {
            name: tuple(w.shape) for name, w in backbone("vit_small", 224).state_dict().items()
        }
    block = {
        "norm1.weight": (384,), "norm1.bias": (384,),
        "attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,),
        "attn.proj.weight": (384, 384), "attn.proj.bias": (384,),
        "norm2.weight": (384,), "norm2.bias": (384,),
        "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,),
        "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,),
    }  # fmt: skip
    expected = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 197, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "patch_embed.proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    for i in range(12):
        expected |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    assert shapes == expected


def test_block_is_pre_norm_attention_then_mlp():
    """By plain formulas, with softmax(q k^T / sqrt(d)) v for each head."""
    torch.manual_seed(0)
    block = Block(12, 3).double()
    x = noise(2, 5, 12)
    y = block.norm1(x) @ block.attn["qkv"].weight.T + block.attn["qkv"].bias
    q, k, v = y.split(12, 2)
    heads = []
    for h in range(3):
        place = slice(4 * h, 4 * h + 4)
        weights = (q[:, :, place] @ k[:, :, place].mT / 2).softmax(2)  # sqrt(4) = 2
        heads.append(weights @ v[:, :, place])
    expected = x + block.attn["proj"](torch.cat(heads, 2))
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)
    assert block.norm1.eps == block.norm2.eps == 1e-6


@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_vit_pool_and_positions(positions, pool):
    net = vit(positions=positions, pool=pool)
    x = images(2, 16)
    tokens = net.tokens(x)
    assert tokens.shape == (2, 1 + 16, 96)
    expected = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
    assert torch.equal(net(x), expected) and net.out_dim == 96
    learned = "pos_embed" in dict(net.named_parameters())
    assert learned == (positions == "learned")
    assert "pos_embed" in net.state_dict()
    # a patch's token is the convolution of the patch plus its position
    patches = net.patch_embed["proj"](x).flatten(2).mT
    torch.testing.assert_close(net.embed(x)[:, 1:], patches + net.pos_embed[:, 1:])
    torch.testing.assert_close(
        net.embed(x)[:, :1], (net.cls_token + net.pos_embed[:, :1]).expand(2, -1, -1)
    )


def test_initial_weights():
    """As in the official codes: DINO's and timm's normal of 0.02, MAE's Xavier uniform."""
    net = vit(positions="learned")
    weight = net.blocks[0].attn["qkv"].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    net = vit(positions="sincos")
    for weight in (net.blocks[0].attn["qkv"].weight, net.patch_embed["proj"].weight.flatten(1)):
        bound = (6 / sum(weight.shape)) ** 0.5
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    for name, value in net.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name


def test_sincos_positions_by_hand():
    # dim 8: frequencies 1 and 1/100 per axis; the column first, then the row
    found = sincos_positions(3, 8)
    assert found.shape == (1, 10, 8) and found.dtype == torch.float32
    assert not found[0, 0].any()  # the class token
    angle = torch.tensor([2.0, 0.02, 1.0, 0.01])  # place 1 + 3 * 1 + 2: row 1, column 2
    sin, cos = angle.sin(), angle.cos()
    expected = torch.cat([sin[:2], cos[:2], sin[2:], cos[2:]])
    torch.testing.assert_close(found[0, 6], expected)


def test_visible_patches_only():
    net = vit()
    x = images(2, 16)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(net.tokens(x, ids_keep=everything), net.tokens(x))
    ids = torch.tensor([[3, 0, 7], [15, 2, 9]])
    expected = net.embed(x)[
        torch.arange(2)[:, None], torch.cat([torch.zeros(2, 1, dtype=int), ids + 1], 1)
    ]
    torch.testing.assert_close(net.embed(x, ids_keep=ids), expected)
    # it knows nothing of the hidden patches
    hidden = x.clone()
    hidden[:, :, 4:8, 4:8] = 9.0  # patch 5 of both
    assert torch.equal(net.tokens(x, ids_keep=ids), net.tokens(hidden, ids_keep=ids))


def cubic(t, a=-0.75):
    """Keys' kernel with PyTorch's a."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def test_positions_are_resized_to_the_grid_of_the_image():
    net = vit(16)
    with torch.no_grad():
        net.patch_embed["proj"].weight.zero_()
        net.patch_embed["proj"].bias.zero_()
        net.pos_embed[0, 1:] = torch.arange(16)[:, None] % 4 + torch.zeros(96)  # the column
        found = net.embed(images(1, 24))[0, 1:, 0].view(6, 6)
    assert (found - found[:1]).abs().max() < 1e-6  # the same in every row
    # columns 2 and 3 of 6 lie at (c + 1/2) 4 / 6 - 1/2 of the 4; none of their taps is outside
    for column in (2, 3):
        place = (column + 0.5) * 4 / 6 - 0.5
        expected = sum(k * cubic(place - k) for k in range(4))
        assert found[0, column].item() == pytest.approx(expected, abs=1e-5)
    wide = net.embed(noise(1, 3, 8, 16, dtype=torch.float32))  # not square
    assert wide.shape == (1, 1 + 2 * 4, 96)


@pytest.mark.parametrize(
    "size, side", [(4, 4), (32, 4), (48, 4), (56, 8), (96, 8), (112, 16), (224, 16)]
)
def test_patch_side(size, side):
    assert patch_side(size) == side


@pytest.mark.parametrize("size, side", [(2, 4), (30, 4), (60, 8), (225, 16)])
def test_size_that_no_patches_fill_is_refused(size, side, capsys):
    error = error_of(capsys, backbone, "vit_micro", size)
    assert f"--size {size}: choose a multiple of {side}, the side of a patch" in error


def test_drop_path():
    """A branch is left out, or enlarged so that its expectation stays the same."""
    net = vit(drop_path=0.4)
    drops = [block.drop for block in net.blocks]
    assert drops == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4])
    x = images(3, 16)
    assert torch.equal(net.tokens(x), vit().tokens(x))  # without numbers nothing is dropped
    assert torch.equal(net(x), vit()(x))  # so not in evaluation
    assert torch.equal(vit().tokens(x, u=torch.zeros(3, 4, 2)), vit().tokens(x))  # drop 0: never

    block = Block(12, 3, drop=0.25).double()
    t = noise(8, 5, 12)
    u = torch.tensor([[0.1, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.9]]).repeat(2, 1)
    attention = Block.forward(block, t) - t  # both branches; taken apart below
    both_off = block(t, u)[[0, 4]]
    assert torch.equal(both_off, t[[0, 4]])
    only_mlp = t + block.mlp(block.norm2(t)) / 0.75
    torch.testing.assert_close(block(t, u)[[1, 5]], only_mlp[[1, 5]])
    q, k, v = block.qkv(t)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    branch = block.attn["proj"](y)
    torch.testing.assert_close(block(t, u)[[2, 6]], (t + branch / 0.75)[[2, 6]])
    assert attention.abs().max() > 0.01

    # expectation of one branch: of 4,000 draws, within five standard deviations
    numbers = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    y = block.kept(torch.ones(4000, 1, 1), numbers, 0)
    assert sorted(y.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert abs(y.mean().item() - 1) < 5 * (0.25 / 0.75 / 4000) ** 0.5


def test_attention():
    """By the plain formula; what is missing to 1 goes to the class token."""
    net = vit().eval()
    x = images(2, 16)
    found = net.attention(x)
    assert found.shape == (2, 3, 4, 4) and not found.requires_grad
    total = found.sum((2, 3))
    assert (found > 0).all() and (total < 1).all() and (total > 0.5).all()
    tokens = net.embed(x)
    for block in net.blocks[:-1]:
        tokens = block(tokens)
    q, k, _ = net.blocks[-1].qkv(tokens)
    weights = (q @ k.mT / 32**0.5).softmax(3)[:, :, 0, 1:]
    torch.testing.assert_close(found, weights.view(2, 3, 4, 4).detach())
    assert net.attention(images(1, 24)).shape == (1, 3, 6, 6)


# -------- Saved backbones -------------------------------------------------------------------------


def save(folder, net, **facts):
    folder.mkdir(exist_ok=True)
    saved = {"method": "simclr", "arch": "resnet14", "size": 16, "data": "emoji", **facts}
    torch.save({**saved, "weights": net.state_dict()}, folder / "backbone.pt")


@pytest.mark.parametrize("arch", ["resnet14", "vit_micro"])
def test_load_backbone(tmp_path, arch):
    net = backbone(arch, 16)
    net(images(8, 16))  # so that batch-norm has met something
    save(tmp_path / "run", net, arch=arch)
    for path in (tmp_path / "run", str(tmp_path / "run" / "backbone.pt")):
        found = load_backbone(path)
        assert (found.method, found.arch, found.size, found.data) == ("simclr", arch, 16, "emoji")
        assert not found.training and not any(w.requires_grad for w in found.parameters())
        assert torch.equal(found(images(2, 16, 1)), net.eval()(images(2, 16, 1)))


def test_a_method_may_make_its_own_backbone(tmp_path, monkeypatch):
    def own(arch, size):
        return backbone(arch, size, pool="mean")

    monkeypatch.setattr(methods.simclr, "backbone", own)
    assert new_backbone("simclr", "vit_micro", 16).pool == "mean"
    net = own("vit_micro", 16)
    save(tmp_path / "run", net, arch="vit_micro")
    x = images(2, 16)
    assert torch.equal(load_backbone(tmp_path / "run")(x), net(x))


WRONG = ["text", "empty", "cut", "tensor", "checkpoint", "arch", "method", "size", "no data"]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # a tensor by name
@pytest.mark.parametrize("spoil", WRONG)
def test_what_is_no_backbone_is_refused_with_one_sentence(tmp_path, capsys, spoil):
    save(tmp_path, backbone("vit_micro", 16), arch="vit_micro")
    path = tmp_path / "backbone.pt"
    whole = path.read_bytes()
    saved = torch.load(path)
    if spoil in ("text", "empty", "cut"):
        path.write_bytes({"text": b"no weights", "empty": b"", "cut": whole[:1000]}[spoil])
    else:
        others = {
            "tensor": torch.zeros(3),
            "checkpoint": {"state": {}, "step": 3},
            "arch": {**saved, "arch": "resnet14"},
            "method": {**saved, "method": "nosuch"},
            "size": {**saved, "size": 32},  # other positions
            "no data": {name: part for name, part in saved.items() if name != "data"},
        }
        torch.save(others[spoil], path)
    error = error_of(capsys, load_backbone, path)
    assert re.match(r"error: \S+backbone.pt is not the backbone.pt of a run \(\w+\), or is", error)


def test_missing_backbone_is_refused_with_one_sentence(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "no" / "backbone.pt"):
        error = error_of(capsys, load_backbone, path)
        assert "backbone.pt: no such file; every finished run has one" in error
