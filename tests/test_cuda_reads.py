"""The compiled kernels read the tensors that their sources name, each from its own place.

A host emulator runs what the sources say; what nvcc makes of them, without a GPU, is seen here. Its
version 13.0 took x for dy, silently, where a kernel chose between the two.
"""

from functools import cache

import cuda_reads
import cuda_sass
import pytest

from adapterkern.backends.cuda import extension

# What each kernel reads of each view: its data, its type, its stride. Vectors have no stride, and
# work space and z have the type of the products.
IN = "x:dts down_weight:dts"
FORWARD_OUT = "up_weight:dts up_bias:dt residual:dts skip:dts scaling:dt y:dts z:ds"
IN_WHOLE = "x:ds down_weight:ds"
FORWARD_OUT_WHOLE = "up_weight:ds up_bias:dt residual:ds skip:ds scaling:dt y:ds z:ds"
NORM_OUT = "norm_weight:dt norm_bias:dt normed:dts mean:d rstd:d"
BACK_IN = "dy:dts up_weight:dts scaling:dt"
BACK_OUT = "dy:dts z:dts down_weight:dts scaling:dt dx:dts dz:ds a:ds"
NORM_IN = "d_normed:d d_stream:d stream:d mean:d rstd:d norm_weight:dt"
NORM_SUMS = "sum_norm_weight:ds sum_norm_bias:ds"
SUMS = "sum_down:ds sum_up:ds sum_down_bias:ds sum_up_bias:ds"
SUMS_OUT = "d_down_weight:dts d_up_weight:dts d_down_bias:dt d_up_bias:dt d_scaling:dt"
GROUPED_IN = "x:dts down_weights:dts ranks:d"
GROUPED_OUT = (
    "up_weights:dts down_biases:dts up_biases:dts residual:dts skip:dts scalings:d y:dts z:ds"
)
READS = {
    "fwd row_block": f"{IN} down_bias:dt {FORWARD_OUT}",
    "fwd split_first": f"{IN} partial:d",
    "fwd split_second": f"x:dts down_bias:dt {FORWARD_OUT} partial:d",
    "fwd cluster": f"{IN} down_bias:dt {FORWARD_OUT}",
    # A norm's sum has the dtype of the products.
    "fwd cluster norm": f"{IN} down_bias:dt {FORWARD_OUT.replace('y:dts', 'y:ds')} {NORM_OUT}",
    # Their rows, weights and outputs have the type of the products.
    "fwd resident": f"{IN_WHOLE} down_bias:dt {FORWARD_OUT_WHOLE}",
    "bwd resident": "dy:ds up_weight:ds scaling:dt z:dts down_weight:ds dx:ds dz:ds a:ds",
    "bwd row_block": f"{BACK_IN} {BACK_OUT}",
    "bwd split_first": f"{BACK_IN} partial:d",
    "bwd split_second": f"{BACK_OUT} partial:d",
    "bwd cluster": f"{BACK_IN} {BACK_OUT}",
    "bwd bwd_dw direct": f"x:ds dy:ds dz:ds a:ds {SUMS}",
    "bwd bwd_dw": f"x:dts dy:dts dz:ds a:ds {SUMS}",
    "bwd bwd_dw_sum": f"{SUMS} up_weight:dts up_bias:dt scaling:dt {SUMS_OUT}",
    "bwd bwd_norm": f"{NORM_IN} dy:d {NORM_SUMS}",
    "bwd bwd_norm_sum": f"{NORM_SUMS} d_norm_weight:dt d_norm_bias:dt",
    "grouped tiles": f"{GROUPED_IN} {GROUPED_OUT} order:d tiles:d",
    "grouped rows_first": f"{GROUPED_IN} token_slots:d partial:d",
    "grouped rows_second": f"x:dts ranks:d {GROUPED_OUT} token_slots:d partial:d",
}
ARCHS = [*cuda_sass.ARCHS, "compute_90"]


