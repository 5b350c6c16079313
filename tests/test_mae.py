"""MAE: loss, patches, positions and masks against values computed by hand or by the official formulas; what the encoder may
see; the block against torch's own; the training loop against a plain one, for any number of processes."""

import contextlib
import math
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import BatchRandom, Data, Loader, Split
from kernels.mae_mask import gather_tokens, restore_tokens
from methods import mae

CPU = torch.device("cpu")
BATCH, SIZE, P = 12, 16, 4  # 4 x 4 patches, of which 4 are visible
ARGUMENTS = ["--arch", "tiny", "--batch", BATCH, "--size", SIZE, "--epochs", 1, "--warmup", 0, "--lr", 0.02]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(mae.ARCHS, "tiny", (32, 2, 2))


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def arguments(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["mae.py", *map(str, flags)])
    return mae.get_args()


def masks(kind, ratio=0.75, n=BATCH, size=SIZE, seed=0, rows=slice(None)):
    args = SimpleNamespace(mask=kind, mask_ratio=ratio, size=size)
    return mae.draw_masks(args, BatchRandom([seed], n, rows), CPU)


def network(seed=0):
    torch.manual_seed(seed)
    return mae.MAE("tiny", SIZE, decoder_dim=32, decoder_depth=1)


# -------- Patches and loss ------------------------------------------------------------------------------------------------

def test_patches_are_in_the_official_order():
    x = noise(2, 3, 6, 4)
    t = mae.patchify(x, 2)
    assert t.shape == (2, 6, 12)
    for i, j, row, column, colour in np.ndindex(3, 2, 2, 2, 3):  # patch (i, j); row, column and colour in it
        assert torch.equal(t[:, 2 * i + j, 6 * row + 3 * column + colour], x[:, colour, 2 * i + row, 2 * j + column])
    x = noise(2, 3, 12, 12)
    assert torch.equal(mae.unpatchify(mae.patchify(x, 4), 4), x)


def test_loss_by_hand():
    # Patches of one pixel. 1, 2, 3 have mean 2 and unbiased variance 1: normalised -1, 0, 1 (divided by sqrt(1 + 1e-6)).
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [9.0, 0.0, 0.0], [7.0, 8.0, 9.0]]).T.view(1, 3, 2, 2)
    pred = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 3.0], [1e3, 1e3, 1e3], [1e3, 1e3, 1e3]]])
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    expected = (2 / 3 + 3) / 2  # means over colours: (1 + 0 + 1) / 3, (0 + 0 + 9) / 3
    assert mae.mae_loss(pred, x, mask, 1).item() == pytest.approx(expected, rel=1e-6)
    expected = (14 / 3 + (25 + 25 + 4) / 3) / 2
    assert mae.mae_loss(pred, x, mask, 1, normalize=False).item() == pytest.approx(expected, rel=1e-6)


def test_loss_of_predicting_zero():
    mask = torch.ones(2, 4)
    zero, textured = torch.zeros(2, 4, 768), noise(2, 3, 32, 32)  # four patches of 16 x 16
    assert mae.mae_loss(zero, textured, mask, 16).item() == pytest.approx(767 / 768, rel=1e-5)  # from the unbiased variance
    assert mae.mae_loss(zero, torch.full_like(textured, 0.25), mask, 16).item() == 0


@pytest.mark.parametrize("loss", ["mae_loss", "masked_patch_mse"])
def test_visible_patches_do_not_matter(loss):
    loss, x, (_, _, mask) = getattr(mae, loss), noise(BATCH, 3, SIZE, SIZE), masks("random")
    pred = noise(BATCH, 16, 48, seed=1).requires_grad_()
    visible = (1 - mask)[:, :, None]
    before = loss(pred, x, mask, P)
    assert torch.equal(loss(pred + 100 * visible, x, mask, P), before)
    changed = mae.unpatchify(mae.patchify(x, P) + noise(BATCH, 16, 48, seed=2) * visible, P)
    assert torch.equal(loss(pred, changed, mask, P), before)
    before.backward()
    t = mae.patchify(x, P)
    t = (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(pred.grad, 2 * (pred - t).detach() * mask[:, :, None] / (48 * mask.sum()))
    assert (pred.grad * visible == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_fused_loss_equals_the_formula(normalize):
    x, (_, _, mask) = noise(BATCH, 3, SIZE, SIZE), masks("block")
    fused = noise(BATCH, 16, 48, seed=1).requires_grad_()
    plain = fused.detach().double().requires_grad_()
    expected = mae.mae_loss(plain, x.double(), mask, P, normalize)
    found = mae.masked_patch_mse(fused, x, mask, P, normalize)
    (3 * expected).backward()
    (3 * found).backward()
    # Float32: numbers of size 1 to 4 with a relative rounding of 6e-8, a few operations each.
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(fused.grad.double(), plain.grad, rtol=1e-5, atol=1e-8)


# -------- Masks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, ratio", [("random", 0.75), ("random", 0.5), ("random", 0.9), ("block", 0.5), ("block", 0.75),
                                         ("grid", 0.75)])
