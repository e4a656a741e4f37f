"""Which rule each torch function gets, and the named sets of rules.

A rule is a modified gradient (Arras et al. 2025): functions that are linear or positively homogeneous in their data keep their own;
the others are named here. What stands in no list is run with its own gradient and reported as unruled.
"""

from __future__ import annotations

from dataclasses import dataclass

from headscope.kernels.errors import SelectionError


@dataclass(frozen=True)
class RuleSet:
    """How relevance passes the operations that are not linear.

    Attributes:
        name: as `attribute(method=…)` takes it.
        source: where the rules were published.
        identity: element-wise activations pass relevance on whole, f(x)/x in place of f'(x).
        split: a product of n data-dependent factors gives each 1/n.
        frozen: normalisations and denominators are constants.
        softmax: `gradient` (Deep Taylor expansion at the scores), `stop` (attention weights are constants) or `tempered`.
        temperature: of the tempered softmax.
        positions: rotary tables and other functions of position are factors of their own, with a share of the relevance.
        gamma: of the γ rule at linear maps and convolutions; 0 is the ε rule.
        conserves: relevance is accounted for to the last digit, so that the ledger must close.
    """

    name: str
    source: str
    identity: bool = True
    split: bool = True
    frozen: bool = True
    softmax: str = "gradient"
    temperature: float = 1.0
    positions: bool = False
    gamma: float = 0.0
    conserves: bool = True


GAMMA = 0.25

RULE_SETS = {
    rules.name: rules
    for rules in (
        RuleSet("attnlrp", "Achtibat et al. 2024"),
        RuleSet("cp-lrp", "Ali et al. 2022", softmax="stop"),
        RuleSet("relp", "Jafari et al. 2025: the coefficients of cp-lrp, meant for differences of two runs", softmax="stop"),
        RuleSet("gim", "Edin et al. 2025", identity=False, softmax="tempered", temperature=2.0),
        RuleSet("attnlrp-position", "Bakish et al. 2025", positions=True),
        RuleSet("attnlrp-gamma", "Achtibat et al. 2024, with the γ rule of Montavon et al. 2019", gamma=GAMMA),
        RuleSet("gradient-x-input", "Shrikumar et al. 2017", identity=False, split=False, frozen=False, conserves=False),
    )
}


def rule_set(method: str) -> RuleSet:
    """The set of that name.

    Raises:
        SelectionError: there is none.
    """
    if method not in RULE_SETS:
        raise SelectionError(f"no rules {method!r}: there are {', '.join(RULE_SETS)}")
    return RULE_SETS[method]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Read something off a tensor, or set what carries no gradient.
