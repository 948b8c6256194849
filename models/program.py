"""Refuse an artifact whose program calls what no network needs, before torch sees it.

TorchScript is a language, and some of its operators reach beyond tensors: `torch.save` and `torch.from_file` write
files. Default arguments and `__setstate__` run while torch loads a file, so the text of the program is searched, and
before that. What is searched for does not depend on understanding the text as torch's parser does: an operator can be
called by its name alone, so each word that is the name of an operator has to be one of `ALLOWED`, wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path

import torch

from streamd.errors import ModelError

# Operators that compute: their results depend on their arguments alone. Those that give memory as it is (`empty`), take
# pointers or files, change what is shared in the process, or trust indices (`_unsafe_...`, sparse) are not here. A name
# in place, with "_" at its end, counts as the name.
_COMPUTE = """
abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d add addbmm addcdiv addcmul addmm addmv addr affine_grid_generator alias all
amax amin aminmax angle any append arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort
argwhere as_strided as_tensor asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d
avg_pool3d baddbmm batch_norm bilinear bin bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or
bitwise_right_shift bitwise_xor block_diag bmm Bool broadcast_tensors broadcast_to bucketize capitalize
cartesian_prod cat cdist ceil celu center channel_shuffle chr chunk clamp clamp_max clamp_min clear clip clone
col2im column_stack Complex complex ComplexImplicit concat concatenate conj constant_pad_nd contiguous conv1d conv2d
conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution copy copysign cos cosh
cosine_similarity count count_nonzero cross cummax cummin cumprod cumsum data deform_conv2d deg2rad degrees Delete
detach det device diag diag_embed diagflat diagonal dict diff dim dist div divide divmod dot dropout dstack dtype
einsum elu embedding EnumName EnumValue endswith eq equal erf erfc erfinv exp exp2 expand expand_as expm1 extend eye
fabs factorial feature_dropout fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_irfft fft_irfft2
fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill fill_diagonal find fix flatten flip fliplr flipud Float float_power
FloatImplicit floor floor_divide floordiv fmax fmin fmod format frac frexp frobenius_norm full full_like gather gcd
ge gelu get glu grad greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gru_cell gt
hamming_window hann_window hardshrink hardsigmoid hardswish hardtanh heaviside hex hstack hypot IfThenElse im2col
imag index index_add index_copy index_fill index_put index_select indices inner insert instance_norm Int IntImplicit
inverse is_complex is_contiguous is_cpu is_cuda is_floating_point is_grad_enabled is_inference is_meta is_mkldnn
is_mps is_nested is_nonzero is_pinned is_quantized is_scripting is_signed is_sparse isalnum isalpha isclose isdigit
isfinite isin isinf islower isnan isneginf isposinf isreal isspace isupper item items itemsize join keys kron
kthvalue layer_norm layout lcm ldexp le leaky_relu len lerp less less_equal lgamma linalg_cross linalg_det
linalg_eigh linalg_inv linalg_matmul linalg_matrix_norm linalg_norm linalg_solve linalg_vector_norm linear linspace
list ljust log log10 log1p log2 log_sigmoid log_softmax logaddexp logcumsumexp logical_and logical_not logical_or
logical_xor logit logspace logsumexp lower lstm lstm_cell lstrip lt masked_fill masked_scatter masked_select
mathremainder matmul matrix_exp max max_pool1d max_pool2d max_pool3d maximum mean median meshgrid mH min minimum
mish mm mode modf moveaxis movedim msort mT mul multiply mv name nan_to_num nanmean nanmedian nansum narrow
native_batch_norm native_group_norm native_layer_norm nbytes ne neg negative new_full new_ones new_zeros nms nonzero
nonzero_numpy norm not_equal NumToTensor numel numpy_T oct one_hot ones ones_like ord outer pad pad_sequence
pairwise_distance partition percentFormat permute pin_memory pixel_shuffle pixel_unshuffle polar pool_levels pop
popitem positive pow prelu prod ps_roi_align ps_roi_pool quantile rad2deg radians RaiseException rand rand_like
randint randint_like randn randn_like randperm range rangelist ravel real reciprocal reflection_pad1d
reflection_pad2d reflection_pad3d relu relu6 remainder remove renorm repeat repeat_interleave replace
replication_pad1d replication_pad2d replication_pad3d requires_grad reshape reshape_as reverse rfind rjust rms_norm
roi_align roi_pool roll rot90 round rsplit rsqrt rstrip rsub scalar_tensor ScalarImplicit
scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select select_scatter selu setdefault
sgn sigmoid sign signbit silu sin sinc sinh Size size slice slice_scatter softmax softplus softshrink sort sorted
special_expit special_erf special_log_softmax special_softmax split split_with_sizes splitlines sqrt square squeeze
stack startswith std std_mean storage_offset str stride StringIndex strip sub subtract sum swapaxes swapdims t take
take_along_dim tan tanh tensor tensor_split tensordot threshold tile title to tolist topk trace transpose tril
tril_indices triu triu_indices true_divide trunc TupleIndex TupleUnpack type type_as unbind unchecked_cast
unchecked_unwrap_optional unflatten unfold Uninitialized unique_consecutive unsqueeze update upper
upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_trilinear3d values var var_mean view view_as vstack warn where xlogy zero zeros zeros_like zfill __and__
__contains__ __derive_index __getitem__ __interpolate __is__ __isnot__ __lshift__ __not__ __or__ __range_length
__rshift__ __upsample __upsample_bilinear __upsample_nearest __xor__ _convolution _convolution_mode _list_to_tensor
_set_item _shape_as_tensor _softmax _log_softmax _tensor_to_list _unique _unique2 _unwrap_optional
_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _weight_norm
"""
ALLOWED = frozenset(_COMPUTE.split())
_NAMESPACES = ("aten", "prim", "streamd", "torchvision")  # that a program may name after `ops.`

_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_CLASS_PATH = re.compile(r"\b__torch__(?:\.\w+)*", re.ASCII)  # names the program's own classes and functions
_FOREIGN_CLASS = re.compile(r"__torch__(?:\.torch(?:\.classes\b.*)?)?", re.ASCII)  # whole, or what begins with these
_FOREIGN_OPS = re.compile(rf"(?<![\w.])ops\b(?!\.(?:{'|'.join(_NAMESPACES)})\.\w)", re.ASCII)
_SIMPLE_GETATTR = re.compile(r'\bgetattr\([^()"\'\\]*, "\w*"\)', re.ASCII)
_NOT_CALLED = frozenset(("print", "getattr"))  # of the language, not operators: print writes what it likes to the log


def check(code: str, path: Path) -> None:
    """Raise ModelError where the TorchScript of an artifact names an operator that is not allowed."""
    foreign = [found[0] for found in _CLASS_PATH.finditer(code) if _FOREIGN_CLASS.fullmatch(found[0])]
    foreign += [code[found.start() : found.start() + 40].split("(")[0] for found in _FOREIGN_OPS.finditer(code)]
    code = _CLASS_PATH.sub("", code)
    while _SIMPLE_GETATTR.search(code):  # self.layers of numbered names; a nested one becomes simple in its turn
        code = _SIMPLE_GETATTR.sub(lambda found: found[0][len("getattr(") : -1].replace('"', " "), code)
    words = set(_WORD.findall(code))
    for word in sorted(words & (_operators() | _NOT_CALLED)):
        foreign += [word] if not {word, word.removesuffix("_")} & ALLOWED else []
    if foreign:
        raise ModelError(
            f"{path}: refused: its program names {', '.join(foreign[:5])}, which is not among the operators that a "
            "model may call (models/program.py lists them); make the network of those, and export it again"
        )


def _operators() -> Set[str]:
    """Name all operators that torch has in the namespaces above, without these."""
    spaces = {f"{space}::" for space in _NAMESPACES}
    named = (schema.name.partition("::") for schema in torch._C._jit_get_all_schemas())
    return {name for space, separator, name in named if space + separator in spaces}
