"""Fused kernels: InfoNCE (infonce.py), Sinkhorn (sinkhorn.py) and MAE masking (mae_mask.py).

Each file is complete by itself: formulas, a PyTorch reference, the Triton kernels and the functions
to call. bench.py measures them. The other files are plain PyTorch. What every batch passes through:
readers.py (stored images), views.py (random views, in batches on the device) and collectives.py
(sums over processes, with exact gradients). Videos: clips.py, movers.py and video_files.py. Folders
of images and videos: folders.py. The rest: maps.py (the feature maps inside a network), kmeans.py,
cost.py (operations of a network and of a training) and provenance.py (versions and machine).

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
