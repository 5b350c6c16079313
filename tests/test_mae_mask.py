"""kernels/mae_mask.py: masking, gathering, restoring and the loss, by PyTorch and by Triton.

Both are compared with the formulas of the official code; Triton is interpreted where there is no
GPU. Then autograd and torch.compile, and the machine code.
"""

import math

import pytest
import torch
from torch import library

import kernels.mae_mask as mm
from kernels.mae_mask import gather_tokens, masked_patch_mse, random_masking, restore_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = {"rtol": 0, "atol": 1e-12}  # float64: some roundings of 1e-16 at numbers up to a hundred

F64 = torch.float64
F32 = torch.float32
F16 = torch.float16
BF16 = torch.bfloat16
U8 = torch.uint8
ROUNDING = {F32: 2**-24, F16: 2**-11, BF16: 2**-8}  # relative: half a unit in the last place


@pytest.fixture(params=["pytorch", "triton"])
def way(request, monkeypatch):
    """Runs a test with each implementation; float64 is always computed by PyTorch."""
    if request.param == "triton":
        pytest.importorskip("triton")

    def use_kernel(*tensors):
        given = [t for t in tensors if t is not None]
        return request.param == "triton" and all(t.dtype != F64 for t in given)

    monkeypatch.setattr(mm, "use_kernel", use_kernel)
    return request.param


def thorough(*values):
    """A parameter set that repeats what others test already."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def rounds_once(way, dtype):
    """Relative error of storing in dtype.

    Triton's interpreter truncates to bfloat16 where a GPU rounds."""
    truncates = (way, dtype, DEVICE.type) == ("triton", BF16, "cpu")
    return ROUNDING[dtype] * (2 if truncates else 1)


def draw(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype).to(DEVICE)


def pixels(B, H, W, dtype=U8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (B, 3, H, W), generator=generator, dtype=U8).to(DEVICE)
    return x if dtype == U8 else (x / 255).to(dtype)


def noise(B, L, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, L, generator=generator).to(DEVICE)


def official_masking(noise, keep):
    """random_masking of models_mae.py. Its sort is not stable, which leaves equal noise open."""
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(1)
    mask = torch.ones(noise.shape, device=noise.device)
    mask[:, :keep] = 0
    return order[:, :keep], restore, mask.gather(1, restore)


def official_gather(x, ids_keep):
    index = ids_keep.long()[:, :, None].expand(-1, -1, x.shape[2])
    return x.gather(1, index)


def official_restore(x, ids_restore, mask_token, pos):
    """forward_decoder, for the tokens without the class token."""
    missing = ids_restore.shape[1] - x.shape[1]
    hidden = mask_token.expand(len(x), missing, -1)
    return official_gather(torch.cat([x, hidden], 1), ids_restore) + pos


