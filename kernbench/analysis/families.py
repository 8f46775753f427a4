"""What kind of work a kernel or an operator does, told from its name. Every pattern stands in this file."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

from kernbench.analysis.memo import once_per_trace
from kernbench.traces.nesting import ANNOTATION, OP, Bools, Ints
from kernbench.traces.trace import COPY, KERNEL, Trace

MATMUL = "matrix product"
ATTENTION = "attention"
NORMALISATION = "normalisation and softmax"
ELEMENTWISE = "elementwise"
REDUCTION = "reduction"
INDEXING = "indexing and embedding"
OPTIMIZER = "optimizer"
COMMUNICATION = "communication"
COPIES = "copy"
VIEWS = "views and allocation"
ENGINE = "autograd engine"
OTHER = "other"

# In order of precedence where streams overlap: time that computing covers is not counted as a copy's.
FAMILIES = (
    MATMUL,
    ATTENTION,
    OPTIMIZER,
    NORMALISATION,
    REDUCTION,
    INDEXING,
    ELEMENTWISE,
    OTHER,
    VIEWS,
    ENGINE,
    COMMUNICATION,
    COPIES,
)

# The first pattern found anywhere in the lower-case name decides. Libraries name their matrix products after the tile
# (nvjet and xmma: cuBLAS; Cijk: rocBLAS), inductor names its kernels triton_poi (pointwise), _red, _per (reductions).
KERNEL_PATTERNS = (
    (COMMUNICATION, r"nccl|rccl|all_?reduce|all_?gather|reduce_?scatter|nvshmem"),
    (ATTENTION, r"flash|fmha|attention|attn|sdpa"),
    (
        MATMUL,
        r"gemm|gemv|cutlass|cublas|xmma|nvjet|cijk_|matmul|splitkreduce|conv(?!ert)|wgrad|dgrad|winograd|_mm_|dot_kernel",
    ),
    (OPTIMIZER, r"adam|lamb(?!da)|lion_|muon|fusedoptimizer|sgd"),
    (NORMALISATION, r"layer_?norm|rms_?norm|batch_?norm|group_?norm|bn_[fb]w|softmax"),
    (INDEXING, r"index|gather|scatter|embedding|sort|radix|scan|nonzero|topk|unique|masked_select"),
    (REDUCTION, r"reduce|triton_(red|per)_|argmax|lpnorm|cross_?entropy|nll_loss"),
    (COPIES, r"direct_copy|copy_kernel|transpose|catarray|memcpy"),
    (ELEMENTWISE, r"elementwise|pointwise|triton_poi_|multi_tensor_apply|distribution|dropout|fill|rotary|rope"),
)

# The first pattern that matches the whole operator name without its namespace decides.
OPERATOR_PATTERNS = (
    (COMMUNICATION, r"all_?reduce.*|all_?gather.*|reduce_?scatter.*|record_param_comms"),
    (ATTENTION, r".*(attention|attn).*"),
    (MATMUL, r"_?(addmm|baddbmm|bmm|mm|matmul|linear|addmv|mv|dot|vdot|einsum|scaled_mm)(_.*)?|.*conv(?!ert).*"),
    (OPTIMIZER, r"_fused_(adam|sgd|adagrad).*|.*adamw.*"),
    (NORMALISATION, r".*(layer_norm|rms_norm|batch_norm|group_norm|softmax).*"),
    (INDEXING, r"_?(index|gather|scatter|embedding|take|sort|argsort|topk|nonzero|unique|masked_s|searchsorted).*"),
    (REDUCTION, r"(sum|mean|var|std|norm|linalg.*norm|amax|amin|max|min|argmax|argmin|all|any|prod|logsumexp)(_.*)?"),
    (REDUCTION, r"(cum(sum|prod)|nll_loss|cross_entropy|mse_loss|_foreach_norm).*"),
    (COPIES, r"(copy_|_to_copy|clone|cat|stack|repeat|repeat_interleave|_local_scalar_dense)"),
)

# Operators that give the device nothing to do: views, metadata, and allocation without a fill.
_NO_LAUNCH = """
    alias as_strided as_strided_ broadcast_tensors broadcast_to chunk conj contiguous detach detach_ diagonal empty
    empty_like empty_permuted empty_strided expand expand_as flatten imag is_nonzero is_pinned item lift lift_fresh
    movedim narrow new_empty new_empty_strided permute pin_memory positive real record_stream requires_grad_
    reshape resize_ resolve_conj resolve_neg result_type select set_ set_data slice split split_with_sizes squeeze
    squeeze_ swapaxes swapdims t t_ tensor_split to transpose transpose_ type_as unbind unflatten unfold unsafe_chunk
    unsafe_split unsqueeze unsqueeze_ view view_as view_as_complex view_as_real _conj _debug_has_internal_overlap
    _has_compatible_shallow_copy_type _reshape_alias _unsafe_view can_cast is_floating_point is_same_size
