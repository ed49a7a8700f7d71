"""Liger's fused cross-entropy against our own, in Triton's interpreter: run by test_kernels in an environment that has both packages."""

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
import torch  # noqa: E402

from llava_nb.fast.cross_entropy import LOSS_KERNELS, check_loss_kernel, linear_cross_entropy  # noqa: E402

assert not check_loss_kernel("liger", "cpu", torch.float32, tolerance=1e-5)
assert "cannot leave row 499" in check_loss_kernel("liger", "cpu", torch.float32, masked=True)
generator = torch.Generator().manual_seed(0)
for bias, frozen, alike in itertools.product((False, True), (False, True), (False, True)):
    found = {}
    made = [torch.randn(shape, generator=generator) for shape in ((150, 48), (320, 48), (320,))]
    targets, weights = (
        torch.randint(0, 300, (150,), generator=generator),
        torch.full((150,), 1 / 15_000) if alike else torch.rand(150, generator=generator) * 1e-4,
    )
    for kernel in LOSS_KERNELS:
        hidden, head, b = (t.clone().requires_grad_() for t in made)
        head.requires_grad_(not frozen)
        b.requires_grad_(not frozen)
        loss = 3 * linear_cross_entropy(
            hidden, head, b if bias else None, targets, weights, 300, 300, kernel
        )  # 20 spare rows
        loss.backward()
        with torch.no_grad():
            assert torch.isclose(
                loss, 3 * linear_cross_entropy(hidden, head, b if bias else None, targets, weights, 300, 300, kernel)
            )
        assert (head.grad is None) == frozen and (b.grad is None) == (frozen or not bias)
        found[kernel] = [loss.detach()] + [t.grad for t in (hidden, head, b) if t.grad is not None]
        empty = linear_cross_entropy(hidden[:0], head, None, targets[:0], weights[:0], 300, 300, kernel)
        empty.backward()
        assert empty == 0
    for a, c in zip(*found.values()):
        assert torch.allclose(a, c, rtol=1e-4, atol=1e-9), (bias, frozen, alike)
print("agrees")