PASS = _names(
    "__get__ __delete__ size dim ndimension numel nelement stride data_ptr storage_offset is_floating_point is_complex __len__ __bool__ "
    "item tolist is_contiguous get_device element_size __hash__ __repr__ __format__ requires_grad_ is_inference untyped_storage _is_view "
    "has_names is_pinned register_hook retain_grad backward grad numpy _assert is_nonzero is_same_size is_set_to is_signed is_conj is_neg "
    "const_data_ptr record_stream"
)
# The result carries no gradient.
DISCRETE = _names(
    "bucketize searchsorted argmax argmin argsort argwhere nonzero eq ne lt gt le ge __eq__ __ne__ __lt__ __gt__ __le__ __ge__ equal "
    "not_equal less less_equal greater greater_equal isnan isinf isfinite isclose allclose isposinf isneginf isreal isin any all "
    "logical_not logical_and logical_or logical_xor signbit bool int long short byte char zeros_like ones_like full_like rand_like "
    "randn_like randint_like empty_like new_zeros new_ones new_full new_empty new_tensor detach detach_ zero_ count_nonzero bincount histc "
    "multinomial bernoulli one_hot unique unique_consecutive"
)
# Linear in their data, or positively homogeneous of degree one: x·f'(x) = f(x), so the own gradient conserves. A test checks each.
LINEAR = _names(
    "view view_as reshape reshape_as flatten unflatten ravel squeeze squeeze_ unsqueeze unsqueeze_ transpose transpose_ t_ permute movedim "
    "moveaxis swapaxes swapdims expand expand_as broadcast_to broadcast_tensors repeat repeat_interleave tile contiguous clone to type "
    "type_as float double half bfloat16 cpu cuda __getitem__ narrow select split split_with_sizes chunk tensor_split hsplit vsplit dsplit "
    "unbind index_select gather take take_along_dim masked_select roll flip fliplr flipud rot90 tril triu tril_ triu_ diagonal diag_embed "
    "diag diagflat sum nansum sum_to_size mean nanmean cumsum cumsum_ neg neg_ negative positive view_as_real view_as_complex real "
    "imag unfold fold as_strided interpolate avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices "
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax "
    "amin aminmax sort msort topk kthvalue median nanmedian mode quantile nanquantile cummax cummin relu relu_ leaky_relu leaky_relu_ "
    "prelu rrelu abs abs_ absolute dropout dropout_ dropout1d dropout2d dropout3d feature_dropout native_dropout pixel_shuffle "
    "pixel_unshuffle channel_shuffle "
    "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn "
    "fft_rfftn fft_irfftn fft_fftshift fft_ifftshift stft istft conj conj_physical resolve_conj resolve_neg t T mT mH H adjoint norm "
    "linalg_vector_norm linalg_norm linalg_matrix_norm frobenius_norm nuclear_norm trace nan_to_num unsafe_chunk "
    "unsafe_split meshgrid atleast_1d atleast_2d atleast_3d affine_grid affine_grid_generator pad_sequence nll_loss nll_loss_nd deg2rad "
    "rad2deg lp_pool1d lp_pool2d lp_pool3d"
)  # fmt: skip
# Linear, unless an argument makes them something else.
MOSTLY = _names(
    "max min pad constant_pad_nd grid_sampler grid_sampler_2d grid_sampler_3d diff index_fill index_fill_ alpha_dropout "
    "feature_alpha_dropout fill_ fill_diagonal_"
)
# Constants beside data, or data written into constants.
JOIN = _names(
    "cat concat concatenate stack hstack vstack dstack column_stack row_stack complex block_diag index_add index_add_ scatter scatter_ "
    "scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_reduce index_reduce_ index_put index_put_ __setitem__ copy_ index_copy "
    "index_copy_ masked_scatter masked_scatter_ select_scatter slice_scatter diagonal_scatter as_strided_scatter put put_"
)
ADD = _names("add __add__ __radd__ __iadd__ add_ sub __sub__ __rsub__ __isub__ sub_ subtract subtract_ rsub")
PRODUCT = _names(
    "mul __mul__ __rmul__ __imul__ mul_ multiply multiply_ matmul __matmul__ __rmatmul__ bmm mm mv dot vdot inner outer ger kron einsum "
    "tensordot linalg_matmul linalg_vecdot vecdot linalg_cross cross chain_matmul linalg_multi_dot multi_dot grouped_mm _grouped_mm "
    "transformers::grouped_mm_fallback"
)
FUSED_PRODUCT = {  # summand + factor · factor: the names of the three
    "baddbmm": ("input", "batch1", "batch2"), "addbmm": ("input", "batch1", "batch2"), "addmm": ("input", "mat1", "mat2"),
    "addmv": ("input", "mat", "vec"), "addr": ("input", "vec1", "vec2"), "addcmul": ("input", "tensor1", "tensor2"),
}  # fmt: skip
AFFINE = _names("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d bilinear")
DIVIDE = _names("div __div__ __truediv__ true_divide true_divide_ __itruediv__ div_ divide divide_")
CONSTANT = _names("rsqrt rsqrt_ reciprocal reciprocal_ __rdiv__ __rtruediv__")  # of a normaliser: no relevance passes
SOFTMAX = _names("softmax _softmax _safe_softmax special_softmax")
NORM = _names("layer_norm rms_norm group_norm instance_norm batch_norm native_layer_norm native_group_norm native_batch_norm")
CLAMP = _names(
    "clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max clamp_max_ hardtanh hardtanh_ relu6 threshold threshold_ "
    "maximum minimum fmax fmin"
)
FILL = _names("masked_fill masked_fill_ where")
# Not zero at zero, steps, and normalisations by data: their own gradient; what they absorb is booked.
GATE = _names(
    "sigmoid exp exp2 softplus logsigmoid log_sigmoid log log2 log10 log_softmax logsumexp logaddexp logaddexp2 logcumsumexp cos cosh "
    "acos arccos acosh arccosh hardsigmoid logit erfc lgamma digamma cumprod var std var_mean std_mean __rpow__ floor ceil round trunc fix "
    "frac sign sgn heaviside angle polar floor_divide __floordiv__ remainder __mod__ fmod special_expit special_exp2 special_logsumexp "
    "special_log_softmax special_logit special_erfc cross_entropy_loss binary_cross_entropy_with_logits"
)
# Element-wise with f(0) = 0, and their slope there.
IDENTITY = {
    "gelu": 0.5, "silu": 0.5, "tanh": 1.0, "erf": 1.1283791670955126, "elu": 1.0, "selu": 1.0507009873554805, "celu": 1.0, "mish": 0.6,
    "softsign": 1.0, "hardswish": 0.5, "tanhshrink": 0.0, "softshrink": 0.0, "hardshrink": 0.0, "sin": 1.0, "tan": 1.0, "arctan": 1.0,
    "atan": 1.0, "sinh": 1.0, "asinh": 1.0, "arcsinh": 1.0, "asin": 1.0, "arcsin": 1.0, "atanh": 1.0, "arctanh": 1.0,
    "erfinv": 0.8862269254527580, "expm1": 1.0, "log1p": 1.0, "special_erf": 1.1283791670955126, "special_expm1": 1.0, "special_log1p": 1.0,
    "sqrt": 0.0, "square": 0.0,
}  # fmt: skip
