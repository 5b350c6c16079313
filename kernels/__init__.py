"""Fused kernels: InfoNCE (infonce.py), Sinkhorn (sinkhorn.py) and MAE masking (mae_mask.py).

Each file is complete by itself: formulas, a PyTorch reference, the Triton kernels and the functions
to call. bench.py measures them. The other files are plain PyTorch:

    readers.py       stored images                 views.py        random views, on the device
    folders.py       folders of images and videos  collectives.py  sums over all processes
    clips.py         videos in memory              video_files.py  videos in files
    movers.py        the film movers, rendered     propagation.py  masks carried along a video
    maps.py          maps inside a network         kmeans.py       k-means features of patches
    cost.py          operations of a training      provenance.py   versions and machine of a number

To learn Triton read masking_kernel (mae_mask.py), then rows_kernel (sinkhorn.py), then
lse_kernel_simple (infonce.py), then lse_kernel (infonce.py).
"""


def implementation(device, width=0):
    """Which implementation runs for tensors on this torch.device, in words, for a training script
    to print. width: the number of columns of the embeddings that InfoNCE is given."""
    if device.type != "cuda":
        return "PyTorch path (Triton kernels need a CUDA device)"
    if width > 256:
        return f"PyTorch path (the Triton kernels are for up to 256 dimensions, not {width})"
    try:
        import triton
    except ImportError:
        return "PyTorch path (triton is not installed)"
    return f"Triton {triton.__version__} kernels"
