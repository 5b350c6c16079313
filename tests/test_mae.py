"""MAE: loss, patches and masks against values computed by hand or by the official formulas; what
the encoder may see; the training loop against a plain one."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, arguments, double_precision, noise, tiny_data
from torch import nn

import common
from common import Data, InMemory, Loader, Split, sincos_positions
from kernels.mae_mask import gather_tokens, restore_tokens
from kernels.views import MEAN, STD, BatchRandom
from methods import mae

BATCH, SIZE, P = 12, 16, 4  # 4 x 4 patches, of which 4 are visible


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(common.VITS, "tiny", (32, 2, 2))


def images(n=BATCH, seed=0, dtype=torch.float32):
    return noise(n, 3, SIZE, SIZE, seed=seed, dtype=dtype)


def masks(kind, ratio=0.75, n=BATCH, size=SIZE, seed=0, rows=slice(None)):
    args = SimpleNamespace(mask=kind, mask_ratio=ratio, size=size)
    return mae.draw_masks(args, BatchRandom([seed], n, rows), CPU)


def network():
    torch.manual_seed(0)
    return mae.MAE("tiny", SIZE, decoder_dim=32, decoder_depth=1)


# -------- Patches and loss ------------------------------------------------------------------------


def test_patches_are_in_the_official_order():
    x = noise(2, 3, 6, 4)
    t = mae.patchify(x, 2)
    assert t.shape == (2, 6, 12)
    for i, j, row, column, colour in np.ndindex(3, 2, 2, 2, 3):  # patch (i, j); row, column in it
        place = 6 * row + 3 * column + colour
        pixel = x[:, colour, 2 * i + row, 2 * j + column]
        assert torch.equal(t[:, 2 * i + j, place], pixel)
    x = noise(2, 3, 12, 12)
    assert torch.equal(mae.unpatchify(mae.patchify(x, 4), 4), x)


def test_loss_by_hand():
    # Patches of one pixel. 1, 2, 3 have mean 2 and unbiased variance 1: normalised -1, 0, 1
    # (divided by sqrt(1 + 1e-6)).
    pixels = [[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [9.0, 0.0, 0.0], [7.0, 8.0, 9.0]]
    x = torch.tensor(pixels).T.view(1, 3, 2, 2)
    pred = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 3.0], [1e3, 1e3, 1e3], [1e3, 1e3, 1e3]]])
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    expected = (2 / 3 + 3) / 2  # means over colours: (1 + 0 + 1) / 3, (0 + 0 + 9) / 3
    assert mae.mae_loss(pred, x, mask, 1).item() == pytest.approx(expected, rel=1e-6)
    expected = (14 / 3 + (25 + 25 + 4) / 3) / 2
    found = mae.mae_loss(pred, x, mask, 1, normalize=False)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_loss_of_predicting_zero():
    mask = torch.ones(2, 4)
    zero = torch.zeros(2, 4, 768)
    textured = noise(2, 3, 32, 32, dtype=torch.float32)  # four patches of 16 x 16
    found = mae.mae_loss(zero, textured, mask, 16).item()
    assert found == pytest.approx(767 / 768, rel=1e-5)  # from the unbiased variance
    assert mae.mae_loss(zero, torch.full_like(textured, 0.25), mask, 16).item() == 0


@pytest.mark.parametrize("loss", ["mae_loss", "masked_patch_mse"])
def test_visible_patches_do_not_matter(loss):
    loss = getattr(mae, loss)
    x = images()
    _, _, mask = masks("random")
    pred = noise(BATCH, 16, 48, seed=1, dtype=torch.float32).requires_grad_()
    visible = (1 - mask)[:, :, None]
    before = loss(pred, x, mask, P)
    assert torch.equal(loss(pred + 100 * visible, x, mask, P), before)
    other = mae.patchify(x, P) + noise(BATCH, 16, 48, seed=2, dtype=torch.float32) * visible
    assert torch.equal(loss(pred, mae.unpatchify(other, P), mask, P), before)

    before.backward()
    t = mae.patchify(x, P)
    t = (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True) + 1e-6).sqrt()
    expected = 2 * (pred - t).detach() * mask[:, :, None] / (48 * mask.sum())
    torch.testing.assert_close(pred.grad, expected)
    assert (pred.grad * visible == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_fused_loss_equals_the_formula(normalize):
    x = images()
    _, _, mask = masks("block")
    fused = noise(BATCH, 16, 48, seed=1, dtype=torch.float32).requires_grad_()
    plain = fused.detach().double().requires_grad_()
    expected = mae.mae_loss(plain, x.double(), mask, P, normalize)
    found = mae.masked_patch_mse(fused, x, mask, P, normalize)
    (3 * expected).backward()
    (3 * found).backward()
    # Float32: numbers of size 1 to 4 with a relative rounding of 6e-8, a few operations each.
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(fused.grad.double(), plain.grad, rtol=1e-5, atol=1e-8)


# -------- Masks -----------------------------------------------------------------------------------

KINDS = [("random", 0.75), ("random", 0.5), ("random", 0.9)]
KINDS += [("block", 0.5), ("block", 0.75), ("grid", 0.75)]
KEPT = {(8, 0.75): 16, (8, 0.5): 32, (8, 0.9): 6, (14, 0.75): 49, (14, 0.5): 98, (14, 0.9): 19}


@pytest.mark.parametrize("kind, ratio", KINDS)
@pytest.mark.parametrize("size, grid", [(32, 8), (224, 14)])
def test_every_image_hides_exactly_its_share(kind, ratio, size, grid):
    ids_keep, ids_restore, mask = masks(kind, ratio, 100, size)
    L = grid**2
    keep = KEPT[grid, ratio]
    assert ids_keep.shape == (100, keep) and (mask.sum(1) == L - keep).all()
    assert set(mask.unique().tolist()) == {0, 1}
    # 0 keep, 1 remove, as in the official code
    for kept, hidden, restore in zip(ids_keep, mask, ids_restore):
        assert kept.sort().values.tolist() == (hidden == 0).nonzero()[:, 0].tolist()
        assert torch.equal(restore[kept], torch.arange(keep))
        assert restore.sort().values.tolist() == list(range(L))


def test_random_masks_prefer_no_patch():
    _, _, mask = masks("random", n=20000)
    # Each patch is hidden in 3/4 of 20,000 images: the standard deviation of that share is 0.0031;
    # 16 patches, 5 deviations.
    torch.testing.assert_close(mask.mean(0), torch.full((16,), 0.75), rtol=0, atol=0.0155)
    # Two patches are hidden together with probability 12/16 11/15 = 0.55.
    assert (mask[:, 0] * mask[:, 15]).mean().item() == pytest.approx(0.55, abs=0.018)


def blocks_one_by_one(u, grid, hide):
    """BEiT's blocks of one image, from uniform numbers (tries, 4), as nested loops; the official
    code's rule for each try."""
    hidden = np.zeros((grid, grid), bool)
    least = 16 / 196 * grid**2
    for area, aspect, top, left in u.tolist():
        missing = hide - hidden.sum()
        area = least + area * (missing - least)
        aspect = math.exp(math.log(0.3) + aspect * (math.log(1 / 0.3) - math.log(0.3)))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if h < grid and w < grid:
            top = int(top * (grid - h + 1))
            left = int(left * (grid - w + 1))
            place = np.s_[top : top + h, left : left + w]
            new = h * w - hidden[place].sum()
            if 0 < new <= missing:
                hidden[place] = True
    return hidden.flatten()