@pytest.mark.parametrize("size, grid", [(32, 8), (224, 14)])
def test_every_image_hides_exactly_its_share(kind, ratio, size, grid):
    ids_keep, ids_restore, mask = masks(kind, ratio, 100, size)
    L, keep = grid**2, {(8, 0.75): 16, (8, 0.5): 32, (8, 0.9): 6, (14, 0.75): 49, (14, 0.5): 98, (14, 0.9): 19}[grid, ratio]
    assert ids_keep.shape == (100, keep) and (mask.sum(1) == L - keep).all() and set(mask.unique().tolist()) == {0, 1}
    for kept, hidden, restore in zip(ids_keep, mask, ids_restore):  # 0 keep, 1 remove, as in the official code
        assert kept.sort().values.tolist() == (hidden == 0).nonzero()[:, 0].tolist()
        assert torch.equal(restore[kept], torch.arange(keep)) and restore.sort().values.tolist() == list(range(L))


def test_random_masks_prefer_no_patch():
    _, _, mask = masks("random", n=20000)
    # Each patch is hidden in 3/4 of 20,000 images: the standard deviation of that share is 0.0031; 16 patches, 5 deviations.
    torch.testing.assert_close(mask.mean(0), torch.full((16,), 0.75), rtol=0, atol=0.0155)
    # Two patches are hidden together with probability 12/16 11/15 = 0.55.
    assert (mask[:, 0] * mask[:, 15]).mean().item() == pytest.approx(0.55, abs=0.018)


def blocks_one_by_one(u, grid, hide):
    """BEiT's blocks of one image, from uniform numbers (tries, 4), as nested loops; the official code's rule for each try."""
    hidden, least = np.zeros((grid, grid), bool), 16 / 196 * grid**2
    for area, aspect, top, left in u.tolist():
        missing = hide - hidden.sum()
        area = least + area * (missing - least)
        aspect = math.exp(math.log(0.3) + aspect * (math.log(1 / 0.3) - math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < grid and w < grid:
            top, left = int(top * (grid - h + 1)), int(left * (grid - w + 1))
            new = h * w - hidden[top:top + h, left:left + w].sum()
            if 0 < new <= missing:
                hidden[top:top + h, left:left + w] = True
    return hidden.flatten()


@pytest.mark.parametrize("grid, hide", [(8, 48), (14, 147), (14, 98)])
def test_blocks_are_those_of_beit(grid, hide):
    u = BatchRandom([0], 60).uniform(columns=(40, 4))
    found = mae.block_masks(u, grid, hide)
    for row, numbers in zip(found, u):
        assert row.tolist() == blocks_one_by_one(numbers, grid, hide).tolist()
    assert (found.sum(1) <= hide).all()
    # Nearly everything is hidden in blocks, not one by one: of 60 images at most a few miss a few patches after 40 tries.
    assert found.sum() > 0.99 * 60 * hide


def neighbours_alike(mask, grid):
    x = mask.view(-1, grid, grid)
    return ((x[:, 1:] == x[:, :-1]).float().mean() + (x[:, :, 1:] == x[:, :, :-1]).float().mean()).item() / 2


def test_block_masks_hide_in_blocks():
    random, block = (neighbours_alike(masks(kind, n=500, size=224)[2], 14) for kind in ("random", "block"))
    assert random == pytest.approx(0.625, abs=0.01) and block > 0.75  # of independent patches 3/4^2 + 1/4^2 are alike


def test_grid_masks_by_hand():
    _, _, mask = masks("grid", n=40, size=32)
    corners = set()
    for x in mask.view(-1, 8, 8):
        visible = (x == 0).nonzero()
        corner = tuple(visible[0].tolist())
        assert visible.tolist() == [[i, j] for i in range(corner[0], 8, 2) for j in range(corner[1], 8, 2)]
        corners.add(corner)
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
def test_masks_belong_to_the_image_not_to_the_process(kind):
    whole = masks(kind)
    for first in range(0, BATCH, 4):
        for found, expected in zip(masks(kind, rows=slice(first, first + 4)), whole):
            assert torch.equal(found, expected[first:first + 4])
    assert not torch.equal(whole[2], masks(kind, seed=1)[2])


# -------- Encoder and decoder ---------------------------------------------------------------------------------------------

def test_positions_by_hand():
    sines = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]  # position 1, frequencies 1 and 10000^(-1/2)
    zero = [0, 0, 1, 1]
    expected = [[0] * 8, zero + zero, sines + zero, zero + sines, sines + sines]  # column, then row; patches in reading order
    torch.testing.assert_close(mae.sincos_positions(2, 8), torch.tensor([expected], dtype=torch.float32))


def test_block_is_a_pre_norm_transformer_layer():
    block, x = mae.Block(32, 4).double(), noise(3, 7, 32, dtype=torch.float64)
    layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True, dtype=torch.float64)
    for i, w in enumerate(block.parameters()):
        nn.init.normal_(w, std=0.3, generator=torch.Generator().manual_seed(i))
    ours = block.state_dict()
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
             "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
    layer.load_state_dict({theirs + kind: ours[name + kind] for theirs, name in names.items() for kind in ("weight", "bias")})
    torch.testing.assert_close(block(x), layer(x))


