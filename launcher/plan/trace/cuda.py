"""CUDA's choice of kernels and its autocast lists, for fake tensors that torch takes to be on a CPU.

Fake tensors on a CUDA device need a build of torch for CUDA; these do not. What is changed is what torch
chooses by the device of a tensor: the kernel of attention, the operator of dropout, and which operators run
in which type under autocast. The changes hold for the whole process.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: Keeps the registrations alive.
_LIBRARIES: list[torch.library.Library] = []

#: Operators that CUDA's autocast runs in fp32, and where it asks them for an fp32 result: torch's page "CUDA
#: Ops that can autocast to float32". Those that run in 16 bits are the same ones on a CPU.
_IN_FP32 = (
    "acos asin binary_cross_entropy_with_logits cosh cosine_similarity erfinv exp expm1 group_norm kl_div "
    "l1_loss layer_norm log log10 log1p log2 logsumexp mse_loss native_layer_norm nll_loss nll_loss2d "
    "nll_loss_nd pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal rms_norm rsqrt sinh "
    "smooth_l1_loss soft_margin_loss softplus tan triplet_margin_loss"
)
_RESULT_IN_FP32 = "cumprod cumsum log_softmax.int prod prod.dim_int softmax.int sum sum.dim_IntList"


def choose_as_cuda() -> None:
    """Let torch choose for CPU tensors what it would choose for CUDA tensors."""
    library = torch.library.Library("aten", "IMPL")
    _LIBRARIES.append(library)
    for key in ("AutogradCPU", "CPU"):
        library.impl("scaled_dot_product_attention", _attention, key, allow_override=True)
        library.impl("dropout", _dropout, key, allow_override=True)
    for name in _IN_FP32.split():
        library.impl(name, _in_fp32(_overload(name)), "AutocastCPU", allow_override=True)
    for name in _RESULT_IN_FP32.split():
        library.impl(name, _result_in_fp32(_overload(name)), "AutocastCPU", allow_override=True)


def _overload(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(aten, base), overload or "default")


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The flash kernel for 16-bit types without a mask, else the memory-efficient one.

    torch tries them in this order (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    flash = attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    if enable_gqa and not flash and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    if flash:
        return _unpadded(query, key, value, dropout_p, is_causal, scale)
    if attn_mask is not None:
        attn_mask = _as_bias(attn_mask, query, key)
    record = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    kernel = aten._scaled_dot_product_efficient_attention
    out: Tensor = kernel(query, key, value, attn_mask, record, dropout_p, is_causal, scale=scale)[0]
    return out


def _unpadded(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Flash attention; heads are padded to a multiple of 8 for it."""
    size = query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    if size % 8:
        query, key, value = (torch.nn.functional.pad(t, (0, 8 - size % 8)) for t in (query, key, value))
    kernel = aten._scaled_dot_product_flash_attention
    out: Tensor = kernel(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return out[..., :size]


def _as_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the kernel takes it: in the type of the queries, rows aligned to 16 elements."""
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=query.dtype)
        mask = bias.masked_fill_(mask.logical_not(), -torch.inf)
    length = mask.shape[-1]
    if length % 16:
        mask = torch.nn.functional.pad(mask, (0, 16 - length % 16))[..., :length]
    return mask.expand(*query.shape[:-1], key.shape[-2])


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """Dropout that keeps a mask of bytes, as the fused kernel does."""
    if not train or p == 0:
        return aten.alias(tensor)  # type: ignore[no-any-return]
    out: Tensor = aten.native_dropout(tensor, p, True)[0]
    return out


def _to_fp32(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_to_fp32(item) for item in value]
    narrow = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.to(torch.float32) if narrow else value


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _in_fp32(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return op(*map(_to_fp32, args), **{name: _to_fp32(value) for name, value in kwargs.items()})

    return kernel


def _result_in_fp32(op: Any) -> Callable[..., Any]:
    def kernel(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = kwargs.get("dtype") is not None or any(isinstance(arg, torch.dtype) for arg in args)
        if tensor.is_floating_point() and not chosen:
            kwargs["dtype"] = torch.float32
        with _without_autocast():
            return op(tensor, *args, **kwargs)

    return kernel


def workspaces() -> dict[Any, Callable[..., int]]:
    """Operator -> bytes that its CUDA kernel takes while it runs, which no trace sees.

    Not checked against torch's sources of this version, nor against a GPU. Flash attention's backward pass
    sums the gradient of the queries in fp32, with lengths rounded up to 128 and heads to 32, beside one
    number a query (flash_attn/flash_api.cpp, mha_bwd). The memory-efficient one does so in 16 bits, and has
    one number a query (attention_backward.cu).
    """

    def flash(args: Any, kwargs: Any, out: Any) -> int:
        query = args[1]
        batch, heads, length, size = query.shape
        rounded = batch * heads * _up(length, 128)
        return int(rounded * (_up(size, 32) + 1) * 4)

    def efficient(args: Any, kwargs: Any, out: Any) -> int:
        query = args[1]
        batch, heads, length, size = query.shape
        summed = _up(size, 32) if query.dtype != torch.float32 else 0
        return int(batch * heads * _up(length, 64) * (summed + 1) * 4)

    return {
        aten._scaled_dot_product_flash_attention_backward.default: flash,
        aten._scaled_dot_product_efficient_attention_backward.default: efficient,
    }


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