@pytest.mark.parametrize("grid, hide", [(8, 48), (14, 147), (14, 98)])
def test_blocks_are_those_of_beit(grid, hide):
    u = BatchRandom([0], 60).uniform(columns=(40, 4))
    found = mae.block_masks(u, grid, hide)
    for row, numbers in zip(found, u):
        assert row.tolist() == blocks_one_by_one(numbers, grid, hide).tolist()
    assert (found.sum(1) <= hide).all()
    # Nearly everything is hidden in blocks, not one by one: of 60 images at most a few miss a few
    # patches after 40 tries.
    assert found.sum() > 0.99 * 60 * hide


def neighbours_alike(kind):
    """Share of neighbouring patches that are both hidden or both visible."""
    _, _, mask = masks(kind, n=500, size=224)
    x = mask.view(-1, 14, 14)
    down = (x[:, 1:] == x[:, :-1]).float().mean()
    right = (x[:, :, 1:] == x[:, :, :-1]).float().mean()
    return (down + right).item() / 2


def test_block_masks_hide_in_blocks():
    # of independent patches 3/4^2 + 1/4^2 are alike
    assert neighbours_alike("random") == pytest.approx(0.625, abs=0.01)
    assert neighbours_alike("block") > 0.75


def test_grid_masks_by_hand():
    _, _, mask = masks("grid", n=40, size=32)
    corners = set()
    for x in mask.view(-1, 8, 8):
        visible = (x == 0).nonzero()
        top, left = visible[0].tolist()
        expected = [[i, j] for i in range(top, 8, 2) for j in range(left, 8, 2)]
        assert visible.tolist() == expected
        corners.add((top, left))
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
def test_masks_belong_to_the_image_not_to_the_process(kind):
    whole = masks(kind)
    for first in range(0, BATCH, 4):
        rows = slice(first, first + 4)
        for found, expected in zip(masks(kind, rows=rows), whole):
            assert torch.equal(found, expected[rows])
    assert not torch.equal(whole[2], masks(kind, seed=1)[2])


