"""Training on a GPU: low precision, fused and capturable optimizers, a whole step in a CUDA graph."""

from __future__ import annotations

import compiled_process
import gpu_jobs
import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("job", gpu_jobs.JOBS)
def test_on_a_gpu(job: str) -> None:
    done = compiled_process.run(gpu_jobs.__file__, job)
    if done.returncode == gpu_jobs.NO_KERNELS:
        pytest.skip(f"no CUDA kernels: {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