"""
NO_LAUNCH = frozenset(f"aten::{name}" for name in _NO_LAUNCH.split())

_OPTIMIZER_SCOPE = re.compile(r"Optimizer\.step#")
_BACKWARD_NODE = re.compile(r"Backward\d*$")
_KERNELS = tuple((family, re.compile(pattern)) for family, pattern in KERNEL_PATTERNS)
_OPERATORS = tuple((family, re.compile(pattern)) for family, pattern in OPERATOR_PATTERNS)


def of_kernel(name: str) -> str:
    """The family of a device kernel; "other" where no pattern knows it."""
    lowered = name.lower()
    return next((family for family, pattern in _KERNELS if pattern.search(lowered)), OTHER)


def of_operator(name: str) -> str:
    """The family of a host operator. What no pattern knows is elementwise if it is ATen's, else "other"."""
    namespace, _, bare = name.rpartition("::")
    if namespace.startswith(("autograd", "torch::autograd")) or _BACKWARD_NODE.search(name):
        return ENGINE
    if namespace == "c10d":
        return COMMUNICATION
    if f"aten::{bare}" in NO_LAUNCH:
        return VIEWS
    family = next((family for family, pattern in _OPERATORS if pattern.fullmatch(bare.lower())), None)
    return family or (ELEMENTWISE if namespace == "aten" else OTHER)


@once_per_trace
def in_optimizer(trace: Trace) -> Bools:
    """Which host rows run inside an optimizer's step, by torch.optim's own annotation."""
    host = trace.host
    inside = np.zeros(len(host) + 1, bool)  # the last entry answers for row -1
    scope = trace.named(_OPTIMIZER_SCOPE)[host.name]
    for row in np.flatnonzero(host.kind == ANNOTATION).tolist():
        inside[row] = scope[row] or inside[host.annotation[row]]
    return inside[host.annotation]


@once_per_trace
def of_host(trace: Trace) -> Ints:
    """Position in ``FAMILIES`` for each host row; operators in an optimizer's step are the optimizer's."""
    by_name = np.array([FAMILIES.index(of_operator(name)) for name in trace.names], np.int64)
    family = by_name[trace.host.name]
    return np.where(in_optimizer(trace) & (trace.host.kind == OP), FAMILIES.index(OPTIMIZER), family)


@once_per_trace
def of_device(trace: Trace) -> Ints:
    """Position in ``FAMILIES`` for each device event.

    A kernel launched in an optimizer's step is the optimizer's. One whose name tells nothing takes the family of the
    operator that launched it.
    """
    device = trace.device
    by_name = np.array([FAMILIES.index(of_kernel(name)) for name in trace.names], np.int64)
    kernel = device.kind == KERNEL
    family = np.where(kernel, by_name[device.name], FAMILIES.index(COPIES))
    if not len(trace.host):
        return family
    launched = device.op >= 0
    vague = kernel & launched & (family == FAMILIES.index(OTHER))
    family = np.where(vague, of_host(trace)[device.op], family)
    stepping = kernel & (device.call >= 0) & in_optimizer(trace)[device.call]
    return np.where(stepping, FAMILIES.index(OPTIMIZER), family)


def kind_of_device(kind: int) -> Literal["kernel", "copy", "memset"]:
    """A device event's kind in the words of the record."""
    return "kernel" if kind == KERNEL else "copy" if kind == COPY else "memset"