# -------- Encoder and decoder ---------------------------------------------------------------------


def test_encoder_knows_only_the_visible_patches():
    encoder = network().backbone
    x = images()
    ids_keep, _, mask = masks("random")
    h = encoder.tokens(x, ids_keep)
    assert h.shape == (BATCH, 1 + 4, 32)

    def with_changed(patches):
        change = noise(BATCH, 16, 48, seed=1, dtype=torch.float32) * patches[:, :, None]
        return mae.unpatchify(mae.patchify(x, P) + change, P)

    assert torch.equal(encoder.tokens(with_changed(mask), ids_keep), h)
    assert (encoder.tokens(with_changed(1 - mask), ids_keep) != h).any(2).all()


def test_features_are_the_mean_of_all_patch_tokens():
    encoder = network().double().backbone
    x = images(2, dtype=torch.float64)
    tokens = encoder.tokens(x)
    torch.testing.assert_close(encoder(x), tokens[:, 1:].mean(1))
    assert tokens.shape == (2, 17, 32) and encoder.out_dim == 32
    # All patches in any order are all patches: positions go with them.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = encoder.tokens(x, order.expand(2, -1))
    torch.testing.assert_close(shuffled[:, 1:], tokens[:, 1:][:, order])
    torch.testing.assert_close(shuffled[:, 0], tokens[:, 0])


def test_saved_backbone_is_the_encoder():
    encoder = network().backbone
    made = common.new_backbone("mae", "tiny", SIZE)
    made.load_state_dict(encoder.state_dict())
    x = images(2)
    assert torch.equal(made(x), encoder(x))