@cache
def reads(arch: str) -> dict[str, cuda_reads.Reads]:
    cuda_sass.archs()  # skips without an extension
    if arch not in extension.build_record().archs:
        pytest.skip(f"the extension holds no code for {arch}")
    return cuda_reads.of(arch)


def kind_of(mangled: str) -> str:
    direction = "fwd" if "ForwardI" in mangled else "bwd"
    name = cuda_sass.kernel_name(mangled).removeprefix("bottleneck_").removesuffix("_kernel")
    if name.startswith("grouped_"):
        return name.replace("_", " ", 1)
    name += " norm" * ("NormForwardI" in mangled)
    return f"{direction} {name}" + " direct" * ("Gradient" in mangled and "ELb1EEEv" in mangled)


def is_compiled(kind: str, arch: str) -> bool:
    if "resident" in kind:
        return arch == "sm_90a"
    return arch != "sm_80" or "cluster" not in kind


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_read_the_views_that_their_sources_name(arch):
    seen = set()
    for name, found in reads(arch).items():
        expected = set() if cuda_sass.is_empty(arch, name) else set(READS[kind_of(name)].split())
        assert found.by_view() == expected, name
        seen |= {kind_of(name)} if expected else set()
    assert seen == {kind for kind in READS if is_compiled(kind, arch)}


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compute_no_address_within_their_parameters(arch):
    """A choice between two of them, made by address, is what nvcc lost: see `choose`."""
    for name, found in reads(arch).items():
        assert found.computed == (), name


@pytest.mark.parametrize("arch", ARCHS)
def test_every_weight_gradient_kernel_reads_both_dy_and_x(arch):
    found = [each.words for name, each in reads(arch).items() if "bwd_dw_kernel" in name]
    assert len(found) == 16
    for words in found:
        assert {"x.data", "x.stride", "dy.data", "dy.stride"} <= words


MACHINE_CODE = """
	code for sm_90a
		Function : _ZN24bottleneck_bwd_dw_kernelE
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDC.64 R4, c[0x0][0x228] ;
        /*0020*/                   IMAD R4, R3, c[0x0][0x254], R4 ;
        /*0030*/                   LDC.64 R6, c[0x0][{}] ;
"""
PTX = """
	.param .align 8 .b8 K_param_0[632]
)
{{
	mov.b64 	%rd3, K_param_0;
	add.s64 	%rd4, %rd3, 24;
	ld.param.u64 	%rd5, [%rd4];
	ld.param.u64 	%rd6, [K_param_0+64];
	{}
	ld.param.u64 	%rd8, [%rd7+8];
	ld.param.b64 	%rd9, [retval0];
}}
"""


@pytest.mark.parametrize(
    ("operand", "words", "computed"),
    [("0x240", {"dy.data"}, 0), ("R2+0x240", set(), 1), ("0x210", set(), 0)],
)
def test_reads_of_machine_code(operand, words, computed):
    ((name, code),) = cuda_sass.parse(MACHINE_CODE.format(operand)).items()
    found = cuda_reads.of_machine_code(name, code, cuda_reads.FIRST["sm_9"])
    assert (found.words, len(found.computed)) == ({"x.data", "dy.stride"} | words, computed)


@pytest.mark.parametrize(
    ("definition", "words", "computed"),
    [
        ("add.s64 	%rd7, %rd4, 24;", {"dy.type"}, 0),
        ("selp.b64 	%rd7, %rd3, %rd4, %p1;", set(), 1),
        ("add.s64 	%rd7, %rd3, 24;\n	@%p1 add.s64 	%rd7, %rd3, 48;", set(), 1),
        ("add.s64 	%rd7, %rd3, %rd5;", set(), 1),
    ],
)
def test_reads_of_ptx(definition, words, computed):
    found = cuda_reads.of_ptx("K", PTX.format(definition))
    assert (found.words, len(found.computed)) == ({"x.data", "dy.stride"} | words, computed)


def test_views_are_told_by_the_first_letters_of_their_words():
    words = frozenset({"x.data", "x.stride", "z.type"})
    assert cuda_reads.Reads(words, ()).by_view() == {"x:ds", "z:t"}
