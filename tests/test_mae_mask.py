"""kernels/mae_mask.py: masking, gathering, restoring and the loss of both implementations, PyTorch and Triton (interpreted
where there is no GPU), against the official code's formulas; autograd and torch.compile; the machine code."""

import math

import pytest
import torch
from torch import library

import kernels.mae_mask as mm
from kernels.mae_mask import gather_tokens, masked_patch_mse, random_masking, restore_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = {"rtol": 0, "atol": 1e-12}  # float64: some roundings of 1e-16 at numbers up to a hundred
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a unit in the last place, relative
DTYPES = list(ROUNDING)


@pytest.fixture(params=["pytorch", "triton"])
def way(request, monkeypatch):
    """Runs a test with each implementation; float64 is always computed by PyTorch."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(mm, "use_kernel", lambda *tensors: request.param == "triton" and all(
        t is None or t.dtype != torch.float64 for t in tensors))
    return request.param


def rounds_once(way, dtype):
    """Relative error of storing in dtype. Triton's interpreter cuts bfloat16 off where a GPU rounds it."""
    return ROUNDING[dtype] * (2 if (way, dtype, DEVICE.type) == ("triton", torch.bfloat16, "cpu") else 1)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(DEVICE)


def pixels(B, H, W, dtype=torch.uint8, seed=0):
    x = torch.randint(256, (B, 3, H, W), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).to(DEVICE)
    return x if dtype == torch.uint8 else (x / 255).to(dtype)