def official_loss(pred, images, mask, patch, normalize=True):
    """patchify and forward_loss."""
    B, _, H, W = images.shape
    t = images.reshape(B, 3, H // patch, patch, W // patch, patch)
    t = torch.einsum("nchpwq->nhwpqc", t).reshape(pred.shape)
    if normalize:
        mean = t.mean(-1, keepdim=True)
        var = t.var(-1, keepdim=True)
        t = (t - mean) / (var + 1e-6) ** 0.5
    loss = ((pred - t) ** 2).mean(-1)
    return (loss * mask).sum() / mask.sum()


def exact_images(images):
    """What the official code is given, in float64."""
    return images.double() / 255 if images.dtype == U8 else images.double()


def gradients(function, leaves, g=None):
    """-> function(*leaves); the gradients of the leaves, where g arrives at the value."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, g)


def loss_and_gradient(function, pred, g=None):
    """-> function(pred); its gradient, where g arrives at the value."""
    loss, (grad,) = gradients(function, [pred], g)
    return loss, grad


# -------- Masking ---------------------------------------------------------------------------------


def test_masking_by_hand(way):
    x = torch.tensor([[0.3, 0.1, 0.2, 0.4], [4.0, 3.0, 2.0, 1.0]], device=DEVICE)
    ids_keep, ids_restore, mask = random_masking(2, 4, 2, noise=x)
    assert ids_keep.tolist() == [[1, 2], [3, 2]]
    assert ids_restore.tolist() == [[2, 0, 1, 3], [3, 2, 1, 0]]
    assert mask.tolist() == [[1, 0, 0, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    "B, L, keep, dtype",
    [(1, 1, 1, F32), (3, 7, 3, F64), (2, 64, 64, BF16), (2, 65, 16, F32), (3, 196, 49, F16)],
    ids=str,
)
def test_masking_is_the_official_one(way, B, L, keep, dtype):
    """In 16 bits, some of 196 numbers are equal: then the first comes first."""
    x = noise(B, L).to(dtype)
    found = random_masking(B, L, keep, noise=x)
    assert all(map(torch.equal, found, official_masking(x, keep)))

    ids_keep, ids_restore, mask = found
    assert (ids_keep.dtype, ids_restore.dtype, mask.dtype) == (torch.int64, torch.int64, F32)
    every_place = torch.arange(L, device=DEVICE).expand(B, L)
    assert torch.equal(ids_restore.sort(1)[0], every_place)
    assert (mask.sum(1) == L - keep).all() and mask.gather(1, ids_keep).sum() == 0
    assert torch.equal(ids_restore.gather(1, ids_keep), every_place[:, :keep])


@pytest.mark.parametrize("way", ["pytorch", thorough("triton")], indirect=True)
def test_masking_draws(way):
    """The same generator draws the same. Images differ. Each token is kept as often as any other:
    600 +- 20.5 of 2000 times."""

    def mask(seed):
        return random_masking(2000, 10, 3, torch.Generator().manual_seed(seed))[2]

    first = mask(0)
    assert torch.equal(first, mask(0)) and not torch.equal(first, mask(1))
    kept = (1 - first).sum(0)
    assert (kept - 600).abs().max() < 5 * math.sqrt(2000 * 0.3 * 0.7)
    assert len(first.unique(dim=0)) == math.comb(10, 3)

    torch.manual_seed(0)  # without a generator, that of torch.manual_seed is used
    _, _, default = random_masking(2000, 10, 3)
    assert torch.equal(default, first)


# -------- Gather and restore ----------------------------------------------------------------------

# B, L, K, D
TINY = (1, 1, 1, 1)
SMALL = (2, 9, 4, 5)
RAGGED = (3, 70, 20, 48)
WHOLE = (2, 17, 17, 300)


@pytest.mark.parametrize(
    "size, dtype",
    [
        *((size, F16) for size in (TINY, SMALL, RAGGED, WHOLE)),
        *((SMALL, dtype) for dtype in (F32, BF16)),
        *(thorough(size, dtype) for size in (TINY, RAGGED, WHOLE) for dtype in (F32, BF16)),
    ],
    ids=str,
)
def test_gather_is_the_official_one(way, size, dtype):
    """Numbers are only moved, also in the backward: all bits agree."""
    B, L, K, D = size
    x = draw(B, L, D, dtype=dtype)
    g = draw(B, K, D, seed=1, dtype=dtype)
    ids, _, _ = random_masking(B, L, K, noise=noise(B, L))
    want, (want_grad,) = gradients(lambda x: official_gather(x, ids), [x], g)
    for index in (ids, ids.int()):
        out, (grad,) = gradients(lambda x: gather_tokens(x, index), [x], g)
        assert torch.equal(out, want) and torch.equal(grad, want_grad)


@pytest.mark.parametrize(
    "size, dtype, pos_dtype",
    [
        *((size, BF16, F32) for size in (TINY, SMALL, RAGGED, WHOLE)),
        *((SMALL, dtype, dtype) for dtype in (F32, F16, BF16)),
        *(thorough(size, dtype, dtype) for size in (TINY, RAGGED, WHOLE) for dtype in ROUNDING),
    ],
    ids=str,
)
def test_restore_is_the_official_one(way, size, dtype, pos_dtype):
    B, L, K, D = size
    _, ids, _ = random_masking(B, L, K, noise=noise(B, L))
    leaves = [
        draw(B, K, D, dtype=dtype),
        draw(D, seed=1, dtype=dtype),
        draw(L, D, seed=2, dtype=pos_dtype),
    ]
    g = draw(B, L, D, seed=3, dtype=torch.promote_types(dtype, pos_dtype))

    def theirs(x, token, pos):
        return official_restore(x, ids, token, pos)

    exact, exact_grads = gradients(theirs, [t.double() for t in leaves], g.double())
    plain, plain_grads = gradients(theirs, leaves, g)

    for index in (ids, ids.int()):

        def ours(x, token, pos):
            return restore_tokens(x, index, token, pos)

        out, grads = gradients(ours, leaves, g)
        assert out.dtype == plain.dtype
        assert all(a.dtype == b.dtype for a, b in zip(grads, plain_grads))

        # One sum of two numbers, rounded once.
        assert ((out - exact).abs() <= rounds_once(way, out.dtype) * exact.abs()).all()
        error = (grads[0] - exact_grads[0]).abs()
        assert (error <= rounds_once(way, dtype) * exact_grads[0].abs()).all()

        # Sums of many: at most twice the error of plain PyTorch, and one rounding of the result.
        for a, b, c in zip(grads[1:], plain_grads[1:], exact_grads[1:]):
            plain_error = (b - c).abs().max()
            limit = 2 * plain_error + rounds_once(way, a.dtype) * c.abs().max()
            assert (a - c).abs().max() <= limit

    mask_token_gets_nothing = (grads[1].abs().max() == 0).item()
    assert mask_token_gets_nothing == (K == L)  # nothing is hidden


def test_restore_undoes_gather(way):
    """Kept tokens return to their places, the mask token is everywhere else; both get positions."""
    B, L, K, D = 2, 12, 5, 8
    ids_keep, ids_restore, mask = random_masking(B, L, K, noise=noise(B, L))
    x = draw(B, L, D, dtype=F32)
    token = draw(D, dtype=F32)
    pos = draw(L, D, dtype=F32)
    y = restore_tokens(gather_tokens(x, ids_keep), ids_restore, token, pos)
    hidden = mask[:, :, None] == 1
    assert torch.equal(y, torch.where(hidden, token, x) + pos)


def test_views_need_no_copy(way):
    """A class token in front is split off by slicing; other layouts are copied. The gradient
    reaches only what was taken."""
    B, L, K, D = 2, 9, 4, 16
    ids_keep, ids_restore, mask = random_masking(B, L, K, noise=noise(B, L))
    token = draw(D, seed=1, dtype=F32)
    pos = draw(L, D, seed=2, dtype=F32)

    x = draw(B, 1 + K, D, dtype=F32).requires_grad_()
    y = restore_tokens(x[:, 1:], ids_restore, token, pos)
    copy = x.detach()[:, 1:].contiguous()
    assert torch.equal(y, restore_tokens(copy, ids_restore, token, pos))
    y.sum().backward()
    assert x.grad[:, 0].abs().max() == 0 and (x.grad[:, 1:] == 1).all()

    across = draw(B, D, L, dtype=F32).transpose(1, 2)
    assert torch.equal(gather_tokens(across, ids_keep), official_gather(across, ids_keep))

    pred = draw(B, 1 + L, 12, dtype=F32)[:, 1:]
    images = pixels(B, 6, 6).transpose(2, 3)
    want = masked_patch_mse(pred.contiguous(), images.contiguous(), mask, 2)
    assert torch.equal(masked_patch_mse(pred, images, mask, 2), want)


# -------- The loss --------------------------------------------------------------------------------


def test_loss_by_hand(way):
    """Two patches of one pixel. The second, hidden one has the colours 1, 2, 3: mean 2 and unbiased
    variance 1, so -1, 0, 1 normalised."""
    images = torch.tensor([[9.0, 1.0], [9.0, 2.0], [9.0, 3.0]], device=DEVICE)
    images = images.view(1, 3, 1, 2)
    pred = torch.zeros(1, 2, 3, device=DEVICE)
    mask = torch.tensor([[0.0, 1.0]], device=DEVICE)

    loss, grad = loss_and_gradient(lambda x: masked_patch_mse(x, images, mask, 1, False), pred)
    assert loss.item() == pytest.approx((1 + 4 + 9) / 3, rel=1e-6)
    visible, hidden = grad[0].tolist()
    assert visible == [0, 0, 0]
    assert hidden == pytest.approx([-2 / 3, -4 / 3, -2], rel=1e-6)

    loss, grad = loss_and_gradient(lambda x: masked_patch_mse(x, images, mask, 1, True), pred)
    assert loss.item() == pytest.approx(2 / 3 / (1 + 1e-6), rel=3e-7)
    visible, hidden = grad[0].tolist()
    assert visible == [0, 0, 0]
    assert hidden == pytest.approx([2 / 3, 0, -2 / 3], abs=1e-6)


@pytest.mark.parametrize("B, H, W, patch", [(2, 8, 12, 4), (1, 6, 4, 2), (1, 28, 14, 14)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "dtype, images_dtype",
    [(F64, F64), (F32, U8), thorough(F32, F32), (F16, U8), (BF16, F32)],
    ids=str,
)
def test_loss_error_at_most_twice_that_of_plain(
    way, B, H, W, patch, normalize, dtype, images_dtype
):
    L = H // patch * (W // patch)
    P = 3 * patch**2
    pred = draw(B, L, P, dtype=dtype)
    images = pixels(B, H, W, images_dtype)
    _, _, mask = random_masking(B, L, max(1, L // 4), noise=noise(B, L))

    given = images / 255 if images_dtype == U8 else images  # what the official code is given
    doubles = exact_images(images)
    exact, exact_grad = loss_and_gradient(
        lambda x: official_loss(x, doubles, mask, patch, normalize), pred.double()
    )
    plain, plain_grad = loss_and_gradient(
        lambda x: official_loss(x, given, mask, patch, normalize), pred
    )
    loss, grad = loss_and_gradient(
        lambda x: masked_patch_mse(x, images, mask, patch, normalize), pred
    )
    assert loss.dtype == plain.dtype and grad.dtype == dtype
    if dtype == F64:
        torch.testing.assert_close(loss, exact, **EXACT)
        torch.testing.assert_close(grad, exact_grad, **EXACT)
        return

    # The absolute terms: the roundings of the sums, about the square root of how many numbers are
    # added; two roundings of the gradient.
    plain_error = (plain - exact).abs()
    assert (loss - exact).abs() <= 2 * plain_error + 2**-24 * math.sqrt(P) * exact
    plain_error = (plain_grad - exact_grad).norm()
    limit = 2 * plain_error + 2 * rounds_once(way, dtype) * exact_grad.norm()
    assert (grad - exact_grad).norm() <= limit
    assert (grad[mask == 0] == 0).all() and (grad[mask == 1] != 0).any()


def test_loss_of_flat_patches_is_finite(way):
    """If the variance is 0 the target is 0, thanks to the 1e-6."""
    images = torch.full((1, 3, 4, 4), 77, dtype=U8, device=DEVICE)
    mask = torch.ones(1, 4, device=DEVICE)
    pred = torch.ones(1, 4, 12, device=DEVICE)
    loss, grad = loss_and_gradient(lambda x: masked_patch_mse(x, images, mask, 2), pred)
    # The mean of 12 equal numbers is rounded, and sqrt(1e-6) divides the difference of at most two
    # units in the last place.
    assert loss.item() == pytest.approx(1, abs=2 * 2 * 2 * 2**-24 / 1e-3)
    assert grad.isfinite().all()


def test_small_gradients_keep_their_digits_in_float16(way):
    """With 49152 hidden numbers 2 / (P sum(mask)) is 4e-5: a residual multiplied by it would be
    subnormal in float16."""
    pred = draw(1, 64, 768).half()
    images = pixels(1, 128, 128)
    mask = torch.ones(1, 64, device=DEVICE)
    _, grad = loss_and_gradient(lambda x: masked_patch_mse(x, images, mask, 16) * 2**12, pred)
    doubles = exact_images(images)
    _, exact = loss_and_gradient(
        lambda x: official_loss(x, doubles, mask, 16) * 2**12, pred.double()
    )
    assert (grad - exact).norm() <= 2 * 2**-11 * exact.norm()  # two roundings


@pytest.mark.parametrize(
    "g, dtype",
    [
        (1.0, F32),
        (-0.75, F16),
        thorough(1.0, F16),
        thorough(1.0, BF16),
        thorough(-0.75, F32),
        thorough(-0.75, BF16),
    ],
    ids=str,
)
def test_gradient_that_arrives(way, g, dtype):
    """The pass of the loss writes the gradient for 1, and it is multiplied by any other g. The
    23232 numbers of a sample are the work of two programs."""
    pred = draw(2, 121, 192, dtype=dtype)
    images = pixels(2, 88, 88)
    mask = noise(2, 121).round()
    arriving = torch.tensor(g, device=DEVICE)
    _, grad = loss_and_gradient(lambda x: masked_patch_mse(x, images, mask, 8), pred, arriving)
    doubles = exact_images(images)
    _, exact = loss_and_gradient(lambda x: official_loss(x, doubles, mask, 8), pred.double())
    limit = 2 * rounds_once(way, dtype) * (g * exact).norm() + 2**-24 * exact.norm()
    assert (grad - g * exact).norm() <= limit
    assert (grad[mask == 0] == 0).all()


def test_images_are_read_where_patches_are_hidden_only(way):
    """What is visible takes no part, whatever it is."""
    pred = draw(1, 4, 12, dtype=F32)
    images = pixels(1, 4, 4, F32)
    mask = torch.eye(4, device=DEVICE)[:1]
    broken = pred.clone()
    broken[:, 1:] = 1e10
    loss, grad = loss_and_gradient(lambda x: masked_patch_mse(x, images, mask, 2), pred)
    same_loss, same = loss_and_gradient(lambda x: masked_patch_mse(x, images, mask, 2), broken)
    assert torch.equal(loss, same_loss) and torch.equal(grad, same)


def test_kernel_is_differentiated_once(way):
    """The kernel finishes its gradient in place: a second backward through the same graph is an
    error, not a wrong number."""
    pred = draw(1, 4, 12, dtype=F32).requires_grad_()
    mask = torch.ones(1, 4, device=DEVICE)
    loss = masked_patch_mse(pred, pixels(1, 4, 4), mask, 2)
    (first,) = torch.autograd.grad(3 * loss, pred, retain_graph=True)
    kept = first.clone()
    if way == "triton":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, pred)
    else:
        (again,) = torch.autograd.grad(loss, pred)
        torch.testing.assert_close(3 * again, kept)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_hide_equally_many_average_to_the_whole(world):
    """Nothing is communicated: the means over parts of the batch are the loss and gradient of the
    batch, and masks follow the noise."""
    B, L, P = 6, 9, 12
    pred = draw(B, L, P)
    images = pixels(B, 6, 6)
    u = noise(B, L)
    _, _, mask = random_masking(B, L, 2, noise=u)
    whole, whole_grad = loss_and_gradient(lambda x: masked_patch_mse(x, images, mask, 2), pred)

    losses, grads = [], []
    for part in torch.arange(B).chunk(world):
        _, _, part_mask = random_masking(len(part), L, 2, noise=u[part])
        loss, grad = loss_and_gradient(
            lambda x: masked_patch_mse(x, images[part], part_mask, 2), pred[part]
        )
        losses.append(loss)
        grads.append(grad)
    torch.testing.assert_close(sum(losses) / world, whole, **EXACT)
    torch.testing.assert_close(torch.cat(grads) / world, whole_grad, **EXACT)


# -------- Autograd, autocast, torch.compile -------------------------------------------------------


def test_gradcheck():
    B, L, K, D = 2, 6, 2, 3
    ids_keep, ids_restore, mask = random_masking(B, L, K, noise=noise(B, L))
    images = pixels(B, 4, 6, F64)
    gradcheck = torch.autograd.gradcheck

    x = draw(B, L, D).requires_grad_()
    assert gradcheck(lambda x: gather_tokens(x, ids_keep), x)

    leaves = [draw(*shape).requires_grad_() for shape in [(B, K, D), (D,), (L, D)]]
    assert gradcheck(lambda x, token, pos: restore_tokens(x, ids_restore, token, pos), leaves)

    pred = draw(B, L, 12).requires_grad_()
    for normalize in (True, False):
        assert gradcheck(lambda pred: masked_patch_mse(pred, images, mask, 2, normalize), pred)

    loss = masked_patch_mse(pred, images.requires_grad_(), mask, 2)
    assert torch.autograd.grad(loss, images, allow_unused=True) == (None,)


def step(x, token, pos, pred, images, u):
    ids_keep, ids_restore, mask = random_masking(2, 9, 3, noise=u)
    y = restore_tokens(gather_tokens(x, ids_keep), ids_restore, token, pos)
    return masked_patch_mse(pred + y.sum(2, keepdim=True), images, mask, 2)


@pytest.mark.parametrize("way", ["pytorch", thorough("triton")], indirect=True)
def test_compile_autocast_and_repetition(way):
    """The whole step is one graph; aot_eager traces all that the default backend does, without
    generating machine code. The operators compute as they do without autocast, and twice the same
    bit by bit."""
    shapes = [(2, 9, 8), (8,), (9, 8), (2, 9, 12)]
    leaves = [draw(*shape, seed=seed, dtype=F32) for seed, shape in enumerate(shapes)]
    data = (pixels(2, 6, 6), noise(2, 9))
    want, grads = gradients(lambda *leaves: step(*leaves, *data), leaves)

    def agree(function):
        out, found = gradients(lambda *leaves: function(*leaves, *data), leaves)
        return torch.equal(out, want) and all(map(torch.equal, found, grads))

    assert agree(step)
    assert agree(torch.compile(step, fullgraph=True, backend="aot_eager"))
    with torch.autocast(DEVICE.type, BF16):
        assert agree(step)


def test_operators_pass_opcheck(way):
    """The checks that PyTorch itself has for operators: schemas, fake tensors, autograd."""
    ids_keep, ids_restore, mask = random_masking(2, 4, 2, noise=noise(2, 4))

    def leaf(*shape):
        return draw(*shape, dtype=F32).requires_grad_()

    def opcheck(operator, *arguments):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        library.opcheck(operator, arguments, test_utils=tests)

    opcheck(mm.masking_op, noise(2, 4), 2)
    opcheck(mm.take_op, leaf(2, 4, 3), ids_keep, None, None, F32)
    opcheck(mm.take_op, leaf(2, 2, 3), ids_restore, leaf(3), leaf(4, 3), F32)
    opcheck(mm.mse_op, leaf(2, 4, 12), pixels(2, 4, 4), mask, 2, True)


def test_second_derivative_is_an_error(way):
    ids_keep, ids_restore, mask = random_masking(1, 4, 2, noise=noise(1, 4))
    images = pixels(1, 4, 4)
    token = draw(3, dtype=F32)
    pos = draw(4, 3, dtype=F32)

    def gather(x):
        return gather_tokens(x, ids_keep).square().sum()

    def restore(x):
        return restore_tokens(x, ids_restore, token, pos).square().sum()

    def loss(x):
        return masked_patch_mse(x, images, mask, 2)

    for function, shape in [(gather, (1, 4, 3)), (restore, (1, 2, 3)), (loss, (1, 4, 12))]:
        x = draw(*shape, dtype=F32).requires_grad_()
        (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            grad.sum().backward()


def test_bad_masking():
    with pytest.raises(ValueError, match="keep must be from 1 to tokens = 4, got 0"):
        random_masking(2, 4, 0)
    with pytest.raises(ValueError, match="got 5"):
        random_masking(2, 4, 5)
    with pytest.raises(ValueError, match=r"noise of shape \(2, 4\)"):
        random_masking(2, 4, 2, noise=noise(2, 3))
    with pytest.raises(ValueError, match="either a generator or noise"):
        random_masking(2, 4, 2, torch.Generator(), noise=noise(2, 4))
    integers = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match="noise must be one of .*, but is torch.int64"):
        random_masking(2, 4, 2, noise=integers)


def test_bad_gather():
    ids_keep, _, _ = random_masking(2, 4, 2, noise=noise(2, 4))
    x = draw(2, 4, 3)
    with pytest.raises(ValueError, match=r"ids_keep must be \(B, K\), .* but is \(1, 2\)"):
        gather_tokens(x, ids_keep[:1])
    with pytest.raises(ValueError, match=r"x must be \(B, L, D\)"):
        gather_tokens(x[0], ids_keep)
    with pytest.raises(TypeError, match="ids_keep must be one of .*, but is torch.float64"):
        gather_tokens(x, ids_keep.double())
    with pytest.raises(ValueError, match="6 tokens cannot be kept out of 4"):
        gather_tokens(x, ids_keep.repeat(1, 3))
    if DEVICE.type == "cpu":  # on a GPU the check would wait for the GPU
        message = "ids must be from 0 to 3, these are from 0 to 7"
        with pytest.raises(IndexError, match=message):
            gather_tokens(x, torch.tensor([[0, 7], [1, 2]]))


def test_bad_restore():
    _, ids_restore, _ = random_masking(2, 4, 2, noise=noise(2, 4))
    x = draw(2, 4, 3)
    token = draw(3)
    pos = draw(4, 3)
    with pytest.raises(ValueError, match="x has 4 tokens, more than the 3"):
        restore_tokens(x, ids_restore[:, :3], token, pos[:3])
    with pytest.raises(ValueError, match=r"mask_token must be \(D\)"):
        restore_tokens(x, ids_restore, token[None], pos)
    with pytest.raises(ValueError, match=r"pos must be \(L, D\)"):
        restore_tokens(x, ids_restore, token, pos[:2])
    with pytest.raises(ValueError, match="pos is on meta, but x on"):
        restore_tokens(x, ids_restore, token, pos.to("meta"))


def test_bad_loss():
    _, _, mask = random_masking(2, 4, 2, noise=noise(2, 4))
    pred = draw(2, 4, 12)
    images = pixels(2, 4, 4)
    with pytest.raises(TypeError, match="images must be one of .*, but is torch.int32"):
        masked_patch_mse(pred, images.int(), mask, 2)
    with pytest.raises(ValueError, match="patches of 3 x 3 pixels"):
        masked_patch_mse(pred, images, mask, 3)
    with pytest.raises(ValueError, match="cannot be 3 colours"):
        masked_patch_mse(pred, images[:, :1], mask, 2)


def test_lightly_agrees():
    """Its tokens include a class token, which it never hides; its prediction is of hidden patches
    alone."""
    lightly = pytest.importorskip("lightly.models.utils")
    B, L, D = 3, 16, 5
    torch.manual_seed(0)
    kept, hidden = lightly.random_token_mask((B, 1 + L), mask_ratio=0.75)
    torch.manual_seed(0)
    u = torch.rand(B, 1 + L)[:, 1:]
    ids_keep, ids_restore, mask = random_masking(B, L, 4, noise=u)
    hidden = hidden - 1
    assert torch.equal(kept[:, 1:] - 1, ids_keep) and (mask.gather(1, hidden) == 1).all()

    x = draw(B, L, D).cpu()
    token = draw(D, seed=1).cpu()
    taken = gather_tokens(x, ids_keep)
    assert torch.equal(lightly.get_at_index(x, ids_keep), taken)
    restored = restore_tokens(taken, ids_restore, token, torch.zeros(L, D, dtype=F64))
    assert torch.equal(lightly.mask_at_index(x, hidden, token.view(1, 1, D)), restored)

    images = pixels(B, 16, 16, F64).cpu()
    pred = draw(B, L, 48).cpu()
    target = lightly.get_at_index(lightly.patchify(images, 4), hidden)
    theirs = (lightly.get_at_index(pred, hidden) - target).square().mean()
    ours = masked_patch_mse(pred, images, mask, 4, normalize=False)
    torch.testing.assert_close(ours, theirs, **EXACT)


# -------- The machine code, which needs no GPU ----------------------------------------------------

TILE = {"D": 768, "ROWS": 16, "COLS": 256}
LENGTHS = {"N": "i32", "K": "i32"}


def gather_code(kind):
    """kernel, types of its arguments, constants, warps."""
    types = {"x_ptr": kind, "ids_ptr": "*i64", "out_ptr": kind, **LENGTHS, "x_stride": "i32"}
    return "take_kernel", types, {"token_ptr": None, "pos_ptr": None, **TILE}, 4


def restore_code(kind):
    types = {"x_ptr": kind, "ids_ptr": "*i64", "token_ptr": kind, "pos_ptr": kind, "out_ptr": kind}
    return "take_kernel", types | LENGTHS | {"x_stride": "i32"}, TILE, 4


def take_backward_code(kind):
    types = {"grad_ptr": kind, "ids_ptr": "*i64", "dx_ptr": kind, "dtoken_ptr": "*fp32"}
    return "take_backward_kernel", types | LENGTHS | {"g_stride": "i32"}, TILE, 4


def finish_code(kind):
    types = {"x_ptr": kind, "factor_ptr": "*fp32"}
    return "finish_kernel", types, {"N": 196 * 768, "BLOCK": 4096}, 4


def masking_code():
    types = {"noise_ptr": "*fp32", "ids_keep_ptr": "*i64", "ids_restore_ptr": "*i64"}
    types |= {"mask_ptr": "*fp32", "L": "i32", "keep": "i32"}
    return "masking_kernel", types, {"ROWS": 64, "COLS": 16}, 2


def patch_mse_code(patch, block, warps):
    types = {"pred_ptr": "*bf16", "images_ptr": "*u8", "mask_ptr": "*fp32", "gain_ptr": "*fp32"}
    types |= {"losses_ptr": "*fp32", "dpred_ptr": "*bf16", "H": "i32", "W": "i32"}
    types |= {"pred_stride": "i32"}
    return "patch_mse_kernel", types, {"PATCH": patch, "BLOCK": block, "NORMALIZE": True}, warps


ALL_CODES = [masking_code(), patch_mse_code(4, 64, 1), patch_mse_code(16, 1024, 4)]
for kind in ("*bf16", "*fp32"):
    ALL_CODES += [gather_code(kind), restore_code(kind)]
    ALL_CODES += [take_backward_code(kind), finish_code(kind)]


@pytest.mark.parametrize(
    "arch, codes",
    [
        (90, [masking_code(), restore_code("*bf16")]),
        thorough(80, ALL_CODES),
        thorough(90, ALL_CODES),
    ],
    ids=["H100, two", "A100, all", "H100, all"],
)
def test_machine_code(arch, codes):
    """Nothing is spilled, shared memory suffices, and where numbers are only moved or scaled, 16
    bytes move at a time."""
    pytest.importorskip("triton")
    from aot import SHARED_LIMIT, Spec, compile_ahead

    specs = []
    for kernel, types, constants, warps in codes:
        aligned = [name for name in types if name.endswith(("_ptr", "stride"))]
        options = {"arch": arch, "num_warps": warps, "aligned": tuple(aligned)}
        specs.append(Spec("kernels.mae_mask", kernel, types, constants, **options))
    for spec, report in zip(specs, compile_ahead(specs)):
        assert report.stack == 0 and report.shared <= SHARED_LIMIT[arch], spec
        if spec.kernel in ("take_kernel", "take_backward_kernel", "finish_kernel"):
            assert report.count("LDG.128") > 0 and report.count("STG.128") > 0, spec
