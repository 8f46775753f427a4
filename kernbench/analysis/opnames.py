"""Operators by the kind of work that they do, for counting it from shapes; names as a trace has them."""

from __future__ import annotations


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


_COMPARING = "eq ne lt le gt ge logical_and logical_or logical_xor logical_not isnan isinf isfinite isclose"
_ONE_INPUT = """
    abs neg sign reciprocal sqrt rsqrt square exp exp2 expm1 log log1p log2 log10 sin cos tan tanh sigmoid erf erfc
    floor ceil round trunc frac relu gelu silu hardtanh hardswish hardsigmoid mish elu leaky_relu softplus logit
    clamp clamp_min clamp_max bitwise_not pow nan_to_num
"""
_MORE_INPUTS = """
    add sub rsub mul div true_divide floor_divide remainder fmod atan2 maximum minimum lerp addcmul addcdiv
    bitwise_and bitwise_or bitwise_xor threshold
"""
_SELECTING = "where masked_fill"

COMPARISON = _aten(_COMPARING)
SELECTION = _aten(_SELECTING)
POINTWISE = (
    COMPARISON
    | SELECTION
    | _aten(_ONE_INPUT + _MORE_INPUTS)
    | _aten(" ".join(f"{name}_" for name in (_ONE_INPUT + _MORE_INPUTS + _COMPARING).split()) + " masked_fill_")
    | _aten("gelu_backward silu_backward sigmoid_backward tanh_backward threshold_backward hardtanh_backward")
    | _aten("elu_backward leaky_relu_backward softplus_backward hardswish_backward mish_backward")
)
FILL = _aten("fill_ zero_ uniform_ normal_ bernoulli_ exponential_ random_")
REDUCTION = _aten("sum mean amax amin max min argmax argmin prod all any norm linalg_vector_norm logsumexp var std")

PRODUCT = _aten("mm bmm mv dot")
ADDED_PRODUCT = _aten("addmm addmm_ baddbmm baddbmm_ addmv addmv_ _addmm_activation")
PRODUCT_RANKS = {(2, 2), (3, 3), (2, 1), (1, 1)}
CONVOLUTION = _aten("""
    convolution _convolution cudnn_convolution cudnn_convolution_add_relu miopen_convolution mkldnn_convolution
    thnn_conv2d _slow_conv2d_forward _conv_depthwise2d conv_depthwise3d slow_conv3d_forward convolution_overrideable
""")

SEQUENCE_FIRST = _aten("""
    _flash_attention_forward _flash_attention_backward _efficient_attention_forward _efficient_attention_backward
""")
ATTENTION = _aten("""
    _flash_attention_forward _efficient_attention_forward _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable
    _cudnn_attention_forward
""")
ATTENTION_BACKWARD = _aten("""
    _flash_attention_backward _efficient_attention_backward _scaled_dot_product_flash_attention_backward
    _scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward
    _scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_fused_attention_overrideable_backward
""")
SOFTMAX = _aten("_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data")
NORM = _aten("native_layer_norm native_group_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _fused_rms_norm")
NORM_BACKWARD = _aten("""
    native_layer_norm_backward native_group_norm_backward native_batch_norm_backward _fused_rms_norm_backward
    miopen_batch_norm_backward
""")
