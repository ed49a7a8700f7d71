"""GPU kernels of packed attention, stood in for on a CPU: their own interfaces run, torch's or flash-attn's, over dense arithmetic in place of CUDA."""

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from unittest import mock

import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.attention.varlen as varlen
from torch.nn.attention.varlen import varlen_attn

import llava_nb.fast.attention as attention

CALLS = Counter()  # of the dense kernels, by name


def _records(
    q, k, v, cum_q, cum_k, max_q, max_k, causal: bool, scale: float | None, left: int, right: int
) -> Iterator[tuple]:
    """A slice of each record, its q, k, v as float32 [heads, T, d] with as many heads of keys as of queries, and the scores [heads, T, T].
    The window is the kernel's: `left` keys before a query's own, -1 for all."""
    assert (
        right == 0
        and causal == (left == -1)
        and cum_q.dtype == torch.int32
        and torch.equal(cum_q, cum_k)
        and q.ndim == k.ndim == v.ndim == 3
    )
    ends = cum_q.tolist()
    parts = [slice(a, b) for a, b in zip(ends, ends[1:])]
    assert ends[0] == 0 and ends[-1] == len(q) and max_q == max_k == max(p.stop - p.start for p in parts)
    for part in parts:
        a, b, c = (t[part].transpose(0, 1).float() for t in (q, k, v))
        b, c = (t.repeat_interleave(len(a) // len(b), 0) for t in (b, c))
        scores = a @ b.transpose(1, 2) * (a.shape[-1] ** -0.5 if scale is None else scale)
        seen = torch.ones_like(scores[0], dtype=torch.bool).tril().triu(-left if left >= 0 else -len(scores[0]))
        yield part, a, b, c, scores.masked_fill(~seen, float("-inf"))


def _forward(
    q,
    k,
    v,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout,
    causal,
    debug,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    **others,
):
    CALLS["forward"] += 1
    assert dropout == 0.0 and not any(x is not None for x in others.values())
    if window_size_left >= 0:
        CALLS["windowed"] += 1
    out, sums = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for part, a, b, c, scores in _records(
        q, k, v, cum_q, cum_k, max_q, max_k, causal, scale, window_size_left, window_size_right
    ):
        out[part], sums[:, part] = (scores.softmax(-1) @ c).transpose(0, 1).to(q.dtype), scores.logsumexp(-1)
    return out, sums, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def _backward(
    grad,
    q,
    k,
    v,
    out,
    sums,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout,
    causal,
    state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    CALLS["backward"] += 1
    grads = [torch.empty_like(t) for t in (q, k, v)]
    for part, a, b, c, scores in _records(
        q, k, v, cum_q, cum_k, max_q, max_k, causal, scale, window_size_left, window_size_right
    ):
        seen, g = (scores - sums[:, part, None]).exp(), grad[part].transpose(0, 1).float()
        of_scores = (
            seen
            * (g @ c.transpose(1, 2) - (g * out[part].transpose(0, 1).float()).sum(-1, keepdim=True))
            * (a.shape[-1] ** -0.5 if scale is None else scale)
        )
        for t, found in zip(
            grads, (of_scores @ b, of_scores.transpose(1, 2) @ a, seen.transpose(1, 2) @ g)
        ):  # heads that share keys add up
            t[part] = found.unflatten(0, (t.shape[1], -1)).sum(1).transpose(0, 1).to(t.dtype)
    return tuple(grads)


def _package():
    """`flash_attn`, as far as the kit calls it: the signature is that of flash-attn 2.8, `flash_attn/flash_attn_interface.py`."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        window = (window_size[0], 0) if causal else window_size
        return varlen_attn(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            scale=softmax_scale,
            window_size=window,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func, package.__spec__ = flash_attn_varlen_func, ModuleSpec("flash_attn", None)
    return package


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """`varlen_attn` with the signature of torch 2.11, which has no `enable_gqa`: its kernel takes fewer heads of keys without being told."""
    assert return_aux is None
    return varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_size=window_size,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def of_torch_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """`varlen_attn` with the signature of torch 2.13, which refuses fewer heads of keys unless it is told."""
    assert return_aux is seqused_k is block_table is num_splits is None
    return varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=enable_gqa
    )


VERSIONS = {"2.11": of_torch_2_11, "2.13": of_torch_2_13}


@contextlib.contextmanager
def torch_version(name: str) -> Iterator[None]:
    """torch's variable-length attention as another version offers it."""
    with mock.patch.object(varlen, "varlen_attn", VERSIONS[name]):
        yield


@contextlib.contextmanager
def stood_in() -> Iterator[None]:
    """`varlen`, `flash` and `flex` run here, forward and backward. FlexAttention goes through the compiler's front end; torch's own dense fallback is its kernel."""
    library, compiled = torch.library.Library("aten", "IMPL"), {}
    library.impl("_flash_attention_forward", _forward, "CPU")
    library.impl("_flash_attention_backward", _backward, "CPU")

    def front_end(function):
        return compiled.setdefault(function, torch.compile(function, dynamic=True, backend="aot_eager"))

    sys.modules["flash_attn"] = _package()
    try:
        with (
            mock.patch.object(flex, "_validate_device", lambda *given: None),
            mock.patch.object(attention, "_compiled", front_end),
        ):
            yield
    finally:
        del sys.modules["flash_attn"]
        library._destroy()