def official(model, x, noise):
    """forward of the official code, step by step: every token is embedded, sorted, dropped, and put
    back by gather."""
    encoder = model.backbone
    keep = noise.shape[1] // 4
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)

    w = encoder.patch_embed["proj"]
    patches = mae.patchify(x, P)
    t = F.linear(patches, w.weight.permute(0, 2, 3, 1).flatten(1), w.bias)
    t = t + encoder.pos_embed[:, 1:]
    t = t.gather(1, ids_shuffle[:, :keep, None].repeat(1, 1, t.shape[2]))
    first = encoder.cls_token + encoder.pos_embed[:, :1]
    t = torch.cat([first.repeat(len(x), 1, 1), t], 1)
    for block in encoder.blocks:
        t = block(t)

    y = model.decoder_embed(encoder.norm(t))
    tokens = model.mask_token.repeat(len(x), noise.shape[1] - keep, 1)
    patches = torch.cat([y[:, 1:], tokens], 1)
    patches = patches.gather(1, ids_restore[:, :, None].repeat(1, 1, y.shape[2]))
    y = torch.cat([y[:, :1], patches], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        y = block(y)
    mask = torch.ones(noise.shape, dtype=x.dtype)
    mask[:, :keep] = 0
    return model.decoder_pred(model.decoder_norm(y))[:, 1:], mask.gather(1, ids_restore)


def test_forward_is_the_official_one_and_gradient_reaches_every_parameter():
    model = network().double()
    x = images(dtype=torch.float64)
    ids_keep, ids_restore, mask = masks("random")
    pred = model(x, ids_keep, ids_restore)
    numbers = BatchRandom([0], BATCH).uniform(columns=(16,))
    expected, expected_mask = official(model, x, numbers)
    torch.testing.assert_close(pred, expected)
    assert torch.equal(mask.double(), expected_mask)

    mae.mae_loss(pred, x, mask, P).backward()
    gradients = {name: w.grad.clone() for name, w in model.named_parameters()}
    model.zero_grad()
    mae.mae_loss(expected, x, expected_mask, P).backward()
    for name, w in model.named_parameters():
        torch.testing.assert_close(gradients[name], w.grad)
        # The bias of the keys is the one thing that cannot matter: it adds the same to all logits
        # of a query.
        assert w.grad.isfinite().all() and w.grad.abs().max() > 1e-6, name
    buffers = {name for name, _ in model.named_buffers()}
    assert buffers == {"backbone.pos_embed", "decoder_pos_embed"}


def test_initial_weights():
    model = mae.MAE("vit_tiny", 32, 64, 1)
    for name, w in model.named_parameters():
        if name.endswith("bias"):
            assert (w == 0).all(), name
        elif "norm" in name:
            assert (w == 1).all(), name
        elif name.endswith("token"):  # 64 or 192 normal numbers: their deviation is known to 9 %
            assert w.std().item() == pytest.approx(0.02, rel=0.3), name
        else:  # Xavier: uniform, up to sqrt(6 / (inputs + outputs))
            bound = math.sqrt(6 / sum(w.flatten(1).shape))
            assert 0.98 * bound < w.abs().max() <= bound, name
            assert w.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


@pytest.mark.thorough
def test_overfits_one_batch():
    model = network()
    x = images(4)
    ids_keep, ids_restore, mask = masks("random", n=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(200):
        losses.append(mae.masked_patch_mse(model(x, ids_keep, ids_restore), x, mask, P))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    # Independent pixels cannot be guessed, at best 47/48 without learning them by heart; the
    # network can, 48 patches.
    assert losses[0] > 0.95 and losses[-1] < 0.1


# -------- Flags, views and pictures ---------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--mask-ratio 0", "leaves 64 of 8 x 8"),
        ("--mask-ratio 0.99", "leaves 0 of 8 x 8"),
        ("--mask grid --mask-ratio 0.5", "--mask grid --mask-ratio 0.5"),
        ("--mask grid --size 28", "of 7 x 7"),
        ("--decoder-dim 48", "--decoder-dim 48: choose a multiple of 32"),
        ("--decoder-dim 0", "--decoder-dim 0: choose at least 32"),
        ("--size 30", "multiple of 4"),
        ("--size 100", "multiple of 16"),
        ("--arch resnet14", "choose from"),
    ],
)
def test_impossible_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as error:
        arguments("mae", *flags.split())
    message = capsys.readouterr().err
    assert error.value.code == 1 and words in message and message.count("\n") == 1


def test_views_crop_and_flip_alone(monkeypatch):
    ((crop, augment),) = mae.views(SimpleNamespace(size=32))
    assert crop == (32, (0.2, 1.0), (3 / 4, 4 / 3))
    x = torch.rand(64, 3, 8, 8)
    flipped = torch.rand(64, 3, 8, 8)
    monkeypatch.setattr(mae, "random_flip", lambda x, rand: flipped)
    assert torch.equal(augment(x, None), mae.normalize(flipped))


