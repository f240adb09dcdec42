"""The reader of machine code finds loops, counts in them, and sees which loads overlap."""

import cuda_sass
import sass

CODE = """
		Function : _ZN11bottleneck_fwd_kernelE
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;       /* 0x00000a00ff017b82 */
        /*0020*/              @!P0 LDG.E.64 R8, desc[UR4][R2.64+0x10] ;   /* 0x00000a00ff017b82 */
        /*0030*/                   IADD3 R2, R2, 0x20, RZ ;               /* 0x00000a00ff017b82 */
        /*0040*/                   FADD R10, R7, R9 ;                     /* 0x00000a00ff017b82 */
        /*0050*/                   MUFU.EX2 R10, R10 ;                    /* 0x00000a00ff017b82 */
        /*0060*/               @P1 BRA 0x30 ;                             /* 0x00000a00ff017b82 */
        /*0070*/                   LDG.E R4, desc[UR4][R2.64] ;           /* 0x00000a00ff017b82 */
        /*0080*/              @!P2 BRA 0x10 ;                             /* 0x00000a00ff017b82 */
        /*0090*/                   EXIT ;                                 /* 0x00000a00ff017b82 */
        /*00a0*/                   BRA 0xa0;                              /* 0x00000a00ff017b82 */
		Function : _ZN5probe_kernelE
        /*0000*/                   EXIT ;                                 /* 0x00000a00ff017b82 */
"""


def test_parse_gives_every_kernel_its_instructions_without_predicates():
    kernels = cuda_sass.parse(CODE)
    assert {name: len(code) for name, code in kernels.items()} == {
        "_ZN11bottleneck_fwd_kernelE": 11,
        "_ZN5probe_kernelE": 1,
    }
    load = kernels["_ZN11bottleneck_fwd_kernelE"][2]
    assert (load.address, load.opcode, load.name) == (0x20, "LDG.E.64", "LDG")
    assert load.registers == [8, 2]


def test_loops_are_found_by_their_backward_branches():
    code = cuda_sass.parse(CODE)["_ZN11bottleneck_fwd_kernelE"]
    inner, outer = sass.loops(code)
    assert (inner.span, outer.span) == ((0x30, 0x60), (0x10, 0x80))
    assert sass.innermost_loops(code) == [inner]
    assert (inner.count(), inner.count("LDG"), inner.count("MUFU", "FADD")) == (4, 0, 2)
    assert outer.count("LDG") == 3


def test_loads_are_in_flight_until_a_register_of_theirs_is_used():
    """R7 is the last of the four registers that the first load fills."""
    code = cuda_sass.parse(CODE)["_ZN11bottleneck_fwd_kernelE"]
    assert cuda_sass.most_in_flight(code) == 2
    assert cuda_sass.most_in_flight(code[4:]) == 1
    used_between = [code[1], code[4], code[2]]
    assert cuda_sass.most_in_flight(used_between) == 1


def test_double_precision_is_seen_in_conversions_too():
    texts = [
        "DADD R2, R4, R6",
        "F2F.F32.F64 R0, R2",
        "I2F.F64 R2, R0",
        "F2F.F16.F32 R0, R1",
        "DEPBAR.LE SB0, 0x1",
    ]
    code = [sass.Instruction(16 * i, text) for i, text in enumerate(texts)]
    assert cuda_sass.in_double(code) == code[:3]


def test_kernel_name_is_that_of_the_profilers():
    assert cuda_sass.kernel_name("_ZN11adapterkern24bottleneck_bwd_dw_kernelINS_1E") == (
        "bottleneck_bwd_dw_kernel"
    )
    assert cuda_sass.kernel_name("_ZN11adapterkern12probe_kernelEPi") is None