def noise(B, L, seed=0):
    return torch.rand(B, L, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def official_masking(noise, keep):
    """random_masking of models_mae.py. Its sort is not stable; equal noise is otherwise left open."""
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(1)
    mask = torch.ones(noise.shape, device=noise.device)
    mask[:, :keep] = 0
    return order[:, :keep], restore, mask.gather(1, restore)


def official_gather(x, ids_keep):
    return x.gather(1, ids_keep.long()[:, :, None].expand(-1, -1, x.shape[2]))


def official_restore(x, ids_restore, mask_token, pos):
    """forward_decoder, for the tokens without the class token."""
    hidden = mask_token.expand(len(x), ids_restore.shape[1] - x.shape[1], -1)
    return official_gather(torch.cat([x, hidden], 1), ids_restore) + pos


def official_loss(pred, images, mask, patch, normalize=True):
    """patchify and forward_loss."""
    B, _, H, W = images.shape
    t = torch.einsum("nchpwq->nhwpqc", images.reshape(B, 3, H // patch, patch, W // patch, patch)).reshape(pred.shape)
    if normalize:
        t = (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True) + 1e-6) ** 0.5
    return (((pred - t) ** 2).mean(-1) * mask).sum() / mask.sum()


def gradients(function, leaves, g=None):
    """function(*leaves) and the gradients of the leaves, where g arrives at the value."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, g)


# -------- Masking ------------------------------------------------------------------------------------------------------

def test_masking_by_hand(way):
    x = torch.tensor([[0.3, 0.1, 0.2, 0.4], [4.0, 3.0, 2.0, 1.0]], device=DEVICE)
    ids_keep, ids_restore, mask = random_masking(2, 4, 2, noise=x)
    assert ids_keep.tolist() == [[1, 2], [3, 2]]
    assert ids_restore.tolist() == [[2, 0, 1, 3], [3, 2, 1, 0]]
    assert mask.tolist() == [[1, 0, 0, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("B, L, keep, dtype", [(1, 1, 1, torch.float32), (3, 7, 3, torch.float64), (2, 64, 64, torch.bfloat16),
                                               (2, 65, 16, torch.float32), (3, 196, 49, torch.float16)], ids=str)
def test_masking_is_the_official_one(way, B, L, keep, dtype):
    """In 16 bits and 196 numbers some are equal: then the first comes first."""
    x = noise(B, L).to(dtype)
    found = random_masking(B, L, keep, noise=x)
    assert all(map(torch.equal, found, official_masking(x, keep)))
    ids_keep, ids_restore, mask = found
    assert (ids_keep.dtype, ids_restore.dtype, mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert torch.equal(ids_restore.sort(1)[0], torch.arange(L, device=DEVICE).expand(B, L))
    assert (mask.sum(1) == L - keep).all() and mask.gather(1, ids_keep).sum() == 0
    assert torch.equal(ids_restore.gather(1, ids_keep), torch.arange(keep, device=DEVICE).expand(B, keep))


def test_masking_draws(way):
    """The same generator draws the same; images differ; each token is kept as often as any: 600 +- 20.5 of 2000 times."""
    first, again, other = (random_masking(2000, 10, 3, torch.Generator().manual_seed(seed))[2] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert ((1 - first).sum(0) - 600).abs().max() < 5 * math.sqrt(2000 * 0.3 * 0.7)
    assert len(first.unique(dim=0)) == math.comb(10, 3)
    torch.manual_seed(0)
    assert torch.equal(random_masking(2000, 10, 3)[2], first)  # without a generator, that of torch.manual_seed


# -------- Gather and restore ---------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1, 1), (2, 9, 4, 5), (3, 70, 20, 48), (2, 17, 17, 300)]


@pytest.mark.parametrize("B, L, K, D", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_is_the_official_one(way, B, L, K, D, dtype):
    """Numbers are only moved, also in the backward: all bits agree."""
    x, g, ids = draw(B, L, D, dtype=dtype), draw(B, K, D, seed=1, dtype=dtype), random_masking(B, L, K, noise=noise(B, L))[0]
    want = gradients(lambda x: official_gather(x, ids), [x], g)
    for index in (ids, ids.int()):
        out, grads = gradients(lambda x: gather_tokens(x, index), [x], g)
        assert torch.equal(out, want[0]) and torch.equal(grads[0], want[1][0])


@pytest.mark.parametrize("B, L, K, D", SIZES)
@pytest.mark.parametrize("dtype, pos_dtype", [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
def test_restore_is_the_official_one(way, B, L, K, D, dtype, pos_dtype):
    ids = random_masking(B, L, K, noise=noise(B, L))[1]
    x, token, pos = draw(B, K, D, dtype=dtype), draw(D, seed=1, dtype=dtype), draw(L, D, seed=2, dtype=pos_dtype)
    g = draw(B, L, D, seed=3, dtype=torch.promote_types(dtype, pos_dtype))
    exact, exact_grads = gradients(lambda *leaves: official_restore(leaves[0], ids, *leaves[1:]),
                                   [t.double() for t in (x, token, pos)], g.double())
    plain, plain_grads = gradients(lambda *leaves: official_restore(leaves[0], ids, *leaves[1:]), [x, token, pos], g)
    for index in (ids, ids.int()):
        out, grads = gradients(lambda *leaves: restore_tokens(leaves[0], index, *leaves[1:]), [x, token, pos], g)
        assert out.dtype == plain.dtype and all(a.dtype == b.dtype for a, b in zip(grads, plain_grads))
        # One sum of two numbers, rounded once.
        assert ((out - exact).abs() <= rounds_once(way, out.dtype) * exact.abs()).all()
        assert ((grads[0] - exact_grads[0]).abs() <= rounds_once(way, dtype) * exact_grads[0].abs()).all()
        # Sums of many: at most twice the error of plain PyTorch, and one rounding of the result.
        for a, b, c in zip(grads[1:], plain_grads[1:], exact_grads[1:]):
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + rounds_once(way, a.dtype) * c.abs().max()
    assert (K == L) == (grads[1].abs().max() == 0).item()  # with nothing hidden the mask token gets 0


def test_restore_undoes_gather(way):
    """Kept tokens return to their places, the mask token is everywhere else, positions are added to both."""
    B, L, K, D = 2, 12, 5, 8
    ids_keep, ids_restore, mask = random_masking(B, L, K, noise=noise(B, L))
    x, token, pos = (draw(*shape, dtype=torch.float32) for shape in [(B, L, D), (D,), (L, D)])
    y = restore_tokens(gather_tokens(x, ids_keep), ids_restore, token, pos)
    assert torch.equal(y, torch.where(mask[:, :, None] == 1, token, x) + pos)


def test_views_need_no_copy(way):
    """A class token in front is split off by slicing; other layouts are copied. The gradient reaches only what was taken."""
    B, L, K, D = 2, 9, 4, 16
    ids_keep, ids_restore, mask = random_masking(B, L, K, noise=noise(B, L))
    token, pos = draw(D, seed=1, dtype=torch.float32), draw(L, D, seed=2, dtype=torch.float32)
    x = draw(B, 1 + K, D, dtype=torch.float32).requires_grad_()
    y = restore_tokens(x[:, 1:], ids_restore, token, pos)
    assert torch.equal(y, restore_tokens(x.detach()[:, 1:].contiguous(), ids_restore, token, pos))
    y.sum().backward()
    assert x.grad[:, 0].abs().max() == 0 and (x.grad[:, 1:] == 1).all()
    across = draw(B, D, L, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(gather_tokens(across, ids_keep), official_gather(across, ids_keep))
    pred, images = draw(B, 1 + L, 12, dtype=torch.float32)[:, 1:], pixels(B, 6, 6).transpose(2, 3)
    want = masked_patch_mse(pred.contiguous(), images.contiguous(), mask, 2)
    assert torch.equal(masked_patch_mse(pred, images, mask, 2), want)


# -------- The loss -------------------------------------------------------------------------------------------------------

def test_loss_by_hand(way):
    """Two patches of one pixel, the second hidden, of colours 1, 2, 3: mean 2, unbiased variance 1, so -1, 0, 1 normalised."""
    images = torch.tensor([[9.0, 1.0], [9.0, 2.0], [9.0, 3.0]], device=DEVICE).view(1, 3, 1, 2)
    pred, mask = torch.zeros(1, 2, 3, device=DEVICE), torch.tensor([[0.0, 1.0]], device=DEVICE)
    (plain, (d,)), (normal, (e,)) = (gradients(lambda x: masked_patch_mse(x, images, mask, 1, normalize), [pred])
                                     for normalize in (False, True))
    assert plain.item() == pytest.approx((1 + 4 + 9) / 3, rel=1e-6)
    assert normal.item() == pytest.approx(2 / 3 / (1 + 1e-6), rel=3e-7)
    assert d.tolist() == [[[0, 0, 0], pytest.approx([-2 / 3, -4 / 3, -2], rel=1e-6)]]
    assert e.tolist() == [[[0, 0, 0], pytest.approx([2 / 3, 0, -2 / 3], abs=1e-6)]]


@pytest.mark.parametrize("B, H, W, patch", [(2, 8, 12, 4), (1, 6, 4, 2), (1, 28, 14, 14)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype, images_dtype", [(torch.float64, torch.float64), (torch.float32, torch.uint8), (
    torch.float32, torch.float32), (torch.float16, torch.uint8), (torch.bfloat16, torch.float32)], ids=str)
def test_loss_error_at_most_twice_that_of_plain(way, B, H, W, patch, normalize, dtype, images_dtype):
    L, P = H // patch * (W // patch), 3 * patch**2
    pred, images = draw(B, L, P, dtype=dtype), pixels(B, H, W, images_dtype)
    mask = random_masking(B, L, max(1, L // 4), noise=noise(B, L))[2]
    numbers = images / 255 if images_dtype == torch.uint8 else images  # what the official code is given
    exact, (exact_grad,) = gradients(lambda x: official_loss(
        x, images.double() / 255 if images_dtype == torch.uint8 else images.double(), mask, patch, normalize), [pred.double()])
    plain, (plain_grad,) = gradients(lambda x: official_loss(x, numbers, mask, patch, normalize), [pred])
    loss, (grad,) = gradients(lambda x: masked_patch_mse(x, images, mask, patch, normalize), [pred])
    assert loss.dtype == plain.dtype and grad.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(loss, exact, **EXACT)
        torch.testing.assert_close(grad, exact_grad, **EXACT)
        return
    # The absolute terms: the sums' roundings, about the square root of the number of numbers; two roundings of the gradient.
    assert (loss - exact).abs() <= 2 * (plain - exact).abs() + 2**-24 * math.sqrt(P) * exact
    limit = 2 * (plain_grad - exact_grad).norm() + 2 * rounds_once(way, dtype) * exact_grad.norm()
    assert (grad - exact_grad).norm() <= limit
    assert (grad[mask == 0] == 0).all() and (grad[mask == 1] != 0).any()


def test_loss_of_flat_patches_is_finite(way):
    """Of variance 0: the target is 0, thanks to the 1e-6."""
    images, mask = torch.full((1, 3, 4, 4), 77, dtype=torch.uint8, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    loss, (grad,) = gradients(lambda x: masked_patch_mse(x, images, mask, 2), [torch.ones(1, 4, 12, device=DEVICE)])
    # The mean of 12 equal numbers is rounded, and sqrt(1e-6) divides the difference of at most two units in the last place.
    assert loss.item() == pytest.approx(1, abs=2 * 2 * 2 * 2**-24 / 1e-3) and grad.isfinite().all()


def test_small_gradients_keep_their_digits_in_float16(way):
    """At 49152 hidden numbers 2 / (P sum(mask)) is 4e-5: a residual multiplied by it would be subnormal in float16."""
    pred, images, mask = draw(1, 64, 768).half(), pixels(1, 128, 128), torch.ones(1, 64, device=DEVICE)
    _, (grad,) = gradients(lambda x: masked_patch_mse(x, images, mask, 16) * 2**12, [pred])
    _, (exact,) = gradients(lambda x: official_loss(x, images.double() / 255, mask, 16) * 2**12, [pred.double()])
    assert (grad - exact).norm() <= 2 * 2**-11 * exact.norm()  # two roundings


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [1.0, -0.75])
def test_gradient_that_arrives(way, dtype, g):
    """What the pass of the loss wrote is the gradient for 1, and times g for any other; 23232 numbers of a
    sample are the work of two programs."""
    pred, images, mask = draw(2, 121, 192, dtype=dtype), pixels(2, 88, 88), noise(2, 121).round()
    _, (grad,) = gradients(lambda x: masked_patch_mse(x, images, mask, 8), [pred], torch.tensor(g, device=DEVICE))
    _, (exact,) = gradients(lambda x: official_loss(x, images.double() / 255, mask, 8), [pred.double()])
    assert (grad - g * exact).norm() <= 2 * rounds_once(way, dtype) * (g * exact).norm() + 2**-24 * exact.norm()
    assert (grad[mask == 0] == 0).all()


def test_images_are_read_where_patches_are_hidden_only(way):
    """What is visible takes no part, whatever it is."""
    pred, images, mask = draw(1, 4, 12, dtype=torch.float32), pixels(1, 4, 4, torch.float32), torch.eye(4, device=DEVICE)[:1]
    broken = pred.clone()
    broken[:, 1:] = 1e10
    for x, y in zip(gradients(lambda x: masked_patch_mse(x, images, mask, 2), [pred]),
                    gradients(lambda x: masked_patch_mse(x, images, mask, 2), [broken])):
        assert torch.equal(x if torch.is_tensor(x) else x[0], y if torch.is_tensor(y) else y[0])


def test_kernel_is_differentiated_once(way):
    """The kernel finishes its gradient in place: a second backward through the same graph is an error, not a wrong number."""
    pred, images, mask = draw(1, 4, 12, dtype=torch.float32).requires_grad_(), pixels(1, 4, 4), torch.ones(1, 4, device=DEVICE)
    loss = masked_patch_mse(pred, images, mask, 2)
    first, = torch.autograd.grad(3 * loss, pred, retain_graph=True)
    kept = first.clone()
    if way == "triton":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, pred)
    else:
        torch.testing.assert_close(3 * torch.autograd.grad(loss, pred)[0], kept)
    assert torch.equal(first, kept)


def test_processes_that_hide_equally_many_average_to_the_whole():
    """Nothing is communicated: the means over parts of the batch are loss and gradient of the batch; masks follow the noise."""
    B, L, P = 6, 9, 12
    pred, images = draw(B, L, P), pixels(B, 6, 6)
    masks = random_masking(B, L, 2, noise=noise(B, L))[2]
    whole, (whole_grad,) = gradients(lambda x: masked_patch_mse(x, images, masks, 2), [pred])
    for world in (2, 3):
        found = []
        for x, y, u in zip(*(t.chunk(world) for t in (pred, images, noise(B, L)))):
            mask = random_masking(len(u), L, 2, noise=u)[2]
            found.append(gradients(lambda x: masked_patch_mse(x, y, mask, 2), [x]))
        torch.testing.assert_close(sum(loss for loss, _ in found) / world, whole, **EXACT)
        torch.testing.assert_close(torch.cat([grad for _, (grad,) in found]) / world, whole_grad, **EXACT)


# -------- Autograd, autocast, torch.compile -----------------------------------------------------------------------------

def test_gradcheck():
    B, L, K, D = 2, 6, 2, 3
    ids_keep, ids_restore, mask = random_masking(B, L, K, noise=noise(B, L))
    images = pixels(B, 4, 6, torch.float64)
    x, kept, token, pos, pred = (draw(*shape).requires_grad_() for shape in [(B, L, D), (B, K, D), (D,), (L, D), (B, L, 12)])
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, ids_keep), x)
    assert torch.autograd.gradcheck(lambda *leaves: restore_tokens(leaves[0], ids_restore, *leaves[1:]), (kept, token, pos))
    for normalize in (True, False):
        assert torch.autograd.gradcheck(lambda pred: masked_patch_mse(pred, images, mask, 2, normalize), pred)
    assert torch.autograd.grad(masked_patch_mse(pred, images.requires_grad_(), mask, 2), images, allow_unused=True) == (None,)


def step(x, token, pos, pred, images, u):
    ids_keep, ids_restore, mask = random_masking(2, 9, 3, noise=u)
    y = restore_tokens(gather_tokens(x, ids_keep), ids_restore, token, pos)
    return masked_patch_mse(pred + y.sum(2, keepdim=True), images, mask, 2)


def test_compile_autocast_and_repetition(way):
    """The whole step is one graph; aot_eager traces all that the default backend does, without generating machine code. The
    operators compute as they do without autocast, and twice the same bit by bit."""
    leaves = [draw(*shape, seed=seed, dtype=torch.float32) for seed, shape in enumerate([(2, 9, 8), (8,), (9, 8), (2, 9, 12)])]
    data = pixels(2, 6, 6), noise(2, 9)
    want, grads = gradients(lambda *leaves: step(*leaves, *data), leaves)

    def agree(function):
        out, found = gradients(lambda *leaves: function(*leaves, *data), leaves)
        return torch.equal(out, want) and all(map(torch.equal, found, grads))

    assert agree(step)
    assert agree(torch.compile(step, fullgraph=True, backend="aot_eager"))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert agree(step)


def test_operators_pass_opcheck(way):
    """The checks that PyTorch itself has for operators: schemas, fake tensors, autograd registration."""
    ids_keep, ids_restore, mask = random_masking(2, 4, 2, noise=noise(2, 4))
    x, kept, token, pos, pred = (draw(*shape, dtype=torch.float32).requires_grad_()
                                 for shape in [(2, 4, 3), (2, 2, 3), (3,), (4, 3), (2, 4, 12)])
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    library.opcheck(mm.masking_op, (noise(2, 4), 2), test_utils=tests)
    library.opcheck(mm.take_op, (x, ids_keep, None, None, torch.float32), test_utils=tests)
    library.opcheck(mm.take_op, (kept, ids_restore, token, pos, torch.float32), test_utils=tests)
    library.opcheck(mm.mse_op, (pred, pixels(2, 4, 4), mask, 2, True), test_utils=tests)


def test_second_derivative_is_an_error(way):
    ids_keep, ids_restore, mask = random_masking(1, 4, 2, noise=noise(1, 4))
    images, token, pos = pixels(1, 4, 4), draw(3, dtype=torch.float32), draw(4, 3, dtype=torch.float32)
    for function, shape in [(lambda x: gather_tokens(x, ids_keep).square().sum(), (1, 4, 3)),
                            (lambda x: restore_tokens(x, ids_restore, token, pos).square().sum(), (1, 2, 3)),
                            (lambda x: masked_patch_mse(x, images, mask, 2), (1, 4, 12))]:
        x = draw(*shape, dtype=torch.float32).requires_grad_()
        grad, = torch.autograd.grad(function(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            grad.sum().backward()


def test_bad_input():
    ids_keep, ids_restore, mask = random_masking(2, 4, 2, noise=noise(2, 4))
    x, token, pos, images = draw(2, 4, 3), draw(3), draw(4, 3), pixels(2, 4, 4)
    pred = draw(2, 4, 12)
    for error, message, call in [
            (ValueError, "keep must be from 1 to tokens = 4, got 0", lambda: random_masking(2, 4, 0)),
            (ValueError, "got 5", lambda: random_masking(2, 4, 5)),
            (ValueError, r"noise of shape \(2, 4\)", lambda: random_masking(2, 4, 2, noise=noise(2, 3))),
            (ValueError, "either a generator or noise",
             lambda: random_masking(2, 4, 2, torch.Generator(), noise=noise(2, 4))),
            (TypeError, "noise must be one of .*, but is torch.int64", lambda: random_masking(2, 4, 2, noise=ids_restore)),
            (ValueError, r"ids_keep must be \(B, K\), .* but is \(1, 2\)", lambda: gather_tokens(x, ids_keep[:1])),
            (ValueError, r"x must be \(B, L, D\)", lambda: gather_tokens(x[0], ids_keep)),
            (TypeError, "ids_keep must be one of .*, but is torch.float64", lambda: gather_tokens(x, ids_keep.double())),
            (ValueError, "6 tokens cannot be kept out of 4", lambda: gather_tokens(x, ids_keep.repeat(1, 3))),
            (ValueError, "x has 4 tokens, more than the 3", lambda: restore_tokens(x, ids_restore[:, :3], token, pos[:3])),
            (ValueError, r"mask_token must be \(D\)", lambda: restore_tokens(x, ids_restore, token[None], pos)),
            (ValueError, r"pos must be \(L, D\)", lambda: restore_tokens(x, ids_restore, token, pos[:2])),
            (ValueError, "pos is on meta, but x on", lambda: restore_tokens(x, ids_restore, token, pos.to("meta"))),
            (TypeError, "images must be one of .*, but is torch.int32", lambda: masked_patch_mse(pred, images.int(), mask, 2)),
            (ValueError, "patches of 3 x 3 pixels", lambda: masked_patch_mse(pred, images, mask, 3)),
            (ValueError, "cannot be 3 colours", lambda: masked_patch_mse(pred, images[:, :1], mask, 2))]:
        with pytest.raises(error, match=message):
            call()
    if DEVICE.type == "cpu":  # on a GPU the check would wait for the GPU
        with pytest.raises(IndexError, match="ids must be from 0 to 3, these are from 0 to 7"):
            gather_tokens(x, torch.tensor([[0, 7], [1, 2]]))


def test_lightly_agrees():
    """Its tokens include a class token, which it never hides, and its prediction is of hidden patches alone."""
    lightly = pytest.importorskip("lightly.models.utils")
    B, L, D = 3, 16, 5
    torch.manual_seed(0)
    kept, hidden = lightly.random_token_mask((B, 1 + L), mask_ratio=0.75)
    torch.manual_seed(0)
    ids_keep, ids_restore, mask = random_masking(B, L, 4, noise=torch.rand(B, 1 + L)[:, 1:])
    assert torch.equal(kept[:, 1:] - 1, ids_keep) and (mask.gather(1, hidden - 1) == 1).all()
    x, token = draw(B, L, D).cpu(), draw(D, seed=1).cpu()
    assert torch.equal(lightly.get_at_index(x, ids_keep), gather_tokens(x, ids_keep))
    restored = restore_tokens(gather_tokens(x, ids_keep), ids_restore, token, torch.zeros(L, D, dtype=torch.float64))
    assert torch.equal(lightly.mask_at_index(x, hidden - 1, token.view(1, 1, D)), restored)
    images, pred = pixels(B, 16, 16, torch.float64).cpu(), draw(B, L, 48).cpu()
    target = lightly.get_at_index(lightly.patchify(images, 4), hidden - 1)
    torch.testing.assert_close(masked_patch_mse(pred, images, mask, 4, normalize=False),
                               (lightly.get_at_index(pred, hidden - 1) - target).square().mean(), **EXACT)


# -------- The machine code, which needs no GPU -------------------------------------------------------------------------------

def test_machine_code():
    """For A100 and H100: nothing is spilled, shared memory suffices, and where numbers are only moved or scaled, 16 bytes move
    at a time."""
    pytest.importorskip("triton")
    from aot import SHARED_LIMIT, Spec, compile_ahead
    specs = []
    for arch in (80, 90):
        def add(kernel, types, constants, warps=4):
            signature = dict(zip(types.split()[::2], types.split()[1::2]))
            aligned = tuple(name for name, kind in signature.items() if kind[0] == "*" or name.endswith("stride"))
            specs.append(Spec("kernels.mae_mask", kernel, signature, constants, arch, warps, aligned=aligned))

        for kind in ("*bf16", "*fp32"):
            tile = {"D": 768, "ROWS": 16, "COLS": 256}
            add("take_kernel", f"x {kind} ids *i64 out {kind} N i32 K i32 x_stride i32", {"token": None, "pos": None, **tile})
            add("take_kernel", f"x {kind} ids *i64 token {kind} pos {kind} out {kind} N i32 K i32 x_stride i32", tile)
            add("take_backward_kernel", f"grad {kind} ids *i64 dx {kind} dtoken *fp32 N i32 K i32 g_stride i32", tile)
            add("finish_kernel", f"x {kind} factor *fp32", {"N": 196 * 768, "BLOCK": 4096})
        add("masking_kernel", "noise *fp32 ids_keep *i64 ids_restore *i64 mask *fp32 L i32 keep i32",
            {"ROWS": 64, "COLS": 16}, 2)
        for patch, warps in ((4, 1), (16, 4)):
            add("patch_mse_kernel",
                "pred *bf16 images *u8 mask *fp32 gain *fp32 losses *fp32 dpred *bf16 H i32 W i32 pred_stride i32",
                {"PATCH": patch, "BLOCK": 64 if patch == 4 else 1024, "NORMALIZE": True}, warps)
    for spec, report in zip(specs, compile_ahead(specs)):
        assert report.stack == 0 and report.shared <= SHARED_LIMIT[spec.arch], spec
        if spec.kernel in ("take_kernel", "take_backward_kernel", "finish_kernel"):
            assert report.count("LDG.128") > 0 and report.count("STG.128") > 0, spec