def test_views_png_shows_what_the_encoder_sees_in_the_first_step():
    args = arguments("mae", "--size", SIZE, "--batch", BATCH)
    loader = Loader(tiny_data().train, mae.views(args), BATCH, args.seed, CPU)
    _, views = next(loader(0))
    _, first_views = loader.first_shown
    shown = mae.show_visible(args, loader, first_views)
    assert list(shown) == ["target", "seen"]
    mean = torch.tensor(MEAN).view(3, 1, 1)
    crops = views[0][:8] * torch.tensor(STD).view(3, 1, 1) + mean
    torch.testing.assert_close(shown["target"], crops.clamp(0, 1))

    _, _, mask = mae.draw_masks(args, loader.random(0, 0, 0, 4), CPU)
    hidden = mask[:8].bool()
    seen = mae.patchify(shown["seen"], P)
    assert (seen[hidden] == 0.5).all()
    assert torch.equal(seen[~hidden], mae.patchify(shown["target"], P)[~hidden])


def random_pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, SIZE, SIZE), dtype=np.uint8)
    split = Split(InMemory(torch.from_numpy(pixels)))
    return Data("random", split, split, None)


@pytest.mark.parametrize("raw", [False, True])
def test_reconstructions(monkeypatch, tmp_path, raw):
    """Of a decoder that knows the answer the reconstruction is the image; visible patches are shown
    as they are."""

    def knows(x, ids_keep, ids_restore):
        t = mae.patchify(x, P)
        if not raw:
            t = (t - t.mean(2, keepdim=True)) / (t.var(2, keepdim=True) + 1e-6).sqrt()
        return t + 1e6 * (ids_restore < 4)[:, :, None]  # nonsense in visible patches

    saved = []
    monkeypatch.setattr(mae, "save_grid", lambda *args, note: saved.append((*args, note)))
    args = SimpleNamespace(size=SIZE, mask="random", mask_ratio=0.75, raw_pixels=raw, seed=0)
    run = SimpleNamespace(model=knows, data=random_pictures(), args=args, device=CPU)
    mae.draw_reconstructions(tmp_path / "r.png", run)
    ((file, rows, columns, note),) = saved
    assert file == tmp_path / "r.png" and columns == ["image", "seen", "painted"]
    assert ("taken from the image" in note) == (not raw)
    assert [len(row) for row in rows] == [3] * 10

    originals = {tuple(x.flatten().tolist()) for x in run.data.bank.images.pixels}
    for image, seen, painted in rows:
        pixels = (255 * image).round().to(torch.uint8)
        assert tuple(pixels.flatten().tolist()) in originals
        torch.testing.assert_close(painted, image, rtol=0, atol=1e-5)
        seen = mae.patchify(seen[None], P)[0]
        image = mae.patchify(image[None], P)[0]
        visible = torch.isclose(seen, image, rtol=0, atol=1e-6).all(1)
        assert visible.sum() == 4 and (seen[~visible] == 0.5).all()


# -------- The training loop -----------------------------------------------------------------------

LOOP = ["--arch", "vit_micro", "--batch", BATCH, "--size", SIZE, "--epochs", 2, "--warmup", 0]
LOOP += ["--lr", 0.02]  # four steps