def test_encoder_knows_only_the_visible_patches():
    model, x, (ids_keep, _, mask) = network(), noise(BATCH, 3, SIZE, SIZE), masks("random")
    h = model.backbone.tokens(x, ids_keep)
    assert h.shape == (BATCH, 1 + 4, 32)

    def with_changed(patches):
        return mae.unpatchify(mae.patchify(x, P) + noise(BATCH, 16, 48, seed=1) * patches[:, :, None], P)
    assert torch.equal(model.backbone.tokens(with_changed(mask), ids_keep), h)
    assert (model.backbone.tokens(with_changed(1 - mask), ids_keep) != h).any(2).all()


def test_features_are_the_mean_of_all_patch_tokens():
    model, x = network().double(), noise(2, 3, SIZE, SIZE, dtype=torch.float64)
    tokens = model.backbone.tokens(x)
    torch.testing.assert_close(model.backbone(x), tokens[:, 1:].mean(1))
    assert tokens.shape == (2, 17, 32) and model.backbone.out_dim == 32
    # All patches in any order are all patches: positions go with them.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = model.backbone.tokens(x, order.expand(2, -1))
    torch.testing.assert_close(shuffled[:, 1:], tokens[:, 1:][:, order])
    torch.testing.assert_close(shuffled[:, 0], tokens[:, 0])