def plain_training(kind):
    """The loop in float64 from plain pieces: the official forward, the formula of the loss, AdamW
    by names. Returns the losses, the parameters, and the names in the two groups."""
    args = arguments("mae", "--mask", kind, *LOOP)
    torch.manual_seed(args.seed)
    model = mae.MAE(args.arch, SIZE, args.decoder_dim, args.decoder_depth)
    named = dict(model.named_parameters())
    plain = [name for name in named if name.endswith("bias") or "norm" in name]
    decayed = [name for name in named if name not in plain]
    groups = [
        {"params": [named[name] for name in decayed], "weight_decay": 0.05},
        {"params": [named[name] for name in plain], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    loader = Loader(tiny_data().train, mae.views(args), BATCH, args.seed, CPU)
    losses = []
    for epoch in range(2):
        for step, (x,) in loader(epoch):
            # the place of each patch in the random order of its image
            _, place, _ = mae.draw_masks(args, loader.random(epoch, step, 0, 4), CPU)
            pred, mask = official(model, x.double(), place.double())
            losses.append(mae.mae_loss(pred, x.double(), mask, P))
            for group in optimizer.param_groups:
                cosine = math.cos(math.pi * step / 4)
                group["lr"] = 0.02 * BATCH / 256 * 0.5 * (1 + cosine)
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    return torch.stack(losses).detach(), named, (decayed, plain)


@pytest.mark.parametrize("kind", ["random", "block"])
def test_training_is_the_plain_one(train, kind):
    with pytest.MonkeyPatch.context() as patch:
        double_precision(patch)
        try:
            losses, parameters, names = plain_training(kind)
        finally:
            torch.set_default_dtype(torch.float32)
    run = train("mae", "--mask", kind, *LOOP)
    torch.testing.assert_close(run.losses, losses, rtol=1e-9, atol=0)
    for name, w in parameters.items():
        # Four steps of Adam move every weight by about 0.001, that of the keys' biases too: their
        # gradient is 0 but for rounding, 1e-17, which Adam divides by 1e-8.
        found = run.state[f"model/{name}"]
        torch.testing.assert_close(found, w.detach(), rtol=0, atol=1e-9, msg=name)
    assert "reconstruction.png" in run.pictures

    order = list(parameters)
    for number, (members, decay) in enumerate(zip(names, (0.05, 0.0))):
        group = f"optimizer/param_groups/{number}"
        assert run.state[f"{group}/weight_decay"] == decay
        assert (run.state[f"{group}/betas/0"], run.state[f"{group}/betas/1"]) == (0.9, 0.95)
        count = sum(name.startswith(f"{group}/params/") for name in run.state)
        assert count == len(members)
        for place, name in enumerate(n for n in order if n in members):
            index = run.state[f"{group}/params/{place}"]
            moments = run.state[f"optimizer/state/{index}/exp_avg"]
            assert moments.shape == parameters[name].shape


# -------- Oracles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_lightly_agrees(normalize):
    """lightly's utilities, put together as in its MAE example, by value and by gradient."""
    utils = pytest.importorskip("lightly.models.utils", exc_type=ImportError)
    x = images(dtype=torch.float64)
    h = noise(BATCH, 5, 32, seed=1).requires_grad_()
    token = noise(1, 1, 32, seed=2).requires_grad_()
    head = noise(32, 48, seed=2).requires_grad_()
    pos = utils.get_2d_sine_cosine_positional_embedding(32, 4, cls_token=True)
    pos = torch.from_numpy(pos)[None]
    found = sincos_positions(4, 32).double()
    torch.testing.assert_close(found, pos, rtol=0, atol=1e-6)  # float32

    torch.manual_seed(0)
    # token 0 is the class token, always kept
    idx_keep, idx_mask = utils.random_token_mask((BATCH, 17), mask_ratio=0.75)
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
    tokens = noise(BATCH, 16, 8, seed=3, dtype=torch.float32)
    assert torch.equal(gather_tokens(tokens, ids_keep), utils.get_at_index(tokens, ids_keep))
    assert torch.equal(mae.patchify(x, P), utils.patchify(x, P))
    assert torch.equal(utils.unpatchify(utils.patchify(x, P), P), x)


def test_timm_agrees():
    """timm's ViT takes the weights by name and gives the same tokens; so the published weights,
    which are timm's, fit too."""
    timm = pytest.importorskip("timm.models.vision_transformer", exc_type=ImportError)
    ours = network().backbone.double()
    theirs = timm.VisionTransformer(
        SIZE, P, embed_dim=32, depth=2, num_heads=2, num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).double()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    x = images(2, dtype=torch.float64)
    torch.testing.assert_close(ours.tokens(x), theirs.forward_features(x))