def official(model, x, noise):
    """forward of the official code, step by step: every token is embedded, sorted, dropped, and put back by gather."""
    L, keep = noise.shape[1], int(noise.shape[1] * 0.25)
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)
    encoder, w = model.backbone, model.backbone.patch_embed["proj"]
    t = F.linear(mae.patchify(x, P), w.weight.permute(0, 2, 3, 1).flatten(1), w.bias) + encoder.pos_embed[:, 1:]
    t = t.gather(1, ids_shuffle[:, :keep, None].repeat(1, 1, t.shape[2]))
    t = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).repeat(len(x), 1, 1), t], 1)
    for block in encoder.blocks:
        t = block(t)
    y = model.decoder_embed(encoder.norm(t))
    patches = torch.cat([y[:, 1:], model.mask_token.repeat(len(x), L - keep, 1)], 1)
    patches = patches.gather(1, ids_restore[:, :, None].repeat(1, 1, y.shape[2]))
    y = torch.cat([y[:, :1], patches], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        y = block(y)
    mask = torch.ones(noise.shape, dtype=x.dtype)
    mask[:, :keep] = 0
    return model.decoder_pred(model.decoder_norm(y))[:, 1:], mask.gather(1, ids_restore)


def test_forward_is_the_official_one_and_gradient_reaches_every_parameter():
    model, x = network().double(), noise(BATCH, 3, SIZE, SIZE, dtype=torch.float64)
    ids_keep, ids_restore, mask = masks("random")
    pred = model(x, ids_keep, ids_restore)
    expected, expected_mask = official(model, x, BatchRandom([0], BATCH).uniform(columns=(16,)))
    torch.testing.assert_close(pred, expected)
    assert torch.equal(mask.double(), expected_mask)
    mae.mae_loss(pred, x, mask, P).backward()
    gradients = {name: w.grad.clone() for name, w in model.named_parameters()}
    model.zero_grad()
    mae.mae_loss(expected, x, expected_mask, P).backward()
    for name, w in model.named_parameters():
        torch.testing.assert_close(gradients[name], w.grad)
        # The bias of the keys is the one thing that cannot matter: it adds the same to all logits of a query.
        assert w.grad.isfinite().all() and w.grad.abs().max() > 1e-6, name
    assert {name for name, _ in model.named_buffers()} == {"backbone.pos_embed", "decoder_pos_embed"}


def test_initial_weights():
    model = mae.MAE("vit_tiny", 32, 64, 1)
    for name, w in model.named_parameters():
        if name.endswith("bias"):
            assert (w == 0).all(), name
        elif "norm" in name:
            assert (w == 1).all(), name
        elif name.endswith("token"):  # 64 or 192 normal numbers: the deviation is known to 9 % (one sigma)
            assert w.std().item() == pytest.approx(0.02, rel=0.3), name
        else:  # Xavier: uniform, here bounded by sqrt(6 / (inputs + outputs))
            bound = math.sqrt(6 / sum(w.flatten(1).shape))
            assert 0.98 * bound < w.abs().max() <= bound and w.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


@pytest.mark.parametrize("size, p", [(28, 4), (32, 4), (48, 4), (64, 8), (96, 8), (112, 16), (224, 16)])
def test_side_of_a_patch(size, p):
    assert mae.patch_side(size) == p and mae.backbone("tiny", size).pos_embed.shape == (1, 1 + (size // p)**2, 32)


def test_overfits_one_batch():
    model, x = network(), noise(4, 3, SIZE, SIZE)
    ids_keep, ids_restore, mask = masks("random", n=4)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95)), []
    for _ in range(200):
        losses.append(mae.masked_patch_mse(model(x, ids_keep, ids_restore), x, mask, P))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    # Independent pixels cannot be guessed, at best 47/48 without learning them by heart; the network can, 48 patches.
    assert losses[0] > 0.95 and losses[-1] < 0.1


# -------- Program ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (("--mask-ratio", 0), "leaves 64 of 8 x 8"), (("--mask-ratio", 0.99), "leaves 0 of 8 x 8"),
    (("--mask", "grid", "--mask-ratio", 0.5), "--mask grid --mask-ratio 0.5"), (("--mask", "grid", "--size", 28), "of 7 x 7"),
    (("--decoder-dim", 48), "--decoder-dim 48"), (("--size", 30), "multiple of 4"), (("--size", 100), "multiple of 16")])
def test_impossible_flags_are_refused(monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments(monkeypatch, *flags)
    assert error.value.code == 1 and words in capsys.readouterr().err


def test_bad_networks_and_images_are_refused(capsys):
    with pytest.raises(SystemExit):
        mae.backbone("resnet14", 32)
    assert "--arch resnet14: choose vit_mini, vit_tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mae.backbone("tiny", 16)(torch.zeros(1, 3, 32, 16))
    assert "16 x 16 pixels, not (32, 16): see --size" in capsys.readouterr().err


def test_views_crop_and_flip_alone(monkeypatch):
    (crop, augment), = mae.views(SimpleNamespace(size=32))
    assert crop == (32, (0.2, 1.0), (3 / 4, 4 / 3))
    x, flipped = torch.rand(64, 3, 8, 8), torch.rand(64, 3, 8, 8)
    monkeypatch.setattr(mae, "random_flip", lambda x, rand: flipped)
    assert torch.equal(augment(x, None), mae.normalize(flipped))


def tiny_data(count=3 * BATCH):
    images = np.random.default_rng(0).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)  # three steps
    split = Split(torch.from_numpy(images))
    return Data("tiny", split, split, None)


@pytest.mark.parametrize("raw", [False, True])
def test_reconstructions(monkeypatch, tmp_path, raw):
    """Of a decoder that knows the answer the reconstruction is the image; visible patches are shown as they are."""
    def knows(x, ids_keep, ids_restore):
        t = mae.patchify(x, P)
        if not raw:
            t = (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True) + 1e-6).sqrt()
        return t + 1e6 * (ids_restore < 4)[:, :, None]  # nonsense in visible patches
    args = SimpleNamespace(size=SIZE, mask="random", mask_ratio=0.75, raw_pixels=raw, seed=0)
    saved = []
    monkeypatch.setattr(mae, "save_grid", lambda file, rows: saved.append((file, rows)))
    mae.draw_reconstructions(tmp_path / "r.png", SimpleNamespace(model=knows, data=tiny_data(10), args=args, device=CPU))
    (file, rows), = saved
    assert file == tmp_path / "r.png" and [len(row) for row in rows] == [12, 12, 6]  # ten images of three pictures
    originals = {tuple(image.flatten().tolist()) for image in tiny_data(10).bank.images}
    for row in rows:
        for seen, reconstructed, image in zip(row[::3], row[1::3], row[2::3]):
            assert tuple((255 * image).round().to(torch.uint8).flatten().tolist()) in originals
            torch.testing.assert_close(reconstructed, image, rtol=0, atol=1e-5)
            seen, image = mae.patchify(seen[None], P)[0], mae.patchify(image[None], P)[0]
            visible = torch.isclose(seen, image, rtol=0, atol=1e-6).all(1)
            assert visible.sum() == 4
            grey = torch.tensor(mae.MEAN).repeat(16)
            torch.testing.assert_close(seen[~visible], grey.expand(12, -1))


# -------- The training loop -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def double_precision():
    """MAE makes float64 networks: in float32, Adam would enlarge the gradient of the keys' biases, which is 0 but for rounding,
    to steps of any size. The loop still hands the loss float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mae.ARCHS, "tiny", (32, 2, 2))
        network, normalize = mae.MAE, mae.normalize
        patch.setattr(mae, "MAE", lambda *options: network(*options).double())
        patch.setattr(mae, "normalize", lambda x: normalize(x).double())
        yield patch


def train(kind):
    """The losses of this process, the model's state and the optimiser's groups after main() on tiny data; nothing is evaluated
    or written."""
    def record(name, args, data, loader, model, state):
        assert name == "mae" and list(state) == ["optimizer"]
        run.model, run.optimizer = model, state["optimizer"]
        return run

    run = SimpleNamespace(step=0, losses=[], folder=mae.Path("nowhere"), end_epoch=lambda epoch: None, finish=lambda: None)
    run.log = lambda loss, lr: run.losses.append(loss.detach())
    with double_precision() as patch:
        patch.setattr(sys, "argv", ["mae.py", "--mask", kind, *map(str, ARGUMENTS)])
        patch.setattr(mae, "load_data", lambda name, root, device: tiny_data())
        patch.setattr(mae, "Run", record)
        patch.setattr(mae, "draw_reconstructions", lambda *args: None)
        mae.main()
    names = {id(w): name for name, w in run.model.named_parameters()}
    groups = [(group["weight_decay"], group["betas"], sorted(names[id(w)] for w in group["params"]))
              for group in run.optimizer.param_groups]
    return torch.stack(run.losses), run.model.state_dict(), groups


def plain_training(kind):
    """The same by one process from the plain pieces: the official forward, the formula of the loss, AdamW by names."""
    with double_precision() as patch:
        args = arguments(patch, "--mask", kind, *ARGUMENTS)
        torch.manual_seed(args.seed)
        model = mae.MAE("tiny", SIZE, args.decoder_dim, args.decoder_depth)
        plain = {name: name.endswith("bias") or "norm" in name for name, _ in model.named_parameters()}
        groups = [{"params": [w for name, w in model.named_parameters() if plain[name] == undecayed],
                   "weight_decay": 0 if undecayed else 0.05} for undecayed in (False, True)]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        loader, losses = Loader(tiny_data().train, mae.views(args), BATCH, args.seed, CPU), []
        for step, (x,) in loader(0):
            place = mae.draw_masks(args, loader.random(0, step, 0, 4), CPU)[1]  # in the random order of an image's patches
            pred, mask = official(model, x, place.double())
            losses.append(mae.mae_loss(pred, x, mask, P))
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * BATCH / 256 * 0.5 * (1 + math.cos(math.pi * step / 3))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        return torch.stack(losses).detach(), dict(model.named_parameters()), [
            sorted(name for name in plain if plain[name] == undecayed) for undecayed in (False, True)]


@pytest.mark.parametrize("kind", ["random", "block"])
def test_training_is_the_same_on_any_number_of_processes(processes, kind):
    losses, weights, names = plain_training(kind)
    for count in (1, 2, 3):
        results = processes(count, train, kind)
        # The loop's loss is float32.
        torch.testing.assert_close(torch.stack([found for found, *_ in results]).mean(0).double(), losses, rtol=1e-5, atol=0)
        for _, state, groups in results:
            assert groups == [(0.05, (0.9, 0.95), names[0]), (0.0, (0.9, 0.95), names[1])]
            for name, value in state.items():  # the processes agree to the last bit
                assert torch.equal(value, results[0][1][name]), name
        for name, w in weights.items():
            # Three steps of Adam move every weight by about 0.001. Its first steps are g / |g|: where the gradient is so small
            # that float32's rounding of the loss matters, they may differ; a wrong mask or image moves weights by 0.001.
            torch.testing.assert_close(results[0][1][name], w.detach(), rtol=0, atol=2e-5, msg=name)


# -------- Oracles ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("normalize", [True, False])
def test_lightly_agrees(normalize):
    """lightly's utilities, put together as in its MAE example, by value and by gradient."""
    utils = pytest.importorskip("lightly.models.utils", exc_type=ImportError)
    x, h = noise(BATCH, 3, SIZE, SIZE, dtype=torch.float64), noise(BATCH, 5, 32, seed=1, dtype=torch.float64).requires_grad_()
    token, head = (noise(*shape, seed=2, dtype=torch.float64).requires_grad_() for shape in ((1, 1, 32), (32, 48)))
    pos = torch.from_numpy(utils.get_2d_sine_cosine_positional_embedding(32, 4, cls_token=True))[None]
    torch.testing.assert_close(mae.sincos_positions(4, 32).double(), pos, rtol=0, atol=1e-6)  # float32
    torch.manual_seed(0)
    idx_keep, idx_mask = utils.random_token_mask((BATCH, 17), mask_ratio=0.75)  # token 0 is the class token, always kept
    assert idx_keep.shape == (BATCH, 5) and (idx_keep[:, 0] == 0).all()
    ids_keep = idx_keep[:, 1:] - 1
    order = torch.cat([ids_keep, idx_mask - 1], 1)
    mask = torch.ones(BATCH, 16).scatter_(1, ids_keep, 0)

    decoder = utils.set_at_index(utils.repeat_token(token, (BATCH, 17)), idx_keep, h) + pos
    target = utils.get_at_index(utils.patchify(x, P), idx_mask - 1)
    target = utils.normalize_mean_var(target) if normalize else target
    expected = F.mse_loss(utils.get_at_index(decoder @ head, idx_mask), target)
    gradients = torch.autograd.grad(expected, (h, token, head))

    ours = restore_tokens(h[:, 1:], order.argsort(1), token.flatten(), pos[0, 1:])
    torch.testing.assert_close(ours, decoder[:, 1:])
    found = mae.mae_loss(ours @ head, x, mask, P, normalize)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, (h, token, head)), gradients):
        torch.testing.assert_close(a, b)
    tokens = noise(BATCH, 16, 8, seed=3)
    assert torch.equal(gather_tokens(tokens, ids_keep), utils.get_at_index(tokens, ids_keep))
    assert torch.equal(mae.patchify(x, P), utils.patchify(x, P)) and torch.equal(utils.unpatchify(utils.patchify(x, P), P), x)


def test_timm_agrees():
    """timm's ViT takes the weights by name and gives the same tokens; so the published weights, which are timm's, fit too."""
    timm = pytest.importorskip("timm.models.vision_transformer", exc_type=ImportError)
    ours = network().backbone.double()
    theirs = timm.VisionTransformer(SIZE, P, embed_dim=32, depth=2, num_heads=2, num_classes=0,
                                    norm_layer=partial(nn.LayerNorm, eps=1e-6)).double()
    theirs.load_state_dict(ours.state_dict())
    x = noise(2, 3, SIZE, SIZE, dtype=torch.float64)
    torch.testing.assert_close(ours.tokens(x), theirs.forward_features(x))
